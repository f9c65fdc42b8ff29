"""From raw network output to boxes and back, exact inverses."""

import torch
from torch import Tensor

from detection.models.yolo.grid import cell_grid
from detection.ops.boxes import cxcywh_to_xyxy


def decode_boxes(raw: Tensor, anchors: Tensor, stride: int, scale_xy: float = 1.0, new_coords: bool = False) -> Tensor:
    """Turn the raw output of one level into boxes. Inverse of `encode_boxes` at the cell and anchor of the box.

    The formula is that of `decode_cxcywh`, in float32 whatever the input's type.

    Args:
        raw: network output before any activation, (B, A, H, W, 4 or more); only the first four values are read.
        anchors: (width, height) in pixels of the network input, (A, 2).
        stride: pixels per cell.
        scale_xy: see `decode_cxcywh`; one number for the level.
        new_coords: see `decode_cxcywh`.

    Returns:
        Boxes (x1, y1, x2, y2) in pixels of the network input, (B, A, H, W, 4) float32; may exceed the image.

    Raises:
        ValueError: if `raw` and `anchors` disagree on A.

    Source: YOLOv3, section 2.1, https://arxiv.org/abs/1804.02767
    """
    if raw.shape[1] != len(anchors):
        raise ValueError(f"raw output has {raw.shape[1]} anchors per cell, expected {len(anchors)}")
    cells = cell_grid(raw.shape[2], raw.shape[3], raw.device)
    return cxcywh_to_xyxy(
        decode_cxcywh(raw[..., :4].float(), anchors[:, None, None, :], cells, stride, scale_xy, new_coords)
    )


def decode_predictions(raw: Tensor, table: Tensor) -> Tensor:
    """`decode_boxes` of all levels at once: a sixth of the operations.

    Args:
        raw: (..., P, 4 or more) float32 in the order of `anchors.flatten_levels`.
        table: `anchors.prediction_table`, (P, 6).

    Returns:
        Boxes (x1, y1, x2, y2) in pixels of the network input, (..., P, 4).
    """
    cells, anchors, stride, scale_xy = table.split([2, 2, 1, 1], dim=-1)
    return cxcywh_to_xyxy(decode_cxcywh(raw[..., :4], anchors, cells, stride, scale_xy))


def decode_cxcywh(
    raw: Tensor,
    anchors: Tensor,
    cells: Tensor,
    stride: Tensor | float,
    scale_xy: Tensor | float = 1.0,
    new_coords: bool = False,
) -> Tensor:
    """Raw values to boxes, each at its own cell and anchor; differentiable. All arguments broadcast.

    centre = (s * sigmoid(t) - (s - 1) / 2 + cell) * stride
    size = anchor * exp(t), with `new_coords` anchor * (2 * sigmoid(t))^2

    Args:
        raw: (..., 4) float32.
        anchors: (width, height) in pixels, (..., 2).
        cells: (column, row), (..., 2).
        stride: pixels per cell, (..., 1) or one number.
        scale_xy: s, (..., 1) or one number. 1 is YOLOv3; above 1 a centre on the border of its cell is reached by a
            finite raw value.
        new_coords: the size of Scaled-YOLOv4, at most four anchors. It has no encoding here: for detection only.

    Returns:
        (centre x, centre y, width, height) in pixels of the network input, (..., 4).

    Source: YOLOv3, section 2.1, https://arxiv.org/abs/1804.02767; scale_xy: YOLOv4, section 3.4, "eliminate grid
        sensitivity", https://arxiv.org/abs/2004.10934; new_coords: Scaled-YOLOv4, https://arxiv.org/abs/2011.08036,
        and the setting of that name in AlexeyAB's Darknet.
    """
    # with s = 1 exactly (sigmoid + cell) * stride: the product and the offset change no digit
    centre = (raw[..., :2].sigmoid() * scale_xy + (cells - (scale_xy - 1) / 2)) * stride
    size = (2 * raw[..., 2:].sigmoid()).square() if new_coords else raw[..., 2:].exp()
    return torch.cat([centre, size * anchors], dim=-1)


def encode_boxes(
    boxes_cxcywh: Tensor, anchors: Tensor, cells: Tensor, strides: Tensor, scale_xy: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """The values a prediction should have at the given cell and anchor so that decoding gives the box.

    Args:
        boxes_cxcywh: centre and size in pixels of the network input, (..., 4), sizes positive.
        anchors: (width, height) of the anchor of each box in pixels, (..., 2).
        cells: (column, row) of each box, (..., 2).
        strides: pixels per cell of each box's level, (...).
        scale_xy: s of each box's level, (..., 1) or one number.

    Returns:
        What sigmoid(t_xy) should be, (share of the cell + (s - 1) / 2) / s, 0..1 for a centre within the cell,
        (..., 2); and the raw t_wh, (..., 2).

    Source: as `decode_cxcywh`.
    """
    share_of_cell = boxes_cxcywh[..., :2] / strides[..., None] - cells
    share = (share_of_cell + (scale_xy - 1) / 2) / scale_xy
    return share, (boxes_cxcywh[..., 2:] / anchors).log()
