"""COCO-format datasets: the only place, with evaluation, that knows category ids.

The annotation file is read once into flat arrays; no Python object per annotation is left, so loader workers share the
memory instead of copying it by reference counting.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.datasets import CocoDetection

from detection.data.transforms import Sample, Transform
from detection.errors import DataError, DataReadError
from detection.settings import DataSettings
from detection.target_assignment import CROWD_LABEL

# (annotation file, image directories) below data.root: COCO's own layout, then Roboflow's
TRAIN_LAYOUTS = [
    ("annotations/instances_train2017.json", ("train2017", "images/train2017", "train", "images/train", "images")),
    ("annotations/instances_train.json", ("train", "images/train", "train2017", "images/train2017", "images")),
    ("train/_annotations.coco.json", ("train",)),
]
VALIDATION_LAYOUTS = [
    ("annotations/instances_val2017.json", ("val2017", "images/val2017", "val", "images/val", "images")),
    ("annotations/instances_val.json", ("val", "images/val", "val2017", "images/val2017", "images")),
    ("valid/_annotations.coco.json", ("valid",)),
]
DARKNET_SPELLINGS = {  # class names of Darknet's coco.names (from PASCAL VOC) -> COCO's own
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}
HASH_BUCKETS = 1_000_000
CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # characters that no file name should have
SINGULAR = {"images": "image", "annotations": "annotation", "categories": "category"}


@dataclass(frozen=True)
class Categories:
    """Dense labels 0..C-1: label k has the name names[k] and the category id ids[k] of the training annotations."""

    names: tuple[str, ...]
    ids: tuple[int, ...]


@dataclass
class AnnotationCounts:
    """What was left out of a dataset, for the log; lists hold the first few annotation ids."""

    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[int]] = field(default_factory=dict)

    def add(self, reason: str, ids: np.ndarray) -> None:
        if len(ids):
            self.dropped[reason] = self.dropped.get(reason, 0) + len(ids)
            self.examples[reason] = [int(number) for number in ids[:5]]

    def lines(self) -> list[str]:
        return [
            f"{count} {reason} (annotation ids {self.examples[reason]}{' ...' if count > 5 else ''})"
            for reason, count in self.dropped.items()
        ]


@dataclass(frozen=True)
class Annotations:
    """Flat arrays of N boxes on M images; box rows are grouped by image, area descending, then annotation id.

    That order is the loss's rule for truths that share a prediction, so it does not depend on the order in the file.
    """

    image_ids: np.ndarray  # (M,) int64
    image_sizes: np.ndarray  # (M, 2) int32 width, height; 0 where the file does not say
    file_names: np.ndarray  # UTF-8 bytes of all names, one after the other
    file_name_ends: np.ndarray  # (M,) int64
    first_box: np.ndarray  # (M + 1,) int64: boxes of image m are first_box[m]:first_box[m + 1]
    boxes: np.ndarray  # (N, 4) float32 xyxy, original pixels, clipped to the image
    labels: np.ndarray  # (N,) int64 dense label
    areas: np.ndarray  # (N,) float64: the file's `area`, which decides small, medium and large in the metric
    coco_boxes: np.ndarray  # (N, 4) float64 x, y, width, height as in the file, for the metric
    crowd: np.ndarray  # (N,) bool
    annotation_ids: np.ndarray  # (N,) int64 as in the file, for messages only
    categories: Categories
    counts: AnnotationCounts

    def __len__(self) -> int:
        return len(self.image_ids)

    def file_name(self, index: int) -> str:
        start = self.file_name_ends[index - 1] if index else 0
        return self.file_names[start : self.file_name_ends[index]].tobytes().decode()


class CocoDataset(CocoDetection):
    """torchvision's `CocoDetection` with flat annotations, dense labels and strict image decoding.

    Indexed by an int or by (index, epoch, size) as the batch sampler gives it; see `__getitem__`.

    Args:
        images: directory the file names are relative to.
        annotations: annotation file.
        transform: from image and boxes to the network input.
        class_names: restrict to these categories, in this order; None: all of the file, by ascending id.
        categories: labels of the training set that this (validation) set must follow, by name.
        fraction: (fraction, inside): keep the images whose hash lies inside, or outside, the validation share.
        strict: refuse degenerate and outside boxes instead of dropping them.

    Raises:
        DataError: the file is not a COCO annotation file, or holds nothing to use; one line with file and place.
    """

    def __init__(
        self,
        images: Path,
        annotations: Path,
        transform: Transform,
        class_names: Sequence[str] | None = None,
        categories: Categories | None = None,
        fraction: tuple[float, bool] | None = None,
        strict: bool = False,
    ) -> None:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its timing
                super().__init__(str(images), str(annotations))
            content = self.coco.dataset
        except (ValueError, RecursionError) as error:
            raise DataError(f"{annotations}: not a JSON file: {error}") from None
        except (KeyError, TypeError, AssertionError, AttributeError) as error:
            raise DataError(f"{annotations}: {diagnose_annotations(annotations, error)}") from None
        except OSError as error:
            raise DataError(f"annotation file {annotations} cannot be read: {error.strerror}") from None
        if not images.is_dir():
            raise DataError(f"image directory {images} does not exist")
        self.annotations = flatten_annotations(content, str(annotations), class_names, categories, fraction, strict)
        self.sample_transform = transform
        self.image_root = images.resolve()
        del self.coco, self.ids  # the Python objects; everything needed is in the arrays now

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, position: int | tuple[int, int, int]) -> Sample:
        """One image through the transform.

        Args:
            position: image index, or (index, epoch, size): the augmentation is a pure function of seed, epoch and
                index; size is the side of the network input, 0 the transform's own.

        Raises:
            DataReadError: the image is missing, damaged or not of the size that the annotations state.
        """
        index, epoch, size = (position, 0, 0) if isinstance(position, int) else position
        rows = slice(self.annotations.first_box[index], self.annotations.first_box[index + 1])
        labels = np.where(self.annotations.crowd[rows], CROWD_LABEL, self.annotations.labels[rows])
        return self.sample_transform(self.load_image(index), self.annotations.boxes[rows], labels, index, epoch, size)

    def load_image(self, index: int) -> np.ndarray:
        """RGB uint8, (height, width, 3)."""
        path = self.image_root / self.annotations.file_name(index)
        image = read_image(path)
        width, height = self.annotations.image_sizes[index]
        if width and (image.shape[1], image.shape[0]) != (width, height):
            swapped = (image.shape[0], image.shape[1]) == (width, height)
            hint = ": swapped, perhaps annotated without the EXIF orientation; correct the file" if swapped else ""
            raise DataReadError(
                f"{path}: is {image.shape[1]} x {image.shape[0]} pixels, the annotations say {width} x {height}{hint}"
            )
        return image


class FakeDataset(torch.utils.data.Dataset):
    """Random images with random boxes of the right shapes: measures speed and checks a set-up without a dataset."""

    def __init__(self, num_images: int, class_names: Sequence[str], transform: Transform, seed: int) -> None:
        self.sample_transform, self.seed = transform, seed
        generator = np.random.default_rng(seed)
        boxes_per_image = generator.integers(0, 15, num_images)
        first_box = np.concatenate([[0], np.cumsum(boxes_per_image)])
        centre, size = (
            generator.uniform(0, (640, 480), (first_box[-1], 2)),
            generator.uniform(8, 300, (first_box[-1], 2)),
        )
        corners = np.clip(
            np.concatenate([centre - size / 2, centre + size / 2], axis=1), 0, (640, 480, 640, 480)
        ).astype(np.float32)
        area = (corners[:, 2:] - corners[:, :2]).prod(axis=1)
        corners = corners[np.lexsort((-area, np.repeat(np.arange(num_images), boxes_per_image)))]
        coco_boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).astype(np.float64)
        self.annotations = Annotations(
            image_ids=np.arange(1, num_images + 1),
            image_sizes=np.full((num_images, 2), (640, 480), dtype=np.int32),
            file_names=np.zeros(0, np.uint8),
            file_name_ends=np.zeros(num_images, np.int64),
            first_box=first_box,
            boxes=corners,
            labels=generator.integers(0, len(class_names), first_box[-1]),
            areas=coco_boxes[:, 2:].prod(axis=1),
            coco_boxes=coco_boxes,
            crowd=np.zeros(first_box[-1], bool),
            annotation_ids=np.arange(1, first_box[-1] + 1),
            categories=Categories(tuple(class_names), tuple(range(1, len(class_names) + 1))),
            counts=AnnotationCounts(),
        )

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, position: int | tuple[int, int, int]) -> Sample:
        index, epoch, size = (position, 0, 0) if isinstance(position, int) else position
        rows = slice(self.annotations.first_box[index], self.annotations.first_box[index + 1])
        return self.sample_transform(
            self.load_image(index), self.annotations.boxes[rows], self.annotations.labels[rows], index, epoch, size
        )

    def load_image(self, index: int) -> np.ndarray:
        """Smooth noise, RGB uint8, (480, 640, 3)."""
        coarse = np.random.default_rng([self.seed, index]).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        return cv2.resize(coarse, (640, 480), interpolation=cv2.INTER_LINEAR)


def read_image(path: Path) -> np.ndarray:
    """Decode an image file to RGB uint8, (height, width, 3).

    EXIF orientation is applied; grey, palette and CMYK are converted; 16 bits are scaled to 8; transparent pixels are
    laid over mid grey. A truncated file is an error, never a half-grey picture.

    Raises:
        DataReadError: the file is missing, not an image, or damaged.
    """
    try:
        encoded = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise DataReadError(f"image {path} cannot be read: {error.strerror}") from None
    is_jpeg = encoded[:2].tobytes() == b"\xff\xd8"
    # OpenCV fills the missing rest of some truncated files with grey; a complete JPEG holds its end marker.
    if is_jpeg and encoded.tobytes().rfind(b"\xff\xd9") < 0:
        raise DataReadError(f"image {path} is damaged: the JPEG data ends early")
    try:
        image = cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB) if len(encoded) else None
    except cv2.error:
        image = None
    if image is None:
        raise DataReadError(f"image {path} is damaged or in a format that OpenCV does not read")
    alpha = None if is_jpeg else read_alpha(path)
    if alpha is not None and alpha.shape[:2] == image.shape[:2]:
        image = np.round(image * alpha + 128 * (1 - alpha)).astype(np.uint8)
    return image


def read_alpha(path: Path) -> np.ndarray | None:
    """Opacity 0..1 of a picture with transparency, (height, width, 1) float32; None where there is none.

    By Pillow: OpenCV does not turn the alpha channel by the EXIF orientation and knows no transparent grey.
    """
    try:
        with Image.open(path) as file:
            if not file.has_transparency_data:
                return None
            return np.asarray(ImageOps.exif_transpose(file).convert("RGBA"), dtype=np.float32)[..., 3:] / 255
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None  # a format that only OpenCV reads


class _Columns(NamedTuple):
    """The file's entries, one array per key, as they are in the file."""

    image_ids: np.ndarray  # (M,)
    file_names: list[str]
    image_sizes: np.ndarray  # (M, 2)
    image_of_box: np.ndarray  # (N,) image id
    category_of_box: np.ndarray  # (N,) category id
    coco_boxes: np.ndarray  # (N, 4) x, y, width, height
    annotation_ids: np.ndarray  # (N,)
    crowd: np.ndarray  # (N,)
    areas: np.ndarray  # (N,)
    categories: dict[int, str]


