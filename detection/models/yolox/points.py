"""The points of an anchor-free detector: one prediction per cell, which stands at the centre of the cell."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from detection.models.levels import cell_grid


class Points(NamedTuple):
    """Where the predictions of all levels stand, by ascending stride, row and column (`grid.flatten_levels`)."""

    centres: Tensor  # (P, 2) float32: (x, y) of the centre of the cell, in pixels of the network input
    strides: Tensor  # (P,) float32: pixels per cell of the prediction's level
    counts: tuple[int, ...]  # points per level

    @property
    def cells(self) -> Tensor:
        """(column, row) of each point's cell, (P, 2) float32."""
        return self.centres / self.strides[:, None] - 0.5


def make_points(strides: Sequence[int], sizes: Sequence[tuple[int, int]], device: torch.device | str) -> Points:
    """Make the points of an input size: (column + 0.5, row + 0.5) * stride.

    Args:
        strides: pixels per cell, per level, ascending.
        sizes: (rows, columns), per level.
        device: of the tensors.
    """
    centres, strides_of_points = [], []
    for stride, (rows, columns) in zip(strides, sizes, strict=True):
        cells = cell_grid(rows, columns, torch.device(device)).flatten(0, 1)
        centres.append((cells + 0.5) * stride)
        strides_of_points.append(torch.full_like(cells[:, 0], stride))
    return Points(torch.cat(centres), torch.cat(strides_of_points), tuple(len(cells) for cells in centres))
