"""The YOLOv3 criterion of MMDetection. Formula: docs/losses.md."""

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
from detection.models.yolo.head import BOX, CLASSES, OBJECTNESS
from detection.ops.boxes import cxcywh_to_xyxy, pairwise_iou, xyxy_to_cxcywh

# Of ground-truth boxes and priors at once: 512 MiB, reached by 64 images of 512 boxes.
MAX_OVERLAPS = 2**27
WEIGHT_XY, WEIGHT_WH = 2.0, 2.0
SMALLEST = 1e-6  # targets of xy stay this far from 0 and 1; the ratio of ground truth and anchor is at least this


@dataclass(frozen=True)
class GridAssignment:
    """All anchors in the cells of all ground-truth boxes, N = G * all anchors; where ground-truth boxes share a cell, a
    prediction is repeated.

    Shapes (B, N) unless stated. A repeated prediction is positive at most once.
    """

    positive: Tensor  # bool
    index: Tensor  # int64: flat index over all predictions in the order of `anchors.flatten_levels`
    gt: Tensor  # int64: number of the ground truth it learns; 0 where not positive
    anchor: Tensor  # (B, N, 2) float32: (width, height), pixels
    cell: Tensor  # (B, N, 2) float32: (column, row)
    stride: Tensor  # float32: pixels per cell
    scale_xy: Tensor  # float32: of the level, see `box_coder.decode_cxcywh`


@torch.no_grad()
def assign_by_grid(boxes: Tensor, labels: Tensor, table: Tensor, threshold: float) -> GridAssignment:
    """Choose among the anchors in the cells of the ground-truth boxes, on every level, by the IoU of their prior boxes.

    A prior box is the anchor in the middle of its cell. It learns, the later rule before the earlier:
    1. the ground truth it overlaps most (the first of equals), if the IoU exceeds the threshold;
    2. a ground-truth box of which it is the best prior (any of equals) with an IoU above 0; the last such ground truth.
    Both look at the priors in the cells of all ground-truth boxes of the image, so a ground-truth box may take one in
    another's cell.

    Static shapes and no host synchronisation. Padding and crowd regions have no part in it.

    Args:
        boxes: (x1, y1, x2, y2) in pixels of the network input, (B, G, 4) float32.
        labels: class, -1 padding, -2 crowd, (B, G).
        table: see `target_assignment.anchor_table`.
        threshold: IoU.

    Source: GridAssigner of https://github.com/open-mmlab/mmdetection
    """
    batch_size, gt_boxes = labels.shape
    shape = (batch_size, gt_boxes * len(table))  # (B, N)
    valid = labels >= 0
    # Empty boxes overlap nothing; a valid ground truth has a size.
    boxes = boxes * valid[..., None]
    centres = xyxy_to_cxcywh(boxes)[:, :, None, :2].expand(-1, -1, len(table), -1).reshape(*shape, 2)
    available = valid[..., None].expand(-1, -1, len(table)).reshape(shape)
    rows = table.repeat(gt_boxes, 1).expand(batch_size, -1, -1)  # (B, N, 9)
    index, cell = place_in_cell(centres, rows)
    anchor, stride, _, scale_xy = rows.split([2, 1, 5, 1], dim=-1)
    priors = cxcywh_to_xyxy(torch.cat([(cell + 0.5) * stride, anchor], dim=-1))  # (B, N, 4)

    pieces = split_batch(gt_boxes * shape[1], MAX_OVERLAPS, boxes, priors, available)
    best_iou, best_gt, claimed_by = (
        torch.cat(parts) if len(parts) > 1 else parts[0]
        for parts in zip(*itertools.starmap(_compare, pieces), strict=True)
    )
    claimed = claimed_by >= 0
    repeated = _repeated(index.view(batch_size, gt_boxes, -1), valid)
    positive = (claimed | (best_iou > threshold)) & ~repeated
    gt = torch.where(positive, torch.where(claimed, claimed_by, best_gt), 0)
    return GridAssignment(positive, index, gt, anchor, cell, stride[..., 0], scale_xy[..., 0])


