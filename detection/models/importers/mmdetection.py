"""MMDetection's YOLOv3 on Darknet-53.

Source: mmdet/models/{backbones/darknet,necks/yolo_neck,dense_heads/yolo_head}.py and configs/yolo of
https://github.com/open-mmlab/mmdetection, version 2
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from detection.errors import CheckpointError
from detection.models.importers.formats import (
    DARKNET_BLOCKS,
    YOLOV3_SETTINGS,
    BlockNames,
    Format,
    bottom_blocks,
    classes_of_outputs,
    darknet_order,
    pair_names,
)


class MMDetectionYOLOv3(Format):
    """Levels from the coarsest to the finest; pixels RGB 0..1; images keep their aspect and lie at the top left."""

    source = "MMDetection YOLOv3"
    marks = ("neck.detect1.", "bbox_head.convs_bridge.", "backbone.conv_res_block")
    evaluation = {"evaluation.image_size": 608}

    def settings(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        if not any(name.startswith("backbone.conv_res_block") for name in state):
            raise CheckpointError(
                f"{self.source} on another backbone than Darknet-53, with another neck; only yolov3_d53_* is read"
            )
        return {
            **YOLOV3_SETTINGS,
            "model.placement": "top_left",
            "model.rounding": "nearest",
            "model.interpolation": "linear",
            "model.fill": [0, 0, 0],
            "model.pixel_scaling": "backbone",
        }

    def num_classes(self, state: Mapping[str, Tensor]) -> int:
        return classes_of_outputs(state, [f"bbox_head.convs_pred.{level}.bias" for level in range(3)], self.source)

    def layout(self, model: nn.Module) -> dict[str, str]:
        residual = "backbone.conv_res_block{next}.res{block}.conv"
        theirs = ["backbone.conv1"]
        theirs += bottom_blocks(DARKNET_BLOCKS, "backbone.conv_res_block{next}.conv", f"{residual}1", f"{residual}2")
        for level in range(3):
            theirs += [f"neck.detect{level + 1}.conv{number}" for number in range(1, 6)]
            theirs += [f"bbox_head.convs_bridge.{level}", f"bbox_head.convs_pred.{level}"]
            theirs += [f"neck.conv{level + 1}"] if level < 2 else []
        return pair_names(model, darknet_order(model), theirs, BlockNames())

    def classes(self, content: Any, count: int) -> tuple[tuple[str, ...] | None, tuple[int, ...] | None]:
        """The names in the file's meta data, else COCO's for 80 classes."""
        names, ids = super().classes(content, count)
        meta = content.get("meta") if isinstance(content, dict) else None
        stored = meta.get("CLASSES") if isinstance(meta, dict) else None
        if not isinstance(stored, list | tuple) or len(stored) != count or len(set(map(str, stored))) != count:
            return names, ids
        stored = tuple(map(str, stored))
        return stored, ids if stored == names else None
