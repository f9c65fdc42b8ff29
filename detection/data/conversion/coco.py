"""COCO JSON: read as the training reads it, and written so that data.root alone finds it."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from detection.data.annotation_file import read_columns
from detection.data.coco_files import find_coco_files, find_image_directory
from detection.data.conversion.dataset import (
    ConvertedDataset,
    Findings,
    ImageEntry,
    ImageSize,
    as_decimal,
    check_names,
    finish_box,
    image_in_pixels,
    images_below,
    note_duplicates,
    split_of,
    turn_box,
)
from detection.data.image_places import is_packed
from detection.data.json_file import describe_error
from detection.data.outside_names import STATED, settle_names
from detection.errors import DataError

ROBOFLOW = "_annotations.coco.json"
LISTS = ("images", "annotations", "categories")
# Keys that are written anew; and those that a turn by the EXIF orientation makes wrong.
OWN_KEYS = {"file_name", "width", "height", "image_id", "category_id", "bbox", "iscrowd", STATED}
DRAWN_KEYS = {"segmentation", "keypoints"}


def read_coco(
    source: Path, split: str, with_images: bool, findings: Findings, progress: Any, further_keys: bool = False
) -> ConvertedDataset:
    """Read a dataset.

    Args:
        source: annotation file with the images beside it, or folder in COCO's or Roboflow's layout.
        split: name for the images of an annotation file whose name contains no split.
        with_images: leave out images whose file is missing; False: the size in the JSON is enough.
        further_keys: keep ids, segmentations and whatever else the files hold, for COCO JSON again.

    Raises:
        DataError: no annotations, a file that is not COCO JSON, or splits with different categories.
    """
    splits: dict[str, list[ImageEntry]] = {}
    roots: dict[str, Path] = {}
    categories: dict[int, str] | None = None
    entries: dict[str, dict[str, Any]] = {}
    headers: dict[str, dict[str, Any]] = {}
    for name, (file, directory) in find_annotations(source, split).items():
        content = load_json(file)
        columns = read_columns(content, str(file), file)
        if categories is not None and columns.categories != categories:
            raise DataError(f"{file}: has other categories than the splits before; their labels would not agree")
        categories = columns.categories
        splits[name] = read_split(file, directory, content, columns, with_images, findings, progress, further_keys)
        roots[name] = directory
        if further_keys:
            entries = {str(entry["name"]).strip(): entry for entry in content["categories"]}
            headers[name] = {key: value for key, value in content.items() if key not in LISTS}
    assert categories is not None, "find_annotations finds at least one"
    note_unlisted(splits, roots, findings)
    names = check_names([categories[number] for number in sorted(categories)], str(source))
    return ConvertedDataset(names, splits, roots, entries, headers)


def note_unlisted(splits: dict[str, list[ImageEntry]], roots: dict[str, Path], findings: Findings) -> None:
    """Image files that no annotation file lists."""
    listed = {roots[name] / entry.name for name, entries in splits.items() for entry in entries}
    for root in sorted(set(roots.values())):
        for file in images_below(root):
            if file not in listed:
                findings.note("image files that are not converted, because no annotation file lists them", str(file))


def find_annotations(source: Path, split: str) -> dict[str, tuple[Path, Path]]:
    """(annotation file, directory of its images) of each split."""
    if source.is_file():
        name = split_of(source.stem.removeprefix("instances_")) or split
        return {name: (source, find_images(source, source.parent))}
    found: dict[str, tuple[Path, Path]] = {}
    files = [*sorted(source.glob("annotations/instances_*.json")), *sorted(source.glob(f"*/{ROBOFLOW}"))]
    for file in files:
        stem = file.parent.name if file.name == ROBOFLOW else file.stem.removeprefix("instances_")
        name = split_of(stem) or stem
        if name in found:
            raise DataError(f"{found[name][0]} and {file} are both the split {name}; name one of them as SOURCE")
        found[name] = (file, file.parent if file.name == ROBOFLOW else find_images(file, source))
    if not found:  # by content: CVAT, Label Studio, FiftyOne
        others = find_coco_files(source)
        found = {name or split: (file, find_images(file, source)) for name, file in others.items()}
    if not found:
        raise DataError(f"{source}: no annotations/instances_*.json and no */{ROBOFLOW}; name the file itself")
    return found


def find_images(file: Path, root: Path) -> Path:
    """Directory that holds the listed images, or beside the file if none does: their sizes may stand in the JSON."""
    found = find_image_directory(file, root.parent if root.name == "annotations" else root)[0] or file.parent
    if is_packed(found):
        raise DataError(f"{found.parent}: is packed; write its image files with pack.py --unpack {found.parent}")
    return found


def load_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: {describe_error(error)}") from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: is not a COCO annotation file")
    settle_names(content, file)
    return content


def read_split(
    file: Path,
    directory: Path,
    content: dict[str, Any],
    columns: Any,
    with_images: bool,
    findings: Findings,
    progress: Any,
    further_keys: bool,
) -> list[ImageEntry]:
    """The images of one annotation file with their boxes."""
    for reason, ids in columns.meanings.items():
        for number in ids:
            findings.note(f"with {reason}", f"{file}: {number}")
    label_of_id = {number: label for label, number in enumerate(sorted(columns.categories))}
    rows_of = rows_per_image(file, columns, findings)
    entries = []
    for index, name in enumerate(progress(columns.file_names)):
        place = f"{file}: image {columns.image_ids[index]} ({name})"
        width, height = columns.image_sizes[index].tolist()
        stated = (width, height) if width and height else None
        picture: Path | None = directory / name
        fitted: tuple[tuple[int, int], ImageSize | None] | None
        if stated and not with_images and not (directory / name).exists():
            picture, fitted = None, (stated, None)
            findings.note("images whose file is missing; the size is that of the JSON", place)
        else:
            fitted = image_in_pixels(directory / name, place, stated, findings)
        if fitted is None:
            continue
        size, turned = fitted
        boxes = []
        for row in rows_of[index]:
            x, y, wide, high = (as_decimal(value) for value in columns.coco_boxes[row].tolist())
            corners = (x, y, x + wide, y + high)
            corners = corners if turned is None else turn_box(corners, turned)
            row_place = f"{file}: annotation {columns.annotation_ids[row]}"
            label = label_of_id[int(columns.category_of_box[row])]
            annotation = content["annotations"][row]
            extra = other_keys(annotation, turned is not None) if further_keys else {}
            box = finish_box(label, corners, size, row_place, findings, bool(columns.crowd[row]), extra)
            if box is not None:
                boxes.append(box)
                if annotation.get("segmentation") and "segmentation" not in extra:
                    findings.note("segmentations, which are not kept", row_place)
        note_duplicates(boxes, place, findings)
        extra = other_keys(content["images"][index]) if further_keys else {}
        entries.append(ImageEntry(picture, name, *size, boxes, extra))
    return entries


def other_keys(entry: dict[str, Any], turned: bool = False) -> dict[str, Any]:
    """What an image or annotation holds beside that which is written anew."""
    left_out = OWN_KEYS | DRAWN_KEYS if turned else OWN_KEYS
    return {key: value for key, value in entry.items() if key not in left_out}


def check_ids(dataset: ConvertedDataset, joined: bool, findings: Findings) -> None:
    """Let ids of images, annotations and categories stay if every entry has one and none occurs twice.

    Args:
        joined: images of several files are in one split now; otherwise ids need to differ within a file alone.
    """
    splits = list(dataset.splits.values())
    if joined:
        splits = [[entry for entries in splits for entry in entries]]
    for kind, files in (
        ("images", [[entry.extra for entry in entries] for entries in splits]),
        ("annotations", [[box.extra for entry in entries for box in entry.boxes] for entries in splits]),
        ("categories", [[dataset.categories.get(name, {}) for name in dataset.names]]),
    ):
        known = [[extra["id"] for extra in file if "id" in extra] for file in files]
        if any(known) and any(len(set(ids)) < len(file) for ids, file in zip(known, files, strict=True)):
            findings.note("kinds of ids that count from 1 anew, because some were missing or the same", kind)
            for file in files:
                for extra in file:
                    extra.pop("id", None)


def rows_per_image(file: Path, columns: Any, findings: Findings) -> list[list[int]]:
    """Annotations of each image, as rows of the columns."""
    index_of_id = {number: index for index, number in enumerate(columns.image_ids.tolist())}
    rows_of: list[list[int]] = [[] for _ in columns.file_names]
    for row, image in enumerate(columns.image_of_box.tolist()):
        if image in index_of_id:
            rows_of[index_of_id[image]].append(row)
        else:
            place = f"{file}: annotation {columns.annotation_ids[row]}"
            findings.skip("annotations of images that are not listed", place)
    return rows_of


def coco_json(
    dataset: ConvertedDataset, split: str, first_image: int, first_annotation: int, origin: str
) -> dict[str, Any]:
    """The annotation file of a split: category ids from 1 in the order of the labels, unless they are known.

    Args:
        first_image, first_annotation: ids go on from split to split, so that splits can be joined.
        origin: said in "info".
    """
    categories = [
        {"id": number, **dataset.categories.get(name, {}), "name": name}
        for number, name in enumerate(dataset.names, start=1)
    ]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, entry in enumerate(dataset.splits[split], start=first_image):
        of_image = {"file_name": entry.name, "width": entry.width, "height": entry.height}
        images.append({"id": image_id, **entry.extra, **of_image})
        for box in entry.boxes:
            annotations.append(
                {
                    "id": first_annotation + len(annotations),
                    "image_id": images[-1]["id"],
                    "category_id": categories[box.label]["id"],
                    "bbox": list(box.xywh),
                    "area": float(np.prod(box.xywh[2:])),
                    "iscrowd": int(box.crowd),
                    **box.extra,
                }
            )
    return {
        **(dataset.headers.get(split) or {"info": {"description": origin}}),
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
