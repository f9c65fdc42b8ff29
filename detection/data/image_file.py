"""Image files: what the header says, strict decoding to RGB, and which files of a dataset are not there.

Everything that could hang or fill the memory is refused before it is opened or decoded.
"""

import importlib.metadata
import io
import os
import stat
import struct
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps

from detection.errors import DataReadError, SettingsError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}

MAX_PIXELS = 100_000_000  # decoded, 300 MB; a file of 190 kB can unpack to more
MAX_BYTES = 2**30
ORIENTATION_TAG = 0x0112  # of EXIF
MARKERS = {"JPEG": (b"\xff\xd8", b"\xff\xd9"), "PNG": (b"\x89PNG", b"IEND")}  # begin and end of a whole file
DAMAGED_HEADER = (OSError, ValueError, SyntaxError, EOFError, OverflowError, KeyError)  # what Pillow raises


class Header(NamedTuple):
    """What an image file says about itself."""

    format: str  # Pillow's name
    width: int  # as stored, before the EXIF orientation
    height: int
    mode: str  # Pillow's
    bits: int  # per channel
    orientation: int  # of EXIF, 1..8
    transparent: bool
    exif: bool

    def turned_size(self) -> tuple[int, int]:
        """Width and height after the EXIF orientation, as it is decoded."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def read_image(path: Path, decoder: str = "opencv") -> np.ndarray:
    """Decode an image file to RGB uint8, (height, width, 3).

    EXIF orientation is applied; grey, palette and CMYK are converted; 16 bits are scaled to 8; transparent pixels are
    laid over mid grey. A truncated file is an error, never a half-grey picture.

    Args:
        decoder: of JPEG files, a name of `JPEG_DECODERS`; neither pixels nor errors depend on it.

    Raises:
        DataReadError: the file is missing, not a regular file, not an image, too large, or damaged.
    """
    encoded = read_file(path)
    header = read_header(encoded, path)
    return decode_image(encoded, header, path, decoder)


def read_file(path: Path) -> np.ndarray:
    """The bytes of a regular file; a pipe, a device or a directory is not opened.

    Raises:
        DataReadError: see `read_image`.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataReadError(f"image {path} cannot be read: not a regular file")
        if status.st_size > MAX_BYTES:
            raise DataReadError(f"image {path} has {status.st_size} bytes, at most {MAX_BYTES} are read")
        return np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise DataReadError(f"image {path} cannot be read: {error.strerror}") from None


def read_header(encoded: np.ndarray, path: Path) -> Header | None:
    """Header of an image without decoding it; None where Pillow does not know the format (OpenCV may).

    Raises:
        DataReadError: the image would have more than MAX_PIXELS pixels.
    """
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(encoded.tobytes())) as file:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is our own
            header = Header(
                format=str(file.format),
                width=file.width,
                height=file.height,
                mode=file.mode,
                bits=_bits_per_channel(encoded, file),
                orientation=_orientation(file),
                transparent=file.has_transparency_data,
                exif="exif" in file.info,
            )
    except Image.DecompressionBombError:
        raise DataReadError(f"image {path} has more than {MAX_PIXELS} pixels; it is not decoded") from None
    except DAMAGED_HEADER:
        return None
    if header.width * header.height > MAX_PIXELS:
        raise DataReadError(
            f"image {path} has {header.width} x {header.height} pixels, more than {MAX_PIXELS}; it is not decoded"
        )
    return header


def _orientation(file: Image.Image) -> int:
    """1..8; 1 where the EXIF data is absent or damaged."""
    if file.format == "PNG" and "exif" not in file.info:
        return 1  # Pillow would decode the whole image in search of EXIF data behind the pixels
    try:
        orientation = file.getexif().get(ORIENTATION_TAG, 1)
    except (*DAMAGED_HEADER, struct.error, TypeError, IndexError):
        return 1
    return orientation if orientation in range(1, 9) else 1


def _bits_per_channel(encoded: np.ndarray, file: Image.Image) -> int:
    """Pillow shows colour PNG of 16 bits as 8."""
    if file.format == "PNG":
        return int(encoded[24])  # bit depth of the header chunk
    return {"1": 1, "I": 32, "F": 32}.get(file.mode, 16 if file.mode.startswith("I;16") else 8)


def decode_image(encoded: np.ndarray, header: Header | None, path: Path, decoder: str = "opencv") -> np.ndarray:
    """See `read_image`."""
    # OpenCV fills the missing rest of some truncated files with grey; a complete one holds its end marker.
    for name, (start, end) in MARKERS.items():
        if encoded[: len(start)].tobytes() == start and encoded.tobytes().rfind(end) < 0:
            raise DataReadError(f"image {path} is damaged: the {name} data ends early")
    # OpenCV turns by the EXIF orientation and reads the rest: CMYK, other formats.
    plain = header is not None and header.format == "JPEG" and header.mode in ("RGB", "L") and not header.exif
    image = JPEG_DECODERS[decoder if plain else "opencv"](encoded)
    if image is None:
        raise DataReadError(f"image {path} is damaged or in a format that OpenCV does not read")
    alpha = read_alpha(encoded) if header is not None and header.transparent else None
    if alpha is not None and alpha.shape[:2] == image.shape[:2]:
        image = np.round(image * alpha + 128 * (1 - alpha)).astype(np.uint8)
    return image


