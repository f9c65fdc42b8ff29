"""What the detectors of `load_detector` look at, as pixels: paths, addresses, arrays, PIL images."""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from detection.data.image_file import read_image
from detection.errors import DataError, DataReadError
from detection.inference.web import is_url, read_picture, without_password

Picture = str | os.PathLike[str] | np.ndarray | Image.Image
WHAT_IS_AN_IMAGE = "an image is a path, an address, a uint8 array (H, W, 3) in RGB or (H, W) in grey, or a PIL image"
GREY = (128, 128, 128)  # behind transparent pixels, as `read_image` has it
DEEP_MODES = ("I", "F")  # Pillow's modes of more than 8 bits per channel


def is_single(images: Any) -> bool:
    """Return whether an argument is one image, not several; bytes, tensors and dicts count as one, to be refused."""
    whole = str | os.PathLike | np.ndarray | Image.Image | bytes | bytearray | Mapping | Tensor
    return isinstance(images, whole) or not isinstance(images, Iterable)


def as_pixels(image: Any) -> np.ndarray:
    """Return an image as RGB uint8 (H, W, 3); arguments and errors: see `ImageDetector.__call__`."""
    if isinstance(image, str | os.PathLike):
        address = isinstance(image, str) and is_url(image)
        try:
            if address and not str(image).lower().startswith("http"):
                raise DataReadError(f"{without_password(str(image))}: a stream; detect.py looks at those")
            return read_picture(str(image)) if address else read_image(Path(image))
        except ValueError as error:  # a malformed address, which may hold a password; a zero byte in a name
            raise DataReadError(f"{'the address' if address else repr(os.fspath(image))}: {error}") from None
    if isinstance(image, Image.Image):
        try:
            return _pixels_of_pil(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # decoded only now
            raise DataError(f"a PIL image that cannot be decoded: {' '.join(str(error).split())[:200]}") from None
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and image.size and image.ndim in (2, 3) and (image.shape[2:] or (1,))[0] in (1, 3):
            height, width = image.shape[:2]
            return np.ascontiguousarray(np.broadcast_to(image.reshape(height, width, -1), (height, width, 3)))
        hint = "; several images go into a list" if image.ndim == 4 else ""
        raise DataError(
            f"an array must be uint8, RGB (H, W, 3) or grey (H, W), this is {image.dtype} {image.shape}{hint}"
        )
    raise DataError(f"{WHAT_IS_AN_IMAGE}, not {type(image).__name__}")


def _pixels_of_pil(image: Image.Image) -> np.ndarray:
    if not all(image.size):
        raise DataError("a PIL image without pixels")
    if image.mode.split(";")[0] in DEEP_MODES:
        raise DataError(f"a PIL image of mode {image.mode}: give 8 bits per channel, or the path of its file")
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (*GREY, 255)), layer)
    return np.asarray(image.convert("RGB"))


def numbered_pixels(images: Iterable[Any]) -> Iterator[np.ndarray]:
    """Yield the pixels of each image; an error says which it was, unless it names the file."""
    for number, image in enumerate(images):
        try:
            yield as_pixels(image)
        except DataReadError:
            raise
        except DataError as error:
            raise DataError(f"image {number}: {error}") from None
