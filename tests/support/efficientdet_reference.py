"""EfficientDet a second time: the public tensors by name and shape, and a forward pass from nothing but them.

Written from the tables of the published program (names of tensors, nodes of a cell), without our modules.
"""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

STRIDES, KERNELS = (1, 2, 2, 2, 1, 2, 1), (3, 3, 5, 3, 5, 5, 3)  # of EfficientNet's stages
B0 = (32, [(1, 16), (2, 24), (2, 40), (3, 80), (3, 112), (4, 192), (1, 320)])  # stem; blocks and channels per stage
# Level and inputs of each node of a cell, of five and of six levels; maps 0 to 4 (5) are the cell's inputs.
NODES = {
    5: [
        *((3, (3, 4)), (2, (2, 5)), (1, (1, 6)), (0, (0, 7))),
        *((1, (1, 7, 8)), (2, (2, 6, 9)), (3, (3, 5, 10)), (4, (4, 11))),
    ],
    6: [
        *((4, (4, 5)), (3, (3, 6)), (2, (2, 7)), (1, (1, 8)), (0, (0, 9))),
        *((1, (1, 9, 10)), (2, (2, 8, 11)), (3, (3, 7, 12)), (4, (4, 6, 13)), (5, (5, 14))),
    ],
}  # fmt: skip
OUTPUTS = {5: (8, 9, 10, 11, 12), 6: (10, 11, 12, 13, 14, 15)}
EPSILON = 1e-3


