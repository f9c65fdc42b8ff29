"""The official COCO numbers of detections in original pixels, in bounded memory."""

import contextlib
import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools.cocoeval import COCOeval

from detection.data.annotations import Annotations
from detection.evaluation.coco_arrays import DetectionArrays, GroundTruthArrays, Protocol
from detection.evaluation.coco_arrays import accumulate as accumulate_arrays
from detection.evaluation.coco_pycocotools import accumulate as accumulate_pycocotools
from detection.evaluation.detections import Detections, box_areas

# in the order of COCOeval.stats
METRIC_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
ROWS_AT_A_TIME = 100_000  # boxes handed to an evaluator at once, up to 1.5 KiB each; a class is never divided

# class name -> (AP, AP50, number of ground-truth boxes without crowd)
ClassAP = dict[str, tuple[float | None, float | None, int]]


@dataclass(frozen=True)
class Scores:
    """The official metric's numbers. Undefined (no ground-truth box) is None, in arrays -1."""

    metrics: dict[str, float | None]  # the twelve official numbers
    class_ap: ClassAP
    precision: np.ndarray  # (10, 101, C) at IoU 0.50, 0.55, ... 0.95 and recall 0, 0.01, ... 1; boxes of all sizes


@dataclass(frozen=True)
class GroupScore:
    """The metric within one group of boxes, e.g. one range of sizes; means over the classes with ground truth in it."""

    gt_boxes: int
    ap: float | None
    ap50: float | None
    recall: float | None  # AR100: mean over IoU 0.50:0.95


def choose_backend(name: str) -> str:
    """Return the evaluator that runs: "auto" is "arrays", the fastest, whose numbers are those of pycocotools."""
    return "arrays" if name == "auto" else name


def score(annotations: Annotations, detections: Detections, backend: str = "pycocotools") -> Scores:
    """Compute the twelve official COCO numbers and AP per class.

    The evaluator gets some classes at a time; its arrays are joined and summed up once, so the numbers are those of all
    classes at once. Between ground-truth boxes of equal IoU the order of the annotation file decides, as in the
    official program. Numbers that no ground-truth box defines are None, never 0 or -1.

    Args:
        annotations: ground truth; its images are the ones that count.
        detections: in original pixels, all finite.
        backend: "pycocotools" (reference) or "arrays" (see `coco_arrays`), proven equal.
    """
    precision, recall = _accumulate(annotations, detections, backend, annotations.areas, box_areas(detections.boxes))
    summary = COCOeval(iouType="bbox")
    summary.eval = {"precision": precision, "recall": recall}
    with contextlib.redirect_stdout(io.StringIO()):
        summary.summarize()
    metrics = {name: _defined(value) for name, value in zip(METRIC_NAMES, summary.stats, strict=True)}

    # area 0 is all, the last maxDets is 100; the evaluator's classes go by ascending id
    by_label = precision[:, :, np.argsort(np.argsort(annotations.categories.ids)), 0, -1]
    counts = count_gt(annotations)
    class_ap = {
        name: (_mean(by_label[:, :, label]), _mean(by_label[0, :, label]), int(counts[label]))
        for label, name in enumerate(annotations.categories.names)
    }
    return Scores(metrics, class_ap, by_label)


def score_groups(
    annotations: Annotations,
    detections: Detections,
    gt_values: np.ndarray,
    detection_values: np.ndarray,
    edges: Sequence[float],
    backend: str = "pycocotools",
) -> list[GroupScore]:
    """Compute the official metric within each range of any property of boxes, as for small, medium and large.

    Ground-truth boxes outside the range count neither way, nor do detections outside it that match none inside.

    Args:
        gt_values, detection_values: the property, (N,) and (K,).
        edges: of the ranges, ascending; a range includes its lower edge and excludes its upper one.
    """
    ranges = [[low, np.nextafter(high, -np.inf)] for low, high in itertools.pairwise(edges)]
    precision, recall = _accumulate(annotations, detections, backend, gt_values, detection_values, ranges)
    gt_boxes, _ = np.histogram(gt_values[~annotations.crowd], np.asarray(edges, dtype=np.float64))
    return [
        GroupScore(
            int(count),
            _mean(precision[..., group, -1]),
            _mean(precision[0, ..., group, -1]),
            _mean(recall[..., group, -1]),
        )
        for group, count in enumerate(gt_boxes)
    ]