def read_columns(content: dict[str, Any], where: str) -> _Columns:
    """Arrays of the parsed JSON; types, finite numbers, unique images and file names are checked."""
    for key in SINGULAR:
        if not isinstance(content.get(key), list):
            raise DataError(f"{where}: has no list {key!r}; is this a COCO annotation file?")
    try:
        images, rows = content["images"], content["annotations"]
        category_ids = _id_array([entry["id"] for entry in content["categories"]]).tolist()
        columns = _Columns(
            image_ids=_id_array([image["id"] for image in images]),
            file_names=[str(image["file_name"]) for image in images],
            image_sizes=np.array(
                [(image.get("width") or 0, image.get("height") or 0) for image in images], dtype=np.int32
            ).reshape(-1, 2),
            image_of_box=_id_array([row["image_id"] for row in rows]),
            category_of_box=_id_array([row["category_id"] for row in rows]),
            coco_boxes=_number_array([row["bbox"] for row in rows], (len(rows), 4)),
            annotation_ids=_id_array([row.get("id", number) for number, row in enumerate(rows)]),
            crowd=np.array([bool(row.get("iscrowd", 0)) for row in rows], dtype=bool),
            areas=_number_array(
                [row["bbox"][2] * row["bbox"][3] if row.get("area") is None else row["area"] for row in rows],
                (len(rows),),
            ),
            categories=dict(zip(category_ids, [str(entry["name"]) for entry in content["categories"]], strict=True)),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(f"{where}: {diagnose_content(content, error)}") from None

    if not images:
        raise DataError(f"{where}: no images")
    for key, values in (("bbox", columns.coco_boxes), ("area", columns.areas[:, None])):
        if not (finite := np.isfinite(values).all(axis=1)).all():
            raise DataError(f"{where}: annotation {columns.annotation_ids[~finite][0]}: {key} is not a finite number")
    _, first = np.unique(columns.image_ids, return_index=True)
    if len(first) != len(images):
        raise DataError(f"{where}: image id {np.delete(columns.image_ids, first)[0]} occurs twice")
    if len(columns.categories) != len(category_ids):
        raise DataError(f"{where}: a category id occurs twice: {', '.join(map(str, sorted(category_ids)))}")
    for name in columns.file_names:
        if name.startswith(("/", "\\")) or ".." in Path(name).parts or "://" in name or CONTROL.search(name):
            raise DataError(f"{where}: file_name {name!r} is not a plain path inside the image directory")
    return columns


def flatten_annotations(
    content: dict[str, Any],
    where: str,
    class_names: Sequence[str] | None = None,
    categories: Categories | None = None,
    fraction: tuple[float, bool] | None = None,
    strict: bool = False,
) -> Annotations:
    """Turn the parsed JSON into flat, checked arrays; see `CocoDataset` for the arguments and `Annotations`."""
    columns = read_columns(content, where)
    chosen = choose_categories(columns.categories, class_names, categories, where)
    chosen_ids = id_of_name(columns.categories, chosen)
    counts = AnnotationCounts()
    keep = np.ones(len(columns.areas), bool)

    def drop(mask: np.ndarray, reason: str) -> None:
        counts.add(reason, columns.annotation_ids[mask & keep])
        np.logical_and(keep, ~mask, out=keep)

    order = np.argsort(columns.image_ids, kind="stable")
    place = np.searchsorted(columns.image_ids[order], columns.image_of_box)
    image_index = order[place.clip(max=len(order) - 1)]  # (N,) position of each box's image
    orphan = np.asarray(columns.image_ids[image_index] != columns.image_of_box, dtype=bool)
    drop(orphan, "annotations of images that are not listed")
    if not (known := np.isin(columns.category_of_box, list(columns.categories))).all():
        row = int(np.flatnonzero(~known)[0])
        raise DataError(
            f"{where}: annotation {columns.annotation_ids[row]}: category_id {columns.category_of_box[row]} "
            "is not in the categories"
        )
    drop(~np.isin(columns.category_of_box, chosen_ids), "boxes of categories that are not chosen")
    label_of_id = {number: label for label, number in enumerate(chosen_ids)}
    labels = np.array([label_of_id.get(number, 0) for number in columns.category_of_box.tolist()], dtype=np.int64)

    boxes = clip_to_images(columns.coco_boxes, columns.image_sizes[image_index])
    degenerate = np.any(columns.coco_boxes[:, 2:] <= 0, axis=1)
    outside = np.any(boxes[:, 2:] <= boxes[:, :2], axis=1) & ~degenerate
    for mask, reason in ((degenerate, "boxes without width or height"), (outside, "boxes outside their image")):
        if strict and (mask & keep).any():
            number = columns.annotation_ids[mask & keep][0]
            raise DataError(f"{where}: annotation {number} is one of {(mask & keep).sum()} {reason} (data.strict)")
        drop(mask, reason)

    in_split = in_fraction(columns.image_ids, fraction)
    if not in_split.any():
        part = "validation" if fraction and fraction[1] else "training"
        raise DataError(f"{where}: data.validation_fraction leaves none of {len(in_split)} images for {part}")
    new_index = np.cumsum(in_split) - 1
    keep &= in_split[image_index]

    # np.lexsort sorts by its last key first: image, then area descending, then annotation id.
    kept = np.flatnonzero(keep)
    box_areas = columns.coco_boxes[kept, 2:].prod(axis=1)
    kept = kept[np.lexsort((columns.annotation_ids[kept], -box_areas, image_index[kept]))]
    encoded = [name.encode() for name, inside in zip(columns.file_names, in_split, strict=True) if inside]
    boxes_per_image = np.bincount(new_index[image_index[kept]], minlength=len(encoded))
    return Annotations(
        image_ids=columns.image_ids[in_split],
        image_sizes=columns.image_sizes[in_split],
        file_names=np.frombuffer(b"".join(encoded), dtype=np.uint8),
        file_name_ends=np.cumsum([len(name) for name in encoded]),
        first_box=np.concatenate([[0], np.cumsum(boxes_per_image)]).astype(np.int64),
        boxes=boxes[kept],
        labels=labels[kept],
        areas=columns.areas[kept],
        coco_boxes=columns.coco_boxes[kept],
        crowd=columns.crowd[kept],
        annotation_ids=columns.annotation_ids[kept],
        categories=Categories(tuple(chosen), tuple(chosen_ids)),
        counts=counts,
    )


def _id_array(values: list[Any]) -> np.ndarray:
    array = np.array(values) if values else np.zeros(0, np.int64)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise TypeError("an id is not a whole number")
    return array.astype(np.int64)


def _number_array(values: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    """float64 of real numbers only: asked for that type at once, NumPy would also convert text and null."""
    array = np.array(values) if values else np.zeros(shape)
    if array.dtype.kind not in "iuf" or array.shape != shape:
        raise TypeError("not a number")
    return array.astype(np.float64)


def clip_to_images(coco_boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """[x, y, width, height] to corners cut to the image, (N, 4) float32; a size of 0 is unknown and does not cut."""
    boxes = coco_boxes.copy()
    boxes[:, 2:] += boxes[:, :2]
    limit = np.where(sizes > 0, sizes, np.iinfo(np.int32).max)
    return boxes.clip(0, np.concatenate([limit, limit], axis=1)).astype(np.float32)


def in_fraction(image_ids: np.ndarray, fraction: tuple[float, bool] | None) -> np.ndarray:
    """Which images belong to this part of a split, by a hash of the id; (M,) bool. Other images do not matter."""
    if fraction is None:
        return np.ones(len(image_ids), bool)
    share, inside = fraction
    hashes = np.array([zlib.crc32(str(number).encode()) % HASH_BUCKETS for number in image_ids.tolist()])
    return (hashes < share * HASH_BUCKETS) == inside


def choose_categories(
    file_categories: dict[int, str], class_names: Sequence[str] | None, training: Categories | None, where: str
) -> tuple[str, ...]:
    """Names of the dense labels, in order. A validation file must know no name that training does not have."""
    names = [file_categories[number] for number in sorted(file_categories)]
    if len(set(names)) != len(names):
        raise DataError(
            f"{where}: category name {next(name for name in names if names.count(name) > 1)!r} occurs twice"
        )
    if not names:
        raise DataError(f"{where}: no categories")
    if training is not None:
        followed = follow_spelling(training.names, names)
        if class_names is None and (extra := [name for name in names if name not in followed]):
            raise DataError(
                f"{where}: categories that the detector was not trained on: {', '.join(extra[:10])}"
                f"{' ...' if len(extra) > 10 else ''} (data.class_names leaves categories out)"
            )
        return followed
    if class_names is not None:
        if missing := [name for name in class_names if name not in names]:
            raise DataError(f"{where}: data.class_names has {', '.join(missing)}; the file has {', '.join(names)}")
        return tuple(class_names)
    return tuple(names)


def follow_spelling(names: Sequence[str], file_names: Sequence[str]) -> tuple[str, ...]:
    """The names as the file spells them: Darknet's coco.names and COCO itself write six classes differently."""
    other = DARKNET_SPELLINGS | {coco: darknet for darknet, coco in DARKNET_SPELLINGS.items()}
    return tuple(
        other[name]
        if name not in file_names and other.get(name) in file_names and other.get(name) not in names
        else name
        for name in names
    )


def id_of_name(file_categories: dict[int, str], names: Sequence[str]) -> list[int]:
    """Category ids of the names in this file; a name that the file lacks gets a new id above all others."""
    ids = {name: number for number, name in file_categories.items()}
    free = max(ids.values(), default=0)
    result = []
    for name in names:
        free += name not in ids
        result.append(ids.get(name, free))
    return result


def diagnose_content(content: dict[str, Any], error: Exception) -> str:
    """Find the entry that made reading fail; the fast path reads whole columns and does not know which."""
    for kind, keys in (
        ("images", ("id", "file_name")),
        ("annotations", ("image_id", "category_id", "bbox")),
        ("categories", ("id", "name")),
    ):
        for number, entry in enumerate(content[kind]):
            known = isinstance(entry, dict) and "id" in entry
            name = f"{SINGULAR[kind]} {entry['id'] if known else f'number {number}'}"
            if not isinstance(entry, dict):
                return f"{name}: is not an object"
            for key in keys:
                if key not in entry:
                    return f"{name}: has no {key!r}"
                if key.endswith("id") and not (isinstance(entry[key], int) and not isinstance(entry[key], bool)):
                    return f"{name}: {key} is {entry[key]!r}, must be a whole number"
            box = entry.get("bbox", [0, 0, 0, 0])
            if kind == "annotations" and not (
                isinstance(box, list) and len(box) == 4 and all(isinstance(value, int | float) for value in box)
            ):
                return f"{name}: bbox is {box!r}, must be four numbers [x, y, width, height]"
            if kind == "annotations" and not isinstance(entry.get("area", 0) or 0, int | float):
                return f"{name}: area is {entry['area']!r}, must be a number"
            if kind == "annotations" and "id" in entry and not isinstance(entry["id"], int):
                return f"{name}: id is {entry['id']!r}, must be a whole number"
            if kind == "images" and not all(isinstance(entry.get(key) or 0, int) for key in ("width", "height")):
                return f"{name}: width or height is not a whole number"
    return f"cannot be read: {type(error).__name__}: {error}"


def diagnose_annotations(path: Path, error: Exception) -> str:
    """Why pycocotools could not index the file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) for key in ("images", "annotations", "categories")
    ):
        return "has not the lists 'images', 'annotations' and 'categories'; is this a COCO annotation file?"
    for number, row in enumerate(content["annotations"]):
        if isinstance(row, dict) and "id" not in row:
            return f"annotation number {number}: has no 'id'"
    return diagnose_content(content, error)


def find_dataset(data: DataSettings) -> tuple[tuple[Path, Path], tuple[Path, Path]]:
    """(annotation file, image directory) of training and of validation; the same file twice where a fraction splits it.

    Raises:
        DataError: nothing found; names what was looked for and how to get data.
    """
    root = existing_root(data, data.train_annotations)
    train = _locate(root, TRAIN_LAYOUTS, data.train_annotations, data.train_images, "train")
    if data.validation_fraction is not None:
        if data.validation_annotations is not None:
            raise DataError("data.validation_fraction and data.validation_annotations are both set; choose one")
        return train, train
    return train, _locate(root, VALIDATION_LAYOUTS, data.validation_annotations, data.validation_images, "validation")


def find_validation_set(data: DataSettings) -> tuple[Path, Path]:
    """(annotation file, image directory) of the validation images alone; no training annotations are needed.

    Raises:
        DataError: nothing found; names what was looked for and how to get data.
    """
    if data.validation_fraction is not None:
        return find_dataset(data)[1]
    root = existing_root(data, data.validation_annotations)
    return _locate(root, VALIDATION_LAYOUTS, data.validation_annotations, data.validation_images, "validation")


def find_split(data: DataSettings, split: str) -> tuple[Path, Path | None]:
    """(annotation file, image directory) of one split alone; no directory where there are annotations only.

    Args:
        split: "train" or "val".

    Raises:
        DataError: no annotation file found; names what was looked for and how to get data.
    """
    if split == "train" or data.validation_fraction is not None:
        root = existing_root(data, data.train_annotations)
        file, images, _ = _look_for(root, TRAIN_LAYOUTS, data.train_annotations, data.train_images, "train")
    else:
        root = existing_root(data, data.validation_annotations)
        explicit = data.validation_annotations, data.validation_images
        file, images, _ = _look_for(root, VALIDATION_LAYOUTS, *explicit, "validation")
    return file, images


def existing_root(data: DataSettings, annotations: str | None) -> Path:
    root = Path(data.root)
    if not root.is_dir() and annotations is None:
        raise DataError(
            f"data.root = {data.root!r} does not exist: fetch COCO with data/download_coco.sh, name your own dataset "
            "with data.root=DIRECTORY, or train on the built-in one with --config recipes/quickstart.yaml"
        )
    return root


def _locate(
    root: Path, layouts: list[tuple[str, tuple[str, ...]]], annotations: str | None, images: str | None, split: str
) -> tuple[Path, Path]:
    """As `_look_for`, for those who need images."""
    file, found, looked = _look_for(root, layouts, annotations, images, split)
    if found is None:
        raise DataError(f"no images for {file}: looked for {looked}; set data.{split}_images")
    return file, found


def _look_for(
    root: Path, layouts: list[tuple[str, tuple[str, ...]]], annotations: str | None, images: str | None, split: str
) -> tuple[Path, Path | None, str]:
    """Annotation file, image directory or None, and where images were looked for.

    Explicit paths are absolute, relative to the working directory, or below root.
    """

    def resolve(path: str) -> Path:
        return Path(path) if Path(path).exists() else root / path

    if annotations is not None:
        found = [
            (
                resolve(annotations),
                next((names for file, names in layouts if annotations.endswith(file)), layouts[1][1]),
            )
        ]
    else:
        found = [(root / file, names) for file, names in layouts if (root / file).is_file()]
    if not found:
        looked = ", ".join(file for file, _ in layouts)
        hint = " (with one annotation file only, set data.validation_fraction=0.1)" if split == "validation" else ""
        raise DataError(
            f"no {split} annotations in {root}: looked for {looked}; fetch COCO with data/download_coco.sh, or set "
            f"data.{split}_annotations, or use --config recipes/quickstart.yaml{hint}"
        )
    file, directories = found[0]
    looked = ", ".join(str(root / directory) for directory in directories)
    if images is not None:
        return file, resolve(images), looked
    for directory in directories:
        if (root / directory).is_dir():
            return file, root / directory, looked
    return file, None if annotations is None else file.parent, looked


def load_annotations(
    path: Path,
    class_names: Sequence[str] | None = None,
    fraction: tuple[float, bool] | None = None,
    strict: bool = False,
) -> Annotations:
    """Annotations of a file alone, without images: for statistics and for scoring stored detections.

    The arguments are those of `CocoDataset`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: is not a COCO annotation file")
    return flatten_annotations(content, str(path), class_names, None, fraction, strict)


def select_images(annotations: Annotations, indices: np.ndarray) -> Annotations:
    """The annotations of some images alone, in the given order.

    Args:
        indices: positions of the images, (K,) int64.
    """
    names = [annotations.file_name(index).encode() for index in indices.tolist()]
    counts = np.diff(annotations.first_box)[indices]
    rows = np.concatenate([np.arange(*annotations.first_box[index : index + 2]) for index in indices.tolist()])
    per_box = ("boxes", "labels", "areas", "coco_boxes", "crowd", "annotation_ids")
    return dataclasses.replace(
        annotations,
        image_ids=annotations.image_ids[indices],
        image_sizes=annotations.image_sizes[indices],
        file_names=np.frombuffer(b"".join(names), dtype=np.uint8),
        file_name_ends=np.cumsum([len(name) for name in names]),
        first_box=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        **{name: getattr(annotations, name)[rows] for name in per_box},
    )


def annotations_digest(annotations: Annotations) -> str:
    """SHA-256 of what is trained on: images, boxes, labels and class names; a continued run must find the same."""
    digest = hashlib.sha256("\n".join(annotations.categories.names).encode())
    for array in (annotations.image_ids, annotations.file_names, annotations.first_box, annotations.boxes):
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update(np.where(annotations.crowd, CROWD_LABEL, annotations.labels).astype(np.int64).tobytes())
    return digest.hexdigest()


def repeat_factors(annotations: Annotations, threshold: float) -> np.ndarray:
    """How often each image should be seen per epoch so that rare classes are not lost; (M,) float64, at least 1.

    r(image) = max over its classes of max(1, sqrt(threshold / share of images with the class))

    Source: LVIS, section 5.1 (repeat factor sampling), https://arxiv.org/abs/1908.03195
    """
    num_images, num_classes = len(annotations), len(annotations.categories.names)
    image_of_box = np.repeat(np.arange(num_images), np.diff(annotations.first_box))
    present = np.zeros((num_images, num_classes), bool)
    usable = ~annotations.crowd
    present[image_of_box[usable], annotations.labels[usable]] = True
    share = present.mean(axis=0)
    class_factor = np.maximum(1, np.sqrt(threshold / np.maximum(share, 1e-12)))
    return np.where(present, class_factor, 1).max(axis=1, initial=1)
