"""The COCO metric's matching and counting on flat arrays: the numbers of pycocotools without an object per box."""

import itertools
from typing import NamedTuple

import numpy as np

# Pairs of a detection and a ground-truth box computed at once: overlaps take about 200 bytes each, matching at ten IoU
# thresholds in four area ranges about 1.5 KB.
PAIRS_AT_A_TIME = 200_000
CHOICES_AT_A_TIME = 10_000
MAX_IOU_THRESHOLD = 1 - 1e-10  # stands for an IoU threshold of 1
UNMATCHED, TRUE_POSITIVE, IGNORED = range(3)


class GroundTruthArrays(NamedTuple):
    """G ground-truth boxes; the order within an image and class decides between equal IoUs."""

    classes: np.ndarray  # (G,) int64, 0..C-1
    images: np.ndarray  # (G,) int64, ascending with the image id
    boxes: np.ndarray  # (G, 4) float64 x, y, width, height
    areas: np.ndarray  # (G,) compared with the area ranges
    crowd: np.ndarray  # (G,) bool

    def take(self, rows: np.ndarray) -> "GroundTruthArrays":
        """Select rows."""
        return GroundTruthArrays(*(values[rows] for values in self))


class DetectionArrays(NamedTuple):
    """K detections; the order within an image and class decides between equal scores."""

    classes: np.ndarray  # (K,) int64
    images: np.ndarray  # (K,) int64
    boxes: np.ndarray  # (K, 4) float64 x, y, width, height
    areas: np.ndarray  # (K,)
    scores: np.ndarray  # (K,) finite

    def take(self, rows: np.ndarray) -> "DetectionArrays":
        """Select rows."""
        return DetectionArrays(*(values[rows] for values in self))


class Protocol(NamedTuple):
    """The parameters of COCOeval that decide the numbers."""

    iou_thresholds: np.ndarray  # (T,)
    recalls: np.ndarray  # (R,) at which precision is read
    area_ranges: np.ndarray  # (A, 2) smallest and largest area, both inclusive
    max_detections: list[int]  # M counts per image and class, ascending


class _Matches(NamedTuple):
    """The E detections that overlap a ground-truth box, and their outcomes."""

    rows: np.ndarray  # (E,) of the detections
    outcomes: np.ndarray  # (E, T, A) UNMATCHED, TRUE_POSITIVE or IGNORED


def accumulate(
    gt_boxes: GroundTruthArrays, detections: DetectionArrays, num_classes: int, protocol: Protocol
) -> tuple[np.ndarray, np.ndarray]:
    """Compute COCOeval's "precision" (T, R, C, A, M) and "recall" (T, C, A, M); -1 where a class has no ground truth.

    In every image the detections of a class choose by falling score. Only those that overlap a ground-truth box at all
    are matched; the others are false positives and are only counted.

    Source: COCOeval in PythonAPI/pycocotools/cocoeval.py of https://github.com/cocodataset/cocoapi
    """
    gt_boxes = gt_boxes.take(np.lexsort((gt_boxes.images, gt_boxes.classes)))
    detections = detections.take(np.lexsort((-detections.scores, detections.images, detections.classes)))
    rank = _rank_in_run(_groups(detections))
    counted = rank < protocol.max_detections[-1]
    if not counted.all():
        detections, rank = detections.take(np.flatnonzero(counted)), rank[counted]
    low, high = protocol.area_ranges.T
    ignored = gt_boxes.crowd[:, None] | (gt_boxes.areas[:, None] < low) | (gt_boxes.areas[:, None] > high)  # (G, A)
    inside = (detections.areas[:, None] >= low) & (detections.areas[:, None] <= high)  # (K, A)
    matches = _match(gt_boxes, detections, ignored, protocol.iou_thresholds)

    best_first = np.lexsort((-detections.scores, detections.classes))  # stable: images of equal scores by ascending id
    place = np.empty(len(best_first), dtype=np.int64)
    place[best_first] = np.arange(len(best_first))
    order = np.argsort(place[matches.rows])
    matches = _Matches(matches.rows[order], matches.outcomes[order])
    places = place[matches.rows]

    shape = (num_classes, len(low), len(protocol.max_detections))
    precision = np.full((len(protocol.iou_thresholds), len(protocol.recalls), *shape), -1.0)
    recall = np.full((len(protocol.iou_thresholds), *shape), -1.0)
    class_ends = np.searchsorted(detections.classes, np.arange(num_classes + 1))
    match_ends = np.searchsorted(places, class_ends)  # classes are together in either order
    gt_ends = np.searchsorted(gt_boxes.classes, np.arange(num_classes + 1))
    for label in range(num_classes):
        of_class = best_first[class_ends[label] : class_ends[label + 1]]
        of_matches = slice(match_ends[label], match_ends[label + 1])
        rows, where = matches.rows[of_matches], places[of_matches] - class_ends[label]
        gt_counts = (~ignored[gt_ends[label] : gt_ends[label + 1]]).sum(axis=0)
        for column, most in enumerate(protocol.max_detections):
            listed = rank[of_class] < most
            for area in np.flatnonzero(gt_counts):
                outcomes = np.where(rank[rows, None] < most, matches.outcomes[of_matches, :, area], UNMATCHED)
                precision[:, :, label, area, column], recall[:, label, area, column] = _curves(
                    outcomes,
                    inside[rows, area, None],
                    np.cumsum(inside[of_class, area] & listed)[where],
                    int(gt_counts[area]),
                    protocol.recalls,
                )
    return precision, recall


