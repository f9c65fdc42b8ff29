"""Feature pyramids: BiFPN of EfficientDet, and the top-down one of RetinaNet.

Both map the backbone's three maps to `levels` maps of equal channels, stride ascending, each half the size of the one
before, rounded up.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection.models.backbones.mobilenet import DepthwiseConv2d
from detection.ops.same_padding import halve_by_max

MakeNorm = Callable[[int], nn.BatchNorm2d]

FUSION_EPSILON = 1e-4  # keeps the sum of a node's weights from being zero


def bifpn_nodes(levels: int) -> list[tuple[int, tuple[int, ...]]]:
    """Level and inputs of each node of a cell; inputs are numbers of maps, nodes count on from the cell's own inputs.

    Downwards each level joins its map with the newest of the coarser level, then upwards all its maps with the newest
    of the finer one.

    Source: EfficientDet, figure 3, https://arxiv.org/abs/1911.09070; github google/automl,
        `efficientdet/tf2/fpn_configs.py`
    """
    maps = [[level] for level in range(levels)]  # numbers of the maps of each level, oldest first
    nodes: list[tuple[int, tuple[int, ...]]] = []

    def add_node(level: int, inputs: Sequence[int]) -> None:
        maps[level].append(levels + len(nodes))
        nodes.append((level, tuple(inputs)))

    for level in reversed(range(levels - 1)):
        add_node(level, (maps[level][-1], maps[level + 1][-1]))
    for level in range(1, levels):
        add_node(level, (*maps[level], maps[level - 1][-1]))
    return nodes


class SeparableConv(nn.Module):
    """3x3 convolution of each channel alone, then 1x1, then perhaps batch norm; no activation; keeps the size."""

    def __init__(
        self, in_channels: int, out_channels: int, bias: bool = True, norm: Callable[[int], nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.conv_dw = DepthwiseConv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False)
        self.conv_pw = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
        self.bn = nn.Identity() if norm is None else norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv_pw(self.conv_dw(x)))


class Projection(nn.Module):
    """1x1 convolution and batch norm, no activation; (B, in, H, W) to (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool, norm: MakeNorm) -> None:
        super().__init__()
        # The names of the public weights.
        self.conv = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(in_channels, out_channels, 1, bias=bias), bn=norm(out_channels))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Combine(nn.Module):
    """Bring the inputs of a node to its level and channels and join them.

    fast: sum of relu(w) * x / (sum of relu(w) + 1e-4), one weight per input;  sum: sum of x

    Args:
        level: of the node.
        inputs: numbers of the maps.
        levels_of_inputs: of each input; at most one away from the node's, the first is the node's own.
        channels_of_inputs: of each input.
        channels: of the node.
        fast: learn weights.
        same_padding: of the pooling from finer levels.
        bias, norm: see `BiFPN`.

    Source: EfficientDet, section 3.3, https://arxiv.org/abs/1911.09070
    """

    def __init__(
        self,
        level: int,
        inputs: Sequence[int],
        levels_of_inputs: Sequence[int],
        channels_of_inputs: Sequence[int],
        channels: int,
        fast: bool,
        same_padding: bool,
        bias: bool,
        norm: MakeNorm,
    ) -> None:
        super().__init__()
        self.inputs, self.same_padding = tuple(inputs), same_padding
        self.finer = tuple(other < level for other in levels_of_inputs)
        self.resample = nn.ModuleDict(
            {
                str(number): Projection(own, channels, bias, norm)
                for number, own in zip(inputs, channels_of_inputs, strict=True)
                if own != channels
            }
        )
        self.edge_weights = nn.Parameter(torch.ones(len(self.inputs))) if fast else None

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        size = maps[self.inputs[0]].shape[2:]
        weights: Sequence[Tensor] | None = None
        if self.edge_weights is not None:
            positive = self.edge_weights.relu()
            weights = (positive / (positive.sum() + FUSION_EPSILON)).unbind()
        joined: Tensor | None = None
        for position, number in enumerate(self.inputs):
            x = maps[number]
            if str(number) in self.resample:
                x = self.resample[str(number)](x)
            if self.finer[position]:
                x = halve_by_max(x, self.same_padding)
            elif x.shape[2:] != size:
                x = F.interpolate(x, size=size, mode="nearest")
            x = x if weights is None else x * weights[position]
            joined = x if joined is None else joined + x
        assert joined is not None
        return joined


