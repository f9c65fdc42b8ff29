"""Visualise a dataset: images with ground truth, statistics of the boxes, and, with weights, the worst images.

python visualization.py --config recipes/quickstart.yaml                built-in digits, 10 seconds
python visualization.py data.root=my_dataset --split val --pages all    every image; --pages 3-5, --page 7
python visualization.py data.root=my_dataset --class dog --random --per-page 6
python visualization.py data.root=my_dataset --images 139 285 632
python visualization.py data.validation_annotations=instances_val2017.json --split val    annotations alone: statistics
python visualization.py --weights logs/240224-211713_LambdaLR/best.pt   ground truth and detections, worst images first

Writes into a new directory below logs/: report.html (everything in one self-contained file), page_0001.png ... (grids
of images), class_distribution.png, statistics.png and statistics.json; with --weights also worst_images.csv, the
mistakes in every image. --show browses all pages in a window: left and up go back, q quits, other keys go forward.
Statistics of 5,000 images take 5 seconds, a page one second; the detector takes as long as in validation.py.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from detection.drawing.files import replace_file
from detection.runtime.habana import prepare_habana

if __name__ == "__main__":
    prepare_habana(sys.argv[1:])  # torch reads the environment when it is imported

import numpy as np
from tqdm import tqdm

from detection.config.command_line import Parser, device_flags
from detection.config.settings import Settings
from detection.data.annotations import Annotations, Categories, flatten_annotations
from detection.data.build import make_builtin
from detection.data.coco import CocoDataset
from detection.data.image_file import read_image
from detection.data.sources import find_source, source_lines
from detection.data.transforms import Transform
from detection.data.workers import prepare_process
from detection.drawing.boxes import save_png
from detection.drawing.fonts import printable
from detection.drawing.html_page import HtmlReport
from detection.drawing.window import browse
from detection.errors import DataError, DataReadError, SettingsError, exit_with_message, name_list, say
from detection.evaluation.mistakes import RULE, Findings, write_mistakes
from detection.inference.weights import OpenedDetector, check_classes, open_command_line
from detection.runtime.devices import open_machine
from detection.runtime.run_directory import new_run_directory, writing_results
from detection.training.automatic import load_run_settings
from detection.visualization.dataset_figures import draw_box_statistics, draw_class_distribution
from detection.visualization.dataset_pages import Pages
from detection.visualization.dataset_statistics import SIZE_NAMES, DatasetStatistics, measure_dataset
from detection.visualization.image_ranking import find_mistakes

MAX_PER_PAGE = 100
MAX_EMBEDDED = 20  # pages in the HTML report, about half a megabyte each
PAGE_FLAGS = ("page", "pages", "images", "class_name", "random", "weights")


def main() -> None:
    prepare_process()
    arguments = parse_arguments()
    opened = open_command_line(arguments, arguments.settings) if arguments.weights else None
    if opened is None:
        given, unused = (arguments.config, arguments.settings, device_flags(arguments)), ("scheduler", "train")
        settings, notices = load_run_settings(*given, unused=unused, tolerant=True, fit=False)
        say(*notices)
    else:
        settings = opened.settings
    machine = open_machine(settings.run)  # also without --weights, because every script refuses an absent device
    split = arguments.split or ("train" if opened is None else "val")
    file, annotations, dataset = open_dataset(settings, split, opened)
    statistics = measure_dataset(annotations)
    facts = describe(file, annotations, statistics)
    if dataset is None:
        facts.append("no images: statistics only")
    say(*facts)
    chosen, numbers = np.zeros(0, np.int64), range(0)
    if dataset is None and (flags := [name for name in PAGE_FLAGS if getattr(arguments, name)]):
        raise DataError(f"--{flags[0].removesuffix('_name')}: there are no images for {file}")
    if dataset is not None:
        chosen = choose_images(arguments, annotations, settings.run.seed)
        numbers = choose_pages(arguments, math.ceil(len(chosen) / arguments.per_page))

    directory = new_run_directory(Path(settings.run.logs_path), f"visualization_{split}", arguments.output)
    report = HtmlReport(f"{file.name}: {len(annotations):,} images")
    pages = None
    with writing_results(directory):
        write_statistics(directory, report, statistics, facts)
        if dataset is not None:
            unreadable: dict[int, str] = {}
            findings = None if opened is None else find_mistakes(opened, machine, dataset, unreadable)
            if findings is not None:
                readable = chosen[~np.isin(chosen, list(unreadable))]
                if not len(readable):
                    raise DataReadError("none of these images can be read")
                order = report_mistakes(directory, report, annotations, findings, unreadable)
                # Sorted by RULE unless --random.
                chosen = readable if arguments.random else order[np.isin(order, readable)]
            pages = Pages(dataset, chosen, arguments.per_page, findings, unreadable)
            numbers = range(min(numbers.start, len(pages) - 1), min(numbers.stop, len(pages)))  # fewer can be read
            write_pages(directory, report, pages, numbers)
        report.write(directory / "report.html")
    say(f"report.html{f', {len(numbers)} of {len(pages)} pages' if pages else ''} and statistics in {directory}")
    if arguments.show:
        if pages is None:
            figures = [directory / name for name in ("class_distribution.png", "statistics.png")]
            browse(file.name, len(figures), lambda number: read_image(figures[number]))
        else:
            browse(file.name, len(pages), pages.draw, first=numbers[0])


def parse_arguments() -> argparse.Namespace:
    parser = Parser("visualization.py", __doc__)
    parser.add_settings()
    parser.add_weights(required=False)
    parser.add_output()
    add = parser.add_argument
    add("--split", choices=("train", "val"), help="split to show (default: train; with --weights val)")
    add("--images", nargs="+", metavar="ID", help="only show the images with these ids, in this order")
    add("--class", dest="class_name", metavar="NAME", help="only show images with a box of this class")
    add("--random", action="store_true", help="shuffle the images; run.seed=N chooses another order")
    add(
        "--per-page",
        type=int,
        metavar="N",
        help=f"images per page, 1 to {MAX_PER_PAGE} (default: 12; with --weights 4)",
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--page", type=int, metavar="N", help="page to write (default: 1)")
    group.add_argument("--pages", metavar="A-B", help='range of pages to write, or "all"')
    arguments = parser.parse_intermixed_args()
    # In `--images 139 285 data.root=x`, words with = are settings.
    words = arguments.images or []
    arguments.settings += [word for word in words if "=" in word]
    arguments.images = [word for word in words if "=" not in word]
    if words and not arguments.images:
        raise SettingsError("--images: expected the ids of images")
    if arguments.per_page is None:
        arguments.per_page = 12 if arguments.weights is None else 4
    if not 1 <= arguments.per_page <= MAX_PER_PAGE:
        raise SettingsError(f"--per-page {arguments.per_page}: must be 1 to {MAX_PER_PAGE}")
    if arguments.weights is None and (arguments.cfg or arguments.names):
        raise SettingsError("--cfg and --names describe --weights, which is missing")
    return arguments


def open_dataset(
    settings: Settings, split: str, opened: OpenedDetector | None
) -> tuple[Path, Annotations, CocoDataset | None]:
    """Open a split; returns its annotation file, the annotations, and the dataset (None if there are no images).

    Raises:
        DataError: there are no usable annotations, or the detector does not know their categories.
        SettingsError: the numbers of classes of data and network differ, or the data is synthetic.
    """
    data = settings.data
    if data.fake:
        raise SettingsError("data.fake: there is no dataset to look at")
    make_builtin(data)
    source = find_source(data, {"train": "training", "val": "validation"}[split])
    say(*source_lines(source))
    file, images, columns = source.file, source.images, source.columns()
    if images is None:
        return file, flatten_annotations(columns, str(file), data.class_names, None, source.fraction, data.strict), None
    names = None if opened is None else opened.names
    dataset = CocoDataset(
        images,
        file,
        None if opened is None else Transform(opened.detector.geometry, settings.evaluation.image_size),
        data.class_names,
        categories=None if names is None else Categories(names, tuple(range(len(names)))),
        fraction=source.fraction,
        strict=data.strict,
        columns=columns,
    )
    annotations = dataset.annotations
    if opened is not None:
        check_classes(opened, annotations.categories.names)
    present = any(dataset.images.holds(annotations.file_name(index)) for index in range(len(annotations)))
    return file, annotations, dataset if present else None


def describe(file: Path, annotations: Annotations, statistics: DatasetStatistics) -> list[str]:
    """Summarise the dataset in a few lines."""
    summary = statistics.summary()
    sizes = ", ".join(f"{name} {statistics.size_counts[number]:,}" for number, name in enumerate(SIZE_NAMES))
    lines = [
        f"{file}: {summary['images']:,} images, {summary['boxes']:,} boxes of {len(statistics.class_names)} classes",
        f"{summary['crowd_regions']:,} crowd regions on {summary['images_with_crowd_regions']:,} images; "
        f"{summary['images_without_boxes']:,} images without boxes",
        f"by COCO's sizes: {sizes}",
    ]
    if absent := [name for name, row in summary["classes"].items() if not row["boxes"]]:
        lines.append(f"classes without any box: {name_list(absent)}")
    if summary["images_without_stated_size"]:
        lines.append(f"{summary['images_without_stated_size']:,} images without a stated size")
    return lines + [f"left out: {line}" for line in annotations.counts.lines()]


def write_statistics(directory: Path, report: HtmlReport, statistics: DatasetStatistics, facts: Sequence[str]) -> None:
    """Write statistics.json and two figures, and put them and the table of classes into the report."""
    summary = statistics.summary()
    replace_file(directory / "statistics.json", json.dumps(summary, indent=1).encode())
    report.lines(facts)
    for name, draw in (("class_distribution", draw_class_distribution), ("statistics", draw_box_statistics)):
        draw(directory / f"{name}.png", statistics)
        report.png((directory / f"{name}.png").read_bytes(), name.replace("_", " "))
    report.heading("Classes")
    classes = sorted(summary["classes"].items(), key=lambda item: -item[1]["boxes"])
    total = max(summary["boxes"], 1)
    report.table(
        ("class", "boxes", "of all boxes", "images", "crowd regions"),
        [
            (name, f"{row['boxes']:,}", f"{row['boxes'] / total:.2%}", f"{row['images']:,}", row["crowd_regions"])
            for name, row in classes
        ],
    )


def choose_images(arguments: argparse.Namespace, annotations: Annotations, seed: int) -> np.ndarray:
    """Select and order images by the flags; returns their positions in the dataset, (K,).

    Raises:
        SettingsError: an id or class is unknown, or no image is left.
    """
    chosen = np.arange(len(annotations))
    if arguments.images:
        position = {number: index for index, number in enumerate(annotations.image_ids.tolist())}
        for word in arguments.images:
            if not word.lstrip("-").isdecimal() or int(word) not in position:
                raise SettingsError(f"--images {word}: no image has this id; the first is {annotations.image_ids[0]}")
        chosen = np.array([position[int(word)] for word in dict.fromkeys(arguments.images)])
    if arguments.class_name is not None:
        names = annotations.categories.names
        if arguments.class_name not in names:
            raise SettingsError(printable(f"--class {arguments.class_name}: the classes are {name_list(names)}"))
        label = names.index(arguments.class_name)
        image_of_box = np.repeat(np.arange(len(annotations)), np.diff(annotations.first_box))
        chosen = chosen[np.isin(chosen, image_of_box[annotations.labels == label])]
        if not len(chosen):
            raise SettingsError(printable(f"--class {arguments.class_name}: none of these images has such a box"))
    if arguments.random:
        chosen = np.random.default_rng(seed).permutation(chosen)
    return chosen


def choose_pages(arguments: argparse.Namespace, count: int) -> range:
    """Parse --page or --pages; returns the numbers of the pages to write, from 0.

    Args:
        count: number of pages.

    Raises:
        SettingsError: there is no such page.
    """
    if arguments.pages == "all":
        return range(count)
    text = arguments.pages or str(1 if arguments.page is None else arguments.page)
    first, separator, last = text.partition("-")
    if not first.isdecimal() or (separator and not last.isdecimal()):
        raise SettingsError(f"--page{'s' if arguments.pages else ''} {text}: expected A-B, a number or all")
    numbers = range(int(first) - 1, int(last or first))
    if not 0 <= numbers.start < numbers.stop <= count:
        raise SettingsError(f"--page{'s' if arguments.pages else ''} {text}: there are pages 1 to {count}")
    return numbers


def report_mistakes(
    directory: Path, report: HtmlReport, annotations: Annotations, findings: Findings, unreadable: dict[int, str]
) -> np.ndarray:
    """Write and print the mistakes; returns the positions of the readable images, worst first."""
    mistakes = findings.mistakes
    order = mistakes.worst_first()
    order = order[~np.isin(order, list(unreadable))]
    write_mistakes(directory / "worst_images.csv", annotations, mistakes, order)
    lines = [
        f"at score {findings.threshold:g} and IoU 0.5, {mistakes.gt_boxes[order].sum():,} ground-truth boxes: "
        f"{mistakes.found[order].sum():,} found, {mistakes.missed[order].sum():,} missed; "
        f"{len(findings.matches):,} detections: {mistakes.false.sum():,} false, "
        f"{mistakes.in_crowd.sum():,} in crowd regions",
        f"worst_images.csv and pages: {RULE}",
    ]
    say(*lines)
    report.heading("Ground truth beside detections")
    report.lines(lines)
    return order


def write_pages(directory: Path, report: HtmlReport, pages: Pages, numbers: range) -> None:
    """Write the pages as page_<number>.png; the first `MAX_EMBEDDED` are in the report too."""
    report.heading("Images")
    for number in tqdm(numbers, unit="page", disable=None if len(numbers) > 1 else True):
        picture = pages.draw(number)
        save_png(directory / f"page_{number + 1:04d}.png", picture)
        if number - numbers.start < MAX_EMBEDDED:
            report.photograph(picture, pages.caption(number))
    if len(numbers) > MAX_EMBEDDED:
        report.lines([f"The other {len(numbers) - MAX_EMBEDDED} pages are the files page_*.png beside this report."])
    if pages.unreadable:
        report.heading("Images that cannot be read, left out")
        report.lines(pages.unreadable.values())
        say(f"{len(pages.unreadable)} images cannot be read and were left out")


if __name__ == "__main__":
    exit_with_message(main)
