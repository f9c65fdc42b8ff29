"""Figures of an evaluation: curves, confusion of classes, metrics by size and shape, several detectors side by side."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from detection.data.annotations import Annotations
from detection.drawing.boxes import class_color
from detection.drawing.figures import figure_pixels, new_figure
from detection.drawing.fonts import figure_names
from detection.evaluation.coco_metric import GroupScore, count_gt
from detection.evaluation.error_analysis import Analysis, ConfidenceCurves, mean_defined
from detection.evaluation.evaluate import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW_CLASSES = 12  # up to here all curves are named
NAMED_OF_MANY = 8  # of more classes, those with most ground-truth boxes
WIDEST_NAME = 12  # letters; longer names below a column stand upright
MAX_DIFFERENCES = 30  # classes compared in one figure
RECALLS = np.arange(101) / 100


def draw_evaluation(
    evaluation: Evaluation, analysis: Analysis, annotations: Annotations, confidence: float
) -> dict[str, np.ndarray]:
    """Draw all figures of one evaluation, by name; `confidence` is that of the confusion matrix."""
    names, gt_boxes = annotations.categories.names, count_gt(annotations)
    return {
        "precision_recall": draw_precision_recall(evaluation.precision[0], names, gt_boxes),
        "confidence_curves": draw_confidence_curves(analysis.curves, names, gt_boxes),
        "confusion_matrix": draw_confusion(analysis.confusion, names, confidence),
        "size_and_aspect": draw_groups({"box size (pixels)": analysis.sizes, "box width : height": analysis.aspects}),
    }


def draw_precision_recall(precision: np.ndarray, names: Sequence[str], gt_boxes: np.ndarray) -> np.ndarray:
    """Draw precision against recall at IoU 0.5, per class and mean, as COCO interpolates it; RGB (H, W, 3).

    Args:
        precision: at recall 0, 0.01, ... 1, (101, C); -1 where a class has no ground-truth box.
        gt_boxes: number of ground-truth boxes per class, (C,).
    """
    curves, names = np.where(precision > -1, precision, np.nan).T, figure_names(names)
    figure, (axes,) = new_figure((10, 6))
    _draw_class_curves(axes, RECALLS, curves, mean_defined(curves), names, gt_boxes, mean_defined(curves.T))
    axes.set_title("Precision against recall at IoU 0.5")
    axes.set_xlabel("recall")
    axes.set_ylabel("precision")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", title="AP50", fontsize=9)
    return figure_pixels(figure)


def draw_confidence_curves(curves: ConfidenceCurves, names: Sequence[str], gt_boxes: np.ndarray) -> np.ndarray:
    """Draw F1, precision and recall against confidence at IoU 0.5, per class and mean; RGB (H, W, 3)."""
    best, names = float(curves.confidence[curves.best]), figure_names(names)
    figure, panels = new_figure((18, 5.5), 1, 3)
    precision, recall, f1 = curves.mean
    at_best = curves.f1[:, curves.best]
    for axes, name, values, mean in zip(
        panels,
        ("F1", "precision", "recall"),
        (curves.f1, curves.precision, curves.recall),
        (f1, precision, recall),
        strict=True,
    ):
        _draw_class_curves(axes, curves.confidence, values, mean, names, gt_boxes, at_best)
        axes.axvline(best, color="black", linestyle=":", linewidth=1.5)
        axes.set_title(f"{name}: mean {mean[curves.best]:.3f} at confidence {best:.3f} (highest F1)")
        axes.set_xlabel("confidence")
        axes.set_ylabel(name)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right upper", title=f"F1 at {best:.3f}", fontsize=9)
    return figure_pixels(figure)


def _draw_class_curves(
    axes: "Axes",
    x: np.ndarray,
    curves: np.ndarray,
    mean: np.ndarray,
    names: Sequence[str],
    gt_boxes: np.ndarray,
    numbers: np.ndarray,
) -> None:
    """Draw curves (C, S) and their mean; of many classes only those with most boxes are named."""
    defined = np.flatnonzero(gt_boxes)
    most_first = defined[np.argsort(-gt_boxes[defined], kind="stable")].tolist()
    named = most_first[: FEW_CLASSES if len(defined) <= FEW_CLASSES else NAMED_OF_MANY]
    others = [label for label in most_first if label not in named]
    for label in others:
        axes.plot(x, curves[label], color="#b0b0b0", linewidth=0.6, alpha=0.6)
    for label in named:
        color = np.array(class_color(label)) / 255
        axes.plot(x, curves[label], color=color, linewidth=1.3, label=f"{names[label]}  {numbers[label]:.3f}")
    axes.plot(
        x, mean, color="black", linewidth=2.5, label=f"mean of {len(defined)} classes  {numbers[defined].mean():.3f}"
    )
    if others:
        axes.plot([], color="#b0b0b0", linewidth=0.6, label=f"{len(others)} classes with fewer ground-truth boxes")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)


def draw_confusion(matrix: np.ndarray, names: Sequence[str], confidence: float) -> np.ndarray:
    """Draw a confusion matrix, coloured by each cell's share of its row; RGB (H, W, 3)."""
    count, names = len(matrix), figure_names(names)
    side = min(max(7.0, 3 + 0.55 * count), 20.0)
    letters = 9.0 if count <= 2 * FEW_CLASSES else max(4.0, 0.5 * 72 * (side - 3) / count)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    figure, (axes,) = new_figure((side + 1, side))
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(np.arange(count - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(count - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="#d8d8d8", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    for row, column in zip(*np.nonzero(matrix), strict=True):
        share, number = shares[row, column], matrix[row, column]
        if count > 2 * FEW_CLASSES and share < 0.05:
            continue  # too many to read; the CSV file has them
        text = f"{number}\n{share:.0%}" if count <= FEW_CLASSES else f"{100 * share:.0f}"
        color = "white" if share > 0.5 else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=letters, color=color)
    upright = count > 6 or max(map(len, names)) > WIDEST_NAME
    axes.set_xticks(range(count), [*names, "missed"], rotation=90 if upright else 0, fontsize=letters)
    axes.set_yticks(range(count), [*names, "no ground-truth box"], fontsize=letters)
    axes.set_xlabel("predicted")
    axes.set_ylabel("ground truth")
    numbers = "counts and shares" if count <= FEW_CLASSES else "shares in percent"
    axes.set_title(
        f"Predicted class of each ground-truth box ({numbers} of a row)\nconfidence at least {confidence:g}, IoU 0.5"
    )
    figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01, label="share of the row")
    return figure_pixels(figure)


def draw_groups(panels: Mapping[str, Mapping[str, GroupScore]]) -> np.ndarray:
    """Draw AP, AP50 and AR100 per group as bars, above its number of ground-truth boxes; RGB (H, W, 3)."""
    figure, all_axes = new_figure((8 * len(panels), 5), 1, len(panels))
    for axes, (title, groups) in zip(all_axes, panels.items(), strict=True):
        places = np.arange(len(groups))
        for offset, (name, values) in enumerate(
            {
                "AP": [group.ap for group in groups.values()],
                "AP50": [group.ap50 for group in groups.values()],
                "AR100": [group.recall for group in groups.values()],
            }.items()
        ):
            heights = [np.nan if value is None else value for value in values]
            bars = axes.bar(places + 0.27 * (offset - 1), heights, 0.25, label=name)
            axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
        labels = [f"{name}\n{group.gt_boxes}" for name, group in groups.items()]
        axes.set_xticks(places, labels, fontsize=9)
        axes.set_ylim(0, 1.15)
        axes.set_yticks(np.arange(6) / 5)
        axes.set_xlim(-0.6, len(groups) - 0.4)
        axes.set_title(f"Metrics by {title}")
        axes.set_xlabel(f"{title}; below: ground-truth boxes")
        axes.grid(axis="y", alpha=0.3)
        axes.legend(ncols=3, loc="upper left")
    return figure_pixels(figure)


def draw_comparison(
    metrics: Mapping[str, Mapping[str, float | None]], class_ap: Mapping[str, Mapping[str, float | None]]
) -> np.ndarray:
    """Draw metrics of several detectors as bars and AP of each class relative to the first as points; RGB (H, W, 3).

    Args:
        metrics: detector -> metric -> value.
        class_ap: detector -> class -> AP.
    """
    detectors = list(metrics)
    first, *others = detectors
    differences = {
        name: [
            np.nan if class_ap[other][name] is None or ap is None else class_ap[other][name] - ap  # type: ignore[operator]
            for other in others
        ]
        for name, ap in class_ap[first].items()
    }
    differences = {name: values for name, values in differences.items() if not np.isnan(values).all()}
    ranked = sorted(differences, key=lambda name: float(np.nanmean(differences[name])))
    if len(ranked) > MAX_DIFFERENCES:
        ranked = ranked[: MAX_DIFFERENCES // 2] + ranked[-MAX_DIFFERENCES // 2 :]
    written = figure_names(ranked)
    figure, (left, right) = new_figure((16, max(6.0, 1.5 + 0.28 * len(ranked))), 1, 2)
    names = list(metrics[first])
    places, width, highest = np.arange(len(names)), 0.8 / len(detectors), 0.1
    for number, (detector, values) in enumerate(metrics.items()):
        heights = np.array([values[name] for name in names], dtype=np.float64)  # None becomes NaN: no bar
        highest = max(highest, float(np.nanmax(heights)))
        bars = left.bar(places + width * (number - (len(detectors) - 1) / 2), heights, width, label=detector)
        left.bar_label(bars, fmt="%.3f", fontsize=7, rotation=90, padding=2)
    left.set_xticks(places, names)
    left.set_ylim(0, 1.25 * highest)  # room for the numbers and the legend
    left.set_title("Metrics")
    left.grid(axis="y", alpha=0.3)
    left.legend(fontsize=9)

    rows = np.arange(len(ranked))
    for number, other in enumerate(others):
        difference = np.array([differences[name][number] for name in ranked])
        right.hlines(rows, 0, difference, color=f"C{number + 1}", linewidth=1, alpha=0.5)
        right.plot(difference, rows, "o", color=f"C{number + 1}", label=other)
    right.axvline(0, color="black", linewidth=1)
    right.set_yticks(rows, written, fontsize=9)
    some = f"; highest and lowest of {len(differences)}" if len(ranked) < len(differences) else ""
    right.set_title(f"AP of each class, difference to {first}{some}")
    right.set_xlabel(f"lower  <-  AP compared with {first}  ->  higher")
    right.grid(alpha=0.3)
    right.legend(fontsize=9)
    return figure_pixels(figure)
