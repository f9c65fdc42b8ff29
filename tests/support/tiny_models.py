"""Models small enough to count by hand."""

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
