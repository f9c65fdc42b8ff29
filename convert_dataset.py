"""Convert datasets between YOLO txt, Pascal VOC XML and COCO JSON, the format of training. Boxes stay exact.

python convert_dataset.py my_yolo_dataset --output my_dataset && python yolo-v3/main.py data.root=my_dataset
python convert_dataset.py VOCdevkit/VOC2007 --from voc --output voc2007
python convert_dataset.py my_dataset --to yolo --output my_yolo_dataset
python convert_dataset.py photos_with_txt --names classes.txt --split 0.8/0.1/0.1 --strict --output my_dataset
python convert_dataset.py cats dogs --rename kitten=cat puppy=dog --keep cat dog --output both

SOURCE, whose format is detected unless --from is given, is one of
  yolo  a data.yaml (train, val, test: folders, images or lists; names), Darknet's .data, or a folder that has one; or a
        folder with images/ and labels/, with or without splits, or with the .txt beside the images
  voc   Annotations/, JPEGImages/ and ImageSets/Main/; or XML files beside the images, with or without splits
  coco  annotations/instances_*.json, Roboflow's _annotations.coco.json per split, or one .json file
Writes, in a few seconds per thousand images, one of
  coco  annotations/instances_SPLIT.json and SPLIT/; category ids start from 1, in the order of the classes
  yolo  images/SPLIT/, labels/SPLIT/ and data.yaml; classes are numbered in the order of category ids
  voc   Annotations/, JPEGImages/, ImageSets/Main/SPLIT.txt and, as VOC lists no classes, classes.txt, read back
and conversion.json, which lists every line, box and image that was left out, and other notes.

Several SOURCES become one dataset: splits and classes of the same name are joined, images of the same name renamed.
--rename comes before --keep. With --split and shares all images are divided anew by a hash of the file name: adding
images moves no other one. From COCO to COCO ids and all further keys stay.

Image sizes are read from the files, rotated by their EXIF orientation as the loader and OpenCV do; boxes of annotations
that state the size before rotation are rotated too. VOC corners count from 1 and are inclusive: x = xmin - 1,
width = xmax - xmin + 1; for the many tools that write them from 0 and exclusive, use --voc-corners exclusive. VOC's
difficult objects become crowd regions, which are neither trained on nor evaluated, unless --difficult keep is given;
crowd regions become difficult objects, and YOLO txt cannot hold them. VOC is written with parts of pixels as decimals.
Boxes that extend outside the image are not changed; those without width or height are left out.
"""

import argparse
import functools
import math
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from detection.config.command_line import Parser
from detection.data.coco_files import find_coco_files
from detection.data.conversion.coco import ROBOFLOW, check_ids, read_coco
from detection.data.conversion.dataset import ConvertedDataset, Findings
from detection.data.conversion.operations import (
    assign_names,
    drop_bad_names,
    drop_crowd,
    drop_empty_splits,
    keep_classes,
    merge_datasets,
    rename_classes,
    split_by_name,
)
from detection.data.conversion.voc import read_voc
from detection.data.conversion.voc_writer import note_losses
from detection.data.conversion.writers import write_dataset
from detection.data.conversion.yolo import read_yolo
from detection.data.conversion.yolo_labels import has_labels
from detection.data.conversion.yolo_layout import DESCRIPTIONS
from detection.errors import DataError, OutputError, SettingsError, UserError, exit_with_message, name_list, say
from detection.inference.weights import read_names

FORMATS = {"yolo": "YOLO txt", "voc": "Pascal VOC XML", "coco": "COCO JSON"}


class Refused(UserError):
    """Something would be left out, and --strict was given."""


