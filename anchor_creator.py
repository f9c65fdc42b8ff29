"""Fit anchors to a dataset by k-means, compare them with the current ones, and write them as an overlay.

python anchor_creator.py --config recipes/quickstart.yaml                      built-in digits, about 5 seconds
python anchor_creator.py data.root=my_dataset train.image_size=320
python anchor_creator.py data.root=boxes.json --per-level 4                    no images are needed
python yolo-v3/main.py --config my_overlay.yaml --config logs/<run>/anchors.yaml

Uses the boxes of the training images at the size of the network input (train.image_size, letterboxed as in training),
without crowd regions, boxes below 1 pixel and the tenth of a single set that validates. With train.resize_frequency,
training shows every box at all of train.multiscale_sizes equally often, so the anchors are fitted to the boxes at all
these sizes. Augmentation and data.balance are ignored.

The distance is 1 - shape IoU (IoU of box and anchor with the same centre). Prints the mean best shape IoU and two upper
bounds of the recall: the share of boxes whose best anchor has a shape IoU of at least --threshold, and the share with
both sides within a factor of --ratio of those of an anchor. Anchors are sorted by area and assigned to the levels,
finest stride first, with the current number per level or that of --per-level; if all objects are small, the fine levels
need more. Recommends whether to use them: the anchors published for COCO suit many datasets.

Writes anchors.yaml, anchors.json and anchors.png into a new directory below logs/; for a network from a Darknet .cfg
also anchors.cfg, with the new anchors. Takes seconds; about 20 for COCO's 860,001 boxes. docs/anchors.png shows all
boxes of COCO val2017 (data.root=. data.train_annotations=instances_val2017.json
data.validation_annotations=instances_val2017.json).
"""

import argparse
import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from detection.config.command_line import Parser
from detection.config.settings import DARKNET_CFG, Settings
from detection.contract import AnchorLayout, Anchors, Detector
from detection.data.anchor_clustering import (
    SMALL_GAIN,
    best_ious,
    best_side_ratios,
    fit_anchors,
    mean_best_iou,
    nearest_anchors,
)
from detection.data.annotations import flatten_annotations
from detection.data.box_shapes import shapes_at
from detection.data.build import choose_training_images, make_builtin
from detection.data.sampler import size_step
from detection.data.sources import find_source, source_lines
from detection.drawing.figures import figure_pixels, save_figure
from detection.drawing.files import replace_file
from detection.drawing.window import browse
from detection.errors import DataError, SettingsError, exit_with_message, say
from detection.models import build_detector
from detection.runtime.devices import choose_device
from detection.runtime.run_directory import new_run_directory, writing_results
from detection.training.automatic import OWN_DATA, load_run_settings
from detection.visualization.anchor_figure import draw_anchors

PUBLISHED = {  # number of anchors -> name and values, made for COCO. Source: yolov3.cfg, yolov3-tiny.cfg of Darknet
    9: (
        "YOLOv3 for COCO",
        [(10, 13), (16, 30), (33, 23), (30, 61), (62, 45), (59, 119), (116, 90), (156, 198), (373, 326)],
    ),
    6: ("YOLOv3-tiny for COCO", [(10, 14), (23, 27), (37, 58), (81, 82), (135, 169), (344, 319)]),
}


@dataclass(frozen=True)
class Fit:
    """How well a set of anchors covers the boxes."""

    name: str
    anchors: np.ndarray  # (K, 2)
    mean_iou: float
    recall_iou: float
    recall_ratio: float


