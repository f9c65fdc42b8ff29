"""Which prediction learns which truth: truth -> (level, anchor, row, column), and which predictions to leave alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detection.boxes import box_area, pairwise_intersection, pairwise_wh_iou, xyxy_to_cxcywh
from detection.devices import comfortable_values

PADDING_LABEL = -1
CROWD_LABEL = -2
MOST_PIECES = 3  # of a batch: each costs about 20 operations, and a loss has at most 300 whatever it is given


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
    final: Tensor  # int64: number of the last valid truth of the image with the same index; its own where not valid


def anchor_table(
    anchors: Sequence[Tensor], strides: Sequence[int], sizes: Sequence[tuple[int, int]], scales_xy: Sequence[float]
) -> Tensor:
    """What assignment looks up by the number of the best anchor, (all anchors, 9) float32 on the anchors' device.

    Columns: width, height (pixels), stride, columns, rows, flat index of the level's first prediction, anchors per
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
            lines.append([stride, columns, rows, start, len(level_anchors), number, scale_xy])
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
    # Of equals the first, as `argmax`, and faster.
    number = pairwise_wh_iou(boxes_cxcywh[..., 2:], table[:, :2]).max(dim=-1).indices
    best = table[number]  # (B, G, 9)
    index, cell = place_in_cell(boxes_cxcywh[..., :2], best)
    valid = labels >= 0

    numbers = torch.arange(labels.shape[1], device=labels.device)
    # What is not valid shares with nothing. Sorting keeps the order of equals: the last one is the last truth.
    key = torch.where(valid, index, -1 - numbers)
    ascending, order = key.sort(dim=-1, stable=True)
    final = order.gather(-1, torch.searchsorted(ascending, key, right=True) - 1)
    return Assignment(
        valid,
        key.clamp(min=0),
        best[..., :2],
        cell,
        best[..., 2],
        best[..., 8],
        valid & (final == numbers),
        final,
    )


def place_in_cell(centres: Tensor, table_rows: Tensor) -> tuple[Tensor, Tensor]:
    """The prediction of an anchor in the cell of a centre; on the right or lower border that is the last cell.

    Args:
        centres: (x, y) in pixels of the network input, (..., 2); the arguments broadcast.
        table_rows: of `anchor_table`, (..., 9).

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
    areas = box_area(predicted)[:, :, None], box_area(boxes)[:, None, :]
    values = predicted.shape[1] * boxes.shape[1]  # per image
    pieces = split_batch(values, comfortable_values(boxes.device), predicted, boxes, crowd, *areas)
    ignored = [_overlapped(threshold, *piece) for piece in pieces]
    return ignored[0] if len(ignored) == 1 else torch.cat(ignored)


def split_batch(values: int, most_values: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Cut tensors along the batch so that what is computed of a piece stays small, into at most `MOST_PIECES`.

    Args:
        values: computed per image.
        most_values: in a piece, where that many pieces suffice.
    """
    images = len(tensors[0])
    pieces = max(min(MOST_PIECES, math.ceil(images * values / most_values)), 1)
    size = math.ceil(images / pieces)
    return [tensors] if pieces == 1 else list(zip(*(tensor.split(size) for tensor in tensors), strict=True))


def _overlapped(
    threshold: float, predicted: Tensor, boxes: Tensor, crowd: Tensor, predicted_area: Tensor, area: Tensor
) -> Tensor:
    """(B, P, 4), (B, G, 4), (B, 1, G) bool, (B, P, 1), (B, 1, G) to (B, P) bool."""
    intersection = pairwise_intersection(predicted, boxes)  # (B, P, G)
    # In place: these are the largest tensors of the loss.
    union = (area - intersection).masked_fill_(crowd, 0).add_(predicted_area)
    # intersection / union > threshold without the division; a prediction without area is never ignored
    return (intersection > union.mul_(threshold)).any(dim=-1)
