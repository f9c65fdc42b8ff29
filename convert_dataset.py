"""Convert datasets between YOLO txt, Pascal VOC XML and COCO JSON, the format of training. Boxes stay exact.

python convert_dataset.py my_yolo_dataset --output my_dataset && python yolo-v3/main.py data.root=my_dataset
python convert_dataset.py VOCdevkit/VOC2007 --from voc --output voc2007
python convert_dataset.py my_dataset --to yolo --output my_yolo_dataset
python convert_dataset.py photos_with_txt --names classes.txt --split train --strict --output my_dataset

SOURCE, whose format is detected unless --from is given, is one of
  yolo  a data.yaml (train, val, test: folders, images or lists; names), Darknet's .data, or a folder that has one; or a
        folder with images/ and labels/, with or without splits, or with the .txt beside the images
  voc   Annotations/, JPEGImages/ and ImageSets/Main/; or XML files beside the images, with or without splits
  coco  annotations/instances_*.json, Roboflow's _annotations.coco.json per split, or one .json file
Writes, in a few seconds per thousand images, either
  coco  annotations/instances_SPLIT.json and SPLIT/; category ids start from 1, in the order of the classes
  yolo  images/SPLIT/, labels/SPLIT/ and data.yaml; classes are numbered in the order of category ids
and conversion.json, which lists every line, box and image that was left out, and other notes.

Image sizes are read from the files, rotated by their EXIF orientation as the loader and OpenCV do; boxes of annotations
that state the size before rotation are rotated too. VOC corners count from 1 and are inclusive: x = xmin - 1,
width = xmax - xmin + 1; for the many tools that write them from 0 and exclusive, use --voc-corners exclusive. VOC's
difficult objects become crowd regions, which are neither trained on nor evaluated, unless --difficult keep is given.
YOLO txt cannot hold crowd regions. Boxes that extend outside the image are not changed; those without width or height
are left out.
"""

import argparse
import functools
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from detection.config.command_line import Parser
from detection.data.conversion.coco import ROBOFLOW, coco_json, read_coco
from detection.data.conversion.dataset import ConvertedDataset, Findings, assign_names, drop_bad_names, link_image
from detection.data.conversion.voc import read_voc
from detection.data.conversion.yolo import data_yaml, read_yolo, yolo_label
from detection.data.conversion.yolo_layout import DESCRIPTIONS
from detection.drawing.files import replace_file
from detection.errors import DataError, OutputError, SettingsError, UserError, exit_with_message
from detection.inference.weights import read_names

FORMATS = {"yolo": "YOLO txt", "voc": "Pascal VOC XML", "coco": "COCO JSON"}


class Refused(UserError):
    """Something would be left out, and --strict was given."""


def main() -> None:
    arguments = parse_arguments()
    source, output = arguments.source, arguments.output.absolute()
    source_format = arguments.source_format or detect_format(source)
    target_format = arguments.target_format or ("yolo" if source_format == "coco" else "coco")
    print(f"{source}: {FORMATS[source_format]}, to {FORMATS[target_format]}", flush=True)
    check_arguments(arguments, source_format, target_format)
    findings = Findings()
    dataset = read_dataset(arguments, source_format, findings)
    images = (entry.file for entries in dataset.splits.values() for entry in entries)
    check_outside(arguments.output, {file.parent for file in images if file is not None})
    drop_bad_names(dataset, findings)
    if target_format == "yolo":
        assign_names(dataset, findings)
        drop_crowd(dataset, findings)
    drop_empty_splits(dataset, findings)
    for line in findings.lines(source):
        print(line)
    if not dataset.splits:
        raise DataError(f"{source}: no image is left to convert")
    if arguments.strict and findings.skipped:
        count = sum(map(len, findings.skipped.values()))
        raise Refused(f"{count} things would be left out (--strict); nothing was written")
    origin = {"source": str(source), "from": source_format, "to": target_format}
    write_dataset(dataset, output, origin, findings, arguments.images)
    print("\n".join(summary(dataset, arguments.output, target_format, arguments.images)))


