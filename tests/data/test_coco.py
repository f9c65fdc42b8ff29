"""COCO files and images: what is read, what is dropped and counted, what is refused with which single line."""

import copy
import gc
import io
import json
import pickle
import random
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from detection.config.settings import Settings
from detection.data.annotations import (
    Annotations,
    Categories,
    flatten_annotations,
    load_annotations,
    repeat_factors,
    select_images,
)
from detection.data.coco import CocoDataset
from detection.data.fake import FakeDataset
from detection.data.image_file import read_image
from detection.data.json_file import read_json
from detection.errors import DataError, DataReadError
from tests.support.detectors import datasets_of, transform_of
from tests.support.pictures import oriented

Load = Callable[..., Settings]
WIDTH, HEIGHT = 100, 80  # of the images in `content`


def image(number: int, **other: Any) -> dict[str, Any]:
    return {"id": number, "file_name": f"{number}.png", "width": WIDTH, "height": HEIGHT, **other}


def box(number: int, image_id: int, bbox: Any, category_id: int = 1, **other: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image_id, "category_id": category_id, "bbox": bbox, "iscrowd": 0, **other}


TWO_IMAGES = [image(1), image(2)]
TWO_BOXES = [box(1, 1, [10, 10, 20, 20]), box(2, 2, [30, 20, 40, 30])]


def coco(images: list = TWO_IMAGES, annotations: list = TWO_BOXES, categories: Any = None) -> dict[str, Any]:
    """A complete file: two images, a box on each, one category (categories: id -> name), where nothing is given."""
    named = [{"id": number, "name": name} for number, name in (categories or {1: "cat"}).items()]
    return copy.deepcopy({"images": images, "annotations": annotations, "categories": named})


def flatten(content: dict[str, Any], **keywords: Any) -> Annotations:
    return flatten_annotations(content, "file.json", **keywords)


def one_line(error: Exception) -> str:
    assert isinstance(error, DataError) and error.exit_code == 2
    assert str(error) and "\n" not in str(error)
    return str(error)


def refusal(content: dict[str, Any], **keywords: Any) -> str:
    with pytest.raises(DataError) as caught:
        flatten(content, **keywords)
    message = one_line(caught.value)
    assert message.startswith("file.json")
    return message


@pytest.fixture
def open_dataset(tmp_path: Path, default_settings: Load) -> Callable[..., CocoDataset]:
    """`open_dataset(content or raw bytes)`: through the file, as a run does."""
    transform = transform_of(default_settings(), 64, 0, training=False)

    def write_and_open(content: dict[str, Any] | bytes, **keywords: Any) -> CocoDataset:
        path = tmp_path / "annotations.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        (tmp_path / "images").mkdir(exist_ok=True)
        return CocoDataset(tmp_path / "images", path, transform, **keywords)

    return write_and_open


@pytest.fixture
def refused(open_dataset) -> Callable[[dict[str, Any] | bytes], str]:
    """`refused(content or raw bytes)`: the message of the error that opening it must end with."""

    def open_and_fail(content: dict[str, Any] | bytes) -> str:
        with pytest.raises(DataError) as caught:
            open_dataset(content)
        return one_line(caught.value)

    return open_and_fail


# --- categories ---


def test_any_category_ids_become_dense_labels() -> None:
    content = coco(
        annotations=[box(1, 1, [0, 0, 9, 9], 90), box(2, 1, [0, 0, 8, 8], 1), box(3, 2, [0, 0, 7, 7], 5)],
        categories={90: "toothbrush", 1: "person", 5: "airplane"},  # in no order
    )
    annotations = flatten(content)
    assert annotations.categories == Categories(("person", "airplane", "toothbrush"), (1, 5, 90))
    assert annotations.labels.tolist() == [2, 0, 1]  # image 1: 90 (area 81), 1 (64); image 2: 5
    assert annotations.labels.dtype == np.int64
    # the way back, as the results are written
    assert [annotations.categories.ids[label] for label in annotations.labels] == [90, 1, 5]


def test_a_validation_file_follows_the_training_labels_by_name() -> None:
    training = flatten(coco(categories={1: "ape", 2: "dog", 3: "emu"})).categories
    rows = [box(1, 1, [0, 0, 9, 9], 7), box(2, 1, [0, 0, 8, 8], 3), box(3, 1, [0, 0, 7, 7], 4)]
    validation = flatten(coco(annotations=rows, categories={7: "dog", 3: "emu", 4: "ape"}), categories=training)
    assert validation.labels.tolist() == [1, 2, 0]
    assert validation.categories == Categories(training.names, (4, 7, 3))  # ids of this file, so that results fit it
    # it may lack categories, whose ids must not be taken for others, but not have more
    lacking = flatten(coco(annotations=[box(1, 1, [0, 0, 9, 9], 8)], categories={8: "emu"}), categories=training)
    assert lacking.labels.tolist() == [2] and lacking.categories.names == training.names
    assert lacking.categories.ids[2] == 8 and len(set(lacking.categories.ids)) == 3
    message = refusal(coco(categories={1: "ape", 2: "yak", 3: "gnu"}), categories=training)
    assert "yak" in message and "gnu" in message and "ape" not in message


