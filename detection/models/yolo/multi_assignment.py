"""Assignment of several predictions to a ground-truth box."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from detection.models.yolo.grid import place_in_cell
from detection.ops.boxes import pairwise_wh_iou, xyxy_to_cxcywh

FIRST_CLAIM = 2**31  # above the bits of every float32 IoU


@dataclass(frozen=True)
class Claims:
    """Pairs of ground-truth boxes and predictions, N = G * anchors of all levels * (1 or 3 cells); shapes (B, N)."""

    positive: Tensor  # bool; each prediction at most once
    index: Tensor  # int64: flat index of the prediction in the order of `grid.flatten_levels`
    gt: Tensor  # int64: row of the ground-truth box


@torch.no_grad()
def assign_several(
    boxes: Tensor,
    labels: Tensor,
    table: Tensor,
    predictions: int,
    match: Literal["best", "iou", "ratio"],
    anchor_iou: float = 0.213,
    anchor_ratio: float = 4.0,
    neighbour_cells: bool = False,
) -> Claims:
    """Assign each ground-truth box to every anchor of all levels that fits it, in the cell of its centre.

    An anchor fits if it is the one of highest width-height IoU (the first of equals) or, with `match`
    "iou", if its width-height IoU exceeds `anchor_iou`;
    "ratio", if max(w / w_a, w_a / w, h / h_a, h_a / h) is below `anchor_ratio`.

    A prediction claimed by several boxes belongs to a box whose best anchor and own cell it is, before all others; then
    to the box of highest width-height IoU with the anchor; then to the last one. So a box is left without a prediction
    only if another box has the same best anchor and the same cell.

    Static shapes and no host synchronisation. Padding and crowd regions claim nothing.

    Args:
        boxes: (x1, y1, x2, y2) in pixels of the network input, (B, G, 4) float32, G at least 1.
        labels: class, -1 padding, -2 crowd, (B, G).
        table: `grid.anchor_table`, (all anchors, 9).
        predictions: P, of all levels.
        neighbour_cells: in the cells beside the one of the centre too, of each direction the one nearer to it, if it
            lies in the grid.

    Source: "iou": `iou_thresh` of https://github.com/AlexeyAB/darknet; "ratio" and the neighbours: the reach of the
        decoding of Scaled-YOLOv4, https://arxiv.org/abs/2011.08036, sizes up to 4 anchors and centres up to half a cell
        outside; the rule for claims is ours.
    """
    boxes_cxcywh = xyxy_to_cxcywh(boxes)
    centres, sides = boxes_cxcywh[:, :, None].split(2, dim=-1)  # (B, G, 1, 2)
    iou = pairwise_wh_iou(sides[:, :, 0], table[:, :2])  # (B, G, anchors)
    best = torch.arange(len(table), device=boxes.device) == iou.max(dim=-1, keepdim=True).indices
    fits = best
    if match == "iou":
        fits = best | (iou > anchor_iou)
    elif match == "ratio":
        ratio = sides / table[:, :2]
        fits = best | (torch.maximum(ratio, 1 / ratio).amax(-1) < anchor_ratio)
    claims = fits & (labels >= 0)[..., None]

    index, cell = place_in_cell(centres, table)
    rows = torch.arange(labels.shape[1], device=boxes.device)[:, None]
    # Orders by IoU, since the bits of floats that are not negative ascend with them, then by row.
    rank = iou.view(torch.int32).long() * len(rows) + rows
    first = rank + best * (FIRST_CLAIM * len(rows))
    gt = rows.expand_as(rank)
    if neighbour_cells:
        step = torch.where(centres / table[:, 2:3] - cell < 0.5, -1.0, 1.0)  # (B, G, anchors, 2)
        inside = (cell + step >= 0) & (cell + step < table[:, 3:5])
        to_next = torch.stack([table[:, 6], table[:, 6] * table[:, 3]], dim=-1)  # predictions to the next cell
        claims = torch.cat([claims[..., None], claims[..., None] & inside], dim=-1)
        index = torch.cat([index[..., None], index[..., None] + (step * to_next).long()], dim=-1)
        first = torch.cat([first[..., None], rank[..., None].expand_as(inside)], dim=-1)
        gt = gt[..., None].expand_as(index)
    claims, index, first, gt = (values.flatten(1) for values in (claims, index, first, gt))

    # The others write to one extra slot, so that shapes stay static.
    slot = torch.where(claims, index, predictions)
    highest = torch.full((len(boxes), predictions + 1), -1, device=boxes.device)
    highest = highest.scatter_reduce_(1, slot, first, "amax")
    return Claims(claims & (highest.gather(1, slot) == first), torch.where(claims, index, 0), gt)
