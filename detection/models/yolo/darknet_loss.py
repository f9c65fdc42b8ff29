"""The criterion of Darknet and its variants with IoU losses. Formulas: docs/losses.md."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from detection.models.yolo.box_coder import decode_cxcywh, encode_boxes
from detection.models.yolo.criterion import Criterion, compare_objectness, ignored_predictions, mark_positives
from detection.models.yolo.grid import place_in_cell
from detection.models.yolo.head_layout import BOX, IOU, OBJECTNESS
from detection.ops.boxes import complete_iou, elementwise_iou, generalized_iou, pairwise_wh_iou, xyxy_to_cxcywh

MAX_EXPONENT = 10.0  # boxes of 1/22026 to 22026 anchors: beyond any ground-truth box, where the IoU has no gradient


@dataclass(frozen=True)
class Assignment:
    """The positive prediction of every ground-truth box; shapes (B, G) unless stated."""

    valid: Tensor  # bool: false for padding and crowd regions
    index: Tensor  # int64: flat index of the prediction in the order of `grid.flatten_levels`; 0 where not valid
    anchor: Tensor  # (B, G, 2) float32: (width, height) of the assigned anchor, pixels
    cell: Tensor  # (B, G, 2) float32: (column, row)
    stride: Tensor  # float32: pixels per cell
    scale_xy: Tensor  # float32: of the level, see `box_coder.decode_cxcywh`
    last: Tensor  # bool: valid, and no later box of the image has the same index; this one gives the box target
    final: Tensor  # int64: row of the last valid box of the image with the same index; its own row where not valid


def assign_targets(boxes: Tensor, labels: Tensor, table: Tensor) -> Assignment:
    """Assign each ground-truth box to the anchor of highest width-height IoU, of all levels, in the cell of its centre.

    Of equal anchors the first, as in Darknet. Static shapes, no host synchronisation: padding is computed and masked.

    Args:
        boxes: (x1, y1, x2, y2) in pixels of the network input, (B, G, 4) float32.
        labels: class, -1 padding, -2 crowd, (B, G).
        table: `grid.anchor_table`, (all anchors, 9).

    Source: YOLOv3, section 2.1; Darknet's yolo layer (best anchor by width-height IoU over the whole list).
    """
    boxes_cxcywh = xyxy_to_cxcywh(boxes)
    # Of equals the first, as `argmax`, which is slower.
    number = pairwise_wh_iou(boxes_cxcywh[..., 2:], table[:, :2]).max(dim=-1).indices
    best = table[number]  # (B, G, 9)
    index, cell = place_in_cell(boxes_cxcywh[..., :2], best)
    valid = labels >= 0

    numbers = torch.arange(labels.shape[1], device=labels.device)
    # Padding and crowd regions get unique keys, so they never collide. The stable sort puts the last box of a key last.
    key = torch.where(valid, index, -1 - numbers)
    ascending, order = key.sort(dim=-1, stable=True)
    final = order.gather(-1, torch.searchsorted(ascending, key, right=True) - 1)
    return Assignment(
        valid,
        key.clamp(min=0),
        best[..., :2],
        cell,
        best[..., 2],
        best[..., 8],
        valid & (final == numbers),
        final,
    )


class DarknetLoss(Criterion):
    """The loss whose gradients Darknet computes for YOLOv3, summed per image, averaged over the batch.

    s * BCE(xy) + s/2 * (t_wh - raw_wh)^2 + BCE(objectness) + BCE(class), s = 2 - w*h with w, h relative to the input

    If ground-truth boxes share an anchor and cell, the last one gives the box target and the class targets are united
    (with "cross_entropy" the last one gives the class too). The dataset orders them by descending area, then annotation
    id, whatever their order in the annotation file. Other predictions whose decoded box has an IoU above
    `ignore_threshold` with a ground-truth box have no objectness loss. Positives of a box with a share ("weights" of
    the targets) contribute that share. Arguments: see `Criterion`.

    Source: YOLOv3, section 2.1 and 2.2, https://arxiv.org/abs/1804.02767; gradients of Darknet's yolo layer.
    """

    def compute_losses(
        self,
        raw: Tensor,
        sizes: Sequence[tuple[int, int]],
        boxes: Tensor,
        labels: Tensor,
        shares: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """See `Criterion.compute_losses`."""
        input_area = sizes[0][0] * sizes[0][1] * self.layout.strides[0] ** 2  # pixels
        batch_size, predictions, values = raw.shape
        assigned = assign_targets(boxes, labels, self.layout.tables(sizes).anchors)
        positive_raw = raw.gather(1, assigned.index[..., None].expand(-1, -1, values))  # (B, G, 5 + C)

        boxes_cxcywh = xyxy_to_cxcywh(boxes)
        # Padding has no size; 1 keeps its logarithm finite.
        boxes_cxcywh = torch.where(assigned.valid[..., None], boxes_cxcywh, 1.0)
        scale = 2 - boxes_cxcywh[..., 2:].prod(-1) / input_area  # (B, G)
        counted = assigned.last if shares is None else assigned.last * shares
        loss_box = (scale * self.compare_boxes(positive_raw[..., BOX], boxes_cxcywh, assigned) * counted).sum()

        decoded = self.layout.decode(raw.detach(), sizes)
        ignored = ignored_predictions(decoded, boxes, labels, self.ignore_threshold)
        positive = mark_positives(assigned.index, assigned.valid, predictions)
        share = None if shares is None else mark_positives(assigned.index, assigned.last, predictions, counted)
        iou = target = None
        if self.layout.iou_aware or self.options.objectness_target == "iou":
            iou = elementwise_iou(self.decode_assigned(positive_raw[..., BOX].detach(), assigned), boxes_cxcywh)
        if iou is not None and self.options.objectness_target == "iou":
            target = mark_positives(assigned.index, assigned.last, predictions, iou)
        loss_objectness = compare_objectness(raw[..., OBJECTNESS], positive, ignored, target, share).sum()

        class_logits = positive_raw[..., self.layout.classes]  # (B, G, C)
        classes = labels.clamp(min=0)
        # Unites the classes of all boxes of a prediction in the row of the last one. Not F.one_hot, which reads the
        # labels back to the host to check them, except on CUDA.
        place = assigned.final * class_logits.shape[-1] + classes
        united = torch.zeros_like(class_logits).flatten(1).scatter_(1, place, 1.0).view_as(class_logits)
        loss_class = (self.compare_classes(class_logits, united, classes) * counted).sum()
        losses = [loss_box, loss_objectness, loss_class]
        if iou is not None and self.layout.iou_aware:
            loss_iou = F.binary_cross_entropy_with_logits(positive_raw[..., IOU], iou, reduction="none")
            losses.append((loss_iou * counted).sum())
        return tuple(loss / batch_size for loss in losses)

    def assign(
        self, boxes: Tensor, labels: Tensor, sizes: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `Criterion.assign`."""
        assigned = assign_targets(boxes, labels, self.layout.tables(sizes).anchors)
        rows = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
        return assigned.valid, assigned.index, rows, ~assigned.last

    def compare_boxes(self, raw: Tensor, boxes_cxcywh: Tensor, assigned: Assignment) -> Tensor:
        """Box loss of each ground-truth box before the factor s, (B, G); finite for padding too.

        Args:
            raw: box values of the assigned predictions, (B, G, 4).
            boxes_cxcywh: ground-truth boxes in pixels of the network input, (B, G, 4).
            assigned: their assignment.
        """
        target_xy, target_wh = encode_boxes(
            boxes_cxcywh, assigned.anchor, assigned.cell, assigned.stride, assigned.scale_xy[..., None]
        )
        loss_xy = F.binary_cross_entropy_with_logits(raw[..., :2], target_xy, reduction="none").sum(-1)
        loss_wh = (target_wh - raw[..., 2:4]).square().sum(-1) / 2
        return loss_xy + loss_wh

    def decode_assigned(self, raw: Tensor, assigned: Assignment) -> Tensor:
        """Decode the assigned predictions, (B, G, 4) to (B, G, 4) cxcywh in pixels; differentiable, never infinite."""
        raw = bound_sizes(raw)
        stride, scale_xy = assigned.stride[..., None], assigned.scale_xy[..., None]
        return decode_cxcywh(raw, assigned.anchor, assigned.cell, stride, scale_xy, self.layout.new_coords)