def main() -> None:
    arguments = parse_arguments()
    settings, notices = load_run_settings(
        arguments.config,
        arguments.settings,
        unused=("scheduler", "train", "evaluation"),
        tolerant=True,
        fit=False,
        anchors=True,
    )
    choose_device(settings.run.device)  # not used, but every script refuses an absent device
    detector, layout = open_detector(settings)
    counts = counts_per_level(arguments.per_level, layout)
    if settings.data.fake:
        raise SettingsError("data.fake: random boxes have no useful anchors; name a dataset with data.root=DIRECTORY")
    make_builtin(settings.data)
    source = find_source(settings.data, "training")
    path, data = source.file, settings.data
    annotations = flatten_annotations(source.columns(), str(path), data.class_names, None, source.fraction)
    annotations = choose_training_images(annotations, data)
    sizes = input_sizes(settings, size_step(detector.geometry.size_multiple))
    shapes, left_out = shapes_at(annotations, detector.geometry, sizes, settings.run.seed)
    at = f"{sizes[0]} px" if len(sizes) == 1 else f"{len(sizes)} sizes from {sizes[0]} to {sizes[-1]} px"
    say(*notices, *source_lines(source), f"{path}: {len(annotations)} images, {len(shapes)} box shapes at {at}")
    say(*([f"    left out: {line}" for line in left_out + annotations.counts.lines()] or ["    none left out"]))

    known = np.array([anchor for level in layout.levels for anchor in level])
    try:
        anchors = fit_anchors(shapes, sum(counts), settings.run.seed, arguments.restarts, known)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    levels = deal(anchors.round(1), counts)
    fits = compare(shapes, levels, layout.levels, arguments)
    verdict = judge(fits)
    say(*table(fits, arguments), *level_lines(levels, layout.strides, shapes), verdict)

    directory = new_run_directory(Path(settings.run.logs_path), "anchors", arguments.output)
    sets = [
        (name, f"{fit.name}, mean IoU {fit.mean_iou:.3f}", anchors)
        for name, fit, anchors in (("new", fits[0], levels), ("current", fits[1], layout.levels))
    ]
    title = f"{path.name}: {len(annotations)} images at {at}"
    figure = draw_anchors(shapes, sets, layout.strides, max(sizes), title)
    with writing_results(directory):
        save_figure(directory / "anchors.png", figure)
        write_overlay(directory, levels, layout, sizes, [f"{path}, {at}", verdict])
        write_report(directory / "anchors.json", levels, layout, fits, verdict, path, sizes, arguments)
    own_plan = settings.run.name == OWN_DATA.stem and not arguments.config  # an overlay alone goes on COCO's
    plan = f"--config {OWN_DATA} " if own_plan else ""
    say(f"overlay, figure and numbers in {directory}; train with {plan}--config {directory / 'anchors.yaml'}")
    if arguments.show:
        browse("anchors", 1, lambda page: figure_pixels(figure))


def parse_arguments() -> argparse.Namespace:
    parser = Parser("anchor_creator.py", __doc__)
    parser.add_settings(device=False)
    add = parser.add_argument
    add(
        "--per-level",
        metavar="N[,N...]",
        help="number of anchors per level; one for all or one each, finest stride first (default: as now)",
    )
    add("--restarts", type=int, default=10, metavar="N", help="number of clusterings, the best is used (default: 10)")
    add("--threshold", type=float, default=0.5, metavar="IOU", help="minimum shape IoU for the recall (default: 0.5)")
    add("--ratio", type=float, default=4.0, metavar="R", help="maximum ratio of sides for the recall (default: 4)")
    parser.add_output()
    arguments = parser.parse_intermixed_args()
    if arguments.restarts < 1:
        raise SettingsError(f"--restarts {arguments.restarts}: must be at least 1")
    if not 0 < arguments.threshold < 1:
        raise SettingsError(f"--threshold {arguments.threshold:g}: must lie between 0 and 1")
    if not 1 < arguments.ratio < math.inf:
        raise SettingsError(f"--ratio {arguments.ratio:g}: must be greater than 1")
    return arguments


def open_detector(settings: Settings) -> tuple[Detector, AnchorLayout]:
    """Build the detector on the meta device; returns it and its anchors.

    Raises:
        SettingsError: it has no anchors.
    """
    with torch.device("meta"):
        detector = build_detector(settings, settings.model.num_classes or 1)
    if detector.anchors is None:
        raise SettingsError(f"model.detector = {settings.model.detector!r}: this detector has no anchors")
    return detector, detector.anchors


def counts_per_level(text: str | None, layout: AnchorLayout) -> list[int]:
    """Parse --per-level to the number of anchors per level, stride ascending; None: the current numbers."""
    current = [len(level) for level in layout.levels]
    if text is None:
        return current
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    counts = counts * len(current) if len(counts) == 1 else counts
    if len(counts) != len(current) or min(counts) < 1:
        raise SettingsError(
            f"--per-level {text}: one whole number above 0 for all {len(current)} levels of the network, or one each: "
            f"{','.join(map(str, current))}"
        )
    if layout.with_anchors is not None and counts != current:
        raise SettingsError(f"--per-level {text}: the cfg has {','.join(map(str, current))}; change its filters first")
    return counts


def input_sizes(settings: Settings, step: int) -> list[int]:
    """List the input sizes of training in pixels; all are equally frequent."""
    train = settings.train
    if not train.resize_frequency:
        return [train.image_size]
    smallest, largest = train.multiscale_sizes
    return list(range(smallest, largest + 1, step))


def deal(anchors: np.ndarray, counts: Sequence[int]) -> list[list[tuple[float, float]]]:
    """Distribute anchors (K, 2), sorted by area, over the levels, stride ascending."""
    pieces = np.split(anchors, np.cumsum(counts)[:-1])
    return [[(float(width), float(height)) for width, height in piece] for piece in pieces]


