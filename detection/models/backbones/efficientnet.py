"""EfficientNet as a backbone, in the form of TensorFlow's weights and in that of torchvision's.

Both have the same tensors. They differ in the padding of strided convolutions and in batch norm, so each name in
`BACKBONES` stands for one form and the weights of the other are refused (`classifier_weights`).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model_weights
from torchvision.ops import stochastic_depth

from detection.models.backbones.mobilenet import IMAGENET_MEAN, IMAGENET_STD, DepthwiseConv2d
from detection.ops.same_padding import SamePad2d

# Per stage: blocks, kernel size, stride, expansion, output channels of B0.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM_CHANNELS = 32  # of B0
TAPS = (2, 4, 6)  # stages whose outputs are the maps of strides 8, 16 and 32
FACTORS = (  # of the channels and of the blocks, B0 to B7
    (1.0, 1.0),
    (1.0, 1.1),
    (1.1, 1.2),
    (1.2, 1.4),
    (1.4, 1.8),
    (1.6, 2.2),
    (1.8, 2.6),
    (2.0, 3.1),
)
SQUEEZE = 0.25  # channels within squeeze-and-excitation, as a share of the block's input
DROP_CONNECT = 0.2  # probability that the last block would be skipped; the others have less, in proportion
# TensorFlow's momentum of 0.99 is the share of the old statistics, PyTorch's that of the new ones.
TENSORFLOW_BATCH_NORM = {"eps": 1e-3, "momentum": 0.01}
TORCH_BATCH_NORM = {"eps": 1e-5, "momentum": 0.1}
# Our names -> torchvision's, in the stem and within a block.
STEM_LAYERS = {"conv_stem": "0", "bn1": "1"}
FIRST_STAGE_LAYERS = {
    "conv_dw": "0.0", "bn1": "0.1", "se.conv_reduce": "1.fc1", "se.conv_expand": "1.fc2", "conv_pw": "2.0", "bn2": "2.1"
}  # fmt: skip
OTHER_STAGES_LAYERS = {
    "conv_pw": "0.0", "bn1": "0.1", "conv_dw": "1.0", "bn2": "1.1",
    "se.conv_reduce": "2.fc1", "se.conv_expand": "2.fc2", "conv_pwl": "3.0", "bn3": "3.1",
}  # fmt: skip
FIRST_PORTED = 5  # torchvision's B5 to B7 came from TensorFlow and kept its batch norm


MakeNorm = Callable[[int], nn.BatchNorm2d]


def scale_channels(channels: int, factor: float) -> int:
    """Channels times the factor, to a multiple of 8 that is at least 90 % of it.

    Source: EfficientNet, `round_filters` of github google/automl, `efficientdet/backbone/efficientnet_model.py`
    """
    scaled = channels * factor
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


def make_padding(kernel_size: int, stride: int, same: bool) -> tuple[nn.Module, int]:
    """Padding as a layer of its own, and what the convolution adds itself; with stride 1 both kinds are the same."""
    if same and stride > 1:
        return SamePad2d(kernel_size, stride), 0
    return nn.Identity(), kernel_size // 2


class BlockShape(NamedTuple):
    """Channels and windows of a block; `expansion` is the factor of the channels it works on."""

    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    expansion: int

    @property
    def keeps_shape(self) -> bool:
        """Whether the input can be added to the output."""
        return self.stride == 1 and self.in_channels == self.out_channels


class SqueezeExcite(nn.Module):
    """Weigh the channels by what the whole map holds; (B, C, H, W) to the same.

    Source: Squeeze-and-Excitation, section 3, https://arxiv.org/abs/1709.01507
    """

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, squeezed, 1)
        self.conv_expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3), keepdim=True)
        return x * self.conv_expand(F.silu(self.conv_reduce(means))).sigmoid()


class Block(nn.Module):
    """Base of the blocks: adds the input where the shape stays, in training without its own part now and then.

    Drop-connect draws one number per image from the global generator, whose state checkpoints hold.

    Args:
        keeps_shape: stride 1 and as many channels out as in.
        drop_connect: probability that an image skips the block, in training.

    Source: Deep Networks with Stochastic Depth, section 3, https://arxiv.org/abs/1603.09382
    """

    def __init__(self, keeps_shape: bool, drop_connect: float) -> None:
        super().__init__()
        self.keeps_shape, self.drop_connect = keeps_shape, drop_connect

    def transform(self, x: Tensor) -> Tensor:
        """The block's own part."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = self.transform(x)
        return stochastic_depth(y, self.drop_connect, "row", self.training) + x if self.keeps_shape else y


