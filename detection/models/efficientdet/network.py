"""The networks of EfficientDet and RetinaNet: a backbone, a feature pyramid and heads that all levels share."""

import math
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from detection.contract import Geometry
from detection.models.backbones import Backbone
from detection.models.efficientdet.bifpn import BiFPN, TopDownPyramid
from detection.models.efficientdet.heads import PlainHead, SeparableHead
from detection.models.efficientdet.variants import Variant
from detection.ops.pixels import NormalizePixels

ANCHORS = 9  # per cell: three sizes, each with three aspect ratios
BOX_VALUES = 4  # ty, tx, th, tw
BATCH_NORM_EPSILON, BATCH_NORM_MOMENTUM = 1e-3, 0.01  # momentum: share of the new batch; 0.99 in TensorFlow's words


class EfficientDet(nn.Module):
    """EfficientDet of any size, and RetinaNet, on any backbone with strides 8, 16 and 32.

    The names of the tensors are those of the public weights `tf_efficientdet_d0` to `d7x`, which load strictly.

    Args:
        backbone: see `Backbone`; its `same_padding`, where it has one, is also that of the pyramid.
        variant: pyramid, heads and levels; its backbone and input size are not read.
        num_classes: C.
        geometry: for pixel range, channel order, mean and deviation.
        redundant_bias: 1x1 convolutions of pyramid and heads have biases even before a batch norm; None: as the public
            weights of this padding have it.
        batch_norm_momentum: of all batch-norm layers, the backbone's included.
        prior: class probability that the untrained network predicts everywhere.

    Source: EfficientDet, https://arxiv.org/abs/1911.09070; RetinaNet and the prior: Focal Loss, sections 3.3 and 4,
        https://arxiv.org/abs/1708.02002; names: github rwightman/efficientdet-pytorch, `effdet/efficientdet.py`
    """

    def __init__(
        self,
        backbone: Backbone,
        variant: Variant,
        num_classes: int,
        geometry: Geometry,
        redundant_bias: bool | None = None,
        batch_norm_momentum: float = BATCH_NORM_MOMENTUM,
        prior: float = 0.01,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.strides = variant.strides
        self.num_classes = num_classes
        same_padding = bool(getattr(backbone, "same_padding", False))
        levels, channels, repeats = len(self.strides), variant.fpn_channels, variant.head_repeats
        class_values, box_values = ANCHORS * num_classes, ANCHORS * BOX_VALUES
        self.fpn: nn.Module
        self.class_net: SeparableHead | PlainHead
        self.box_net: SeparableHead | PlainHead
        bias = same_padding if redundant_bias is None else redundant_bias
        norm = partial(nn.BatchNorm2d, eps=BATCH_NORM_EPSILON)
        if variant.fpn_cells:
            fast = variant.fusion == "fast"
            self.fpn = BiFPN(backbone.out_channels, levels, channels, variant.fpn_cells, fast, same_padding, bias, norm)
        else:
            self.fpn = TopDownPyramid(backbone.out_channels, levels, channels)
        if variant.separable:
            self.class_net = SeparableHead(levels, channels, repeats, class_values, bias, norm)
            self.box_net = SeparableHead(levels, channels, repeats, box_values, bias, norm)
        else:
            self.class_net = PlainHead(channels, repeats, class_values)
            self.box_net = PlainHead(channels, repeats, box_values)
        nn.init.constant_(cast(Tensor, self.class_net.output.bias), -math.log((1 - prior) / prior))
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = batch_norm_momentum
        self.pixel_mean, self.pixel_std = geometry.pixel_mean, geometry.pixel_std
        self.normalize = NormalizePixels(self.pixel_mean, self.pixel_std, geometry.pixel_range, geometry.channel_order)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the raw predictions.

        Args:
            images: RGB, (B, 3, H, W), uint8 0..255 or float 0..1, of any size.

        Returns:
            Raw values per level, stride ascending, (B, 9, H_l, W_l, 4 + C), H_l = ceil(H / stride): ty, tx, th, tw and
            the logits of the classes. Anchors: size outer, aspect ratio inner. The values of a cell are together in
            memory, anchors in their order, so that flattening by row, column and anchor copies nothing.
        """
        maps = self.fpn(self.backbone(self.normalize(images)))
        return [
            join_values(boxes, classes) for boxes, classes in zip(self.box_net(maps), self.class_net(maps), strict=True)
        ]

    def output_convolutions(self) -> list[nn.Conv2d]:
        """The convolutions that make the predictions: classes, boxes."""
        return [self.class_net.output, self.box_net.output]

    def class_rows(self, num_classes: int) -> list[Tensor]:
        """For each output convolution the filters of the class scores, if there were so many classes.

        (9, C), and (0, C) for the boxes.
        """
        rows = torch.arange(ANCHORS * num_classes).view(ANCHORS, num_classes)
        return [rows, rows[:0]]


def join_values(boxes: Tensor, classes: Tensor) -> Tensor:
    """Join maps of 9 * 4 and 9 * C filters, (B, filters, H, W), to (B, 9, H, W, 4 + C)."""
    values = [values.permute(0, 2, 3, 1).unflatten(-1, (ANCHORS, -1)) for values in (boxes, classes)]
    return torch.cat(values, dim=-1).permute(0, 3, 1, 2, 4)  # from (B, H, W, 9, 4 + C)
