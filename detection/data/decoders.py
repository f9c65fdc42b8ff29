"""Which library turns the bytes of a JPEG into pixels. Each gives the same pixels; simplejpeg is faster.

What is a damaged file is not for a decoder to say: where another one complains, OpenCV is asked.
"""

import importlib.metadata
from collections.abc import Callable

import cv2
import numpy as np

from detection.errors import SettingsError

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # a damaged image is one line, and that one is ours

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
