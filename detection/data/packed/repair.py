"""Checking of shards against their index, a new index from the tar headers alone, and files written from shards."""

import hashlib
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from detection.data.annotation_file import read_without_boxes
from detection.data.packed.images import PackedImages, shard_faults
from detection.data.packed.index import (
    BLOCK,
    SHARD,
    SUFFIX,
    PackedIndex,
    Shard,
    annotations_of,
    find_indexes,
    read_index,
    sha256,
    write_index,
)
from detection.errors import DataError, OutputError

PIECE = 2**20  # bytes that are read at a time

LOOK = "check_dataset.py data.root=SHARDS"

Advance = Callable[[int], object]  # gets numbers of bytes


def shard_bytes(folder: Path) -> int:
    """Number of bytes of all shards, for a progress bar."""
    return sum(path.stat().st_size for path in folder.glob("*.tar") if path.is_file())


def check_shards(folder: Path, advance: Advance) -> list[str]:
    """Compare all shards and annotation files of a folder with their digests; returns one line per fault.

    Raises:
        DataError: an index is damaged, or there is none.
    """
    faults = []
    for split, path in _indexes(folder).items():
        index = read_index(path)
        wrong = shard_faults(folder, index, follow_links=True)
        faults += wrong
        for shard in index.shards:
            file = folder / shard.name
            if any(line.startswith(f"shard {file} ") for line in wrong):
                continue
            if digest_of(file, advance) != shard.digest:
                faults.append(f"shard {file} was changed: its SHA-256 is not that of the index; copy or pack it again")
        annotations = folder / index.annotations[0]
        try:
            changed = sha256(annotations.read_bytes()) != index.annotations[1]
        except OSError as error:
            faults.append(f"annotation file {annotations} cannot be read: {error.strerror}")
            continue
        if changed:
            faults.append(
                f"annotation file {annotations} was changed after packing, the .json members of {split} were not; pack "
                "the dataset again, or accept it with --rebuild-index"
            )
    return faults


