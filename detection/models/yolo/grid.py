"""Anchors in the cell grid, and a flat index over the predictions of all levels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from detection.models.levels import cell_grid


def prediction_table(
    anchors: Sequence[Tensor], strides: Sequence[int], sizes: Sequence[tuple[int, int]], scales_xy: Sequence[float]
) -> Tensor:
    """Constants for decoding each prediction, in the order of `flatten_levels`, (P, 6) float32.

    Columns: column and row of the cell, width and height of the anchor (pixels), stride, scale_xy. Arguments: see
    `anchor_table`.
    """
    levels = []
    for level_anchors, stride, (rows, columns), scale_xy in zip(anchors, strides, sizes, scales_xy, strict=True):
        shape = (rows, columns, len(level_anchors))
        cells = cell_grid(rows, columns, level_anchors.device)[:, :, None].expand(*shape, 2)
        constants = torch.tensor([stride, scale_xy], dtype=torch.float32, device=level_anchors.device)
        levels.append(torch.cat([cells, level_anchors.expand(*shape, 2), constants.expand(*shape, 2)], dim=-1))
    return torch.cat([level.flatten(0, 2) for level in levels])


def anchor_table(
    anchors: Sequence[Tensor], strides: Sequence[int], sizes: Sequence[tuple[int, int]], scales_xy: Sequence[float]
) -> Tensor:
    """Constants for assignment, one row per anchor of all levels, (all anchors, 9) float32 on the anchors' device.

    Columns: width, height (pixels), stride, columns, rows, flat index of the level's first prediction, anchors per
    cell, number of the anchor within its level, scale_xy.

    Args:
        anchors: per level (width, height) in pixels, (A, 2), stride ascending; levels may differ in A.
        strides: pixels per cell, per level.
        sizes: (rows, columns), per level.
        scales_xy: see `box_coder.decode_cxcywh`, per level.
    """
    rows_of_table = []
    start = 0
    for level_anchors, stride, (rows, columns), scale_xy in zip(anchors, strides, sizes, scales_xy, strict=True):
        for number in range(len(level_anchors)):
            rows_of_table.append([stride, columns, rows, start, len(level_anchors), number, scale_xy])
        start += rows * columns * len(level_anchors)
    # float32 counts exactly up to 2^24, far above the number of predictions
    constants = torch.tensor(rows_of_table, dtype=torch.float32, device=anchors[0].device)
    return torch.cat([torch.cat(list(anchors)), constants], dim=1)


def place_in_cell(centres: Tensor, table_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Locate the prediction of an anchor in the cell of a centre; the right and lower border belong to the last cell.

    Args:
        centres: (x, y) in pixels of the network input, (..., 2); the arguments broadcast.
        table_rows: rows of `anchor_table`, (..., 9).

    Returns:
        Flat index over all predictions, (...) int64; and (column, row) of the cell, (..., 2) float32.
    """
    whole = table_rows[..., 3:8].long()
    last = whole[..., :2] - 1  # (column, row)
    cell = torch.minimum((centres / table_rows[..., 2:3]).long().clamp_(min=0), last)
    column, row = cell.unbind(-1)
    columns, _, start, anchors_per_cell, anchor_number = whole.unbind(-1)
    index = start + (row * columns + column) * anchors_per_cell + anchor_number
    return index, cell.float()
