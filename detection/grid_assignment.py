"""MMDetection's assignment: the anchors in the cells of the truths learn by the overlap of their prior boxes."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from detection.boxes import cxcywh_to_xyxy, pairwise_iou, xyxy_to_cxcywh
from detection.target_assignment import place_in_cell, split_batch

MOST_OVERLAPS = 2**27  # of truths and priors at once: 512 MiB, reached by 64 images of 512 truths


@dataclass(frozen=True)
class GridAssignment:
    """All anchors in the cells of all truths, N = G * all anchors; where truths share a cell, a prediction is repeated.

    Shapes (B, N) unless stated. A repeated prediction is positive at most once.
    """

    positive: Tensor  # bool
    index: Tensor  # int64: flat index over all predictions in the order of `anchors.flatten_levels`
    truth: Tensor  # int64: number of the truth it learns; 0 where not positive
    anchor: Tensor  # (B, N, 2) float32: (width, height), pixels
    cell: Tensor  # (B, N, 2) float32: (column, row)
    stride: Tensor  # float32: pixels per cell
    scale_xy: Tensor  # float32: of the level, see `box_coder.decode_cxcywh`


@torch.no_grad()
def assign_by_grid(boxes: Tensor, labels: Tensor, table: Tensor, threshold: float) -> GridAssignment:
    """Choose among the anchors in the cells of the truths, on every level, by the IoU of their prior boxes.

    A prior box is the anchor in the middle of its cell. It learns, the later rule before the earlier:
    1. the truth it overlaps most (the first of equals), if the IoU exceeds the threshold;
    2. a truth of which it is the best prior (any of equals) with an IoU above 0; the last such truth.
    Both look at the priors in the cells of all truths of the image, so a truth may take one in another's cell.

    Static shapes and no host synchronisation. Padding and crowd regions have no part in it.

    Args:
        boxes: (x1, y1, x2, y2) in pixels of the network input, (B, G, 4) float32.
        labels: class, -1 padding, -2 crowd, (B, G).
        table: see `target_assignment.anchor_table`.
        threshold: IoU.

    Source: GridAssigner of https://github.com/open-mmlab/mmdetection
    """
    batch_size, truths = labels.shape
    shape = (batch_size, truths * len(table))  # (B, N)
    valid = labels >= 0
    # Empty boxes overlap nothing; a valid truth has a size.
    boxes = boxes * valid[..., None]
    centres = xyxy_to_cxcywh(boxes)[:, :, None, :2].expand(-1, -1, len(table), -1).reshape(*shape, 2)
    available = valid[..., None].expand(-1, -1, len(table)).reshape(shape)
    rows = table.repeat(truths, 1).expand(batch_size, -1, -1)  # (B, N, 9)
    index, cell = place_in_cell(centres, rows)
    anchor, stride, _, scale_xy = rows.split([2, 1, 5, 1], dim=-1)
    priors = cxcywh_to_xyxy(torch.cat([(cell + 0.5) * stride, anchor], dim=-1))  # (B, N, 4)

    pieces = split_batch(truths * shape[1], MOST_OVERLAPS, boxes, priors, available)
    best_iou, best_truth, claimed_by = (
        torch.cat(parts) if len(parts) > 1 else parts[0]
        for parts in zip(*itertools.starmap(_compare, pieces), strict=True)
    )
    claimed = claimed_by >= 0
    repeated = _repeated(index.view(batch_size, truths, -1), valid)
    positive = (claimed | (best_iou > threshold)) & ~repeated
    truth = torch.where(positive, torch.where(claimed, claimed_by, best_truth), 0)
    return GridAssignment(positive, index, truth, anchor, cell, stride[..., 0], scale_xy[..., 0])


def _compare(boxes: Tensor, priors: Tensor, available: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Overlaps of truths and priors, (B, G, 4), (B, N, 4), (B, N) bool.

    Returns:
        IoU and number of the truth that each prior overlaps most, the first of equals; number of the last truth of
        which it is the best prior, -1 for none; each (B, N).
    """
    iou = pairwise_iou(boxes, priors).mul_(available[:, None])  # (B, G, N)
    claims = (iou == iou.amax(dim=2, keepdim=True)) & (iou > 0)
    numbers = torch.arange(boxes.shape[1], device=boxes.device)[:, None]
    return *iou.max(dim=1), torch.where(claims, numbers, -1).amax(dim=1)


def _repeated(index: Tensor, valid: Tensor) -> Tensor:
    """Whether an earlier truth has the same cell on that level; (B, G, all anchors), (B, G) to (B, N) bool."""
    index = index.transpose(1, 2)  # (B, all anchors, G)
    same = (index[..., :, None] == index[..., None, :]) & valid[:, None, None, :]
    return same.tril(diagonal=-1).any(dim=-1).transpose(1, 2).flatten(1)