def main() -> None:
    arguments = parse_arguments()
    sources, output = arguments.sources, arguments.output.absolute()
    formats = [arguments.source_format or detect_format(source) for source in sources]
    shares = parse_shares(arguments.split)
    changes = bool(shares or arguments.keep or arguments.rename or len(sources) > 1)
    target = arguments.target_format or ("yolo" if set(formats) == {"coco"} and not changes else "coco")
    for source, source_format in zip(sources, formats, strict=True):
        say(f"{source}: {FORMATS[source_format]}, to {FORMATS[target]}")
    check_arguments(arguments, formats, target, changes)
    findings = Findings()
    try:
        datasets = [
            read_dataset(arguments, source, source_format, target, findings)
            for source, source_format in zip(sources, formats, strict=True)
        ]
    except UserError:
        for line in findings.lines(sources[0]):  # what was found before explains it
            say(line)
        raise
    files = (entry.file for dataset in datasets for entries in dataset.splits.values() for entry in entries)
    check_outside(arguments.output, {file.parent for file in files if file is not None})
    dataset = merge_datasets(datasets, findings)
    change_dataset(dataset, arguments, shares, findings)
    drop_bad_names(dataset, findings)
    if target == "yolo":
        drop_crowd(dataset, findings)
    if target == "voc":
        note_losses(dataset, findings)
    if target != "coco" or changes:
        assign_names(dataset, findings, target)
    check_ids(dataset, bool(shares) or len(sources) > 1, findings)
    drop_empty_splits(dataset, findings)
    for line in findings.lines(sources[0]):
        say(line)
    if not dataset.splits:
        raise DataError(f"{sources[0]}: no image is left to convert")
    if arguments.images == "none" and target == "coco" and not dataset.roots:
        raise SettingsError("--images none: the images of a split would lie in several folders; use --images link")
    if arguments.strict and findings.skipped:
        count = sum(map(len, findings.skipped.values()))
        raise Refused(f"{count} things would be left out (--strict); nothing was written")
    origin = {
        "source": ", ".join(map(str, sources)),
        "from": ", ".join(dict.fromkeys(formats)),
        "to": target,
        "description": f"converted from {FORMATS[formats[0]]}: {', '.join(source.name for source in sources)}",
    }
    write_dataset(dataset, output, origin, findings, arguments.images)
    say(*summary(dataset, arguments.output, target, arguments.images))


def parse_arguments() -> argparse.Namespace:
    parser = Parser("convert_dataset.py", __doc__)
    add = parser.add_argument
    add("sources", type=Path, nargs="+", metavar="SOURCE", help="folder or description file of a dataset")
    add("--output", type=Path, required=True, metavar="DIRECTORY", help="new or empty directory, not inside SOURCE")
    add("--from", choices=FORMATS, dest="source_format", help="format of SOURCE (default: detected)")
    add(
        "--to",
        choices=("coco", "yolo", "voc"),
        dest="target_format",
        help="format to write (default: coco, or yolo if SOURCE is COCO JSON and nothing else is changed)",
    )
    add("--names", type=Path, metavar="FILE", help="class names, one per line, if the dataset has none")
    add(
        "--split",
        default="train",
        metavar="NAME|SHARES",
        help="split of the images if SOURCE has no splits (default: train); or shares of train, val and test that sum "
        "to 1, as 0.8/0.1/0.1 or 0.9/0.1, to divide all images anew",
    )
    add("--keep", nargs="+", metavar="NAME", help="classes to keep; boxes of others are left out, images stay")
    add("--rename", nargs="+", metavar="OLD=NEW", help="new names of classes; two that get the same become one")
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
        coco = [*source.glob("annotations/instances_*.json"), *source.glob(f"*/{ROBOFLOW}")] or find_coco_files(source)
        yolo = [file for file in source.iterdir() if file.suffix in DESCRIPTIONS] or has_labels(source)
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


def parse_shares(text: str) -> list[float] | None:
    """The shares of --split; None: it is the name of a split.

    Raises:
        SettingsError: neither.
    """
    words = text.split("/")
    try:
        shares = [float(word) for word in words]
    except ValueError:
        shares = []
    if len(shares) in (2, 3) and min(shares) >= 0 and math.isclose(sum(shares), 1, abs_tol=1e-6):
        return shares
    one_share = len(shares) == 1 and shares[0] <= 1
    if not text or text in (".", "..") or len(words) > 1 or "\\" in text or one_share:
        raise SettingsError(
            f"--split {text!r}: must be a plain name, or two or three shares of train, val and test that sum to 1, as "
            "0.8/0.1/0.1"
        )
    return None


