"""Analyse errors: precision and recall against confidence, confusion of classes, metrics by size and shape."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detection.data.annotations import Annotations
from detection.drawing.files import replace_csv
from detection.evaluation.coco_metric import GroupScore, count_gt, score_groups
from detection.evaluation.detections import Detections, box_areas
from detection.evaluation.evaluate import Evaluation
from detection.evaluation.matching import IN_CROWD, match_detections

CONFIDENCES = np.arange(1001) / 1000
SIZE_EDGES = (0, 16, 32, 64, 96, 192, 384, np.inf)  # pixels, square root of the area; includes COCO's 32 and 96
ASPECT_EDGES = (0, 1 / 3, 1 / 2, 3 / 4, 4 / 3, 2, 3, np.inf)  # width / height


@dataclass(frozen=True)
class ConfidenceCurves:
    """Precision, recall and F1 of the boxes with at least some confidence, at IoU 0.5.

    NaN: precision where a class has no box, everything where it has no ground-truth box.
    """

    confidence: np.ndarray  # (S,) ascending
    precision: np.ndarray  # (C, S)
    recall: np.ndarray  # (C, S)
    f1: np.ndarray  # (C, S)

    @functools.cached_property
    def mean(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Precision, recall and F1, each the mean over the classes where it is defined, (S,)."""
        precision, recall, f1 = (mean_defined(values) for values in (self.precision, self.recall, self.f1))
        return precision, recall, f1

    @property
    def best(self) -> int:
        """Index of the confidence with the highest mean F1, the lowest of equals."""
        return int(np.nan_to_num(self.mean[2], nan=-1).argmax())


