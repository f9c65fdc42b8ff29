"""Which detection found which ground truth: what confusion matrices, curves of a threshold and pictures of errors rest on."""

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
    """The ground truth of each detection, at one IoU threshold.

    In every image the detections choose by falling score (ties: the earlier row) the free ground truth of largest IoU, as the
    COCO metric does; one that finds none, but whose own area a crowd region covers to that share, counts neither way.

    Args:
        annotations: ground truth.
        detections: in original pixels, all finite.
        iou_threshold: smallest IoU of a match, inclusive.
        same_class: false: ground-truth boxes of any class may be matched (a confusion matrix asks which).

    Returns:
        Row of `annotations` per detection, NO_GROUND_TRUTH or IN_CROWD, (K,) int64.

    Source: evaluateImg in PythonAPI/pycocotools/cocoeval.py of https://github.com/cocodataset/cocoapi
    """
    result = np.full(len(detections), NO_GROUND_TRUTH, dtype=np.int64)
    order = np.lexsort((-detections.scores, detections.image_index))
    starts = np.searchsorted(detections.image_index[order], np.arange(len(annotations) + 1))
    for image in np.flatnonzero(np.diff(starts)).tolist():
        rows = order[starts[image] : starts[image + 1]]
        gt_boxes = np.arange(*annotations.first_box[image : image + 2])
        if not len(gt_boxes):
            continue
        boxes, labels = detections.boxes[rows], detections.labels[rows]
        gt_boxes, gt_labels = corners(annotations.coco_boxes[gt_boxes]), annotations.labels[gt_boxes]
        crowd = annotations.crowd[gt_boxes]
        iou = pairwise_iou(torch.from_numpy(boxes), torch.from_numpy(gt_boxes)).numpy()
        iou[:, crowd] = covered_share(boxes, gt_boxes[crowd])
        if same_class:
            iou[labels[:, None] != gt_labels] = 0
        result[rows] = _match_image(iou, crowd, iou_threshold, gt_boxes)
    return result


def _match_image(iou: np.ndarray, crowd: np.ndarray, threshold: float, gt_boxes: np.ndarray) -> np.ndarray:
    """Ground-truth boxes of the detections of one image, best score first; (D, G), (G,), (G,) to (D,)."""
    found = np.full(len(iou), NO_GROUND_TRUTH, dtype=np.int64)
    free = ~crowd
    possible = np.minimum(threshold, 1 - 1e-10)
    for row in np.flatnonzero((iou >= possible).any(axis=1)).tolist():
        candidates = np.flatnonzero(free & (iou[row] >= possible))
        if len(candidates):
            # the last of equals, as the metric takes it
            best = candidates[len(candidates) - 1 - iou[row, candidates][::-1].argmax()]
            free[best] = False
            found[row] = gt_boxes[best]
        elif (iou[row, crowd] >= possible).any():
            found[row] = IN_CROWD
    return found


def corners(coco_boxes: np.ndarray) -> np.ndarray:
    """[x, y, width, height] to (x1, y1, x2, y2), (N, 4)."""
    return np.concatenate([coco_boxes[:, :2], coco_boxes[:, :2] + coco_boxes[:, 2:]], axis=1)


def covered_share(boxes: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """Share of each box's own area inside each region, the metric's overlap with crowd; (D, 4), (R, 4) to (D, R)."""
    starts = np.maximum(boxes[:, None, :2], regions[None, :, :2])
    ends = np.minimum(boxes[:, None, 2:], regions[None, :, 2:])
    common = (ends - starts).clip(min=0).prod(axis=2)
    return common / np.maximum((boxes[:, 2:] - boxes[:, :2]).prod(axis=1), 1e-12)[:, None]
