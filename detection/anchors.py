"""Anchor boxes and the cell grid: one flat index over all predictions of all levels."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Anchors = Sequence[
    Sequence[tuple[float, float]]
]  # per level, per anchor: (width, height) in pixels of the network input


def cell_grid(rows: int, columns: int, device: torch.device) -> Tensor:
    """(column, row) of every cell as float32, (H, W, 2): the offset that decoding adds to a predicted centre."""
    row, column = torch.meshgrid(
        torch.arange(rows, device=device, dtype=torch.float32),
        torch.arange(columns, device=device, dtype=torch.float32),
        indexing="ij",
    )
    return torch.stack([column, row], dim=-1)


def flatten_levels(outputs: Sequence[Tensor]) -> Tensor:
    """Join the levels' (B, A, H, W, X) into (B, P, X), stride ascending, then row, column, anchor.

    The anchor varies fastest because that is how a channels_last network output lies in memory: no copy per level.
    """
    return torch.cat([level.permute(0, 2, 3, 1, 4).flatten(1, 3) for level in outputs], dim=1)


def cluster_anchors(box_sizes: np.ndarray, count: int, seed: int = 0, iterations: int = 300) -> np.ndarray:
    """k-means of box shapes with the distance 1 - IoU.

    Args:
        box_sizes: (width, height) of boxes in one unit, (N, 2), all positive.
        count: number of anchors.
        seed: of the initial choice, which prefers shapes far from those chosen before (k-means++).

    Returns:
        Anchors sorted by area, (count, 2) float64, in the unit of `box_sizes`.

    Raises:
        ValueError: with fewer distinct shapes than anchors.

    Source: YOLOv2, section 2 "Dimension Clusters", https://arxiv.org/abs/1612.08242
    """
    sizes = np.asarray(box_sizes, dtype=np.float64)
    if len(np.unique(sizes, axis=0)) < count:
        raise ValueError(
            f"{count} anchors need at least {count} distinct box shapes, found {len(np.unique(sizes, axis=0))}"
        )
    generator = np.random.default_rng(seed)
    centres = sizes[[generator.integers(len(sizes))]]
    while len(centres) < count:
        distance = 1 - _wh_iou(sizes, centres).max(axis=1)
        centres = np.vstack([centres, sizes[generator.choice(len(sizes), p=distance / distance.sum())]])
    members = np.full(len(sizes), -1)
    for _ in range(iterations):
        nearest = _wh_iou(sizes, centres).argmax(axis=1)
        if (nearest == members).all():
            break
        members = nearest
        # The median is less drawn to the few very large boxes than the mean; an empty cluster keeps its centre.
        centres = np.array(
            [np.median(sizes[members == k], axis=0) if (members == k).any() else centres[k] for k in range(count)]
        )
    return centres[np.argsort(centres.prod(axis=1))]


def mean_best_iou(box_sizes: np.ndarray, anchors: np.ndarray) -> float:
    """Mean over boxes of the shape IoU with the best anchor; (N, 2), (K, 2), one unit."""
    return float(
        _wh_iou(np.asarray(box_sizes, dtype=np.float64), np.asarray(anchors, dtype=np.float64)).max(axis=1).mean()
    )


def _wh_iou(sizes: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """(N, 2), (K, 2) to (N, K)."""
    intersection = np.minimum(sizes[:, None], anchors[None]).prod(axis=2)
    return intersection / (sizes.prod(axis=1)[:, None] + anchors.prod(axis=1)[None] - intersection)
