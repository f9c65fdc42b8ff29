"""YOLO and VOC read into columns through the readers of `conversion`; nothing is written beside the data.

Images come in the order of their names and have the ids 1, 2, ...; boxes keep the order of their file, classes the
order of the dataset's list of names (VOC without one: the alphabet). So the same data trains the same in every format.
A set is divided by its file names as `convert_dataset.py --split 0.9/0.1` does: adding images moves no other one.
"""

import functools
import os
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from detection.data.annotation_file import Columns, read_columns
from detection.data.conversion.coco import coco_json
from detection.data.conversion.dataset import ConvertedDataset, Findings, split_of
from detection.data.conversion.operations import drop_bad_names
from detection.data.conversion.voc import read_voc
from detection.data.conversion.yolo import read_yolo
from detection.errors import DataError

ALL = "all"  # name of the only split of a dataset
MAX_MISSING = 0.1  # share of the image files that may be missing, and that may be damaged
MISSING, UNREADABLE = "whose file is missing", "that cannot be read"  # images, as `read_image_size` says it


class Conversion(NamedTuple):
    """What `read_converted` needs; the stamp changes with the folders."""

    source: Path
    format: str
    inclusive: bool
    difficult: str
    fraction_given: bool
    stamp: int


class Converted(NamedTuple):
    """A dataset of another format: columns and image directory of each split."""

    parts: dict[str, tuple[Columns, Path]]
    findings: Findings


def folder_stamp(folder: Path) -> int:
    """A number that changes when files of a folder come, go or are renamed, or its description changes."""
    paths = [Path(directory) for directory, _, _ in os.walk(folder)]
    paths += [path for path in folder.iterdir() if path.is_file()]
    return hash(tuple(path.stat().st_mtime_ns for path in paths))


@functools.lru_cache(maxsize=2)
def read_converted(key: Conversion) -> Converted:
    """Read a YOLO or VOC dataset into columns.

    Raises:
        DataError: it cannot be read, or too many images are missing; with what was left out before.
    """
    findings = Findings()
    try:
        dataset = _read(key, findings)
        drop_bad_names(dataset, findings)
        parts = {}
        first_image = first_annotation = 1
        for split in sorted(dataset.splits, key=("train", ALL, "val").index):
            dataset.splits[split].sort(key=lambda entry: entry.name)
            content = coco_json(dataset, split, first_image, first_annotation, "")
            columns = read_columns(content, str(key.source))._replace(lasting_ids=False)
            parts[split] = columns, dataset.roots[split]
            first_image += len(content["images"])
            first_annotation += len(content["annotations"])
        return Converted(parts, findings)
    except DataError as error:
        root = key.source.parent if key.source.is_file() else key.source
        raise DataError("; ".join([error.line, *findings.lines(root)])) from None


def _read(key: Conversion, findings: Findings) -> ConvertedDataset:
    progress = functools.partial(tqdm, unit="image", desc="reading", disable=None, leave=False)
    wanted = ("train", "val", ALL)
    if key.format == "yolo":
        dataset = read_yolo(key.source, None, ALL, findings, progress, wanted)
    else:
        dataset = read_voc(key.source, None, ALL, findings, progress, key.inclusive, key.difficult, wanted)
    gone = findings.skipped.get(f"entries of {key.source.name} that do not exist", [])
    for split in {"train", "val"} - dataset.splits.keys():
        lost = [entry for entry in gone if split_of(entry) == split]
        if lost and not (split == "val" and key.fraction_given):
            raise DataError(f"{key.source}: {lost[0]} does not exist")
    missing, unreadable = (findings.skipped.get(f"images {reason}", []) for reason in (MISSING, UNREADABLE))
    total = len(missing) + len(unreadable) + sum(map(len, dataset.splits.values()))
    for places, what in ((missing, "are missing"), (unreadable, "cannot be read")):
        if len(places) > MAX_MISSING * total:
            raise DataError(f"{key.source}: {len(places)} of {total} image files {what}, such as {places[0]}")
    if not any(dataset.splits.values()):
        raise DataError(f"{key.source}: no usable image of the training or validation set")
    dataset.splits = {split: entries for split, entries in dataset.splits.items() if entries}
    return dataset
