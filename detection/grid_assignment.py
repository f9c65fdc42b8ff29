"""MMDetection's assignment: the anchors in the cells of the truths learn by the overlap of their prior boxes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from detection.boxes import cxcywh_to_xyxy, pairwise_iou, xyxy_to_cxcywh
from detection.target_assignment import IGNORE_CHUNK, place_in_cell


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
    rows = table.expand(batch_size, truths, *table.shape)  # (B, G, all anchors, 9)
    index, cell = place_in_cell(xyxy_to_cxcywh(boxes)[..., None, :2], rows)
    anchor, stride = rows[..., :2], rows[..., 2]
    priors = cxcywh_to_xyxy(torch.cat([(cell + 0.5) * stride[..., None], anchor], dim=-1)).reshape(*shape, 4)
    available = valid[..., None].expand(-1, -1, len(table)).reshape(shape)

    best_iou = torch.zeros(shape, device=boxes.device)
    best_truth = torch.zeros(shape, dtype=torch.int64, device=boxes.device)
    claimed_by = torch.full(shape, -1, device=boxes.device)
    for first in range(0, truths, IGNORE_CHUNK):
        iou = pairwise_iou(boxes[:, first : first + IGNORE_CHUNK], priors) * available[:, None]  # (B, chunk, N)
        chunk_iou, chunk_truth = iou.max(dim=1)
        best_truth = torch.where(chunk_iou > best_iou, chunk_truth + first, best_truth)
        best_iou = torch.maximum(best_iou, chunk_iou)
        # All priors of a truth are in this chunk, only the truths are not.
        claims = (iou == iou.amax(dim=2, keepdim=True)) & (iou > 0)
        numbers = torch.arange(first, first + iou.shape[1], device=boxes.device)[:, None]
        claimed_by = torch.maximum(claimed_by, torch.where(claims, numbers, -1).amax(dim=1))

    claimed = claimed_by >= 0
    positive = (claimed | (best_iou > threshold)) & ~_repeated(index, valid)
    truth = torch.where(positive, torch.where(claimed, claimed_by, best_truth), 0)
    return GridAssignment(
        positive,
        index.reshape(shape),
        truth,
        anchor.reshape(*shape, 2),
        cell.reshape(*shape, 2),
        stride.reshape(shape),
        rows[..., 8].reshape(shape),
    )


def _repeated(index: Tensor, valid: Tensor) -> Tensor:
    """Whether an earlier truth has the same cell on that level; (B, G, all anchors), (B, G) to (B, N) bool."""
    index = index.transpose(1, 2)  # (B, all anchors, G)
    same = (index[..., :, None] == index[..., None, :]) & valid[:, None, None, :]
    return same.tril(diagonal=-1).any(dim=-1).transpose(1, 2).flatten(1)
