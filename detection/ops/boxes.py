"""Box formats and overlaps.

Boxes are (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2 unless a name says `_cxcywh` (centre, width, height).
"""

import math

import torch
from torch import Tensor


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Corners to centre, width, height; (..., 4) to (..., 4)."""
    corner_1, corner_2 = boxes.split(2, dim=-1)
    return torch.cat([(corner_1 + corner_2) / 2, corner_2 - corner_1], dim=-1)


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """Centre, width, height to corners; (..., 4) to (..., 4). Inverse of `xyxy_to_cxcywh`."""
    centre, size = boxes_cxcywh.split(2, dim=-1)
    half_size = size / 2
    return torch.cat([centre - half_size, centre + half_size], dim=-1)


def box_area(boxes: Tensor) -> Tensor:
    """Width times height; (..., 4) to (...)."""
    left, top, right, bottom = boxes.unbind(-1)
    return (right - left) * (bottom - top)


def pairwise_intersection(boxes_1: Tensor, boxes_2: Tensor) -> Tensor:
    """Area of intersection of every pair; (..., N, 4) and (..., M, 4) to (..., N, M)."""
    # One coordinate at a time: the (..., N, M, 2) intermediates of the short form cost twice the memory traffic.
    left_1, top_1, right_1, bottom_1 = boxes_1.unsqueeze(-2).unbind(-1)  # each (..., N, 1)
    left_2, top_2, right_2, bottom_2 = boxes_2.unsqueeze(-3).unbind(-1)  # each (..., 1, M)
    width = torch.minimum(right_1, right_2).sub_(torch.maximum(left_1, left_2)).clamp_(min=0)
    height = torch.minimum(bottom_1, bottom_2).sub_(torch.maximum(top_1, top_2)).clamp_(min=0)
    return width.mul_(height)


def pairwise_iou(boxes_1: Tensor, boxes_2: Tensor) -> Tensor:
    """Intersection over union of every pair; (..., N, 4) and (..., M, 4) to (..., N, M). Not differentiable.

    Two boxes without area have IoU 0, not NaN.
    """
    intersection = pairwise_intersection(boxes_1, boxes_2)
    union = box_area(boxes_1)[..., :, None] + box_area(boxes_2)[..., None, :] - intersection
    return intersection / union.clamp_(min=torch.finfo(union.dtype).tiny)


def pairwise_wh_iou(wh_1: Tensor, wh_2: Tensor) -> Tensor:
    """IoU of every pair of (width, height) with a common corner; (..., N, 2) and (M, 2) to (..., N, M)."""
    width_1, height_1 = wh_1.unsqueeze(-2).unbind(-1)  # each (..., N, 1)
    width_2, height_2 = wh_2.unbind(-1)
    intersection = torch.minimum(width_1, width_2) * torch.minimum(height_1, height_2)
    union = width_1 * height_1 + width_2 * height_2 - intersection
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def elementwise_iou(boxes_1_cxcywh: Tensor, boxes_2_cxcywh: Tensor) -> Tensor:
    """Elementwise IoU; (..., 4) and (..., 4) to (...), 0..1 up to rounding. Differentiable; no NaN for finite boxes."""
    intersection, union, _, _ = _overlap_and_hull(boxes_1_cxcywh, boxes_2_cxcywh)
    return intersection / _not_zero(union)


def generalized_iou(boxes_1_cxcywh: Tensor, boxes_2_cxcywh: Tensor) -> Tensor:
    """Elementwise GIoU; (..., 4) and (..., 4) to (...), -1..1. Differentiable; never NaN for finite boxes.

    GIoU = IoU - (hull - union) / hull, hull: area of the smallest enclosing box

    torchvision's `generalized_box_iou_loss` indexes by a mask, which synchronises with the device in every step.

    Source: https://arxiv.org/abs/1902.09630, algorithm 1.
    """
    intersection, union, hull_width, hull_height = _overlap_and_hull(boxes_1_cxcywh, boxes_2_cxcywh)
    hull = hull_width * hull_height
    return intersection / _not_zero(union) - (hull - union) / _not_zero(hull)


def generalized_iou_xyxy(boxes_1: Tensor, boxes_2: Tensor) -> Tensor:
    """`generalized_iou` of boxes given as corners: half the operations, 1e-5 instead of 1e-7 exact for tiny boxes."""
    (first_1, last_1), (first_2, last_2) = boxes_1.split(2, dim=-1), boxes_2.split(2, dim=-1)
    shared = (torch.minimum(last_1, last_2) - torch.maximum(first_1, first_2)).clamp(min=0)
    hull = torch.maximum(last_1, last_2) - torch.minimum(first_1, first_2)
    sides = torch.stack([shared, hull, last_1 - first_1, last_2 - first_2])
    intersection, hull_area, area_1, area_2 = (sides[..., 0] * sides[..., 1]).unbind(0)
    union = area_1 + area_2 - intersection
    return intersection / _not_zero(union) - (hull_area - union) / _not_zero(hull_area)


def complete_iou(boxes_1_cxcywh: Tensor, boxes_2_cxcywh: Tensor) -> Tensor:
    """Elementwise CIoU; (..., 4) and (..., 4) to (...). Differentiable; never NaN for finite boxes with a size.

    CIoU = IoU - d^2 / c^2 - alpha * v,  v = 4 / pi^2 * (atan(w_2 / h_2) - atan(w_1 / h_1))^2,
    alpha = v / (1 - IoU + v) without gradient; d: distance of the centres, c: diagonal of the smallest enclosing box

    Differs from the paper, which replaces 1 / (w^2 + h^2) in the gradient of v by 1 to avoid large gradients in width
    and height. The network predicts their logarithms, for which the true gradient is bounded.

    Source: https://arxiv.org/abs/1911.08287, equations 7 to 12.
    """
    intersection, union, hull_width, hull_height = _overlap_and_hull(boxes_1_cxcywh, boxes_2_cxcywh)
    iou = intersection / _not_zero(union)
    distance = (boxes_1_cxcywh[..., :2] - boxes_2_cxcywh[..., :2]).square().sum(-1)
    diagonal = hull_width.square() + hull_height.square()
    angle_1 = (boxes_1_cxcywh[..., 2] / boxes_1_cxcywh[..., 3]).atan()
    angle_2 = (boxes_2_cxcywh[..., 2] / boxes_2_cxcywh[..., 3]).atan()
    v = (angle_2 - angle_1).square() * (4 / math.pi**2)
    # Rounding can put the IoU of equal boxes a little above 1.
    alpha = (v / _not_zero((1 - iou).clamp(min=0) + v)).detach()
    return iou - distance / _not_zero(diagonal) - alpha * v


def distance_iou(boxes_1_cxcywh: Tensor, boxes_2_cxcywh: Tensor) -> Tensor:
    """Elementwise DIoU; (..., 4) and (..., 4) to (...), -1..1. Differentiable; never NaN for finite boxes.

    DIoU = IoU - d^2 / c^2; d: distance of the centres, c: diagonal of the smallest enclosing box

    Source: https://arxiv.org/abs/1911.08287, equations 5 to 7.
    """
    intersection, union, hull_width, hull_height = _overlap_and_hull(boxes_1_cxcywh, boxes_2_cxcywh)
    distance = (boxes_1_cxcywh[..., :2] - boxes_2_cxcywh[..., :2]).square().sum(-1)
    return intersection / _not_zero(union) - distance / _not_zero(hull_width.square() + hull_height.square())


def efficient_iou(boxes_1_cxcywh: Tensor, boxes_2_cxcywh: Tensor) -> Tensor:
    """Elementwise EIoU; (..., 4) and (..., 4) to (...). Differentiable; never NaN for finite boxes.

    EIoU = DIoU - (w_1 - w_2)^2 / hull_width^2 - (h_1 - h_2)^2 / hull_height^2

    Source: https://arxiv.org/abs/2101.08158, equation 6.
    """
    intersection, union, hull_width, hull_height = _overlap_and_hull(boxes_1_cxcywh, boxes_2_cxcywh)
    width, height = hull_width.square(), hull_height.square()
    squared = (boxes_1_cxcywh - boxes_2_cxcywh).square()
    sides = squared[..., 2] / _not_zero(width) + squared[..., 3] / _not_zero(height)
    distance = squared[..., :2].sum(-1) / _not_zero(width + height)
    return intersection / _not_zero(union) - distance - sides


def scylla_iou(boxes_1_cxcywh: Tensor, boxes_2_cxcywh: Tensor) -> Tensor:
    """Elementwise SIoU; (..., 4) and (..., 4) to (...). Differentiable; never NaN for finite boxes with a size.

    SIoU = IoU - (distance + shape) / 2, distance = sum over x, y of 1 - exp(-g * (d / hull side)^2) with g = 2 - angle,
    angle = 2 |dx| |dy| / (dx^2 + dy^2), shape = sum over w, h of (1 - exp(-|w_1 - w_2| / max(w_1, w_2)))^4

    The paper's angle, 1 - 2 sin^2(arcsin(x) - pi / 4) with x = min(|dx|, |dy|) / d, is the sine of the double angle, so
    neither an arcsine nor a root is needed, whose gradients are not finite everywhere.

    Source: https://arxiv.org/abs/2205.12740, equations 1 to 6 (exponent 4).
    """
    intersection, union, hull_width, hull_height = _overlap_and_hull(boxes_1_cxcywh, boxes_2_cxcywh)
    offset = boxes_1_cxcywh[..., :2] - boxes_2_cxcywh[..., :2]
    squared = offset.square()
    angle = 2 * offset[..., 0].abs() * offset[..., 1].abs() / _not_zero(squared.sum(-1))
    sharpness = (angle - 2)[..., None]
    share = squared / _not_zero(torch.stack([hull_width, hull_height], -1).square())
    distance = (1 - (sharpness * share).exp()).sum(-1)
    sides_1, sides_2 = boxes_1_cxcywh[..., 2:], boxes_2_cxcywh[..., 2:]
    change = (sides_1 - sides_2).abs() / _not_zero(torch.maximum(sides_1, sides_2))
    shape = (1 - (-change).exp()).square().square().sum(-1)
    return intersection / _not_zero(union) - (distance + shape) / 2


def _overlap_and_hull(boxes_1_cxcywh: Tensor, boxes_2_cxcywh: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Areas of intersection and union; width and height of the smallest enclosing box; each (...)."""
    # Corners relative to the centre of the second box, so that small boxes far from the origin keep their precision.
    # Not `prod`: its gradient synchronises with the device to look for zeros.
    offset = boxes_1_cxcywh[..., :2] - boxes_2_cxcywh[..., :2]
    half_1, half_2 = boxes_1_cxcywh[..., 2:] / 2, boxes_2_cxcywh[..., 2:] / 2
    upper_1, lower_1 = offset + half_1, offset - half_1
    shared = (torch.minimum(upper_1, half_2) - torch.maximum(lower_1, -half_2)).clamp(min=0)
    hull = torch.maximum(upper_1, half_2) - torch.minimum(lower_1, -half_2)
    intersection = shared[..., 0] * shared[..., 1]
    area_1, area_2 = (boxes[..., 2] * boxes[..., 3] for boxes in (boxes_1_cxcywh, boxes_2_cxcywh))
    return intersection, area_1 + area_2 - intersection, hull[..., 0], hull[..., 1]


def _not_zero(divisor: Tensor) -> Tensor:
    return divisor.clamp(min=torch.finfo(divisor.dtype).tiny)


def clip_boxes(boxes: Tensor, width: float, height: float) -> Tensor:
    """Clip boxes to the image; (..., 4) to (..., 4), 0 <= x <= width and 0 <= y <= height."""
    x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)
