"""What a completed run leaves to look at: results.png, figures of the evaluation of best.pt, and report.html.

Everything comes from files of the run directory, so a continued run's page shows the whole run.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from detection.contract import Detector
from detection.data.build import DetectionDataset
from detection.drawing.boxes import make_grid, save_jpeg, save_png
from detection.drawing.figures import add_second_x, draw_curves, new_figure, save_figure
from detection.drawing.html_page import HtmlReport
from detection.errors import DataReadError
from detection.evaluation.coco_metric import count_gt, score
from detection.evaluation.detections import Detections, read_detections
from detection.evaluation.error_analysis import confidence_curves, confusion_matrix
from detection.evaluation.figures import draw_confusion, draw_precision_recall
from detection.evaluation.matching import match_detections
from detection.evaluation.mistakes import RULE, Findings, count_mistakes, draw_tile, write_mistakes
from detection.evaluation.report import METRIC_CONDITIONS, protocol_line
from detection.runtime.run_directory import EVALUATOR
from detection.training.checkpoint_writer import BEST
from detection.training.evaluation import OF_BEST, evaluate_best, has_results_of_best
from detection.training.loggers import Loggers
from detection.training.run import Run
from detection.training.state import RunState

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_WORST = 8  # images
WORST_SIDE = 480  # pixels, longer side of one image
LARGE_RANGE = 20.0  # largest by smallest loss from which the axis is logarithmic
Rows = Sequence[Mapping[str, float | None]]


def report_run(run: Run, state: RunState, loggers: Loggers) -> None:
    """Write the report of a completed run, of its first process; a failure is one warning line, nothing more."""
    if not run.ranks.is_first:
        return
    try:
        if not has_results_of_best(loggers.directory, state, run.settings.evaluation.best_metric):
            loggers.line(f"{BEST} is evaluated again for the report: what its evaluation found is not in its files")
            evaluate_best(run, loggers.directory)
        page = write_report(loggers.directory, run.validation_set, run.settings, run.detector)
        loggers.line(f"report      {page}, with results.png and the worst images")
    except Exception as error:  # noqa: BLE001  (whatever it is, the training has succeeded)
        reason = " ".join(str(error).split())[:200]
        loggers.line(f"warning: no report of this run: {type(error).__name__} {reason}")


def write_report(directory: Path, dataset: DetectionDataset, settings: Any, detector: Detector) -> Path:
    """Write report.html and its pictures into a run directory; returns the page, which needs no other file.

    Args:
        directory: with metrics.jsonl, and best_metrics.json and best_detections.json, of the evaluation of best.pt.
        dataset: validation set of the run.
        settings: of the run.

    Raises:
        OSError, ValueError, KeyError: a file cannot be read or written.
    """
    rows = rows_of_run(directory)
    last = next((row for row in reversed(rows) if "val/AP50" in row), None)
    if last is None:
        raise ValueError("metrics.jsonl holds no evaluation")
    best = json.loads((directory / f"{OF_BEST}metrics.json").read_text(encoding="utf-8"))
    annotations = dataset.annotations
    detections = read_detections(directory / f"{OF_BEST}detections.json", annotations)
    names = annotations.categories.names
    page = HtmlReport(f"Training run {directory.name}")

    page.lines(
        [
            f"{directory}",
            f"{BEST}, the {best['weights']} after step {best['step']}: AP {shown(best['AP'])}, "
            f"AP50 {shown(best['AP50'])}, of the highest {settings.evaluation.best_metric} of the run; all below the "
            "curves is about it",
            f"last evaluation, after step {last['step']}: AP {shown(last['val/AP'])}, AP50 {shown(last['val/AP50'])}",
            f"{len(annotations)} validation images with {int(count_gt(annotations).sum())} boxes of {len(names)} "
            f"classes; {protocol_line(settings, detector, dataset)}",
        ]
    )
    save_figure(directory / "results.png", draw_results(rows))
    page.png((directory / "results.png").read_bytes(), "losses, learning rate and accuracy over the run")

    page.heading(f"Accuracy of {BEST}")
    conditions = [(name, *METRIC_CONDITIONS[name], shown(best[name])) for name in METRIC_CONDITIONS]
    page.table(("metric", "IoU", "box sizes", "boxes per class and image", "value"), conditions)
    page.heading("Classes, worst first")
    page.table(
        ("class", "AP", "AP50", "ground-truth boxes"),
        [
            (name, shown(values["AP"]), shown(values["AP50"]), values["gt_boxes"])
            for name, values in worst_classes(best["class_AP"])
        ],
    )
    scores = score(annotations, detections, best["backend"])
    curves = confidence_curves(annotations, detections, settings.evaluation.confidence_threshold)
    confidence = float(curves.confidence[curves.best])
    pictures = {
        "precision_recall": draw_precision_recall(scores.precision[0], names, count_gt(annotations)),
        "confusion_matrix": draw_confusion(confusion_matrix(annotations, detections, confidence), names, confidence),
    }
    page.heading("Errors")
    page.lines([f"The highest mean F1, {curves.mean[2][curves.best]:.3f}, is at confidence {confidence:g}."])
    for name, picture in pictures.items():
        save_png(directory / f"{name}.png", picture)
        page.png((directory / f"{name}.png").read_bytes(), name.replace("_", " "))
    _add_worst_images(page, directory, dataset, detections, confidence, settings.evaluation.visualize_images)
    page.write(directory / "report.html")
    return directory / "report.html"


def _add_worst_images(
    page: HtmlReport, directory: Path, dataset: DetectionDataset, detections: Detections, confidence: float, count: int
) -> None:
    """Add the images with most mistakes at a confidence, at most `count`, and write worst_images.csv and .jpg."""
    annotations = dataset.annotations
    shown_ones = detections.take(detections.scores >= confidence)
    matches = match_detections(annotations, shown_ones)
    mistakes = count_mistakes(annotations, shown_ones, matches)
    order = mistakes.worst_first()
    write_mistakes(directory / "worst_images.csv", annotations, mistakes, order)
    findings = Findings(shown_ones, matches, mistakes, confidence)
    wrong = order[(mistakes.missed + mistakes.false)[order] > 0]
    page.heading("Worst validation images")
    page.lines([f"{len(wrong)} of {len(annotations)} have a mistake at confidence {confidence:g}; {RULE}"])
    tiles = []
    for index in wrong[: min(count, MAX_WORST)].tolist():
        try:
            tiles.append(draw_tile(dataset, index, WORST_SIDE, findings))
        except DataReadError as error:
            page.lines([error.line])
            continue
        page.photograph(tiles[-1], f"image {annotations.image_ids[index]} {annotations.file_name(index)}")
    if tiles:
        save_jpeg(directory / "worst_images.jpg", make_grid(tiles, 2, padding=8))


def worst_classes(class_ap: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Sort the entries of "class_AP" in metrics.json by AP, worst first, those without a defined AP last."""
    return sorted(class_ap.items(), key=lambda item: (item[1]["AP"] is None, item[1]["AP"] or 0.0))


