"""Validation of COCO annotation files: parsed JSON to one array per key.

Training raises on the first fault (`read_columns`); check_dataset.py reports all of them (`sound_columns`).
"""

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from detection.data.box_meanings import find_meanings
from detection.data.json_file import Fault, read_json
from detection.data.outside_names import OUTSIDE, dataset_folder, moved_names, outside_hint
from detection.errors import DataError

LISTS = {"images": "image", "annotations": "annotation", "categories": "category"}
REQUIRED_KEYS = {
    "images": ("id", "file_name"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # control characters and surrogates, refused in file names
ID_MEANING, POSITIONS = "image_ids", "positions"  # in "info": what ids are where pack.py numbered the images
LARGEST = {"id": 2**63, "side": 2**31}  # exclusive limits of the arrays' integer types


class Columns(NamedTuple):
    """Entries of an annotation file, one array per key, in the file's order and units."""

    image_ids: np.ndarray  # (M,)
    file_names: list[str]
    image_sizes: np.ndarray  # (M, 2) width, height; 0: not stated
    image_of_box: np.ndarray  # (N,) image id
    category_of_box: np.ndarray  # (N,) category id
    coco_boxes: np.ndarray  # (N, 4) x, y, width, height
    annotation_ids: np.ndarray  # (N,)
    crowd: np.ndarray  # (N,)
    areas: np.ndarray  # (N,)
    category_ids: np.ndarray  # (C,)
    category_names: list[str]
    ignored: np.ndarray  # (N,) "ignore": 1, which `data.ignore_as_crowd` makes crowd
    meanings: dict[str, list[int]]  # notes -> ids, see `find_meanings` and `moved_names`
    lasting_ids: bool = True  # an image keeps its id when others are added; False: ids are positions, names last

    @property
    def categories(self) -> dict[int, str]:
        return dict(zip(self.category_ids.tolist(), self.category_names, strict=True))


def read_without_boxes(path: Path) -> Columns:
    """Read images and categories alone, also of a file without a list of annotations (COCO's test-dev).

    Raises:
        DataError: as `read_json` and `read_columns`, or the file is not JSON throughout.
    """
    content, faults = read_json(path)
    if faults:
        raise DataError(f"{path}: {faults[0].message}")
    return read_columns(content | {"annotations": []} if isinstance(content, dict) else content, str(path), path)


def read_columns(content: Any, where: str, file: Path | None = None) -> Columns:
    """Build the arrays of the parsed JSON, unless they are built already, and check them.

    Args:
        where: what messages name.
        file: the JSON file, near which images are looked for whose name is refused; None: there is none.

    Raises:
        DataError: the first fault of the file.
    """
    try:
        if isinstance(content, Columns):
            columns = content
        else:
            check_lists(content, where)
            columns = build_columns(content)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        # `build_columns` converts whole columns; search for the entry at fault.
        fault = next(entry_faults(content), None)
        reason = fault.message if fault else f"cannot be read: {type(error).__name__}: {error}"
        raise DataError(f"{where}: {reason}") from None
    if fault := next(column_faults(columns, file and dataset_folder(file)), None):
        raise DataError(f"{where}: {fault.message}")
    return columns


def sound_columns(content: Any, where: str, report: Callable[[Fault], None]) -> dict[str, list[Any]]:
    """Report every fault of the parsed JSON and return it without the faulty entries.

    Boxes of an image or category removed for its fault are removed too, without a report.

    Raises:
        DataError: the lists of a COCO file are missing.
    """
    check_lists(content, where)
    content = {key: list(content[key]) for key in LISTS}
    for find in (entry_faults, lambda rest: column_faults(build_columns(rest))):
        faulty: dict[str, set[int]] = {key: set() for key in LISTS}
        for fault in find(content):
            report(fault)
            if fault.place:
                faulty[fault.place[0]].add(fault.place[1])
        rest = {key: [entry for number, entry in enumerate(content[key]) if number not in faulty[key]] for key in LISTS}
        for key, reference in (("images", "image_id"), ("categories", "category_id")):
            left = {entry["id"] for entry in rest[key]} if faulty[key] else set()
            gone = {_id_of(content[key][number]) for number in faulty[key]} - left
            rest["annotations"] = [row for row in rest["annotations"] if not gone or _id_of(row, reference) not in gone]
        content = rest
    return content


def check_lists(content: Any, where: str) -> None:
    if not isinstance(content, dict):
        raise DataError(f"{where}: not a COCO annotation file, which is an object with the lists {', '.join(LISTS)}")
    for key in LISTS:
        if not isinstance(content.get(key), list):
            hint = " (validation.py --no-ground-truth detects without)" if key == "annotations" else ""
            raise DataError(f"{where}: has no list {key!r}{hint}; is this a COCO annotation file?")


def build_columns(content: dict[str, Any]) -> Columns:
    """Convert the parsed lists to arrays.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, OverflowError: `entry_faults` finds the entry at fault.
    """
    images, rows, categories = content["images"], content["annotations"], content["categories"]
    boxes = _number_array([row["bbox"] for row in rows], (len(rows), 4))
    areas = [row.get("area") for row in rows]
    stated = np.array([area is not None for area in areas], dtype=bool)
    with np.errstate(over="ignore"):  # `column_faults` reports an infinite area
        areas_of_boxes = boxes[:, 2:].prod(axis=1)
    sizes = _number_array([side or 0 for entry in images for side in (entry.get("width"), entry.get("height"))])
    if not ((sizes >= 0) & (sizes < LARGEST["side"]) & (sizes == np.floor(sizes))).all():
        raise ValueError("a width or height is not a whole number")
    crowd = [row.get("iscrowd") for row in rows]
    names = [entry["file_name"] for entry in images]
    if not all(value in (0, 1, None) for value in crowd) or not all(isinstance(name, str) for name in names):
        raise ValueError("an iscrowd or a file_name has the wrong type")
    category_names = [entry["name"] for entry in categories]
    info = content.get("info")
    if not all(isinstance(name, str) for name in category_names):
        raise ValueError("a category name is not text")
    return Columns(
        image_ids=_id_array([entry["id"] for entry in images]),
        file_names=names,
        image_sizes=sizes.astype(np.int32).reshape(-1, 2),
        image_of_box=_id_array([row["image_id"] for row in rows]),
        category_of_box=_id_array([row["category_id"] for row in rows]),
        coco_boxes=boxes,
        annotation_ids=_id_array([row["id"] for row in rows]),
        crowd=np.array([bool(value) for value in crowd], dtype=bool),
        areas=np.where(stated, _number_array([0 if area is None else area for area in areas]), areas_of_boxes),
        category_ids=_id_array([entry["id"] for entry in categories]),
        category_names=category_names,
        ignored=np.array([row.get("ignore") in (1, True) for row in rows], dtype=bool),
        meanings=find_meanings(images, rows) | moved_names(images),
        lasting_ids=not (isinstance(info, dict) and info.get(ID_MEANING) == POSITIONS),
    )


def entry_faults(content: dict[str, list[Any]]) -> Iterator[Fault]:
    """Find entries with missing keys or values of the wrong type; one fault per entry."""
    for key, kind in LISTS.items():
        for number, entry in enumerate(content[key]):
            if found := _entry_fault(key, entry):
                has_id = isinstance(entry, dict) and "id" in entry
                item = entry["id"] if has_id and _is_id(entry["id"]) else f"number {number}"
                name = f"{kind} {entry['id'] if has_id else item}"
                yield Fault(found[0], item, f"{name}: {found[1]}", (key, number))


def _entry_fault(key: str, entry: Any) -> tuple[str, str] | None:
    """Return (kind, message), or None for a valid entry."""
    if not isinstance(entry, dict):
        return "not_an_object", "is not an object"
    for name in REQUIRED_KEYS[key]:
        if name not in entry:
            return "missing_key", f"has no {name!r}"
        if name.endswith("id") and not _is_id(entry[name]):
            return "bad_id", f"{name} is {entry[name]!r}, must be a whole number"
    if key == "images":
        if not isinstance(entry["file_name"], str):
            return "bad_value", f"file_name is {entry['file_name']!r}, must be text"
        for name in ("width", "height"):
            side = entry.get(name) or 0
            if not (_is_number(side) and 0 <= side < LARGEST["side"] and side == int(side)):
                return "bad_image_size", f"{name} is {side!r}, must be a whole number of pixels"
    if key == "categories" and not isinstance(entry["name"], str):
        return "bad_value", f"name is {entry['name']!r}, must be text"
    if key == "annotations":
        box = entry["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(_is_number(value) for value in box)):
            return "bad_box", f"bbox is {box!r}, must be four numbers [x, y, width, height]"
        if not (entry.get("area") is None or _is_number(entry["area"])):
            return "bad_area", f"area is {entry['area']!r}, must be a number"
        if entry.get("iscrowd") not in (0, 1, None):
            return "bad_value", f"iscrowd is {entry['iscrowd']!r}, must be 0 or 1"
    return None


def column_faults(columns: Columns, folder: Path | None = None) -> Iterator[Fault]:
    """Find invalid numbers, names and references; every entry must have the right types.

    Args:
        folder: of the dataset, for `outside_hint`; None: no hint.
    """
    ids = columns.annotation_ids
    if not len(columns.image_ids):
        yield Fault("no_images", "images", "no images")
    for key, kind, values in (("bbox", "bad_box", columns.coco_boxes), ("area", "bad_area", columns.areas[:, None])):
        for row in np.flatnonzero(~np.isfinite(values).all(axis=1)).tolist():
            message = f"annotation {ids[row]}: {key} is not a finite number"
            yield Fault(kind, int(ids[row]), message, ("annotations", row))
    for row in _repeated(columns.image_ids):
        number = int(columns.image_ids[row])
        yield Fault("image_id_twice", number, f"image id {number} occurs twice", ("images", row))
    for row in _repeated(columns.category_ids):
        number = int(columns.category_ids[row])
        yield Fault("category_id_twice", number, f"a category id occurs twice: {number}", ("categories", row))
    for row, name in enumerate(columns.file_names):
        if (outside := OUTSIDE.search(name)) or CONTROL.search(name):
            hint = outside_hint(name, folder) if outside and folder else ""
            message = f"file_name {name!r} is not a plain path inside the image directory{hint}"
            yield Fault("file_name_escapes", name, message, ("images", row))
    for row in np.flatnonzero(~np.isin(columns.category_of_box, columns.category_ids)).tolist():
        message = f"annotation {ids[row]}: category_id {columns.category_of_box[row]} is not in the categories"
        yield Fault("unknown_category", int(ids[row]), message, ("annotations", row))
    if not len(columns.category_ids):
        yield Fault("no_categories", "categories", "no categories")
    for row in _repeated(np.array(columns.category_names)):
        name = columns.category_names[row]
        yield Fault("category_name_twice", name, f"category name {name!r} occurs twice", ("categories", row))


def _repeated(values: np.ndarray) -> list[int]:
    """Positions of all but the first of equal values, ascending."""
    _, first = np.unique(values, return_index=True)
    return np.delete(np.arange(len(values)), first).tolist()


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -LARGEST["id"] <= value < LARGEST["id"]


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _is_id(value)


def _id_of(entry: Any, key: str = "id") -> int | None:
    value = entry.get(key) if isinstance(entry, dict) else None
    return value if _is_id(value) else None


def _id_array(values: list[Any]) -> np.ndarray:
    array = np.array(values) if values else np.zeros(0, np.int64)
    if array.dtype.kind != "i" or array.ndim != 1 or bool in set(map(type, values)):
        raise TypeError("an id is not a whole number")
    return array.astype(np.int64)


def _number_array(values: list[Any], shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Convert to float64, refusing what `np.array(..., dtype=float64)` would accept: text and null."""
    shape = shape or (len(values),)
    array = np.array(values) if values else np.zeros(shape)
    if array.dtype.kind not in "iuf" or array.shape != shape:
        raise TypeError("not a number")
    if bool in set(map(type, values if array.ndim == 1 else itertools.chain.from_iterable(values))):
        raise TypeError("true or false is not a number")
    return array.astype(np.float64)
