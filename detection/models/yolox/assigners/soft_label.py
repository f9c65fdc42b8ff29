"""The dynamic soft-label assigner of RTMDet."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from detection.models.yolox.assigners import Assignment
from detection.models.yolox.assigners.choice import (
    choose,
    counted_overlaps,
    of_own_class,
    offsets,
    overlaps,
    points_inside,
    points_near,
    settle,
)
from detection.models.yolox.points import Points

MOST = 13  # predictions of a box, and how many of its IoUs are summed to find their number
IOU_WEIGHT = 3.0
PRIOR_RADIUS = 3.0  # strides from the centre at which the prior costs 1; ten times more with every further stride
EPSILON = 1e-7


@torch.no_grad()
def assign_soft_label(
    class_logits: Tensor,
    objectness_logits: Tensor | None,
    predicted: Tensor,
    boxes: Tensor,
    labels: Tensor,
    points: Points,
) -> Assignment:
    """Choose for each box the predictions of the lowest cost, as many as their IoUs add up to; see `Assigner`.

    cost = sum over classes of BCE(z, y) * |y - p|^2 + 3 * -log(IoU) + 10^(d - 3), with p = sigmoid(z), y = IoU for the
    class of the box and 0 for the others, d: distance of point and centre in strides. The quality is the IoU.

    Candidates are the points inside any box of the image, and the cells that hold the centre of the box itself. Without
    the latter (RTMDet) a box smaller than a cell would take a cell of another object, or none. A prediction that
    several boxes chose goes to the one of lowest cost; a box goes without only if others take all that it chose.
    The objectness is not used.

    Source: RTMDet, section 3.3, https://arxiv.org/abs/2212.07784
    """
    valid = (labels >= 0)[..., None]
    offset = offsets(boxes, points)
    inside = points_inside(boxes, offset).logical_and_(valid)
    candidate = points_near(offset, points).logical_or_(inside.any(dim=1, keepdim=True)).logical_and_(valid)
    iou = overlaps(boxes, predicted, candidate)  # (B, G, P), as all that follows

    # The sum over classes without an axis for them: all classes as background, and the box's own put right, with
    # BCE(z, y) = softplus(z) - z * y. In place: the memory of these tensors is what the assignment costs.
    probability, softplus = class_logits.sigmoid(), F.softplus(class_logits)
    as_background = softplus * probability.square()
    cost = of_own_class(softplus, labels).addcmul_(of_own_class(class_logits, labels), iou, value=-1)
    cost.mul_(of_own_class(probability, labels).sub_(iou).square_()).sub_(of_own_class(as_background, labels))
    cost.add_(as_background.sum(-1)[:, None])

    distance = offset[0].square_().addcmul_(offset[1], offset[1]).sqrt_().div_(points.strides)
    prior = distance.sub_(PRIOR_RADIUS).mul_(math.log(10)).clamp_(max=60).exp_()
    cost.add_(prior).sub_((iou + EPSILON).log_(), alpha=IOU_WEIGHT).masked_fill_(candidate.logical_not_(), torch.inf)
    return settle(choose(cost, MOST, counted_overlaps(iou, MOST)), cost, iou)
