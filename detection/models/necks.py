"""Necks: the feature maps of a backbone to as many maps in which coarse and fine levels are combined."""

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection.models.backbones.darknet import LEAKY_SLOPE, conv_block


class PyramidPooling(nn.Module):
    """Spatial pyramid pooling: max pooling over 13, 9 and 5 cells and the input; (B, C, H, W) to (B, 4 C, H, W).

    Source: yolov3-spp.cfg of Darknet; its weights depend on the order of the maps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pools = nn.ModuleList(nn.MaxPool2d(size, stride=1, padding=size // 2) for size in (13, 9, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([*(pool(x) for pool in self.pools), x], dim=1)


# Layers of a level between the concatenated maps and its head; (B, in, H, W) to (B, width, H, W).
# Arguments: in_channels, width, whether it is the coarsest level.
NeckStage = Callable[[int, int, bool], nn.Sequential]


def plain_stage(in_channels: int, width: int, coarsest: bool) -> nn.Sequential:
    """YOLOv3: five convolutions, alternately 1x1 and 3x3."""
    return nn.Sequential(
        conv_block(in_channels, width, 1),
        conv_block(width, 2 * width, 3),
        conv_block(2 * width, width, 1),
        conv_block(width, 2 * width, 3),
        conv_block(2 * width, width, 1),
    )


def spp_stage(in_channels: int, width: int, coarsest: bool) -> nn.Sequential:
    """YOLOv3-SPP: as YOLOv3, with spatial pyramid pooling and a 1x1 convolution in the coarsest level."""
    if not coarsest:
        return plain_stage(in_channels, width, coarsest)
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
    """YOLOv3-tiny: a 1x1 convolution in the coarsest level, nothing in the others."""
    return nn.Sequential(conv_block(in_channels, width, 1)) if coarsest else nn.Sequential()


class TopDownNeck(nn.Module):
    """Neck of YOLOv3: each level joins its map with the coarser level's, halved in channels and doubled in size.

    Args:
        in_channels: of the backbone's maps, stride ascending; each stride is twice the one before.
        widths: channels of each level's output, from the coarsest level to the finest.
        stage: layers of a level.

    Source: YOLOv3, section 2.3, https://arxiv.org/abs/1804.02767
    """

    def __init__(self, in_channels: Sequence[int], widths: Sequence[int], stage: NeckStage = plain_stage) -> None:
        super().__init__()
        self.out_channels = tuple(reversed(widths))  # stride ascending
        self.stages = nn.ModuleList()
        self.laterals = nn.ModuleList()
        for level, (width, channels) in enumerate(zip(widths, reversed(in_channels), strict=True)):
            if level:
                self.laterals.append(conv_block(widths[level - 1], width, 1))
            self.stages.append(stage(channels + width * bool(level), width, not level))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=LEAKY_SLOPE)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Map (B, in, H, W) per level to (B, out, H, W), both stride ascending."""
        carried = self.stages[0](maps[-1])
        outputs = [carried]
        for lateral, stage, features in zip(self.laterals, self.stages[1:], reversed(maps[:-1]), strict=True):
            upsampled = F.interpolate(lateral(carried), scale_factor=2.0, mode="nearest")
            carried = stage(torch.cat([upsampled, features], dim=1))
            outputs.append(carried)
        return outputs[::-1]


class BottomUpPath(nn.Module):
    """Second half of a path aggregation network: each level joins its map with the finer level's, halved in size.

    Args:
        channels: of the maps, stride ascending; each stride is twice the one before. The outputs have the same.

    Source: Path Aggregation Network, section 3.1, https://arxiv.org/abs/1803.01534; with concatenation instead of a sum
    YOLOv4, section 3.4, https://arxiv.org/abs/2004.10934, here with three convolutions per level instead of five
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.out_channels = tuple(channels)
        self.downs = nn.ModuleList(conv_block(width, width, 3, stride=2) for width in channels[:-1])
        self.stages = nn.ModuleList(
            nn.Sequential(
                conv_block(finer + width, width, 1), conv_block(width, 2 * width, 3), conv_block(2 * width, width, 1)
            )
            for finer, width in itertools.pairwise(channels)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=LEAKY_SLOPE)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Map (B, C, H, W) per level to the same shapes, stride ascending; the finest map stays as it is."""
        outputs = [maps[0]]
        for down, stage, features in zip(self.downs, self.stages, maps[1:], strict=True):
            outputs.append(stage(torch.cat([down(outputs[-1]), features], dim=1)))
        return outputs


class PathAggregationNeck(nn.Module):
    """PAN: `TopDownNeck`, then `BottomUpPath`; arguments and interface of the former."""

    def __init__(self, in_channels: Sequence[int], widths: Sequence[int], stage: NeckStage = plain_stage) -> None:
        super().__init__()
        self.top_down = TopDownNeck(in_channels, widths, stage)
        self.bottom_up = BottomUpPath(self.top_down.out_channels)
        self.out_channels = self.bottom_up.out_channels

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Map (B, in, H, W) per level to (B, out, H, W), both stride ascending."""
        return self.bottom_up(self.top_down(maps))
