"""Assigners: which predictions answer for which ground-truth box.

An assigner is a function of the predictions and the ground-truth boxes, without gradient. All have static shapes, read
nothing back to the host and never build a tensor over boxes, points and classes together.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

from detection.models.yolox.points import Points


class Assignment(NamedTuple):
    """What every prediction answers for; each (B, P), P: the points of all levels."""

    positive: Tensor  # bool
    gt: Tensor  # int64: row of the assigned ground-truth box; 0 where not positive
    quality: Tensor  # float32: how good the prediction is for its box, 0..1; 0 where not positive


class Assigner(Protocol):
    """Assign ground-truth boxes to predictions.

    Padding (-1) and crowd regions (-2) are never assigned. Nothing carries a gradient.
    """

    def __call__(
        self,
        class_logits: Tensor,
        objectness_logits: Tensor | None,
        predicted: Tensor,
        boxes: Tensor,
        labels: Tensor,
        points: Points,
    ) -> Assignment:
        """Assign.

        Args:
            class_logits: (B, P, C) float32.
            objectness_logits: (B, P) float32; None: the head has no objectness.
            predicted: decoded boxes (x1, y1, x2, y2) in pixels of the network input, (B, P, 4) float32, finite.
            boxes: ground-truth boxes, likewise, (B, G, 4) float32; G is 1 or more.
            labels: class, -1 padding, -2 crowd, (B, G) int64.
            points: of the P predictions.
        """
        ...
