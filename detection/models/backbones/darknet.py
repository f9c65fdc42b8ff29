"""The backbones of YOLOv3 and YOLOv3-tiny."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from detection.config.automatic import scaled_channels

LEAKY_SLOPE = 0.1
DARKNET_EPSILON = 1e-6  # of batch norm; added to the standard deviation, not to the variance


def conv_block(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, slope: float = LEAKY_SLOPE
) -> nn.Sequential:
    """Convolution without bias, batch norm, leaky ReLU; (B, in, H, W) to (B, out, H/stride, W/stride)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.LeakyReLU(slope, inplace=True),
    )


def list_convolutions(module: nn.Module) -> list[nn.Sequential | nn.Conv2d]:
    """Every `conv_block` and plain convolution in `module`, in the order of registration."""
    convolutions: list[nn.Sequential | nn.Conv2d] = []
    for child in module.children():
        if isinstance(child, nn.Conv2d) or (
            isinstance(child, nn.Sequential) and isinstance(next(child.children(), None), nn.Conv2d)
        ):
            convolutions.append(child)
        else:
            convolutions += list_convolutions(child)
    return convolutions


class ResidualBlock(nn.Module):
    """1x1 convolution to C / 2 channels and 3x3 back to C, added to the input; (B, C, H, W) to (B, C, H, W)."""

    def __init__(self, channels: int, slope: float = LEAKY_SLOPE) -> None:
        super().__init__()
        self.reduce = conv_block(channels, channels // 2, 1, slope=slope)
        self.expand = conv_block(channels // 2, channels, 3, slope=slope)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.expand(self.reduce(x))


class Darknet53(nn.Module):
    """Darknet-53; (B, 3, H, W) to feature maps of 256, 512, 1024 channels at strides 8, 16, 32.

    Args:
        width: factor of the channels, see `scaled_channels`.
        depth: factor of the residual blocks of a stage (1, 2, 8, 8, 4), rounded, at least one.
        slope: of the leaky ReLU below 0; Darknet's weights were trained with 0.1, timm's with 0.01.

    Source: YOLOv3, section 2.4 and table 1, https://arxiv.org/abs/1804.02767 (without average pooling and classifier);
    the factors, those of EfficientNet, section 3.2, https://arxiv.org/abs/1905.11946, as YOLOX has them
    """

    strides = (8, 16, 32)
    # The published weights were trained on RGB in 0..1.
    pixel_mean = (0.0, 0.0, 0.0)
    pixel_std = (1.0, 1.0, 1.0)

    def __init__(self, width: float = 1.0, depth: float = 1.0, slope: float = LEAKY_SLOPE) -> None:
        super().__init__()
        self.width, self.depth, self.slope = width, depth, slope
        stem, *channels = (scaled_channels(count, width) for count in (32, 64, 128, 256, 512, 1024))
        self.out_channels = tuple(channels[2:])
        self.stem = conv_block(3, stem, 3, slope=slope)
        self.stages = nn.ModuleList(
            nn.Sequential(
                conv_block(before, after, 3, stride=2, slope=slope),
                *(ResidualBlock(after, slope) for _ in range(max(round(depth * blocks), 1))),
            )
            for before, after, blocks in zip([stem, *channels], channels, [1, 2, 8, 8, 4], strict=False)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=slope)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.stem(images)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[2:]

    def darknet_convolutions(self) -> list[nn.Sequential | nn.Conv2d]:
        """Convolutions in the order of Darknet's weights files."""
        return list_convolutions(self)


class DarknetTiny(nn.Module):
    """Backbone of YOLOv3-tiny; (B, 3, H, W) to feature maps of 256 and 1024 channels at strides 16 and 32.

    Source: yolov3-tiny.cfg of Darknet, layers 0 to 12.
    """

    out_channels = (256, 1024)
    strides = (16, 32)
    pixel_mean = Darknet53.pixel_mean
    pixel_std = Darknet53.pixel_std

    def __init__(self) -> None:
        super().__init__()
        first: list[nn.Module] = [conv_block(3, 16, 3)]
        for channels in (32, 64, 128, 256):
            first += [nn.MaxPool2d(2), conv_block(channels // 2, channels, 3)]
        second = [
            nn.MaxPool2d(2),
            conv_block(256, 512, 3),
            # Darknet pads pooling of size 2 and stride 1 below and on the right only.
            nn.ConstantPad2d((0, 1, 0, 1), -math.inf),
            nn.MaxPool2d(2, stride=1),
            conv_block(512, 1024, 3),
        ]
        self.stages = nn.ModuleList([nn.Sequential(*first), nn.Sequential(*second)])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=LEAKY_SLOPE)

    def forward(self, images: Tensor) -> list[Tensor]:
        fine = self.stages[0](images)
        return [fine, self.stages[1](fine)]

    def darknet_convolutions(self) -> list[nn.Sequential | nn.Conv2d]:
        """Convolutions in the order of Darknet's weights files."""
        return list_convolutions(self)


def is_darknets(backbone: object) -> bool:
    """Whether Darknet has such a backbone: its leaky ReLU has no other slope than 0.1."""
    return isinstance(backbone, Darknet53 | DarknetTiny) and getattr(backbone, "slope", LEAKY_SLOPE) == LEAKY_SLOPE


class DarknetBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that in evaluation computes (x - mean) / (sqrt(variance) + 1e-6), as the original Darknet.

    AlexeyAB's Darknet and PyTorch divide by sqrt(variance + 1e-5). Same parameters and training as the parent.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)
        assert self.running_var is not None
        squared = (self.running_var.sqrt() + DARKNET_EPSILON).square()
        return F.batch_norm(x, self.running_mean, squared, self.weight, self.bias, training=False, eps=0.0)


def use_darknet_batch_norm(model: nn.Module) -> None:
    """Turn every batch-norm layer of `model` into a `DarknetBatchNorm2d` in place."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = DarknetBatchNorm2d
