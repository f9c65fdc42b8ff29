"""How well the anchors of EfficientDet fit the boxes of a dataset."""

import numpy as np

from detection.contract import FitReport
from detection.models.efficientdet.anchors import AnchorGrid

MIN_RECALL = 0.8  # share of boxes that an anchor reaches without being forced
MAX_VALUES = 2**22  # compared at once


class AnchorGridFit:
    """`Detector.check_fit`: the best IoU of every box with the anchors at their places.

    Args:
        grid: the anchors.
        positive_iou: from which an anchor is positive, see `assignment.assign`.
    """

    def __init__(self, grid: AnchorGrid, positive_iou: float) -> None:
        self.grid, self.positive_iou = grid, positive_iou

    def __call__(self, boxes: np.ndarray, image_of_box: np.ndarray, size: int) -> FitReport:
        """Report few boxes with a good anchor, and boxes that lose their only anchor to an earlier one.

        Args:
            boxes: xyxy in pixels of the network input, (K, 4) float64, at least one.
            image_of_box: (K,) int64.
            size: side of the network input in pixels.
        """
        findings: list[tuple[str, list[int] | list[str], list[str]]] = []
        best_iou, best_anchor = self.best_anchors(boxes, size)
        good = best_iou >= self.positive_iou
        mean, recall = float(best_iou.mean()), float(good.mean())
        numbers = f"{recall:.1%} of the boxes at IoU {self.positive_iou:g} or more"
        if recall < MIN_RECALL:
            settings = ["efficientdet.anchor_scale", "efficientdet.aspects"]
            text = f"mean best IoU {mean:.3f}, {numbers}, at {size} px; the others have one anchor each"
            findings.append(("poor_anchors", [", ".join(settings)], [text]))
        key = np.column_stack([image_of_box, best_anchor])
        order = np.lexsort(key.T[::-1])  # stable: the first box of an anchor keeps it
        shared = np.append(False, (key[order[1:]] == key[order[:-1]]).all(axis=1))
        lost = order[shared & ~good[order]]
        findings.append(("shared_prediction", sorted(lost.tolist()), []))
        return FitReport(
            findings,
            {"mean_best_iou": mean, f"recall_at_iou_{self.positive_iou:g}": recall},
            f"{'anchors':<12}mean best IoU {mean:.3f}, {numbers}, at {size} px",
        )

    def best_anchors(self, boxes: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Highest IoU of each box, (K,) float64, and the number of that anchor in the order of `grid.flatten_levels`.

        Of all anchors of a shape the one nearest to the box overlaps it most, so only that one is looked at.
        """
        places = []
        start = 0
        for stride, shapes in zip(self.grid.strides, self.grid.shapes, strict=True):
            cells = -(-size // stride)
            places += [(stride, cells, start, number, len(shapes), *wh) for number, wh in enumerate(shapes)]
            start += cells * cells * len(shapes)
        stride, cells, first, number, per_cell, width, height = np.array(places).T
        best_iou, best_anchor = np.zeros(len(boxes)), np.zeros(len(boxes), np.int64)
        step = max(MAX_VALUES // len(places), 1)
        for begin in range(0, len(boxes), step):
            x1, y1, x2, y2 = (column[:, None] for column in boxes[begin : begin + step].T)
            column, row = (
                np.clip(np.floor((first_side + last_side) / 2 / stride), 0, cells - 1)
                for first_side, last_side in ((x1, x2), (y1, y2))
            )
            x, y = (column + 0.5) * stride, (row + 0.5) * stride
            shared_width = np.minimum(x2, x + width / 2) - np.maximum(x1, x - width / 2)
            shared_height = np.minimum(y2, y + height / 2) - np.maximum(y1, y - height / 2)
            shared = shared_width.clip(0) * shared_height.clip(0)
            iou = shared / ((x2 - x1) * (y2 - y1) + width * height - shared)
            best = iou.argmax(axis=1)
            rows = np.arange(len(best))
            anchors = first + (row * cells + column) * per_cell + number
            best_iou[begin : begin + step] = iou[rows, best]
            best_anchor[begin : begin + step] = anchors[rows, best]
        return best_iou, best_anchor
