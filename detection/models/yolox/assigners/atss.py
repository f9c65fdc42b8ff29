"""Adaptive training sample selection."""

import torch
from torch import Tensor

from detection.models.yolox.assigners import Assignment
from detection.models.yolox.assigners.choice import choose, offsets, overlaps, points_inside, settle
from detection.models.yolox.points import Points
from detection.ops.boxes import cxcywh_to_xyxy

MOST = 9  # nearest points per level
ANCHOR_STRIDES = 5.0  # side of the square anchor at every point, in strides


@torch.no_grad()
def assign_atss(
    class_logits: Tensor,
    objectness_logits: Tensor | None,
    predicted: Tensor,
    boxes: Tensor,
    labels: Tensor,
    points: Points,
) -> Assignment:
    """Choose for each box the near points whose anchor overlaps it more than is usual among them; see `Assigner`.

    Of each level the 9 points nearest to the centre are candidates. Those are chosen that lie inside the box and whose
    anchor, a square of 5 strides, has an IoU of at least mean + standard deviation of all candidates. If there is none,
    the candidate of highest IoU is, of equals the nearest (ATSS leaves such a box out). A prediction that several boxes
    chose goes to the one of highest anchor IoU. Only the quality, the IoU of box and prediction, depends on the
    predictions (as in PP-YOLOE).

    Source: ATSS, section 3.3, https://arxiv.org/abs/1912.02424
    """
    valid = (labels >= 0)[..., None]
    offset = offsets(boxes, points)
    distance = offset[0].square() + offset[1].square()  # (B, G, P)
    candidate = torch.cat([choose(level, MOST) for level in distance.split(points.counts, dim=2)], dim=2) & valid

    sides = (points.strides * ANCHOR_STRIDES)[:, None].expand(-1, 2)
    anchors = cxcywh_to_xyxy(torch.cat([points.centres, sides], dim=-1))  # (P, 4)
    iou = overlaps(boxes, anchors[None], candidate)
    number = sum(min(MOST, count) for count in points.counts)
    mean = iou.sum(dim=2, keepdim=True) / number
    variance = ((iou - mean).square() * candidate).sum(dim=2, keepdim=True) / max(number - 1, 1)
    chosen = candidate & (iou >= mean + variance.sqrt()) & points_inside(boxes, offset)
    best = candidate & (iou >= iou.amax(dim=2, keepdim=True))  # all anchors of a level that hold a small box are equal
    chosen |= choose(torch.where(best, distance, torch.inf), 1) & ~chosen.any(dim=2, keepdim=True)
    return settle(chosen, -iou, overlaps(boxes, predicted, chosen))
