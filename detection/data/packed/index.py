"""The index of packed shards: where each image of a split begins, in which shard, and how large it is.

A folder of shards holds, for every split, SPLIT-00000-of-00004.tar and so on, annotations/instances_SPLIT.json, which
is an ordinary COCO file and what training reads, and SPLIT.index. That is text of two lines: a header with the SHA-256
of the second line, and the rows, one JSON list per column, in the order of the images' ids.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detection.drawing.files import replace_file
from detection.errors import DataError

FORMAT, VERSION = "packed images", 1
SUFFIX = ".index"
SHARD = re.compile(r"(.+)-(\d{5,})-of-(\d{5,})\.tar")
BLOCK = 512  # bytes; a tar file consists of these


@dataclass(frozen=True)
class Shard:
    """One tar file: its name beside the index, size in bytes, and SHA-256 in hexadecimal digits."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class PackedIndex:
    """The images of a split, in the order of their ids; M of them.

    Attributes:
        annotations: path of the annotation file beside the index, and SHA-256 of it when it was packed.
        names: file names as the annotations have them.
        ids: image ids, ascending, (M,) int64.
        shard_of, offsets, sizes: number of the shard, and first byte and number of bytes in it, (M,) int64.
    """

    annotations: tuple[str, str]
    shards: tuple[Shard, ...]
    names: list[str]
    ids: np.ndarray
    shard_of: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray


def annotations_of(split: str) -> str:
    """Path of a split's annotation file in a folder of shards."""
    return f"annotations/instances_{split}.json"


def index_of(annotations: Path) -> Path | None:
    """The index that belongs to an annotation file; None: it is not of a folder of shards.

    Raises:
        DataError: the shards are there and the index is not.
    """
    if annotations.parent.name != "annotations" or not annotations.name.startswith("instances_"):
        return None
    folder, split = annotations.parent.parent, annotations.stem.removeprefix("instances_")
    if (index := folder / f"{split}{SUFFIX}").is_file():
        return index
    if any(folder.glob(f"{split}-00000-of-*.tar")):
        raise DataError(f"{index} is missing; its shards are there: python pack.py --rebuild-index {folder}")
    return None


def find_indexes(folder: Path) -> dict[str, Path]:
    """The indexes of a folder of shards by split; none: it is not one."""
    return {path.stem: path for path in sorted(folder.glob(f"*{SUFFIX}")) if path.is_file()}


def write_index(path: Path, index: PackedIndex) -> None:
    """Write an index whole or not at all; raises OSError."""
    body = {
        "annotations": list(index.annotations),
        "shards": [[shard.name, shard.size, shard.digest] for shard in index.shards],
        "names": index.names,
        **{key: getattr(index, key).tolist() for key in ("ids", "shard_of", "offsets", "sizes")},
    }
    rows = json.dumps(body, separators=(",", ":")).encode()
    header = {"format": FORMAT, "version": VERSION, "images": len(index.names), "sha256": sha256(rows)}
    replace_file(path, json.dumps(header).encode() + b"\n" + rows + b"\n")


def read_index(path: Path) -> PackedIndex:
    """Read and check an index; the shards are not looked at.

    Raises:
        DataError: it cannot be read, is damaged, or of a newer version.
    """
    try:
        first, _, rows = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise DataError(f"index {path} cannot be read: {error.strerror}") from None
    again = f"python pack.py --rebuild-index {path.parent}"
    try:
        header = json.loads(first)
        if header["format"] != FORMAT:
            raise ValueError("another format")
        version, digest = int(header["version"]), header["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"index {path} is damaged or was not written by pack.py; {again}") from None
    if version > VERSION:
        raise DataError(f"index {path} has version {version}, this program reads up to {VERSION}; update it")
    if sha256(rows.rstrip(b"\n")) != digest:
        raise DataError(f"index {path} is damaged: its checksum does not match; {again}")
    try:
        return _parse(json.loads(rows))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(f"index {path} is damaged ({error}); {again}") from None


def _parse(body: dict[str, Any]) -> PackedIndex:
    annotations, names = tuple(body["annotations"]), list(body["names"])
    shards = tuple(Shard(str(name), int(size), str(digest)) for name, size, digest in body["shards"])
    columns = {key: np.asarray(body[key], dtype=np.int64) for key in ("ids", "shard_of", "offsets", "sizes")}
    if any(column.shape != (len(names),) for column in columns.values()):
        raise ValueError("its columns differ in length")
    if not all(isinstance(name, str) for name in (*names, *annotations)) or len(annotations) != 2:
        raise TypeError("a name is not text")
    for shard in shards:
        if not SHARD.fullmatch(shard.name) or "/" in shard.name or "\\" in shard.name:
            raise ValueError(f"{shard.name!r} is no name of a shard")
    shard_of, offsets, sizes = columns["shard_of"], columns["offsets"], columns["sizes"]
    if len(names) and not (shard_of.min() >= 0 and shard_of.max() < len(shards)):
        raise ValueError("an image lies in a shard that is not listed")
    ends = np.array([shard.size for shard in shards], dtype=np.int64)[shard_of] if len(names) else offsets
    if (offsets < 0).any() or (sizes < 0).any() or (sizes > ends - offsets).any():
        raise ValueError("an image lies outside its shard")
    if (np.diff(columns["ids"]) <= 0).any():
        raise ValueError("the ids do not ascend")
    return PackedIndex(annotations, shards, names, **columns)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
