"""Writing of shards: the same images always give the same bytes, and nothing half stands under a final name."""

import contextlib
import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np

from detection.data.image_file import IMAGE_SUFFIXES, read_file
from detection.data.packed.entries import Entry, SplitContent
from detection.data.packed.index import BLOCK, SUFFIX, PackedIndex, Shard, annotations_of, sha256, write_index
from detection.errors import DataError, DataReadError, OutputError

TIME = 315_532_800  # of every member: 1980-01-01, as tar warns of times near 1970
ODD_SUFFIX = ".image"  # of an image whose name has none of the usual ones
END = bytes(2 * BLOCK)  # of a tar file

Progress = Callable[[Iterable[Entry], str], Iterable[Entry]]  # passes the entries of a split through


class ShardWriter:
    """One tar file that is being written.

    Args:
        path: its name; must not exist.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.position = path, 0
        self._digest = hashlib.sha256()
        self._file: IO[bytes] = path.open("xb", buffering=2**20)

    def add(self, name: str, content: memoryview) -> int:
        """Append a member; returns the offset of its content."""
        member = tarfile.TarInfo(name)
        member.size, member.mtime, member.mode = content.nbytes, TIME, 0o644
        self._write(member.tobuf(tarfile.USTAR_FORMAT))
        offset = self.position
        self._write(content)
        self._write(bytes(-content.nbytes % BLOCK))
        return offset

    def finish(self) -> Shard:
        """End the file, bring it to the disk, and return what the index says of it."""
        self._write(END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return Shard(self.path.name, self.position, self._digest.hexdigest())

    def close(self) -> None:
        self._file.close()

    def _write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._digest.update(content)
        self.position += len(content)


def member_names(entry: Entry) -> tuple[str, str]:
    """Names of an image and of its annotations in a shard: the id, as COCO's files are called, and a suffix."""
    key, suffix = f"{entry.image['id']:012d}", os.path.splitext(entry.image["file_name"])[1]
    return f"{key}{suffix if suffix.lower() in IMAGE_SUFFIXES else ODD_SUFFIX}", f"{key}.json"


def member_json(entry: Entry) -> bytes:
    """The annotations of one image, with what tells it apart in the dataset."""
    image = {key: entry.image.get(key) for key in ("file_name", "width", "height")}
    content = {"image_id": entry.image["id"], **image, "annotations": entry.rows}
    return json.dumps(content, separators=(",", ":")).encode()


def write_shards(
    folder: Path, split: str, content: SplitContent, shard_bytes: int | None, shards: int | None, progress: Progress
) -> PackedIndex:
    """Write the shards, annotations and index of a split.

    Args:
        folder: exists; of other splits.
        shard_bytes: largest size of a shard that holds more than one image; or
        shards: how many shards, of nearly equal numbers of images.

    Raises:
        DataError: an image cannot be read, or there are fewer images than shards.
        OSError: the folder cannot be written.
    """
    total = len(content.entries)
    if shards is not None and shards > total:
        raise DataError(f"{split}: {total} images do not fill {shards} shards (--shards)")
    finished: list[Shard] = []
    rows: list[tuple[int, int, int]] = []
    writer: ShardWriter | None = None
    try:
        for number, entry in enumerate(progress(content.entries, split)):
            image, annotations = _read(entry), memoryview(member_json(entry))
            size = 2 * BLOCK + sum(part.nbytes + -part.nbytes % BLOCK for part in (image, annotations))
            full = writer is not None and (
                number >= (len(finished) + 1) * total // shards
                if shards is not None
                else writer.position + size + len(END) > (shard_bytes or 0)
            )
            if writer is not None and full:
                finished.append(writer.finish())
                writer = None
            if writer is None:
                writer = ShardWriter(folder / f"{split}-{len(finished):05d}.tar")
            image_name, json_name = member_names(entry)
            rows.append((len(finished), writer.add(image_name, image), image.nbytes))
            writer.add(json_name, annotations)
        if writer is not None:
            finished.append(writer.finish())
    finally:
        if writer is not None:
            writer.close()
    for number, shard in enumerate(finished):  # how many there are is known now
        name = f"{split}-{number:05d}-of-{len(finished):05d}.tar"
        os.rename(folder / shard.name, folder / name)
        finished[number] = Shard(name, shard.size, shard.digest)
    file = folder / annotations_of(split)
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content.annotations)
    columns = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    index = PackedIndex(
        (annotations_of(split), sha256(content.annotations)),
        tuple(finished),
        [entry.image["file_name"] for entry in content.entries],
        np.array([entry.image["id"] for entry in content.entries], dtype=np.int64),
        *columns,
    )
    write_index(folder / f"{split}{SUFFIX}", index)
    return index


def _read(entry: Entry) -> memoryview:
    try:
        return read_file(entry.file).data
    except DataReadError as error:
        raise DataError(error.line) from None


@contextlib.contextmanager
def writing_beside(output: Path) -> Iterator[Path]:
    """Yield a folder to write to, which without an error is then renamed to `output`, if it is still there.

    Raises:
        OutputError: cannot be written; nothing is left behind.
    """
    temporary = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if temporary.exists():
            os.replace(temporary, output)
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_dataset(
    output: Path, splits: Iterable[str], write: Callable[[Path, str], PackedIndex]
) -> dict[str, PackedIndex]:
    """Write splits into a folder that is then renamed to `output`, or into one of shards that lacks them.

    Args:
        output: new, empty, or a folder of other splits.
        write: writes a split into the folder that it is given.

    Returns:
        The indexes by split.

    Raises:
        OutputError: cannot be written; nothing is left behind.
    """
    with writing_beside(output) as temporary:
        indexes = {split: write(temporary, split) for split in splits}
        if output.is_dir() and any(output.iterdir()):
            _join(temporary, output, indexes)
            shutil.rmtree(temporary)
    return indexes


def _join(temporary: Path, output: Path, indexes: Mapping[str, PackedIndex]) -> None:
    """Move splits to those that are there. The annotations, by which a split is found, come last."""
    (output / "annotations").mkdir(exist_ok=True)
    for split, index in indexes.items():
        for name in (*(shard.name for shard in index.shards), f"{split}{SUFFIX}", annotations_of(split)):
            os.replace(temporary / name, output / name)
