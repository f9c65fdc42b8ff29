"""Box encoding of YOLO: raw network outputs to boxes and back."""

import torch
from torch import Tensor

from detection.ops.boxes import cxcywh_to_xyxy


def decode_predictions(raw: Tensor, table: Tensor, new_coords: bool = False) -> Tensor:
    """Decode the raw box values of all levels.

    Args:
        raw: network output before any activation, (..., P, 4) float32 in the order of `grid.flatten_levels`.
        table: `grid.prediction_table`, (P, 6).
        new_coords: see `decode_cxcywh`.

    Returns:
        Boxes (x1, y1, x2, y2) in pixels of the network input, (..., P, 4); may exceed the image.

    Source: YOLOv3, section 2.1, https://arxiv.org/abs/1804.02767
    """
    cells, anchors, stride, scale_xy = table.split([2, 2, 1, 1], dim=-1)
    return cxcywh_to_xyxy(decode_cxcywh(raw, anchors, cells, stride, scale_xy, new_coords))


def decode_cxcywh(
    raw: Tensor,
    anchors: Tensor,
    cells: Tensor,
    stride: Tensor | float,
    scale_xy: Tensor | float = 1.0,
    new_coords: bool = False,
) -> Tensor:
    """Decode raw values, each at its own cell and anchor. Inverse of `encode_boxes`; differentiable; broadcasts.

    centre = (s * sigmoid(t) - (s - 1) / 2 + cell) * stride
    size = anchor * exp(t), with `new_coords` anchor * (2 * sigmoid(t))^2

    Args:
        raw: (..., 4) float32.
        anchors: (width, height) in pixels, (..., 2).
        cells: (column, row), (..., 2).
        stride: pixels per cell, (..., 1) or one number.
        scale_xy: s, (..., 1) or one number. 1 is YOLOv3; above 1 a finite raw value reaches the border of the cell.
        new_coords: size of Scaled-YOLOv4, at most four times the anchor.

    Returns:
        (centre x, centre y, width, height) in pixels of the network input, (..., 4).

    Source: YOLOv3, section 2.1, https://arxiv.org/abs/1804.02767; scale_xy: YOLOv4, section 3.4, "eliminate grid
        sensitivity", https://arxiv.org/abs/2004.10934; new_coords: Scaled-YOLOv4, https://arxiv.org/abs/2011.08036,
        and the setting of that name in AlexeyAB's Darknet.
    """
    # For s = 1 the product and the offset round nothing: exactly (sigmoid + cell) * stride.
    centre = (raw[..., :2].sigmoid() * scale_xy + (cells - (scale_xy - 1) / 2)) * stride
    size = (2 * raw[..., 2:].sigmoid()).square() if new_coords else raw[..., 2:].exp()
    return torch.cat([centre, size * anchors], dim=-1)


def encode_boxes(
    boxes_cxcywh: Tensor,
    anchors: Tensor,
    cells: Tensor,
    strides: Tensor,
    scale_xy: Tensor | float = 1.0,
    new_coords: bool = False,
) -> tuple[Tensor, Tensor]:
    """Encode boxes as the regression targets of predictions at the given cells and anchors. Inverse of `decode_cxcywh`.

    Args:
        boxes_cxcywh: centre and size in pixels of the network input, (..., 4), sizes positive.
        anchors: (width, height) of the anchor of each box in pixels, (..., 2).
        cells: (column, row) of each box, (..., 2).
        strides: pixels per cell of each box's level, (...).
        scale_xy: s of each box's level, (..., 1) or one number.
        new_coords: see `decode_cxcywh`. Sizes of four anchors and more have no raw value and get that of nearly four.

    Returns:
        Targets of sigmoid(t_xy), (offset in cells + (s - 1) / 2) / s, within 0..1 if the centre lies in the cell,
        (..., 2); and of the raw t_wh, (..., 2).

    Source: as `decode_cxcywh`.
    """
    offset = boxes_cxcywh[..., :2] / strides[..., None] - cells
    target_xy = (offset + (scale_xy - 1) / 2) / scale_xy
    ratio = boxes_cxcywh[..., 2:] / anchors
    return target_xy, (ratio.sqrt() / 2).logit(eps=1e-6) if new_coords else ratio.log()
