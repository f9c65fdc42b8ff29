"""Resize, and how an image is laid into the square of the network input."""

import cv2
import numpy as np

from detection.postprocessing import Letterbox

CORNER_ALIGNED = -1  # no method of OpenCV, which aligns the outer edges of the pixels; `resize_image` has its own
INTERPOLATIONS = {
    "linear": cv2.INTER_LINEAR,
    "area": cv2.INTER_AREA,
    "cubic": cv2.INTER_CUBIC,
    "darknet": CORNER_ALIGNED,
}


def letterbox_geometry(
    width: int, height: int, size: int, keep_aspect: bool, rounding: str = "nearest"
) -> tuple[Letterbox, int, int]:
    """Where an image of (width, height) lies in a square of `size`: the letterbox, and its new width and height.

    Args:
        rounding: of the shorter side to whole pixels, "nearest" or "down". The program Darknet rounds down.

    Source: letterbox_image in src/image.c of https://github.com/pjreddie/darknet for "down"
    """
    longest = max(width, height)
    if not keep_aspect:
        new_width = new_height = size
    elif rounding == "down":
        new_width, new_height = max(width * size // longest, 1), max(height * size // longest, 1)
    else:
        scale = size / longest
        new_width, new_height = max(round(width * scale), 1), max(round(height * scale), 1)
    left, top = (size - new_width) // 2, (size - new_height) // 2
    return Letterbox(new_width / width, new_height / height, left, top, width, height), new_width, new_height


def letterbox_image(
    image: np.ndarray,
    size: int,
    keep_aspect: bool,
    fill: tuple[int, int, int],
    interpolation: int,
    rounding: str = "nearest",
) -> tuple[np.ndarray, Letterbox]:
    """Resize (H, W, 3) uint8 into the centre of a (size, size, 3) square; aspect kept, or squashed."""
    letterbox, new_width, new_height = letterbox_geometry(image.shape[1], image.shape[0], size, keep_aspect, rounding)
    image = resize_image(image, new_width, new_height, interpolation)
    return pad_image(image, letterbox.left, letterbox.top, size, fill), letterbox


def pad_image(image: np.ndarray, left: int, top: int, size: int, fill: tuple[int, int, int]) -> np.ndarray:
    """Lay (H, W, 3) uint8 on a (size, size, 3) square of the fill colour, its corner at (left, top)."""
    height, width = image.shape[:2]
    if (width, height) == (size, size):
        return image
    right, bottom = size - width - left, size - height - top
    return cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_CONSTANT, value=fill)


def resize_image(image: np.ndarray, width: int, height: int, interpolation: int) -> np.ndarray:
    """(H, W, 3) uint8 to (height, width, 3); `interpolation` is a value of INTERPOLATIONS."""
    if (width, height) == (image.shape[1], image.shape[0]):
        return image
    if interpolation != CORNER_ALIGNED:
        return cv2.resize(image, (width, height), interpolation=interpolation)
    columns = cv2.transpose(_blend_rows(image, height))
    return cv2.transpose(np.rint(_blend_rows(columns, width)).astype(np.uint8))


def _blend_rows(image: np.ndarray, count: int) -> np.ndarray:
    """`count` rows between the first and the last row of (H, W, 3), each bilinear from its two neighbours; float32.

    source = row * (H - 1) / (count - 1); a single row is the last one.

    cv2.warpAffine does the same in a third of the time, but before OpenCV 5 only to 1/32 of a pixel.

    Source: resize_image in src/image.c of https://github.com/pjreddie/darknet; differs: a single row is undefined
    there (a division by zero), a single column is the last one.
    """
    last = len(image) - 1
    source = np.arange(count) * (last / (count - 1)) if count > 1 else np.full(1, float(last))
    above = np.minimum(source.astype(np.int64), last)
    share = (source - above).astype(np.float32)[:, None, None]
    blended = np.take(image, above, axis=0).astype(np.float32)
    blended += (np.take(image, np.minimum(above + 1, last), axis=0) - blended) * share
    return blended
