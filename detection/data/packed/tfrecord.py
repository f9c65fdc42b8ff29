"""TFRecord files of images with boxes, as EfficientDet's converter writes them, read without TensorFlow.

A record is its length (8 bytes), the masked CRC-32C of these, the data, and the masked CRC-32C of the data; numbers are
little endian. The data is a tf.train.Example with the keys image/... below. Boxes are shares of the image's sides.

Source: https://www.tensorflow.org/tutorials/load_data/tfrecord; google/automl, efficientdet/dataset/
create_coco_tfrecord.py and tfrecord_util.py
"""

import io
import json
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from detection.data.annotation_file import read_columns
from detection.data.image_file import DAMAGED_HEADER
from detection.data.packed.crc32c import masked_crc32c
from detection.data.packed.entries import SplitContent, arrange
from detection.data.packed.example import Feature, parse_example
from detection.data.packed.images import ContainerFiles, FilePart
from detection.data.packed.index import SHARD, find_indexes
from detection.errors import DataError

MAX_RECORD = 2**31  # bytes; protobuf allows no larger message
DIGITS = 4  # decimals of a pixel: a share in float32 is exact to 0.00002 px of an image of 640
CORNERS = tuple(f"image/object/bbox/{side}" for side in ("xmin", "ymin", "xmax", "ymax"))
LABEL, TEXT = "image/object/class/label", "image/object/class/text"
CROWD, AREA = "image/object/is_crowd", "image/object/area"
UNREAD = {"image/object/mask": "masks", "image/caption": "captions"}  # features that no training here reads
# First bytes, at an offset -> what a file is that is given for TFRecord.
FOREIGN = {
    (257, b"ustar"): "a tar archive",
    (0, b"\x1f\x8b"): "compressed with gzip; unpack it with gunzip first",
    (0, b"PK\x03\x04"): "a zip archive",
    (0, b"\xff\xd8\xff"): "a JPEG image",
    (0, b"\x89PNG"): "a PNG image",
    (0, b"version https://git-lfs"): "a pointer of Git LFS; fetch the file itself with: git lfs pull",
    (0, b"{"): "a JSON file",
}
SUFFIXES = {"jpeg": ".jpg", "jpg": ".jpg", "png": ".png", "bmp": ".bmp", "gif": ".gif"}


@dataclass
class RecordSplit:
    """The images of the files of a split, in their order.

    Attributes:
        images, rows: of a COCO file without category names.
        files: the encoded image in each record.
        names: class names by label, as far as the records have them.
        unread: how many records hold masks or captions.
    """

    images: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    files: list[FilePart]
    names: dict[int, str]
    unread: dict[str, int]


def read_records(path: Path) -> Iterator[tuple[int, memoryview]]:
    """Yield (offset of the data, data) of every record of a file, both checksums compared.

    Raises:
        DataError: it cannot be read; a record is damaged or cut off, with its offset.
    """
    try:
        with path.open("rb") as file:
            position = 0
            while head := file.read(12):
                where = f"{path}: the record at byte {position}"
                broken = len(head) < 12 or masked_crc32c(head[:8]) != int.from_bytes(head[8:], "little")
                if broken and not position and (kind := foreign_kind(path)):
                    raise DataError(f"{path} is no TFRecord file, it is {kind}")
                if len(head) < 12:
                    raise DataError(f"{where} is cut off; copy the file again")
                (length,) = struct.unpack("<Q", head[:8])
                if broken:
                    raise DataError(f"{where} is damaged: the checksum of its length does not match")
                if length > MAX_RECORD:
                    raise DataError(f"{where} has {length} bytes, at most {MAX_RECORD} are read")
                data = file.read(length)
                tail = file.read(4)
                if len(data) < length or len(tail) < 4:
                    raise DataError(f"{where} is cut off; copy the file again")
                if masked_crc32c(data) != int.from_bytes(tail, "little"):
                    raise DataError(f"{where} is damaged: the checksum of its data does not match")
                yield position + 12, memoryview(data)
                position += 16 + length
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def foreign_kind(path: Path) -> str | None:
    """What a file is by its first bytes, if it is something known; raises OSError."""
    if SHARD.fullmatch(path.name) and find_indexes(path.parent):
        return f"a shard of pack.py; its folder is read as it is: data.root={path.parent}"
    with path.open("rb") as file:
        head = file.read(512)
    return next((kind for (start, magic), kind in FOREIGN.items() if head[start:].startswith(magic)), None)


def read_split(paths: Sequence[Path], progress: Any) -> RecordSplit:
    """Read the images and boxes of files, checking all records.

    Args:
        progress: called with the files, yields them again.

    Raises:
        DataError: a record is damaged, or lacks what an image with boxes needs; with file and offset.
    """
    split = RecordSplit([], [], [], {}, {})
    container = ContainerFiles(paths)
    stated: list[int | None] = []
    for number, path in enumerate(progress(paths)):
        for offset, data in read_records(path):
            try:
                features = parse_example(data)
                image = _add_record(split, features, data)
            except (ValueError, KeyError) as error:
                reason = f"it has no {error.args[0]!r}" if isinstance(error, KeyError) else error
                raise DataError(f"{path}: the record at byte {offset - 12}: {reason}") from None
            start, end = image.pop("span")
            stated.append(image.pop("stated_id"))
            split.files.append(FilePart(container, number, offset + start, end - start, image["file_name"]))
    if not split.images:
        raise DataError(f"{paths[0]}: no record is in {'this file' if len(paths) == 1 else 'these files'}")
    if None not in stated and len(set(stated)) == len(stated):
        for image, stated_id in zip(split.images, stated, strict=True):
            image["id"] = stated_id
        for row in split.rows:
            row["image_id"] = stated[row["image_id"] - 1]
    return split


