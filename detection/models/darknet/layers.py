"""The layers of a Darknet cfg as modules, with their output shapes and the detection levels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from detection.errors import SettingsError
from detection.models.backbones.darknet import LEAKY_SLOPE
from detection.models.darknet.cfg import OUTPUT_LAYERS, CfgSection, values_per_anchor
from detection.models.darknet.modules import (
    GaussianOutput,
    HardMish,
    Joining,
    MaxPool,
    OldReorganise,
    Product,
    Reorganise,
    Route,
    Shortcut,
    Upsample,
    YoloOutput,
)

Shape = tuple[int, int, int]  # channels, rows, columns
MAX_KERNEL_VALUES = 2**28  # of one convolution
MAX_MAP_VALUES = 2**30  # of the padded input or the output of one layer


ACTIVATIONS: dict[str, type[nn.Module] | None] = {
    "linear": None,
    "leaky": nn.LeakyReLU,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "mish": nn.Mish,
    "hard_mish": HardMish,
    "swish": nn.SiLU,
    "silu": nn.SiLU,
    "hard_swish": nn.Hardswish,  # Darknet's forks spell it differently
    "hard-swish": nn.Hardswish,
    "hardswish": nn.Hardswish,
    "logistic": nn.Sigmoid,
}


@dataclass(frozen=True)
class CfgLevel:
    """One level, from its [yolo] or [Gaussian_yolo] section."""

    layer: int  # number of the [yolo] layer
    stride: int  # pixels per cell
    anchors: tuple[tuple[float, float], ...]  # (width, height), pixels of the network input
    scale_xy: float
    new_coords: bool
    gaussian: bool


def cfg_classes(sections: Sequence[CfgSection]) -> int:
    """Number of classes of a cfg.

    Raises:
        SettingsError: there is no [yolo] layer, or they differ.
    """
    counts = {section.integer("classes", 20, minimum=1) for section in sections if section.name in OUTPUT_LAYERS}
    if len(counts) != 1:
        raise SettingsError(
            "cfg: has no [yolo] layer, so it is not a detector"
            if not counts
            else f"cfg: the [yolo] layers have different numbers of classes: {sorted(counts)}"
        )
    return counts.pop()


def build_layers(sections: Sequence[CfgSection]) -> tuple[list[nn.Module], list[Shape], list[CfgLevel]]:
    """Build the layers of all sections after [net].

    Returns:
        Modules, their output shapes at the input size of the cfg, and the levels in the order of the cfg.

    Raises:
        SettingsError: the cfg contradicts itself or is not supported; names the layer and its line.
    """
    net = sections[0]
    input_shape = (
        net.integer("channels", 3),
        net.integer("height", 416, minimum=1),
        net.integer("width", 416, minimum=1),
    )
    if input_shape[0] != 3:
        raise SettingsError(f"cfg: {net.where()}: channels = {input_shape[0]}: only RGB images (3) are supported")
    layers: list[nn.Module] = []
    shapes: list[Shape] = []
    levels: list[CfgLevel] = []
    for number, section in enumerate(sections[1:]):
        before = shapes[-1] if shapes else input_shape
        if section.name in OUTPUT_LAYERS:
            level = read_level(section, number, sections[number], before, input_shape)
            if level.new_coords:
                # Darknet puts the sigmoid into this convolution; our outputs are logits.
                layers[-1] = nn.Sequential(
                    *[part for part in layers[-1].children() if not isinstance(part, nn.Sigmoid)]
                )
            levels.append(level)
            layer: nn.Module = (GaussianOutput if level.gaussian else YoloOutput)(len(level.anchors))
            shape = before
        else:
            if layers and isinstance(layers[-1], YoloOutput) and section.name != "route":
                raise SettingsError(f"cfg: {section.where()} follows a [yolo] layer; only [route] can")
            layer, shape = LAYER_BUILDERS[section.name](section, number, before, shapes)
            if "share_index" in section.options:
                share_weights(section, number, layer, layers)
            sources: tuple[int, ...] = layer.sources if isinstance(layer, Joining) else ()
            if used := [source for source in sources if isinstance(layers[source], YoloOutput)]:
                raise SettingsError(f"cfg: {section.where()}: takes layer {used[0]}, which is a [yolo] layer")
        check_map(section, shape)
        if min(shape[1:]) < 1:
            raise SettingsError(f"cfg: {section.where()}: nothing is left of the image at this layer")
        layers.append(layer)
        shapes.append(shape)
    cfg_classes(sections)
    taken = {source for layer in layers if isinstance(layer, Joining) for source in layer.sources}
    if both := [level.layer - 1 for level in levels if level.new_coords and level.layer - 1 in taken]:
        raise SettingsError(f"cfg: layer {both[0]} feeds a [yolo] with new_coords and another layer; not supported")
    return layers, shapes, levels


def read_level(section: CfgSection, number: int, before_section: CfgSection, before: Shape, image: Shape) -> CfgLevel:
    """Read a [yolo] or [Gaussian_yolo] section and check it against the layer before it.

    Args:
        number: of the layer.
        before_section, before: section and output shape of the layer before it.
        image: shape of the network input.
    """
    values = section.numbers("anchors")
    total = section.integer("num", 1, minimum=1)
    chosen = section.numbers("mask") if "mask" in section.options else range(total)
    # cspx-p7-mish.cfg lists 20 anchors with num = 16 and uses them all; Darknet reads the last four beyond its array.
    mask = [int(index) for index in chosen if index == int(index) and 0 <= index < len(values) // 2]
    if len(values) < 2 * total or len(values) % 2 or not mask or len(mask) != len(chosen) or min(values) <= 0:
        raise SettingsError(
            f"cfg: {section.where()}: num = {total} anchors, {len(values)} anchor values (above 0) and mask = "
            f"{','.join(f'{index:g}' for index in chosen)} do not fit"
        )
    classes = section.integer("classes", 20, minimum=1)
    values_of_box = values_per_anchor(section, 0)
    filters = len(mask) * (values_of_box + classes)
    if before_section.name != "convolutional" or before[0] != filters:
        raise SettingsError(
            f"cfg: {section.where()}: needs a [convolutional] layer with filters = {len(mask)} * ({values_of_box} + "
            f"{classes}) = {filters} before it, finds [{before_section.name}] with {before[0]}"
        )
    stride = image[1] // before[1]
    if (before[1] * stride, before[2] * stride) != image[1:]:
        raise SettingsError(
            f"cfg: {section.where()}: its {before[2]} x {before[1]} cells do not divide the input of "
            f"{image[2]} x {image[1]} pixels evenly"
        )
    gaussian = section.name == "Gaussian_yolo"
    new_coords = not gaussian and bool(section.integer("new_coords", 0))
    # With new_coords the sigmoid belongs to the convolution, otherwise to the [yolo] layer.
    allowed = ("logistic", "linear") if new_coords else ("linear",)
    activation = before_section.text("activation", "logistic")
    normalised = before_section.integer("batch_normalize", 0) or before_section.integer("cbn", 0)
    if normalised or activation not in allowed:
        raise SettingsError(
            f"cfg: {section.where()}: the [convolutional] before it must have no batch_normalize and activation="
            f"{' or '.join(allowed)}, has activation={activation}"
        )
    anchors = tuple((values[2 * index], values[2 * index + 1]) for index in mask)
    scale_xy = section.number("scale_x_y", 1.0)
    if scale_xy <= 0:
        raise SettingsError(f"cfg: {section.where()}: scale_x_y = {scale_xy:g} must be greater than 0")
    return CfgLevel(number, stride, anchors, scale_xy, new_coords, gaussian)


def read_activation(section: CfgSection, default: str) -> nn.Module | None:
    """Build the activation of a layer; None: linear."""
    name = section.text("activation", default)
    if name not in ACTIVATIONS:
        raise SettingsError(
            f"cfg: {section.where()}: activation {name!r} is not supported; known: {', '.join(ACTIVATIONS)}"
        )
    activation = ACTIVATIONS[name]
    if activation is nn.LeakyReLU:
        return nn.LeakyReLU(LEAKY_SLOPE, inplace=True)
    return None if activation is None else activation()


def read_stride(section: CfgSection) -> int:
    """Stride of a layer; unequal ones per axis are not supported."""
    stride = section.integer("stride", 1, minimum=1)
    strides = {section.integer("stride_x", stride), section.integer("stride_y", stride)}
    if len(strides) != 1 or min(strides) < 1:
        raise SettingsError(f"cfg: {section.where()}: stride_x and stride_y must be equal")
    return strides.pop()


def read_sources(section: CfgSection, key: str, number: int) -> list[int]:
    """Numbers of the earlier layers under `key`; negative values in the cfg count back from layer `number`."""
    sources = []
    for value in section.numbers(key):
        source = int(value) + number if value < 0 else int(value)
        if not 0 <= source < number or value != int(value):
            raise SettingsError(
                f"cfg: {section.where()}: {key} names layer {value:g}; there are layers 0 to {number - 1}"
            )
        sources.append(source)
    if not sources:
        raise SettingsError(f"cfg: {section.where()}: {key} is empty")
    return sources


def check_map(section: CfgSection, shape: Shape) -> None:
    """Raise SettingsError for a feature map of more than MAX_MAP_VALUES."""
    if math.prod(shape) > MAX_MAP_VALUES:
        raise SettingsError(
            f"cfg: {section.where()}: a map of {shape[2]} x {shape[1]} pixels and {shape[0]} channels is too large"
        )


def build_convolution(section: CfgSection, _: int, before: Shape, __: Sequence[Shape]) -> tuple[nn.Module, Shape]:
    """Convolution, batch norm and activation; a layer builder, see `LAYER_BUILDERS`."""
    channels, rows, columns = before
    filters, size = section.integer("filters", 1, minimum=1), section.integer("size", 1, minimum=1)
    stride, groups = read_stride(section), section.integer("groups", 1, minimum=1)
    dilation = section.integer("dilation", 1, minimum=1) if size > 1 else 1
    padding = size // 2 if section.integer("pad", 0) else section.integer("padding", 0, minimum=0)
    if channels % groups or filters % groups:
        raise SettingsError(
            f"cfg: {section.where()}: groups = {groups} must divide {channels} channels and {filters} filters"
        )
    check_map(section, (channels, rows + 2 * padding * dilation, columns + 2 * padding * dilation))
    if channels // groups * filters * size**2 > MAX_KERNEL_VALUES:
        raise SettingsError(f"cfg: {section.where()}: {filters} filters of {size} x {size} on {channels} is too large")
    normalised = bool(section.integer("batch_normalize", 0) or section.integer("cbn", 0))
    convolution = nn.Conv2d(channels, filters, size, stride, padding * dilation, dilation, groups, bias=not normalised)
    activation = read_activation(section, "logistic")
    parts = [convolution, nn.BatchNorm2d(filters) if normalised else None, activation]
    extent = dilation * (size - 1) + 1
    shape = (
        filters,
        (rows + 2 * padding * dilation - extent) // stride + 1,
        (columns + 2 * padding * dilation - extent) // stride + 1,
    )
    return nn.Sequential(*[part for part in parts if part is not None]), shape


def share_weights(section: CfgSection, number: int, layer: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Give a convolution the kernel, bias and batch norm of the earlier one that `share_index` names."""
    source, *more = read_sources(section, "share_index", number)
    other = layers[source]
    shapes = [{name: value.shape for name, value in part.state_dict().items()} for part in (layer, other)]
    if more or not shapes[0] or shapes[0] != shapes[1] or layer[0].groups != other[0].groups:  # type: ignore[index]
        raise SettingsError(
            f"cfg: {section.where()}: share_index = {section.shown('share_index')} must name a convolution of the same "
            "size with as many channels, filters and groups and the same batch_normalize"
        )
    assert isinstance(layer, nn.Sequential) and isinstance(other, nn.Sequential)
    layer[0].weight, layer[0].bias = other[0].weight, other[0].bias
    if len(shapes[0]) > 2:  # more than kernel and bias
        layer[1] = other[1]


