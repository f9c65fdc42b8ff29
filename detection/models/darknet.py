"""Darknet-53, the encoder of YOLOv3, written by hand."""

import torch.nn.functional as F
from torch import Tensor, nn

LEAKY_SLOPE = 0.1
DARKNET_EPSILON = 1e-6  # added to the standard deviation, not to the variance


def conv_block(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    """Convolution without bias, batch normalisation, leaky ReLU; (B, in, H, W) to (B, out, H/stride, W/stride)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.LeakyReLU(LEAKY_SLOPE, inplace=True),
    )


class ResidualBlock(nn.Module):
    """1x1 to half the channels, 3x3 back, added to the input; keeps (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = conv_block(channels, channels // 2, 1)
        self.expand = conv_block(channels // 2, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.expand(self.reduce(x))


class Darknet53(nn.Module):
    """(B, 3, H, W) to maps of 256, 512 and 1024 channels at strides 8, 16 and 32; 52 convolutions.

    Source: YOLOv3, section 2.4 and table 1, https://arxiv.org/abs/1804.02767 (without average pooling and classifier).
    """

    out_channels = (256, 512, 1024)
    strides = (8, 16, 32)
    # The program that trained the published weights scales RGB to 0..1 and does nothing else.
    pixel_mean = (0.0, 0.0, 0.0)
    pixel_std = (1.0, 1.0, 1.0)

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_block(3, 32, 3)
        self.stages = nn.ModuleList(
            nn.Sequential(
                conv_block(channels // 2, channels, 3, stride=2), *(ResidualBlock(channels) for _ in range(blocks))
            )
            for channels, blocks in [(64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)]
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=LEAKY_SLOPE)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.stem(images)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[2:]


class DarknetBatchNorm2d(nn.BatchNorm2d):
    """In evaluation (x - mean) / (sqrt(variance) + 1e-6), as the original Darknet program; same parameters and names.

    AlexeyAB's program and PyTorch divide by sqrt(variance + 1e-5). Training is the parent's.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)
        assert self.running_var is not None
        squared = (self.running_var.sqrt() + DARKNET_EPSILON).square()
        return F.batch_norm(x, self.running_mean, squared, self.weight, self.bias, training=False, eps=0.0)


def use_darknet_normalisation(model: nn.Module) -> None:
    """Turn every batch normalisation of `model` into the class above."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = DarknetBatchNorm2d