def parse_arguments() -> argparse.Namespace:
    parser = Parser("convert_dataset.py", __doc__)
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="folder or description file of the dataset")
    add("--output", type=Path, required=True, metavar="DIRECTORY", help="new or empty directory, not inside SOURCE")
    add("--from", choices=FORMATS, dest="source_format", help="format of SOURCE (default: detected)")
    add(
        "--to",
        choices=("coco", "yolo"),
        dest="target_format",
        help="format to write (default: coco, or yolo if SOURCE is COCO JSON)",
    )
    add("--names", type=Path, metavar="FILE", help="class names, one per line, if the dataset has none")
    add("--split", default="train", metavar="NAME", help="split of the images if SOURCE has no splits (default: train)")
    add(
        "--images",
        choices=("link", "copy", "none"),
        default="link",
        help="link: hard links, which take no space, or copies if the file system has none (default); copy: copies; "
        "none: annotations only",
    )
    add(
        "--voc-corners",
        choices=("inclusive", "exclusive"),
        default="inclusive",
        help="whether xmax and ymax are inside the box (default: inclusive, as in VOC)",
    )
    add(
        "--difficult",
        choices=("crowd", "keep"),
        default="crowd",
        help="convert VOC's difficult objects to crowd regions (default), or keep them as objects",
    )
    add("--strict", action="store_true", help="write nothing and exit with code 1 if anything would be left out")
    return parser.parse_args()


def detect_format(source: Path) -> str:
    """Detect the format of a dataset: "yolo", "voc" or "coco".

    Raises:
        DataError: the format is not recognised or ambiguous.
    """
    if not source.exists():
        raise DataError(f"{source} does not exist")
    if source.is_file():
        by_suffix = {".json": "coco", **dict.fromkeys(DESCRIPTIONS, "yolo")}
        if source.suffix not in by_suffix:
            raise DataError(f"{source}: a file must be .json, .yaml or .data; or give the folder of the dataset")
        return by_suffix[source.suffix]
    try:
        coco = [*source.glob("annotations/instances_*.json"), *source.glob(f"*/{ROBOFLOW}")]
        yolo = [file for file in source.iterdir() if file.suffix in DESCRIPTIONS] + [*source.glob("**/labels")]
        signs = {"coco": bool(coco), "voc": any(source.rglob("*.xml")), "yolo": bool(yolo)}
        formats = [name for name, there in signs.items() if there]
        if not formats and any(source.rglob("*.txt")):
            return "yolo"
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror}") from None
    if len(formats) != 1:
        found = " and ".join(FORMATS[name] for name in formats)
        what = f"has {found} in it" if found else "no annotations recognised"
        raise DataError(f"{source}: {what}; say which with --from")
    return formats[0]


def check_arguments(arguments: argparse.Namespace, source_format: str, target_format: str) -> None:
    """Refuse contradicting arguments, and an output directory that is not empty or inside the source."""
    if source_format == target_format:
        raise SettingsError(f"SOURCE is {FORMATS[source_format]} already; choose another --to")
    if not arguments.split or arguments.split in (".", "..") or set("/\\") & set(arguments.split):
        raise SettingsError(f"--split {arguments.split!r}: must be a plain name")
    if arguments.names is not None and source_format == "coco":
        raise SettingsError("--names: COCO JSON has its own class names")
    check_outside(arguments.output, [arguments.source])
    try:
        output = arguments.output
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise OutputError(f"--output {arguments.output} exists and is not an empty folder")
    except OSError as error:
        raise OutputError(f"--output {arguments.output}: {error.strerror}") from None


def check_outside(output: Path, sources: Iterable[Path]) -> None:
    for source in sources:
        if source.resolve() in (output.resolve(), *output.resolve().parents):
            raise SettingsError(f"--output {output} lies inside the source {source}, where nothing is written")


def read_dataset(arguments: argparse.Namespace, source_format: str, findings: Findings) -> ConvertedDataset:
    source, split = arguments.source, arguments.split
    names = None if arguments.names is None else read_names(arguments.names)
    progress = functools.partial(tqdm, unit="image", disable=None, leave=False)
    try:
        if source_format == "yolo":
            return read_yolo(source, names, split, findings, progress)
        if source_format == "coco":
            return read_coco(source, split, arguments.images != "none", findings, progress)
        if not source.is_dir():
            raise DataError(f"{source}: a VOC dataset is a folder")
        inclusive = arguments.voc_corners == "inclusive"
        return read_voc(source, names, split, findings, progress, inclusive, arguments.difficult)
    except OSError as error:
        raise DataError(f"{error.filename or source} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: a list is not UTF-8 text: {error}") from None


