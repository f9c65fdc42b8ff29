"""Images that are parts of larger files: read in any order, by any number of processes, without a copy."""

import contextlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from detection.data.image_file import MAX_BYTES, Listing
from detection.data.packed.index import PackedIndex, read_index
from detection.data.stored_image import ImageFile
from detection.errors import DataError, DataReadError

MAX_OPEN = 256  # files that a process keeps open; most systems allow 1,024


class ContainerFiles:
    """Files whose parts are read by position, each opened by each process when it first needs it.

    Reading moves no file position, so a descriptor that a forked process inherits does no harm; each process has its
    own all the same. A process that is spawned gets the paths alone.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self._opened: dict[tuple[int, int], int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "_opened": {}}

    def read(self, number: int, offset: int, size: int) -> np.ndarray:
        """Read `size` bytes of a file from `offset`, uint8; fewer where the file ends before.

        Raises:
            OSError: the file cannot be opened or read.
        """
        content = np.empty(size, dtype=np.uint8)
        done = 0
        with self._descriptor(number) as descriptor:
            while done < size:
                count = os.preadv(descriptor, [content.data[done:]], offset + done)
                if not count:
                    break
                done += count
        return content[:done]

    def status(self, number: int) -> os.stat_result:
        with self._descriptor(number) as descriptor:
            return os.fstat(descriptor)

    @contextlib.contextmanager
    def _descriptor(self, number: int) -> Any:
        key = os.getpid(), number
        if (descriptor := self._opened.get(key)) is not None:
            yield descriptor
            return
        descriptor = os.open(self.paths[number], os.O_RDONLY | os.O_CLOEXEC)
        if len(self._opened) < MAX_OPEN and self._opened.setdefault(key, descriptor) == descriptor:
            yield descriptor
            return
        try:  # another thread was faster, or there are too many
            yield descriptor
        finally:
            os.close(descriptor)


class PartStatus(NamedTuple):
    """What `os.stat` says of a file, of a part of one: its own size, time and number of the file."""

    st_size: int
    st_mtime_ns: int
    st_ino: int


class FilePart:
    """One image in a larger file, to be read by `read_image`.

    Args:
        files: the larger files.
        number: position of the file among them.
        offset, size: first byte, and number of bytes.
        name: what messages call the image.
    """

    __slots__ = ("files", "name", "number", "offset", "size")

    def __init__(self, files: ContainerFiles, number: int, offset: int, size: int, name: str) -> None:
        self.files, self.number, self.offset, self.size, self.name = files, number, offset, size, name

    def __str__(self) -> str:
        return f"{self.files.paths[self.number]}/{self.name}"

    @property
    def suffix(self) -> str:
        return os.path.splitext(self.name)[1]

    def stat(self) -> PartStatus:
        """Return size, time and file number; raises OSError."""
        status = self.files.status(self.number)
        return PartStatus(self.size, status.st_mtime_ns, status.st_ino)

    def read(self) -> np.ndarray:
        """Return the bytes, uint8.

        Raises:
            DataReadError: the file ends before, or cannot be read.
        """
        if self.size > MAX_BYTES:
            raise DataReadError(f"image {self} has {self.size} bytes, at most {MAX_BYTES} are read")
        try:
            content = self.files.read(self.number, self.offset, self.size)
        except OSError as error:
            raise DataReadError(f"image {self} cannot be read: {error.strerror}") from None
        if len(content) < self.size:
            raise DataReadError(f"image {self} is damaged: the file ends after {len(content)} of its {self.size} bytes")
        return content


class PackedImages:
    """The images of a split in tar shards.

    Args:
        root: the index.
        follow_links: whether a shard may be a symbolic link that leads out of the index's folder.

    Raises:
        DataError: the index is damaged; a shard is missing, or of another size than the index says.
    """

    def __init__(self, root: Path, follow_links: bool = False) -> None:
        self.root = root.resolve()
        index = read_index(self.root)
        if faults := shard_faults(self.root.parent, index, follow_links):
            raise DataError(faults[0])
        self.files = ContainerFiles([self.root.parent / shard.name for shard in index.shards])
        # Arrays, not a dict: forked workers would copy 118,000 objects by counting references. The names in UTF-8,
        # sorted; NumPy strips zero bytes at the end, which no file name has.
        names = np.array([name.encode("utf-8", "surrogateescape") for name in index.names], dtype=np.bytes_)
        order = np.argsort(names, kind="stable")
        self._names, self._shard_of = names[order], index.shard_of[order]
        self._offsets, self._sizes = index.offsets[order], index.sizes[order]

    def __len__(self) -> int:
        return len(self._names)

    def locate(self, name: str) -> ImageFile:
        row = self._row(name)
        if row is None:
            raise DataReadError(f"image {name} is not in the shards of {self.root}")
        number, offset, size = (int(column[row]) for column in (self._shard_of, self._offsets, self._sizes))
        return FilePart(self.files, number, offset, size, name)

    def holds(self, name: str) -> bool:
        return self._row(name) is not None

    def look_up(self, names: Sequence[str]) -> Listing:
        missing = [position for position, name in enumerate(names) if not self.holds(name)]
        return Listing(missing, present={self.root: set(self.names())}, listed={self.root: set(names)})

    def names(self) -> list[str]:
        return [name.decode("utf-8", "surrogateescape") for name in self._names.tolist()]

    def check_complete(self, names: Sequence[str], annotations: str) -> None:
        """Raise DataError unless the shards hold exactly the images that an annotation file lists."""
        lost = next((name for name in names if not self.holds(name)), None)
        if len(names) != len(self) or lost is not None:
            what = "" if lost is None else f", and {lost!r} is not among them"
            raise DataError(
                f"{self.root} has {len(self)} images, {annotations} lists {len(names)}{what}; pack the dataset again"
            )

    def _row(self, name: str) -> int | None:
        key = np.bytes_(name.encode("utf-8", "surrogateescape"))
        row = int(np.searchsorted(self._names, key))
        return row if row < len(self._names) and self._names[row] == key else None


def shard_faults(folder: Path, index: PackedIndex, follow_links: bool = False) -> list[str]:
    """One line for every shard that is missing, no regular file, or of another size than the index says."""
    return [
        fault
        for shard in index.shards
        if (fault := _shard_fault(folder / shard.name, shard.size, folder, follow_links))
    ]


def _shard_fault(path: Path, size: int, folder: Path, follow_links: bool) -> str | None:
    try:
        status = path.stat()
    except OSError as error:
        return f"shard {path} cannot be read: {error.strerror}; copy it again"
    if not follow_links and not path.resolve().is_relative_to(folder.resolve()):
        return f"shard {path} is a link out of its folder (data.follow_links: true allows it)"
    if not stat.S_ISREG(status.st_mode):
        return f"shard {path} cannot be read: not a regular file"
    if status.st_size != size:
        return (
            f"shard {path} has {status.st_size} bytes, the index says {size}; copy it again, or pack the dataset again"
        )
    return None
