"""Check a dataset before training: reports everything that would stop or degrade training, with ids.

python check_dataset.py data.root=my_dataset                     both splits; about 4 ms per image and core
python check_dataset.py data.root=my_dataset --quick             opens no image; training makes these checks itself
python check_dataset.py data.root=my_dataset --headers           checks sizes, EXIF and formats without decoding
python check_dataset.py data.root=. data.train_annotations=boxes.json data.train_images=photos --split training
python check_dataset.py --config my.yaml && python3 yolo-v3/main.py --config my.yaml       as a gate

Checks the annotation files, the image files (decoded as in training), leakage between the splits, and whether the
boxes fit the network's input size, cells and anchors. Errors stop training; warnings degrade it. Prints both and writes
check.json with all ids into a new directory below logs/. Never changes the dataset. Exit code: 0 without errors, 1 with
errors (with --strict also warnings), 2 if nothing could be checked.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detection.config.command_line import Parser
from detection.config.settings import DataSettings, Settings
from detection.data.annotation_file import Columns
from detection.data.annotations import Annotations
from detection.data.build import make_builtin
from detection.data.dataset_formats import Source
from detection.data.image_places import is_packed, open_images
from detection.data.sources import find_source, look_once
from detection.data.workers import prepare_process
from detection.dataset_checks.annotation_checks import (
    boxes_per_class,
    check_annotations,
    check_image_sizes,
    compare_categories,
    flatten_tolerantly,
    read_source,
)
from detection.dataset_checks.findings import KINDS, Finding, Findings
from detection.dataset_checks.fit_checks import check_fit
from detection.dataset_checks.image_checks import (
    Split,
    check_images,
    check_listing,
    check_same_images,
    check_shared_names,
    inspect_images,
)
from detection.drawing.files import replace_file
from detection.errors import DataError, SettingsError, UserError, exit_with_message, say
from detection.models import build_detector
from detection.runtime.devices import choose_device
from detection.runtime.run_directory import new_run_directory, writing_results
from detection.training.automatic import load_run_settings

SPLITS = ("training", "validation")


class DatasetFault(UserError):
    """The dataset has errors."""


def main() -> None:
    prepare_process()
    arguments = parse_arguments()
    settings, notices = load_run_settings(
        arguments.config, arguments.settings, unused=("scheduler", "train", "evaluation"), tolerant=True, fit=False
    )
    choose_device(settings.run.device)  # not used, but every script refuses an absent device
    if settings.data.fake:
        raise SettingsError("data.fake: made-up data needs no check")
    say(*notices)
    make_builtin(settings.data)
    findings = Findings(settings.data.strict)
    wanted = SPLITS if arguments.split == "both" else (arguments.split,)
    sources = find_sources(settings.data, wanted, findings)
    annotations = check_files(sources, settings, findings)
    splits = [
        Split(source.split, open_images(source.images, settings.data.follow_links), annotations[source.split])
        for source in sources
        if source.images is not None and source.split in annotations
    ]
    check_listing(splits, findings)
    if arguments.quick:
        check_shared_names(splits, findings)
    else:
        inspect_images(splits, decode=not arguments.headers, workers=settings.data.num_workers)
        for split in splits:
            check_images(split, findings)
            check_unstated_sizes(split, findings)
        check_same_images(splits, findings)
    fit, fit_lines = fit_to_detector(annotations, settings, findings)

    directory = new_run_directory(Path(settings.run.logs_path), "check_dataset", arguments.output)
    depth = "quick" if arguments.quick else "headers" if arguments.headers else "full"
    report = describe(sources, annotations, splits, findings, fit) | {"depth": depth}
    with writing_results(directory):
        replace_file(directory / "check.json", json.dumps(report, indent=2).encode())
    say(*text_lines(report, fit_lines, findings))
    say(f"all ids in {directory / 'check.json'}")
    errors, warnings = len(findings.of("error")), len(findings.of("warning"))
    if errors or (arguments.strict and warnings):
        raise DatasetFault(f"the dataset has {count(errors, 'error')} and {count(warnings, 'warning')}, listed above")


def parse_arguments() -> argparse.Namespace:
    parser = Parser("check_dataset.py", __doc__)
    parser.add_settings(device=False)
    add = parser.add_argument
    add("--split", choices=["both", *SPLITS], default="both", help="check one split alone (default: both)")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--quick", action="store_true", help="do not open any image")
    depth.add_argument("--headers", action="store_true", help="only read the headers of images")
    add("--strict", action="store_true", help="exit with code 1 for warnings too")
    add("--output", type=Path, metavar="DIRECTORY", help="directory of check.json (default: new, below logs/)")
    return parser.parse_intermixed_args()


def find_sources(data: DataSettings, wanted: tuple[str, ...], findings: Findings) -> list[Source]:
    """Find each split as training does; adds a finding for missing ones.

    Raises:
        DataError: there are no annotations at all.
    """
    sources, refusals, look = [], [], look_once(data)
    for split in wanted:
        try:
            source = find_source(data, split, look)
        except DataError as error:
            refusals.append(error)
            findings.add("no_annotation_file", split, [split], [error.line])
            continue
        if source.images is None or not (source.images.is_dir() or is_packed(source.images)):
            looked = str(source.images or ", ".join(map(str, source.tried)))
            findings.add("no_image_directory", split, [split], [f"looked for {looked}"])
            source = replace(source, images=None)
        sources.append(source)
    if not sources:
        raise refusals[0]
    return sources


def check_files(sources: list[Source], settings: Settings, findings: Findings) -> dict[str, Annotations]:
    """Check the annotation files; returns, by split, the annotations that training would use.

    Raises:
        DataError: no file can be read.
    """
    found: dict[str, Annotations] = {}
    refusals: list[DataError] = []
    divided = len(sources) > 1 and sources[0].fraction is not None
    content: Columns | dict[str, Any] | None = None
    for number, source in enumerate(sources):
        split = source.split
        if not (divided and number):
            try:
                content = read_source(source, "both" if divided else split, findings)
            except DataError as error:
                refusals.append(error)
                findings.add("unreadable_file", split, [source.file.name], [error.line])
                if divided:
                    break
                continue
        assert content is not None
        trained = found["training"].categories if "training" in found else None
        annotations = flatten_tolerantly(content, source, settings.data.class_names, trained, findings)
        if annotations is not None:
            found[split] = annotations
            check_annotations(annotations, split, findings)
    if len(refusals) and content is None:
        raise refusals[0]
    if len(found) == len(SPLITS):
        compare_categories(found["training"], found["validation"], findings)
    if "training" in found:
        names = found["training"].categories.names
        if settings.model.num_classes not in (None, len(names)):
            findings.add("wrong_class_count", "training", [f"{len(names)}, not {settings.model.num_classes}"])
    return found


def check_unstated_sizes(split: Split, findings: Findings) -> None:
    """Check for tiny and extreme images among those whose size is not in the annotation file."""
    stated = set(np.flatnonzero(np.all(split.annotations.image_sizes > 0, axis=1)).tolist())
    sizes = np.zeros((len(split.names), 2), dtype=np.int64)
    for index, image in split.images.items():
        if index not in stated:
            sizes[index] = image.size
    check_image_sizes(split.names, sizes, split.name, findings)


def fit_to_detector(
    annotations: dict[str, Annotations], settings: Settings, findings: Findings
) -> tuple[dict[str, float], list[str]]:
    """Check how the boxes of the training set (or of the only split) fit the detector.

    Returns:
        Numbers for check.json and lines for the terminal.
    """
    if not annotations:
        return {}, []
    split = next(iter(annotations))
    with torch.device("meta"):  # only the metadata of the detector is needed, not its weights
        detector = build_detector(settings, 1)
    detector.geometry.check_size("train.image_size", settings.train.image_size)
    return check_fit(annotations[split], detector, settings.train, split, findings)


def describe(
    sources: list[Source],
    annotations: dict[str, Annotations],
    splits: list[Split],
    findings: Findings,
    fit: dict[str, float],
) -> dict[str, Any]:
    """Build the content of check.json."""
    report: dict[str, Any] = {}
    for source in sources:
        found = annotations.get(source.split)
        report[source.split] = {
            "format": source.kind,
            "annotations": str(source.file.absolute()),
            "images_directory": None if source.images is None else str(source.images.absolute()),
            "images": 0 if found is None else len(found),
            "boxes": 0 if found is None else len(found.labels),
            "images_opened": sum(len(split.images) for split in splits if split.name == source.split),
            "boxes_per_class": {} if found is None else boxes_per_class(found),
        }
    severities = {f"{severity}s": len(findings.of(severity)) for severity in ("error", "warning")}
    return {"splits": report, "fit": fit, **severities, "findings": [finding.row() for finding in findings.ordered()]}


def text_lines(report: dict[str, Any], fit_lines: list[str], findings: Findings) -> list[str]:
    """Format the report for the terminal: the dataset, then errors, warnings and notes with advice."""
    lines = [
        f"{split:<12}{values['format']}: {values['images']} images, {values['boxes']} boxes, "
        f"{len(values['boxes_per_class'])} classes, {values['images_opened']} images opened: {values['annotations']}"
        for split, values in report["splits"].items()
    ]
    lines += fit_lines
    for finding in findings.ordered():
        lines += finding_lines(finding)
    if not findings.of("error") and not findings.of("warning"):
        lines.append("no error, no warning")
    return lines


def finding_lines(finding: Finding) -> list[str]:
    """Format a finding: kind and count, first items, advice."""
    kind = KINDS[finding.kind]
    lines = [
        f"{finding.severity:<9}{finding.kind:<23}{finding.split:<11}{len(finding.items):>6} {finding.what}",
        f"{'':9}{finding.listed()}",
    ]
    return [*lines, f"{'':9}-> {kind.advice}"] if kind.advice else lines


def count(number: int, noun: str) -> str:
    """Format a number with its noun, an s behind it unless it is 1."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    exit_with_message(main)
