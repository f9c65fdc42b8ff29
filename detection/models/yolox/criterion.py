"""Criteria of anchor-free detectors. Formulas: docs/losses.md."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection.contract import CROWD_LABEL, PADDING_LABEL, AssignedPrediction
from detection.models.levels import sizes_of
from detection.models.yolo.criterion import compare_objectness, ignored_predictions
from detection.models.yolox.assigners import Assigner, Assignment
from detection.models.yolox.layout import Decoding, OutputLayout, RawValues
from detection.models.yolox.points import Points
from detection.ops.boxes import elementwise_iou, xyxy_to_cxcywh

EPSILON = 1e-8  # strides, added to sides before their logarithm, as in YOLOX
CROWD_OVERLAP = 0.5  # share of a prediction in a crowd region from which it is no negative


class Matched(NamedTuple):
    """Predictions, ground truth and which belongs to which."""

    raw: RawValues
    points: Points
    predicted: Tensor  # (B, P, 4) xyxy in pixels of the network input, with gradient
    boxes: Tensor  # ground truth, likewise, (B, G, 4) float32, G at least 1
    labels: Tensor  # (B, G): class, -1 padding, -2 crowd
    assignment: Assignment

    def wanted(self) -> Tensor:
        """Ground-truth boxes of the positives, (B, P, 4); negatives get their own: nothing of theirs is infinite."""
        boxes = self.boxes.gather(1, self.assignment.gt[..., None].expand(-1, -1, 4))
        return torch.where(self.assignment.positive[..., None], boxes, self.predicted.detach())

    def class_targets(self) -> Tensor:
        """One-hot classes of the positives times their quality, (B, P, C); 0 for negatives."""
        classes = self.labels.clamp(min=0).gather(1, self.assignment.gt)[..., None]
        return torch.zeros_like(self.raw.classes).scatter_(2, classes, self.assignment.quality[..., None])

    def in_crowds(self) -> Tensor:
        """Whether more than `CROWD_OVERLAP` of a prediction lies in a crowd region, (B, P) bool."""
        crowds = torch.where(self.labels == CROWD_LABEL, self.labels, PADDING_LABEL)
        return ignored_predictions(self.predicted.detach(), self.boxes, crowds, CROWD_OVERLAP)


class PointCriterion(nn.Module):
    """Raw outputs and padded targets to weighted losses; a subclass implements `compute_losses`.

    Args:
        layout: of the raw values.
        strides: pixels per cell, per level, ascending.
        assigner: which predictions answer for which boxes.
    """

    def __init__(self, layout: OutputLayout, strides: Sequence[int], assigner: Assigner) -> None:
        super().__init__()
        self.decoding = Decoding(layout, strides)
        self.assigner = assigner
        self.finishing = False

    def set_progress(self, share_done: float, finishing: bool) -> None:
        """Say where the run is, before each step; a subclass may depend on it.

        Args:
            share_done: of the steps of the run, 0..1.
            finishing: the clean finish has begun (`train.clean_finish`).
        """
        self.finishing = finishing

    def forward(self, outputs: Sequence[Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the weighted losses, in float32 also under autocast.

        Args:
            outputs: raw values per level, (B, 1, H, W, X), any float type.
            targets: "boxes" (B, G, 4) xyxy in pixels of the network input, "labels" (B, G): class, -1 padding,
                -2 crowd.

        Returns:
            Float32 scalars, always of the same names.
        """
        with torch.autocast(device_type=outputs[0].device.type, enabled=False):
            return self.compute_losses(self.assign(outputs, targets["boxes"], targets["labels"]))

    def assign(self, outputs: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Matched:
        """Decode the predictions and assign the ground-truth boxes to them; arguments as in `forward`."""
        boxes = boxes.float()
        if not labels.shape[1]:  # reductions need at least one row
            boxes, labels = F.pad(boxes, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=PADDING_LABEL)
        raw, points = self.decoding.read(outputs)
        predicted = self.decoding.boxes(raw.boxes, points)
        objectness = None if raw.objectness is None else raw.objectness.detach()
        assignment = self.assigner(raw.classes.detach(), objectness, predicted.detach(), boxes, labels, points)
        return Matched(raw, points, predicted, boxes, labels, assignment)

    def compute_losses(self, matched: Matched) -> dict[str, Tensor]:
        """Compute the weighted losses."""
        raise NotImplementedError

    @torch.no_grad()
    def assigned_by_outputs(self, outputs: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> list[AssignedPrediction]:
        """List the positive predictions by image, ground-truth box, level, row and column.

        Args:
            outputs, boxes, labels: as in `forward`.
        """
        sizes = sizes_of(outputs)
        with torch.autocast(device_type=outputs[0].device.type, enabled=False):
            assignment = self.assign(outputs, boxes, labels).assignment
        starts = np.cumsum([0, *(rows * columns for rows, columns in sizes)])
        found = []
        for image, point in assignment.positive.nonzero().tolist():
            level = int(np.searchsorted(starts, point, side="right")) - 1
            row, column = divmod(point - int(starts[level]), sizes[level][1])
            gt, stride = int(assignment.gt[image, point]), self.decoding.strides[level]
            found.append(AssignedPrediction(image, gt, level, stride, 0, None, column, row, False))
        return sorted(found, key=lambda one: (one.image, one.gt, one.level, one.row, one.column))


class YOLOXLoss(PointCriterion):
    """The loss of YOLOX, divided by the number of positive predictions of the micro-batch.

    5 * (1 - IoU^2) + BCE(class, one-hot * IoU) of positives, BCE(objectness) of all; + L1 of the raw box values of
    positives while the run is finishing. A negative with more than half of its area in a crowd region has no
    objectness loss.

    Every micro-batch of every process is divided by its own number of positives (at least 1), as in YOLOX: processes
    and micro-batches of a step count alike, and their gradients are averaged.

    Args:
        layout, strides, assigner: see `PointCriterion`; the layout has objectness and four values per box.
        weights: factors of the box, objectness, class and L1 loss.

    Source: YOLOX, sections 2.1 and 2.3, https://arxiv.org/abs/2107.08430; `get_losses` of
        https://github.com/Megvii-BaseDetection/YOLOX; crowd regions: ours.
    """

    def __init__(
        self,
        layout: OutputLayout,
        strides: Sequence[int],
        assigner: Assigner,
        weights: tuple[float, float, float, float] = (5.0, 1.0, 1.0, 1.0),
    ) -> None:
        super().__init__(layout, strides, assigner)
        self.weights = weights

    def compute_losses(self, matched: Matched) -> dict[str, Tensor]:
        """See `PointCriterion.compute_losses`."""
        raw = matched.raw
        assert raw.objectness is not None, "the layout has objectness"
        positive = matched.assignment.positive.float()
        count = positive.sum().clamp(min=1)
        wanted_cxcywh = xyxy_to_cxcywh(matched.wanted())
        iou = elementwise_iou(xyxy_to_cxcywh(matched.predicted), wanted_cxcywh)
        loss_box = ((1 - iou.square()) * positive).sum()
        loss_objectness = compare_objectness(raw.objectness, positive, matched.in_crowds()).sum()
        loss_class = F.binary_cross_entropy_with_logits(
            raw.classes, matched.class_targets(), positive[..., None], reduction="sum"
        )

        losses = {"loss_box": loss_box, "loss_objectness": loss_objectness, "loss_class": loss_class}
        losses["loss_l1"] = loss_box.new_zeros(())
        if self.finishing:
            losses["loss_l1"] = self.compare_raw(raw.boxes, wanted_cxcywh, matched.points, positive)
        return {name: loss * weight / count for (name, loss), weight in zip(losses.items(), self.weights, strict=True)}

    @staticmethod
    def compare_raw(raw: Tensor, wanted_cxcywh: Tensor, points: Points, positive: Tensor) -> Tensor:
        """L1 distance of raw box values (B, P, 4) of positives (B, P) from those of boxes (B, P, 4), summed."""
        strides = points.strides[:, None]
        offset = (wanted_cxcywh[..., :2] - points.centres) / strides + 0.5  # from the corner of the cell
        size = (wanted_cxcywh[..., 2:] / strides + EPSILON).log()
        target = torch.cat([offset, size], dim=-1)
        return ((raw - target).abs().sum(-1) * positive).sum()
