"""The YOLOv3 criterion of MMDetection. Formulas: docs/losses.md."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from detection.models.yolo.box_coder import encode_boxes
from detection.models.yolo.criterion import (
    Criterion,
    compare_objectness,
    ignored_predictions,
    mark_positives,
    split_batch,
)
from detection.models.yolo.grid import place_in_cell
from detection.models.yolo.head_layout import BOX, OBJECTNESS
from detection.ops.boxes import cxcywh_to_xyxy, pairwise_iou, xyxy_to_cxcywh

MAX_OVERLAPS = 2**27  # IoUs of ground-truth boxes and priors at once, 512 MiB; 64 images of 512 boxes have as many
WEIGHT_XY, WEIGHT_WH = 2.0, 2.0
EPSILON = 1e-6  # distance of xy targets from 0 and 1, and smallest ratio of ground-truth box and anchor


@dataclass(frozen=True)
class GridAssignment:
    """The predictions of all anchors in the cells of all ground-truth boxes, N = G * all anchors.

    Shapes (B, N) unless stated. Ground-truth boxes in one cell repeat its predictions; each is positive at most once.
    """

    positive: Tensor  # bool
    index: Tensor  # int64: flat index of the prediction in the order of `grid.flatten_levels`
    gt: Tensor  # int64: row of the assigned ground-truth box; 0 where not positive
    anchor: Tensor  # (B, N, 2) float32: (width, height), pixels
    cell: Tensor  # (B, N, 2) float32: (column, row)
    stride: Tensor  # float32: pixels per cell
    scale_xy: Tensor  # float32: of the level, see `box_coder.decode_cxcywh`


@torch.no_grad()
def assign_by_grid(boxes: Tensor, labels: Tensor, table: Tensor, threshold: float) -> GridAssignment:
    """Assign ground-truth boxes to the priors in the cells of their centres, on every level, by IoU.

    A prior is an anchor centred in its cell. It is assigned, rule 2 before rule 1:
    1. to the ground-truth box of highest IoU (the first of equals), if the IoU exceeds the threshold;
    2. to the last ground-truth box for which it is the best prior (any of equals) with an IoU above 0.
    Both consider the priors in the cells of all ground-truth boxes of the image, so a box may be assigned to a prior in
    the cell of another.

    Static shapes and no host synchronisation. Padding and crowd regions are never assigned.

    Args:
        boxes: (x1, y1, x2, y2) in pixels of the network input, (B, G, 4) float32.
        labels: class, -1 padding, -2 crowd, (B, G).
        table: `grid.anchor_table`, (all anchors, 9).
        threshold: IoU of rule 1.

    Source: GridAssigner of https://github.com/open-mmlab/mmdetection
    """
    batch_size, num_gt = labels.shape
    shape = (batch_size, num_gt * len(table))  # (B, N)
    valid = labels >= 0
    # Empty boxes overlap nothing; valid ones have a size.
    boxes = boxes * valid[..., None]
    centres = xyxy_to_cxcywh(boxes)[:, :, None, :2].expand(-1, -1, len(table), -1).reshape(*shape, 2)
    available = valid[..., None].expand(-1, -1, len(table)).reshape(shape)
    rows = table.repeat(num_gt, 1).expand(batch_size, -1, -1)  # (B, N, 9)
    index, cell = place_in_cell(centres, rows)
    anchor, stride, _, scale_xy = rows.split([2, 1, 5, 1], dim=-1)
    priors = cxcywh_to_xyxy(torch.cat([(cell + 0.5) * stride, anchor], dim=-1))  # (B, N, 4)

    pieces = split_batch(num_gt * shape[1], MAX_OVERLAPS, boxes, priors, available)
    best_iou, best_gt, claimed_by = (
        torch.cat(parts) if len(parts) > 1 else parts[0]
        for parts in zip(*itertools.starmap(_compare, pieces), strict=True)
    )
    claimed = claimed_by >= 0
    repeated = _repeated(index.view(batch_size, num_gt, -1), valid)
    positive = (claimed | (best_iou > threshold)) & ~repeated
    gt = torch.where(positive, torch.where(claimed, claimed_by, best_gt), 0)
    return GridAssignment(positive, index, gt, anchor, cell, stride[..., 0], scale_xy[..., 0])


class MMDetectionLoss(Criterion):
    """The loss of MMDetection's YOLOv3 configurations, summed over the micro-batch without normalisation.

    2 * BCE(xy) + 2 * (t_wh - raw_wh)^2 + BCE(objectness) + BCE(class)

    Positives: see `assign_by_grid`. Negatives depend on the priors, not on the predictions: those without an IoU above
    `ignore_threshold` with a ground-truth box. It is the threshold of positives too (MMDetection: 0.5 for both).
    Arguments: see `Criterion`.

    Differs from MMDetection: priors with more than the threshold of their area in a crowd region are ignored, and a
    centre on the right or lower border belongs to the last cell.

    Source: YOLOV3Head, YOLOBBoxCoder and configs/yolo of https://github.com/open-mmlab/mmdetection
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
        batch_size, predictions, values = raw.shape
        tables = self.layout.tables(sizes)
        grid = assign_by_grid(boxes, labels, tables.anchors, self.ignore_threshold)
        positive_raw = raw.gather(1, grid.index[..., None].expand(-1, -1, values))  # (B, N, 5 + C)

        boxes_of_gt = boxes.gather(1, grid.gt[..., None].expand(-1, -1, 4))  # (B, N, 4)
        counted = grid.positive if shares is None else grid.positive * shares.gather(1, grid.gt)
        loss_box = (self._compare_boxes(positive_raw[..., BOX], boxes_of_gt, grid) * counted).sum()

        cells, anchors, stride, _ = tables.predictions.split([2, 2, 1, 1], dim=-1)
        priors = cxcywh_to_xyxy(torch.cat([(cells + 0.5) * stride, anchors], dim=-1))
        ignored = ignored_predictions(priors.expand(batch_size, -1, -1), boxes, labels, self.ignore_threshold)
        positive = mark_positives(grid.index, grid.positive, predictions)
        share = None if shares is None else mark_positives(grid.index, grid.positive, predictions, counted)
        loss_objectness = compare_objectness(raw[..., OBJECTNESS], positive, ignored, shares=share).sum()

        class_logits = positive_raw[..., self.layout.classes]  # (B, N, C)
        classes = labels.clamp(min=0).gather(1, grid.gt)  # (B, N)
        one_hot = torch.zeros_like(class_logits).scatter_(2, classes[..., None], 1.0)
        loss_class = (self.compare_classes(class_logits, one_hot, classes) * counted).sum()
        return loss_box, loss_objectness, loss_class

    def assign(
        self, boxes: Tensor, labels: Tensor, sizes: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `Criterion.assign`."""
        grid = assign_by_grid(boxes, labels, self.layout.tables(sizes).anchors, self.ignore_threshold)
        return grid.positive, grid.index, grid.gt, torch.zeros_like(grid.positive)

    @staticmethod
    def _compare_boxes(raw: Tensor, boxes: Tensor, grid: GridAssignment) -> Tensor:
        """Box loss; raw (B, N, 4) and ground-truth boxes (B, N, 4) xyxy to (B, N)."""
        boxes_cxcywh = xyxy_to_cxcywh(boxes)
        # As in MMDetection; also keeps the logarithm of padding finite.
        size = torch.maximum(boxes_cxcywh[..., 2:], grid.anchor * EPSILON)
        target_xy, target_wh = encode_boxes(
            torch.cat([boxes_cxcywh[..., :2], size], dim=-1),
            grid.anchor,
            grid.cell,
            grid.stride,
            grid.scale_xy[..., None],
        )
        target_xy = target_xy.clamp(EPSILON, 1 - EPSILON)
        loss_xy = F.binary_cross_entropy_with_logits(raw[..., :2], target_xy, reduction="none").sum(-1)
        loss_wh = (target_wh - raw[..., 2:]).square().sum(-1)
        return WEIGHT_XY * loss_xy + WEIGHT_WH * loss_wh


def _compare(boxes: Tensor, priors: Tensor, available: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Match ground-truth boxes (B, G, 4) and priors (B, N, 4), of which `available` (B, N) bool count.

    Returns:
        IoU and row of each prior's best ground-truth box, the first of equals; row of the last ground-truth box for
        which it is the best prior, -1 for none; each (B, N).
    """
    iou = pairwise_iou(boxes, priors).mul_(available[:, None])  # (B, G, N)
    claims = (iou == iou.amax(dim=2, keepdim=True)) & (iou > 0)
    numbers = torch.arange(boxes.shape[1], device=boxes.device)[:, None]
    return *iou.max(dim=1), torch.where(claims, numbers, -1).amax(dim=1)


def _repeated(index: Tensor, valid: Tensor) -> Tensor:
    """Return which indices an earlier ground-truth box has too; (B, G, all anchors), (B, G) bool to (B, N) bool."""
    index = index.transpose(1, 2)  # (B, all anchors, G)
    same = (index[..., :, None] == index[..., None, :]) & valid[:, None, None, :]
    return same.tril(diagonal=-1).any(dim=-1).transpose(1, 2).flatten(1)