def mean_defined(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis without NaN; NaN where nothing is defined."""
    defined = ~np.isnan(values)
    count = defined.sum(axis=0)
    total = np.where(defined, values, 0).sum(axis=0)
    mean: np.ndarray = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return mean


def confidence_curves(annotations: Annotations, detections: Detections, lowest: float) -> ConfidenceCurves:
    """Compute precision, recall and F1 of each class against confidence.

    Detections are matched once, best score first, so the matches above a confidence do not depend on the others.
    Detections inside crowd regions count neither way.

    Args:
        lowest: confidence threshold of the detections; the curves begin there.
    """
    confidence = CONFIDENCES[lowest <= CONFIDENCES]
    matched = match_detections(annotations, detections)
    gt_boxes = count_gt(annotations)

    def count(rows: np.ndarray) -> np.ndarray:
        """Count the detections of each class with at least each confidence, (C, S)."""
        scores = [np.sort(detections.scores[rows & (detections.labels == label)]) for label in range(len(gt_boxes))]
        return np.stack([len(values) - np.searchsorted(values, confidence, side="left") for values in scores])

    boxes, true_positives = count(matched != IN_CROWD), count(matched >= 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        defined = np.where(gt_boxes > 0, 1.0, np.nan)[:, None]
        precision = true_positives / np.where(boxes > 0, boxes, np.nan) * defined
        recall = true_positives / gt_boxes[:, None] * defined
        f1 = 2 * true_positives / (boxes + gt_boxes[:, None]) * defined
    return ConfidenceCurves(confidence, precision, recall, f1)


def confusion_matrix(
    annotations: Annotations, detections: Detections, confidence: float, iou_threshold: float = 0.5
) -> np.ndarray:
    """Count how often a ground-truth box of each class was predicted as each class.

    Boxes with at least the confidence choose ground-truth boxes of any class, best score first.

    Returns:
        Counts (C + 1, C + 1). Rows: class of the ground truth; the last row holds detections without ground truth.
        Columns: predicted class; the last column holds missed ground truth. Boxes inside crowd regions are left out.
    """
    shown = detections.take(detections.scores >= confidence)
    matched = match_detections(annotations, shown, iou_threshold, same_class=False)
    counted = matched != IN_CROWD
    background = len(annotations.categories.names)
    gt = np.where(matched >= 0, annotations.labels[matched], background)
    matrix = np.zeros((background + 1, background + 1), dtype=np.int64)
    np.add.at(matrix, (gt[counted], shown.labels[counted]), 1)
    missed = ~annotations.crowd
    missed[matched[matched >= 0]] = False
    np.add.at(matrix, (annotations.labels[missed], background), 1)
    return matrix


def score_by_size(annotations: Annotations, detections: Detections, backend: str) -> dict[str, GroupScore]:
    """Compute the official metric in finer size ranges than small, medium and large; size = root of the file's area."""
    groups = score_groups(
        annotations,
        detections,
        np.sqrt(annotations.areas.clip(min=0)),
        np.sqrt(box_areas(detections.boxes)),
        SIZE_EDGES,
        backend,
    )
    names = [f"{low}-{high}" for low, high in itertools.pairwise(SIZE_EDGES[:-1])]
    return dict(zip([*names, f"{SIZE_EDGES[-2]}+"], groups, strict=True))


def score_by_aspect(annotations: Annotations, detections: Detections, backend: str) -> dict[str, GroupScore]:
    """Compute the official metric by width / height of the boxes."""
    groups = score_groups(
        annotations,
        detections,
        _aspects(annotations.coco_boxes[:, 2:]),
        _aspects(detections.boxes[:, 2:] - detections.boxes[:, :2]),
        ASPECT_EDGES,
        backend,
    )
    names = ("below 1:3", "1:3-1:2", "1:2-3:4", "3:4-4:3", "4:3-2:1", "2:1-3:1", "above 3:1")
    return dict(zip(names, groups, strict=True))


def _aspects(sizes: np.ndarray) -> np.ndarray:
    """Width / height, (K, 2) to (K,); a detection cut to a line at the image's edge is very flat or very tall."""
    aspects: np.ndarray = sizes[:, 0] / np.maximum(sizes[:, 1], 1e-9)
    return aspects


def group_table(title: str, groups: dict[str, GroupScore]) -> list[str]:
    """Format the groups as lines for the terminal."""

    def show(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    width = max(len(title), *map(len, groups))
    lines = [f" {title:<{width}}  {'AP':>6}  {'AP50':>6}  {'AR100':>6}  {'gt boxes':>8}"]
    for name, group in groups.items():
        values = "  ".join(f"{show(value):>6}" for value in (group.ap, group.ap50, group.recall))
        lines.append(f" {name:<{width}}  {values}  {group.gt_boxes:>8}")
    return lines


@dataclass(frozen=True)
class Analysis:
    """All error statistics of one evaluation."""

    curves: ConfidenceCurves
    confusion: np.ndarray  # (C + 1, C + 1), see `confusion_matrix`
    sizes: dict[str, GroupScore]
    aspects: dict[str, GroupScore]

    def summary(self) -> dict[str, Any]:
        """Return the entries "best_f1", "sizes" and "aspects" of metrics.json."""
        best = self.curves.best
        precision, recall, f1 = (float(np.nan_to_num(values[best])) for values in self.curves.mean)
        return {
            "best_f1": {
                "confidence": float(self.curves.confidence[best]), "f1": f1, "precision": precision, "recall": recall
            },
            "sizes": {name: dataclasses.asdict(group) for name, group in self.sizes.items()},
            "aspects": {name: dataclasses.asdict(group) for name, group in self.aspects.items()},
        }  # fmt: skip


def analyse(
    annotations: Annotations, detections: Detections, lowest: float, confusion_confidence: float, backend: str
) -> Analysis:
    """Compute all error statistics; `lowest` is the confidence threshold of the detections."""
    return Analysis(
        confidence_curves(annotations, detections, lowest),
        confusion_matrix(annotations, detections, confusion_confidence),
        score_by_size(annotations, detections, backend),
        score_by_aspect(annotations, detections, backend),
    )


def write_analysis(directory: Path, analysis: Analysis, evaluation: Evaluation, annotations: Annotations) -> None:
    """Write the numbers behind the figures as CSV files.

    `classes.csv` (at the confidence of the best mean F1), `precision_recall.csv`, `confidence_curves.csv` and
    `confusion_matrix.csv`; an empty cell is undefined.

    Raises:
        OSError: a file cannot be written.
    """
    names, curves, best = annotations.categories.names, analysis.curves, analysis.curves.best
    at_best = (values[:, best] for values in (curves.precision, curves.recall, curves.f1))
    boxes_per_class = np.bincount(evaluation.detections.labels, minlength=len(names)).tolist()
    write_csv(
        directory / "classes.csv",
        ["class", "gt_boxes", "boxes", "AP", "AP50", "precision", "recall", "f1"],
        [
            [name, gt_boxes, boxes, ap, ap50, *numbers]
            for (name, (ap, ap50, gt_boxes)), boxes, *numbers in zip(
                evaluation.class_ap.items(), boxes_per_class, *at_best, strict=True
            )
        ],
    )
    precision = np.where(evaluation.precision[0] > -1, evaluation.precision[0], np.nan)
    write_csv(
        directory / "precision_recall.csv",
        ["recall", "mean", *names],
        [
            [recall, mean, *row]
            for recall, mean, row in zip(np.arange(101) / 100, mean_defined(precision.T), precision, strict=True)
        ],
    )
    every = [("mean", *curves.mean)]
    every += list(zip(names, curves.precision, curves.recall, curves.f1, strict=True))
    write_csv(
        directory / "confidence_curves.csv",
        ["class", "confidence", "precision", "recall", "f1"],
        [[name, *point] for name, *columns in every for point in zip(curves.confidence, *columns, strict=True)],
    )
    write_csv(
        directory / "confusion_matrix.csv",
        ["gt", *names, "missed"],
        [[name, *row] for name, row in zip([*names, "no ground-truth box"], analysis.confusion.tolist(), strict=True)],
    )


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write rows as CSV: numbers with six digits, None and NaN as empty cells."""

    def cell(value: Any) -> Any:
        if value is None or (isinstance(value, float) and np.isnan(value)):
            return ""
        return f"{value:.6g}" if isinstance(value, float) else value

    replace_csv(path, itertools.chain([header], ([cell(value) for value in row] for row in rows)))