def drop_crowd(dataset: ConvertedDataset, findings: Findings) -> None:
    """Remove crowd regions, which YOLO txt cannot hold, and count them."""
    for split, entries in dataset.splits.items():
        for entry in entries:
            for box in entry.boxes:
                if box.crowd:
                    findings.skip("crowd regions, which YOLO txt cannot hold", f"{split}/{entry.name}")
            entry.boxes = [box for box in entry.boxes if not box.crowd]


def drop_empty_splits(dataset: ConvertedDataset, findings: Findings) -> None:
    for split in [split for split, entries in dataset.splits.items() if not entries]:
        findings.note("splits of which no image is left", split)
        del dataset.splits[split]


def write_dataset(
    dataset: ConvertedDataset, output: Path, origin: dict[str, str], findings: Findings, images: str
) -> None:
    """Write the dataset atomically: to a temporary folder, which is then renamed to `output`."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        temporary.mkdir(parents=True)
        if images != "none":
            write_images(dataset, temporary, origin["to"], images == "link")
        (write_coco if origin["to"] == "coco" else write_yolo)(dataset, temporary, origin)
        report = {**origin, "images": images, "left_out": findings.skipped, "notes": findings.notes}
        write_json(temporary / "conversion.json", report)
        os.replace(temporary, output)
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_images(dataset: ConvertedDataset, root: Path, target_format: str, link: bool) -> None:
    entries = [(split, entry) for split, entries in dataset.splits.items() for entry in entries]
    copied = 0
    for split, entry in tqdm(entries, unit="image", disable=None, leave=False):
        if entry.file is not None:
            folder = root / split if target_format == "coco" else root / "images" / split
            copied += link_image(entry.file, folder / entry.name, link)
    if link and copied:
        print(f"note: {copied} images were copied, because the file system cannot link them")


def write_coco(dataset: ConvertedDataset, root: Path, origin: dict[str, str]) -> None:
    first_image = first_annotation = 1
    for split in dataset.splits:
        description = f"converted from {FORMATS[origin['from']]}: {Path(origin['source']).name}"
        content = coco_json(dataset, split, first_image, first_annotation, description)
        write_json(root / "annotations" / f"instances_{split}.json", content)
        first_image += len(content["images"])
        first_annotation += len(content["annotations"])


def write_yolo(dataset: ConvertedDataset, root: Path, _: dict[str, str]) -> None:
    for split, entries in dataset.splits.items():
        for entry in tqdm(entries, unit="image", disable=None, leave=False):
            file = (root / "labels" / split / entry.name).with_suffix(".txt")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(yolo_label(entry), encoding="utf-8")
    replace_file(root / "data.yaml", data_yaml(dataset).encode())


def write_json(path: Path, content: dict[str, Any]) -> None:
    replace_file(path, json.dumps(content).encode())


def summary(dataset: ConvertedDataset, output: Path, target_format: str, images: str) -> list[str]:
    lines = []
    for split, entries in dataset.splits.items():
        boxes = sum(len(entry.boxes) for entry in entries)
        empty = sum(not entry.boxes for entry in entries)
        lines.append(f"{split}: {len(entries)} images, {empty} of them without boxes, {boxes} boxes")
    names = dataset.names
    lines.append(f"{len(names)} classes: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}")
    words = f"data.root={output}"
    if images == "none":
        keys = {"train": "data.train_images", "val": "data.validation_images"}
        words += "".join(f" {keys[split]}={root}" for split, root in dataset.roots.items() if split in keys)
    if "val" not in dataset.splits:
        words += " data.validation_fraction=0.1"
    trains = target_format == "coco" and "train" in dataset.splits
    lines.append(f"written to {output}" + (f"; train with {words}" if trains else ""))
    return lines


if __name__ == "__main__":
    exit_with_message(main)
