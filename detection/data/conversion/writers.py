"""A converted dataset, written as a whole or not at all."""

import functools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from detection.data.conversion.coco import coco_json
from detection.data.conversion.dataset import ConvertedDataset, Findings, link_image
from detection.data.conversion.voc_writer import write_voc
from detection.data.conversion.yolo import data_yaml, yolo_label
from detection.drawing.files import replace_file
from detection.errors import OutputError, say

bar = functools.partial(tqdm, unit="image", disable=None, leave=False)


def write_dataset(
    dataset: ConvertedDataset, output: Path, origin: Mapping[str, Any], findings: Findings, images: str
) -> None:
    """Write the dataset atomically: to a temporary folder, which is then renamed to `output`.

    Args:
        origin: "to", the format, and what else conversion.json shall say.
        images: "link", "copy" or "none".

    Raises:
        OutputError: cannot be written; nothing is left behind.
    """
    temporary = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        temporary.mkdir(parents=True)
        if images != "none":
            write_images(dataset, temporary, origin["to"], images == "link")
        if origin["to"] == "coco":
            write_coco(dataset, temporary, origin["description"])
        elif origin["to"] == "voc":
            write_voc(dataset, temporary, bar)
        else:
            write_yolo(dataset, temporary)
        report = {**origin, "images": images, "left_out": findings.skipped, "notes": findings.notes}
        write_json(temporary / "conversion.json", report)
        os.replace(temporary, output)
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_images(dataset: ConvertedDataset, root: Path, target_format: str, link: bool) -> None:
    """Link or copy the images to where the format has them."""
    entries = [(split, entry) for split, entries in dataset.splits.items() for entry in entries]
    copied = 0
    for split, entry in bar(entries):
        if entry.file is not None:
            folder = {"coco": split, "yolo": f"images/{split}", "voc": "JPEGImages"}[target_format]
            copied += link_image(entry.file, root / folder / entry.name, link)
    if link and copied:
        say(f"note: {copied} images were copied, because the file system cannot link them")


def write_coco(dataset: ConvertedDataset, root: Path, description: str) -> None:
    first_image = first_annotation = 1
    for split in dataset.splits:
        content = coco_json(dataset, split, first_image, first_annotation, description)
        write_json(root / "annotations" / f"instances_{split}.json", content)
        first_image += len(content["images"])
        first_annotation += len(content["annotations"])


def write_yolo(dataset: ConvertedDataset, root: Path) -> None:
    for split, entries in dataset.splits.items():
        for entry in bar(entries):
            file = (root / "labels" / split / entry.name).with_suffix(".txt")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(yolo_label(entry), encoding="utf-8")
    replace_file(root / "data.yaml", data_yaml(dataset).encode())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    replace_file(path, json.dumps(content).encode())
