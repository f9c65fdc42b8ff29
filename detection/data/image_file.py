"""Image files: headers, strict decoding to RGB, and the search for missing files of a dataset.

Whatever could block or exhaust the memory is refused before it is opened or decoded.
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

from detection.data.stored_image import ImageFile
from detection.errors import DataReadError, SettingsError

# The formats that OpenCV (a .dib without file header: Pillow) decodes to the right colours; of an animation the first
# image.
IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".avif", ".gif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".jp2", ".j2k", ".pbm", ".pgm", ".ppm", ".pnm", ".sr", ".ras"),
}

MAX_PIXELS = 100_000_000  # 300 MB decoded; a file of 190 kB can decompress to more
MAX_BYTES = 2**30
ORIENTATION_TAG = 0x0112  # EXIF tag of the orientation
MARKERS = {"JPEG": (b"\xff\xd8", b"\xff\xd9"), "PNG": (b"\x89PNG", b"IEND")}  # start and end of a complete file
DAMAGED_HEADER = (OSError, ValueError, SyntaxError, EOFError, OverflowError, KeyError)  # raised by Pillow


class Header(NamedTuple):
    """Header of an image file."""

    format: str  # Pillow's name of the format
    width: int  # as stored, before the EXIF orientation
    height: int
    mode: str  # Pillow's mode
    bits: int  # per channel
    orientation: int  # EXIF orientation, 1..8
    transparent: bool
    exif: bool

    def turned_size(self) -> tuple[int, int]:
        """Width and height after applying the EXIF orientation, as decoded."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def read_image(path: ImageFile, decoder: str = "opencv") -> np.ndarray:
    """Decode an image file to RGB uint8, (height, width, 3).

    The EXIF orientation is applied; grey, palette and CMYK images are converted; 16 bits are scaled to 8; transparent
    pixels are blended with mid grey. A truncated file raises instead of yielding a partly grey image.

    Args:
        decoder: decoder of JPEG files, a key of `JPEG_DECODERS`; neither pixels nor errors depend on it.

    Raises:
        DataReadError: the file is missing, not a regular file, not an image, too large, or damaged.
    """
    encoded = read_file(path)
    header = read_header(encoded, path)
    return decode_image(encoded, header, path, decoder)


def read_file(path: ImageFile) -> np.ndarray:
    """Read the bytes of an image: of a regular file, without opening pipes, devices or directories.

    Raises:
        DataReadError: as in `read_image`.
    """
    if not isinstance(path, Path):
        return path.read()
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataReadError(f"image {path} cannot be read: not a regular file")
        if status.st_size > MAX_BYTES:
            raise DataReadError(f"image {path} has {status.st_size} bytes, at most {MAX_BYTES} are read")
        return np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise DataReadError(f"image {path} cannot be read: {error.strerror}") from None


def read_header(encoded: np.ndarray, path: ImageFile | str) -> Header | None:
    """Read the header of an image; None if Pillow does not know the format (OpenCV may).

    Raises:
        DataReadError: the image has more than MAX_PIXELS pixels.
    """
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(encoded.tobytes())) as file:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS applies instead
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
    """Return the EXIF orientation, 1..8; 1 if the EXIF data is absent or damaged."""
    if file.format == "PNG" and "exif" not in file.info:
        return 1  # Pillow would decode the whole image to look for EXIF data after the pixels
    try:
        orientation = file.getexif().get(ORIENTATION_TAG, 1)
    except (*DAMAGED_HEADER, struct.error, TypeError, IndexError):
        return 1
    return orientation if orientation in range(1, 9) else 1


def _bits_per_channel(encoded: np.ndarray, file: Image.Image) -> int:
    """Return the bits per channel, also of 16-bit colour PNG, which Pillow opens with 8."""
    if file.format == "PNG":
        return int(encoded[24])  # bit depth of the header chunk
    return {"1": 1, "I": 32, "F": 32}.get(file.mode, 16 if file.mode.startswith("I;16") else 8)


