"""SimOTA: each ground-truth box takes as many of the cheapest predictions as fit it well."""

import torch
from torch import Tensor

from detection.models.yolox.assigners import Assignment
from detection.models.yolox.assigners.choice import centre_distances, take_cheapest, take_quality
from detection.models.yolox.points import Points
from detection.ops.boxes import pairwise_iou

RADIUS = 1.5  # strides around a box's centre
MOST = 10  # predictions per box, and IoUs that are summed to count them
IOU_WEIGHT, FAR_COST, EPSILON = 3.0, 1e6, 1e-8
LEAST_LOG = -100.0  # as in torch's binary cross-entropy


@torch.no_grad()
def simota(
    class_logits: Tensor,
    objectness_logits: Tensor | None,
    predicted: Tensor,
    boxes: Tensor,
    labels: Tensor,
    points: Points,
) -> Assignment:
    """Assign by SimOTA; arguments as `Assigner`, without objectness the class probability stands alone.

    A point is near a box if it is within 1.5 strides of its centre on both axes; candidates are near some box.
    cost = sum over the classes of BCE(q, one-hot), q = sqrt(class * objectness)  + 3 * -log(IoU + 1e-8)
        + 1e6 where the point is not near this box
    A box takes its k cheapest candidates, k: the sum of its ten largest IoUs with candidates, rounded down, at least 1;
    of equal costs those of finer levels, then of upper rows. A candidate that several take goes to the box for which it
    is cheapest, the first of equals, whether or not that one took it. So a box whose centre lies in the image has a
    prediction, unless others for which they are cheaper share all that it took.

    The largest tensors are (B, G, P): 34 MB in float32 at 16 images, 64 boxes and 8400 points.

    Source: YOLOX, section 2.1, https://arxiv.org/abs/2107.08430; `get_assignments` and `simota_matching` of
        https://github.com/Megvii-BaseDetection/YOLOX; OTA, https://arxiv.org/abs/2103.14259
    """
    valid = labels >= 0
    boxes = boxes * valid[..., None]
    near = (centre_distances(boxes, points) < points.strides * RADIUS).logical_and_(valid[..., None])  # (B, G, P)
    candidate = near.any(dim=1)
    iou = pairwise_iou(boxes, predicted)
    cost = class_cost(class_logits, objectness_logits, labels)
    cost.add_(iou.add(EPSILON).log_(), alpha=-IOU_WEIGHT).add_(~near, alpha=FAR_COST)
    usable = candidate[:, None] & valid[..., None]
    cost.masked_fill_(~usable, torch.inf)

    most = min(MOST, iou.shape[-1])
    count = (iou * candidate[:, None]).topk(most, dim=-1).values.sum(dim=-1).long().clamp_(1, most)
    taken = take_cheapest(cost, count, most).logical_and_(usable)
    cheapest = cost.min(dim=1).indices  # (B, P); the first of equals
    times = taken.sum(dim=1)
    first = taken.byte().max(dim=1).indices  # the only one where times is 1
    positive = times > 0
    gt = torch.where(times > 1, cheapest, first)
    return take_quality(positive, gt, iou)


def class_cost(class_logits: Tensor, objectness_logits: Tensor | None, labels: Tensor) -> Tensor:
    """Sum over the classes of BCE(q, one-hot of the label), (B, G, P), without a tensor over boxes and classes.

    The sum is -log(1 - q) of all classes, with that of the label replaced by -log(q).
    """
    q = class_logits.sigmoid()
    if objectness_logits is not None:
        q = q.mul_(objectness_logits.sigmoid()[..., None]).sqrt_()
    absent, present = q.neg().log1p_().clamp_(min=LEAST_LOG), q.log().clamp_(min=LEAST_LOG)  # (B, P, C)
    rows = labels.clamp(min=0)[..., None].expand(-1, -1, q.shape[1])
    return (absent - present).transpose(1, 2).gather(1, rows).sub_(absent.sum(dim=-1)[:, None])