def compare(shapes: np.ndarray, new: Anchors, current: Anchors, arguments: argparse.Namespace) -> list[Fit]:
    """Measure the new anchors, the current ones and, if different, those published for COCO."""
    flat_new, flat = ([anchor for level in levels for anchor in level] for levels in (new, current))
    published_name, published = PUBLISHED.get(len(flat), PUBLISHED[9])
    sets = [("new", flat_new), ("current", flat), (published_name, published)]
    if sorted(flat) == sorted(published):
        sets[1:] = [(f"current = {published_name}", flat)]
    fits = []
    for name, values in sets:
        anchors = np.array(values, dtype=np.float64)
        recall = float((best_ious(shapes, anchors) >= arguments.threshold).mean())
        within = float((best_side_ratios(shapes, anchors) <= arguments.ratio).mean())
        fits.append(Fit(name, anchors, mean_best_iou(shapes, anchors), recall, within))
    return fits


def table(fits: Sequence[Fit], arguments: argparse.Namespace) -> list[str]:
    """Format the fit of each set of anchors to the boxes, one line each below a head."""
    width = max(len(fit.name) for fit in fits)
    columns = f"IoU >= {arguments.threshold:g}", f"sides within {arguments.ratio:g}x"
    return [f"{'anchors':<{width}}  count  mean IoU  {columns[0]:>10}  {columns[1]:>15}"] + [
        f"{fit.name:<{width}}  {len(fit.anchors):>5}  {fit.mean_iou:>8.3f}  {fit.recall_iou:>10.1%}"
        f"  {fit.recall_ratio:>{max(15, len(columns[1]))}.1%}"
        for fit in fits
    ]


def level_lines(levels: Anchors, strides: Sequence[int], shapes: np.ndarray) -> list[str]:
    """Format the new anchors of each level, with the share of boxes nearest to them."""
    anchors = np.array([anchor for level in levels for anchor in level])
    level_of_anchor = np.repeat(np.arange(len(levels)), [len(level) for level in levels])
    shares = np.bincount(level_of_anchor[nearest_anchors(shapes, anchors)], minlength=len(levels)) / len(shapes)
    texts = ["  ".join(f"{width:g} x {height:g}" for width, height in level) for level in levels]
    return [
        f"stride {stride:>2}: {text:<{max(map(len, texts))}}  ({share:.0%} of the boxes)"
        for stride, text, share in zip(strides, texts, shares, strict=True)
    ]


def judge(fits: Sequence[Fit]) -> str:
    """Recommend the new or the current anchors."""
    new, current, *published = fits
    gain = new.mean_iou - current.mean_iou
    if gain < SMALL_GAIN:
        return f"recommendation: keep the current anchors, the new ones gain {gain:.3f} mean IoU (below {SMALL_GAIN:g})"
    text = f"recommendation: use the new anchors, they gain {gain:.3f} mean IoU on the current ones"
    if published and (left := new.mean_iou - published[0].mean_iou) < SMALL_GAIN:
        text += f"; the anchors of {published[0].name} are good enough too ({left:.3f} below the new ones)"
    return text


def write_overlay(
    directory: Path, levels: Anchors, layout: AnchorLayout, sizes: Sequence[int], comments: Sequence[str]
) -> None:
    """Write anchors.yaml and, for a network from a cfg, anchors.cfg."""
    lines = [f"# {' '.join(comment.split())}" for comment in ("Anchors by anchor_creator.py", *comments)]
    if layout.with_anchors is None:
        section, _, key = layout.setting.partition(".")
        rows = [f"    - {json.dumps([list(anchor) for anchor in level])}" for level in levels]
        lines += ["model:", f"  detector: {section}", f"{section}:", f"  {key}:", *rows]
        # At another train.image_size they are scaled; anchors for a range of sizes are not.
        lines += [f"  anchor_size: {sizes[0] if len(sizes) == 1 else 'null'}"]
    else:
        text = layout.with_anchors(levels)
        replace_file(directory / "anchors.cfg", text.encode())
        lines += ["model:", f"  backbone: {DARKNET_CFG}", "  cfg: |", textwrap.indent(text, "    ")]
    replace_file(directory / "anchors.yaml", ("\n".join(lines) + "\n").encode())


def write_report(
    path: Path,
    levels: Anchors,
    layout: AnchorLayout,
    fits: Sequence[Fit],
    verdict: str,
    annotations: Path,
    sizes: Sequence[int],
    arguments: argparse.Namespace,
) -> None:
    """Write the new anchors, the fit of all sets and the recommendation as JSON."""
    content = {
        "annotations": str(annotations),
        "sizes": list(sizes),
        "strides": layout.strides,
        "anchors": levels,
        "fits": {
            fit.name: {
                "anchors": fit.anchors.tolist(),
                "mean_iou": fit.mean_iou,
                f"share_iou_{arguments.threshold:g}": fit.recall_iou,
                f"share_ratio_{arguments.ratio:g}": fit.recall_ratio,
            }
            for fit in fits
        },
        "recommendation": verdict,
    }
    replace_file(path, json.dumps(content, indent=2).encode())


if __name__ == "__main__":
    exit_with_message(main)
