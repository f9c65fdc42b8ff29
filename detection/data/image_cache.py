"""Cache of decoded images that all loader workers share, in memory or in one file.

Images are cached at their original size, so a training image is still resampled only once.
"""

import fcntl
import hashlib
import multiprocessing.reduction
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detection.config.settings import DataSettings
from detection.data.image_file import describe_decoder, read_image
from detection.data.stored_image import ImageFile
from detection.errors import DataReadError, OutputError, SettingsError, say
from detection.runtime.devices import available_memory

MAGIC = b"images 1"
# Layout of the store: head, one row per image, then the pixels in the order of caching.
HEAD = np.dtype([("magic", "S8"), ("end", "<i8"), ("closed", "<i8")])  # end of the pixels; 1 if the store is full
ROW = np.dtype(
    [("key", "S16"), ("offset", "<i8"), ("height", "<i4"), ("width", "<i4"), ("pixels", "<u4"), ("row", "<u4")]
)  # the last two are checksums, of the pixels and of the preceding fields


class ImageCache:
    """Read-through cache of decoded images, shared between processes.

    A row is written after its pixels and both have checksums, so a reader finds a complete image or none, even if the
    writer was killed. The key of an image is made of its path, size, modification time, inode and decoder, so an edited
    file is decoded again. When the store or disk is full, one warning is printed and further images are not cached.

    Args:
        count: number of images.
        max_bytes: maximum size of the store.
        decoder: key of `JPEG_DECODERS`.
        file: file of the store, created with its directory; None: in memory, freed when the last process exits.

    Raises:
        OutputError: the store cannot be created.
    """

    def __init__(self, count: int, max_bytes: int, decoder: str, file: Path | None) -> None:
        self.count, self.max_bytes, self.decoder, self.file = count, max_bytes, decoder, file
        self.libraries = describe_decoder(decoder)
        self.growing = True
        try:
            self.descriptor = self.open_store()
            with self.locked():
                if self.read_head()["magic"] != MAGIC:
                    os.ftruncate(self.descriptor, 0)
                    os.ftruncate(self.descriptor, self.first_pixel)
                    self.write_head(self.first_pixel, closed=0)
        except OSError as error:
            raise OutputError(f"image cache {file or 'in memory'} cannot be created: {error.strerror}") from None

    @property
    def first_pixel(self) -> int:
        """Offset of the first image in the store, in bytes."""
        return HEAD.itemsize + self.count * ROW.itemsize

    def open_store(self) -> int:
        """Open the file of the cache, or memory that forked workers share."""
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            return os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if hasattr(os, "memfd_create"):
            return os.memfd_create("image cache")
        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno())

    def __getstate__(self) -> dict[str, Any]:
        """Support workers that are not forked: they reopen the file or inherit the descriptor of the memory."""
        state = self.__dict__.copy()
        state["descriptor"] = None if self.file is not None else multiprocessing.reduction.DupFd(self.descriptor)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        handed = state.pop("descriptor")
        self.__dict__.update(state)
        self.descriptor = self.open_store() if handed is None else handed.detach()

    def read(self, index: int, path: ImageFile) -> np.ndarray:
        """Return the decoded image as `read_image` does; raises as it does.

        Args:
            index: index of the image, below `count`.
        """
        key = self.key_of(path)  # before decoding, so that an edit in between does not get the new file's key
        image = self.find(index, key)
        if image is None:
            image = read_image(path, self.decoder)
            if self.growing:
                self.keep(index, key, image)
        return image

    def key_of(self, path: ImageFile) -> bytes:
        """Hash what identifies the content of an image: path, size, time, inode and decoder."""
        try:
            status = path.stat()
        except OSError as error:
            raise DataReadError(f"image {path} cannot be read: {error.strerror}") from None
        parts = path, status.st_size, status.st_mtime_ns, status.st_ino, self.libraries
        # NumPy strips trailing zero bytes from such a field; hexadecimal digits have none.
        return hashlib.blake2b("\n".join(map(str, parts)).encode(), digest_size=8).hexdigest().encode()

    def find(self, index: int, key: bytes) -> np.ndarray | None:
        """Return a cached image; None if it is absent or its checksums do not match."""
        stored = os.pread(self.descriptor, ROW.itemsize, HEAD.itemsize + index * ROW.itemsize)
        if len(stored) < ROW.itemsize:
            return None
        row = np.frombuffer(stored, ROW)[0]
        if row["key"] != key or row["row"] != row_checksum(row):
            return None
        image = np.empty((row["height"], row["width"], 3), np.uint8)
        if os.preadv(self.descriptor, [image.data], int(row["offset"])) < image.nbytes:
            return None
        return image if zlib.crc32(image.data) == row["pixels"] else None

    def keep(self, index: int, key: bytes, image: np.ndarray) -> None:
        """Append an image to the store, or stop growing if it does not fit."""
        pixels = np.ascontiguousarray(image).data
        try:
            with self.locked():
                head = self.read_head()
                offset, end = int(head["end"]), int(head["end"]) + image.nbytes
                fits = not head["closed"] and end <= self.max_bytes
                self.write_head(end if fits else offset, closed=0 if fits else 1)
            if not fits:
                self.growing = False
                if not head["closed"]:
                    self.warn(f"is full at {offset / 2**30:.2f} GiB (data.cache_gib)")
                return
            write_all(self.descriptor, pixels, offset)
            row = np.zeros(1, ROW)
            row["key"], row["offset"], row["pixels"] = key, offset, zlib.crc32(pixels)
            row["height"], row["width"] = image.shape[:2]
            row["row"] = row_checksum(row[0])
            write_all(self.descriptor, row.view(np.uint8).data, HEAD.itemsize + index * ROW.itemsize)
        except OSError as error:
            self.growing = False
            with self.locked():
                closed = self.read_head()["closed"]
                self.write_head(int(self.read_head()["end"]), closed=1)
            if not closed:
                self.warn(f"cannot grow: {error.strerror}")

    def warn(self, what: str) -> None:
        """Warn that the cache stops growing."""
        where = self.file or "in memory"
        say(f"warning: image cache {where} {what}; further images are not cached", error=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the head of the store against other processes."""
        fcntl.lockf(self.descriptor, fcntl.LOCK_EX, HEAD.itemsize)
        try:
            yield
        finally:
            fcntl.lockf(self.descriptor, fcntl.LOCK_UN, HEAD.itemsize)

    def read_head(self) -> np.void:
        return np.frombuffer(os.pread(self.descriptor, HEAD.itemsize, 0).ljust(HEAD.itemsize, b"\0"), HEAD)[0]

    def write_head(self, end: int, closed: int) -> None:
        os.pwrite(self.descriptor, np.array([(MAGIC, end, closed)], HEAD).tobytes(), 0)


def row_checksum(row: np.void) -> int:
    """CRC of a row without its checksum, which exposes a torn write."""
    return zlib.crc32(row.tobytes()[: -ROW["row"].itemsize])


def write_all(descriptor: int, content: memoryview, offset: int) -> None:
    """Write all bytes; a call of the system may write fewer."""
    rest = content.cast("B")
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


def build_cache(data: DataSettings, decoder: str, root: Path, names: np.ndarray, count: int) -> ImageCache | None:
    """Create the cache of a dataset's images that the settings ask for, or None.

    Args:
        root: image directory.
        names: concatenated bytes of all file names; with the directory they determine the cache's file name.

    Raises:
        SettingsError: the cache may take more memory than is available.
        OutputError: the cache's file cannot be created.
    """
    max_bytes = int(data.cache_gib * 2**30)
    if data.cache == "none":
        return None
    if data.cache == "memory":
        available = available_memory(torch.device("cpu"))
        if available is not None and max_bytes > available:
            raise SettingsError(f"data.cache_gib={data.cache_gib:g}: only {available / 2**30:.1f} GiB are available")
        return ImageCache(count, max_bytes, decoder, None)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = home / "yolo-v3" if data.cache_path is None else Path(data.cache_path)
    name = hashlib.blake2b(str(root).encode() + b"\0" + names.tobytes(), digest_size=8).hexdigest()
    return ImageCache(count, max_bytes, decoder, directory / f"{name}.images")