def test_class_names_choose_and_order_the_labels() -> None:
    content = coco(
        annotations=[box(number, 1, [0, 0, 10 - number, 9], number) for number in (1, 2, 3)],
        categories={1: "cat", 2: "dog", 3: "emu"},
    )
    annotations = flatten(content, class_names=["emu", "cat"])
    assert annotations.categories == Categories(("emu", "cat"), (3, 1))
    assert annotations.labels.tolist() == [1, 0]  # cat (area 81), emu (63)
    assert sum(annotations.counts.dropped.values()) == 1  # the dog
    assert len(annotations) == 2  # images stay, as negatives
    # a validation file may have more than the chosen ones
    chosen = flatten(content, class_names=["emu", "cat"], categories=annotations.categories)
    assert chosen.labels.tolist() == [1, 0]
    message = refusal(content, class_names=["emu", "ant"])
    assert "ant" in message and "dog" in message  # what is wrong, and what there is


@pytest.mark.parametrize(
    "categories",
    [
        *([{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}], [{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}]),
        *([], [{"id": "1", "name": "cat"}], [{"id": 1.5, "name": "cat"}], [{"id": 1}], [{"name": "cat"}], ["cat"]),
    ],
    ids=str,
)
def test_categories_that_are_refused(categories: list) -> None:
    refusal({**coco(), "categories": categories})


# --- boxes ---


def test_boxes_become_corners_and_images_without_boxes_stay() -> None:
    content = coco(
        images=[image(5), image(3), image(9)], annotations=[box(1, 9, [1.5, 2, 10, 20]), box(2, 5, [30, 20, 40, 30])]
    )
    annotations = flatten(content)
    assert annotations.image_ids.tolist() == [5, 3, 9]
    assert annotations.first_box.tolist() == [0, 1, 1, 2]
    assert annotations.boxes.tolist() == [[30, 20, 70, 50], [1.5, 2, 11.5, 22]]
    assert annotations.boxes.dtype == np.float32
    assert annotations.coco_boxes.tolist() == [[30, 20, 40, 30], [1.5, 2, 10, 20]]
    assert annotations.areas.tolist() == [1200, 200]  # no `area` in the file: width times height
    assert annotations.image_sizes.tolist() == [[WIDTH, HEIGHT]] * 3
    assert [annotations.file_name(index) for index in range(3)] == ["5.png", "3.png", "9.png"]
    assert annotations.counts.dropped == {}
    given = flatten(coco(annotations=[box(1, 1, [0, 0, 10, 10], area=37.5), box(2, 2, [0, 0, 4, 5], area=None)]))
    assert given.areas.tolist() == [37.5, 20]  # the metric's
    empty = flatten(coco(annotations=[]))
    assert len(empty) == 2 and empty.boxes.shape == (0, 4) and empty.first_box.tolist() == [0, 0, 0]


