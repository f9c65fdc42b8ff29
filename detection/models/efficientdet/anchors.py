"""Anchors of EfficientDet and RetinaNet: the same shapes in every cell, in a fixed order."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from detection.models.levels import cell_grid
from detection.ops.boxes import cxcywh_to_xyxy

OCTAVES = 3  # sizes per aspect and level, 2**(1/3) apart

Aspects = Sequence[tuple[float, float]] | Sequence[float]


class Anchors(NamedTuple):
    """All anchors of an input size, by ascending stride, row, column and shape (`grid.flatten_levels`)."""

    xyxy: Tensor  # (P, 4) float32, pixels of the network input; may exceed it
    cxcywh: Tensor  # (P, 4) float32


def anchor_factors(aspects: Aspects) -> list[tuple[float, float]]:
    """Factors of width and height of each aspect.

    A pair is taken as it is; a number r is the ratio of width to height, with the factors sqrt(r) and 1 / sqrt(r).
    """
    factors = []
    for aspect in aspects:
        root = math.sqrt(aspect) if isinstance(aspect, int | float) else 0.0
        factors.append((root, 1 / root) if isinstance(aspect, int | float) else (aspect[0], aspect[1]))
    return factors


def anchor_shapes(strides: Sequence[int], scale: float, aspects: Aspects) -> list[list[tuple[float, float]]]:
    """Shapes of each level's anchors, (width, height) in pixels; the octave is the outer loop, the aspect the inner.

    side = scale * stride * 2^(octave / 3), octave 0, 1, 2

    Args:
        strides: pixels per cell, per level.
        scale: side of the smallest square anchor in strides.
        aspects: see `anchor_factors`.

    Source: Focal Loss, section 4, https://arxiv.org/abs/1708.02002; the order is that of `tf2/anchors.py` of
        https://github.com/google/automl, folder efficientdet, and of the weights trained with it
    """
    return [
        [
            (scale * stride * 2 ** (octave / OCTAVES) * width, scale * stride * 2 ** (octave / OCTAVES) * height)
            for octave in range(OCTAVES)
            for width, height in anchor_factors(aspects)
        ]
        for stride in strides
    ]


class AnchorGrid:
    """The anchors of all cells, around the centres of the cells.

    Args:
        strides: pixels per cell, per level, ascending.
        scale, aspects: see `anchor_shapes`.
    """

    def __init__(self, strides: Sequence[int], scale: float, aspects: Aspects) -> None:
        self.strides = tuple(strides)
        self.shapes = anchor_shapes(strides, scale, aspects)
        self._anchors: dict[tuple, Anchors] = {}

    def anchors(self, sizes: Sequence[tuple[int, int]], device: torch.device) -> Anchors:
        """Anchors of an input size, cached: making them synchronises with the device.

        Args:
            sizes: (rows, columns) per level.
            device: of the tensors.
        """
        if torch.compiler.is_exporting():  # the sizes may be symbolic
            return self._make(sizes, device)
        key = (device, tuple(sizes))
        if key not in self._anchors:
            self._anchors[key] = self._make(sizes, device)
        return self._anchors[key]

    def _make(self, sizes: Sequence[tuple[int, int]], device: torch.device) -> Anchors:
        levels = []
        for stride, shapes, (rows, columns) in zip(self.strides, self.shapes, sizes, strict=True):
            centres = (cell_grid(rows, columns, device)[:, :, None] + 0.5) * stride
            wh = torch.tensor(shapes, dtype=torch.float32, device=device)
            shape = (rows, columns, len(shapes), 2)
            levels.append(torch.cat([centres.expand(shape), wh.expand(shape)], dim=-1).flatten(0, 2))
        cxcywh = torch.cat(levels)
        return Anchors(cxcywh_to_xyxy(cxcywh), cxcywh)
