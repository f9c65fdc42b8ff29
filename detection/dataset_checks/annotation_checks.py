"""Checks of annotations: ids, boxes and categories. No image is opened; COCO takes seconds."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detection.data.annotation_file import Columns, sound_columns
from detection.data.annotations import (
    DEGENERATE,
    ORPHAN,
    OUTSIDE,
    Annotations,
    Categories,
    flatten_annotations,
    untrained_names,
)
from detection.data.box_meanings import IGNORE, find_meanings
from detection.data.converted import read_converted
from detection.data.dataset_formats import Source
from detection.data.json_file import Fault, read_json
from detection.data.outside_names import moved_names
from detection.dataset_checks.findings import Findings
from detection.errors import DataError

DROPPED = {ORPHAN: "orphan_annotation", DEGENERATE: "degenerate_box", OUTSIDE: "box_outside"}
ROUNDING = 1e-9  # pixels of error in a sum of two decimal numbers
HAIR = 1.0  # pixels over the border that are only worth a note
WHOLE_IMAGE = 0.99  # fraction of the image's area
MANY_BOXES = 100  # detections that the COCO metric counts per image and class
RARE = 0.01  # fraction of the largest class
LARGEST_AREA = 1.02  # factor of width * height; COCO's area is that of the segmentation and so smaller
SMALLEST_SIDE, LARGEST_ASPECT = 10, 10


def read_tolerantly(file: Path, split: str, findings: Findings) -> dict[str, Any]:
    """Report everything that makes training refuse the file and return the valid entries.

    Raises:
        DataError: not a COCO annotation file at all.
    """
    content, faults = read_json(file)
    content = sound_columns(content, str(file), faults.append)
    add_faults(faults, split, findings)
    return content


def read_source(source: Source, split: str, findings: Findings) -> Columns | dict[str, Any]:
    """Read a split and report what its file says that training refuses, leaves out or does not understand.

    Raises:
        DataError: nothing can be read.
    """
    if source.conversion is not None:
        found = read_converted(source.conversion).findings
        known = {finding.reason for finding in findings.found}  # both splits are read at once
        for kind, reasons in (("left_out", found.skipped), ("reading_note", found.notes)):
            for reason, places in reasons.items():
                findings.add(kind, "both", [] if reason in known else places, reason=reason)
        return source.columns()
    content = read_tolerantly(source.file, split, findings)
    for key in ("images", "categories"):
        if not content[key] and not findings[f"no_{key}"]:  # all of them were faulty
            findings.add(f"no_{key}", split, [key])
    for reason, ids in find_meanings(content["images"], content["annotations"]).items():
        if reason != IGNORE or not source.ignore_as_crowd:
            findings.add("meaning_lost", split, ids, reason=reason)
    for reason, ids in moved_names(content["images"]).items():
        findings.add("reading_note", split, ids, reason=reason)
    if source.ignore_as_crowd:
        content["annotations"] = [
            row | {"iscrowd": 1} if row.get("ignore") in (1, True) else row for row in content["annotations"]
        ]
    return content


def add_faults(faults: list[Fault], split: str, findings: Findings) -> None:
    """Add one finding per kind, with the message where the item alone does not explain the fault."""
    for kind in dict.fromkeys(fault.kind for fault in faults):
        same = [fault for fault in faults if fault.kind == kind]
        explain = kind.startswith(("bad_", "missing_"))
        details = [fault.message.partition(": ")[2] for fault in same] if explain else []  # without the entry's name
        findings.add(kind, split, [fault.item for fault in same], details)


def flatten_tolerantly(
    content: Columns | dict[str, Any],
    source: Source,
    class_names: Sequence[str] | None,
    trained: Categories | None,
    findings: Findings,
) -> Annotations | None:
    """Build the arrays that training would use; None if even the valid entries are refused.

    Args:
        content: of `read_source`.
        class_names: `data.class_names`.
        trained: categories of the training set, for a validation set.
    """
    if isinstance(content, Columns):
        names = content.category_names
    elif content["images"] and content["categories"]:
        names = [entry["name"] for entry in content["categories"]]
    else:
        return None  # reported already
    if trained is not None and class_names is None and (extra := untrained_names(trained.names, names)):
        findings.add("untrained_category", source.split, extra)
        class_names = tuple(name for name in names if name not in extra)
    try:
        return flatten_annotations(content, str(source.file), class_names, trained, source.fraction)
    except DataError as error:
        findings.add("refused", source.split, [error.line])
        return None


def check_annotations(annotations: Annotations, split: str, findings: Findings) -> None:
    """Check the arrays of one split."""
    check_boxes(annotations, split, findings)
    check_categories(annotations, split, findings)
    names = [annotations.file_name(index) for index in range(len(annotations))]
    sizes = annotations.image_sizes
    per_image = np.diff(annotations.first_box)
    findings.add("file_name_twice", split, [name for name, count in Counter(names).items() if count > 1])
    findings.add("image_without_boxes", split, [names[index] for index in np.flatnonzero(per_image == 0)])
    findings.add("many_boxes", split, [names[index] for index in np.flatnonzero(per_image > MANY_BOXES)])
    findings.add("size_not_stated", split, [names[index] for index in np.flatnonzero((sizes == 0).any(axis=1))])
    check_image_sizes(names, sizes, split, findings)


def check_image_sizes(names: list[str], sizes: np.ndarray, split: str, findings: Findings) -> None:
    """Report tiny and extremely elongated images; `sizes` are width and height, (M, 2), 0 if unknown."""
    shorter, longer = sizes.min(axis=1), sizes.max(axis=1)
    known = shorter > 0
    tiny = known & (shorter < SMALLEST_SIDE)
    extreme = known & ~tiny & (longer > LARGEST_ASPECT * shorter)
    for kind, mask in (("tiny_image", tiny), ("extreme_aspect", extreme)):
        rows = np.flatnonzero(mask)
        findings.add(kind, split, [names[row] for row in rows], [f"{sizes[row, 0]} x {sizes[row, 1]}" for row in rows])


def check_boxes(annotations: Annotations, split: str, findings: Findings) -> None:
    """Add findings about single boxes and about boxes that repeat."""
    ids, crowd, given = annotations.annotation_ids, annotations.crowd, annotations.coco_boxes
    for reason, kind in DROPPED.items():
        findings.add(kind, split, annotations.counts.ids.get(reason, []))

    values, counts = np.unique(ids, return_counts=True)
    findings.add("annotation_id_twice", split, values[counts > 1].tolist())
    findings.add("annotation_id_zero", split, ids[ids == 0].tolist())

    image_of_box = np.repeat(np.arange(len(annotations)), np.diff(annotations.first_box))
    sizes = annotations.image_sizes[image_of_box].astype(np.float64)
    known = (sizes > 0).all(axis=1)
    beyond = np.where(sizes > 0, given[:, :2] + given[:, 2:] - sizes, 0)
    over = np.concatenate([-given[:, :2], beyond], axis=1).max(axis=1, initial=0)  # pixels
    findings.add("box_cut", split, ids[over > HAIR].tolist())
    findings.add("box_hair_over", split, ids[(over > ROUNDING) & (over <= HAIR)].tolist())

    # Boxes are sorted by image and area, so equal boxes are among neighbours of equal area.
    area = given[:, 2:].prod(axis=1)
    next_alike = (image_of_box[1:] == image_of_box[:-1]) & (area[1:] == area[:-1])
    rows = np.flatnonzero(np.append(next_alike, False) | np.insert(next_alike, 0, False))
    key = np.column_stack([image_of_box, annotations.labels, given])[rows]
    order = np.lexsort(key.T[::-1])  # stable: the first of equal boxes is not reported
    same = (key[order[1:]] == key[order[:-1]]).all(axis=1)
    findings.add("duplicate_box", split, sorted(ids[rows[order[1:][same]]].tolist()))

    sides = annotations.boxes[:, 2:].astype(np.float64) - annotations.boxes[:, :2]
    whole = known & (sides.prod(axis=1) >= WHOLE_IMAGE * sizes.prod(axis=1))
    findings.add("box_covers_image", split, ids[whole].tolist())
    wrong = (annotations.areas <= 0) | (annotations.areas > LARGEST_AREA * area + 1)
    findings.add("area_disagrees", split, ids[wrong].tolist())
    findings.add("crowd", split, ids[crowd].tolist())


def check_categories(annotations: Annotations, split: str, findings: Findings) -> None:
    """Add findings about the classes of a split."""
    names = annotations.categories.names
    counts = boxes_per_class(annotations)
    if not sum(counts.values()):
        findings.add("no_boxes" if split == "training" else "no_ground_truth", split, ["annotations"])
    elif split == "training":  # validation uses the same names
        plain = [" ".join(name.casefold().split()) for name in names]
        similar = [name for name, text in zip(names, plain, strict=True) if plain.count(text) > 1]
        findings.add("similar_category_names", split, similar)
        findings.add("unused_category", split, [name for name, count in counts.items() if count == 0])
        most = max(counts.values())
        rare = {name: count for name, count in counts.items() if 0 < count < RARE * most}
        findings.add("rare_category", split, list(rare), [f"{count} boxes" for count in rare.values()])


def boxes_per_class(annotations: Annotations) -> dict[str, int]:
    """Count the boxes of each class, without crowd regions."""
    counts = np.bincount(annotations.labels[~annotations.crowd], minlength=len(annotations.categories.names))
    return dict(zip(annotations.categories.names, counts.tolist(), strict=True))


def compare_categories(training: Annotations, validation: Annotations, findings: Findings) -> None:
    """Report categories whose ids differ between the two files."""
    pairs = zip(training.categories.names, training.categories.ids, validation.categories.ids, strict=True)
    present = {int(label) for label in np.unique(validation.labels)}  # the id of an absent category is invented
    other = [(name, f"{ours}, in validation {theirs}") for name, ours, theirs in pairs if ours != theirs]
    other = [(name, text) for name, text in other if training.categories.names.index(name) in present]
    findings.add("other_category_ids", "both", [name for name, _ in other], [text for _, text in other])