def decode_image(
    encoded: np.ndarray, header: Header | None, path: ImageFile | str, decoder: str = "opencv"
) -> np.ndarray:
    """Decode the bytes of an image file; arguments, result and errors as in `read_image`."""
    # OpenCV fills the missing rest of some truncated files with grey; a complete file has its end marker.
    for name, (start, end) in MARKERS.items():
        if encoded[: len(start)].tobytes() == start and encoded.tobytes().rfind(end) < 0:
            raise DataReadError(f"image {path} is damaged: the {name} data ends early")
    # Only OpenCV applies the EXIF orientation and reads CMYK and other formats.
    plain = header is not None and header.format == "JPEG" and header.mode in ("RGB", "L") and not header.exif
    if header is not None and header.format == "DIB":  # a bitmap without a file header, which OpenCV does not read
        image = decode_with_pillow(encoded)
    else:
        image = JPEG_DECODERS[decoder if plain else "opencv"](encoded)
    if image is None:
        raise DataReadError(f"image {path} is damaged or in a format that is not read")
    alpha = read_alpha(encoded) if header is not None and header.transparent else None
    if alpha is not None and alpha.shape[:2] == image.shape[:2]:
        image = np.round(image * alpha + 128 * (1 - alpha)).astype(np.uint8)
    return image


def decode_with_pillow(encoded: np.ndarray) -> np.ndarray | None:
    """Decode to RGB uint8, (height, width, 3); None if damaged."""
    try:
        with Image.open(io.BytesIO(encoded.tobytes())) as file:
            return np.array(file.convert("RGB"))
    except (*DAMAGED_HEADER, struct.error):
        return None


def read_alpha(encoded: np.ndarray) -> np.ndarray | None:
    """Read the opacity 0..1 of an image with transparency, (height, width, 1) float32; None if Pillow cannot.

    Not with OpenCV, which does not apply the EXIF orientation to the alpha channel or support transparent grey.
    """
    try:
        with Image.open(io.BytesIO(encoded.tobytes())) as file:
            return np.asarray(ImageOps.exif_transpose(file).convert("RGBA"), dtype=np.float32)[..., 3:] / 255
    except (*DAMAGED_HEADER, Image.DecompressionBombError):
        return None  # a format that only OpenCV reads


@dataclass
class Listing:
    """Result of looking up a dataset's files; positions are indices into the requested names."""

    missing: list[int] = field(default_factory=list)
    not_regular: list[int] = field(default_factory=list)  # directory, pipe, socket, device
    outside: list[int] = field(default_factory=list)  # links that lead out of the image directory
    present: dict[Path, set[str]] = field(default_factory=dict)  # regular files of each visited directory
    listed: dict[Path, set[str]] = field(default_factory=dict)  # requested names of each visited directory


def list_images(root: Path, names: Sequence[str], follow_links: bool) -> Listing:
    """Look up all names with one listing per directory: a stat per file is slow on a network drive.

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
            if not is_there(path):  # ask the file system too: it may normalise names
                listing.missing.append(position)
            elif not follow_links and not path.resolve().is_relative_to(real_root):
                listing.outside.append(position)
            elif not path.is_file():
                listing.not_regular.append(position)
    return listing


def is_there(path: Path) -> bool:
    """Return whether a file exists; what must not be looked at counts as absent."""
    try:
        return path.exists()
    except PermissionError:
        return False


def regular_files(directory: Path) -> set[str]:
    """Return the names of regular files in a directory, without links; empty if it cannot be listed."""
    try:
        with os.scandir(directory) as entries:
            return {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}
    except OSError:
        return set()


class UniqueNames:
    """Allocator of unique file stems: appends _2, _3, ... to a stem that is taken, ignoring case."""

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
    """Decode to RGB uint8, (height, width, 3), with the EXIF orientation applied; None if damaged or unsupported."""
    try:
        return cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB) if len(encoded) else None
    except cv2.error:
        return None


def decode_with_simplejpeg(encoded: np.ndarray) -> np.ndarray | None:
    """Decode a JPEG without EXIF; same pixels as `decode_with_opencv` in 0.92 of its time."""
    import simplejpeg

    try:
        return simplejpeg.decode_jpeg(encoded, "RGB", strict=True)
    except ValueError:  # also for damage that OpenCV tolerates
        return decode_with_opencv(encoded)


JPEG_DECODERS: dict[str, Decode] = {"opencv": decode_with_opencv, "simplejpeg": decode_with_simplejpeg}


def choose_decoder(name: str) -> str:
    """Resolve `data.decoder` to a key of `JPEG_DECODERS`; "auto" is simplejpeg if installed, else OpenCV.

    Raises:
        SettingsError: simplejpeg is requested explicitly but not installed.
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
    """Name the libraries that a key of `JPEG_DECODERS` uses, with their versions."""
    other = "" if name == "opencv" else f"simplejpeg {importlib.metadata.version('simplejpeg')}, "
    return f"{other}OpenCV {cv2.__version__}"
