"""MobileNetV2 and MobileNetV3 of torchvision as backbones."""

import torch
from torch import Tensor, nn
from torchvision.models import (
    MobileNet_V2_Weights,
    MobileNet_V3_Large_Weights,
    MobileNet_V3_Small_Weights,
    WeightsEnum,
    mobilenet_v2,
    mobilenet_v3_large,
    mobilenet_v3_small,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution that stays in float32 under autocast on the CPU; same parameters as its parent.

    oneDNN has no fast bfloat16 gradient for depthwise kernels: this makes a training step of MobileNetV3 1.4 times
    faster (docs/results.md).
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).to(x.dtype)


def use_depthwise_class(features: nn.Module) -> None:
    """Turn every depthwise convolution of `features` into a `DepthwiseConv2d` in place."""
    for module in features.modules():
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
            module.__class__ = DepthwiseConv2d


class MobileNet(nn.Module):
    """A MobileNet; (B, 3, H, W) to the last feature maps of strides 8, 16 and 32.

    Args:
        features: torchvision's layers.
        ends: end of each stride in `features`, exclusive.
        out_channels: of the three feature maps.
        standard_weights: of `model.pretrained: true`; those that torchvision's own detectors start from.
    """

    strides = (8, 16, 32)
    pixel_mean = IMAGENET_MEAN
    pixel_std = IMAGENET_STD
    unused_tensors: tuple[str, ...] = ("classifier.",)  # of torchvision's classifier

    def __init__(
        self,
        features: nn.Sequential,
        ends: tuple[int, int, int],
        out_channels: tuple[int, int, int],
        standard_weights: WeightsEnum,
    ) -> None:
        super().__init__()
        use_depthwise_class(features)
        first, second, third = ends
        self.stages = nn.ModuleList([features[:first], features[first:second], features[second:third]])
        self.out_channels, self.standard_weights = out_channels, standard_weights

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = []
        x = images
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def torchvision_names(self) -> dict[str, str]:
        """Map torchvision's names within `features` to ours: 7.block.0.weight to stages.1.7.block.0.weight."""
        return {name.split(".", 2)[2]: name for name in self.state_dict()}


class MobileNetV3(MobileNet):
    """Source: Searching for MobileNetV3, tables 1 and 2, https://arxiv.org/abs/1905.02244."""


class MobileNetV2(MobileNet):
    """Without the last convolution, which only the classifier reads.

    Source: MobileNetV2, table 2, https://arxiv.org/abs/1801.04381
    """

    unused_tensors = ("18.", "classifier.")


def mobilenet_v2_backbone(leaky_slope: float | None = None) -> MobileNetV2:
    """MobileNetV2: maps of 32, 96 and 320 channels.

    Args:
        leaky_slope: a leaky ReLU of this slope in place of every ReLU6; as MMDetection's YOLOv3 has, which starts from
            weights that were trained with ReLU6.
    """
    features = mobilenet_v2(weights=None).features
    if leaky_slope is not None:
        for module in list(features.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.ReLU6):
                    setattr(module, name, nn.LeakyReLU(leaky_slope, inplace=True))
    return MobileNetV2(features, (7, 14, 18), (32, 96, 320), MobileNet_V2_Weights.IMAGENET1K_V1)


def mobilenet_v3_large_backbone() -> MobileNetV3:
    """MobileNetV3-Large: maps of 40, 112 and 960 channels."""
    weights = MobileNet_V3_Large_Weights.IMAGENET1K_V1
    return MobileNetV3(mobilenet_v3_large(weights=None).features, (7, 13, 17), (40, 112, 960), weights)


def mobilenet_v3_small_backbone() -> MobileNetV3:
    """MobileNetV3-Small: maps of 24, 48 and 576 channels."""
    weights = MobileNet_V3_Small_Weights.IMAGENET1K_V1
    return MobileNetV3(mobilenet_v3_small(weights=None).features, (4, 9, 13), (24, 48, 576), weights)
