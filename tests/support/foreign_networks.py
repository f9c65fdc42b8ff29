"""Networks of other programs as plain functions that read tensors by their names there; share nothing with `detection`.

Written from the layouts that the programs' sources show: names, shapes, strides, order of concatenation, taps, slopes.
Run on a `Recorder`, they make a synthetic file of their format; run on that file, they are the expected outputs.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torchvision.models import mobilenet_v3_large, mobilenet_v3_small

BLOCKS = (1, 2, 8, 8, 4)  # residual blocks of Darknet-53
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
Network = Callable[["Source", Tensor], list[Tensor]]  # (tensors, RGB uint8 (B, 3, H, W)) -> raw outputs


class Source(Protocol):
    """Where a network's tensors are from."""

    def __call__(self, name: str, *shape: int) -> Tensor: ...


@functools.cache
def random_values() -> Tensor:
    """More than the largest kernel has; every tensor is a part of them."""
    return torch.randn(2**23, generator=torch.Generator().manual_seed(0))


class Recorder:
    """Draws each tensor when it is asked for: kernels that keep activations near 1, statistics away from 0."""

    def __init__(self, seed: int) -> None:
        self.start = 104729 * seed
        self.state: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        if name not in self.state:
            self.state[name] = self.draw(name, torch.Size(shape))
        return self.state[name]

    def draw(self, name: str, shape: torch.Size) -> Tensor:
        if not shape:
            return torch.tensor(7)
        count, random = shape.numel(), random_values()
        self.start = (self.start + 7919) % (len(random) - count)
        values = random[self.start : self.start + count].view(shape)
        if len(shape) > 1:
            return values * (0.8 / shape[1:].numel() ** 0.5)
        if name.endswith(("running_var", "_variance")):
            return 0.6 + values.abs()
        return 1 + 0.2 * values if name.endswith("weight") else 0.2 * values


