"""Pixel normalisation inside a network."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class NormalizePixels(nn.Module):
    """Scale, reorder and normalise images: (x * pixel_range - mean) / std for x in 0..1.

    Args:
        mean, std: per channel of the result, in units of `pixel_range`.
        pixel_range: value of a pixel of 255 before mean and std.
        channel_order: "rgb", or "bgr" to flip the channels before mean and std.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], pixel_range: float = 1.0, channel_order: str = "rgb"
    ) -> None:
        super().__init__()
        self.pixel_range, self.channel_order = pixel_range, channel_order
        self.identity = not any(mean) and all(value == 1 for value in std)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalise RGB images, (B, 3, H, W), uint8 0..255 or float 0..1."""
        if images.dtype == torch.uint8:
            images = images.float() / 255 if self.pixel_range == 1 else images.float() * (self.pixel_range / 255)
        elif self.pixel_range != 1:
            images = images * self.pixel_range
        if self.channel_order == "bgr":
            images = images.flip(1)
        return images if self.identity else (images - self.get_buffer("mean")) / self.get_buffer("std")