class Node(nn.Module):
    """Join the inputs, then swish, a separable convolution and batch norm."""

    def __init__(self, combine: Combine, channels: int, bias: bool, norm: MakeNorm) -> None:
        super().__init__()
        self.combine = combine
        # The names of the public weights.
        self.after_combine = nn.Sequential(
            OrderedDict(act=nn.SiLU(), conv=SeparableConv(channels, channels, bias, norm))
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.after_combine(self.combine(maps))


class Cell(nn.Module):
    """One BiFPN cell; maps per level to maps per level. Arguments: see `BiFPN`, but `in_channels` of all levels."""

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        fast: bool,
        same_padding: bool,
        bias: bool,
        norm: MakeNorm,
    ) -> None:
        super().__init__()
        nodes = bifpn_nodes(len(in_channels))
        level_of = [*range(len(in_channels)), *(level for level, _ in nodes)]
        channels_of = [*in_channels, *(channels for _ in nodes)]
        self.outputs = tuple(
            max(n for n, own in enumerate(level_of) if own == level) for level in range(len(in_channels))
        )
        self.fnode = nn.ModuleList()
        for level, inputs in nodes:
            levels_of_inputs, channels_of_inputs = ([of[number] for number in inputs] for of in (level_of, channels_of))
            combine = Combine(
                level, inputs, levels_of_inputs, channels_of_inputs, channels, fast, same_padding, bias, norm
            )
            self.fnode.append(Node(combine, channels, bias, norm))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        maps = list(maps)
        for node in self.fnode:
            maps.append(node(maps))
        return [maps[number] for number in self.outputs]


class BiFPN(nn.Module):
    """Bidirectional feature pyramid: cells one after another.

    Coarser levels than the backbone's are pooled from its last map, the first of them after a 1x1 convolution.

    Args:
        in_channels: of the backbone's maps, stride ascending.
        levels: number of maps, at least as many as the backbone's.
        channels: of all maps.
        cells: number of cells, at least 1.
        fast: see `Combine`.
        same_padding: of poolings, see `halve_by_max`.
        bias: 1x1 convolutions before a batch norm have biases, which do nothing but are in the public weights.
        norm: channels to a batch norm.

    Source: EfficientDet, section 3, https://arxiv.org/abs/1911.09070
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        levels: int,
        channels: int,
        cells: int,
        fast: bool,
        same_padding: bool,
        bias: bool,
        norm: MakeNorm,
    ) -> None:
        super().__init__()
        self.levels, self.same_padding = levels, same_padding
        self.resample = nn.ModuleDict()
        if in_channels[-1] != channels:
            self.resample[str(len(in_channels))] = Projection(in_channels[-1], channels, bias, norm)
        of_first = [*in_channels, *[channels] * (levels - len(in_channels))]
        self.cell = nn.ModuleList(
            Cell(of_first if number == 0 else [channels] * levels, channels, fast, same_padding, bias, norm)
            for number in range(cells)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        outputs = list(maps)
        while len(outputs) < self.levels:
            number = str(len(outputs))
            last = self.resample[number](outputs[-1]) if number in self.resample else outputs[-1]
            outputs.append(halve_by_max(last, self.same_padding))
        for cell in self.cell:
            outputs = cell(outputs)
        return outputs


class TopDownPyramid(nn.Module):
    """Feature pyramid network: 1x1 convolutions, sums from coarse to fine, a 3x3 convolution per level.

    Coarser levels than the backbone's come from the coarsest map by 3x3 convolutions with stride 2, all but the first
    after a ReLU. Differs from the paper: the first reads P5, not the backbone's C5, as in torchvision's
    `retinanet_resnet50_fpn`.

    Args:
        in_channels: of the backbone's maps, stride ascending.
        levels: number of maps, at least as many as the backbone's.
        channels: of all maps.

    Source: Feature Pyramid Networks, section 3, https://arxiv.org/abs/1612.03144; Focal Loss, section 4,
        https://arxiv.org/abs/1708.02002
    """

    def __init__(self, in_channels: Sequence[int], levels: int, channels: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(own, channels, 1) for own in in_channels)
        self.outputs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        self.downs = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, 2, padding=1) for _ in range(levels - len(in_channels))
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        joined = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        for level in reversed(range(len(joined) - 1)):
            upper = F.interpolate(joined[level + 1], size=joined[level].shape[2:], mode="nearest")
            joined[level] = joined[level] + upper
        outputs = [output(x) for output, x in zip(self.outputs, joined, strict=True)]
        for number, down in enumerate(self.downs):
            outputs.append(down(outputs[-1].relu() if number else outputs[-1]))
        return outputs
