"""Match detections to ground truth: the base of confusion matrices, confidence curves and pictures of errors."""

import numpy as np
import torch

from detection.data.annotations import Annotations
from detection.evaluation.detections import Detections
from detection.ops.boxes import pairwise_iou

NO_GROUND_TRUTH = -1  # a false detection
IN_CROWD = -2  # inside a crowd region, neither right nor wrong


def match_detections(
    annotations: Annotations, detections: Detections, iou_threshold: float = 0.5, same_class: bool = True
) -> np.ndarray:
    """Match each detection to a ground-truth box at one IoU threshold.

    In every image the detections choose by falling score (ties: the earlier row) the free ground-truth box of largest
    IoU (ties: the last in the annotation file), as the COCO metric does. A detection without a match counts neither
    way if a crowd region covers that share of its own area.

    Args:
        annotations: ground truth.
        detections: in original pixels, all finite.
        iou_threshold: smallest IoU of a match, inclusive.
        same_class: if False, ground-truth boxes of any class may be matched, as a confusion matrix needs it.

    Returns:
        Row of `annotations` per detection, NO_GROUND_TRUTH or IN_CROWD, (K,) int64.

    Source: evaluateImg in PythonAPI/pycocotools/cocoeval.py of https://github.com/cocodataset/cocoapi
    """
    result = np.full(len(detections), NO_GROUND_TRUTH, dtype=np.int64)
    order = np.lexsort((-detections.scores, detections.image_index))
    starts = np.searchsorted(detections.image_index[order], np.arange(len(annotations) + 1))
    for image in np.flatnonzero(np.diff(starts)).tolist():
        rows = order[starts[image] : starts[image + 1]]
        gt_rows = np.arange(*annotations.first_box[image : image + 2])
        if not len(gt_rows):
            continue
        gt_rows = gt_rows[np.argsort(annotations.file_order[gt_rows])]
        boxes, gt_boxes = detections.boxes[rows], corners(annotations.coco_boxes[gt_rows])
        crowd = annotations.crowd[gt_rows]
        iou = pairwise_iou(torch.from_numpy(boxes), torch.from_numpy(gt_boxes)).numpy()
        iou[:, crowd] = covered_share(boxes, gt_boxes[crowd])
        if same_class:
            iou[detections.labels[rows][:, None] != annotations.labels[gt_rows]] = 0
        result[rows] = _match_image(iou, crowd, iou_threshold, gt_rows)
    return result


def _match_image(iou: np.ndarray, crowd: np.ndarray, threshold: float, gt_rows: np.ndarray) -> np.ndarray:
    """Match the detections of one image, best score first; (D, G), (G,), (G,) to (D,)."""
    matched = np.full(len(iou), NO_GROUND_TRUTH, dtype=np.int64)
    free = ~crowd
    enough = np.minimum(threshold, 1 - 1e-10)
    for row in np.flatnonzero((iou >= enough).any(axis=1)).tolist():
        candidates = np.flatnonzero(free & (iou[row] >= enough))
        if len(candidates):
            # the last of equals in the file's order, as the COCO metric takes it
            best = candidates[len(candidates) - 1 - iou[row, candidates][::-1].argmax()]
            free[best] = False
            matched[row] = gt_rows[best]
        elif (iou[row, crowd] >= enough).any():
            matched[row] = IN_CROWD
    return matched


def corners(coco_boxes: np.ndarray) -> np.ndarray:
    """[x, y, width, height] to (x1, y1, x2, y2), (N, 4)."""
    return np.concatenate([coco_boxes[:, :2], coco_boxes[:, :2] + coco_boxes[:, 2:]], axis=1)


def covered_share(boxes: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """Share of each box's own area inside each region, the metric's overlap with crowd; (D, 4), (R, 4) to (D, R)."""
    starts = np.maximum(boxes[:, None, :2], regions[None, :, :2])
    ends = np.minimum(boxes[:, None, 2:], regions[None, :, 2:])
    common = (ends - starts).clip(min=0).prod(axis=2)
    return common / np.maximum((boxes[:, 2:] - boxes[:, :2]).prod(axis=1), 1e-12)[:, None]
