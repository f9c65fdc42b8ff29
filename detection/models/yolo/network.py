"""The YOLOv3 family: a backbone, a top-down neck and one head per level, however many levels the backbone has."""

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection.models.backbones import Backbone
from detection.models.backbones.darknet import LEAKY_SLOPE, Darknet53, DarknetTiny, conv_block, list_convolutions
from detection.models.yolo.head import CLASSES, OBJECTNESS, num_values
from detection.ops.pixels import NormalizePixels


class PyramidPooling(nn.Module):
    """The map beside its maxima over 13, 9 and 5 cells; (B, C, H, W) to (B, 4 C, H, W), the widest window first.

    Source: yolov3-spp.cfg of Darknet, whose weights depend on this order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pools = nn.ModuleList(nn.MaxPool2d(size, stride=1, padding=size // 2) for size in (13, 9, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([*(pool(x) for pool in self.pools), x], dim=1)


# What a level does with the joined maps before its head; (B, in, H, W) to (B, width, H, W).
# Arguments: in_channels, width, whether this is the coarsest level.
NeckStage = Callable[[int, int, bool], nn.Sequential]


def yolov3_stage(in_channels: int, width: int, coarsest: bool) -> nn.Sequential:
    """Five convolutions, 1x1 and 3x3 in turn."""
    return nn.Sequential(
        conv_block(in_channels, width, 1),
        conv_block(width, 2 * width, 3),
        conv_block(2 * width, width, 1),
        conv_block(width, 2 * width, 3),
        conv_block(2 * width, width, 1),
    )


def spp_stage(in_channels: int, width: int, coarsest: bool) -> nn.Sequential:
    """YOLOv3-SPP: the coarsest level pools after its third convolution, and one more narrows the result."""
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
    """YOLOv3-tiny: one convolution at the coarsest level; elsewhere none, and the joined maps keep their channels."""
    return nn.Sequential(conv_block(in_channels, width, 1)) if coarsest else nn.Sequential()


def initialise_output(output: nn.Conv2d, num_anchors: int, num_classes: int, objectness_prior: float) -> None:
    """An untrained network says "nothing here" and "any class alike": thousands of empty cells would otherwise dominate
    the first steps with log(2) each."""
    nn.init.normal_(output.weight, std=0.01)
    bias = torch.zeros(num_anchors, num_values(num_classes))
    bias[:, OBJECTNESS] = math.log(objectness_prior / (1 - objectness_prior))
    bias[:, CLASSES] = -math.log(max(num_classes - 1, 1))
    with torch.no_grad():
        output.bias.copy_(bias.flatten())  # type: ignore[union-attr]


def raw_predictions(x: Tensor, num_anchors: int) -> Tensor:
    """(B, A * (5 + C), H, W) to (B, A, H, W, 5 + C); with channels_last memory a view."""
    batch_size, _, rows, columns = x.shape
    return x.view(batch_size, num_anchors, -1, rows, columns).permute(0, 1, 3, 4, 2)


class Head(nn.Sequential):
    """3x3 to twice the width, then 1x1 to anchors * (5 + classes) raw values per cell."""

    def __init__(
        self, in_channels: int, width: int, num_anchors: int, num_classes: int, objectness_prior: float
    ) -> None:
        output = nn.Conv2d(2 * width, num_anchors * num_values(num_classes), 1)
        super().__init__(conv_block(in_channels, 2 * width, 3), output)
        self.num_anchors = num_anchors
        initialise_output(output, num_anchors, num_classes, objectness_prior)

    def forward(self, x: Tensor) -> Tensor:
        return raw_predictions(super().forward(x), self.num_anchors)


class YOLOv3(nn.Module):
    """Images to raw predictions per level, stride ascending.

    Args:
        backbone: returns maps, stride ascending, and declares out_channels, strides, pixel_mean and pixel_std.
        neck_channels: width of the neck per level, from the coarsest stride to the finest (512, 256, 128 in the paper;
            256, 128 in YOLOv3-tiny): of the lateral convolution into the level, of its neck stage, and half that of
            its head.
        anchors_per_level: stride ascending.
        num_classes: C.
        objectness_prior: objectness the untrained network predicts.
        batch_norm_momentum: of every batch norm, the backbone's too.
        neck_stage: what makes the family's member: `yolov3_stage`, `spp_stage` or `tiny_stage`.

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
    ) -> None:
        super().__init__()
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
            self.heads.append(Head(stage_channels, width, num_anchors, num_classes, objectness_prior))
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
        """Args:
            images: RGB, (B, 3, H, W), uint8 0..255 or float 0..1; H and W multiples of the coarsest stride.

        Returns:
            Raw logits per level, stride ascending, (B, A, H/stride, W/stride, 5 + C).

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
        """Convolutions in the order of Darknet's .cfg, in which its files store them.

        The backbone; then from the coarsest level to the finest its neck, its head and the lateral to the next level.
        Empty where the program has no such backbone.
        """
        if not isinstance(self.backbone, Darknet53 | DarknetTiny):
            return []
        found: list[nn.Module] = [*self.backbone.darknet_convolutions()]
        for level, (stage, head) in enumerate(zip(self.neck, self.heads, strict=True)):
            found += list_convolutions(stage) + list_convolutions(head)
            if level < len(self.laterals):
                found.append(self.laterals[level])
        return found

    def output_convolutions(self) -> list[nn.Conv2d]:
        """The convolutions that make the predictions, stride ascending."""
        return [cast(nn.Conv2d, cast(Head, head)[-1]) for head in reversed(self.heads)]