def build_maxpool(section: CfgSection, _: int, before: Shape, __: Sequence[Shape]) -> tuple[nn.Module, Shape]:
    """Max pooling with Darknet's padding; see `LAYER_BUILDERS`."""
    stride = read_stride(section)
    size = section.integer("size", stride, minimum=1)
    padding = section.integer("padding", size - 1, minimum=0)
    channels, rows, columns = before
    check_map(section, (channels, rows + padding, columns + padding))
    if padding - padding // 2 >= size:
        raise SettingsError(f"cfg: {section.where()}: padding = {padding} is too much for size = {size}")
    shape = (channels, (rows + padding - size) // stride + 1, (columns + padding - size) // stride + 1)
    return MaxPool(size, stride, padding), shape


def build_avgpool(_: CfgSection, __: int, before: Shape, ___: Sequence[Shape]) -> tuple[nn.Module, Shape]:
    return nn.AdaptiveAvgPool2d(1), (before[0], 1, 1)


def build_dropout(section: CfgSection, _: int, before: Shape, __: Sequence[Shape]) -> tuple[nn.Module, Shape]:
    probability = section.number("probability", 0.2)
    if not 0 <= probability <= 1:
        raise SettingsError(f"cfg: {section.where()}: probability = {probability:g} must lie between 0 and 1")
    return nn.Dropout(probability), before


def build_upsample(section: CfgSection, _: int, before: Shape, __: Sequence[Shape]) -> tuple[nn.Module, Shape]:
    stride = section.integer("stride", 2, minimum=1)
    return Upsample(stride, section.number("scale", 1.0)), (before[0], before[1] * stride, before[2] * stride)


def build_route(section: CfgSection, number: int, _: Shape, shapes: Sequence[Shape]) -> tuple[nn.Module, Shape]:
    """Concatenation of earlier layers, or of a group of their channels; see `LAYER_BUILDERS`."""
    sources = read_sources(section, "layers", number)
    groups, group = section.integer("groups", 1, minimum=1), section.integer("group_id", 0, minimum=0)
    rows_columns = {shapes[source][1:] for source in sources}
    if len(rows_columns) != 1:
        raise SettingsError(
            f"cfg: {section.where()}: layers {sources} have maps of different sizes: "
            + ", ".join(f"{shapes[source][2]} x {shapes[source][1]}" for source in sources)
        )
    if group >= groups or any(shapes[source][0] % groups for source in sources):
        raise SettingsError(
            f"cfg: {section.where()}: group_id = {group} of groups = {groups} does not fit the channels"
        )
    return Route(sources, groups, group), (sum(shapes[source][0] // groups for source in sources), *rows_columns.pop())


def build_shortcut(section: CfgSection, number: int, before: Shape, shapes: Sequence[Shape]) -> tuple[nn.Module, Shape]:
    """Sum with earlier layers; see `LAYER_BUILDERS`."""
    sources = read_sources(section, "from", number)
    for source in sources:
        if shapes[source][1:] != before[1:]:
            raise SettingsError(
                f"cfg: {section.where()}: layer {source} has a map of {shapes[source][2]} x {shapes[source][1]}, "
                f"this one {before[2]} x {before[1]}"
            )
    return Shortcut(sources, read_activation(section, "linear")), before


def build_product(section: CfgSection, number: int, before: Shape, shapes: Sequence[Shape]) -> tuple[nn.Module, Shape]:
    """[scale_channels], a factor per channel or, with scale_wh, per cell; [sam], a factor per value."""
    source = read_sources(section, "from", number)[0]
    shape = shapes[source]
    wanted = shape
    if section.name == "scale_channels":
        wanted = (1, *shape[1:]) if section.integer("scale_wh", 0) else (shape[0], 1, 1)
    if before != wanted:
        raise SettingsError(
            f"cfg: {section.where()}: needs {wanted[0]} channels of {wanted[2]} x {wanted[1]} before it for layer "
            f"{source}, finds {before[0]} of {before[2]} x {before[1]}"
        )
    activation = read_activation(section, "linear")
    if isinstance(activation, nn.SiLU | nn.Mish):
        raise SettingsError(f"cfg: {section.where()}: Darknet's layer has no {section.text('activation')}")
    return Product(source, activation), shape


def build_reorg(section: CfgSection, _: int, before: Shape, __: Sequence[Shape]) -> tuple[nn.Module, Shape]:
    stride, (channels, rows, columns) = section.integer("stride", 1, minimum=1), before
    old = section.name == "reorg"
    if rows % stride or columns % stride or (old and channels % stride**2):
        channels_too = f" and its square {channels} channels" if old else ""
        raise SettingsError(
            f"cfg: {section.where()}: stride = {stride} must divide {columns} x {rows} cells{channels_too}"
        )
    shape = (channels * stride**2, rows // stride, columns // stride)
    return (OldReorganise if old else Reorganise)(stride), shape


# Name -> builder: (section, number of the layer, shape before it, shapes of all layers before) -> module, output shape.
LAYER_BUILDERS = {
    "convolutional": build_convolution,
    "maxpool": build_maxpool,
    "avgpool": build_avgpool,
    "dropout": build_dropout,
    "upsample": build_upsample,
    "route": build_route,
    "shortcut": build_shortcut,
    "scale_channels": build_product,
    "sam": build_product,
    "reorg": build_reorg,
    "reorg3d": build_reorg,
}