class File:
    """The tensors of a file, with the shapes they must have."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state

    def __call__(self, name: str, *shape: int) -> Tensor:
        assert tuple(self.state[name].shape) == shape, name
        return self.state[name]


def norm(
    t: Source, x: Tensor, name: str, eps: float = 1e-5, mean: str = "running_mean", var: str = "running_var"
) -> Tensor:
    count = x.shape[1]
    weight, bias = t(f"{name}.weight", count), t(f"{name}.bias", count)
    average, variance = t(f"{name}.{mean}", count), t(f"{name}.{var}", count)
    if mean == "running_mean":
        t(f"{name}.num_batches_tracked")
    return F.batch_norm(x, average, variance, weight, bias, eps=eps)


def plain(t: Source, x: Tensor, name: str, out: int, size: int = 1) -> Tensor:
    """Convolution with bias."""
    return F.conv2d(x, t(f"{name}.weight", out, x.shape[1], size, size), t(f"{name}.bias", out), padding=size // 2)


def conv_bn(
    t: Source,
    x: Tensor,
    name: str,
    out: int,
    size: int,
    stride: int = 1,
    slope: float = 0.1,
    eps: float = 1e-5,
    norm_name: str = "bn",
    paddle: bool = False,
    bias: bool = False,
) -> Tensor:
    weight = t(f"{name}.conv.weight", out, x.shape[1], size, size)
    x = F.conv2d(x, weight, t(f"{name}.conv.bias", out) if bias else None, stride, size // 2)
    statistics = ("_mean", "_variance") if paddle else ("running_mean", "running_var")
    return F.leaky_relu(norm(t, x, f"{name}.{norm_name}", eps, *statistics), slope)


def up(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def by_anchor(x: Tensor, anchors: int = 3) -> Tensor:
    """(B, A * V, H, W), anchors first, to (B, A, H, W, V)."""
    return torch.stack(x.chunk(anchors, 1), 1).movedim(2, -1)


def paddle(t: Source, images: Tensor, classes: int = 80) -> list[Tensor]:
    """ppdet's YOLOv3 on DarkNet."""

    def block(x: Tensor, name: str, out: int, size: int, stride: int = 1) -> Tensor:
        return conv_bn(t, x, name, out, size, stride, norm_name="batch_norm", paddle=True)

    x = block((images.float() / 255 - MEAN) / STD, "backbone.conv0", 32, 3)
    x = block(x, "backbone.downsample0.conv_bn_layer", 64, 3, 2)
    maps = []
    for stage, count in enumerate(BLOCKS):
        width = 64 * 2**stage
        for number in range(count):
            name = f"backbone.stage.{stage}." + (f"stage.{stage}.{number}" if number else "basicblock0")
            x = x + block(block(x, f"{name}.conv1", width // 2, 1), f"{name}.conv2", width, 3)
        maps.append(x)
        if stage < 4:
            x = block(x, f"backbone.stage.{stage}.downsample.conv_bn_layer", 2 * width, 3, 2)
    outputs: list[Tensor] = []
    route = maps[-1]
    for level, width in enumerate((512, 256, 128)):
        x = maps[-1 - level]
        if level:
            x = torch.cat([up(block(route, f"neck.yolo_transition.{level - 1}", width, 1)), x], 1)
        name = f"neck.yolo_block.{level}"
        for number, (out, size) in enumerate([(width, 1), (2 * width, 3)] * 2):
            x = block(x, f"{name}.conv_module.conv{number}", out, size)
        route = block(x, f"{name}.conv_module.route", width, 1)
        x = plain(t, block(route, f"{name}.tip", 2 * width, 3), f"yolo_head.yolo_output.{level}", 3 * (5 + classes))
        outputs.insert(0, by_anchor(x))
    return outputs


def yolox(t: Source, images: Tensor, classes: int = 80) -> list[Tensor]:
    """YOLOX's exps/default/yolov3.py."""

    def block(x: Tensor, name: str, out: int, size: int, stride: int = 1) -> Tensor:
        return conv_bn(t, x, name, out, size, stride, eps=1e-3)

    def residual(x: Tensor, name: str) -> Tensor:
        return x + block(block(x, f"{name}.layer1", x.shape[1] // 2, 1), f"{name}.layer2", x.shape[1], 3)

    dark = "backbone.backbone."
    x = block(images.float()[:, [2, 1, 0]], f"{dark}stem.0", 32, 3)
    x = residual(block(x, f"{dark}stem.1", 64, 3, 2), f"{dark}stem.2")
    maps = {}
    for stage, count in ((2, 2), (3, 8), (4, 8), (5, 4)):
        x = block(x, f"{dark}dark{stage}.0", 32 * 2**stage, 3, 2)
        for number in range(count):
            x = residual(x, f"{dark}dark{stage}.{number + 1}")
        maps[stage] = x
    x = block(block(x, f"{dark}dark5.5", 512, 1), f"{dark}dark5.6", 1024, 3)
    x = block(x, f"{dark}dark5.7.conv1", 512, 1)
    x = torch.cat([x, *(F.max_pool2d(x, size, 1, size // 2) for size in (5, 9, 13))], 1)
    x = block(block(x, f"{dark}dark5.7.conv2", 512, 1), f"{dark}dark5.8", 1024, 3)
    levels = [block(x, f"{dark}dark5.9", 512, 1)]
    for number, width in ((1, 256), (2, 128)):
        x = torch.cat([up(block(levels[0], f"backbone.out{number}_cbl", width, 1)), maps[5 - number]], 1)
        for step, (out, size) in enumerate([(width, 1), (2 * width, 3), (width, 1), (2 * width, 3), (width, 1)]):
            x = block(x, f"backbone.out{number}.{step}", out, size)
        levels.insert(0, x)
    outputs = []
    for level, x in enumerate(levels):
        stem = block(x, f"head.stems.{level}", 256, 1)
        branches = []
        for branch in ("cls", "reg"):
            y = block(stem, f"head.{branch}_convs.{level}.0", 256, 3)
            branches.append(block(y, f"head.{branch}_convs.{level}.1", 256, 3))
        values = [
            plain(t, branches[1], f"head.reg_preds.{level}", 4),
            plain(t, branches[1], f"head.obj_preds.{level}", 1),
            plain(t, branches[0], f"head.cls_preds.{level}", classes),
        ]
        outputs.append(by_anchor(torch.cat(values, 1), 1))
    return outputs


def research_darknet(t: Source, images: Tensor) -> list[Tensor]:
    """Encoder of the research repository by the lines of Darknet's cfg, and its neck."""
    x, index = (images.float() / 255 - MEAN) / STD, 0
    maps: dict[int, Tensor] = {}

    def block(x: Tensor, out: int, size: int, stride: int = 1) -> Tensor:
        nonlocal index
        name = f"encoder.module_list.{index}."
        x = F.conv2d(x, t(f"{name}conv_{index}.weight", out, x.shape[1], size, size), None, stride, size // 2)
        x, index = F.leaky_relu(norm(t, x, f"{name}batch_norm_{index}"), 0.1), index + 1
        return x

    x = block(x, 32, 3)
    for stage, count in enumerate(BLOCKS):
        x = block(x, 64 * 2**stage, 3, 2)
        for _ in range(count):
            x = x + block(block(x, 32 * 2**stage, 1), 64 * 2**stage, 3)
            maps[index], index = x, index + 1  # the shortcut's own line
    return research_neck(t, maps[36], maps[61], x)


def research_neck(t: Source, fine: Tensor, middle: Tensor, coarse: Tensor) -> list[Tensor]:
    def block(x: Tensor, name: str, out: int, size: int) -> Tensor:
        return conv_bn(t, x, name, out, size, norm_name="batchnorm", bias=True)

    outputs: list[Tensor] = []
    x, width = coarse, coarse.shape[1] // 2
    for level, route in enumerate((None, middle, fine), 1):
        if route is not None:
            width //= 2
            x = torch.cat([up(block(x, f"dbl_m_{level - 1}", width, 1)), route], 1)
        for number in range(1, 6):
            odd = number % 2
            x = block(x, f"dbl_{level}_{number}", width if odd else 2 * width, 1 if odd else 3)
        y = block(x, f"dbl_s{level}", 2 * width, 3)
        outputs.insert(0, by_anchor(plain(t, y, f"conv_s{level}", 288, 3 if level == 2 else 1)))
    return outputs


def timm_darknet53(t: Source, images: Tensor) -> list[Tensor]:
    """Maps of strides 8, 16, 32 of timm's classifier, whose last layer is read and not used."""
    x = conv_bn(t, (images.float() / 255 - MEAN) / STD, "stem.conv1", 32, 3, slope=0.01)
    maps = []
    for stage, count in enumerate(BLOCKS):
        width = 64 * 2**stage
        x = conv_bn(t, x, f"stages.{stage}.conv_down", width, 3, 2, slope=0.01)
        for block in range(count):
            name = f"stages.{stage}.blocks.{block}.conv"
            y = conv_bn(t, x, f"{name}1", width // 2, 1, slope=0.01)
            x = x + conv_bn(t, y, f"{name}2", width, 3, slope=0.01)
        maps.append(x)
    t("head.fc.weight", 1000, 1024)
    t("head.fc.bias", 1000)
    return maps[2:]


def research_mobilenet_small(t: Source, images: Tensor) -> list[Tensor]:
    """On MobileNetV3-Small."""
    return research_mobilenet(t, images, mobilenet_v3_small, (3, 8, 12), 1024)


def research_mobilenet_large(t: Source, images: Tensor) -> list[Tensor]:
    """On MobileNetV3-Large."""
    return research_mobilenet(t, images, mobilenet_v3_large, (6, 12, 16), 1280)


def research_mobilenet(
    t: Source, images: Tensor, network: Callable[..., Any], taps: Sequence[int], hidden: int
) -> list[Tensor]:
    """Encoder of the research repository by torchvision's own layers, and its neck.

    Every tensor of the encoder has two names; the classifier is stored and not used.

    Args:
        taps: layers whose maps the neck reads, the finest first.
        hidden: width of the classifier's first layer.
    """
    with torch.device("meta"):
        features = network(weights=None).features.eval()
    x, maps = (images.float() / 255 - MEAN) / STD, []
    for number, layer in enumerate(features):
        state = {
            name: t(f"encoder.model.features.{number}.{name}", *value.shape)
            for name, value in layer.state_dict().items()
        }
        x = functional_call(layer, state, (x,))
        maps.append(x)
    t("encoder.model.classifier.0.weight", hidden, x.shape[1])
    t("encoder.model.classifier.0.bias", hidden)
    t("encoder.model.classifier.3.weight", 1000, hidden)
    t("encoder.model.classifier.3.bias", 1000)
    fine, middle, coarse = (maps[tap] for tap in taps)
    return research_neck(t, fine, middle, coarse)


def with_second_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with MobileNet's tensors under both their names."""
    first, second = "encoder.model.features.", "encoder.backbone_nn."
    twins = {second + name.removeprefix(first): value for name, value in state.items() if name.startswith(first)}
    return {**state, **twins}


def images_of(side: int) -> Tensor:
    return torch.randint(0, 256, (1, 3, side, side), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)


def synthetic_file(network: Network, seed: int) -> dict[str, Tensor]:
    """A state of every tensor that the network reads, in the order in which it reads them."""
    recorder = Recorder(seed)
    with torch.no_grad():
        network(recorder, images_of(64))
    return recorder.state


def damaged(state: Mapping[str, Tensor], *names: str) -> dict[str, tuple[dict[str, Tensor], str]]:
    """What is wrong -> (a state, words of the refusal): a tensor missing, one extra, one of another shape, and all.

    Args:
        names: of a tensor to leave out, and of one to make narrower.
    """
    absent, narrow = names
    side = 1 if state[narrow].dim() == 4 else 0
    missing = {key: value for key, value in state.items() if key != absent}
    shaped = {narrow: state[narrow].narrow(side, 0, state[narrow].shape[side] - 1)}
    extra = {"extra.weight": torch.ones(1)}
    words = (f"1 missing: {absent}", "1 unknown: extra.weight", f"1 of another shape: {narrow}")
    return {
        "missing": (missing, f"tensors {words[0]}"),
        "extra": ({**state, **extra}, f"tensors {words[1]}"),
        "misshapen": ({**state, **shaped}, f"tensors {words[2]}"),
        "all": ({**missing, **extra, **shaped}, f"tensors {'; '.join(words)}"),
    }
