"""Annotations of a dataset as checked flat arrays: boxes, labels, categories, and the boxes that were left out."""

import dataclasses
import functools
import gc
import hashlib
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from detection.contract import CROWD_LABEL
from detection.data.annotation_file import Columns, read_columns
from detection.data.json_file import read_json
from detection.errors import DataError, name_list

HASH_BUCKETS = 1_000_000  # resolution of `data.validation_fraction`
DARKNET_SPELLINGS = {  # class names of Darknet's coco.names (from PASCAL VOC) -> COCO's own
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}

# Reasons for leaving out a box.
ORPHAN = "annotations of images that are not listed"
NOT_CHOSEN = "boxes of categories that are not chosen"
DEGENERATE = "boxes without width or height"
OUTSIDE = "boxes outside their image"


@dataclass(frozen=True)
class Categories:
    """Classes of a dataset; label k (0..C-1) has the name `names[k]` and the category id `ids[k]`."""

    names: tuple[str, ...]
    ids: tuple[int, ...]


@dataclass
class AnnotationCounts:
    """Number and annotation ids of the boxes left out of a dataset, by reason."""

    dropped: dict[str, int] = field(default_factory=dict)
    ids: dict[str, list[int]] = field(default_factory=dict)

    def add(self, reason: str, ids: np.ndarray) -> None:
        """Record the boxes left out for a reason, if there are any."""
        if len(ids):
            self.dropped[reason] = len(ids)
            self.ids[reason] = ids.tolist()

    def lines(self) -> list[str]:
        """Format a line per reason."""
        return [
            f"{count} {reason} (annotation ids {self.ids[reason][:5]}{' ...' if count > 5 else ''})"
            for reason, count in self.dropped.items()
        ]


@dataclass(frozen=True)
class Annotations:
    """Flat arrays of N boxes on M images. Boxes are grouped by image and sorted by descending area, then annotation id.

    The loss resolves ground-truth boxes that share a prediction by this order, so it must not depend on the file's.
    """

    image_ids: np.ndarray  # (M,) int64
    image_sizes: np.ndarray  # (M, 2) int32 width, height; 0 where the file does not state it
    file_names: np.ndarray  # uint8, concatenated UTF-8 of all names
    file_name_ends: np.ndarray  # (M,) int64
    first_box: np.ndarray  # (M + 1,) int64: boxes of image m are first_box[m]:first_box[m + 1]
    boxes: np.ndarray  # (N, 4) float32 xyxy, original pixels, clipped to the image
    labels: np.ndarray  # (N,) int64 dense label
    areas: np.ndarray  # (N,) float64 `area` of the file; the metric's small, medium and large
    coco_boxes: np.ndarray  # (N, 4) float64 x, y, width, height as in the file, for the metric
    crowd: np.ndarray  # (N,) bool
    annotation_ids: np.ndarray  # (N,) int64 as in the file, for messages only
    file_order: np.ndarray  # (N,) int64 position in the file, which decides between equal IoUs in the COCO metric
    categories: Categories
    counts: AnnotationCounts

    def __len__(self) -> int:
        return len(self.image_ids)

    def file_name(self, index: int) -> str:
        """Return the file name of an image."""
        start = self.file_name_ends[index - 1] if index else 0
        return self.file_names[start : self.file_name_ends[index]].tobytes().decode()


def read_annotations(path: Path) -> Columns:
    """Read a COCO annotation file; one that is asked for again and has not changed is not read again.

    Raises:
        DataError: the first fault of the file.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"annotation file {path} cannot be read: {error.strerror}") from None
    return _read_annotations(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=4)
def _read_annotations(path: Path, *_: int) -> Columns:
    collecting = gc.isenabled()
    gc.disable()  # it looks for cycles in millions of new objects, a third of the time; JSON has none
    try:
        content, faults = read_json(path)
        columns = read_columns(content, str(path), path)
    finally:
        if collecting:
            gc.enable()
    if faults:
        raise DataError(f"{path}: {faults[0].message}")
    return columns


def forget_annotations() -> None:
    """Release the files that `read_annotations` keeps."""
    _read_annotations.cache_clear()


def flatten_annotations(
    content: Columns | Any,
    where: str,
    class_names: Sequence[str] | None = None,
    categories: Categories | None = None,
    fraction: tuple[float, bool] | None = None,
    strict: bool = False,
) -> Annotations:
    """Turn the columns or the parsed JSON into `Annotations`; arguments as in `CocoDataset`, `where` names the file."""
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
    drop(orphan, ORPHAN)
    drop(~np.isin(columns.category_of_box, chosen_ids), NOT_CHOSEN)
    label_of_id = {number: label for label, number in enumerate(chosen_ids)}
    labels = np.array([label_of_id.get(number, 0) for number in columns.category_of_box.tolist()], dtype=np.int64)

    boxes = clip_to_images(columns.coco_boxes, columns.image_sizes[image_index])
    degenerate = np.any(columns.coco_boxes[:, 2:] <= 0, axis=1)
    outside = np.any(boxes[:, 2:] <= boxes[:, :2], axis=1) & ~degenerate
    for mask, reason in ((degenerate, DEGENERATE), (outside, OUTSIDE)):
        if strict and (mask & keep).any():
            number = columns.annotation_ids[mask & keep][0]
            raise DataError(f"{where}: annotation {number} is one of {(mask & keep).sum()} {reason} (data.strict)")
        drop(mask, reason)

    in_split = in_fraction(columns, fraction)
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
        file_order=kept,
        categories=Categories(tuple(chosen), tuple(chosen_ids)),
        counts=counts,
    )


def clip_to_images(coco_boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Convert (x, y, width, height) to xyxy clipped to the image, (N, 4) float32. An unknown size (0) does not clip."""
    boxes = coco_boxes.copy()
    boxes[:, 2:] += boxes[:, :2]
    limit = np.where(sizes > 0, sizes, np.iinfo(np.int32).max)
    return boxes.clip(0, np.concatenate([limit, limit], axis=1)).astype(np.float32)


