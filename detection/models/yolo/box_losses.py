"""Overlaps that a box loss can be made of (`yolo.box_loss`): the loss is 1 minus the value."""

from collections.abc import Callable

from torch import Tensor

from detection.ops.boxes import (
    complete_iou,
    distance_iou,
    efficient_iou,
    elementwise_iou,
    generalized_iou,
    scylla_iou,
)


def squared_iou(boxes_1_cxcywh: Tensor, boxes_2_cxcywh: Tensor) -> Tensor:
    """Elementwise IoU^2; (..., 4) and (..., 4) to (...).

    Source: PP-YOLO, section 3.2, https://arxiv.org/abs/2007.12099, as in PaddleDetection's `IouLoss(loss_square=True)`.
    """
    return elementwise_iou(boxes_1_cxcywh, boxes_2_cxcywh).square()


# Keys: the choices of `yolo.box_loss`.
OVERLAPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "iou": elementwise_iou,
    "iou_squared": squared_iou,
    "giou": generalized_iou,
    "diou": distance_iou,
    "ciou": complete_iou,
    "eiou": efficient_iou,
    "siou": scylla_iou,
}
