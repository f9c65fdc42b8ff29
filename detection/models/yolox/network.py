"""An anchor-free detector: a backbone, a neck and a decoupled head with one prediction per cell."""

import copy
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from detection.contract import Geometry
from detection.models.backbones import Backbone
from detection.models.backbones.darknet import (
    LEAKY_SLOPE,
    conv_block,
    is_darknets,
    list_convolutions,
)
from detection.models.backbones.mobilenet import DepthwiseConv2d
from detection.models.yolo.network import raw_predictions
from detection.models.yolox.layout import OutputLayout
from detection.ops.pixels import NormalizePixels

CONVOLUTIONS = 2  # of each branch, before its predictions


def depthwise_block(channels: int) -> nn.Sequential:
    """3x3 convolution of each channel alone, then 1x1, each with batch norm and leaky ReLU; keeps the shape."""
    depthwise = conv_block(channels, channels, 3)
    depthwise[0] = DepthwiseConv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
    return nn.Sequential(depthwise, conv_block(channels, channels, 1))


class DecoupledHead(nn.Module):
    """Head of a level: a 1x1 stem, then a branch for the classes and one for boxes and objectness.

    (B, in, H, W) to raw values (B, 1, H, W, box_values + 1 + C), or without objectness (B, 1, H, W, box_values + C).

    Args:
        in_channels: of the neck's map.
        channels: of the stem and both branches.
        num_classes: C.
        layout: of the raw values.
        depthwise: 3x3 convolutions over single channels, as in YOLOX-Nano.
        prior: objectness and class probability that the untrained head predicts everywhere.
        size_prior: side of the boxes that it predicts, in strides.

    Source: YOLOX, section 2.1, https://arxiv.org/abs/2107.08430; prior: Focal Loss, section 3.3,
        https://arxiv.org/abs/1708.02002
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_classes: int,
        layout: OutputLayout,
        depthwise: bool,
        prior: float,
        size_prior: float,
    ) -> None:
        super().__init__()
        block = depthwise_block if depthwise else (lambda width: conv_block(width, width, 3))
        self.stem = conv_block(in_channels, channels, 1)
        self.class_branch = nn.Sequential(*(block(channels) for _ in range(CONVOLUTIONS)))
        self.box_branch = nn.Sequential(*(block(channels) for _ in range(CONVOLUTIONS)))
        self.classes = nn.Conv2d(channels, num_classes, 1)
        self.boxes = nn.Conv2d(channels, layout.box_values, 1)
        self.objectness = nn.Conv2d(channels, 1, 1) if layout.objectness else None
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is None:
                nn.init.kaiming_normal_(module.weight, a=LEAKY_SLOPE)
        for output in self.outputs():
            nn.init.normal_(output.weight, std=0.01)
            nn.init.constant_(cast(Tensor, output.bias), math.log(prior / (1 - prior)))
        with torch.no_grad():
            cast(Tensor, self.boxes.bias).copy_(layout.initial_bias(size_prior))

    def outputs(self) -> list[nn.Conv2d]:
        """The convolutions of the predictions, in the order of the raw values."""
        objectness = [] if self.objectness is None else [self.objectness]
        return [self.boxes, *objectness, self.classes]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        of_boxes, of_classes = self.box_branch(x), self.class_branch(x)
        values = [output(of_classes if output is self.classes else of_boxes) for output in self.outputs()]
        return raw_predictions(torch.cat(values, dim=1), 1)


class YOLOX(nn.Module):
    """YOLOX with any backbone, neck and number of levels.

    Args:
        backbone: see `Backbone`.
        neck: maps per level to maps per level, stride ascending; its `out_channels` are those of its maps.
        head_channels: of every level's head.
        num_classes: C.
        layout: of the raw values.
        geometry: for pixel range, channel order, mean and deviation.
        head_depthwise: see `DecoupledHead`.
        prior, size_prior: see `DecoupledHead`.
        batch_norm_momentum: of all batch-norm layers, the backbone's included.
        batch_norm_epsilon: likewise; None: each layer's own.
        one_to_one: a second head per level, on maps without gradient, learns one prediction per object; in evaluation
            it is the only one. Source: YOLOv10, section 3.1, https://arxiv.org/abs/2405.14458

    Source: YOLOX, section 2.1, https://arxiv.org/abs/2107.08430
    """

    def __init__(
        self,
        backbone: Backbone,
        neck: nn.Module,
        head_channels: int,
        num_classes: int,
        layout: OutputLayout,
        geometry: Geometry,
        head_depthwise: bool = False,
        prior: float = 0.01,
        size_prior: float = 1.0,
        batch_norm_momentum: float = 0.1,
        batch_norm_epsilon: float | None = None,
        one_to_one: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.num_classes = num_classes
        self.strides = tuple(backbone.strides)
        self.heads = nn.ModuleList(
            DecoupledHead(channels, head_channels, num_classes, layout, head_depthwise, prior, size_prior)
            for channels in cast(Sequence[int], neck.out_channels)
        )
        self.one_to_one_heads = copy.deepcopy(self.heads) if one_to_one else None
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = batch_norm_momentum
                module.eps = batch_norm_epsilon or module.eps
        self.pixel_mean, self.pixel_std = geometry.pixel_mean, geometry.pixel_std
        self.normalize = NormalizePixels(self.pixel_mean, self.pixel_std, geometry.pixel_range, geometry.channel_order)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the raw predictions.

        Args:
            images: RGB, (B, 3, H, W), uint8 0..255 or float 0..1; H and W multiples of the coarsest stride.

        Returns:
            Raw values per level, stride ascending, (B, 1, H/stride, W/stride, X), see `OutputLayout`; with
            `one_to_one` in training those of the one-to-one heads follow, in evaluation they are the only ones.

        Raises:
            ValueError: if H or W is not a multiple of the coarsest stride.
        """
        if images.shape[2] % self.strides[-1] or images.shape[3] % self.strides[-1]:
            raise ValueError(f"image size {tuple(images.shape[2:])} must be a multiple of {self.strides[-1]}")
        maps = self.neck(self.backbone(self.normalize(images)))
        outputs = []
        if self.one_to_one_heads is None or self.training:
            outputs += [head(features) for head, features in zip(self.heads, maps, strict=True)]
        if self.one_to_one_heads is not None:
            outputs += [head(features.detach()) for head, features in zip(self.one_to_one_heads, maps, strict=True)]
        return outputs

    def all_heads(self) -> list[DecoupledHead]:
        """The heads of all levels, then the one-to-one heads."""
        return [*cast(Any, self.heads), *cast(Any, self.one_to_one_heads or [])]

    def darknet_convolutions(self) -> list[nn.Module]:
        """The backbone's in the order of Darknet's weights files, then neck and heads, which Darknet lacks.

        Files of backbone weights can be loaded and written. Empty if Darknet lacks the backbone.
        """
        if not is_darknets(self.backbone):
            return []
        return [
            *cast(Any, self.backbone).darknet_convolutions(),
            *(convolution for part in (self.neck, self.heads) for convolution in list_convolutions(part)),
        ]

    def output_convolutions(self) -> list[nn.Conv2d]:
        """The convolutions that make the predictions, stride ascending, of each level in the order of its values."""
        return [output for head in self.all_heads() for output in head.outputs()]

    def class_rows(self, num_classes: int) -> list[Tensor]:
        """For each output convolution the filters of the class scores, if there were so many classes.

        (1, C), or (0, C) where a convolution predicts no classes.
        """
        of_classes = torch.arange(num_classes)[None]
        return [
            of_classes if output is head.classes else of_classes[:0]
            for head in self.all_heads()
            for output in head.outputs()
        ]
