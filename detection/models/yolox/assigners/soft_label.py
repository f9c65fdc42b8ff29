"""The dynamic soft-label assigner of RTMDet."""

import torch
import torch.nn.functional as F
from torch import Tensor

from detection.models.yolox.assigners import Assignment
from detection.models.yolox.assigners.choice import (
    choose,
    counted_overlaps,
    overlaps,
    points_inside,
    points_of_centre_cells,
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
    valid = labels >= 0  # (B, G)
    near = points_of_centre_cells(boxes, points) & valid[..., None]
    inside = points_inside(boxes, points) & valid[..., None]
    candidate = (inside.any(dim=1, keepdim=True) | near) & valid[..., None]  # (B, G, P)
    iou = overlaps(boxes, predicted, candidate)

    # The sum over classes without an axis for them: all classes as background, and the box's own put right.
    background = (F.softplus(class_logits) * class_logits.sigmoid().square()).sum(-1)  # (B, P)
    own = class_logits.transpose(1, 2).gather(1, labels.clamp(min=0)[..., None].expand(-1, -1, len(points.strides)))
    score = own.sigmoid()
    softplus = F.softplus(own)  # BCE(z, y) = softplus(z) - z * y
    cost = (softplus - own * iou) * (iou - score).square() - softplus * score.square() + background[:, None]

    x, y = points.centres.unbind(-1)
    centre_x, centre_y = (boxes[..., :2] + boxes[..., 2:]).mul(0.5)[..., None].unbind(-2)
    distance = ((x - centre_x).square() + (y - centre_y).square()).sqrt() / points.strides
    cost += torch.pow(10.0, (distance - PRIOR_RADIUS).clamp_(max=30.0)) - IOU_WEIGHT * (iou + EPSILON).log()
    cost.masked_fill_(~candidate, torch.inf)
    return settle(choose(cost, MOST, counted_overlaps(iou, MOST)), cost, iou)