class MMDetectionLoss(Criterion):
    """The loss of MMDetection's YOLOv3 configurations: sums over the micro-batch, divided by nothing.

    2 * BCE(xy) + 2 * (t_wh - raw_wh)^2 + BCE(objectness) + BCE(class)

    Positives: see `assign_by_grid`. Negatives by the prior boxes, not by what the network predicts: those that no
    ground truth overlaps by more than `ignore_threshold`, which is the threshold of positives too (MMDetection: 0.5
    both).
    Arguments: see `Criterion`.

    Differs from MMDetection: crowd regions (priors of which more than the threshold lies inside are ignored), and a
    centre on the right or lower border belongs to the last cell.

    Source: YOLOV3Head, YOLOBBoxCoder and configs/yolo of https://github.com/open-mmlab/mmdetection
    """

    def compute_losses(
        self, raw: Tensor, sizes: Sequence[tuple[int, int]], boxes: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch_size, predictions, values = raw.shape
        tables = self.layout.tables(sizes)
        grid = assign_by_grid(boxes, labels, tables.anchors, self.ignore_threshold)
        positive_raw = raw.gather(1, grid.index[..., None].expand(-1, -1, values))  # (B, N, 5 + C)

        boxes_of_gt = boxes.gather(1, grid.gt[..., None].expand(-1, -1, 4))  # (B, N, 4)
        loss_box = (self._compare_boxes(positive_raw[..., BOX], boxes_of_gt, grid) * grid.positive).sum()

        cells, anchors, stride, _ = tables.predictions.split([2, 2, 1, 1], dim=-1)
        priors = cxcywh_to_xyxy(torch.cat([(cells + 0.5) * stride, anchors], dim=-1))  # anchors in the middle of cells
        ignored = ignored_predictions(priors.expand(batch_size, -1, -1), boxes, labels, self.ignore_threshold)
        positive = mark_positives(grid.index, grid.positive, predictions)
        loss_objectness = compare_objectness(raw[..., OBJECTNESS], positive, ignored)

        class_logits = positive_raw[..., CLASSES]  # (B, N, C)
        classes = labels.clamp(min=0).gather(1, grid.gt)  # (B, N)
        one_hot = torch.zeros_like(class_logits).scatter_(2, classes[..., None], 1.0)
        loss_class = (self.compare_classes(class_logits, one_hot, classes) * grid.positive).sum()
        return loss_box, loss_objectness, loss_class

    def assign(
        self, boxes: Tensor, labels: Tensor, sizes: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        grid = assign_by_grid(boxes, labels, self.layout.tables(sizes).anchors, self.ignore_threshold)
        return grid.positive, grid.index, grid.gt, torch.zeros_like(grid.positive)

    @staticmethod
    def _compare_boxes(raw: Tensor, boxes: Tensor, grid: GridAssignment) -> Tensor:
        """(B, N, 4), (B, N, 4) xyxy to (B, N)."""
        boxes_cxcywh = xyxy_to_cxcywh(boxes)
        # As in MMDetection tiny ratios are bounded; this also keeps the logarithm of padding finite.
        size = torch.maximum(boxes_cxcywh[..., 2:], grid.anchor * SMALLEST)
        target_xy, target_wh = encode_boxes(
            torch.cat([boxes_cxcywh[..., :2], size], dim=-1),
            grid.anchor,
            grid.cell,
            grid.stride,
            grid.scale_xy[..., None],
        )
        target_xy = target_xy.clamp(SMALLEST, 1 - SMALLEST)
        loss_xy = F.binary_cross_entropy_with_logits(raw[..., :2], target_xy, reduction="none").sum(-1)
        loss_wh = (target_wh - raw[..., 2:]).square().sum(-1)
        return WEIGHT_XY * loss_xy + WEIGHT_WH * loss_wh


def _compare(boxes: Tensor, priors: Tensor, available: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Overlaps of ground-truth boxes and priors, (B, G, 4), (B, N, 4), (B, N) bool.

    Returns:
        IoU and number of the ground truth that each prior overlaps most, the first of equals; number of the last
        ground-truth box of
        which it is the best prior, -1 for none; each (B, N).
    """
    iou = pairwise_iou(boxes, priors).mul_(available[:, None])  # (B, G, N)
    claims = (iou == iou.amax(dim=2, keepdim=True)) & (iou > 0)
    numbers = torch.arange(boxes.shape[1], device=boxes.device)[:, None]
    return *iou.max(dim=1), torch.where(claims, numbers, -1).amax(dim=1)


def _repeated(index: Tensor, valid: Tensor) -> Tensor:
    """Whether an earlier ground truth has the same cell on that level; (B, G, all anchors), (B, G) to (B, N) bool."""
    index = index.transpose(1, 2)  # (B, all anchors, G)
    same = (index[..., :, None] == index[..., None, :]) & valid[:, None, None, :]
    return same.tril(diagonal=-1).any(dim=-1).transpose(1, 2).flatten(1)
