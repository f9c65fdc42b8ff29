"""MMDetection's YOLOv3 on Darknet-53 and on MobileNetV2.

Source: mmdet/models/{backbones/darknet,backbones/mobilenet_v2,necks/yolo_neck,dense_heads/yolo_head}.py and
configs/yolo of https://github.com/open-mmlab/mmdetection, version 2
"""

import ast
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from detection.errors import CheckpointError
from detection.models.importers.formats import (
    ANCHORS,
    DARKNET_BLOCKS,
    YOLOV3_ANCHORS,
    YOLOV3_SETTINGS,
    BlockNames,
    Format,
    bottom_blocks,
    classes_of_outputs,
    darknet_order,
    pair_names,
)

ANCHORS_KEY = "base_sizes"  # in a configuration, which training keeps as text in the meta data of its files
LONGEST = 1000  # characters of three levels of anchors
MOBILENET_BLOCKS = (1, 2, 3, 4, 3, 3, 1)
MOBILENET_ANCHORS_320 = [  # stride ascending; of yolov3_mobilenetv2_320_300e_coco, the only ones of their own
    [[10, 15], [24, 36], [72, 42]],
    [[35, 87], [102, 96], [60, 170]],
    [[220, 125], [128, 222], [264, 266]],
]
# Of a block of torchvision: the number of a layer, and the name of the module in the file.
FIRST_LAYERS = {
    "0.0": "depthwise_conv.conv",
    "0.1": "depthwise_conv.bn",
    "1": "linear_conv.conv",
    "2": "linear_conv.bn",
}
LAYERS = {
    **{"0.0": "expand_conv.conv", "0.1": "expand_conv.bn", "1.0": "depthwise_conv.conv", "1.1": "depthwise_conv.bn"},
    **{"2": "linear_conv.conv", "3": "linear_conv.bn"},
}
# The last convolution of MobileNetV2, which stands in the files and is not used: its tensors and their shapes.
UNUSED = {
    "backbone.conv2.conv.weight": (1280, 320, 1, 1),
    **{f"backbone.conv2.bn.{part}": (1280,) for part in ("weight", "bias", "running_mean", "running_var")},
    "backbone.conv2.bn.num_batches_tracked": (),
}


def neck_and_heads() -> list[str]:
    """Prefixes of the convolutions behind the backbone, from the coarsest level to the finest."""
    theirs: list[str] = []
    for level in range(3):
        theirs += [f"neck.detect{level + 1}.conv{number}" for number in range(1, 6)]
        theirs += [f"bbox_head.convs_bridge.{level}", f"bbox_head.convs_pred.{level}"]
        theirs += [f"neck.conv{level + 1}"] if level < 2 else []
    return theirs