def _groups(boxes: GroundTruthArrays | DetectionArrays) -> np.ndarray:
    """One number per (class, image), ascending."""
    return (boxes.classes << 40) + boxes.images


def _rank_in_run(values: np.ndarray) -> np.ndarray:
    """Rank 0, 1, 2, ... within each run of equal values."""
    starts = np.flatnonzero(np.diff(values, prepend=values[:1] - 1))
    return np.arange(len(values)) - np.repeat(starts, np.diff(starts, append=len(values)))


def _match(
    gt_boxes: GroundTruthArrays, detections: DetectionArrays, ignored: np.ndarray, thresholds: np.ndarray
) -> _Matches:
    """Match detections to ground truth, separately at each IoU threshold and in each area range.

    Both are sorted by class and image, detections by falling score within. Each takes, of the free ground-truth boxes
    that overlap it enough, the one of largest IoU (the last of equals), and an ignored one only if there is no other;
    crowds stay free. Works in rounds: in each, the next detection of every image and class takes its turn.
    """
    thresholds = np.minimum(thresholds, MAX_IOU_THRESHOLD)
    detection, gt, iou = _overlapping_pairs(gt_boxes, detections, thresholds.min())
    rows, turn_of_pair = np.unique(detection, return_inverse=True)
    turns = _rank_in_run(_groups(detections)[rows])
    order = np.argsort(turns[turn_of_pair], kind="stable")
    detection_number, gt, iou = turn_of_pair[order], gt[order], iou[order]
    borders = np.flatnonzero(np.diff(detection_number)) + 1  # between detections
    turn_ends = np.cumsum(np.bincount(turns[detection_number]))
    cuts = np.searchsorted(borders, np.arange(CHOICES_AT_A_TIME, len(gt), CHOICES_AT_A_TIME))
    ends = np.union1d(turn_ends, borders[np.minimum(cuts, len(borders) - 1)] if len(borders) else [])
    outcomes = np.zeros((len(rows), len(thresholds), ignored.shape[1]), dtype=np.int8)
    taken = np.zeros((len(ignored), *outcomes.shape[1:]), dtype=bool)
    for start, end in itertools.pairwise([0, *ends.astype(np.int64).tolist()]):
        candidate, overlap = gt[start:end], iou[start:end, None, None]
        first = np.flatnonzero(np.diff(detection_number[start:end], prepend=-1))
        chooser = np.repeat(np.arange(len(first)), np.diff(first, append=end - start))
        possible = (overlap >= thresholds[:, None]) & (~taken[candidate] | gt_boxes.crowd[candidate, None, None])
        preferred = possible & ~ignored[candidate, None, :]
        possible = np.where(np.logical_or.reduceat(preferred, first)[chooser], preferred, possible)
        best = np.maximum.reduceat(np.where(possible, overlap, -1.0), first)
        possible &= overlap == best[chooser]
        pair_numbers = np.where(possible, np.arange(end - start)[:, None, None], -1)
        chosen = np.maximum.reduceat(pair_numbers, first)  # (choosers, T, A)
        who, threshold, area = np.nonzero(chosen >= 0)
        what = candidate[chosen[who, threshold, area]]
        taken[what, threshold, area] = True
        outcomes[detection_number[start:end][first][who], threshold, area] = np.where(
            ignored[what, area], IGNORED, TRUE_POSITIVE
        )
    return _Matches(rows, outcomes)


