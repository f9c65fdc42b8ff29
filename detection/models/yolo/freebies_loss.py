"""The criteria of PaddleDetection's YOLOv3 and PP-YOLO. Formulas: docs/losses.md."""

import torch.nn.functional as F
from torch import Tensor

from detection.models.yolo.box_coder import encode_boxes
from detection.models.yolo.box_losses import OVERLAPS
from detection.models.yolo.darknet_loss import Assignment, DarknetLoss

OVERLAP_WEIGHT = 2.5  # `loss_weight` of IouLoss in PaddleDetection's configs/ppyolo
DEFAULT_OVERLAP = "iou_squared"  # its `loss_square`


class FreebiesLoss(DarknetLoss):
    """`DarknetLoss` with the absolute instead of the squared error of raw width and height.

    s * BCE(xy) + s * |t_wh - raw_wh| + BCE(objectness) + BCE(class)

    Source: `YOLOv3Loss` of https://github.com/PaddlePaddle/PaddleDetection, with configs/yolov3 39.1 AP on COCO.
    """

    def compare_boxes(self, raw: Tensor, boxes_cxcywh: Tensor, assigned: Assignment) -> Tensor:
        """See `DarknetLoss.compare_boxes`."""
        target_xy, target_wh = encode_boxes(
            boxes_cxcywh, assigned.anchor, assigned.cell, assigned.stride, assigned.scale_xy[..., None]
        )
        loss_xy = F.binary_cross_entropy_with_logits(raw[..., :2], target_xy, reduction="none").sum(-1)
        return loss_xy + (target_wh - raw[..., 2:4]).abs().sum(-1)


class IoULoss(FreebiesLoss):
    """`FreebiesLoss` with s * 2.5 * (1 - IoU^2) of the decoded box in addition; `options.box_loss`: other overlaps.

    Differs from PP-YOLO: with a grid scale other than 1 the centres are still compared by cross-entropy, with the
    target of `encode_boxes`; there by the absolute error of the offset.

    Source: PP-YOLO, section 3.2, https://arxiv.org/abs/2007.12099, and `configs/ppyolo` of PaddleDetection.
    """

    def compare_boxes(self, raw: Tensor, boxes_cxcywh: Tensor, assigned: Assignment) -> Tensor:
        """See `DarknetLoss.compare_boxes`."""
        overlap = OVERLAPS[self.options.box_loss or DEFAULT_OVERLAP]
        shape = super().compare_boxes(raw, boxes_cxcywh, assigned)
        return shape + OVERLAP_WEIGHT * (1 - overlap(self.decode_assigned(raw, assigned), boxes_cxcywh))
