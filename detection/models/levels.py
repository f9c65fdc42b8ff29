"""Outputs of several levels of a dense detector: their cells, sizes and order."""

from collections.abc import Sequence

import torch
from torch import Tensor


def cell_grid(rows: int, columns: int, device: torch.device) -> Tensor:
    """(column, row) of every cell as float32, (H, W, 2): the offset that decoding adds to a predicted centre."""
    row, column = torch.meshgrid(
        torch.arange(rows, device=device, dtype=torch.float32),
        torch.arange(columns, device=device, dtype=torch.float32),
        indexing="ij",
    )
    return torch.stack([column, row], dim=-1)


def flatten_levels(outputs: Sequence[Tensor]) -> Tensor:
    """Concatenate the levels' (B, A, H, W, X) to (B, P, X), by ascending stride, row, column, anchor.

    The anchor varies fastest, as in the memory of a channels_last output, so no level is copied twice.
    """
    return torch.cat([level.permute(0, 2, 3, 1, 4).flatten(1, 3) for level in outputs], dim=1)


def sizes_of(outputs: Sequence[Tensor]) -> list[tuple[int, int]]:
    """(rows, columns) of each level's (B, A, H, W, X)."""
    return [(output.shape[2], output.shape[3]) for output in outputs]
