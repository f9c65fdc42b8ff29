"""The fast way into an annotation file: the arrays of the slow one, or none at all."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detection.data import fast_annotation_file as fast_annotations
from detection.data.annotation_file import read_columns, read_json
from detection.data.annotations import annotations_digest, load_annotations
from detection.data.fast_annotation_file import count_strings, read_fast
from detection.errors import DataError

pytest.importorskip("msgspec")


@pytest.fixture(autouse=True)
def small_files_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_annotations, "MIN_BYTES", 1)


def content() -> dict[str, Any]:
    """Everything that is usual: outlines, a crowd region, missing optional keys, an image without boxes."""
    box = {"id": 5, "image_id": 1, "category_id": 7, "bbox": [1.5, 2, 30, 4.25], "segmentation": [[1, 2, 3.5, 4]]}
    return {
        "info": {"year": 2017, "nested": [{"area": [1, {"b": 2}]}]},
        "licenses": [{"id": 1, "name": "none", "url": "http://none"}, {"id": 2, "name": "id"}],
        "images": [
            {"id": 9, "file_name": "b.jpg", "width": 640, "height": 480, "license": 3},
            {"id": 1, "file_name": "a/a.jpg", "height": 0},
            {"id": 4, "file_name": "c.jpg"},
        ],
        "annotations": [
            {**box, "iscrowd": 0, "area": 100},
            {**box, "id": 6, "iscrowd": 1, "area": 33.25, "segmentation": {"counts": [3, 4], "size": [2, 2]}},
            {**box, "id": 7, "image_id": 9, "category_id": 3},
            {**box, "id": 8, "area": 0.0},
        ],
        "categories": [{"id": 7, "name": "cat", "supercategory": "animal"}, {"id": 3, "name": "dog"}],
    }


def write(directory: Path, tree: Any, **options: Any) -> Path:
    path = directory / "a.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree, **options), encoding="utf-8")
    return path


def same_as_the_slow_way(path: Path) -> bool:
    fast, slow = read_fast(path), read_columns(read_json(path)[0], "file")
    assert fast is not None
    for name, value in slow._asdict().items():
        other = getattr(fast, name)
        if isinstance(value, list):
            assert value == other, name
        else:
            assert value.dtype == other.dtype and np.array_equal(value, other, equal_nan=True), name
    return True


@pytest.mark.parametrize("options", [{}, {"indent": 2}, {"separators": (",", ":")}], ids=["plain", "indented", "dense"])
def test_the_same_columns(tmp_path: Path, options: dict[str, Any]) -> None:
    assert same_as_the_slow_way(write(tmp_path, content(), **options))


def test_real_annotations(shared_data: Callable[[str], Path]) -> None:
    assert same_as_the_slow_way(shared_data("coco_mini") / "annotations" / "instances_train.json")


def edited(*path: Any, value: Any) -> dict[str, Any]:
    tree = copy.deepcopy(content())
    place = tree
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return tree


UNUSUAL = {
    "null": edited("annotations", 0, "area", value=None),
    "text for a number": edited("annotations", 0, "image_id", value="1"),
    "true for a number": edited("annotations", 0, "category_id", value=True),
    "three numbers": edited("annotations", 0, "bbox", value=[1, 2, 3]),
    "non-finite": edited("annotations", 0, "bbox", value=[1, 2, 3, float("nan")]),
    "non-finite in what is skipped": edited("annotations", 0, "segmentation", value=[[float("inf")]]),
    "crowd of 2": edited("annotations", 0, "iscrowd", value=2),
    "crowd of -1": edited("annotations", 0, "iscrowd", value=-1),
    "width of -1": edited("images", 0, "width", value=-1),
    "width of -5": edited("images", 0, "width", value=-5),
    "a side too large": edited("images", 0, "height", value=2**31),
    "a fraction of a pixel": edited("images", 0, "height", value=1.5),
    "an id too large": edited("images", 0, "id", value=2**63),
    "area of -1": edited("annotations", 0, "area", value=-1),
    "no file name": edited("images", 0, value={"id": 3}),
    "not ASCII": edited("images", 0, "file_name", value="\u00e9.jpg"),
    "escaped": edited("images", 0, "file_name", value='"id".jpg'),
    "a class that is called like a key": edited("categories", 0, "name", value="image_id"),
    "a key inside of another value": edited("annotations", 0, "note", value={"bbox": 1}),
    "no list": edited("images", value={}),
    "no object": [],
}
REPEATED = [("bbox", "[9, 9, 9, 9]"), ("image_id", "9"), ("iscrowd", "1"), ("area", "5"), ("id", "77")]


@pytest.mark.parametrize("kind", UNUSUAL)
def test_what_is_unusual_is_left_to_the_slow_way(tmp_path: Path, kind: str) -> None:
    assert read_fast(write(tmp_path, UNUSUAL[kind], ensure_ascii=kind == "escaped")) is None


@pytest.mark.parametrize(("key", "value"), REPEATED)
def test_a_key_that_occurs_twice_is_refused_as_ever(tmp_path: Path, key: str, value: str) -> None:
    text = json.dumps(content())
    path = write(tmp_path, text.replace('{"id": 5,', f'{{"{key}": {value}, "id": 5,', 1))
    assert read_fast(path) is None
    with pytest.raises(DataError, match=f"the key {key} .* occurs twice in one object"):
        load_annotations(path)
    assert read_fast(write(tmp_path, text.replace('"categories"', '"images": [], "categories"', 1))) is None


@pytest.mark.parametrize("text", ["", "{", '{"images": [', "\ufeff{}", json.dumps(content())[:-1], "[" * 100_000])
def test_what_is_no_json_is_left_to_the_slow_way(tmp_path: Path, text: str) -> None:
    assert read_fast(write(tmp_path, text)) is None


def test_files_that_are_not_there_or_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_fast(tmp_path / "none.json") is None
    monkeypatch.setattr(fast_annotations, "MIN_BYTES", 100_000)
    assert read_fast(write(tmp_path, content())) is None


def test_a_fault_of_a_plain_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, edited("annotations", 0, "category_id", value=70))
    assert read_fast(path) is not None
    with pytest.raises(DataError, match="annotation 5: category_id 70 is not in the categories"):
        load_annotations(path)


def test_a_continued_run_finds_the_same_data_either_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, content())
    fast = annotations_digest(load_annotations(path))
    monkeypatch.setattr(fast_annotations, "MIN_BYTES", 100_000)
    assert annotations_digest(load_annotations(path)) == fast


def test_strings_are_counted() -> None:
    text = b'{"id": 1, "ids": "id", "image_id": {"id" : [1]}, "": 0, "x": "a:id"}'
    assert count_strings(text, ["id", "ids", "image_id", "x", "absent"]) == {
        "id": 3,
        "ids": 1,
        "image_id": 1,
        "x": 1,
        "absent": 0,
    }