def count_gt(annotations: Annotations) -> np.ndarray:
    """Count ground-truth boxes per class without crowd regions, (C,)."""
    return np.bincount(annotations.labels[~annotations.crowd], minlength=len(annotations.categories.names))


def _accumulate(
    annotations: Annotations,
    detections: Detections,
    backend: str,
    gt_areas: np.ndarray,
    detection_areas: np.ndarray,
    area_ranges: list[list[float]] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Compute COCOeval's arrays for all classes by ascending category id, A area ranges and M counts of detections.

    Args:
        gt_areas, detection_areas: compared with the area ranges, (N,) and (K,).
        area_ranges: [smallest, largest]; None: COCO's four, with 1, 10 and 100 detections; else 100 only.

    Returns:
        Precision (10, 101, C, A, M) and recall (10, C, A, M); -1 where a class has no ground-truth box.
    """
    params = COCOeval(iouType="bbox").params
    num_classes = len(annotations.categories.ids)
    if area_ranges is not None:
        params.areaRng, params.areaRngLbl = area_ranges, [str(number) for number in range(len(area_ranges))]
        params.maxDets = params.maxDets[-1:]
    shape = (num_classes, len(params.areaRng), len(params.maxDets))
    precision = np.full((len(params.iouThrs), len(params.recThrs), *shape), -1.0)
    recall = np.full((len(params.iouThrs), *shape), -1.0)
    protocol = Protocol(params.iouThrs, params.recThrs, np.asarray(params.areaRng), params.maxDets)
    column_of_label = np.argsort(np.argsort(annotations.categories.ids))
    image_order = np.argsort(np.argsort(annotations.image_ids))
    for labels, gt_rows, detection_rows in _groups_of_classes(annotations, detections):
        columns = np.sort(column_of_label[labels])
        part, areas = detections.take(detection_rows), detection_areas[detection_rows]
        if backend == "arrays":
            position = np.searchsorted(columns, column_of_label)  # among these classes
            image_of_box = np.searchsorted(annotations.first_box, gt_rows, side="right") - 1
            gt_boxes = GroundTruthArrays(
                position[annotations.labels[gt_rows]],
                image_order[image_of_box],
                annotations.coco_boxes[gt_rows],
                gt_areas[gt_rows],
                annotations.crowd[gt_rows],
            )
            boxes = np.concatenate([part.boxes[:, :2], part.boxes[:, 2:] - part.boxes[:, :2]], axis=1)
            rows = DetectionArrays(position[part.labels], image_order[part.image_index], boxes, areas, part.scores)
            arrays = accumulate_arrays(gt_boxes, rows, len(labels), protocol)
        else:
            arrays = accumulate_pycocotools(annotations, labels, gt_rows, gt_areas[gt_rows], part, areas, params)
        precision[:, :, columns], recall[:, columns] = arrays
    return precision, recall


def _groups_of_classes(
    annotations: Annotations, detections: Detections
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield labels with their rows of annotations and of detections, at most ROWS_AT_A_TIME or one class at once.

    Classes without ground truth are left out: nothing is defined for them. The order decides ties: ground truth comes
    as in the annotation file, detections as they are.
    """
    gt_order = np.lexsort((annotations.file_order, annotations.labels))
    detection_order = np.argsort(detections.labels, kind="stable")
    num_classes = len(annotations.categories.names)
    gt_ends = np.bincount(annotations.labels, minlength=num_classes).cumsum()
    detection_ends = np.bincount(detections.labels, minlength=num_classes).cumsum()
    rows_of_label = np.diff(gt_ends + detection_ends, prepend=0)
    group: list[int] = []
    with_ground_truth = np.flatnonzero(count_gt(annotations)).tolist()
    for position, label in enumerate(with_ground_truth):
        group.append(label)
        following = with_ground_truth[position + 1 : position + 2]
        if following and rows_of_label[[*group, *following]].sum() <= ROWS_AT_A_TIME:
            continue
        yield (
            np.array(group),
            np.concatenate([gt_order[slice(*_span(gt_ends, label))] for label in group]),
            np.sort(np.concatenate([detection_order[slice(*_span(detection_ends, label))] for label in group])),
        )
        group = []


def _span(ends: np.ndarray, label: int) -> tuple[int, int]:
    return int(ends[label - 1]) if label else 0, int(ends[label])


def _mean(values: np.ndarray) -> float | None:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None


def _defined(value: float) -> float | None:
    return None if value < 0 else float(value)
