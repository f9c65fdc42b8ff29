"""Report an evaluation: the metric tables, its files, and pictures of batches and detections."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detection.config.settings import Settings
from detection.contract import CROWD_LABEL, PADDING_LABEL, Batch, Detector
from detection.data.annotations import Annotations
from detection.data.build import DetectionDataset
from detection.drawing.boxes import draw_boxes, ground_truth_beside_detections, make_grid
from detection.drawing.files import replace_file
from detection.errors import escape, name_list
from detection.evaluation.coco_metric import ClassAP, score
from detection.evaluation.detections import write_detections
from detection.evaluation.error_analysis import Analysis
from detection.evaluation.evaluate import Evaluation

LARGEST_BATCH_PICTURE = 16  # images
READABLE_SIDE = 480  # pixels; smaller images are enlarged before names are written on them

METRIC_CONDITIONS = {  # name -> IoU, area and detections per image and class, as the official program prints them
    "AP": ("0.50:0.95", "all", 100),
    "AP50": ("0.50", "all", 100),
    "AP75": ("0.75", "all", 100),
    "APs": ("0.50:0.95", "small", 100),
    "APm": ("0.50:0.95", "medium", 100),
    "APl": ("0.50:0.95", "large", 100),
    "AR1": ("0.50:0.95", "all", 1),
    "AR10": ("0.50:0.95", "all", 10),
    "AR100": ("0.50:0.95", "all", 100),
    "ARs": ("0.50:0.95", "small", 100),
    "ARm": ("0.50:0.95", "medium", 100),
    "ARl": ("0.50:0.95", "large", 100),
}


def protocol_line(settings: Settings, detector: Detector, dataset: DetectionDataset) -> str:
    """Format the evaluation protocol on a dataset as one line, with all deviations from the standard one."""
    evaluation, geometry = settings.evaluation, detector.geometry
    most = "no limit of" if evaluation.max_detections is None else str(evaluation.max_detections)
    line = (
        f"score = {detector.score}, confidence above {evaluation.confidence_threshold:g}, "
        f"NMS {evaluation.iou_threshold:g}, {most} boxes per class and image, "
        f"{evaluation.image_size} px {geometry.placement} ({geometry.interpolation})"
    )
    differences = ", ".join(deviations(settings, detector, dataset))
    return f"{line}; deviates from the protocol: {differences}" if differences else line


def deviations(settings: Settings, detector: Detector, dataset: DetectionDataset) -> list[str]:
    """List the deviations from the standard protocol (docs/contract.md), which make numbers incomparable."""
    evaluation, data = settings.evaluation, settings.data
    most = evaluation.max_detections
    parts = {
        f"confidence {evaluation.confidence_threshold:g} instead of 0.001": evaluation.confidence_threshold != 0.001,
        f"NMS {evaluation.iou_threshold:g} instead of 0.45": evaluation.iou_threshold != 0.45,
        f"{most or 'all'} boxes per class and image instead of 100": most != 100,
        "squashed instead of letterboxed": detector.geometry.placement == "squash",
        f"at most {evaluation.max_images} images": evaluation.max_images is not None,
        f"a fraction of {dataset.share or 1:g} of the images": dataset.share is not None,
        "chosen classes only": data.class_names is not None,
    }
    return [*detector.deviations, *(name for name, deviates in parts.items() if deviates)]


def metric_table(evaluation: Evaluation) -> list[str]:
    """Format the official twelve numbers and AP per class as lines."""
    return [*metric_lines(evaluation.metrics), *class_lines(evaluation.class_ap)]


def summary_line(metrics: Mapping[str, float | None], class_ap: ClassAP, worst: int = 5) -> str:
    """Format AP, AP50 and the classes of lowest AP; the whole table is `metric_table`."""
    defined = sorted((ap, name) for name, (ap, _, _) in class_ap.items() if ap is not None)
    named = name_list(f"{name} {ap:.3f}" for ap, name in defined[:worst])
    of_many = "worst classes" if len(defined) > worst else "classes"
    return f"AP {_show(metrics['AP'])}  AP50 {_show(metrics['AP50'])}  {of_many}: {named or 'none has a box'}"


def metric_lines(metrics: Mapping[str, float | None]) -> list[str]:
    """Format the twelve numbers as the official program prints them."""
    lines = []
    for name, (iou, area, count) in METRIC_CONDITIONS.items():
        title = "Average Precision  (AP)" if name.startswith("AP") else "Average Recall     (AR)"
        conditions = f"IoU={iou:<9} | area={area:>6} | maxDets={count:>3}"
        lines.append(f" {title} @[ {conditions} ] = {_show(metrics[name])}")
    return lines


def class_lines(class_ap: ClassAP) -> list[str]:
    """Format AP, AP50 and the number of ground-truth boxes per class."""
    class_ap = {escape(name): row for name, row in class_ap.items()}
    width = max(len("class"), *(len(name) for name in class_ap))
    lines = [f" {'class':<{width}}  {'AP':>11}  {'AP50':>11}  {'gt boxes':>8}"]
    for name, (ap, ap50, gt_boxes) in class_ap.items():
        lines.append(f" {name:<{width}}  {_show(ap):>11}  {_show(ap50):>11}  {gt_boxes:>8}")
    return lines


def _show(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}"


def compare_thresholds(
    confidences: Sequence[float], evaluation: Evaluation, annotations: Annotations
) -> tuple[list[dict[str, Any]], list[str]]:
    """Score each threshold; returns the metrics per threshold for metrics.json, and the COCO tables as lines."""
    if not confidences:
        return [], metric_lines(evaluation.metrics)
    rows, lines = [], []
    for confidence in confidences:
        detections, metrics = evaluation.detections, evaluation.metrics
        if confidence != min(confidences):
            detections = detections.above(confidence)
            metrics = score(annotations, detections, evaluation.backend).metrics
        lines += [f"Confidence Threshold: {confidence:g}", f"Found Boxes: {len(detections)}", *metric_lines(metrics)]
        rows.append({"confidence": confidence, "boxes": len(detections), **metrics})
    return rows, lines


def best_f1_line(analysis: Analysis) -> str:
    """Format the confidence of the highest mean F1 with its precision and recall."""
    best = analysis.summary()["best_f1"]
    return (
        f"highest mean F1 {best['f1']:.3f} at confidence {best['confidence']:.3f}: precision {best['precision']:.3f}, "
        f"recall {best['recall']:.3f} (IoU 0.5, mean over classes)"
    )


def write_evaluation(
    directory: Path,
    evaluation: Evaluation,
    dataset: DetectionDataset,
    step: int,
    settings: dict[str, Any],
    more: Mapping[str, Any] | None = None,
    prefix: str = "",
) -> None:
    """Write `metrics.json` and `detections.json` (COCO result format), each replaced in one step.

    Args:
        step: optimizer steps behind the weights.
        settings: of the evaluation: thresholds decide what the numbers mean.
        more: other entries of `metrics.json`.
        prefix: of both file names.
    """
    write_detections(directory / f"{prefix}detections.json", dataset.annotations, evaluation.detections)
    class_ap = {
        name: {"AP": ap, "AP50": ap50, "gt_boxes": gt_boxes}
        for name, (ap, ap50, gt_boxes) in evaluation.class_ap.items()
    }
    content = {
        **evaluation.metrics,
        "boxes": len(evaluation.detections),
        "dropped_non_finite": evaluation.dropped,
        "step": step,
        "losses": evaluation.losses,
        "class_AP": class_ap,
        "backend": evaluation.backend,
        "settings": settings,
        **(more or {}),
    }
    replace_file(directory / f"{prefix}metrics.json", json.dumps(content, indent=2).encode())


def draw_batch(batch: Batch, names: tuple[str, ...]) -> np.ndarray:
    """Draw the images exactly as the network sees them, with their boxes, as one RGB grid."""
    images = batch["images"][:LARGEST_BATCH_PICTURE].permute(0, 2, 3, 1).numpy()
    drawn = []
    for image, boxes, labels in zip(images, batch["boxes"].numpy(), batch["labels"].numpy(), strict=False):
        real = labels != PADDING_LABEL
        drawn.append(draw_boxes(image, boxes[real], labels[real], names, legend=True))
    return make_grid(drawn, columns=min(4, len(drawn)))


def draw_detections(
    dataset: DetectionDataset, evaluation: Evaluation, threshold: float, count: int
) -> np.ndarray | None:
    """Draw ground truth beside detections of at least `threshold`, for images spread evenly over the dataset."""
    annotations = dataset.annotations
    pictures = []
    for index in np.linspace(0, len(annotations) - 1, min(count, len(annotations)), dtype=int).tolist():
        rows = slice(annotations.first_box[index], annotations.first_box[index + 1])
        detections = evaluation.detections.of_image(index)
        detections = detections.take(detections.scores >= threshold)
        image = dataset.load_image(index)
        factor = max(1, round(READABLE_SIDE / max(image.shape[:2])))
        pictures.append(
            ground_truth_beside_detections(
                image.repeat(factor, axis=0).repeat(factor, axis=1),
                annotations.boxes[rows] * factor,
                np.where(annotations.crowd[rows], CROWD_LABEL, annotations.labels[rows]),
                detections.boxes * factor,
                detections.labels,
                detections.scores,
                annotations.categories.names,
            )
        )
    return make_grid(pictures, columns=2) if pictures else None
