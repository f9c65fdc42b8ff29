"""The task-aligned assigner of TOOD."""

import functools

import torch
from torch import Tensor

from detection.models.yolox.assigners import Assignment
from detection.models.yolox.assigners.choice import (
    choose,
    of_own_class,
    offsets,
    overlaps,
    points_inside,
    points_near,
    settle,
)
from detection.models.yolox.points import Points

EPSILON = 1e-9


@torch.no_grad()
def assign_task_aligned(
    class_logits: Tensor,
    objectness_logits: Tensor | None,
    predicted: Tensor,
    boxes: Tensor,
    labels: Tensor,
    points: Points,
    alpha: float = 1.0,
    beta: float = 6.0,
    most: int = 13,
) -> Assignment:
    """Choose for each box the `most` predictions of the highest alignment; see `Assigner`.

    t = p^alpha * IoU^beta, p: probability of the box's class. The quality is t, scaled so that the highest t of a box
    becomes its highest IoU.

    Candidates are the points strictly inside the box or, if no level has one, the cells that hold its centre. Only
    predictions with t > 0 are chosen; if there is none, the best candidate is, with quality 0. A prediction that
    several boxes chose goes to the one of highest IoU, of equals to the first; a box goes without only if others take
    all that it chose. The objectness is not used.

    Args:
        alpha, beta: exponents; TOOD and PP-YOLOE 1 and 6 with 13 predictions, later YOLO versions 0.5 and 6 with 10.
        most: predictions per box.

    Source: TOOD, section 3.3, https://arxiv.org/abs/2108.07755
    """
    valid = (labels >= 0)[..., None]
    offset = offsets(boxes, points)
    inside = points_inside(boxes, offset)
    none = ~inside.any(dim=2, keepdim=True)
    candidate = points_near(offset, points).logical_and_(none).logical_or_(inside).logical_and_(valid)
    iou = overlaps(boxes, predicted, candidate)
    alignment = of_own_class(class_logits.sigmoid().pow_(alpha), labels).mul_(iou.pow(beta))

    # With t = 0 a candidate comes after all others, and the first of them only where there are no others.
    key = alignment.neg().masked_fill_(candidate.logical_not_(), torch.inf)
    chosen = choose(key, most) & (alignment > 0)
    chosen |= choose(key, 1) & ~chosen.any(dim=2, keepdim=True)
    highest = (alignment * chosen).amax(dim=2, keepdim=True)
    quality = alignment / (highest + EPSILON) * (iou * chosen).amax(dim=2, keepdim=True)
    return settle(chosen, 1 - iou, quality)


# The constants of later YOLO versions; the one-to-one branch takes the same measure and the best prediction only.
assign_aligned_half = functools.partial(assign_task_aligned, alpha=0.5, beta=6.0, most=10)
assign_one_to_one = functools.partial(assign_task_aligned, alpha=0.5, beta=6.0, most=1)