def in_fraction(columns: Columns, fraction: tuple[float, bool] | None) -> np.ndarray:
    """Select the images of one part of a split by a hash of their ids or, where those do not last, names, (M,) bool.

    An image's part does not depend on which other images there are.
    """
    if fraction is None:
        return np.ones(len(columns.image_ids), bool)
    share, inside = fraction
    if not columns.lasting_ids:
        return (np.array([place_of(name) for name in columns.file_names]) >= 1 - share) == inside
    hashes = np.array([zlib.crc32(str(number).encode()) % HASH_BUCKETS for number in columns.image_ids.tolist()])
    return (hashes < share * HASH_BUCKETS) == inside


def place_of(name: str) -> float:
    """Hash a file name without its folder to a place in [0, 1), by which images are divided."""
    name = unicodedata.normalize("NFC", name.rpartition("/")[2])
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64


def choose_categories(
    file_categories: dict[int, str], class_names: Sequence[str] | None, training: Categories | None, where: str
) -> tuple[str, ...]:
    """Return the class names in label order.

    Raises:
        DataError: `class_names` has a name that the file lacks, or a validation file has a category that the training
            set lacks.
    """
    names = [file_categories[number] for number in sorted(file_categories)]
    if training is not None:
        followed = follow_spelling(training.names, names)
        if class_names is None and (extra := untrained_names(training.names, names)):
            raise DataError(
                f"{where}: categories that the detector was not trained on: {', '.join(extra[:10])}"
                f"{' ...' if len(extra) > 10 else ''} (data.class_names leaves categories out)"
            )
        return followed
    if class_names is not None:
        if missing := [name for name in class_names if name not in names]:
            raise DataError(f"{where}: data.class_names has {name_list(missing)}; the file has {name_list(names)}")
        return tuple(class_names)
    return tuple(names)


def untrained_names(trained: Sequence[str], file_names: Sequence[str]) -> list[str]:
    """Return the category names of a file that a detector was not trained on."""
    followed = follow_spelling(trained, file_names)
    return [name for name in file_names if name not in followed]


def follow_spelling(names: Sequence[str], file_names: Sequence[str]) -> tuple[str, ...]:
    """Spell names as the file does: Darknet's coco.names and COCO differ in six classes."""
    other = DARKNET_SPELLINGS | {coco: darknet for darknet, coco in DARKNET_SPELLINGS.items()}
    return tuple(
        other[name]
        if name not in file_names and other.get(name) in file_names and other.get(name) not in names
        else name
        for name in names
    )


def id_of_name(file_categories: dict[int, str], names: Sequence[str]) -> list[int]:
    """Return the category ids of the names. A name that the file lacks gets a new id above all others."""
    ids = {name: number for number, name in file_categories.items()}
    free = max(ids.values(), default=0)
    result = []
    for name in names:
        free += name not in ids
        result.append(ids.get(name, free))
    return result


def load_annotations(
    path: Path,
    class_names: Sequence[str] | None = None,
    fraction: tuple[float, bool] | None = None,
    strict: bool = False,
) -> Annotations:
    """Read annotations without their images, for statistics and for evaluating stored detections.

    Arguments and errors as in `CocoDataset`.
    """
    return flatten_annotations(read_annotations(path), str(path), class_names, None, fraction, strict)


def select_images(annotations: Annotations, indices: np.ndarray) -> Annotations:
    """Return the annotations of some images, in the given order.

    Args:
        indices: positions of the images, (K,) int64.
    """
    names = [annotations.file_name(index).encode() for index in indices.tolist()]
    counts = np.diff(annotations.first_box)[indices]
    rows = np.concatenate([np.arange(*annotations.first_box[index : index + 2]) for index in indices.tolist()])
    per_box = ("boxes", "labels", "areas", "coco_boxes", "crowd", "annotation_ids", "file_order")
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
    """SHA-256 of images, boxes, labels and class names, so that a resumed run can refuse a changed dataset."""
    digest = hashlib.sha256("\n".join(annotations.categories.names).encode())
    for array in (annotations.image_ids, annotations.file_names, annotations.first_box, annotations.boxes):
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update(np.where(annotations.crowd, CROWD_LABEL, annotations.labels).astype(np.int64).tobytes())
    return digest.hexdigest()


def repeat_factors(annotations: Annotations, threshold: float) -> np.ndarray:
    """Compute how often to show each image per epoch so that rare classes are seen more often; (M,) float64, >= 1.

    r(image) = max over its classes of max(1, sqrt(threshold / fraction of images with the class))

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
