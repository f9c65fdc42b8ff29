"""The loss of EfficientDet and RetinaNet. Formulas: docs/efficientdet.md."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection.contract import AssignedPrediction
from detection.models.efficientdet.anchors import AnchorGrid
from detection.models.efficientdet.assignment import assign
from detection.models.efficientdet.coder import encode
from detection.models.efficientdet.focal_loss import BACKGROUND, IGNORED, focal_loss_sum
from detection.models.levels import flatten_levels, sizes_of


class EfficientDetLoss(nn.Module):
    """Raw outputs and padded targets to the weighted losses "loss_box" and "loss_class".

    class: focal loss of all predictions and classes, summed, divided by N
    box:   Huber loss of the four raw values of positives, summed, divided by 4 N

    N is the number of positives of the micro-batch plus one. Every micro-batch of every process has its own N,
    as in the published training: processes and micro-batches of a step count alike, and their gradients are averaged.

    Args:
        grid: the anchors.
        alpha, gamma, label_smoothing: see `focal_loss_sum`.
        delta: from which difference of raw values on the box loss is linear: e^2 / 2 below, delta * (e - delta / 2)
            above.
        box_weight, class_weight: factors of the two parts.
        positive_iou, background_iou: see `assign`.

    Source: `detection_loss` of `tf2/train_lib.py` of https://github.com/google/automl, folder efficientdet. Differs:
        there a raw box value whose target is exactly 0 has no loss; here those of all positives have.
    """

    def __init__(
        self,
        grid: AnchorGrid,
        alpha: float = 0.25,
        gamma: float = 1.5,
        delta: float = 0.1,
        box_weight: float = 50.0,
        class_weight: float = 1.0,
        label_smoothing: float = 0.0,
        positive_iou: float = 0.5,
        background_iou: float = 0.5,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.focal = (alpha, gamma, label_smoothing)
        self.delta = delta
        self.box_weight, self.class_weight = box_weight, class_weight
        self.thresholds = (positive_iou, background_iou)

    def forward(self, outputs: Sequence[Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the weighted losses, in float32 also under autocast.

        Args:
            outputs: raw values per level, stride ascending, (B, A, H, W, 4 + C), any float type.
            targets: "boxes" (B, G, 4) xyxy in pixels of the network input, "labels" (B, G): class, -1 padding,
                -2 crowd.

        Returns:
            Float32 scalars.
        """
        with torch.autocast(device_type=outputs[0].device.type, enabled=False):
            anchors = self.grid.anchors(sizes_of(outputs), outputs[0].device)
            boxes, labels = targets["boxes"].float(), targets["labels"]
            assignment = assign(anchors.xyxy, boxes, labels, *self.thresholds)
            positive = assignment.positive
            if labels.shape[1]:
                # Negatives get their own anchor, so that nothing of theirs is infinite.
                wanted = boxes.gather(1, assignment.gt[..., None].expand(-1, -1, 4))
                wanted = torch.where(positive[..., None], wanted, anchors.xyxy)
                label = labels.gather(1, assignment.gt)
            else:
                wanted, label = anchors.xyxy.expand(len(labels), -1, 4), assignment.gt
            without = torch.where(assignment.background, BACKGROUND, IGNORED)
            classes = torch.where(positive, label, without)

            raw = flatten_levels(outputs)
            # Selected before the loss: whatever a negative's value is, its gradient is 0.
            difference = raw[..., :4].float() - encode(wanted, anchors.cxcywh)
            difference = torch.where(positive[..., None], difference, 0.0)
            loss_box = F.huber_loss(difference, torch.zeros_like(difference), reduction="sum", delta=self.delta)
            loss_class = focal_loss_sum(raw[..., 4:], classes, *self.focal)
            count = positive.sum().float() + 1
            return {
                "loss_box": loss_box * (self.box_weight / 4) / count,
                "loss_class": loss_class * self.class_weight / count,
            }

    def assigned_predictions(self, boxes: Tensor, labels: Tensor, size: int) -> list[AssignedPrediction]:
        """List the positives by image, ground-truth box, level, row, column and anchor.

        Args:
            boxes, labels: as in `forward`.
            size: side of the network input in pixels.
        """
        sizes = [(size // stride, size // stride) for stride in self.grid.strides]
        anchors = self.grid.anchors(sizes, boxes.device)
        assignment = assign(anchors.xyxy, boxes.float(), labels, *self.thresholds)
        counts = [rows * columns * len(shapes) for (rows, columns), shapes in zip(sizes, self.grid.shapes, strict=True)]
        starts = np.cumsum([0, *counts])
        found = []
        for image, place in assignment.positive.nonzero().tolist():
            level = int(np.searchsorted(starts, place, side="right")) - 1
            shapes = self.grid.shapes[level]
            cell, anchor = divmod(place - int(starts[level]), len(shapes))
            row, column = divmod(cell, sizes[level][1])
            gt, stride = int(assignment.gt[image, place]), self.grid.strides[level]
            found.append(AssignedPrediction(image, gt, level, stride, anchor, shapes[anchor], column, row, False))
        return sorted(found, key=lambda one: (one.image, one.gt, one.level, one.row, one.column, one.anchor))