def test_crowd_boxes_are_marked_and_never_a_class(open_dataset) -> None:
    content = coco(
        annotations=[box(1, 1, [0, 0, 50, 50], iscrowd=1), box(2, 1, [5, 5, 9, 9]), box(3, 1, [5, 5, 8, 8], iscrowd=0)]
    )
    dataset = open_dataset(content)
    cv2.imwrite(str(dataset.image_root / "1.png"), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    assert dataset.annotations.crowd.tolist() == [True, False, False]
    assert dataset[0].labels.tolist() == [-2, 0, 0]


LIMITS = [
    ([5, 5, 0, 5], None, "degenerate"),
    ([5, 5, 5, 0], None, "degenerate"),
    ([5, 5, -3, 5], None, "degenerate"),
    ([50, 5, 1e-9, 5], None, "outside or degenerate"),  # nothing is left of it in float32
    ([100, 0, 5, 5], None, "outside"),
    ([0, 80, 5, 5], None, "outside"),
    ([-10, 0, 5, 5], None, "outside"),
    ([-10, 0, 10, 5], None, "outside"),  # touches the edge
    ([-5, -6, 10, 10], [0, 0, 5, 4], "kept"),
    ([95, 75, 10, 10], [95, 75, 100, 80], "kept"),
    ([-5, -5, 200, 200], [0, 0, 100, 80], "kept"),
    ([90, 70, 10 + 1e-7, 10], [90, 70, 100, 80], "kept"),
    ([0, 0, 100, 80], [0, 0, 100, 80], "kept"),
]


@pytest.mark.parametrize(("bbox", "corners", "fate"), LIMITS, ids=str)
def test_boxes_are_clipped_or_dropped_and_counted(bbox: list, corners: list | None, fate: str) -> None:
    content = coco(annotations=[box(41, 1, bbox), box(42, 1, [10, 10, 20, 20])])
    annotations = flatten(content)
    kept = dict(zip(annotations.annotation_ids.tolist(), annotations.boxes.tolist(), strict=True))
    assert kept.pop(42) == [10, 10, 30, 30]
    assert (annotations.boxes[:, 2:] > annotations.boxes[:, :2]).all()
    if fate == "kept":
        assert kept == {41: corners} and annotations.counts.lines() == []
        assert flatten(content, strict=True).boxes.tolist() == annotations.boxes.tolist()
    else:
        assert kept == {}
        lines = annotations.counts.lines()
        assert len(lines) == 1 and lines[0].startswith("1 ") and "41" in lines[0]
        assert "41" in refusal(content, strict=True)


def test_an_orphan_annotation_is_counted() -> None:
    """As every box that is left out: by reason, with the first ids."""
    empty = [box(100 + number, 1, [5, 5, 0, 5]) for number in range(7)]
    outside = [box(200 + number, 2, [500, 5, 5, 5]) for number in range(2)]
    orphans = [box(300, 77, [5, 5, 5, 5])]
    annotations = flatten(coco(annotations=[*empty, *outside, *orphans, box(1, 1, [0, 0, 5, 5])]))
    assert sorted(annotations.counts.dropped.values()) == [1, 2, 7] and len(annotations.boxes) == 1
    lines = sorted(annotations.counts.lines())
    assert lines[0].startswith("1 ") and "[300]" in lines[0]
    assert lines[1].startswith("2 ") and "[200, 201]" in lines[1]
    assert lines[2].startswith("7 ") and "100, 101" in lines[2] and "106" not in lines[2]  # the first few


def test_without_a_stated_size_boxes_are_not_cut_above() -> None:
    bare = [{"id": 1, "file_name": "1.png"}, image(2, width=None, height=None)]
    annotations = flatten(coco(images=bare, annotations=[box(1, 1, [500, 600, 20, 30]), box(2, 2, [-4, 0, 9, 9])]))
    assert annotations.boxes.tolist() == [[500, 600, 520, 630], [0, 0, 5, 9]]
    assert annotations.image_sizes.tolist() == [[0, 0], [0, 0]]


def order_oracle(content: dict[str, Any]) -> list[int]:
    """Annotation ids image by image, the larger box first, then the smaller id."""
    ids = []
    for entry in content["images"]:
        rows = [row for row in content["annotations"] if row["image_id"] == entry["id"]]
        ids += [row["id"] for row in sorted(rows, key=lambda row: (-row["bbox"][2] * row["bbox"][3], row["id"]))]
    return ids


def test_the_order_of_boxes_does_not_depend_on_the_file() -> None:
    generator = random.Random(0)
    numbers, sides = generator.sample(range(1000), 40), [4, 6]
    boxes = [[1, 1, generator.choice(sides), generator.choice(sides)] for _ in numbers]
    rows = [box(n, generator.randint(1, 4), b, iscrowd=n % 2) for n, b in zip(numbers, boxes, strict=True)]
    content = coco(images=[image(3), image(1), image(4), image(2)], annotations=rows)
    before = copy.deepcopy(content)
    expected = flatten(content)
    assert content == before  # left alone
    assert expected.annotation_ids.tolist() == order_oracle(content)
    for _ in range(5):
        generator.shuffle(content["annotations"])
        for field in fields(Annotations):
            if field.name not in ("counts", "file_order"):
                assert np.array_equal(getattr(flatten(content), field.name), getattr(expected, field.name)), field.name


# --- files that are refused ---

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("area", [True, False], ids=["with area", "without"])
@pytest.mark.parametrize(
    "bbox",
    [
        *([NAN, 1, 1, 1], [1, 1, INFINITY, 1], [1, -INFINITY, 1, 1]),
        *(["10", "10", "20", "20"], [10, 10, 20, "20"], ["a", 1, 1, 1], "1234", [None, 1, 1, 1], None, {}, 5),
        *([1, 2, 3], [1, 2, 3, 4, 5], [], [[1, 2], [3, 4]], [[1, 2, 3, 4]], [10**400, 1, 1, 1]),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_bbox_must_be_four_finite_numbers(refused, bbox: Any, area: bool) -> None:
    row = box(4711, 1, bbox, **({"area": 400} if area else {}))
    for rows in ([row], [box(1, 1, [1, 2, 3, 4], area=12), row]):
        message = refused(coco(annotations=rows))
        assert ("bbox" in message and "4711" in message) or bbox == [10**400, 1, 1, 1]


@pytest.mark.parametrize(
    ("other", "word"), [({"category_id": 99}, "99"), *(({"area": area}, "area") for area in (NAN, INFINITY, "12", [1]))]
)
def test_a_box_of_an_unknown_category_is_refused(other: dict[str, Any], word: str) -> None:
    """And one whose area is no finite number."""
    message = refusal(coco(annotations=[box(1, 1, [0, 0, 5, 5]), box(4711, 1, [1, 1, 5, 5], **other)]))
    assert "4711" in message and word in message


@pytest.mark.parametrize(
    ("rows", "key"),
    [
        *(("annotations", key) for key in ("id", "image_id", "category_id", "bbox")),
        *(("images", key) for key in ("id", "file_name")),
    ],
)
def test_a_missing_key_of_an_annotation_is_named(refused, rows: str, key: str) -> None:
    content = coco([image(1), image(4711)], [box(1, 1, [1, 1, 5, 5]), box(4711, 1, [1, 1, 5, 5])])
    del content[rows][1][key]
    message = refused(content)
    assert repr(key) in message and ("4711" in message or key == "id")


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
@pytest.mark.parametrize("value", ["absent", None, {}, 5, "text", [5], [None], [[]]], ids=str)
def test_the_three_lists_must_be_lists_of_objects(refused, key: str, value: Any) -> None:
    content = {**coco(), key: value}
    if value == "absent":
        del content[key]
    assert key[:5] in refused(content)


@pytest.mark.parametrize("number", ["1", 1.0, 1.5, None, [1], 2**70], ids=str)
@pytest.mark.parametrize("key", ["image_id", "id", "category_id"])
def test_ids_must_be_whole_numbers(refused, number: Any, key: str) -> None:
    content = coco()
    content["annotations"][0][key] = number
    if key == "image_id":
        content["images"][0]["id"] = number
    refused(content)


def test_an_image_listed_twice_is_refused() -> None:
    message = refusal(coco(images=[image(1), image(4711), image(2), image(4711, file_name="other.png")]))
    assert "4711" in message and "twice" in message


COMPLETE = json.dumps(coco()).encode()


@pytest.mark.parametrize(
    "raw",
    [
        *(b"", COMPLETE[: len(COMPLETE) // 2], b"\xef\xbb\xbf" + COMPLETE, b"[" * 100_000, b'{"a":' * 100_000),
        *(b"[]", b"null", b"NaN", b"\xff\xfe\x00", json.dumps(coco()).encode("utf-16")),
        b'{"images": ' + b"1" * 5000 + b"}",  # Python refuses to convert so many digits
    ],
    ids=["empty", "cut", "BOM", "deep list", "deep object", "list", "null", "NaN", "binary", "utf-16", "digits"],
)
def test_a_file_that_is_no_coco_json_is_named(refused, raw: bytes, tmp_path: Path) -> None:
    assert "annotations.json" in refused(raw)
    with pytest.raises(DataError) as caught:
        load_annotations(tmp_path / "annotations.json")
    assert "annotations.json" in one_line(caught.value)


def test_missing_files_and_directories_are_named(tmp_path: Path, default_settings: Load) -> None:
    transform = transform_of(default_settings(), 64, 0, training=False)
    with pytest.raises(DataError, match=r"absent\.json"):
        CocoDataset(tmp_path, tmp_path / "absent.json", transform)
    with pytest.raises(DataError, match=r"absent\.json"):
        load_annotations(tmp_path / "absent.json")
    (tmp_path / "there.json").write_bytes(COMPLETE)
    with pytest.raises(DataError, match="absent_images"):
        CocoDataset(tmp_path / "absent_images", tmp_path / "there.json", transform)


@pytest.mark.parametrize(
    "name",
    [
        *("/etc/passwd", "../secret.png", "a/../../secret.png", "a/..", "\\\\server\\x.png"),
        *("http://host/x.png", "file:///etc/passwd", "a\nb.png", "a\0b.png", "\x1b[31m.png", "\ud800.png"),
    ],
    ids=repr,
)
def test_a_file_name_may_not_leave_the_image_directory(refused, name: str) -> None:
    assert repr(name) in refused(coco(images=[image(1), image(2, file_name=name)]))


@pytest.mark.parametrize(
    "name",
    [
        *("sub/a.png", "a..b.png", "ä ö.png", "图像.png", "a'b.png", "..a.png", "e\u0301.png"),
        "Screenshot 2024-01-01 at 9.41.00\u202fAM.png",  # the narrow no-break space of macOS
    ],
)
def test_file_names_that_people_have(open_dataset, name: str) -> None:
    dataset = open_dataset(coco(images=[image(1), image(2, file_name=name)]))
    path = dataset.image_root / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(cv2.imencode(".png", np.full((HEIGHT, WIDTH, 3), 7, np.uint8))[1].tobytes())
    assert dataset.annotations.file_name(1) == name
    assert (dataset.load_image(1) == 7).all()


# --- memory ---


def test_only_arrays_are_left(open_dataset) -> None:
    """Workers share the pages of an array; a Python object is copied as soon as its reference count changes."""
    marker = "only_in_this_test"
    number = 3000
    rows = [
        box(place, 1 + place % 2, [1, 2, 3 + place % 50, 4], segmentation=[[float(place)] * 8], **{marker: place})
        for place in range(number)
    ]
    content = coco(annotations=rows)
    raw = json.dumps(content).encode()
    del rows, content
    dataset = open_dataset(raw)
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is dict and marker in thing]
    assert not hasattr(dataset, "coco") and not hasattr(dataset, "ids")
    for field in fields(Annotations):
        value = getattr(dataset.annotations, field.name)
        if field.name not in ("categories", "counts"):
            assert isinstance(value, np.ndarray) and value.dtype != object, field.name
    # 16 + 8 + 8 + 32 + 1 + 8 + 8 bytes per box; with 20 kB for all else
    assert len(pickle.dumps(dataset)) < 81 * number + 20_000
    assert len(raw) > 150 * number


# --- outlines, which are most of the bytes ---

OUTLINES = {  # text behind "segmentation"
    "polygons": "[[1, 2.5, -3e2], [4,5,6]]",
    "indented": "[\n  [\n 1,\n 2\n ]\n ]",
    "empty": "[]",
    "empty inside": "[[]]",
    "runs": '{"counts": [3, 4], "size": [2, 2]}',
    "text": '{"counts": "a,]\\\\[", "size": [2, 2]}',
    "flat": "[1, 2]",
    "null": "null",
}


@pytest.mark.parametrize("case", OUTLINES)
@pytest.mark.parametrize("last", [False, True])
def test_outlines_are_cut_out_and_nothing_else(tmp_path: Path, case: str, last: bool) -> None:
    """Against `json` alone, on which what follows the outline and looks like one depends."""
    outline = f'"segmentation": {OUTLINES[case]}'
    rest = '"bbox": [1, 2, 3, 4], "tags": [["segmentation", [1, 2]], "[[1, 2]]"]'
    text = f'{{"annotations": [{{{", ".join([rest, outline] if last else [outline, rest])}}}]}}'
    path = tmp_path / "a.json"
    path.write_text(text)
    expected = json.loads(text)
    del expected["annotations"][0]["segmentation"]
    assert read_json(path) == (expected, [])


# --- split by a fraction ---


def parts(content: dict[str, Any], share: float) -> tuple[set[int], set[int]]:
    training, validation = (flatten(content, fraction=(share, inside)) for inside in (False, True))
    return set(training.image_ids.tolist()), set(validation.image_ids.tolist())


def test_a_fraction_splits_the_images_for_good() -> None:
    images = [image(number) for number in range(1000)]
    rows = [box(number, number, [0, 0, 5, 5]) for number in range(1000)]
    training, validation = parts(coco(images, rows), 0.2)
    assert training | validation == set(range(1000)) and not training & validation
    assert len(validation) / 1000 == pytest.approx(0.2, abs=0.05)  # standard error 0.013
    # neither the order nor the other images matter, so a grown dataset leaks nothing into training
    random.Random(0).shuffle(images)
    assert parts(coco(images, rows), 0.2) == (training, validation)
    few = [entry for entry in images if entry["id"] < 300]
    first_300 = set(range(300))
    assert parts(coco(few, rows[:300]), 0.2) == (training & first_300, validation & first_300)
    # a larger share only adds
    assert validation < parts(coco(images, rows), 0.3)[1]


def test_boxes_stay_with_their_images_in_a_split() -> None:
    images = [image(number) for number in range(60)]
    rows = [box(number, number, [0, 0, 5 + number, 5]) for number in range(0, 60, 2)]
    for inside in (False, True):
        part = flatten(coco(images, rows), fraction=(0.4, inside))
        assert 0 < len(part) < 60
        for index, number in enumerate(part.image_ids.tolist()):
            found = part.boxes[part.first_box[index] : part.first_box[index + 1]].tolist()
            assert found == ([[0, 0, 5 + number, 5]] if number % 2 == 0 else [])
            assert part.file_name(index) == f"{number}.png"


def test_the_hash_of_an_image_id() -> None:
    """CRC-32 of the text 123456789 is 0xCBF43926 (the published check value) = 3421780262: bucket 780262."""
    content = coco(images=[image(123456789), *(image(number) for number in range(50))], annotations=[])
    assert parts(content, 0.7803)[1] >= {123456789}
    assert parts(content, 0.7802)[0] >= {123456789}


# --- rare classes ---


def test_repeat_factors_by_hand() -> None:
    """LVIS, section 5.1: r(class) = max(1, sqrt(t / f)), r(image) = the largest of its classes; t = 0.64.

    Of 4 images: class 1 is in 4 (f = 1), class 2 in 1 (f = 0.25: sqrt(2.56) = 1.6), class 3 in 2 (f = 0.5: sqrt(1.28)),
    class 4 in none, class 5 only as a crowd.
    """
    rows = [box(number, number, [0, 0, 5, 5], 1) for number in (1, 2, 3, 4)]
    rows += [box(10, 1, [0, 0, 6, 6], 2), box(11, 1, [0, 0, 7, 7], 2), box(12, 1, [0, 0, 7, 7], 3)]
    rows += [box(13, 2, [0, 0, 7, 7], 3), box(14, 3, [0, 0, 7, 7], 5, iscrowd=1)]
    categories = {number: f"class {number}" for number in range(1, 6)}
    annotations = flatten(coco([image(number) for number in (1, 2, 3, 4)], rows, categories))
    assert repeat_factors(annotations, 0.64) == pytest.approx([1.6, 1.28**0.5, 1, 1])
    assert repeat_factors(annotations, 0.25).tolist() == [1, 1, 1, 1]
    assert repeat_factors(flatten(coco(annotations=[])), 1.0).tolist() == [1, 1]  # no boxes anywhere


# --- images ---

# EXIF 2.3, tag 274: the sides of the picture at which the first row and the first column of the file lie
TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda file: file,  # top, left
    2: lambda file: file[:, ::-1],  # top, right
    3: lambda file: file[::-1, ::-1],  # bottom, right
    4: lambda file: file[::-1],  # bottom, left
    5: lambda file: file.swapaxes(0, 1),  # left, top
    6: lambda file: file.swapaxes(0, 1)[:, ::-1],  # right, top
    7: lambda file: file.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda file: file.swapaxes(0, 1)[::-1],  # left, bottom
}
MARKS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))  # upper left, upper right, lower left, lower right


def marked() -> np.ndarray:
    pixels = np.full((48, 64, 3), 90, np.uint8)
    pixels[:16, :16], pixels[:16, -16:], pixels[-16:, :16], pixels[-16:, -16:] = MARKS
    return pixels


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(marked()).save(path, exif=oriented(orientation), quality=95)
    difference = np.abs(read_image(path).astype(int) - TURNED[orientation](marked()))
    assert difference.mean() < 3 and np.median(difference) <= 1  # what lossy formats cost, most of it along the edges


@pytest.mark.parametrize("suffix", ["png", "webp"])
@pytest.mark.parametrize("orientation", TURNED)
def test_transparency_is_turned_with_the_picture(tmp_path: Path, orientation: int, suffix: str) -> None:
    """The mark in the file's first corner is transparent, so mid grey, wherever that corner comes to lie."""
    path, expected, alpha = tmp_path / f"a.{suffix}", marked(), np.full((48, 64), 255, np.uint8)
    expected[:16, :16], alpha[:16, :16] = 128, 0
    picture = Image.fromarray(np.dstack([marked(), alpha]))
    picture.save(path, exif=oriented(orientation), lossless=True, exact=True)
    assert np.abs(read_image(path).astype(int) - TURNED[orientation](expected)).max() <= 2


def test_boxes_and_pixels_agree_in_a_turned_photograph(open_dataset) -> None:
    """Annotators saw the turned picture. Orientation 6: the file's first corner is at the upper right."""
    dataset = open_dataset(coco([image(1, width=48, height=64)], [box(1, 1, [32, 0, 16, 16])]))
    Image.fromarray(marked()).save(dataset.image_root / "1.png", "JPEG", exif=oriented(6), quality=95)
    sample = dataset[0]
    x1, y1, x2, y2 = sample.boxes[0].round().astype(int)
    assert np.abs(sample.image[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].astype(int) - MARKS[0]).max() < 40


def filled(mode: str, colour: Any, size: tuple[int, int] = (20, 10)) -> Image.Image:
    return Image.new(mode, size, colour)


def palette(**save: Any) -> tuple[Image.Image, dict[str, Any]]:
    """Left half index 0, red; right half index 1, green."""
    picture = filled("P", 0)
    picture.putpalette([255, 0, 0, 0, 255, 0])
    picture.paste(1, (10, 0, 20, 10))
    return picture, save


# Mid grey is 128. Alpha 51 of 255 is 0.2: 0.2 * 200 + 0.8 * 128 = 142.4, 0.2 * 100 + 102.4 = 122.4, 0 + 102.4.
# Alpha 128 is 0.502: 0.502 * 255 + 0.498 * 128 = 191.7, 0.498 * 128 = 63.7.
PART = (142.4, 122.4, 102.4)
FORMATS = [  # file, picture, options; the colours of its left and right half
    ("L.jpg", filled("L", 100), {}, (100, 100, 100), (100, 100, 100)),
    ("L.png", filled("L", 100), {}, (100, 100, 100), (100, 100, 100)),
    ("L_key.png", filled("L", 100), {"transparency": 100}, (128, 128, 128), (128, 128, 128)),
    ("LA_clear.png", filled("LA", (100, 0)), {}, (128, 128, 128), (128, 128, 128)),
    ("LA_solid.png", filled("LA", (100, 255)), {}, (100, 100, 100), (100, 100, 100)),
    ("LA_part.png", filled("LA", (100, 51)), {}, (122.4,) * 3, (122.4,) * 3),
    ("P.png", *palette(), (255, 0, 0), (0, 255, 0)),
    ("P_key.png", *palette(transparency=1), (255, 0, 0), (128, 128, 128)),
    ("P_table.png", *palette(transparency=bytes([255, 128])), (255, 0, 0), (63.7, 191.7, 63.7)),
    ("P.gif", *palette(), (255, 0, 0), (0, 255, 0)),
    ("RGB.png", filled("RGB", (10, 20, 30)), {}, (10, 20, 30), (10, 20, 30)),
    ("RGB_key.png", filled("RGB", (10, 20, 30)), {"transparency": (10, 20, 30)}, (128,) * 3, (128,) * 3),
    ("RGB.bmp", filled("RGB", (10, 20, 30)), {}, (10, 20, 30), (10, 20, 30)),
    ("RGBA_clear.png", filled("RGBA", (200, 100, 0, 0)), {}, (128,) * 3, (128,) * 3),
    ("RGBA_part.png", filled("RGBA", (200, 100, 0, 51)), {}, PART, PART),
    ("RGBA_part.webp", filled("RGBA", (200, 100, 0, 51)), {"lossless": True}, PART, PART),
    ("CMYK.jpg", filled("CMYK", (0, 255, 255, 0)), {"quality": 95}, (255, 0, 0), (255, 0, 0)),
    ("YCbCr.jpg", filled("YCbCr", (128, 128, 128)), {}, (128, 128, 128), (128, 128, 128)),
    ("bits.png", filled("1", 1), {}, (255, 255, 255), (255, 255, 255)),
]


@pytest.mark.parametrize(("name", "picture", "save", "left", "right"), FORMATS, ids=[entry[0] for entry in FORMATS])
def test_every_kind_of_image_arrives_as_rgb(tmp_path: Path, name, picture, save, left, right) -> None:
    picture.save(tmp_path / name, **save)
    pixels = read_image(tmp_path / name)
    assert pixels.shape == (10, 20, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels[:, 1].astype(float) - left).max() <= 2
    assert np.abs(pixels[:, -2].astype(float) - right).max() <= 2


def test_sixteen_bits_are_scaled_not_cut_off(tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 512).astype(np.uint16)[None].repeat(8, 0)
    Image.fromarray(levels).save(tmp_path / "grey.png")
    coloured = np.stack([levels, levels[:, ::-1], levels // 2], axis=-1)
    cv2.imwrite(str(tmp_path / "rgb.png"), coloured[..., ::-1])
    clear = np.dstack([coloured[..., ::-1], np.full_like(levels, 65535 // 5)])  # alpha 0.2
    cv2.imwrite(str(tmp_path / "rgba.png"), clear)
    grey, rgb, rgba = (read_image(tmp_path / f"{name}.png").astype(float) for name in ("grey", "rgb", "rgba"))
    assert all(len(np.unique(grey[..., channel])) >= 200 for channel in range(3))
    assert len(np.unique(rgb[..., 0])) >= 200 and len(np.unique(rgb[..., 1])) >= 200
    assert np.abs(grey - levels[..., None] / 257).max() <= 1  # 65535 / 255 = 257
    assert np.abs(rgb - coloured / 257).max() <= 1
    assert np.abs(rgba - (0.2 * coloured / 257 + 0.8 * 128)).max() <= 1.5


def photograph(progressive: bool) -> bytes:
    coarse = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(cv2.resize(coarse, (320, 240))).save(buffer, "JPEG", quality=90, progressive=progressive)
    return buffer.getvalue()


def damaged(path: Path) -> str:
    with pytest.raises(DataReadError) as caught:
        read_image(path)
    assert caught.value.exit_code == 3 and path.name in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("thumbnail", [False, True], ids=["plain", "thumbnail"])
def test_a_truncated_jpeg_is_never_a_half_grey_picture(tmp_path: Path, progressive, share, thumbnail) -> None:
    encoded = photograph(progressive)
    assert len(encoded) > 4000
    if thumbnail:  # a complete little JPEG before the picture, as cameras write it: an end marker that proves nothing
        little = io.BytesIO()
        Image.new("RGB", (16, 12), (200, 10, 10)).save(little, "JPEG")
        segment = b"\xff\xfe" + (len(little.getvalue()) + 2).to_bytes(2, "big") + little.getvalue()
        encoded = encoded[:2] + segment + encoded[2:]
    path = tmp_path / "photograph.jpg"
    path.write_bytes(encoded)
    assert read_image(path).shape == (240, 320, 3)
    path.write_bytes(encoded[: int(len(encoded) * share)])
    damaged(path)


def test_data_after_the_end_of_a_jpeg_does_no_harm(tmp_path: Path) -> None:
    """Telephones append a film of the moment, or a second picture."""
    encoded = photograph(False)
    (tmp_path / "plain.jpg").write_bytes(encoded)
    for number, rest in enumerate((b"\0" * 10_000, b"\0\0\0\x18ftypmp42" + bytes(range(255)) * 100)):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(encoded + rest)
        assert np.array_equal(read_image(path), read_image(tmp_path / "plain.jpg"))


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_other_truncated_formats(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"picture.{suffix}"
    Image.open(io.BytesIO(photograph(False))).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    damaged(path)


@pytest.mark.parametrize("content", [b"", b"not an image\n", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xd9", None, "folder"])
def test_files_that_are_no_image(tmp_path: Path, content: bytes | str | None) -> None:
    path = tmp_path / "picture.jpg"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    damaged(path)


def test_the_content_decides_not_the_ending(tmp_path: Path) -> None:
    filled("RGB", (10, 20, 30)).save(tmp_path / "really_a_png.jpg", "PNG")
    assert (read_image(tmp_path / "really_a_png.jpg") == (10, 20, 30)).all()


@pytest.mark.parametrize(
    ("width", "height", "turned"),
    [(WIDTH, HEIGHT, None), (90, HEIGHT, False), (WIDTH, 10, False), (HEIGHT, WIDTH, True)],
)
def test_a_size_that_differs_from_the_annotations(open_dataset, width: int, height: int, turned: bool | None) -> None:
    dataset = open_dataset(coco())
    filled("RGB", (1, 2, 3), (width, height)).save(dataset.image_root / "1.png")
    if turned is None:
        assert dataset.load_image(0).shape == (HEIGHT, WIDTH, 3)
        return
    with pytest.raises(DataReadError) as caught:
        dataset[0]
    message = str(caught.value)
    assert all(str(side) in message for side in (width, height, WIDTH, HEIGHT)) and "1.png" in message
    assert ("EXIF" in message) == turned


def test_positions_choose_epoch_and_size(drawn_dataset: Path, default_settings: Load) -> None:
    transform = transform_of(default_settings(), 64, 0, training=True)
    dataset = CocoDataset(drawn_dataset / "train", drawn_dataset / "annotations" / "instances_train.json", transform)
    assert len(dataset) == 9
    assert dataset[3].image.shape == (64, 64, 3) and dataset[(3, 0, 96)].image.shape == (96, 96, 3)
    assert np.array_equal(dataset[3].image, dataset[(3, 0, 0)].image)
    assert not np.array_equal(dataset[3].image, dataset[(3, 1, 0)].image)
    assert dataset[3].index == 3
    assert np.diff(dataset.annotations.first_box).tolist() == [index % 4 for index in range(9)]


# --- synthetic batches ---


def test_fake_data_looks_like_a_dataset(default_settings: Load) -> None:
    transform = transform_of(default_settings(), 96, 0, training=True)
    fake, again = (FakeDataset(20, ["a", "b", "c"], seed=3) for _ in range(2))
    fake.sample_transform = again.sample_transform = transform
    annotations = fake.annotations
    assert len(fake) == len(annotations) == 20 and annotations.categories.names == ("a", "b", "c")
    assert len(annotations.boxes) == len(annotations.labels) == annotations.first_box[-1] > 0
    assert (annotations.boxes[:, 2:] > annotations.boxes[:, :2]).all() and (annotations.boxes >= 0).all()
    assert (annotations.boxes <= (640, 480, 640, 480)).all()
    assert set(annotations.labels.tolist()) == {0, 1, 2}
    for index in (0, 7):
        assert fake.load_image(index).shape == (480, 640, 3) and fake.load_image(index).dtype == np.uint8
        first, second = fake[(index, 2, 64)], again[(index, 2, 64)]
        assert np.array_equal(first.image, second.image) and np.array_equal(first.boxes, second.boxes)
        assert first.image.shape == (64, 64, 3)
    assert not np.array_equal(fake.load_image(0), fake.load_image(1))
    assert not np.array_equal(fake.load_image(0), FakeDataset(20, ["a"], seed=4).load_image(0))


# --- real data ---


def test_official_coco_annotations(shared_data, default_settings: Load) -> None:
    """The counts of shared/data/coco_mini/README.md."""
    root = shared_data("coco_mini")
    datasets = datasets_of(default_settings(f"data.root={root}"), 96, 96)
    expected = [(128, 939, 10, 2, {"person": 259, "hair drier": 0}), (79, 624, 5, 0, {"person": 118, "teddy bear": 0})]
    for dataset, (images, boxes, crowd, empty, some) in zip(datasets, expected, strict=True):
        annotations = dataset.annotations
        left_out = sum(annotations.counts.dropped.values())
        assert len(dataset) == images and len(annotations.boxes) + left_out == boxes
        assert annotations.crowd.sum() == crowd
        assert (np.diff(annotations.first_box) == 0).sum() == empty
        assert len(annotations.categories.names) == 80
        assert annotations.categories.ids[:1] + annotations.categories.ids[-1:] == (1, 90)
        for name, count in some.items():
            assert (annotations.labels == annotations.categories.names.index(name)).sum() == count
        for index in (0, len(dataset) - 1):  # decodes, and has the size that the annotations state
            sample = dataset[(index, 1, 64)]
            assert sample.image.shape == (64, 64, 3) and len(sample.boxes) == len(sample.labels)


def test_selected_images_keep_their_boxes(drawn_dataset: Path) -> None:
    annotations = load_annotations(drawn_dataset / "annotations" / "instances_train.json")
    selected = select_images(annotations, np.array([6, 4, 3]))  # 2, 0 and 3 boxes
    assert selected.image_ids.tolist() == [106, 104, 103] and selected.first_box.tolist() == [0, 2, 2, 5]
    assert [selected.file_name(index) for index in range(3)] == ["6.png", "4.png", "3.png"]
    assert selected.image_sizes.tolist() == annotations.image_sizes[[6, 4, 3]].tolist()
    rows = [*range(*annotations.first_box[6:8]), *range(*annotations.first_box[3:5])]
    for name in ("boxes", "labels", "areas", "coco_boxes", "crowd", "annotation_ids"):
        assert np.array_equal(getattr(selected, name), getattr(annotations, name)[rows])
    assert selected.categories == annotations.categories
