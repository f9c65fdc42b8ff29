"""Detectors of the YOLOv3 and YOLOv4 families built from a Darknet .cfg."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from detection.models.backbones.darknet import LEAKY_SLOPE
from detection.models.backbones.mobilenet import use_depthwise_class
from detection.models.darknet.cfg import OUTPUT_LAYERS, CfgSection, values_per_anchor, with_classes
from detection.models.darknet.layers import Shape, build_layers, cfg_classes
from detection.models.darknet.modules import Joining, YoloOutput
from detection.models.yolo.head_layout import class_rows
from detection.models.yolo.network import initialise_output
from detection.ops.pixels import NormalizePixels


class DarknetNetwork(nn.Module):
    """The network of a cfg, with the interface of `YOLOv3`.

    The backbone, for freezing and learning rates, ends with the last [shortcut] before the first [yolo] or, without
    any, with the last layer before it that lowers the resolution.

    Args:
        sections: of the cfg.
        num_classes: C; replaces that of the cfg.
        objectness_prior: objectness the untrained network predicts.
        batch_norm_momentum: of all batch-norm layers.

    Raises:
        SettingsError: see `build_layers`.
    """

    # Darknet networks take RGB in 0..1.
    pixel_mean = (0.0, 0.0, 0.0)
    pixel_std = (1.0, 1.0, 1.0)

    def __init__(
        self,
        sections: Sequence[CfgSection],
        num_classes: int,
        objectness_prior: float = 0.01,
        batch_norm_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.sections = with_classes(sections, num_classes) if cfg_classes(sections) != num_classes else list(sections)
        self.num_classes = num_classes
        self.described_classes = cfg_classes(sections)  # of the weights file that belongs to the cfg
        layers, shapes, levels = build_layers(self.sections)
        referred = {source for layer in layers if isinstance(layer, Joining) for source in layer.sources}
        self._kept = frozenset(referred)
        levels = sorted(levels, key=lambda level: level.stride)
        self._level_layers = [level.layer for level in levels]
        self.strides = tuple(level.stride for level in levels)
        self.anchors = tuple(level.anchors for level in levels)
        self.scales_xy = tuple(level.scale_xy for level in levels)
        self.new_coords = any(level.new_coords for level in levels)
        self.gaussian = any(level.gaussian for level in levels)
        height = self.sections[0].integer("height", 416)
        # Including maps coarser than every level.
        pooled = single_cells(self.sections[1:], shapes)
        rows_of_maps = [shape[1] for number, shape in enumerate(shapes) if number not in pooled]
        self.size_multiple = math.lcm(*(height // rows for rows in rows_of_maps if height % rows == 0))
        end = backbone_end(self.sections[1:], shapes)
        self.backbone = nn.ModuleList(layers[:end])
        self.decoder = nn.ModuleList(layers[end:])

        use_depthwise_class(self)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=LEAKY_SLOPE)
            elif isinstance(module, nn.BatchNorm2d):
                module.momentum = batch_norm_momentum
        for level, convolution in zip(levels, self.output_convolutions(), strict=True):
            if level.gaussian:  # never trained here
                continue
            initialise_output(convolution, len(level.anchors), num_classes, objectness_prior)
        self.normalize = NormalizePixels(self.pixel_mean, self.pixel_std)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the raw predictions.

        Args:
            images: RGB, (B, 3, H, W), uint8 0..255 or float 0..1; H and W multiples of `size_multiple`.

        Returns:
            Raw logits per level, stride ascending, (B, A, H/stride, W/stride, 5 + C).

        Raises:
            ValueError: if H or W is not a multiple of `size_multiple`.
        """
        if images.shape[2] % self.size_multiple or images.shape[3] % self.size_multiple:
            raise ValueError(f"image size {tuple(images.shape[2:])} must be a multiple of {self.size_multiple}")
        x = self.normalize(images)
        kept: dict[int, Tensor] = {}
        outputs: dict[int, Tensor] = {}
        for number, layer in enumerate([*self.backbone, *self.decoder]):
            if isinstance(layer, YoloOutput):
                outputs[number] = layer(x)
                continue
            x = layer(x, kept) if isinstance(layer, Joining) else layer(x)
            if number in self._kept:
                kept[number] = x
        return [outputs[layer] for layer in self._level_layers]

    def darknet_convolutions(self) -> list[nn.Module]:
        """Convolutions, each with its batch norm and activation, in the order of Darknet's weights files.

        Those that share the weights of an earlier one are not in the files.
        """
        layers = [*self.backbone, *self.decoder]
        every = [layer for layer in layers if isinstance(layer, nn.Sequential) and isinstance(layer[0], nn.Conv2d)]
        first_of = {id(layer[0].weight): layer for layer in reversed(every)}
        return [layer for layer in every if layer is first_of[id(layer[0].weight)]]

    def output_convolutions(self) -> list[nn.Conv2d]:
        """The convolutions that make the predictions, stride ascending."""
        layers = [*self.backbone, *self.decoder]
        return [layers[number - 1][0] for number in self._level_layers]

    def class_rows(self, num_classes: int) -> list[Tensor]:
        """For each output convolution the filters of the class scores, if there were so many classes, (A, C)."""
        sections = [self.sections[layer + 1] for layer in self._level_layers]
        return [
            class_rows(len(anchors), num_classes, values_per_anchor(section, 0))
            for anchors, section in zip(self.anchors, sections, strict=True)
        ]


def backbone_end(sections: Sequence[CfgSection], shapes: Sequence[Shape]) -> int:
    """Number of layers of the backbone, as `DarknetNetwork` defines it."""
    first_yolo = next(number for number, section in enumerate(sections) if section.name in OUTPUT_LAYERS)
    shortcuts = [number for number in range(first_yolo) if sections[number].name == "shortcut"]
    lower = [number for number in range(1, first_yolo) if shapes[number][1] < shapes[number - 1][1]]
    return (shortcuts or lower or [0])[-1] + 1


def single_cells(sections: Sequence[CfgSection], shapes: Sequence[Shape]) -> set[int]:
    """Layers between an [avgpool] and the [scale_channels] that takes its factors: one cell at any input size."""
    found: set[int] = set()
    open_branch: set[int] = set()
    for number, (section, shape) in enumerate(zip(sections, shapes, strict=True)):
        if section.name == "scale_channels":
            found |= open_branch
        pooled = section.name == "avgpool" or (bool(open_branch) and section.name == "convolutional")
        open_branch = open_branch | {number} if pooled and shape[1:] == (1, 1) else set()
    return found