class SeparableBlock(Block):
    """Depthwise convolution, squeeze-and-excitation, 1x1 convolution without activation: the first stage.

    Args:
        shape: see `BlockShape`.
        same_padding: see `make_padding`.
        norm: channels to a batch norm.
        drop_connect: see `Block`.
    """

    def __init__(self, shape: BlockShape, same_padding: bool, norm: MakeNorm, drop_connect: float) -> None:
        super().__init__(shape.keeps_shape, drop_connect)
        channels = shape.in_channels
        self.pad, padding = make_padding(shape.kernel_size, shape.stride, same_padding)
        self.conv_dw = DepthwiseConv2d(
            channels, channels, shape.kernel_size, shape.stride, padding, groups=channels, bias=False
        )
        self.bn1 = norm(channels)
        self.se = SqueezeExcite(channels, max(1, int(SQUEEZE * channels)))
        self.conv_pw = nn.Conv2d(channels, shape.out_channels, 1, bias=False)
        self.bn2 = norm(shape.out_channels)

    def transform(self, x: Tensor) -> Tensor:
        x = self.se(F.silu(self.bn1(self.conv_dw(self.pad(x)))))
        return self.bn2(self.conv_pw(x))


class InvertedBlock(Block):
    """1x1 convolution to more channels, then as `SeparableBlock`: all other stages. Arguments: see there.

    Source: MobileNetV2, section 3.3, https://arxiv.org/abs/1801.04381
    """

    def __init__(self, shape: BlockShape, same_padding: bool, norm: MakeNorm, drop_connect: float) -> None:
        super().__init__(shape.keeps_shape, drop_connect)
        width = shape.in_channels * shape.expansion
        self.conv_pw = nn.Conv2d(shape.in_channels, width, 1, bias=False)
        self.bn1 = norm(width)
        self.pad, padding = make_padding(shape.kernel_size, shape.stride, same_padding)
        self.conv_dw = DepthwiseConv2d(width, width, shape.kernel_size, shape.stride, padding, groups=width, bias=False)
        self.bn2 = norm(width)
        # A share of the block's input channels, not of the wider ones it works on.
        self.se = SqueezeExcite(width, max(1, int(SQUEEZE * shape.in_channels)))
        self.conv_pwl = nn.Conv2d(width, shape.out_channels, 1, bias=False)
        self.bn3 = norm(shape.out_channels)

    def transform(self, x: Tensor) -> Tensor:
        x = F.silu(self.bn1(self.conv_pw(x)))
        x = self.se(F.silu(self.bn2(self.conv_dw(self.pad(x)))))
        return self.bn3(self.conv_pwl(x))


