"""Assignment by position and size alone: the cells around a box's centre, on the level of its size."""

import torch
from torch import Tensor

from detection.models.yolox.assigners import Assignment
from detection.models.yolox.assigners.choice import centre_distances, take_quality
from detection.models.yolox.points import Points
from detection.ops.boxes import box_area, pairwise_iou

RADIUS = 1.5  # strides around a box's centre
REACH = 8  # strides from the centre to the farthest side that a level answers for; the coarsest for all larger boxes


@torch.no_grad()
def centre(
    class_logits: Tensor,
    objectness_logits: Tensor | None,
    predicted: Tensor,
    boxes: Tensor,
    labels: Tensor,
    points: Points,
) -> Assignment:
    """Assign the cells less than 1.5 strides from a box's centre on the level of its size; arguments as `Assigner`.

    That level is the finest for which half the longer side is at most 8 strides, else the coarsest. A cell of several
    boxes goes to the smallest, of equals to the first; so a box has none if smaller ones share all of its cells.

    Source: YOLOX, table 2, "multi positives"; levels and the smallest box: FCOS, sections 3.1 and 3.2,
        https://arxiv.org/abs/1904.01355
    """
    distance = centre_distances(boxes, points)
    return _assign(distance < points.strides * RADIUS, predicted, boxes, labels, points)


@torch.no_grad()
def centre_cell(
    class_logits: Tensor,
    objectness_logits: Tensor | None,
    predicted: Tensor,
    boxes: Tensor,
    labels: Tensor,
    points: Points,
) -> Assignment:
    """Assign the cell of a box's centre on the level of its size; otherwise as `centre`.

    A centre on the border of two cells belongs to the upper or left one.

    Source: YOLOX, table 2, "anchor-free".
    """
    distance = centre_distances(boxes, points).masked_fill_(~_on_level(boxes, points), torch.inf)
    nearest = distance.min(dim=-1, keepdim=True).indices
    return _assign(
        torch.zeros_like(distance, dtype=torch.bool).scatter_(-1, nearest, True), predicted, boxes, labels, points
    )


def _on_level(boxes: Tensor, points: Points) -> Tensor:
    """Whether a point is of the level of a box's size; (B, G, 4) to (B, G, P) bool."""
    half = (boxes[..., 2:] - boxes[..., :2]).amax(dim=-1, keepdim=True) / 2  # (B, G, 1)
    strides = points.strides
    finest = torch.where(half <= strides * REACH, strides, strides.max()).amin(dim=-1, keepdim=True)
    return strides == finest


def _assign(close: Tensor, predicted: Tensor, boxes: Tensor, labels: Tensor, points: Points) -> Assignment:
    """Give each point to the smallest of the valid boxes that it is close to, (B, G, P) bool, on the boxes' levels."""
    close = close & _on_level(boxes, points) & (labels >= 0)[..., None]
    area, gt = torch.where(close, box_area(boxes)[..., None], torch.inf).min(dim=1)
    return take_quality(area < torch.inf, gt, pairwise_iou(boxes, predicted))
