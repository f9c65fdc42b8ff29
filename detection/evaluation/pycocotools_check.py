"""Repeat the twelve numbers of an evaluation with pycocotools, the official program, where that is quick."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from detection.data.annotations import Annotations
from detection.evaluation.coco_metric import score
from detection.evaluation.detections import Detections

MAX_SECONDS = 60  # estimated; more is left to evaluation.backend=pycocotools
TOLERANCE = 1e-9


def estimate_seconds(annotations: Annotations, detections: Detections) -> float:
    """Estimate the CPU time of pycocotools, within about a factor of two.

    Its loops visit every image and class, those with boxes, the best 100 detections of each, and each pair of these
    with a ground-truth box. The factors are measured on one core of a Xeon with AMX (`benchmarks.evaluation`).
    """
    num_classes = len(annotations.categories.names)
    cells = len(annotations) * num_classes  # an image and a class
    image_of_box = np.repeat(np.arange(len(annotations)), np.diff(annotations.first_box))
    gt_boxes = np.bincount(image_of_box * num_classes + annotations.labels, minlength=cells)
    counted = np.bincount(detections.image_index * num_classes + detections.labels, minlength=cells).clip(max=100)
    occupied = np.count_nonzero(gt_boxes + counted)
    return float(1.3e-5 * cells + 1.5e-4 * occupied + 3e-5 * counted.sum() + 7e-6 * (gt_boxes @ counted))


def check_with_pycocotools(
    annotations: Annotations, detections: Detections, metrics: Mapping[str, float | None], backend: str
) -> tuple[dict[str, Any], str]:
    """Compare the twelve numbers with those of pycocotools for the same ground truth and detections.

    Args:
        metrics: the numbers to check.
        backend: that computed them.

    Returns:
        The entry "pycocotools" of metrics.json: "agrees" (None: not checked), "seconds" and "differences", the
        official value of each number that differs; and a line that says the same.
    """
    if backend == "pycocotools":
        return {"agrees": True, "seconds": 0.0, "differences": {}}, "pycocotools itself computed the twelve numbers"
    estimate = estimate_seconds(annotations, detections)
    if estimate > MAX_SECONDS:
        line = f"pycocotools would take about {estimate:.0f} s: not repeated (evaluation.backend=pycocotools does it)"
        return {"agrees": None, "seconds": 0.0, "differences": {}}, line
    started = time.perf_counter()
    official = score(annotations, detections, "pycocotools").metrics
    seconds = time.perf_counter() - started
    differences = {name: value for name, value in official.items() if not _equal(value, metrics[name])}
    if differences:
        pairs = ", ".join(f"{name} {metrics[name]} and not {value}" for name, value in differences.items())
        line = f"pycocotools disagrees with {backend}: {pairs}"
    else:
        line = f"pycocotools gives the same twelve numbers ({seconds:.1f} s)"
    return {"agrees": not differences, "seconds": seconds, "differences": differences}, line


def _equal(first: float | None, second: float | None) -> bool:
    return first is second if first is None or second is None else abs(first - second) <= TOLERANCE