class MMDetectionYOLOv3(Format):
    """Levels from the coarsest to the finest; pixels RGB 0..1; images keep their aspect and lie at the top left."""

    source = "MMDetection YOLOv3"
    marks = ("neck.detect1.", "bbox_head.convs_bridge.", "backbone.conv_res_block")
    evaluation: Mapping[str, Any] = {"evaluation.image_size": 608}

    def settings(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        if not any(name.startswith("backbone.conv_res_block") for name in state):
            raise CheckpointError(
                f"{self.source} on another backbone than Darknet-53 or MobileNetV2; only yolov3_d53_* and "
                "yolov3_mobilenetv2_* are read"
            )
        return {
            **YOLOV3_SETTINGS,
            "model.placement": "top_left",
            "model.rounding": "nearest",
            "model.interpolation": "linear",
            "model.fill": [0, 0, 0],
            "model.pixel_scaling": "backbone",
        }

    def stated_settings(self, content: Any, source: str) -> tuple[dict[str, Any], list[str]]:
        """The anchors, if the file has the configuration that it was trained with."""
        anchors = stated_anchors(content)
        if anchors is None or anchors == YOLOV3_ANCHORS:
            return {}, []
        return {"yolo.anchors": anchors}, ["anchors as the configuration in the file says"]

    def num_classes(self, state: Mapping[str, Tensor]) -> int:
        return classes_of_outputs(state, [f"bbox_head.convs_pred.{level}.bias" for level in range(3)], self.source)

    def layout(self, model: nn.Module) -> dict[str, str]:
        residual = "backbone.conv_res_block{next}.res{block}.conv"
        theirs = ["backbone.conv1"]
        theirs += bottom_blocks(DARKNET_BLOCKS, "backbone.conv_res_block{next}.conv", f"{residual}1", f"{residual}2")
        return pair_names(model, darknet_order(model), [*theirs, *neck_and_heads()], BlockNames())

    def classes(self, content: Any, count: int) -> tuple[tuple[str, ...] | None, tuple[int, ...] | None]:
        """The names in the file's meta data, else COCO's for 80 classes."""
        names, ids = super().classes(content, count)
        stored = meta_of(content).get("CLASSES")
        if not isinstance(stored, list | tuple) or len(stored) != count or len(set(map(str, stored))) != count:
            return names, ids
        stored = tuple(map(str, stored))
        return stored, ids if stored == names else None


class MMDetectionMobileNetV2(MMDetectionYOLOv3):
    """On MobileNetV2 with leaky ReLUs; neck and heads of 96 channels; pixels with ImageNet's mean and deviation."""

    source = "MMDetection YOLOv3 on MobileNetV2"
    marks = ("backbone.layer1.0.depthwise_conv.", "backbone.layer3.0.expand_conv.", "backbone.layer7.0.linear_conv.")
    evaluation: Mapping[str, Any] = {"evaluation.image_size": 416}

    def settings(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        return {
            **YOLOV3_SETTINGS,
            "model.backbone": "mobilenet_v2_leaky",
            "model.placement": "top_left",
            "model.rounding": "nearest",
            "model.interpolation": "linear",
            "model.fill": [124, 116, 104],  # padded with 0 after the normalisation
            "yolo.neck_channels": [96, 96, 96],
            "yolo.head_channels": [96, 96, 96],
        }

    def stated_settings(self, content: Any, source: str) -> tuple[dict[str, Any], list[str]]:
        """The anchors of the file's configuration; without one, those of 320 px if the file's name says so.

        Both published files have the same tensors.
        """
        if stated_anchors(content) is not None:
            return super().stated_settings(content, source)
        if re.search(r"mobilenetv2.*[_-]320[_-]", Path(source).name):
            return {"yolo.anchors": MOBILENET_ANCHORS_320}, ["anchors of the network for 320 px, by the file's name"]
        return {}, ["the usual anchors, as for 416 px: neither a configuration in the file nor its name says 320"]

    def layout(self, model: nn.Module) -> dict[str, str]:
        network = cast(Any, model)
        features = {
            f"backbone.{mobilenet_name(name)}": f"backbone.{own}"
            for name, own in network.backbone.torchvision_names().items()
        }
        convolutions: list[nn.Module] = []
        for level, (stage, head) in enumerate(zip(network.neck, network.heads, strict=True)):
            convolutions += [*stage, *head, *network.laterals[level : level + 1]]
        return features | pair_names(model, convolutions, neck_and_heads(), BlockNames())

    def others(self, state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """The last convolution of the backbone, which no level reads."""
        return {name: torch.empty(shape, device="meta") for name, shape in UNUSED.items()}


def mobilenet_name(name: str) -> str:
    """Name below `backbone.` in the file of a tensor that torchvision calls 4.conv.1.0.weight: layer3.0...."""
    module, _, tensor = name.rpartition(".")
    number, _, layer = module.partition(".")
    if number == "0":
        return f"conv1.{'bn' if layer == '1' else 'conv'}.{tensor}"
    block = int(number) - 1
    for stage, count in enumerate(MOBILENET_BLOCKS, 1):
        if block < count:
            layers = FIRST_LAYERS if stage == 1 else LAYERS
            return f"layer{stage}.{block}.{layers[layer.removeprefix('conv.')]}.{tensor}"
        block -= count
    raise ValueError(f"{name} is behind the last block")


def meta_of(content: Any) -> dict[str, Any]:
    """The meta data of a file; empty if there are none."""
    meta = content.get("meta") if isinstance(content, dict) else None
    return meta if isinstance(meta, dict) else {}


def stated_anchors(content: Any) -> list[list[list[float]]] | None:
    """Anchors in the configuration that a file's meta data hold as text, stride ascending; None: they hold none.

    Raises:
        CheckpointError: they are not three levels of three sizes.
    """
    meta = meta_of(content)
    text = next((meta[key] for key in ("config", "cfg") if isinstance(meta.get(key), str)), "")
    found = re.search(rf"{ANCHORS_KEY}\s*=\s*(?=\[)", text)
    if found is None:
        return None
    text = text[found.end() : found.end() + LONGEST]
    depths = itertools.accumulate((character in "[(") - (character in ")]") for character in text)
    end = next((number for number, depth in enumerate(depths, 1) if depth == 0), 0)
    try:
        levels = [[[float(side) for side in size] for size in level] for level in ast.literal_eval(text[:end])]
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        levels = []
    sizes = [size for level in levels for size in level]
    whole = [len(level) for level in levels] == [ANCHORS] * 3 and all(len(size) == 2 for size in sizes)
    if not whole or not all(0 < side < float("inf") for size in sizes for side in size):
        raise CheckpointError(f"{ANCHORS_KEY} of its configuration are not three levels of {ANCHORS} sizes")
    return levels[::-1]