def _overlapping_pairs(
    gt_boxes: GroundTruthArrays, detections: DetectionArrays, threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of equal class and image whose IoU reaches the threshold: rows of both, and the IoU."""
    gt_groups, detection_groups = _groups(gt_boxes), _groups(detections)
    first = np.searchsorted(gt_groups, detection_groups, side="left")
    counts = np.searchsorted(gt_groups, detection_groups, side="right") - first
    rows = np.flatnonzero(counts)
    ends = np.cumsum(counts[rows])
    cuts = np.searchsorted(ends, np.arange(PAIRS_AT_A_TIME, ends[-1] if len(ends) else 0, PAIRS_AT_A_TIME))
    pieces = []
    for part in np.split(rows, np.unique(cuts)):
        detection = np.repeat(part, counts[part])
        gt = first[detection] + _rank_in_run(detection)
        iou = _overlap(detections.boxes[detection], gt_boxes.boxes[gt], gt_boxes.crowd[gt])
        enough = iou >= threshold
        pieces.append((detection[enough], gt[enough], iou[enough]))
    detection_rows, gt_rows, ious = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    return detection_rows, gt_rows, ious


def _overlap(boxes: np.ndarray, gt: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """IoU of N pairs of boxes (x, y, width, height), (N, 4) twice to (N,); with a crowd the share of the detection.

    Same operations in the same order as `bbIou` in common/maskApi.c of cocoapi, so that the results are equal bit for
    bit.
    """
    (x, y, width, height), (gt_x, gt_y, gt_width, gt_height) = boxes.T, gt.T
    common_width = np.minimum(width + x, gt_width + gt_x) - np.maximum(x, gt_x)
    common_height = np.minimum(height + y, gt_height + gt_y) - np.maximum(y, gt_y)
    common = np.where((common_width > 0) & (common_height > 0), common_width * common_height, 0.0)
    area = width * height
    union = np.where(crowd, area, area + gt_width * gt_height - common)
    return np.divide(common, union, out=np.zeros_like(common), where=common > 0)


def _curves(
    outcomes: np.ndarray, inside: np.ndarray, counted: np.ndarray, num_gt: int, recalls: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Precision at each recall (T, R) and the final recall (T,) of one class and area range.

    Args:
        outcomes: of the detections that overlap a ground-truth box, best score first, (E, T).
        inside: whether each is a false positive without a match (its area lies in the range), (E, 1).
        counted: number of detections, up to and including each, whose area lies in the range, (E,).
    """
    if not len(outcomes):
        return np.zeros((outcomes.shape[1], len(recalls))), np.zeros(outcomes.shape[1])
    positive = outcomes == TRUE_POSITIVE
    true_positives = np.cumsum(positive, axis=0)
    matched_inside = np.cumsum((outcomes != UNMATCHED) & inside, axis=0)
    precision = true_positives / (counted[:, None] - matched_inside + true_positives + np.spacing(1))
    precision = np.where(positive, precision, 0.0)
    precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]  # best at this or a larger recall
    threshold, row = np.nonzero(positive.T)
    start = np.searchsorted(threshold, np.arange(positive.shape[1]))  # of each threshold's true positives
    needed = np.searchsorted(np.arange(num_gt + 1) / num_gt, recalls, side="left")  # true positives for each recall
    reached = needed <= true_positives[-1][:, None]  # (T, R)
    at = np.minimum(start[:, None] + np.maximum(needed, 1) - 1, max(len(row) - 1, 0))
    values = precision[row[at], threshold[at]] if len(row) else np.zeros(at.shape)
    values = np.where(reached & (true_positives[-1][:, None] > 0), values, 0.0)
    return values, true_positives[-1] / num_gt
