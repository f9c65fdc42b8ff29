"""Fast path for large annotation files; anything unusual is left to `annotation_file`, which reports faults.

COCO's train2017 consists mostly of segmentations, which training does not use. msgspec skips them, while `json` creates
a Python number for each coordinate. The resulting arrays are the same.
"""

import itertools
from collections import Counter
from collections.abc import Iterable
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from detection.data.annotation_file import LARGEST, Columns

MIN_BYTES = 1_000_000  # smaller files are fast anyway
QUOTE = ord('"')
NOT_THERE = -1  # default of an optional value; a file that states it has one key more than expected and is left alone
NOT_USED = ("info", "licenses")  # COCO's other members; their keys may have the same names
FIELDS: dict[str, list[tuple[Any, ...]]] = {
    "images": [("id", int), ("file_name", str), ("width", int, NOT_THERE), ("height", int, NOT_THERE)],
    "annotations": [
        ("id", int),
        ("image_id", int),
        ("category_id", int),
        ("bbox", tuple[float, float, float, float]),
        ("area", float, NOT_THERE),
        ("iscrowd", int, NOT_THERE),
    ],
    "categories": [("id", int), ("name", str)],
}


def read_fast(path: Path) -> Columns | None:
    """Read the columns of a plain COCO file; None if msgspec is not installed or the file is unusual.

    Plain means: ASCII without a backslash, every value of COCO's type, no duplicate keys in an object. The columns may
    still have faults, see `column_faults`.
    """
    try:
        import msgspec
    except ImportError:
        return None
    try:
        content = path.read_bytes() if path.stat().st_size >= MIN_BYTES else b""
    except OSError:
        return None
    if not content or not content.isascii() or b"\\" in content:
        return None
    types = {name: msgspec.defstruct(name, fields, gc=False) for name, fields in FIELDS.items()}
    lists: list[tuple[Any, ...]] = [(name, list[kind]) for name, kind in types.items()]  # type: ignore[valid-type]
    rest = [(name, msgspec.Raw, msgspec.Raw(b"")) for name in NOT_USED]
    try:
        file = msgspec.json.decode(content, type=msgspec.defstruct("File", lists + rest))
        arrays = {
            (name, key): np.fromiter(map(attrgetter(key), getattr(file, name)), kind, len(getattr(file, name)))
            for name, fields in FIELDS.items()
            for key, kind, *_ in fields
            if kind in (int, float)
        }
    except (msgspec.DecodeError, RecursionError, OverflowError):
        return None
    expected = Counter(FIELDS.keys())
    for name, fields in FIELDS.items():
        for key, _, *optional in fields:
            absent = int(np.count_nonzero(arrays[name, key] == NOT_THERE)) if optional else 0
            expected[key] += len(getattr(file, name)) - absent
    for name in NOT_USED:
        expected.update(count_strings(bytes(getattr(file, name)), list(expected)))
    return build_columns(file, arrays) if count_strings(content, expected) == expected else None


def count_strings(content: bytes, words: Iterable[str]) -> dict[str, int]:
    """Count how often each word occurs as a string in JSON without backslashes, where every second quote ends one.

    Compares length and the first 8 characters only, so a count may be too high but never too low.
    """
    quotes = np.flatnonzero(np.frombuffer(content, np.uint8) == QUOTE)
    lengths = quotes[1::2] - quotes[::2] - 1
    eights = np.ndarray(len(content), "<u8", content + bytes(8), strides=(1,))  # from each byte on
    heads = eights[quotes[::2] + 1]
    counts = {}
    for word in words:
        head = word[:8].encode()
        mask = (1 << 8 * len(head)) - 1
        same = (heads & np.uint64(mask)) == np.uint64(int.from_bytes(head, "little"))
        counts[word] = int(np.count_nonzero(same & (lengths == len(word))))
    return counts


def build_columns(file: Any, arrays: dict[tuple[str, str], np.ndarray]) -> Columns | None:
    """Assemble the columns; None if a value is out of range."""
    sizes = np.stack([arrays["images", "width"], arrays["images", "height"]], axis=1)
    crowd, area = arrays["annotations", "iscrowd"], arrays["annotations", "area"]
    if ((sizes < NOT_THERE) | (sizes >= LARGEST["side"])).any() or ((crowd < NOT_THERE) | (crowd > 1)).any():
        return None
    numbers = itertools.chain.from_iterable(map(attrgetter("bbox"), file.annotations))
    boxes = np.fromiter(numbers, np.float64, 4 * len(file.annotations)).reshape(-1, 4)
    with np.errstate(over="ignore"):  # `column_faults` reports an infinite area
        areas_of_boxes = boxes[:, 2:].prod(axis=1)
    return Columns(
        image_ids=arrays["images", "id"],
        file_names=[image.file_name for image in file.images],
        image_sizes=sizes.clip(min=0).astype(np.int32),
        image_of_box=arrays["annotations", "image_id"],
        category_of_box=arrays["annotations", "category_id"],
        coco_boxes=boxes,
        annotation_ids=arrays["annotations", "id"],
        crowd=crowd == 1,
        areas=np.where(area == NOT_THERE, areas_of_boxes, area),
        category_ids=arrays["categories", "id"],
        category_names=[category.name for category in file.categories],
    )
