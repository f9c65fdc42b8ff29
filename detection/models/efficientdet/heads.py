"""Heads that all levels share: one predicts the classes of each anchor, one its box."""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from detection.models.efficientdet.bifpn import SeparableConv

PLAIN_STD = 0.01  # deviation of the initial weights of plain convolutions


class SeparableHead(nn.Module):
    """Separable convolutions that all levels share, each followed by a batch norm of the level's own and swish.

    Args:
        levels: number of maps.
        channels: of the maps.
        repeats: convolutions before that of the predictions.
        values: filters of the predictions.
        bias: the repeated 1x1 convolutions have biases, which the batch norm makes useless but the public weights have.
        norm: channels to a batch norm.

    Source: EfficientDet, section 4.2, https://arxiv.org/abs/1911.09070; github google/automl,
        `efficientdet/tf2/efficientdet_keras.py`
    """

    def __init__(
        self, levels: int, channels: int, repeats: int, values: int, bias: bool, norm: Callable[[int], nn.BatchNorm2d]
    ) -> None:
        super().__init__()
        self.conv_rep = nn.ModuleList(SeparableConv(channels, channels, bias) for _ in range(repeats))
        self.bn_rep = nn.ModuleList(
            nn.ModuleList(nn.Sequential(OrderedDict(bn=norm(channels))) for _ in range(levels)) for _ in range(repeats)
        )
        self.predict = SeparableConv(channels, values)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # TensorFlow's variance scaling. It counts the inputs of a depthwise kernel over all channels.
                fan_in = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
                initialise_truncated(module.weight, math.sqrt(1 / fan_in))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def output(self) -> nn.Conv2d:
        """The convolution that makes the predictions."""
        return self.predict.conv_pw

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Map (B, channels, H, W) per level to (B, values, H, W)."""
        outputs = []
        for level, x in enumerate(maps):
            for convolution, norms in zip(self.conv_rep, self.bn_rep, strict=True):
                x = F.silu(norms[level](convolution(x)))  # type: ignore[index]
            outputs.append(self.predict(x))
        return outputs


class PlainHead(nn.Module):
    """3x3 convolutions with ReLU that all levels share, without batch norm.

    Args:
        channels, repeats, values: see `SeparableHead`.

    Source: Focal Loss, section 4, https://arxiv.org/abs/1708.02002
    """

    def __init__(self, channels: int, repeats: int, values: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(repeats))
        self.output = nn.Conv2d(channels, values, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.normal_(module.weight, std=PLAIN_STD)
                nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Map (B, channels, H, W) per level to (B, values, H, W)."""
        outputs = []
        for x in maps:
            for convolution in self.convolutions:
                x = F.relu(convolution(x), inplace=True)
            outputs.append(self.output(x))
        return outputs


def initialise_truncated(weight: Tensor, std: float) -> None:
    """Fill with normal values cut off at two deviations, widened so that their deviation is `std` again."""
    std = std / 0.87962566103423978  # deviation of a standard normal cut off there
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
