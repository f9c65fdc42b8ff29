"""Choices that some of the YOLO criteria have."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

MAX_SMOOTHING = 1 / 40  # https://github.com/dmlc/gluon-cv and https://github.com/PaddlePaddle/PaddleDetection


@dataclass(frozen=True)
class LossOptions:
    """The settings of the same names in the section `yolo`.

    Attributes:
        label_smoothing: d: "bce" compares class probabilities with 1 - d and d in place of 1 and 0; "auto":
            min(1 / C, 1 / 40).
        objectness_target: of positives; "iou": that of the decoded box and its ground truth, without gradient.
        box_loss: key of `box_losses.OVERLAPS`; None: the criterion's own.
        anchor_match, anchor_iou, anchor_ratio, neighbour_cells: see `multi_assignment.assign_several`.
        objectness_balance: weights of the levels' mean objectness losses; None: every prediction weighs the same.
    """

    label_smoothing: float | Literal["auto"] = 0.0
    objectness_target: Literal["one", "iou"] = "one"
    box_loss: str | None = None
    anchor_match: Literal["best", "iou", "ratio"] = "best"
    anchor_iou: float = 0.213
    anchor_ratio: float = 4.0
    neighbour_cells: bool = False
    objectness_balance: Sequence[float] | None = None

    def smoothing(self, num_classes: int) -> float:
        """Class probability that stands for 0; 1 minus it stands for 1."""
        return min(1 / num_classes, MAX_SMOOTHING) if self.label_smoothing == "auto" else self.label_smoothing