def check_arguments(arguments: argparse.Namespace, formats: list[str], target: str, changes: bool) -> None:
    """Refuse contradicting arguments, and an output directory that is not empty or inside a source."""
    if set(formats) == {target} and not changes:
        raise SettingsError(
            f"SOURCE is {FORMATS[target]} already; choose another --to, or something to change: --split with shares, "
            "--keep, --rename or several SOURCES"
        )
    if arguments.names is not None and "coco" in formats:
        raise SettingsError("--names: COCO JSON has its own class names")
    check_outside(arguments.output, arguments.sources)
    try:
        output = arguments.output
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise OutputError(f"--output {arguments.output} exists and is not an empty folder")
    except OSError as error:
        raise OutputError(f"--output {arguments.output}: {error.strerror}") from None


def check_outside(output: Path, sources: Iterable[Path]) -> None:
    """Refuse an output that lies inside a source, whose folder is never written to."""
    for source in sources:
        if source.resolve() in (output.resolve(), *output.resolve().parents):
            raise SettingsError(f"--output {output} lies inside the source {source}, where nothing is written")


def read_dataset(
    arguments: argparse.Namespace, source: Path, source_format: str, target: str, findings: Findings
) -> ConvertedDataset:
    """Read one source in its format.

    Args:
        target: format to be written; COCO to COCO keeps ids and further keys.

    Raises:
        DataError: a file cannot be read.
    """
    split = "train" if parse_shares(arguments.split) else arguments.split
    names = None if arguments.names is None else read_names(arguments.names)
    progress = functools.partial(tqdm, unit="image", disable=None, leave=False)
    try:
        if source_format == "yolo":
            return read_yolo(source, names, split, findings, progress)
        if source_format == "coco":
            return read_coco(source, split, arguments.images != "none", findings, progress, target == "coco")
        if not source.is_dir():
            raise DataError(f"{source}: a VOC dataset is a folder")
        inclusive = arguments.voc_corners == "inclusive"
        return read_voc(source, names, split, findings, progress, inclusive, arguments.difficult)
    except OSError as error:
        raise DataError(f"{error.filename or source} cannot be read: {error.strerror}") from None


def change_dataset(
    dataset: ConvertedDataset, arguments: argparse.Namespace, shares: list[float] | None, findings: Findings
) -> None:
    """Apply --rename, --keep and --split with shares, in this order."""
    if arguments.rename:
        new_names = {}
        for word in arguments.rename:
            old, _, new = (part.strip() for part in word.rpartition("="))
            if not old or not new:
                raise SettingsError(f"--rename {word}: must be OLD=NEW")
            new_names[old] = new
        check_classes("--rename", new_names, dataset.names)
        rename_classes(dataset, new_names, findings)
    if arguments.keep:
        check_classes("--keep", arguments.keep, dataset.names)
        keep_classes(dataset, arguments.keep, findings)
    if shares:
        split_by_name(dataset, shares, findings)


def check_classes(option: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Refuse a class name of --keep or --rename that the dataset lacks."""
    for name in names:
        if name not in known:
            more = ", ..." if len(known) > 20 else ""
            raise SettingsError(f"{option}: there is no class {name!r}; there are {', '.join(known[:20])}{more}")


def summary(dataset: ConvertedDataset, output: Path, target_format: str, images: str) -> list[str]:
    """Format what was written, and the command words that train on it."""
    lines = []
    for split, entries in dataset.splits.items():
        boxes = sum(len(entry.boxes) for entry in entries)
        empty = sum(not entry.boxes for entry in entries)
        lines.append(f"{split}: {len(entries)} images, {empty} of them without boxes, {boxes} boxes")
    names = dataset.names
    lines.append(f"{len(names)} classes: {name_list(names[:10])}{', ...' if len(names) > 10 else ''}")
    words = [f"data.root={output}"]
    if images == "none":
        keys = {"train": "data.train_images", "val": "data.validation_images"}
        words += [f"{keys[split]}={root}" for split, root in dataset.roots.items() if split in keys]
    if "val" not in dataset.splits:
        words.append("data.validation_fraction=0.1")
    trains = "train" in dataset.splits and (target_format == "coco" or images != "none")
    lines.append(f"written to {output}" + (f"; train with {shlex.join(words)}" if trains else ""))
    return lines


if __name__ == "__main__":
    exit_with_message(main)
