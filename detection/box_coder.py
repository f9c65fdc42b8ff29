"""From raw network output to boxes and back, exact inverses."""

import torch
from torch import Tensor

from detection.anchors import cell_grid
from detection.boxes import cxcywh_to_xyxy


def decode_boxes(raw: Tensor, anchors: Tensor, stride: int, scale_xy: float = 1.0, new_coords: bool = False) -> Tensor:
    """Turn the raw output of one level into boxes. Inverse of `encode_boxes` at the cell and anchor of the box.

    centre = (sigmoid(t) + cell) * stride,  size = anchor * exp(t), in float32 whatever the input's type

    Args:
        raw: network output before any activation, (B, A, H, W, 4 or more); only the first four values are read.
        anchors: (width, height) in pixels of the network input, (A, 2).
        stride: pixels per cell.

    Returns:
        Boxes (x1, y1, x2, y2) in pixels of the network input, (B, A, H, W, 4) float32; may exceed the image.

    Raises:
        ValueError: if `raw` and `anchors` disagree on A.

    Source: YOLOv3, section 2.1, https://arxiv.org/abs/1804.02767
    """
    if raw.shape[1] != len(anchors):
        raise ValueError(f"raw output has {raw.shape[1]} anchors per cell, expected {len(anchors)}")
    raw = raw[..., :4].float()
    share = raw[..., :2].sigmoid() * scale_xy - (scale_xy - 1) / 2
    centre = (share + cell_grid(raw.shape[2], raw.shape[3], raw.device)) * stride
    factor = (2 * raw[..., 2:].sigmoid()).square() if new_coords else raw[..., 2:].exp()
    size = factor * anchors[:, None, None, :]
    return cxcywh_to_xyxy(torch.cat([centre, size], dim=-1))


def encode_boxes(boxes_cxcywh: Tensor, anchors: Tensor, cells: Tensor, strides: Tensor) -> tuple[Tensor, Tensor]:
    """The values a prediction should have at the given cell and anchor so that decoding gives the box.

    Args:
        boxes_cxcywh: centre and size in pixels of the network input, (..., 4), sizes positive.
        anchors: (width, height) of the anchor of each box in pixels, (..., 2).
        cells: (column, row) of each box, (..., 2).
        strides: pixels per cell of each box's level, (...).

    Returns:
        The centre as a share of the cell, 0..1, what sigmoid(t_xy) should be, (..., 2); and the raw t_wh, (..., 2).

    Source: YOLOv3, section 2.1, https://arxiv.org/abs/1804.02767
    """
    share_of_cell = boxes_cxcywh[..., :2] / strides[..., None] - cells
    return share_of_cell, (boxes_cxcywh[..., 2:] / anchors).log()
