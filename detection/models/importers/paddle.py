"""PaddleDetection's YOLOv3 on Darknet-53.

Source: ppdet/modeling/{backbones/darknet,necks/yolo_fpn,heads/yolo_head}.py and configs/yolov3 of
https://github.com/PaddlePaddle/PaddleDetection
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from detection.models.importers.formats import (
    DARKNET_BLOCKS,
    YOLOV3_SETTINGS,
    BlockNames,
    Format,
    classes_of_outputs,
    darknet_order,
    pair_names,
)

NECK_BLOCK = ("conv_module.conv0", "conv_module.conv1", "conv_module.conv2", "conv_module.conv3", "conv_module.route")


class PaddleYOLOv3(Format):
    """Levels from the coarsest to the finest; pixels with ImageNet's mean and deviation; images are squashed."""

    source = "PaddleDetection YOLOv3"
    marks = ("neck.yolo_block.", "neck.yolo_transition.", "yolo_head.yolo_output.")
    evaluation = {"evaluation.image_size": 608, "evaluation.iou_threshold": 0.45}

    def settings(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        return {
            **YOLOV3_SETTINGS,
            "model.placement": "squash",
            "model.interpolation": "cubic",
            "model.pixel_scaling": "imagenet",
        }

    def num_classes(self, state: Mapping[str, Tensor]) -> int:
        return classes_of_outputs(state, [f"yolo_head.yolo_output.{level}.bias" for level in range(3)], self.source)

    def layout(self, model: nn.Module) -> dict[str, str]:
        theirs = ["backbone.conv0"]
        for stage, count in enumerate(DARKNET_BLOCKS):
            before = "backbone.downsample0" if stage == 0 else f"backbone.stage.{stage - 1}.downsample"
            theirs.append(f"{before}.conv_bn_layer")
            for block in range(count):
                own = "basicblock0" if block == 0 else f"stage.{stage}.{block}"
                theirs += [f"backbone.stage.{stage}.{own}.conv{number}" for number in (1, 2)]
        for level in range(3):
            theirs += [f"neck.yolo_block.{level}.{part}" for part in (*NECK_BLOCK, "tip")]
            theirs.append(f"yolo_head.yolo_output.{level}")
            theirs += [f"neck.yolo_transition.{level}"] if level < 2 else []
        names = BlockNames(norm="batch_norm", mean="_mean", variance="_variance", counted=False)
        return pair_names(model, darknet_order(model), theirs, names)
