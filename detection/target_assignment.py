"""Which prediction learns which truth: truth -> (level, anchor, row, column), and which predictions to leave alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detection.boxes import box_area, pairwise_intersection, pairwise_wh_iou, xyxy_to_cxcywh

PADDING_LABEL = -1
CROWD_LABEL = -2
IGNORE_CHUNK = 64  # truths compared with all predictions at once; bounds the memory of the (B, P, G) overlaps


@dataclass(frozen=True)
class Assignment:
    """The positive prediction of every truth; all shapes (B, G) unless stated, padding and crowd carry valid = 0."""

    valid: Tensor  # bool: a real truth
    index: Tensor  # int64: flat index over all predictions in the order of `anchors.flatten_levels`; 0 where not valid
    anchor: Tensor  # (B, G, 2) float32: (width, height) of the assigned anchor, pixels
    cell: Tensor  # (B, G, 2) float32: (column, row)
    stride: Tensor  # float32: pixels per cell
    scale_xy: Tensor  # float32: of the level, see `box_coder.decode_cxcywh`
    last: Tensor  # bool: valid, and no later truth of the image has the same index; this one gives the box
    same: Tensor  # (B, G, G) bool: both valid and of the same index


def anchor_table(
    anchors: Sequence[Tensor], strides: Sequence[int], sizes: Sequence[tuple[int, int]], scales_xy: Sequence[float]
) -> Tensor:
    """What assignment looks up by the number of the best anchor, (all anchors, 9) float32 on the anchors' device.

    Columns: width, height (pixels), stride, rows, columns, flat index of the level's first prediction, anchors per
    cell, number of the anchor within its level, scale_xy. Depends on the input size only, so a caller keeps one per
    size.

    Args:
        anchors: per level (width, height) in pixels, (A, 2), stride ascending; levels may differ in A.
        strides: pixels per cell, per level.
        sizes: (rows, columns), per level.
        scales_xy: see `box_coder.decode_cxcywh`, per level.
    """
    lines = []
    start = 0
    for level_anchors, stride, (rows, columns), scale_xy in zip(anchors, strides, sizes, scales_xy, strict=True):
        for number in range(len(level_anchors)):
            lines.append([stride, rows, columns, start, len(level_anchors), number, scale_xy])
        start += rows * columns * len(level_anchors)
    # float32 counts exactly up to 2^24, far above the number of predictions
    constants = torch.tensor(lines, dtype=torch.float32, device=anchors[0].device)
    return torch.cat([torch.cat(list(anchors)), constants], dim=1)


def assign_targets(boxes: Tensor, labels: Tensor, table: Tensor) -> Assignment:
    """Give each truth the anchor, of all levels, whose shape overlaps it most, in the cell of its centre.

    Static shapes and no host synchronisation: everything is computed for padding too and masked. Equal overlaps: the
    first anchor, as in the Darknet program.

    Args:
        boxes: (x1, y1, x2, y2) in pixels of the network input, (B, G, 4) float32.
        labels: class, -1 padding, -2 crowd, (B, G).
        table: see `anchor_table`.

    Source: YOLOv3, section 2.1; Darknet's yolo layer (best anchor by width-height IoU over the whole list).
    """
    boxes_cxcywh = xyxy_to_cxcywh(boxes)
    best = table[pairwise_wh_iou(boxes_cxcywh[..., 2:], table[:, :2]).argmax(dim=-1)]  # (B, G, 9)
    index, cell = place_in_cell(boxes_cxcywh[..., :2], best)
    valid = labels >= 0
    index = torch.where(valid, index, 0)

    same = (index[:, :, None] == index[:, None, :]) & valid[:, :, None] & valid[:, None, :]  # (B, G, G)
    last = valid & ~same.triu(diagonal=1).any(dim=-1)
    return Assignment(valid, index, best[..., :2], cell, best[..., 2], best[..., 8], last, same)


def place_in_cell(centres: Tensor, table_rows: Tensor) -> tuple[Tensor, Tensor]:
    """The prediction of an anchor in the cell of a centre; on the right or lower border that is the last cell.

    Args:
        centres: (x, y) in pixels of the network input, (..., 2); the arguments broadcast.
        table_rows: of `anchor_table`, (..., 9).

    Returns:
        Flat index over all predictions, (...) int64; and (column, row) of the cell, (..., 2) float32.
    """
    stride = table_rows[..., 2]
    rows, columns, start, anchors_per_cell, anchor_number = table_rows[..., 3:8].long().unbind(-1)
    column = torch.minimum((centres[..., 0] / stride).long().clamp_(min=0), columns - 1)
    row = torch.minimum((centres[..., 1] / stride).long().clamp_(min=0), rows - 1)
    index = start + (row * columns + column) * anchors_per_cell + anchor_number
    return index, torch.stack([column, row], dim=-1).float()


@torch.no_grad()
def ignored_predictions(predicted: Tensor, boxes: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Predictions that overlap some truth too well to be called background.

    Against a truth the overlap is the IoU; against a crowd region it is the share of the prediction that lies inside,
    as the COCO evaluator counts it.

    Args:
        predicted: decoded predictions (x1, y1, x2, y2) in pixels, (B, P, 4) float32.
        boxes: truths in the same unit, (B, G, 4).
        labels: class, -1 padding, -2 crowd, (B, G).
        threshold: overlap above which a prediction is ignored.

    Returns:
        (B, P) bool.

    Source: YOLOv3, section 2.1; Darknet compares decoded predictions, not anchors, with the truths.
    """
    # Padding becomes an empty box, which overlaps nothing.
    boxes = boxes * (labels != PADDING_LABEL)[..., None]
    crowd = (labels == CROWD_LABEL)[:, None, :]
    predicted_area = box_area(predicted)[:, :, None]
    ignored = torch.zeros(predicted.shape[:2], dtype=torch.bool, device=predicted.device)
    for first in range(0, boxes.shape[1], IGNORE_CHUNK):
        chunk = boxes[:, first : first + IGNORE_CHUNK]
        intersection = pairwise_intersection(predicted, chunk)  # (B, P, G)
        union = predicted_area + torch.where(
            crowd[..., first : first + IGNORE_CHUNK], 0, box_area(chunk)[:, None, :] - intersection
        )
        # intersection / union > threshold without the division; a prediction without area is never ignored
        ignored |= (intersection > union * threshold).any(dim=-1)
    return ignored