def norm(name: str, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for part in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{part}", (channels,)
    yield f"{name}.num_batches_tracked", ()


def public_shapes(
    channels: int, cells: int, repeats: int, classes: int, levels: int, fast: bool, backbone: tuple = B0
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a `tf_efficientdet` file."""
    found: list[tuple[str, tuple[int, ...]]] = []
    width, stages = backbone
    found += [("backbone.conv_stem.weight", (width, 3, 3, 3)), *norm("backbone.bn1", width)]
    for stage, (count, out) in enumerate(stages):
        for block in range(count):
            inner, squeezed, at = width * (6 if stage else 1), width // 4, f"backbone.blocks.{stage}.{block}"
            layers = [("conv_dw", (inner, 1, KERNELS[stage], KERNELS[stage]))]
            layers += [("conv_pwl", (out, inner, 1, 1))] if stage else [("conv_pw", (out, inner, 1, 1))]
            layers = [("conv_pw", (inner, width, 1, 1))] * bool(stage) + layers
            for number, (name, shape) in enumerate(layers, start=1):
                found += [(f"{at}.{name}.weight", shape), *norm(f"{at}.bn{number}", shape[0])]
            for name, shape in (("conv_reduce", (squeezed, inner, 1, 1)), ("conv_expand", (inner, squeezed, 1, 1))):
                found += [(f"{at}.se.{name}.weight", shape), (f"{at}.se.{name}.bias", shape[:1])]
            width = out
    taps = [stages[stage][1] for stage in (2, 4, 6)]
    projected = [("fpn.resample.3.conv", taps[2])]
    nodes = NODES[levels]
    projected += [
        (f"fpn.cell.0.fnode.{node}.combine.resample.{number}.conv", taps[number])
        for node, (_, inputs) in enumerate(nodes)
        for number in inputs
        if number < 3
    ]
    for name, own in projected:
        found += [(f"{name}.conv.weight", (channels, own, 1, 1)), (f"{name}.conv.bias", (channels,))]
        found += norm(f"{name}.bn", channels)
    separable = ("conv_dw.weight", (channels, 1, 3, 3))
    for cell in range(cells):
        for node, (_, inputs) in enumerate(nodes):
            at = f"fpn.cell.{cell}.fnode.{node}"
            found += [(f"{at}.combine.edge_weights", (len(inputs),))] * fast
            at += ".after_combine.conv"
            found += [(f"{at}.{separable[0]}", separable[1]), (f"{at}.conv_pw.weight", (channels, channels, 1, 1))]
            found += [(f"{at}.conv_pw.bias", (channels,)), *norm(f"{at}.bn", channels)]
    for net, values in (("class_net", 9 * classes), ("box_net", 36)):
        for name, out in [(f"conv_rep.{repeat}", channels) for repeat in range(repeats)] + [("predict", values)]:
            found += [(f"{net}.{name}.{separable[0]}", separable[1])]
            found += [(f"{net}.{name}.conv_pw.weight", (out, channels, 1, 1)), (f"{net}.{name}.conv_pw.bias", (out,))]
        for repeat in range(repeats):
            for level in range(levels):
                found += norm(f"{net}.bn_rep.{repeat}.{level}.bn", channels)
    assert len(dict(found)) == len(found)
    return dict(found)


def random_state(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Seeded values for tensors, such that the maps of a deep network stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(3)
        elif len(shape) == 4:
            state[name] = torch.randn(shape, generator=generator) * (0.9 / (shape[1] * shape[2] * shape[3]) ** 0.5)
        elif name.endswith(("running_var", "weight")):
            state[name] = torch.rand(shape, generator=generator) + 0.5
        else:  # biases, means and weights of nodes, of which some are negative
            offset = 0.4 if name.endswith("edge_weights") else 0.0
            state[name] = torch.randn(shape, generator=generator) * 0.4 + offset
    return state


class Reference:
    """The forward pass in evaluation."""

    def __init__(self, state: Mapping[str, Tensor], levels: int) -> None:
        self.state, self.levels = state, levels

    def convolve(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        groups = x.shape[1] // weight.shape[1]
        x = pad(x, weight.shape[2], stride, 0.0)
        return F.conv2d(x, weight, self.state.get(f"{name}.bias"), stride, groups=groups)

    def norm(self, name: str, x: Tensor) -> Tensor:
        mean, variance, weight, bias = (
            self.state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (variance + EPSILON).sqrt() * weight + bias

    def block(self, at: str, x: Tensor, stride: int) -> Tensor:
        y, number = x, 1
        if f"{at}.conv_pwl.weight" in self.state:
            y, number = swish(self.norm(f"{at}.bn1", self.convolve(f"{at}.conv_pw", y))), 2
        y = swish(self.norm(f"{at}.bn{number}", self.convolve(f"{at}.conv_dw", y, stride)))
        squeezed = swish(self.convolve(f"{at}.se.conv_reduce", y.mean((2, 3), keepdim=True)))
        y = y * torch.sigmoid(self.convolve(f"{at}.se.conv_expand", squeezed))
        y = self.norm(f"{at}.bn{number + 1}", self.convolve(f"{at}.conv_pw{'l' if number == 2 else ''}", y))
        return x + y if stride == 1 and x.shape == y.shape else y

    def backbone(self, x: Tensor) -> list[Tensor]:
        x = swish(self.norm("backbone.bn1", self.convolve("backbone.conv_stem", x, 2)))
        maps = []
        for stage, stride in enumerate(STRIDES):
            block = 0
            while f"backbone.blocks.{stage}.{block}.conv_dw.weight" in self.state:
                x = self.block(f"backbone.blocks.{stage}.{block}", x, 1 if block else stride)
                block += 1
            maps += [x] * (stage in (2, 4, 6))
        return maps

    def projected(self, name: str, x: Tensor) -> Tensor:
        known = f"{name}.conv.weight" in self.state
        return self.norm(f"{name}.bn", self.convolve(f"{name}.conv", x)) if known else x

    def separable(self, name: str, x: Tensor) -> Tensor:
        return self.convolve(f"{name}.conv_pw", self.convolve(f"{name}.conv_dw", x))

    def node(self, at: str, maps: list[Tensor], inputs: tuple[int, ...]) -> Tensor:
        rows, columns = maps[inputs[0]].shape[2:]
        resampled = []
        for number in inputs:
            x = self.projected(f"{at}.combine.resample.{number}.conv", maps[number])
            if x.shape[2] > rows or x.shape[3] > columns:
                x = halve(x)
            # each row and column from the one at its share of the height and width, rounded down
            x = x[:, :, torch.arange(rows) * x.shape[2] // rows][..., torch.arange(columns) * x.shape[3] // columns]
            resampled.append(x)
        weights = self.state.get(f"{at}.combine.edge_weights")
        weights = (
            torch.ones(len(inputs)) if weights is None else weights.clamp(min=0) / (weights.clamp(min=0).sum() + 1e-4)
        )
        joined = sum(weight * x for weight, x in zip(weights, resampled, strict=True))
        return self.norm(f"{at}.after_combine.conv.bn", self.separable(f"{at}.after_combine.conv", swish(joined)))

    def pyramid(self, maps: list[Tensor]) -> list[Tensor]:
        maps = [*maps, halve(self.projected("fpn.resample.3.conv", maps[2]))]
        while len(maps) < self.levels:
            maps.append(halve(maps[-1]))
        cell = 0
        while f"fpn.cell.{cell}.fnode.0.after_combine.conv.conv_dw.weight" in self.state:
            for node, (_, inputs) in enumerate(NODES[self.levels]):
                maps.append(self.node(f"fpn.cell.{cell}.fnode.{node}", maps, inputs))
            maps = [maps[number] for number in OUTPUTS[self.levels]]
            cell += 1
        return maps

    def head(self, net: str, x: Tensor, level: int) -> Tensor:
        repeat = 0
        while f"{net}.conv_rep.{repeat}.conv_dw.weight" in self.state:
            x = swish(self.norm(f"{net}.bn_rep.{repeat}.{level}.bn", self.separable(f"{net}.conv_rep.{repeat}", x)))
            repeat += 1
        return self.separable(f"{net}.predict", x)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Raw values of normalised images, per level (B, 9, H, W, 4 + C)."""
        outputs = []
        for level, x in enumerate(self.pyramid(self.backbone(images))):
            boxes, classes = self.head("box_net", x, level), self.head("class_net", x, level)
            count = classes.shape[1] // 9
            anchors = [
                torch.cat([boxes[:, 4 * a : 4 * a + 4], classes[:, count * a : count * a + count]], dim=1)
                for a in range(9)
            ]
            outputs.append(torch.stack(anchors, dim=1).permute(0, 1, 3, 4, 2))
        return outputs


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def pad(x: Tensor, size: int, stride: int, value: float) -> Tensor:
    """TensorFlow's SAME, from the number of windows."""
    sides: list[int] = []
    for length in (x.shape[3], x.shape[2]):
        windows = -(-length // stride)
        total = max((windows - 1) * stride + size - length, 0)
        sides += [total // 2, total - total // 2]
    return F.pad(x, sides, value=value)


def halve(x: Tensor) -> Tensor:
    return F.max_pool2d(pad(x, 3, 2, float("-inf")), 3, 2)
