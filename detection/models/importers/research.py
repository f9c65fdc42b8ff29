"""YOLOv3 of the research repository, on Darknet-53 or torchvision's MobileNetV3.

Source: yolo-v3/model.py and the recipes of https://github.com/michaellengyel/yolo-v3; its checkpoint.pth.tar
"""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from detection.errors import CheckpointError
from detection.models.backbones.mobilenet import MobileNetV3
from detection.models.importers.coco_classes import COCO_IDS, COCO_NAMES
from detection.models.importers.formats import (
    DARKNET_BLOCKS,
    YOLOV3_ANCHORS,
    BlockNames,
    Format,
    classes_of_outputs,
    darknet_order,
    pair_names,
)

WIDTHS = {1024: "darknet", 960: "mobilenet_v3_large", 576: "mobilenet_v3_small"}  # channels that the neck reads
FEATURES, TWINS = "encoder.model.features.", "encoder.backbone_nn."
UNUSED = tuple(f"encoder.model.classifier.{layer}.{part}" for layer in (0, 3) for part in ("weight", "bias"))
RAW_CLASSES = 91  # a class per COCO category id from 0 to 90, of which eleven have no objects


def neck_and_heads() -> Iterator[str]:
    """Prefixes of the convolutions behind the encoder, in Darknet's order; a dbl_ has batch norm."""
    for level in (1, 2, 3):
        yield from (f"dbl_{level}_{number}" for number in range(1, 6))
        yield from (f"dbl_s{level}", f"conv_s{level}")
        if level < 3:
            yield f"dbl_m_{level}"


def encoder_blocks() -> list[tuple[str, BlockNames]]:
    """The 52 convolutions of Darknet-53 by their number in Darknet's cfg, which counts shortcuts too."""
    numbers, number = [0], 1
    for blocks in DARKNET_BLOCKS:
        numbers.append(number)
        numbers += [number + 3 * block + part for block in range(blocks) for part in (1, 2)]
        number += 3 * blocks + 1
    return [
        (f"encoder.module_list.{index}", BlockNames(f"conv_{index}.weight", f"batch_norm_{index}")) for index in numbers
    ]


class ResearchYOLOv3(Format):
    """Levels from the coarsest to the finest; convolutions before batch norm have a bias; 3x3 output at stride 16."""

    source = "YOLOv3 of the research repository"
    marks = ("dbl_1_", "dbl_s1.", "dbl_m_1.")
    evaluation = {"evaluation.image_size": 416, "yolo.score": "objectness"}

    def settings(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        kernel = state.get("dbl_1_1.conv.weight")
        width = kernel.shape[1] if kernel is not None and kernel.dim() == 4 else None
        if width not in WIDTHS:
            raise CheckpointError(
                f"{self.source}: dbl_1_1.conv.weight reads {width} channels; known are "
                + ", ".join(f"{channels} ({name})" for channels, name in WIDTHS.items())
            )
        return {
            "model.detector": "yolo",
            "model.backbone": WIDTHS[width],
            "model.placement": "letterbox",
            "model.fill": [124, 116, 104],
            "model.pixel_scaling": "imagenet",
            "yolo.neck_channels": [width // 2, width // 4, width // 8],
            "yolo.anchors": YOLOV3_ANCHORS,
            "yolo.anchor_size": None,
            "yolo.output_kernels": [1, 3, 1],
        }

    def num_classes(self, state: Mapping[str, Tensor]) -> int:
        return classes_of_outputs(state, [f"conv_s{level}.bias" for level in (1, 2, 3)], self.source)

    def layout(self, model: nn.Module) -> dict[str, str]:
        names, behind = BlockNames(norm="batchnorm"), list(neck_and_heads())
        backbone = cast(Any, model).backbone
        if not isinstance(backbone, MobileNetV3):
            return pair_names(model, darknet_order(model), [*encoder_blocks(), *behind], names)
        convolutions: list[nn.Module] = []
        for level, (stage, head) in enumerate(zip(cast(Any, model).neck, cast(Any, model).heads, strict=True)):
            convolutions += [*stage, *head, *cast(Any, model).laterals[level : level + 1]]
        features = {f"{FEATURES}{name}": f"backbone.{own}" for name, own in backbone.torchvision_names().items()}
        return features | pair_names(model, convolutions, behind, names)

    def others(self, state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """The biases before batch norm; MobileNetV3's second names, and the classifier that nothing uses."""
        biases = {f"{name}.conv.bias": state.get(f"{name}.batchnorm.bias") for name in _blocks()}
        found = {name: value for name, value in biases.items() if value is not None}
        if not isinstance(cast(Any, model).backbone, MobileNetV3):
            return found
        twins = {
            TWINS + name.removeprefix(FEATURES): state[name]
            for name in self.layout(model)
            if name.startswith(FEATURES) and name in state
        }
        return found | twins | {name: state.get(name, torch.empty(0)) for name in UNUSED}

    def place(self, tensors: dict[str, Tensor], state: Mapping[str, Tensor], model: nn.Module, source: str) -> None:
        for name, value in state.items():
            if name.startswith(TWINS) and not torch.equal(value, state[FEATURES + name.removeprefix(TWINS)]):
                raise CheckpointError(
                    f"{source}: {name} differs from {FEATURES}{name.removeprefix(TWINS)}, its other name"
                )
        ours = self.layout(model)
        for name in _blocks():  # (x + bias - mean) / deviation
            own = ours[f"{name}.batchnorm.running_mean"]
            tensors[own] = tensors[own] - state[f"{name}.conv.bias"]

    def kept_classes(self, count: int) -> list[int] | None:
        """Of a class per category id those that COCO has."""
        return list(COCO_IDS) if count == RAW_CLASSES else None

    def classes(self, content: Any, count: int) -> tuple[tuple[str, ...] | None, tuple[int, ...] | None]:
        if count != RAW_CLASSES:
            return super().classes(content, count)
        known = dict(zip(COCO_IDS, COCO_NAMES, strict=True))
        return tuple(known.get(number, f"unused_{number}") for number in range(count)), tuple(range(count))


def _blocks() -> list[str]:
    return [name for name in neck_and_heads() if name.startswith("dbl_")]
