"""The YOLOv3 criterion of MMDetection. Formula: docs/losses.md."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from detection.box_coder import encode_boxes
from detection.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from detection.criterion import Criterion, compare_objectness, mark_positives
from detection.grid_assignment import GridAssignment, assign_by_grid
from detection.target_assignment import ignored_predictions

WEIGHT_XY, WEIGHT_WH = 2.0, 2.0
SMALLEST = 1e-6  # targets of xy stay this far from 0 and 1; the ratio of truth and anchor is at least this


class MMDetectionLoss(Criterion):
    """The loss of MMDetection's YOLOv3 configurations: sums over the micro-batch, divided by nothing.

    2 * BCE(xy) + 2 * (t_wh - raw_wh)^2 + BCE(objectness) + BCE(class)

    Positives: see `assign_by_grid`. Negatives by the prior boxes, not by what the network predicts: those that no
    truth overlaps by more than `ignore_threshold`, which is the threshold of positives too (MMDetection: 0.5 both).
    Arguments: see `Criterion`.

    Differs from MMDetection: crowd regions (priors of which more than the threshold lies inside are ignored), and a
    centre on the right or lower border belongs to the last cell.

    Source: YOLOV3Head, YOLOBBoxCoder and configs/yolo of https://github.com/open-mmlab/mmdetection
    """

    def compute_losses(
        self, raw: Tensor, sizes: Sequence[tuple[int, int]], boxes: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch_size, predictions, values = raw.shape
        tables = self.tables(sizes)
        grid = assign_by_grid(boxes, labels, tables.anchors, self.ignore_threshold)
        positive_raw = raw.gather(1, grid.index[..., None].expand(-1, -1, values))  # (B, N, 5 + C)

        boxes_of_truths = boxes.gather(1, grid.truth[..., None].expand(-1, -1, 4))  # (B, N, 4)
        loss_box = (self._compare_boxes(positive_raw[..., :4], boxes_of_truths, grid) * grid.positive).sum()

        cells, anchors, stride, _ = tables.predictions.split([2, 2, 1, 1], dim=-1)
        priors = cxcywh_to_xyxy(torch.cat([(cells + 0.5) * stride, anchors], dim=-1))  # anchors in the middle of cells
        ignored = ignored_predictions(priors.expand(batch_size, -1, -1), boxes, labels, self.ignore_threshold)
        positive = mark_positives(grid.index, grid.positive, predictions)
        loss_objectness = compare_objectness(raw[..., 4], positive, ignored)

        class_logits = positive_raw[..., 5:]  # (B, N, C)
        classes = labels.clamp(min=0).gather(1, grid.truth)  # (B, N)
        one_hot = torch.zeros_like(class_logits).scatter_(2, classes[..., None], 1.0)
        loss_class = (self.compare_classes(class_logits, one_hot, classes) * grid.positive).sum()
        return loss_box, loss_objectness, loss_class

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
