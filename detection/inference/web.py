"""Pictures and streams from the network: addresses, and reading with time limits."""

import base64
import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from detection.data.image_file import IMAGE_SUFFIXES, MAX_BYTES, decode_image, read_header
from detection.errors import DataReadError

SCHEMES = ("http", "https", "rtsp", "rtsps", "rtmp")
TIMEOUT = 10.0  # seconds without a byte, and seconds to open a stream
LONGEST = 60.0  # seconds for a whole picture
INDEXED = {".mp4", ".m4v", ".mov", ".3gp"}  # video files with an index, which may be at the end
INDEXED_TYPES = {"video/mp4", "video/x-m4v", "video/quicktime", "video/3gpp"}
CHUNK = 2**16
FAILURES = (OSError, http.client.HTTPException, ValueError)  # URLError is an OSError; ValueError: a malformed address


def is_url(word: str) -> bool:
    """Return whether a word is an address of a scheme in `SCHEMES`; other schemes are file names."""
    scheme, separator, _ = word.partition("://")
    return bool(separator) and scheme.lower() in SCHEMES


def without_password(url: str) -> str:
    """Return an address as it may be printed and stored: without user and password."""
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def result_name(url: str) -> str:
    """Return the preferred name of an address's result files: the last part of its path, else its host."""
    parts = urllib.parse.urlsplit(url)
    return Path(urllib.parse.unquote(parts.path)).stem or parts.hostname or "stream"


def is_picture(url: str) -> bool:
    """Tell a picture from a video or stream by the suffix, else by what the server says; a silent server has none."""
    parts = urllib.parse.urlsplit(url)
    suffix = Path(parts.path).suffix.lower()
    if suffix in IMAGE_SUFFIXES or not parts.scheme.lower().startswith("http"):
        return suffix in IMAGE_SUFFIXES
    try:
        with _open(url) as answer:
            return bool(answer.headers.get_content_maintype() == "image")
    except FAILURES:
        return False


def read_picture(url: str) -> np.ndarray:
    """Download and decode a picture: RGB uint8, (H, W, 3).

    Raises:
        DataReadError: the server does not answer in time or not with a picture.
    """
    name, content, end = without_password(url), bytearray(), time.monotonic() + LONGEST
    try:
        with _open(url) as answer:
            while piece := answer.read(CHUNK):
                content += piece
                if len(content) > MAX_BYTES or time.monotonic() > end:
                    raise DataReadError(f"{name}: longer than {MAX_BYTES} bytes or {LONGEST:g} seconds")
    except FAILURES as error:
        reason = error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)
        raise DataReadError(f"{name}: cannot be read: {reason or type(error).__name__}") from None
    encoded = np.frombuffer(bytes(content), dtype=np.uint8)
    return decode_image(encoded, read_header(encoded, name), name)


def unreadable_hint(url: str) -> str:
    """Give the likely reason why not a frame of a video can be read, to follow a message; "" if none is known.

    An .mp4 or .mov file may have its index at the end, and a server that sends files only as a whole does not let a
    player begin there (RFC 9110, section 14: range requests).
    """
    parts = urllib.parse.urlsplit(url)
    if not parts.scheme.lower().startswith("http"):
        return ""
    try:
        with _open(url, {"Range": "bytes=0-0"}) as answer:
            whole = answer.status == http.client.OK
            indexed = answer.headers.get_content_type() in INDEXED_TYPES
    except FAILURES as error:
        return f": {error}" if isinstance(error, urllib.error.HTTPError) else ""
    if not whole or not (indexed or Path(parts.path).suffix.lower() in INDEXED):
        return ""
    return (
        ": the server sends the file as a whole only (no range requests), and its index is perhaps at its end; "
        "download it and name the file"
    )


def _open(url: str, headers: Mapping[str, str] | None = None) -> Any:
    """Open an address with the time limit; user and password in it become basic authentication."""
    parts = urllib.parse.urlsplit(url)
    request = urllib.request.Request(without_password(url), headers=dict(headers or {}))
    if parts.username is not None:
        pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(pair.encode()).decode())
    return urllib.request.urlopen(request, timeout=TIMEOUT)
