"""Layout of the raw values of an anchor-free head, and their decoding."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detection.models.levels import flatten_levels, sizes_of
from detection.models.yolox.points import Points, make_points
from detection.ops.boxes import cxcywh_to_xyxy

MAX_EXPONENT = 8.0  # sides of 1/2981 to 2981 strides: beyond any ground-truth box, and finite areas


def decode_centre_size(raw: Tensor, points: Points) -> Tensor:
    """Decode raw box values: centre = (cell + t_xy) * stride, size = exp(t_wh) * stride.

    Args:
        raw: t_x, t_y, t_w, t_h of every point, (..., P, 4) float32.
        points: of the P predictions.

    Returns:
        Boxes (x1, y1, x2, y2) in pixels of the network input, (..., P, 4), finite for finite raw values.

    Source: YOLOX, section 2.1, https://arxiv.org/abs/2107.08430
    """
    strides = points.strides[:, None]
    centre = points.centres + (raw[..., :2] - 0.5) * strides  # the point is the middle of its cell
    size = raw[..., 2:].clamp(-MAX_EXPONENT, MAX_EXPONENT).exp() * strides
    return cxcywh_to_xyxy(torch.cat([centre, size], dim=-1))


def decode_distribution(raw: Tensor, points: Points) -> Tensor:
    """Decode the sides of boxes given as distributions: side = sum over the bins of j * softmax(t)_j, in strides.

    Args:
        raw: logits of the bins of left, top, right and bottom, (..., P, 4 * bins) float32.
        points: of the P predictions.

    Returns:
        Boxes (x1, y1, x2, y2) in pixels of the network input around the points, (..., P, 4).

    Source: Generalized Focal Loss, section 3.2, https://arxiv.org/abs/2006.04388
    """
    bins = raw.shape[-1] // 4
    sides = raw.unflatten(-1, (4, bins)).softmax(-1) @ torch.arange(bins, device=raw.device, dtype=raw.dtype)
    before, after = (sides * points.strides[:, None]).split(2, dim=-1)
    return torch.cat([points.centres - before, points.centres + after], dim=-1)


# Name -> (raw box values (..., P, box_values), points) -> boxes xyxy (..., P, 4); differentiable.
DECODERS: dict[str, Callable[[Tensor, Points], Tensor]] = {
    "centre_size": decode_centre_size,
    "distribution": decode_distribution,
}


class RawValues(NamedTuple):
    """The raw values of all predictions, float32."""

    boxes: Tensor  # (B, P, box_values)
    objectness: Tensor | None  # (B, P) logits
    classes: Tensor  # (B, P, C) logits


@dataclass(frozen=True)
class OutputLayout:
    """What a prediction's raw values are: box values, objectness if the head has it, classes, in this order.

    Network, criterion, postprocess and exported files share it.

    Attributes:
        box_values: per prediction.
        objectness: whether there is one.
        decoder: of the box values, a key of `DECODERS`.
    """

    box_values: int = 4
    objectness: bool = True
    decoder: str = "centre_size"

    def metadata(self) -> dict[str, Any]:
        """Plain values, of which `OutputLayout(**values)` is an equal layout."""
        return asdict(self)

    def initial_bias(self, side: float) -> Tensor:
        """Raw box values of a square of `side` strides around the point, (box_values,).

        Of distributions, whose bins fall by a constant ratio, it is their mean before the last bin cuts them off.
        """
        if self.decoder == "centre_size":
            return torch.tensor([0.5, 0.5, math.log(side), math.log(side)])
        ratio = side / (2 + side)  # the mean of a geometric distribution is ratio / (1 - ratio)
        return math.log(ratio) * torch.arange(self.box_values // 4, dtype=torch.float32).repeat(4)

    def split(self, raw: Tensor) -> RawValues:
        """Split raw values, (B, P, box_values + 1 + C), or without objectness (B, P, box_values + C)."""
        raw = raw.float()
        boxes, rest = raw[..., : self.box_values], raw[..., self.box_values :]
        return RawValues(boxes, rest[..., 0], rest[..., 1:]) if self.objectness else RawValues(boxes, None, rest)


class Decoding:
    """Raw outputs of all levels to values by prediction, and to boxes.

    Args:
        layout: of the raw values.
        strides: pixels per cell, per level, ascending.
    """

    def __init__(self, layout: OutputLayout, strides: Sequence[int]) -> None:
        self.layout = layout
        self.strides = tuple(strides)
        self._points: dict[tuple, Points] = {}

    def points(self, sizes: Sequence[tuple[int, int]], device: torch.device) -> Points:
        """Points of an input size, cached: making them synchronises with the device.

        Args:
            sizes: (rows, columns) per level.
            device: of the tensors.
        """
        if torch.compiler.is_exporting():  # the sizes may be symbolic
            return make_points(self.strides, sizes, device)
        key = (device, tuple(sizes))
        if key not in self._points:
            self._points[key] = make_points(self.strides, sizes, device)
        return self._points[key]

    def read(self, outputs: Sequence[Tensor]) -> tuple[RawValues, Points]:
        """Flatten and split raw outputs per level, (B, 1, H, W, X), any float type."""
        return self.layout.split(flatten_levels(outputs)), self.points(sizes_of(outputs), outputs[0].device)

    def boxes(self, raw: Tensor, points: Points) -> Tensor:
        """Decode raw box values (..., P, box_values) to boxes xyxy (..., P, 4) in pixels of the network input."""
        return DECODERS[self.layout.decoder](raw, points)
