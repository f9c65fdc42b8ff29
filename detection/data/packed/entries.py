"""What pack.py packs: every image of a split with its annotations, whatever the format of the dataset."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from detection.data.annotation_file import ID_MEANING, POSITIONS, Columns, read_without_boxes
from detection.data.dataset_formats import Source
from detection.data.image_places import open_images
from detection.data.json_file import read_json
from detection.data.outside_names import STATED
from detection.data.stored_image import ImageFile
from detection.errors import DataError


@dataclass(frozen=True, slots=True)
class Entry:
    """One image: its entry of the annotation file, its annotations, and the file that holds its bytes."""

    image: dict[str, Any]
    rows: list[dict[str, Any]]
    file: ImageFile


@dataclass(frozen=True)
class SplitContent:
    """The entries of a split in the order of their ids, and its annotation file."""

    entries: list[Entry]
    annotations: bytes


def read_split(source: Source, follow_links: bool) -> SplitContent:
    """Read a split for packing; no image is opened.

    The annotation file is taken over byte by byte. It is written anew only where its names of images are not those
    that are read, and for formats that have none; then an image has the id that training gives it.

    Raises:
        DataError: the annotations are invalid, or an image is missing.
    """
    content, encoded = _annotations(source)
    images = open_images(source.image_directory(), follow_links)
    names = [entry["file_name"] for entry in content["images"]]
    listing = images.look_up(names)
    for positions, what in (
        (listing.missing, "are missing"),
        (listing.not_regular, "are no regular files"),
        (listing.outside, "are links out of the image directory (data.follow_links: true allows them)"),
    ):
        if positions:
            raise DataError(
                f"{source.file}: {len(positions)} of {len(names)} images {what}, such as "
                f"{images.root}/{names[positions[0]]}; check_dataset.py lists all"
            )
    files = [images.locate(name) for name in names]
    return SplitContent(arrange(content, files), encoded)


def arrange(content: dict[str, Any], files: Sequence[ImageFile]) -> list[Entry]:
    """Give each image its annotations, and sort by the ids.

    Args:
        content: of a COCO file, checked.
        files: of the images in its order.
    """
    rows: dict[int, list[dict[str, Any]]] = {entry["id"]: [] for entry in content["images"]}
    for row in content.get("annotations", ()):
        if row["image_id"] in rows:  # others are left out in reading too, which says so
            rows[row["image_id"]].append(row)
    entries = [Entry(entry, rows[entry["id"]], file) for entry, file in zip(content["images"], files, strict=True)]
    return sorted(entries, key=lambda entry: entry.image["id"])


def _annotations(source: Source) -> tuple[dict[str, Any], bytes]:
    """The checked content of a source's annotation file, without outlines, and the file to be written."""
    if source.conversion is not None:
        content = coco_content(source.columns(), source.kind)
        return content, json.dumps(content).encode()
    content, faults = read_json(source.file)
    if faults:
        raise DataError(f"{source.file}: {faults[0].message}")
    if isinstance(content, dict) and "annotations" in content:
        source.columns()  # the same checks as in training
    else:
        read_without_boxes(source.file)
    encoded = source.file.read_bytes()
    if any(STATED in entry for entry in content["images"]):  # names that `settle_names` replaced by what is there
        whole = json.loads(encoded)
        for entry, settled in zip(whole["images"], content["images"], strict=True):
            entry["file_name"] = settled["file_name"]
        encoded = json.dumps(whole).encode()
    return content, encoded


def coco_content(columns: Columns, origin: str) -> dict[str, Any]:
    """Write columns as the content of a COCO file that gives the same columns."""
    info = {"description": f"packed from {origin}"} | ({} if columns.lasting_ids else {ID_MEANING: POSITIONS})
    images = [
        {"id": number, "file_name": name} | ({"width": size[0], "height": size[1]} if all(size) else {})
        for number, name, size in zip(
            columns.image_ids.tolist(), columns.file_names, columns.image_sizes.tolist(), strict=True
        )
    ]
    rows = zip(
        columns.annotation_ids.tolist(),
        columns.image_of_box.tolist(),
        columns.category_of_box.tolist(),
        columns.coco_boxes.tolist(),
        columns.areas.tolist(),
        columns.crowd.tolist(),
        columns.ignored.tolist(),
        strict=True,
    )
    annotations = [
        {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": int(crowd)}
        | ({"ignore": 1} if ignored else {})
        for number, image, category, box, area, crowd, ignored in rows
    ]
    categories = [{"id": number, "name": name} for number, name in columns.categories.items()]
    return {"info": info, "images": images, "annotations": annotations, "categories": categories}
