"""How well the anchors and cells of a YOLO detector fit the boxes of a dataset."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from detection.contract import Anchors, FitReport
from detection.models.yolo.grid import anchor_table, place_in_cell
from detection.ops.boxes import pairwise_wh_iou

GOOD_IOU = 0.5
MIN_MEAN_IOU = 0.5  # COCO's anchors have 0.63 on COCO


class AnchorFit:
    """`Detector.check_fit` of an anchor-based YOLO.

    Args:
        anchors: per level, stride ascending.
        strides: pixels per cell, per level.
        scales_xy: per level, see `box_coder.decode_cxcywh`.
    """

    def __init__(self, anchors: Anchors, strides: Sequence[int], scales_xy: Sequence[float]) -> None:
        self.anchors, self.strides, self.scales_xy = anchors, strides, scales_xy

    def __call__(self, boxes: np.ndarray, image_of_box: np.ndarray, size: int) -> FitReport:
        """Report a poor mean best IoU of boxes and anchors, and boxes that share a prediction with a later one.

        Args:
            boxes: xyxy in pixels of the network input, (K, 4) float64, at least one.
            image_of_box: (K,) int64.
            size: side of the network input in pixels.
        """
        findings: list[tuple[str, list[int] | list[str], list[str]]] = []
        sides = torch.from_numpy(boxes[:, 2:] - boxes[:, :2])
        all_anchors = torch.tensor([anchor for level in self.anchors for anchor in level], dtype=torch.float64)
        best_iou, best_anchor = pairwise_wh_iou(sides, all_anchors).max(dim=1)
        mean, recall = float(best_iou.mean()), float((best_iou >= GOOD_IOU).double().mean())
        if mean < MIN_MEAN_IOU:
            text = f"mean best IoU {mean:.3f}, {recall:.1%} of the boxes at IoU {GOOD_IOU} or more, at {size} px"
            findings.append(("poor_anchors", ["yolo.anchors"], [text]))

        prediction = self._assigned_predictions(boxes, best_anchor, size)
        key = np.column_stack([image_of_box, prediction])
        order = np.lexsort(key.T[::-1])  # stable: the last box of a prediction keeps it
        shared = (key[order[1:]] == key[order[:-1]]).all(axis=1)
        findings.append(("shared_prediction", order[:-1][shared].tolist(), []))
        return FitReport(
            findings,
            {"mean_best_iou": mean, "recall_at_iou_0.5": recall},
            f"{'anchors':<12}mean best IoU {mean:.3f}, {recall:.1%} of the boxes at 0.5 or more, at {size} px",
        )

    def _assigned_predictions(self, boxes: np.ndarray, best_anchor: Tensor, size: int) -> np.ndarray:
        """Flat index of the prediction assigned to each box, (K,) int64; see `darknet_loss.assign_targets`."""
        levels = [torch.tensor(level, dtype=torch.float32) for level in self.anchors]
        grids = [(size // stride, size // stride) for stride in self.strides]
        table = anchor_table(levels, self.strides, grids, self.scales_xy)
        centres = torch.from_numpy((boxes[:, :2] + boxes[:, 2:]) / 2).float()
        return place_in_cell(centres, table[best_anchor])[0].numpy()