class GIoULoss(DarknetLoss):
    """`DarknetLoss` with s * (1 - GIoU) of the decoded box as box loss.

    Source: https://arxiv.org/abs/1902.09630
    """

    encodes = False

    def compare_boxes(self, raw: Tensor, boxes_cxcywh: Tensor, assigned: Assignment) -> Tensor:
        """See `DarknetLoss.compare_boxes`."""
        return 1 - generalized_iou(self.decode_assigned(raw, assigned), boxes_cxcywh)


class CIoULoss(DarknetLoss):
    """`DarknetLoss` with s * (1 - CIoU) of the decoded box as box loss.

    Source: https://arxiv.org/abs/1911.08287
    """

    encodes = False

    def compare_boxes(self, raw: Tensor, boxes_cxcywh: Tensor, assigned: Assignment) -> Tensor:
        """See `DarknetLoss.compare_boxes`."""
        return 1 - complete_iou(self.decode_assigned(raw, assigned), boxes_cxcywh)


def bound_sizes(raw: Tensor) -> Tensor:
    """Raw box values (..., 4) with sizes whose exponential is finite and, beyond `MAX_EXPONENT`, without gradient."""
    return torch.cat([raw[..., :2], raw[..., 2:4].clamp(-MAX_EXPONENT, MAX_EXPONENT)], dim=-1)
