"""Box formats and overlaps. Lowest layer: imports nothing of this package.

Boxes are (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2 unless a name says `_cxcywh` (centre, width, height).
"""

import torch
from torch import Tensor


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Corners to centre, width, height; (..., 4) to (..., 4)."""
    corner_1, corner_2 = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(corner_1 + corner_2) / 2, corner_2 - corner_1], dim=-1)


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """Centre, width, height to corners; (..., 4) to (..., 4). Inverse of `xyxy_to_cxcywh`."""
    centre, half_size = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:] / 2
    return torch.cat([centre - half_size, centre + half_size], dim=-1)


def box_area(boxes: Tensor) -> Tensor:
    """Width times height; (..., 4) to (...)."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def pairwise_intersection(boxes_1: Tensor, boxes_2: Tensor) -> Tensor:
    """Area that each box of one set shares with each box of the other; (..., N, 4) and (..., M, 4) to (..., N, M)."""
    # One coordinate at a time: the (..., N, M, 2) intermediates of the short form cost twice the memory traffic.
    width = torch.minimum(boxes_1[..., :, None, 2], boxes_2[..., None, :, 2])
    width = (width - torch.maximum(boxes_1[..., :, None, 0], boxes_2[..., None, :, 0])).clamp_(min=0)
    height = torch.minimum(boxes_1[..., :, None, 3], boxes_2[..., None, :, 3])
    height = (height - torch.maximum(boxes_1[..., :, None, 1], boxes_2[..., None, :, 1])).clamp_(min=0)
    return width.mul_(height)


def pairwise_iou(boxes_1: Tensor, boxes_2: Tensor) -> Tensor:
    """Intersection over union of every pair; (..., N, 4) and (..., M, 4) to (..., N, M). Not differentiable.

    Two boxes without area have IoU 0, not NaN.
    """
    intersection = pairwise_intersection(boxes_1, boxes_2)
    union = box_area(boxes_1)[..., :, None] + box_area(boxes_2)[..., None, :] - intersection
    return intersection / union.clamp_(min=torch.finfo(union.dtype).tiny)


def pairwise_wh_iou(wh_1: Tensor, wh_2: Tensor) -> Tensor:
    """IoU of (width, height) pairs laid on one corner; (..., N, 2) and (M, 2) to (..., N, M)."""
    smaller = torch.minimum(wh_1[..., :, None, :], wh_2)
    intersection = smaller[..., 0] * smaller[..., 1]
    union = wh_1.prod(-1)[..., :, None] + wh_2.prod(-1) - intersection
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def clip_boxes(boxes: Tensor, width: float, height: float) -> Tensor:
    """Cut boxes to the image; (..., 4) to (..., 4), 0 <= x <= width and 0 <= y <= height."""
    x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)