def shown(value: float | None) -> str:
    """Format a metric; a dash where no ground-truth box defines it."""
    return "-" if value is None else f"{value:.3f}"


def read_rows(path: Path) -> list[dict[str, float | None]]:
    """Read metrics.jsonl, whose last line a crash may have cut."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def rows_of_run(directory: Path) -> list[dict[str, float | None]]:
    """Read the rows of a run by ascending step, with the evaluations of steps that only its evaluator has evaluated."""
    rows = read_rows(directory / "metrics.jsonl")
    evaluator = directory / EVALUATOR / "metrics.jsonl"
    if not evaluator.is_file():
        return rows
    own = {row["step"] for row in rows if "val/AP50" in row}
    rows += [row for row in read_rows(evaluator) if row["step"] not in own]
    return sorted(rows, key=lambda row: row["step"] or 0)  # stable: of one step as they were written


def draw_results(rows: Rows) -> "Figure":
    """Draw the rows of metrics.jsonl in three panels: losses, learning rate, AP and AP50."""
    steps_per_epoch = next((row["step"] / row["epoch"] for row in reversed(rows) if row.get("epoch")), None)  # type: ignore[operator]
    figure, panels = new_figure((18, 5.5), 1, 3)
    losses = sorted({tag for row in rows for tag in row if tag.startswith("train/loss") and "scale" not in tag})
    columns = {
        "losses": {
            **{tag.removeprefix("train/loss").removeprefix("_") or "total": points(rows, tag) for tag in losses},
            "total, validation": points(rows, "val/loss"),
        },
        "learning rate": {"learning rate": points(rows, "train/learning_rate")},
        "accuracy on the validation set": {name: points(rows, f"val/{name}") for name in ("AP50", "AP")},
    }
    for axes, (title, curves) in zip(panels, columns.items(), strict=True):
        draw_curves(axes, {name: line for name, line in curves.items() if line}, title, "optimizer step", "")
        axes.set_xlim(left=0)
        if steps_per_epoch:
            add_second_x(axes, 1 / steps_per_epoch, "epoch")
    values = np.array([value for line in columns["losses"].values() for _, value in line])
    positive = values[values > 0]
    if len(positive) == len(values) > 0 and positive.max() > LARGE_RANGE * positive.min():
        panels[0].set_yscale("log")
    panels[1].set_ylim(bottom=0)
    panels[2].set_ylim(0, 1)
    return figure


def points(rows: Rows, tag: str) -> list[tuple[float, float]]:
    """Return the finite (step, value) of a tag."""
    return [(row["step"], row[tag]) for row in rows if row.get(tag) is not None]  # type: ignore[misc]
