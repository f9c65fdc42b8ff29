"""The modules of a Darknet network that torch lacks.

Source: the layers of https://github.com/pjreddie/darknet and https://github.com/AlexeyAB/darknet.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection.models.yolo.network import raw_predictions


class HardMish(nn.Module):
    """x for x > 0, x * (x + 2) / 2 for -2 <= x <= 0, else 0, as in AlexeyAB's Darknet."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (x + 2).clamp(0, 2) / 2


class MaxPool(nn.Module):
    """Max pooling with Darknet's padding: `padding` rows and columns, half of them (rounded down) above and left."""

    def __init__(self, size: int, stride: int, padding: int) -> None:
        super().__init__()
        self.size, self.stride = size, stride
        self.before, self.after = padding // 2, padding - padding // 2

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (self.before, self.after, self.before, self.after), value=-torch.inf)
        return F.max_pool2d(x, self.size, self.stride)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by `stride`, then multiplication by `scale`."""

    def __init__(self, stride: int, scale: float) -> None:
        super().__init__()
        self.stride, self.scale = stride, scale

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=float(self.stride), mode="nearest")
        return x if self.scale == 1 else x * self.scale


class Route(nn.Module):
    """Concatenation of the outputs of earlier layers, or of one group of channels of each."""

    def __init__(self, sources: Sequence[int], groups: int, group: int) -> None:
        super().__init__()
        self.sources, self.groups, self.group = tuple(sources), groups, group

    def forward(self, _: Tensor, kept: dict[int, Tensor]) -> Tensor:
        maps = [kept[source].chunk(self.groups, dim=1)[self.group] for source in self.sources]
        return maps[0] if len(maps) == 1 else torch.cat(maps, dim=1)


class Shortcut(nn.Module):
    """Sum with the outputs of earlier layers, padded or cut to the channels of the input, then an activation."""

    def __init__(self, sources: Sequence[int], activation: nn.Module | None) -> None:
        super().__init__()
        self.sources, self.activation = tuple(sources), activation

    def forward(self, x: Tensor, kept: dict[int, Tensor]) -> Tensor:
        for source in self.sources:
            other = kept[source]
            missing = x.shape[1] - other.shape[1]
            if missing > 0:
                other = F.pad(other, (0, 0, 0, 0, 0, missing))
            x = x + other[:, : x.shape[1]]
        return x if self.activation is None else self.activation(x)


class Product(nn.Module):
    """Product with the output of an earlier layer, then an activation: [scale_channels] and [sam].

    One of the two maps may be a single cell (a factor per channel) or a single channel (a factor per cell).
    """

    def __init__(self, source: int, activation: nn.Module | None) -> None:
        super().__init__()
        self.sources, self.activation = (source,), activation

    def forward(self, x: Tensor, kept: dict[int, Tensor]) -> Tensor:
        x = x * kept[self.sources[0]]
        return x if self.activation is None else self.activation(x)


class Reorganise(nn.Module):
    """Space to depth, [reorg3d]: (B, C, H, W) to (B, S * S * C, H / S, W / S).

    Channel k of the output takes of every S x S block the pixel in row k // C // S and column k // C % S of channel
    k % C.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        batch_size, channels, rows, columns = x.shape
        step = self.stride
        x = x.reshape(batch_size, channels, rows // step, step, columns // step, step)
        return x.permute(0, 3, 5, 1, 2, 4).reshape(batch_size, -1, rows // step, columns // step)


class OldReorganise(Reorganise):
    """[reorg], the passthrough of YOLOv2: the sizes are those of `Reorganise`, the order is another.

    The original program swaps input and output sizes: it takes the memory of the (C, H, W) map for one of
    (C / S^2, S * H, S * W), reorganises that, and takes the memory of the result for (S * S * C, H / S, W / S).
    """

    def forward(self, x: Tensor) -> Tensor:
        batch_size, channels, rows, columns = x.shape
        step = self.stride
        x = super().forward(x.reshape(batch_size, channels // step**2, rows * step, columns * step))
        return x.reshape(batch_size, channels * step**2, rows // step, columns // step)


class YoloOutput(nn.Module):
    """Raw predictions of one level: (B, A * (5 + C), H, W) to (B, A, H, W, 5 + C)."""

    def __init__(self, num_anchors: int) -> None:
        super().__init__()
        self.num_anchors = num_anchors

    def forward(self, x: Tensor) -> Tensor:
        return raw_predictions(x, self.num_anchors)


class GaussianOutput(YoloOutput):
    """The same of a [Gaussian_yolo], (B, A * (9 + C), H, W), whose box values each have an uncertainty beside them.

    The scores of the original program are objectness * (1 - mean uncertainty) * class probability. The first product
    becomes the objectness here, as a logit, so that decoding and export need to know nothing of it.

    Source: Gaussian YOLOv3, section 3.2, https://arxiv.org/abs/1904.04620, and AlexeyAB's Darknet
    """

    def forward(self, x: Tensor) -> Tensor:
        raw = super().forward(x).float()
        certainty = 1 - raw[..., 1:8:2].sigmoid().mean(-1, keepdim=True)
        objectness = raw[..., 8:9].sigmoid() * certainty
        return torch.cat([raw[..., 0:8:2], (objectness / (1 - objectness)).log(), raw[..., 9:]], dim=-1)


Joining = Route | Shortcut | Product  # layers that take the outputs of earlier ones, their `sources`
