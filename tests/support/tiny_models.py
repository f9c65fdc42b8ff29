"""Models small enough to count by hand."""

import torch
from torch import Tensor, nn


class OneConvolution(nn.Module):
    """Keeps its float32 input (3 channels) and, for the square, its output (4 channels) for the backward pass."""

    strides = (32,)

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 1, bias=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.convolution(images.float()).square()]


class Sum(nn.Module):
    def forward(self, outputs: list[Tensor], _: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": outputs[0].sum()}


def last_of_each_stride(features: nn.Sequential, images: Tensor) -> list[Tensor]:
    """The maps at strides 8, 16 and 32 of torchvision's layers; images of 64 rows."""
    found = {}
    with torch.no_grad():
        for layer in features.eval():
            images = layer(images)
            found[64 // images.shape[2]] = images
    return [found[stride] for stride in (8, 16, 32)]
