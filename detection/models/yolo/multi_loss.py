"""A criterion with several positives per ground-truth box. Formulas: docs/losses.md."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from detection.models.yolo.box_coder import decode_cxcywh
from detection.models.yolo.box_losses import OVERLAPS
from detection.models.yolo.criterion import Criterion, compare_objectness, ignored_predictions, mark_positives
from detection.models.yolo.darknet_loss import bound_sizes
from detection.models.yolo.head_layout import BOX, IOU, OBJECTNESS
from detection.models.yolo.multi_assignment import Claims, assign_several
from detection.ops.boxes import elementwise_iou, xyxy_to_cxcywh

DEFAULT_OVERLAP = "ciou"


class MultiLoss(Criterion):
    """1 - CIoU, BCE(objectness) and BCE(class) of every prediction that fits a ground-truth box.

    Positives: see `assign_several`. All sums are divided by the images and by the mean number of positives per assigned
    box, so that the losses keep the size they have with one positive per box, and with it the learning rate of a
    recipe. Predictions whose decoded box has an IoU above `ignore_threshold` with a ground-truth box, and that are not
    positive, have no objectness loss, as in `DarknetLoss`. Arguments: see `Criterion`.

    Source: several anchors per box and CIoU: https://github.com/AlexeyAB/darknet (`iou_thresh`, `iou_loss=ciou`) and
        Scaled-YOLOv4, https://arxiv.org/abs/2011.08036; the division is ours.
    """

    encodes = False

    def compute_losses(
        self,
        raw: Tensor,
        sizes: Sequence[tuple[int, int]],
        boxes: Tensor,
        labels: Tensor,
        shares: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """See `Criterion.compute_losses`."""
        tables, options = self.layout.tables(sizes), self.options
        batch_size, predictions, values = raw.shape
        claims = self._claims(boxes, labels, sizes)
        positive_raw = raw.gather(1, claims.index[..., None].expand(-1, -1, values))  # (B, N, V)
        cells, anchors, stride, scale_xy = tables.predictions[claims.index].split([2, 2, 1, 1], dim=-1)
        # Padding has no size; 1 keeps the overlaps finite.
        boxes_of_gt = torch.where((labels >= 0)[..., None], xyxy_to_cxcywh(boxes), 1.0)
        boxes_of_gt = boxes_of_gt.gather(1, claims.gt[..., None].expand(-1, -1, 4))  # (B, N, 4)
        decoded = decode_cxcywh(
            bound_sizes(positive_raw[..., BOX]), anchors, cells, stride, scale_xy, self.layout.new_coords
        )
        counted = claims.positive.float()
        assigned = torch.zeros_like(labels, dtype=torch.float32).scatter_reduce_(1, claims.gt, counted, "amax")
        divisor = batch_size * (counted.sum() / assigned.sum().clamp(min=1)).clamp(min=1)
        if shares is not None:
            counted = counted * shares.gather(1, claims.gt)

        overlap = OVERLAPS[options.box_loss or DEFAULT_OVERLAP](decoded, boxes_of_gt)
        loss_box = ((1 - overlap) * counted).sum()

        iou = elementwise_iou(decoded.detach(), boxes_of_gt)
        positive = mark_positives(claims.index, claims.positive, predictions)
        target = share = None
        if options.objectness_target == "iou":
            target = mark_positives(claims.index, claims.positive, predictions, iou)
        if shares is not None:
            share = mark_positives(claims.index, claims.positive, predictions, counted)
        ignored = ignored_predictions(self.layout.decode(raw.detach(), sizes), boxes, labels, self.ignore_threshold)
        loss_objectness = compare_objectness(raw[..., OBJECTNESS], positive, ignored, target, share)
        loss_objectness = self._balance(loss_objectness.sum(0), sizes)

        class_logits = positive_raw[..., self.layout.classes]  # (B, N, C)
        classes = labels.clamp(min=0).gather(1, claims.gt)
        one_hot = torch.zeros_like(class_logits).scatter_(2, classes[..., None], 1.0)
        loss_class = (self.compare_classes(class_logits, one_hot, classes) * counted).sum()
        losses = [loss_box, loss_objectness, loss_class]
        if self.layout.iou_aware:
            loss_iou = F.binary_cross_entropy_with_logits(positive_raw[..., IOU], iou, reduction="none")
            losses.append((loss_iou * counted).sum())
        return tuple(loss / divisor for loss in losses)

    def assign(
        self, boxes: Tensor, labels: Tensor, sizes: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `Criterion.assign`."""
        claims = self._claims(boxes, labels, sizes)
        return claims.positive, claims.index, claims.gt, torch.zeros_like(claims.positive)

    def _claims(self, boxes: Tensor, labels: Tensor, sizes: Sequence[tuple[int, int]]) -> Claims:
        tables, options = self.layout.tables(sizes), self.options
        return assign_several(
            boxes,
            labels,
            tables.anchors,
            len(tables.predictions),
            options.anchor_match,
            options.anchor_iou,
            options.anchor_ratio,
            options.neighbour_cells,
        )

    def _balance(self, losses: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Sum the predictions' losses (P,), with `objectness_balance` b as sum over levels of b / sum(b) * P * mean."""
        balance = self.options.objectness_balance
        if balance is None:
            return losses.sum()
        counts = [
            rows * columns * len(anchors) for (rows, columns), anchors in zip(sizes, self.layout.anchors, strict=True)
        ]
        means = [level.mean() for level in losses.split(counts)]
        weighted = sum(weight * mean for weight, mean in zip(balance, means, strict=True))
        return weighted * (len(losses) / sum(balance))