def _add_record(split: RecordSplit, features: dict[str, Feature], data: memoryview) -> dict[str, Any]:
    """Add an image, numbered from 1, and its boxes.

    Raises:
        KeyError: a feature that is needed is not there.
        ValueError: features contradict one another.
    """
    number = len(split.images) + 1
    span = _one(features, "image/encoded", data)
    encoding = _text(features, "image/format", data).lower()
    name = _text(features, "image/filename", data)
    name = name or f"{number:012d}{SUFFIXES.get(encoding, '')}"
    width, height = _size(features, data, span)
    source_id = _text(features, "image/source_id", data)
    image = {"id": number, "file_name": name, "width": width, "height": height, "span": span}
    image["stated_id"] = int(source_id) if re.fullmatch(r"-?[0-9]{1,18}", source_id) else None
    split.images.append(image)
    corners = [_numbers(features, key) for key in CORNERS]
    labels = _numbers(features, LABEL)
    texts = [bytes(data[slice(*value)]).decode() for value in features.get(TEXT, ())]  # type: ignore[misc]
    crowds, areas = _numbers(features, CROWD), _numbers(features, AREA)
    counts = {key: len(column) for key, column in zip(CORNERS, corners, strict=True)}
    counts |= {TEXT: len(texts), CROWD: len(crowds), AREA: len(areas)}
    for key, count in counts.items():
        if count != len(labels) and (count or key in CORNERS):
            raise ValueError(f"{key} has {count} values, {LABEL} has {len(labels)}")
    for index, label in enumerate(labels):
        x1, y1, x2, y2 = (column[index] * side for column, side in zip(corners, (width, height) * 2, strict=True))
        box = [round(value, DIGITS) for value in (x1, y1, x2 - x1, y2 - y1)]
        area = round(areas[index], DIGITS) if areas else box[2] * box[3]
        row = {"id": len(split.rows) + 1, "image_id": number, "category_id": int(label), "bbox": box, "area": area}
        split.rows.append(row | {"iscrowd": int(bool(crowds[index])) if crowds else 0})
        known = split.names.setdefault(int(label), texts[index] if texts else "")
        if texts and known != texts[index]:
            raise ValueError(f"the class {int(label)} is {texts[index]!r}, before it was {known!r}")
    for key, what in UNREAD.items():
        if features.get(key):
            split.unread[what] = split.unread.get(what, 0) + 1
    return image


def to_content(split: RecordSplit, names: dict[int, str], origin: str) -> SplitContent:
    """Give a split its annotation file.

    Args:
        names: of all splits' classes, by label, which becomes the category id.

    Raises:
        DataError: names or boxes that no annotation file may have.
    """
    categories = [{"id": label, "name": names[label] or str(label)} for label in sorted(names)]
    content = {
        "info": {"description": f"packed from TFRecord files: {origin}"},
        "images": split.images,
        "annotations": split.rows,
        "categories": categories,
    }
    read_columns(content, origin)
    return SplitContent(arrange(content, split.files), json.dumps(content).encode())


def merge_names(splits: Iterable[RecordSplit]) -> dict[int, str]:
    """The class names of several splits by label.

    Raises:
        DataError: a label has two names.
    """
    names: dict[int, str] = {}
    for split in splits:
        for label, name in split.names.items():
            if names.setdefault(label, name) != name:
                raise DataError(f"the class {label} is {names[label]!r} in one split and {name!r} in another")
    return names


def _one(features: dict[str, Feature], key: str, data: memoryview) -> tuple[int, int]:
    values = features[key]
    if len(values) != 1 or not isinstance(values[0], tuple):
        raise ValueError(f"{key} must be one text of bytes")
    return values[0]


def _text(features: dict[str, Feature], key: str, data: memoryview) -> str:
    """A text; "" if there is none."""
    try:
        return bytes(data[slice(*_one(features, key, data))]).decode() if features.get(key) else ""
    except UnicodeDecodeError:
        raise ValueError(f"{key} is not UTF-8 text") from None


def _numbers(features: dict[str, Feature], key: str) -> list[float]:
    values = features.get(key, [])
    if any(isinstance(value, tuple) for value in values):
        raise ValueError(f"{key} must be numbers")
    return values  # type: ignore[return-value]


def _size(features: dict[str, Feature], data: memoryview, span: tuple[int, int]) -> tuple[int, int]:
    """Width and height, from the header of the image where the record does not say them."""
    width, height = (_numbers(features, f"image/{side}") for side in ("width", "height"))
    if width and height:
        return int(width[0]), int(height[0])
    try:
        with Image.open(io.BytesIO(data[slice(*span)])) as image:
            return image.size
    except DAMAGED_HEADER:
        raise ValueError("it has neither image/width and image/height nor an image that can be read") from None
