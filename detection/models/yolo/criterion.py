"""Base class and shared functions of the YOLO criteria."""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection.contract import CROWD_LABEL, PADDING_LABEL, Anchors, AssignedPrediction
from detection.models.levels import flatten_levels, sizes_of
from detection.models.yolo.box_coder import encode_boxes
from detection.models.yolo.head_layout import BOX, HeadLayout, num_values
from detection.models.yolo.loss_options import LossOptions
from detection.ops.boxes import box_area, pairwise_intersection, xyxy_to_cxcywh
from detection.runtime.devices import max_chunk_elements

LOSS_NAMES = ("loss_box", "loss_objectness", "loss_class", "loss_iou")  # the last of IoU-aware heads only
IOU_WEIGHT = 1.0  # of `loss_iou`: `IouAwareLoss` of https://github.com/PaddlePaddle/PaddleDetection
MAX_PIECES = 3  # of a batch: each launches about 20 operations


class Criterion(nn.Module):
    """Raw outputs and padded targets to weighted losses; a subclass implements `compute_losses` and `assign`.

    Args:
        anchors: per level (width, height) in pixels of the network input, stride ascending.
        strides: pixels per cell, per level; two levels may have the same.
        ignore_threshold: IoU with a ground-truth box above which a prediction that is not positive has no objectness
            loss; of the decoded prediction or of its prior, see the subclass.
        class_loss: "bce" (multi-label) or "cross_entropy" (softmax over the classes).
        weights: factors of the box, objectness and class loss.
        scales_xy: per level, see `box_coder.decode_cxcywh`; None: 1 everywhere.
        new_coords: likewise; only for criteria with `encodes` False.
        iou_aware: whether the outputs have a predicted IoU, see `head_layout.num_values`.
        options: further choices.
    """

    encodes: ClassVar[bool] = True  # whether raw box values are compared with encoded boxes, which new_coords forbids
    weighs_boxes: ClassVar[bool] = True  # "weights" of the targets are read: docs/contract.md

    def __init__(
        self,
        anchors: Anchors,
        strides: Sequence[int],
        ignore_threshold: float,
        class_loss: Literal["bce", "cross_entropy"] = "bce",
        weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
        scales_xy: Sequence[float] | None = None,
        new_coords: bool = False,
        iou_aware: bool = False,
        options: LossOptions | None = None,
    ) -> None:
        super().__init__()
        self.layout = HeadLayout(anchors, strides, scales_xy, new_coords, iou_aware)
        self.options = options or LossOptions()
        self.ignore_threshold = ignore_threshold
        self.class_loss = class_loss
        self.weights = weights

    def forward(self, outputs: Sequence[Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the weighted losses, in float32 also under autocast.

        Args:
            outputs: raw logits per level, (B, A, H, W, 5 + C), any float type.
            targets: "boxes" (B, G, 4) xyxy in pixels of the network input, "labels" (B, G): class, -1 padding,
                -2 crowd; optional "weights" (B, G): share of a box in a mixed image, a factor of what its positives
                contribute.

        Returns:
            "loss_box", "loss_objectness", "loss_class" and, of an IoU-aware head, "loss_iou": float32 scalars.
        """
        sizes = sizes_of(outputs)
        boxes, labels, shares = targets["boxes"].float(), targets["labels"], targets.get("weights")
        if not labels.shape[1]:  # reductions need at least one row
            boxes, labels = F.pad(boxes, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=PADDING_LABEL)
            shares = None
        with torch.autocast(device_type=outputs[0].device.type, enabled=False):
            losses = self.compute_losses(flatten_levels(outputs).float(), sizes, boxes, labels, shares)
        # Without a predicted IoU there are three losses.
        return {name: loss * weight for name, loss, weight in zip(LOSS_NAMES, losses, self.factors, strict=False)}

    @property
    def factors(self) -> tuple[float, float, float, float]:
        """Of the losses, in the order of `LOSS_NAMES`."""
        return (*self.weights, IOU_WEIGHT)

    def compute_losses(
        self,
        raw: Tensor,
        sizes: Sequence[tuple[int, int]],
        boxes: Tensor,
        labels: Tensor,
        shares: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Compute the box, objectness and class loss, with an IoU-aware head the loss of the IoU; unweighted.

        Args:
            raw: logits of all predictions in the order of `grid.flatten_levels`, (B, P, 5 + C) float32.
            sizes: (rows, columns) per level.
            boxes, labels: as in `forward`.
            shares: its "weights"; None: all 1.
        """
        raise NotImplementedError

    def assign(
        self, boxes: Tensor, labels: Tensor, sizes: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Assign ground-truth boxes to predictions; N pairs per image.

        Args:
            boxes, labels: as in `forward`.
            sizes: (rows, columns) per level.

        Returns:
            Whether the pair is positive, bool; flat index of the prediction; row of the ground-truth box; whether a
            later ground-truth box of the same prediction gives its box target, bool; all (B, N).
        """
        raise NotImplementedError

    def assigned_predictions(self, boxes: Tensor, labels: Tensor, size: int) -> list[AssignedPrediction]:
        """List the positive pairs of `assign` by image, ground-truth box, level and anchor.

        Args:
            size: side of the network input in pixels.
        """
        layout = self.layout
        sizes = [(size // stride, size // stride) for stride in layout.strides]
        positive, index, gt, overruled = self.assign(boxes, labels, sizes)
        levels = zip(layout.anchors, sizes, strict=True)
        starts = np.cumsum([0, *(len(anchors) * rows * columns for anchors, (rows, columns) in levels)])
        pairs = []
        for image, place in positive.nonzero().tolist():
            flat = int(index[image, place])
            level = int(np.searchsorted(starts, flat, side="right")) - 1
            anchors, stride = layout.anchors[level], layout.strides[level]
            cell, anchor = divmod(flat - int(starts[level]), len(anchors))  # the anchor varies fastest
            row, column = divmod(cell, size // stride)
            width, height = anchors[anchor].tolist()
            pairs.append(
                AssignedPrediction(
                    image,
                    int(gt[image, place]),
                    level,
                    stride,
                    anchor,
                    (width, height),
                    column,
                    row,
                    bool(overruled[image, place]),
                )
            )
        return sorted(pairs, key=lambda pair: (pair.image, pair.gt, pair.level, pair.anchor))

    @torch.no_grad()
    def lowest_losses(self, targets: dict[str, Tensor], size: int) -> dict[str, float]:
        """Return what is left of the box loss when every assigned prediction is its ground-truth box exactly.

        Not 0 where centres are compared by cross-entropy: it is then the entropy of their offsets in the cells. Of the
        other losses only that of smoothed classes has a floor, which depends on their number and is not returned.

        Args:
            targets: as in `forward`.
            size: side of the network input in pixels.
        """
        boxes, labels = targets["boxes"].float(), targets["labels"]
        sizes = [(size // stride, size // stride) for stride in self.layout.strides]
        positive, index, gt, overruled = self.assign(boxes, labels, sizes)
        images, places = (positive & ~overruled).nonzero(as_tuple=True)
        flat = index[images, places]
        predictions = self.layout.tables(sizes).predictions
        cells, anchors, stride, scale_xy = predictions[flat].split([2, 2, 1, 1], dim=-1)
        wanted = xyxy_to_cxcywh(boxes[images, gt[images, places]])
        xy, wh = encode_boxes(wanted, anchors, cells, stride[:, 0], scale_xy, self.layout.new_coords)
        num_classes = max(int(labels.max()), 0) + 1
        raw = predictions.new_zeros(len(boxes), len(predictions), num_values(num_classes, self.layout.iou_aware))
        raw[images, flat, BOX] = torch.cat([xy.logit(eps=1e-6), wh], dim=-1)
        loss_box, *_ = self.compute_losses(raw, sizes, boxes, labels, targets.get("weights"))
        return {LOSS_NAMES[0]: float(loss_box) * self.weights[0]}

    def compare_classes(self, logits: Tensor, one_hot: Tensor, labels: Tensor) -> Tensor:
        """Class loss of each prediction, (B, N).

        Args:
            logits: (B, N, C).
            one_hot: the target of "bce", (B, N, C).
            labels: the target of "cross_entropy", (B, N) int64, 0 or more.
        """
        if self.class_loss == "bce":
            if smoothing := self.options.smoothing(logits.shape[-1]):
                one_hot = one_hot * (1 - 2 * smoothing) + smoothing
            return F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none").sum(-1)
        return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


def mark_positives(index: Tensor, positive: Tensor, predictions: int, values: Tensor | float = 1.0) -> Tensor:
    """Return 1, or the values, for positive predictions and 0 for the others, (B, P) float32.

    Args:
        index: flat indices of predictions, (B, N).
        positive: which of them are positive, (B, N) bool; each prediction at most once if there are values.
        predictions: P.
        values: of the N predictions, (B, N) float32.
    """
    # The others write to one extra slot, so that shapes stay static.
    slot = torch.where(positive, index, predictions)
    return torch.zeros(len(index), predictions + 1, device=index.device).scatter_(1, slot, values)[:, :-1]


def compare_objectness(
    logits: Tensor, positive: Tensor, ignored: Tensor, target: Tensor | None = None, shares: Tensor | None = None
) -> Tensor:
    """BCE against the target for positives and 0 for the others that are not ignored; all (B, P), the result too.

    Args:
        positive: 1 or 0.
        target: 0 where not positive; None: 1 for positives.
        shares: factors of the positives; None: 1.
    """
    counted = torch.maximum(positive, (~ignored).float())
    if shares is not None:
        counted = torch.where(positive > 0, shares, counted)
    target = positive if target is None else target
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none") * counted


@torch.no_grad()
def ignored_predictions(predicted: Tensor, boxes: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Return which predictions overlap a ground-truth box too much to count as background.

    The overlap is the IoU or, for a crowd region, intersection over the prediction's area, as in the COCO evaluator.

    Args:
        predicted: decoded predictions (x1, y1, x2, y2) in pixels, (B, P, 4) float32.
        boxes: ground-truth boxes, likewise, (B, G, 4).
        labels: class, -1 padding, -2 crowd, (B, G).
        threshold: overlap above which a prediction is ignored.

    Returns:
        (B, P) bool.

    Source: YOLOv3, section 2.1; Darknet compares decoded predictions, not anchors, with the ground-truth boxes.
    """
    # Padding becomes an empty box, which overlaps nothing.
    boxes = boxes * (labels != PADDING_LABEL)[..., None]
    crowd = (labels == CROWD_LABEL)[:, None, :]
    areas = box_area(predicted)[:, :, None], box_area(boxes)[:, None, :]
    values = predicted.shape[1] * boxes.shape[1]  # per image
    pieces = split_batch(values, max_chunk_elements(boxes.device), predicted, boxes, crowd, *areas)
    ignored = [_overlapped(threshold, *piece) for piece in pieces]
    return ignored[0] if len(ignored) == 1 else torch.cat(ignored)


def split_batch(values: int, max_values: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Split tensors along the batch, into at most `MAX_PIECES` pieces, to bound the memory of what is computed of them.

    Args:
        values: number of values computed per image.
        max_values: largest number per piece, exceeded only if `MAX_PIECES` do not suffice.
    """
    images = len(tensors[0])
    pieces = max(min(MAX_PIECES, math.ceil(images * values / max_values)), 1)
    size = math.ceil(images / pieces)
    return [tensors] if pieces == 1 else list(zip(*(tensor.split(size) for tensor in tensors), strict=True))


def _overlapped(
    threshold: float, predicted: Tensor, boxes: Tensor, crowd: Tensor, predicted_area: Tensor, area: Tensor
) -> Tensor:
    """`ignored_predictions` of one piece; (B, P, 4), (B, G, 4), (B, 1, G) bool, (B, P, 1), (B, 1, G) to (B, P)."""
    intersection = pairwise_intersection(predicted, boxes)  # (B, P, G)
    # In place: these are the largest tensors of the loss.
    union = (area - intersection).masked_fill_(crowd, 0).add_(predicted_area)
    # Not intersection / union > threshold: a prediction without area is never ignored.
    return (intersection > union.mul_(threshold)).any(dim=-1)