def digest_of(file: Path, advance: Advance) -> str:
    """SHA-256 of a file, hexadecimal; raises DataError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with file.open("rb") as opened:
            while piece := opened.read(PIECE):
                digest.update(piece)
                advance(len(piece))
    except OSError as error:
        raise DataError(f"shard {file} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


@dataclass(frozen=True)
class Rebuilt:
    """An index that was written anew, and a line for each thing that is not as the index before it said."""

    index: PackedIndex
    changes: list[str]


def rebuild_indexes(folder: Path, advance: Advance) -> dict[str, Rebuilt]:
    """Write the index of every split anew, from the headers of its shards and the names in its annotation file.

    Raises:
        DataError: no shards, one that is missing or damaged, or images that the annotations do not list.
        OutputError: an index cannot be written.
    """
    found: dict[tuple[str, int], dict[int, Path]] = {}
    for path in sorted(folder.glob("*.tar")):
        if name := SHARD.fullmatch(path.name):
            found.setdefault((name[1], int(name[3])), {})[int(name[2])] = path
    if not found:
        raise DataError(f"{folder}: no shards (SPLIT-00000-of-00004.tar) are here")
    indexes: dict[str, PackedIndex] = {}
    for (split, count), shards in found.items():
        if split in indexes:
            raise DataError(f"{folder}: has shards of {split} from two packings; remove one of them")
        if lost := [number for number in range(count) if number not in shards]:
            raise DataError(f"shard {folder / f'{split}-{lost[0]:05d}-of-{count:05d}.tar'} is missing; copy it again")
        indexes[split] = _rebuild(folder, split, [shards[number] for number in range(count)], advance)
    rebuilt = {}
    for split, index in indexes.items():
        path = folder / f"{split}{SUFFIX}"
        rebuilt[split] = Rebuilt(index, changes_since(path, index))
        try:
            write_index(path, index)
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}") from None
    return rebuilt


def changes_since(path: Path, new: PackedIndex) -> list[str]:
    """Say what a new index of the shards accepts that the index at `path` does not say; one line if that is unreadable.

    Which image of a changed shard has other bytes of the same number is in no index.
    """
    try:
        old = read_index(path)
    except DataError:
        return [f"{path} could not be read, so what changed since packing is not known; {LOOK} opens every image"]
    lines = []
    if old.annotations[1] != new.annotations[1]:
        lines.append(f"{new.annotations[0]} has other bytes than before")
    sizes, before = (dict(zip(index.names, index.sizes.tolist(), strict=True)) for index in (new, old))
    for names, what in ((sizes.keys() - before.keys(), "more"), (before.keys() - sizes.keys(), "fewer")):
        if names:
            lines.append(f"{len(names)} images {what}, such as {min(names)}")
    digests = {shard.name: shard.digest for shard in old.shards}
    for number, shard in enumerate(new.shards):
        if shard.name not in digests:
            lines.append(f"{shard.name} is new")
        elif digests[shard.name] != shard.digest:
            held = [new.names[place] for place in np.flatnonzero(new.shard_of == number)]
            other = [name for name in held if before.get(name, sizes[name]) != sizes[name]]
            first = f", such as {other[0]}: {sizes[other[0]]}, before {before[other[0]]}" if other else ""
            line = f"{len(other)} of its {len(held)} images have another size{first or f'; {LOOK} opens them'}"
            lines.append(f"{shard.name} has other bytes than before; {line}")
    return lines


def _rebuild(folder: Path, split: str, paths: list[Path], advance: Advance) -> PackedIndex:
    annotations = folder / annotations_of(split)
    columns = read_without_boxes(annotations)
    name_of = dict(zip(columns.image_ids.tolist(), columns.file_names, strict=True))
    rows: dict[int, tuple[int, int, int]] = {}
    for number, path in enumerate(paths):
        for image_id, offset, size in image_members(path):
            if image_id in rows or image_id not in name_of:
                what = "occurs twice" if image_id in rows else f"is not listed in {annotations}"
                raise DataError(f"shard {path}: image id {image_id} {what}")
            rows[image_id] = (number, offset, size)
    if lost := name_of.keys() - rows.keys():
        raise DataError(f"{annotations} lists {len(lost)} images that no shard holds, such as id {min(lost)}")
    shards = tuple(Shard(path.name, path.stat().st_size, digest_of(path, advance)) for path in paths)
    ids = np.array(sorted(rows), dtype=np.int64)
    places = np.array([rows[number] for number in ids.tolist()], dtype=np.int64).reshape(-1, 3).T
    names = [name_of[number] for number in ids.tolist()]
    return PackedIndex((annotations_of(split), sha256(annotations.read_bytes())), shards, names, ids, *places)


def image_members(path: Path) -> list[tuple[int, int, int]]:
    """Image id, offset and size of every image of a shard, from its headers; the contents are skipped.

    Raises:
        DataError: a header is damaged, the file ends early, or it is not a shard of pack.py.
    """
    found = []
    try:
        with path.open("rb") as shard:
            end = shard.seek(0, 2)
            position = 0
            while (member := _next_member(shard, path, position)) is not None:
                offset, key, suffix = position + BLOCK, *member.name.partition(".")[::2]
                position = offset + member.size + -member.size % BLOCK
                if position > end:
                    raise DataError(f"shard {path} ends within {member.name}; copy it again, or pack the dataset again")
                if not member.isreg() or not key.removeprefix("-").isdecimal():
                    raise DataError(f"shard {path}: {member.name!r} was not written by pack.py")
                if suffix != "json":
                    found.append((int(key), offset, member.size))
    except OSError as error:
        raise DataError(f"shard {path} cannot be read: {error.strerror}") from None
    return found


def _next_member(shard: IO[bytes], path: Path, position: int) -> tarfile.TarInfo | None:
    shard.seek(position)
    header = shard.read(BLOCK)
    if header == bytes(BLOCK):
        return None
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise DataError(f"shard {path} is damaged at byte {position}: {error}; copy it again") from None


def unpack(folder: Path, output: Path, advance: Advance) -> int:
    """Write the images of all splits as files below SPLIT/, with their own names, and the annotation files.

    Args:
        output: an empty folder.

    Returns:
        The number of images.

    Raises:
        DataError: shards or annotations are damaged.
        OSError: cannot be written.
    """
    count = 0
    for split, path in _indexes(folder).items():
        images, annotations = PackedImages(path, follow_links=True), folder / annotations_of(split)
        columns = read_without_boxes(annotations)  # refuses names that lead out of the folder
        images.check_complete(columns.file_names, str(annotations))
        for name in columns.file_names:
            file = output / split / name
            file.parent.mkdir(parents=True, exist_ok=True)
            content = images.locate(name).read()  # type: ignore[union-attr]
            content.tofile(file)
            advance(len(content))
            count += 1
        (output / "annotations").mkdir(exist_ok=True)
        shutil.copyfile(annotations, output / annotations_of(split))
    return count


def _indexes(folder: Path) -> dict[str, Path]:
    if found := find_indexes(folder):
        return found
    raise DataError(f"{folder}: no index of packed shards is here (SPLIT{SUFFIX})")
