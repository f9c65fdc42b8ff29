"""The YOLOv3 family: a backbone, a top-down neck and one head per level."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection.models.backbones import Backbone
from detection.models.backbones.darknet import (
    LEAKY_SLOPE,
    conv_block,
    is_darknets,
    list_convolutions,
)
from detection.models.necks import BottomUpPath, NeckStage, plain_stage
from detection.models.yolo.head_layout import OBJECTNESS, class_rows, num_values
from detection.ops.pixels import NormalizePixels


def initialise_output(
    output: nn.Conv2d, num_anchors: int, num_classes: int, objectness_prior: float, iou_aware: bool = False
) -> None:
    """Initialise an output convolution to predict `objectness_prior` everywhere and equal class probabilities.

    A predicted IoU starts at one half.

    With zero biases thousands of empty cells would dominate the first steps with a loss of log(2) each.

    Source: objectness_prior: Focal Loss for Dense Object Detection, section 3.3, https://arxiv.org/abs/1708.02002
    """
    nn.init.normal_(output.weight, std=0.01)
    bias = torch.zeros(num_anchors, num_values(num_classes, iou_aware))
    bias[:, OBJECTNESS] = math.log(objectness_prior / (1 - objectness_prior))
    bias[:, num_values(0, iou_aware) :] = -math.log(max(num_classes - 1, 1))
    with torch.no_grad():
        output.bias.copy_(bias.flatten())  # type: ignore[union-attr]


def raw_predictions(x: Tensor, num_anchors: int) -> Tensor:
    """Reshape (B, A * (5 + C), H, W) to (B, A, H, W, 5 + C), a view."""
    batch_size, _, rows, columns = x.shape
    return x.view(batch_size, num_anchors, -1, rows, columns).permute(0, 1, 3, 4, 2)


class Head(nn.Sequential):
    """3x3 convolution to `width`, then one to A * V raw values; (B, in, H, W) to (B, A, H, W, V), V: `num_values`.

    Args:
        kernel: side of the last convolution.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        num_anchors: int,
        num_classes: int,
        objectness_prior: float,
        iou_aware: bool = False,
        kernel: int = 1,
    ) -> None:
        filters = num_anchors * num_values(num_classes, iou_aware)
        output = nn.Conv2d(width, filters, kernel, padding=kernel // 2)
        super().__init__(conv_block(in_channels, width, 3), output)
        self.num_anchors = num_anchors
        initialise_output(output, num_anchors, num_classes, objectness_prior, iou_aware)

    def forward(self, x: Tensor) -> Tensor:
        return raw_predictions(super().forward(x), self.num_anchors)


class YOLOv3(nn.Module):
    """YOLOv3 with any backbone and number of levels.

    Args:
        backbone: see `Backbone`.
        neck_channels: output channels of each level's lateral convolution and neck stage, from the coarsest level to
            the finest (512, 256, 128 in the paper; 256, 128 in YOLOv3-tiny).
        anchors_per_level: stride ascending.
        num_classes: C.
        objectness_prior: objectness the untrained network predicts.
        batch_norm_momentum: of all batch-norm layers, the backbone's included.
        neck_stage: `plain_stage`, `spp_stage` or `tiny_stage`.
        path_aggregation: a `BottomUpPath` follows the top-down neck.
        iou_aware: each prediction has one raw value more, its IoU; see `head_layout`.
        output_kernels: side of each level's output convolution, stride ascending; None: 1 everywhere.
        head_channels: of each level's head before its output convolution, from the coarsest level to the finest; None:
            twice those of the neck.

    Source: YOLOv3, section 2.3, https://arxiv.org/abs/1804.02767
    """

    def __init__(
        self,
        backbone: Backbone,
        neck_channels: Sequence[int],
        anchors_per_level: Sequence[int],
        num_classes: int,
        objectness_prior: float = 0.01,
        batch_norm_momentum: float = 0.1,
        neck_stage: NeckStage = plain_stage,
        path_aggregation: bool = False,
        iou_aware: bool = False,
        output_kernels: Sequence[int] | None = None,
        head_channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.iou_aware = iou_aware
        self.backbone = backbone
        self.num_classes = num_classes
        self.strides = tuple(backbone.strides)
        self.neck = nn.ModuleList()
        self.laterals = nn.ModuleList()
        self.heads = nn.ModuleList()
        level_channels: list[int] = []
        carried = 0  # channels handed down from the coarser level
        kernels = [1] * len(neck_channels) if output_kernels is None else output_kernels
        head_widths = [2 * width for width in neck_channels] if head_channels is None else head_channels
        of_levels = (neck_channels, head_widths, *map(reversed, (backbone.out_channels, anchors_per_level, kernels)))
        for width, head_width, channels, num_anchors, kernel in zip(*of_levels, strict=True):
            stage = neck_stage(carried + channels, width, not self.neck)
            stage_channels = width if len(stage) else carried + channels
            self.neck.append(stage)
            level_channels.append(stage_channels)
            head = Head(stage_channels, head_width, num_anchors, num_classes, objectness_prior, iou_aware, kernel)
            self.heads.append(head)
            if len(self.neck) < len(neck_channels):
                carried = neck_channels[len(self.neck)]
                self.laterals.append(conv_block(stage_channels, carried, 1))
        for module in [*self.neck.modules(), *self.laterals.modules(), *self.heads.modules()]:
            if isinstance(module, nn.Conv2d) and module.bias is None:  # the output convolutions have their own
                nn.init.kaiming_normal_(module.weight, a=LEAKY_SLOPE)
        self.bottom_up = BottomUpPath(level_channels[::-1]) if path_aggregation else None
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = batch_norm_momentum
        self.pixel_mean, self.pixel_std = backbone.pixel_mean, backbone.pixel_std
        self.normalize = NormalizePixels(self.pixel_mean, self.pixel_std)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the raw predictions.

        Args:
            images: RGB, (B, 3, H, W), uint8 0..255 or float 0..1; H and W multiples of the coarsest stride.

        Returns:
            Raw logits per level, stride ascending, (B, A, H/stride, W/stride, 5 + C), or 6 + C with `iou_aware`.

        Raises:
            ValueError: if H or W is not a multiple of the coarsest stride.
        """
        if images.shape[2] % self.strides[-1] or images.shape[3] % self.strides[-1]:
            raise ValueError(f"image size {tuple(images.shape[2:])} must be a multiple of {self.strides[-1]}")
        maps: list[Tensor] = []
        carried: Tensor | None = None
        for level, features in enumerate(reversed(self.backbone(self.normalize(images)))):
            if carried is not None:
                upsampled = F.interpolate(self.laterals[level - 1](carried), scale_factor=2.0, mode="nearest")
                features = torch.cat([upsampled, features], dim=1)
            carried = self.neck[level](features)
            maps.append(carried)
        maps.reverse()
        if self.bottom_up is not None:
            maps = self.bottom_up(maps)
        return [self.heads[-1 - level](features) for level, features in enumerate(maps)]

    def darknet_convolutions(self) -> list[nn.Module]:
        """Convolutions in the order of Darknet's weights files; empty if Darknet lacks the backbone.

        The backbone; then, from the coarsest level to the finest, neck, head and the lateral to the next level. With
        path aggregation the heads come later, each after the map it reads, from the finest level to the coarsest.
        """
        if not is_darknets(self.backbone):
            return []
        convolutions: list[nn.Module] = [*cast(Any, self.backbone).darknet_convolutions()]
        for level, (stage, head) in enumerate(zip(self.neck, self.heads, strict=True)):
            convolutions += list_convolutions(stage)
            if self.bottom_up is None:
                convolutions += list_convolutions(head)
            if level < len(self.laterals):
                convolutions.append(self.laterals[level])
        if self.bottom_up is not None:
            finest, *others = reversed(self.heads)
            convolutions += list_convolutions(finest)
            for down, stage, head in zip(self.bottom_up.downs, self.bottom_up.stages, others, strict=True):
                convolutions += [down, *list_convolutions(stage), *list_convolutions(head)]
        return convolutions

    def output_convolutions(self) -> list[nn.Conv2d]:
        """The convolutions that make the predictions, stride ascending."""
        return [cast(nn.Conv2d, cast(Head, head)[-1]) for head in reversed(self.heads)]

    def class_rows(self, num_classes: int) -> list[Tensor]:
        """For each output convolution the filters of the class scores, if there were so many classes, (A, C)."""
        before = num_values(0, self.iou_aware)
        return [class_rows(cast(Head, head).num_anchors, num_classes, before) for head in reversed(self.heads)]