class EfficientNet(nn.Module):
    """EfficientNet without its classifier; (B, 3, H, W) to maps at strides 8, 16, 32, sizes rounded up.

    The names of the tensors are those of timm's networks and of the public EfficientDet weights.

    Args:
        number: 0 to 7 for B0 to B7.
        same_padding: of strided convolutions, see `same_padding`; else symmetric.
        batch_norm_epsilon, batch_norm_momentum: of all batch-norm layers.
        drop_connect: probability that the last block would be skipped in training.
        standard_weights: torchvision's, of `model.pretrained: true`; None for TensorFlow's form.

    Source: EfficientNet, section 4, https://arxiv.org/abs/1905.11946; details: github google/automl,
        `efficientdet/backbone/efficientnet_builder.py`
    """

    strides = (8, 16, 32)
    pixel_mean = IMAGENET_MEAN
    pixel_std = IMAGENET_STD
    unused_tensors = ("8.", "classifier.")  # of torchvision's classifier

    def __init__(
        self,
        number: int,
        same_padding: bool,
        batch_norm_epsilon: float,
        batch_norm_momentum: float,
        drop_connect: float = DROP_CONNECT,
        standard_weights: WeightsEnum | None = None,
    ) -> None:
        super().__init__()
        self.name = f"{'tf_' if same_padding else ''}efficientnet_b{number}"
        self.same_padding, self.batch_norm_epsilon = same_padding, batch_norm_epsilon
        self.standard_weights = standard_weights
        width, depth = FACTORS[number]
        norm = partial(nn.BatchNorm2d, eps=batch_norm_epsilon, momentum=batch_norm_momentum)
        channels = scale_channels(STEM_CHANNELS, width)
        self.pad, padding = make_padding(3, 2, same_padding)
        self.conv_stem = nn.Conv2d(3, channels, 3, 2, padding, bias=False)
        self.bn1 = norm(channels)
        counts = [math.ceil(depth * stage[0]) for stage in STAGES]
        self.blocks = nn.ModuleList()
        done = 0
        for count, (_, kernel_size, stride, expansion, of_b0) in zip(counts, STAGES, strict=True):
            kind = SeparableBlock if expansion == 1 else InvertedBlock
            stage: list[nn.Module] = []
            for position in range(count):
                share = drop_connect * done / sum(counts)
                out_channels, step = scale_channels(of_b0, width), 1 if position else stride
                shape = BlockShape(channels, out_channels, kernel_size, step, expansion)
                stage.append(kind(shape, same_padding, norm, share))
                channels = out_channels
                done += 1
            self.blocks.append(nn.Sequential(*stage))
        self.out_channels = tuple(scale_channels(STAGES[tap][-1], width) for tap in TAPS)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def stages(self) -> nn.ModuleList:
        """The stages, for activation checkpointing and layer-wise learning rates."""
        return self.blocks

    def forward(self, images: Tensor) -> list[Tensor]:
        x = F.silu(self.bn1(self.conv_stem(self.pad(images))))
        maps = []
        for number, stage in enumerate(self.blocks):
            x = stage(x)
            if number in TAPS:
                maps.append(x)
        return maps

    def torchvision_names(self) -> dict[str, str]:
        """Map torchvision's names within `features` to ours: 2.0.block.1.0.weight to blocks.1.0.conv_dw.weight."""
        return {torchvision_name(name): name for name in self.state_dict()}


def torchvision_name(name: str) -> str:
    """Name within torchvision's `features` of a tensor of ours; its first layer is the stem."""
    module, _, tensor = name.rpartition(".")
    if not module.startswith("blocks."):
        return f"0.{STEM_LAYERS[module]}.{tensor}"
    _, stage, block, module = module.split(".", 3)
    layers = FIRST_STAGE_LAYERS if stage == "0" else OTHER_STAGES_LAYERS
    return f"{int(stage) + 1}.{block}.block.{layers[module]}.{tensor}"


def tensorflow_efficientnet(number: int) -> EfficientNet:
    """EfficientNet in the form of TensorFlow's weights, as in the public EfficientDets and timm's `tf_efficientnet_bN`.

    B0 is too small for drop-connect in a detector, as in github google/automl, `efficientdet_arch.py`.
    """
    norm = TENSORFLOW_BATCH_NORM
    return EfficientNet(number, True, norm["eps"], norm["momentum"], DROP_CONNECT * bool(number))


def torchvision_efficientnet(number: int) -> EfficientNet:
    """EfficientNet in the form of torchvision's weights; drop-connect as in `tensorflow_efficientnet`."""
    norm = TENSORFLOW_BATCH_NORM if number >= FIRST_PORTED else TORCH_BATCH_NORM
    weights = get_model_weights(f"efficientnet_b{number}")["IMAGENET1K_V1"]
    return EfficientNet(number, False, norm["eps"], norm["momentum"], DROP_CONNECT * bool(number), weights)
