"""A sound dataset, and functions that each break it in one way.

Each function of FAULTS changes a `Dataset` and returns exactly the expected findings: (kind, split) -> items.
Where that is one kind of finding in the training split, ITEMS says which items it has.
"""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

WIDTH, HEIGHT = 64, 48
BOX, CORNER = [20, 14, 20, 20], [1, 1, 20, 20]
WORDS = (  # the anchors fit BOX, and 64 px is the images' own size: nothing is to be said of the sound dataset
    *("train.image_size=64", "evaluation.image_size=64", "data.num_workers=2", "model.backbone=mobilenet_v3_small"),
    *("yolo.neck_channels=[8, 8, 8]", "yolo.anchors=[[[20, 20]], [[40, 40]], [[60, 44]]]"),
)
FOLDERS = {"training": "train", "validation": "val"}
Expected = dict[tuple[str, str], list[int | str]]
EXIF_6 = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # TIFF with the one tag 0x0112 = 6


class Dataset:
    """Six sound images, one box on each, in COCO's layout; `write` puts it into `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.content: dict[str, dict[str, list]] = {}
        self.raw: list[Callable[[bytes], bytes]] = []  # edits of the training file's bytes
        self.words = [f"data.root={root}"]
        self.number = 0
        for split, count in (("training", 4), ("validation", 2)):
            (root / FOLDERS[split]).mkdir(parents=True)
            categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
            self.content[split] = {"images": [], "annotations": [], "categories": categories}
            for _ in range(count):
                self.image(split)
        (root / "annotations").mkdir()

    def picture(self, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
        """Smooth noise unlike any other."""
        self.number += 1
        coarse = np.random.default_rng(self.number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)

    def image(
        self, split: str = "training", data: bytes | None = b"png", suffix: str = "png", box: Any = BOX, **entry: Any
    ) -> dict[str, Any]:
        """An entry with its file (data: None writes none) and one box (None: none)."""
        picture = self.picture()
        number = 100 + self.number
        row = {"id": number, "file_name": f"{number}.{suffix}", "width": WIDTH, "height": HEIGHT} | entry
        self.content[split]["images"].append(row)
        if data is not None:
            path = self.root / FOLDERS[split] / f"{number}.{suffix}"
            path.write_bytes(encode(picture) if data == b"png" else data)
        if box is not None:
            self.box(box, row, split)
        return row

    def box(self, bbox: Any, image: dict[str, Any] | None = None, split: str = "training", **other: Any) -> int:
        """Id of a new annotation; on a new image where none is given."""
        if image is None:
            image = self.image(split, box=None)
        self.number += 1
        number = 1000 + self.number
        category = 3 if self.number // 2 % 2 else 7
        row = {"id": number, "image_id": image["id"], "category_id": category, "bbox": bbox, "iscrowd": 0} | other
        self.content[split]["annotations"].append(row)
        return row["id"]

    def category(self, number: int, name: str, split: str = "training") -> dict[str, Any]:
        self.content[split]["categories"].append({"id": number, "name": name})
        return self.content[split]["categories"][-1]

    def path(self, entry: dict[str, Any], split: str = "training") -> Path:
        return self.root / FOLDERS[split] / entry["file_name"]

    def write(self) -> "Dataset":
        for split, folder in FOLDERS.items():
            data = json.dumps(self.content[split]).encode()
            for edit in self.raw if split == "training" else []:
                data = edit(data)
            (self.root / "annotations" / f"instances_{folder}.json").write_bytes(data)
        return self


def encode(picture: np.ndarray, suffix: str = "PNG", mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).convert(mode).save(buffer, suffix, **options)
    return buffer.getvalue()


NO_BOXES: list[Any] = [[1, 2, 3], [1, 2, 3, 4, 5], ["1", "2", "3", "4"], [None, 1, 2, 3], None, "1234"]
ITEMS: dict[str, Callable[[Dataset], list[int | str]]] = {
    "bad_id": lambda d: [d.box(CORNER, d.image(), category_id=value) for value in ("3", 3.0, None)],
    "bad_value": lambda d: [d.image(data=None, file_name=None)["id"], d.box(CORNER, d.image(), iscrowd="0")],
    "bad_box": lambda d: [d.box(bbox, d.image()) for bbox in NO_BOXES],
    "bad_area": lambda d: [d.box(CORNER, d.image(), area="400")],
    "category_id_twice": lambda d: [d.category(3, "cow")["id"]],
    "category_name_twice": lambda d: [d.category(9, "cat")["name"]],
    "unknown_category": lambda d: [d.box(CORNER, d.image(), category_id=99)],
    "unused_category": lambda d: [d.category(11, "elk")["name"]],
    "file_name_twice": lambda d: [d.image(data=None, file_name=d.image()["file_name"])["file_name"]],
    "annotation_id_twice": lambda d: [d.box(BOX, id=d.box(BOX))],
    "annotation_id_zero": lambda d: [d.box(BOX, id=0)],
    "orphan_annotation": lambda d: [d.box(BOX, {"id": 9999})],
    "degenerate_box": lambda d: [d.box([5, 5, 9, 0], d.image()), d.box([9, 5, -3, 9], d.image())],
    "box_outside": lambda d: [d.box([70, 5, 9, 9], d.image()), d.box([5, -30, 9, 20], d.image())],
    "box_cut": lambda d: [d.box([-5, 5, 25, 20]), d.box([44, 5, 25, 20])],
    "box_hair_over": lambda d: [d.box([44, 5, 20.5, 20]), d.box([44, 5, 20 + 1e-7, 20])],
    "box_covers_image": lambda d: [d.box([0, 0, WIDTH, HEIGHT])],
    "area_disagrees": lambda d: [d.box(BOX, area=area) for area in (900, 0, -4)],
    "crowd": lambda d: [d.box([1, 1, 30, 30], d.image(), iscrowd=1)],
    "image_without_boxes": lambda d: [d.image(box=None)["file_name"]],
    "tiny_box": lambda d: [d.box([5, 5, 1.5, 9]), d.box([5, 5, 9, 1])],
    "image_missing": lambda d: [d.image(data=None)["file_name"] for _ in range(2)],
    "image_empty": lambda d: [d.image(data=b"")["file_name"]],
    "size_differs": lambda d: [d.image(width=65)["file_name"]],
    "wrong_extension": lambda d: [d.image(suffix="jpg")["file_name"]],
    "duplicate_image": lambda d: [d.image(data=d.path(d.image()).read_bytes())["file_name"]],
}


def byte_order_mark(d: Dataset) -> Expected:
    d.raw.append(lambda data: b"\xef\xbb\xbf" + data)
    return {("byte_order_mark", "training"): ["instances_train.json"]}


def json_key_twice(d: Dataset) -> Expected:
    number = d.box(BOX)
    d.raw.append(lambda data: data.replace(b'{"id": %d,' % number, b'{"id": 5, "id": %d,' % number))
    return {("json_key_twice", "training"): [f"id (object with id {number})"]}


def missing_key(d: Dataset) -> Expected:
    numbers: list[int | str] = [d.box(BOX) for _ in range(3)]
    for key, row in zip(("bbox", "category_id", "image_id"), d.content["training"]["annotations"][-3:], strict=True):
        del row[key]
    return {
        ("missing_key", "training"): numbers,
        ("image_without_boxes", "training"): [row["file_name"] for row in d.content["training"]["images"][-3:]],
    }


def bad_image_size(d: Dataset) -> Expected:
    sizes = (12.5, "64", -1)
    return {("bad_image_size", "training"): [d.image(width=value)["id"] for value in sizes]} | {
        ("unlisted_image", "both"): [str(d.path(row)) for row in d.content["training"]["images"][-3:]]
    }


def non_finite(d: Dataset) -> Expected:
    image = d.image()
    return {
        ("bad_box", "training"): [d.box([float("nan"), 1, 2, 3], image)],
        ("bad_area", "training"): [d.box(CORNER, image, area=float("inf"))],
        ("json_constant", "training"): ["NaN", "Infinity"],
    }


def similar_category_names(d: Dataset) -> Expected:
    d.box(BOX, category_id=d.category(10, "Dog ")["id"])
    return {("similar_category_names", "training"): ["dog", "Dog "]}


def untrained_category(d: Dataset) -> Expected:
    return {("untrained_category", "validation"): [d.category(12, "zebra", "validation")["name"]]}


def other_category_ids(d: Dataset) -> Expected:
    for entry in d.content["validation"]["categories"]:
        entry["id"] += 100
    for row in d.content["validation"]["annotations"]:
        row["category_id"] += 100
    return {("other_category_ids", "both"): ["cat", "dog"]}


def image_id_twice(d: Dataset) -> Expected:
    first, second = d.image(), d.image(box=None)
    second["id"] = first["id"]
    return {("image_id_twice", "training"): [first["id"]], ("unlisted_image", "both"): [str(d.path(second))]}


def file_name_escapes(d: Dataset) -> Expected:
    (d.root / "secret.png").write_bytes(encode(d.picture()))
    names: list[int | str] = ["../secret.png", str(d.root / "secret.png"), "https://host/a.png", "a\nb.png", "a\0.png"]
    for name in names:
        d.image(data=None, file_name=name)
    return {("file_name_escapes", "training"): names}


def duplicate_box(d: Dataset) -> Expected:
    image = d.image(box=None)
    first, second = (d.box(BOX, image, category_id=3) for _ in range(2))
    return {("duplicate_box", "training"): [second], ("shared_prediction", "training"): [first]}


def many_boxes(d: Dataset) -> Expected:
    image = d.image(box=None)
    numbers = [d.box([5, 5 + k / 10, 20, 20], image, category_id=3) for k in range(101)]
    # On stride 8 the centres (15, 15 to 25) lie in the rows 1 (until 15.9), 2 (until 23.9) and 3 of one column.
    last_of_row = {numbers[9], numbers[89], numbers[-1]}
    return {
        ("many_boxes", "training"): [image["file_name"]],
        ("shared_prediction", "training"): [number for number in numbers if number not in last_of_row],
    }


def shared_prediction(d: Dataset) -> Expected:
    image = d.image(box=None)
    larger, smaller = d.box([20, 14, 20, 20], image, category_id=3), d.box([20, 14, 19, 20], image, category_id=7)
    assert larger < smaller
    return {("shared_prediction", "training"): [larger]}  # the smaller one comes later and keeps it


def image_not_regular(d: Dataset) -> Expected:
    pipe, directory = d.image(data=None), d.image(data=None)
    os.mkfifo(d.path(pipe))
    d.path(directory).mkdir()
    return {("image_not_regular", "training"): [pipe["file_name"], directory["file_name"]]}


def image_outside(d: Dataset) -> Expected:
    (d.root / "elsewhere").mkdir()
    (d.root / "elsewhere" / "a.png").write_bytes(encode(d.picture()))
    link, below = d.image(data=None), d.image(data=None, file_name="linked/a.png")
    d.path(link).symlink_to(d.root / "elsewhere" / "a.png")
    (d.root / "train" / "linked").symlink_to(d.root / "elsewhere")
    return {("image_outside", "training"): [link["file_name"], below["file_name"]]}


def image_damaged(d: Dataset) -> Expected:
    whole = encode(d.picture(), "JPEG", quality=95)
    names: list[int | str] = [
        d.image(data=data, suffix="jpg")["file_name"]
        for data in (b"not a picture\n", *(whole[: int(len(whole) * share)] for share in (0.1, 0.5, 0.99)))
    ]
    names.append(d.image(data=encode(d.picture())[:-200])["file_name"])
    return {("image_damaged", "training"): names}


def image_too_large(d: Dataset) -> Expected:
    buffer = io.BytesIO()
    Image.new("1", (14_000, 14_000)).save(buffer, "PNG")
    image = d.image(data=buffer.getvalue(), box=[2000, 1000, 8000, 8000], width=14_000, height=14_000)
    return {("image_too_large", "training"): [image["file_name"]]}


def size_swapped(d: Dataset) -> Expected:
    name = d.image(data=encode(d.picture(), "JPEG", quality=95, exif=EXIF_6), suffix="jpg")["file_name"]
    return {("size_swapped", "training"): [name], ("exif_orientation", "training"): [name]}


def exif_orientation(d: Dataset) -> Expected:
    data = encode(d.picture(), "JPEG", quality=95, exif=EXIF_6)
    turned = d.image(data=data, suffix="jpg", width=HEIGHT, height=WIDTH)
    return {("exif_orientation", "training"): [turned["file_name"]]}


def unusual_mode(d: Dataset) -> Expected:
    grey, palette, alpha = (d.image(data=encode(d.picture(), mode=mode)) for mode in ("L", "P", "RGBA"))
    cmyk = d.image(data=encode(d.picture(), "JPEG", "CMYK", quality=95), suffix="jpg")
    deep = d.image(data=cv2.imencode(".png", d.picture().astype(np.uint16) * 257)[1].tobytes())
    return {("unusual_mode", "training"): [row["file_name"] for row in (grey, palette, alpha, cmyk, deep)]}


def tiny_image(d: Dataset) -> Expected:
    stated = d.image(data=encode(d.picture(8, 40)), box=None, width=8, height=40)
    unstated = d.image(data=encode(d.picture(40, 8)), box=None, width=0, height=0)
    names: list[int | str] = [stated["file_name"], unstated["file_name"]]
    return {
        ("tiny_image", "training"): names,
        ("image_without_boxes", "training"): names,
        ("size_not_stated", "training"): [unstated["file_name"]],
    }


def extreme_aspect(d: Dataset) -> Expected:
    name = d.image(data=encode(d.picture(220, 20)), box=None, width=220, height=20)["file_name"]
    return {("extreme_aspect", "training"): [name], ("image_without_boxes", "training"): [name]}


def unlisted_image(d: Dataset) -> Expected:
    paths = [d.root / "train" / "extra.png", d.root / "val" / "extra.png"]
    for path in paths:
        path.write_bytes(encode(d.picture()))
    (d.root / "train" / "notes.txt").write_text("no image")
    return {("unlisted_image", "both"): [str(path) for path in paths]}


def leakage(d: Dataset) -> Expected:
    first, second = d.image(), d.image()
    copy = d.image("validation", data=d.path(first).read_bytes())
    pixels = cv2.imread(str(d.path(second)))[..., ::-1]
    again = d.image("validation", data=encode(pixels, compress_level=0))
    assert d.path(again, "validation").read_bytes() != d.path(second).read_bytes()
    return {("leakage", "both"): [copy["file_name"], again["file_name"]]}


def leakage_by_look(d: Dataset) -> Expected:
    pixels = cv2.imread(str(d.path(d.image())))[..., ::-1]
    again = d.image("validation", data=encode(pixels, "JPEG", quality=70), suffix="jpg")
    return {("leakage_by_look", "both"): [again["file_name"]]}


def json_constant(d: Dataset) -> Expected:
    d.content["training"]["annotations"][0]["score"] = float("inf")
    return {("json_constant", "training"): ["Infinity"]}


def not_an_object(d: Dataset) -> Expected:
    d.content["training"]["annotations"].append("text")
    return {("not_an_object", "training"): [f"number {len(d.content['training']['annotations']) - 1}"]}


def missing_id(d: Dataset) -> Expected:
    d.box(CORNER, d.image())
    del d.content["training"]["annotations"][-1]["id"]
    return {("missing_key", "training"): [f"number {len(d.content['training']['annotations']) - 1}"]}


def size_not_stated(d: Dataset) -> Expected:
    image = d.image()
    del image["width"], image["height"]
    return {("size_not_stated", "training"): [image["file_name"]]}


def wrong_class_count(d: Dataset) -> Expected:
    d.words.append("model.num_classes=80")
    return {("wrong_class_count", "training"): ["2, not 80"]}


WITH_MORE = (  # that are found elsewhere too, or are no item
    *(byte_order_mark, json_key_twice, json_constant, not_an_object, missing_key, missing_id, bad_image_size),
    *(non_finite, similar_category_names, untrained_category, wrong_class_count, image_id_twice, file_name_escapes),
    *(size_not_stated, duplicate_box, many_boxes, shared_prediction, image_not_regular, image_outside, image_damaged),
    *(image_too_large, size_swapped, exif_orientation, unusual_mode, tiny_image, extreme_aspect, unlisted_image),
    *(leakage, leakage_by_look, other_category_ids),  # the last one: of all validation boxes made by then
)
FAULTS: dict[str, Callable[[Dataset], Expected]] = {
    kind: (lambda d, kind=kind, faulty=faulty: {(kind, "training"): faulty(d)}) for kind, faulty in ITEMS.items()
} | {fault.__name__: fault for fault in WITH_MORE}
