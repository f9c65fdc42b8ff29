"""Boxes as offsets from anchors, and back.

t_y = (y - y_a) / h_a,  t_x = (x - x_a) / w_a,  t_h = log(h / h_a),  t_w = log(w / w_a)

in this order, as in the published weights; x, y are centres. No factors ("variances") are applied.

Source: Faster R-CNN, equation 2, https://arxiv.org/abs/1506.01497; order and the small constant: `tf2/anchors.py` and
`object_detection/faster_rcnn_box_coder.py` of https://github.com/google/automl, folder efficientdet
"""

import torch
from torch import Tensor

from detection.ops.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh

EPSILON = 1e-7  # pixels, added to sides before they divide or get a logarithm


def encode(boxes: Tensor, anchors_cxcywh: Tensor) -> Tensor:
    """Encode boxes relative to anchors. Inverse of `decode` up to `EPSILON`.

    Args:
        boxes: xyxy in pixels, with an area, (..., P, 4) float32.
        anchors_cxcywh: in pixels, (P, 4).

    Returns:
        t_y, t_x, t_h, t_w, (..., P, 4).
    """
    centre, sides = xyxy_to_cxcywh(boxes).split(2, dim=-1)
    anchor_centre, anchor_sides = anchors_cxcywh.split(2, dim=-1)
    anchor_sides = anchor_sides + EPSILON
    offset, size = (centre - anchor_centre) / anchor_sides, ((sides + EPSILON) / anchor_sides).log()
    return torch.cat([offset.flip(-1), size.flip(-1)], dim=-1)


def decode(raw: Tensor, anchors_cxcywh: Tensor) -> Tensor:
    """Decode raw box values to boxes xyxy in pixels of the network input; they may exceed it.

    Args:
        raw: t_y, t_x, t_h, t_w, (..., P, 4) float32.
        anchors_cxcywh: in pixels, (P, 4).

    Returns:
        (..., P, 4).
    """
    offset, size = raw[..., :2].flip(-1), raw[..., 2:].flip(-1)
    anchor_centre, anchor_sides = anchors_cxcywh.split(2, dim=-1)
    return cxcywh_to_xyxy(torch.cat([anchor_centre + offset * anchor_sides, anchor_sides * size.exp()], dim=-1))
