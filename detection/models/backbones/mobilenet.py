"""MobileNetV3 from torchvision as a backbone, without its classifier."""

import torch
from torch import Tensor, nn
from torchvision.models import (
    MobileNet_V3_Large_Weights,
    MobileNet_V3_Small_Weights,
    WeightsEnum,
    mobilenet_v3_large,
    mobilenet_v3_small,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# `pretrained: true`: what torchvision's own detectors with this backbone start from.
STANDARD_WEIGHTS: dict[str, WeightsEnum] = {
    "mobilenet_v3_large": MobileNet_V3_Large_Weights.IMAGENET1K_V1,
    "mobilenet_v3_small": MobileNet_V3_Small_Weights.IMAGENET1K_V1,
}


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution that stays in float32 under autocast on the CPU; same parameters and names as its parent.

    oneDNN has no fast bfloat16 gradient for depthwise kernels: the whole training step of MobileNetV3 is 1.4 times
    faster this way (docs/results.md).
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).to(x.dtype)


def use_depthwise_class(features: nn.Module) -> None:
    """Turn every depthwise convolution of `features` into the class above, which adds no state of its own."""
    for module in features.modules():
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
            module.__class__ = DepthwiseConv2d


class MobileNetV3(nn.Module):
    """(B, 3, H, W) to three maps at strides 8, 16 and 32: the last layer of each stride.

    Source: Searching for MobileNetV3, tables 1 and 2, https://arxiv.org/abs/1905.02244
    """

    strides = (8, 16, 32)
    # torchvision's ImageNet weights were trained with this scaling.
    pixel_mean = IMAGENET_MEAN
    pixel_std = IMAGENET_STD

    def __init__(self, features: nn.Sequential, ends: tuple[int, int, int], out_channels: tuple[int, int, int]) -> None:
        super().__init__()
        use_depthwise_class(features)
        first, second, third = ends
        self.stages = nn.ModuleList([features[:first], features[first:second], features[second:third]])
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = []
        x = images
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def torchvision_names(self) -> dict[str, str]:
        """Our state's names by torchvision's within `features`: stages.1.7.block.0.weight by 7.block.0.weight."""
        return {name.split(".", 2)[2]: name for name in self.state_dict()}


def mobilenet_v3_large_backbone() -> MobileNetV3:
    return MobileNetV3(mobilenet_v3_large(weights=None).features, ends=(7, 13, 17), out_channels=(40, 112, 960))


def mobilenet_v3_small_backbone() -> MobileNetV3:
    return MobileNetV3(mobilenet_v3_small(weights=None).features, ends=(4, 9, 13), out_channels=(24, 48, 576))
