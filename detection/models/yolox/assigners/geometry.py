"""What several assigners share."""

import torch
from torch import Tensor

from detection.models.yolox.assigners import Assignment
from detection.models.yolox.points import Points


def centre_distances(boxes: Tensor, points: Points) -> Tensor:
    """Larger of the distances in x and y of every point from every box's centre, in pixels; (B, G, 4) to (B, G, P)."""
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2
    x, y = ((centres[..., axis, None] - points.centres[:, axis]).abs_() for axis in (0, 1))
    return torch.maximum(x, y)


def near_centres(boxes: Tensor, points: Points, radius: float) -> Tensor:
    """Whether a point lies less than `radius` strides from a box's centre on both axes; (B, G, 4) to (B, G, P) bool."""
    return centre_distances(boxes, points) < points.strides * radius


def take_quality(positive: Tensor, gt: Tensor, iou: Tensor) -> Assignment:
    """Make an assignment whose quality is the IoU with the assigned box.

    Args:
        positive: (B, P) bool.
        gt: row of the assigned box, any where not positive, (B, P) int64.
        iou: of boxes and predictions, (B, G, P).
    """
    gt = gt * positive
    return Assignment(positive, gt, iou.gather(1, gt[:, None])[:, 0] * positive)
