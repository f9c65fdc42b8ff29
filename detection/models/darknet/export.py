"""Export of a network as a .cfg that Darknet loads together with our .weights file."""

from collections.abc import Sequence

from torch import nn

from detection.contract import Detector
from detection.errors import CheckpointError
from detection.models.backbones.darknet import LEAKY_SLOPE, Darknet53, DarknetTiny, ResidualBlock, is_darknets
from detection.models.darknet.cfg import CfgSection
from detection.models.darknet.network import DarknetNetwork
from detection.models.necks import PyramidPooling
from detection.models.yolo.criterion import Criterion
from detection.models.yolo.network import YOLOv3

DEFAULT_IGNORE_THRESHOLD = 0.7  # for a network without a criterion (new_coords)


def describe_detector(detector: Detector, image_size: int) -> list[CfgSection]:
    """Return the cfg sections of a `YOLOv3`, or those that a `DarknetNetwork` was built from, for an input size.

    Args:
        detector: its network, anchors and ignore threshold are described.
        image_size: side of the network input in pixels.

    Raises:
        CheckpointError: Darknet has no such backbone.
    """
    model, criterion = detector.model, detector.criterion
    ignore_threshold = criterion.ignore_threshold if isinstance(criterion, Criterion) else DEFAULT_IGNORE_THRESHOLD
    if isinstance(model, DarknetNetwork):
        changed = {
            "net": {"width": str(image_size), "height": str(image_size)},
            "yolo": {"ignore_thresh": f"{ignore_threshold:g}"},
        }
        return [
            CfgSection(section.name, section.line, {**section.options, **changed.get(section.name, {})})
            for section in model.sections
        ]
    if not isinstance(model, YOLOv3) or not isinstance(model.backbone, Darknet53 | DarknetTiny):
        raise CheckpointError(
            "Darknet has no such network: only model.backbone darknet, darknet_tiny and darknet_cfg export"
        )
    if any(model.pixel_mean):
        raise CheckpointError(
            "Darknet takes pixels from 0 to 1: a network of model.pixel_scaling=imagenet exports as ONNX only"
        )
    if not is_darknets(model.backbone):
        raise CheckpointError(
            f"Darknet's leaky ReLU has slope {LEAKY_SLOPE:g}: a network with another model.leaky_slope exports as ONNX "
            "only"
        )
    if model.iou_aware:
        raise CheckpointError("Darknet has no yolo.iou_aware: a network with it exports as ONNX only")
    assert detector.anchors is not None, "a YOLOv3 has anchors"
    anchors = detector.anchors.levels
    scales_xy, new_coords = (detector.metadata[name] for name in ("scale_xy", "new_coords"))
    writer = _Writer()
    size = str(image_size)
    writer.add("net", batch="1", subdivisions="1", width=size, height=size, channels="3")
    maps = writer.backbone(model.backbone)
    num_anchors = [len(level) for level in anchors]

    def add_head(number: int) -> None:
        """Add the head of a level, counted by ascending stride, to the last layer."""
        head = model.heads[len(anchors) - 1 - number]
        writer.convolution(head[0])
        options = {"scale_x_y": f"{scales_xy[number]:g}"} if scales_xy[number] != 1 else {}
        if new_coords:  # then the sigmoid belongs to the convolution
            options["new_coords"] = "1"
        writer.convolution(head[1], "logistic" if new_coords else "linear")
        first = sum(num_anchors[:number])
        writer.add(
            "yolo",
            mask=",".join(str(first + index) for index in range(num_anchors[number])),
            anchors=", ".join(f"{width:g},{height:g}" for level_anchors in anchors for width, height in level_anchors),
            classes=str(model.num_classes),
            num=str(sum(num_anchors)),
            jitter=".3",
            ignore_thresh=f"{ignore_threshold:g}",
            truth_thresh="1",
            random="1",
            **options,
        )

    carried, ends = maps[-1], []
    for level, stage in enumerate(model.neck):
        number = len(anchors) - 1 - level  # of the level, stride ascending
        if level:
            writer.add("route", layers=str(carried))
            writer.convolution(model.laterals[level - 1])
            upsampled = writer.add("upsample", stride="2")
            writer.add("route", layers=f"-1,{maps[number]}")
            assert upsampled == writer.last - 1
        writer.sequence(stage)
        carried = writer.last
        ends.insert(0, carried)
        if model.bottom_up is None:
            add_head(number)
    if model.bottom_up is not None:
        add_head(0)
        for number, (down, stage) in enumerate(zip(model.bottom_up.downs, model.bottom_up.stages, strict=True), 1):
            writer.add("route", layers=str(carried))
            writer.convolution(down)
            writer.add("route", layers=f"-1,{ends[number]}")
            writer.sequence(stage)
            carried = writer.last
            add_head(number)
    return writer.sections


class _Writer:
    """Collects sections; layers after [net] are numbered from 0."""

    def __init__(self) -> None:
        self.sections: list[CfgSection] = []

    @property
    def last(self) -> int:
        """Number of the last layer."""
        return len(self.sections) - 2

    def add(self, name: str, **options: str) -> int:
        """Add a section and return the number of its layer."""
        self.sections.append(CfgSection(name, 0, options))
        return self.last

    def convolution(self, block: nn.Module, activation: str = "linear") -> int:
        """Add a `conv_block` or a plain convolution with bias and that activation."""
        parts = list(block) if isinstance(block, nn.Sequential) else [block]
        convolution = parts[0]
        assert isinstance(convolution, nn.Conv2d)
        normalised = {"batch_normalize": "1"} if len(parts) == 3 else {}
        return self.add(
            "convolutional",
            **normalised,
            filters=str(convolution.out_channels),
            size=str(convolution.kernel_size[0]),
            stride=str(convolution.stride[0]),
            pad="1",
            activation="leaky" if normalised else activation,
        )

    def backbone(self, backbone: Darknet53 | DarknetTiny) -> Sequence[int]:
        """Add the backbone and return the layers of its feature maps, stride ascending."""
        if isinstance(backbone, Darknet53):
            self.convolution(backbone.stem)
        ends = []
        for stage in backbone.stages:
            self.sequence(stage)
            ends.append(self.last)
        return ends[-len(backbone.out_channels) :]

    def sequence(self, modules: nn.Module) -> None:
        """Add the children of a stage."""
        for module in modules.children():
            if isinstance(module, ResidualBlock):
                self.convolution(module.reduce)
                self.convolution(module.expand)
                self.add("shortcut", **{"from": "-3"}, activation="linear")
            elif isinstance(module, nn.MaxPool2d):
                self.add("maxpool", size=str(module.kernel_size), stride=str(module.stride))
            elif isinstance(module, PyramidPooling):
                self.add("maxpool", size="5", stride="1")
                self.add("route", layers="-2")
                self.add("maxpool", size="9", stride="1")
                self.add("route", layers="-4")
                self.add("maxpool", size="13", stride="1")
                self.add("route", layers="-1,-3,-5,-6")
            elif not isinstance(module, nn.ConstantPad2d):  # part of Darknet's max pooling
                self.convolution(module)