def read_alpha(encoded: np.ndarray) -> np.ndarray | None:
    """Opacity 0..1 of a picture with transparency, (height, width, 1) float32; None where it cannot be read.

    By Pillow: OpenCV does not turn the alpha channel by the EXIF orientation and knows no transparent grey.
    """
    try:
        with Image.open(io.BytesIO(encoded.tobytes())) as file:
            return np.asarray(ImageOps.exif_transpose(file).convert("RGBA"), dtype=np.float32)[..., 3:] / 255
    except (*DAMAGED_HEADER, Image.DecompressionBombError):
        return None  # a format that only OpenCV reads


@dataclass
class Listing:
    """The files of a dataset against the image directory; positions are those of the names asked for."""

    missing: list[int] = field(default_factory=list)
    not_regular: list[int] = field(default_factory=list)  # directory, pipe, socket, device
    outside: list[int] = field(default_factory=list)  # behind links that lead out of the image directory
    present: dict[Path, set[str]] = field(default_factory=dict)  # regular files of each directory that was looked at
    listed: dict[Path, set[str]] = field(default_factory=dict)  # of these, what was asked for


def list_images(root: Path, names: Sequence[str], follow_links: bool) -> Listing:
    """Look up all names by one listing per directory: a question per file takes long on a network drive.

    Args:
        root: image directory.
        follow_links: whether links may lead out of it.
    """
    in_directory: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for position, name in enumerate(names):
        head, _, tail = name.rpartition("/")
        in_directory[head].append((position, tail))
    listing = Listing()
    real_root = root.resolve()
    for head, wanted in in_directory.items():
        directory = root / head
        regular = listing.present.setdefault(directory, regular_files(directory))
        listing.listed.setdefault(directory, set()).update(name for _, name in wanted)
        inside = follow_links or directory.resolve().is_relative_to(real_root)  # a directory may be a link too
        for position, name in wanted:
            if name in regular and inside:
                continue
            path = directory / name
            if not path.exists():  # asked again: file systems spell some names in several ways
                listing.missing.append(position)
            elif not follow_links and not path.resolve().is_relative_to(real_root):
                listing.outside.append(position)
            elif not path.is_file():
                listing.not_regular.append(position)
    return listing


def regular_files(directory: Path) -> set[str]:
    """Names in a directory, without links; none where it cannot be listed."""
    try:
        with os.scandir(directory) as entries:
            return {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}
    except OSError:
        return set()


class UniqueNames:
    """Hands out names for files without suffix: the wanted one, or with _2, _3, ... behind it if that is taken.

    Upper and lower case do not differ, as on some file systems.
    """

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def take(self, wanted: str) -> str:
        name, number = wanted, 1
        while name.casefold() in self._taken:
            number += 1
            name = f"{wanted}_{number}"
        self._taken.add(name.casefold())
        return name


Decode = Callable[[np.ndarray], np.ndarray | None]


def decode_with_opencv(encoded: np.ndarray) -> np.ndarray | None:
    """RGB uint8, (height, width, 3), turned by EXIF; None where the bytes are damaged or in no known format."""
    try:
        return cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB) if len(encoded) else None
    except cv2.error:
        return None


def decode_with_simplejpeg(encoded: np.ndarray) -> np.ndarray | None:
    """As `decode_with_opencv` for a JPEG without EXIF, in 0.92 of its time."""
    import simplejpeg

    try:
        return simplejpeg.decode_jpeg(encoded, "RGB", strict=True)
    except ValueError:  # damage, be it as little as OpenCV would only warn of
        return decode_with_opencv(encoded)


JPEG_DECODERS: dict[str, Decode] = {"opencv": decode_with_opencv, "simplejpeg": decode_with_simplejpeg}


def choose_decoder(name: str) -> str:
    """A name of JPEG_DECODERS; "auto" is simplejpeg where it is installed, else OpenCV.

    Raises:
        SettingsError: simplejpeg was asked for by name and is not installed.
    """
    if name == "opencv":
        return name
    try:
        import simplejpeg  # noqa: F401
    except ImportError:
        if name == "auto":
            return "opencv"
        raise SettingsError("data.decoder: simplejpeg is not installed (pip install simplejpeg)") from None
    return "simplejpeg"


def describe_decoder(name: str) -> str:
    """The libraries that decode under this name of JPEG_DECODERS, with their versions, for a checkpoint."""
    other = "" if name == "opencv" else f"simplejpeg {importlib.metadata.version('simplejpeg')}, "
    return f"{other}OpenCV {cv2.__version__}"
