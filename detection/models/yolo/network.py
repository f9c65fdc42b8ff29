"""The YOLOv3 family: a backbone, a top-down neck and one head per level."""

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection.models.backbones import Backbone
from detection.models.backbones.darknet import LEAKY_SLOPE, Darknet53, DarknetTiny, conv_block, list_convolutions
from detection.models.yolo.head_layout import OBJECTNESS, class_rows, num_values
from detection.ops.pixels import NormalizePixels


class PyramidPooling(nn.Module):
    """Spatial pyramid pooling: max pooling over 13, 9 and 5 cells and the input; (B, C, H, W) to (B, 4 C, H, W).

    Source: yolov3-spp.cfg of Darknet; its weights depend on the order of the maps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pools = nn.ModuleList(nn.MaxPool2d(size, stride=1, padding=size // 2) for size in (13, 9, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([*(pool(x) for pool in self.pools), x], dim=1)


# Layers of a level between the concatenated maps and its head; (B, in, H, W) to (B, width, H, W).
# Arguments: in_channels, width, whether it is the coarsest level.
NeckStage = Callable[[int, int, bool], nn.Sequential]


def yolov3_stage(in_channels: int, width: int, coarsest: bool) -> nn.Sequential:
    """YOLOv3: five convolutions, alternately 1x1 and 3x3."""
    return nn.Sequential(
        conv_block(in_channels, width, 1),
        conv_block(width, 2 * width, 3),
        conv_block(2 * width, width, 1),
        conv_block(width, 2 * width, 3),
        conv_block(2 * width, width, 1),
    )


def spp_stage(in_channels: int, width: int, coarsest: bool) -> nn.Sequential:
    """YOLOv3-SPP: as YOLOv3, with spatial pyramid pooling and a 1x1 convolution in the coarsest level."""
    if not coarsest:
        return yolov3_stage(in_channels, width, coarsest)
    return nn.Sequential(
        conv_block(in_channels, width, 1),
        conv_block(width, 2 * width, 3),
        conv_block(2 * width, width, 1),
        PyramidPooling(),
        conv_block(4 * width, width, 1),
        conv_block(width, 2 * width, 3),
        conv_block(2 * width, width, 1),
    )


def tiny_stage(in_channels: int, width: int, coarsest: bool) -> nn.Sequential:
    """YOLOv3-tiny: a 1x1 convolution in the coarsest level, nothing in the others."""
    return nn.Sequential(conv_block(in_channels, width, 1)) if coarsest else nn.Sequential()


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
    """3x3 convolution to 2 * width, then 1x1 to A * V raw values; (B, in, H, W) to (B, A, H, W, V), V: `num_values`."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        num_anchors: int,
        num_classes: int,
        objectness_prior: float,
        iou_aware: bool = False,
    ) -> None:
        output = nn.Conv2d(2 * width, num_anchors * num_values(num_classes, iou_aware), 1)
        super().__init__(conv_block(in_channels, 2 * width, 3), output)
        self.num_anchors = num_anchors
        initialise_output(output, num_anchors, num_classes, objectness_prior, iou_aware)

    def forward(self, x: Tensor) -> Tensor:
        return raw_predictions(super().forward(x), self.num_anchors)


class YOLOv3(nn.Module):
    """YOLOv3 with any backbone and number of levels.

    Args:
        backbone: see `Backbone`.
        neck_channels: output channels of each level's lateral convolution and neck stage, and half those of its head,
            from the coarsest level to the finest (512, 256, 128 in the paper; 256, 128 in YOLOv3-tiny).
        anchors_per_level: stride ascending.
        num_classes: C.
        objectness_prior: objectness the untrained network predicts.
        batch_norm_momentum: of all batch-norm layers, the backbone's included.
        neck_stage: `yolov3_stage`, `spp_stage` or `tiny_stage`.
        iou_aware: each prediction has one raw value more, its IoU; see `head_layout`.

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
        neck_stage: NeckStage = yolov3_stage,
        iou_aware: bool = False,
    ) -> None:
        super().__init__()
        self.iou_aware = iou_aware
        self.backbone = backbone
        self.num_classes = num_classes
        self.strides = tuple(backbone.strides)
        self.neck = nn.ModuleList()
        self.laterals = nn.ModuleList()
        self.heads = nn.ModuleList()
        carried = 0  # channels handed down from the coarser level
        for width, channels, num_anchors in zip(
            neck_channels, reversed(backbone.out_channels), reversed(anchors_per_level), strict=True
        ):
            stage = neck_stage(carried + channels, width, not self.neck)
            stage_channels = width if len(stage) else carried + channels
            self.neck.append(stage)
            self.heads.append(Head(stage_channels, width, num_anchors, num_classes, objectness_prior, iou_aware))
            if len(self.neck) < len(neck_channels):
                carried = neck_channels[len(self.neck)]
                self.laterals.append(conv_block(stage_channels, carried, 1))
        for module in [*self.neck.modules(), *self.laterals.modules(), *self.heads.modules()]:
            if isinstance(module, nn.Conv2d) and module.bias is None:  # the output convolutions have their own
                nn.init.kaiming_normal_(module.weight, a=LEAKY_SLOPE)
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
        outputs: list[Tensor] = []
        carried: Tensor | None = None
        for level, features in enumerate(reversed(self.backbone(self.normalize(images)))):
            if carried is not None:
                upsampled = F.interpolate(self.laterals[level - 1](carried), scale_factor=2.0, mode="nearest")
                features = torch.cat([upsampled, features], dim=1)
            carried = self.neck[level](features)
            outputs.append(self.heads[level](carried))
        return outputs[::-1]

    def darknet_convolutions(self) -> list[nn.Module]:
        """Convolutions in the order of Darknet's weights files; empty if Darknet lacks the backbone.

        The backbone; then, from the coarsest level to the finest, neck, head and the lateral to the next level.
        """
        if not isinstance(self.backbone, Darknet53 | DarknetTiny):
            return []
        convolutions: list[nn.Module] = [*self.backbone.darknet_convolutions()]
        for level, (stage, head) in enumerate(zip(self.neck, self.heads, strict=True)):
            convolutions += list_convolutions(stage) + list_convolutions(head)
            if level < len(self.laterals):
                convolutions.append(self.laterals[level])
        return convolutions

    def output_convolutions(self) -> list[nn.Conv2d]:
        """The convolutions that make the predictions, stride ascending."""
        return [cast(nn.Conv2d, cast(Head, head)[-1]) for head in reversed(self.heads)]

    def class_rows(self, num_classes: int) -> list[Tensor]:
        """For each output convolution the filters of the class scores, if there were so many classes, (A, C)."""
        before = num_values(0, self.iou_aware)
        return [class_rows(cast(Head, head).num_anchors, num_classes, before) for head in reversed(self.heads)]
