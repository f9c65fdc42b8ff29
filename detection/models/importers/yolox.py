"""YOLOX on Darknet-53.

Source: exps/default/yolov3.py and yolox/models/{darknet,yolo_fpn,yolo_head}.py of
https://github.com/Megvii-BaseDetection/YOLOX
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from detection.errors import CheckpointError
from detection.models.importers.formats import DARKNET_BLOCKS, BlockNames, Format, darknet_order, pair_names

POOLED = (
    "backbone.backbone.dark5.7.conv2.conv.weight"  # reads x and its maxima over 5, 9 and 13 cells; ours 13, 9, 5, x
)


class YOLOXDarknet(Format):
    """Levels from the finest to the coarsest; pixels BGR 0..255; images keep their aspect and lie at the top left."""

    source = "YOLOX on Darknet-53"
    marks = ("backbone.out1_cbl.", "backbone.out2_cbl.")
    evaluation = {
        "evaluation.image_size": 640,
        "evaluation.confidence_threshold": 0.01,
        "evaluation.iou_threshold": 0.65,
    }

    def settings(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        return {
            "model.detector": "yolox",
            "model.backbone": "darknet",
            "model.placement": "top_left",
            "model.rounding": "down",
            "model.interpolation": "linear",
            "model.fill": [114, 114, 114],
            "model.batch_norm_momentum": 0.03,
            "yolox.spp": True,
            "yolox.neck_channels": [512, 256, 128],
            "yolox.head_channels": 256,
            "yolox.pixels": "bgr255",
            "yolox.batch_norm_epsilon": 1.0e-3,
            "yolox.loss": "yolox",
            "yolox.assigner": "simota",
            "yolox.box_weight": 5.0,
        }

    def num_classes(self, state: Mapping[str, Tensor]) -> int:
        for level in range(3):
            bias = state.get(f"head.cls_preds.{level}.bias")
            if bias is not None and bias.numel():
                return bias.numel()
        raise CheckpointError(f"{self.source}: no head.cls_preds.*.bias, which says the number of classes")

    def layout(self, model: nn.Module) -> dict[str, str]:
        theirs = [f"backbone.backbone.{name}" for name in ("stem.0", "stem.1", "stem.2.layer1", "stem.2.layer2")]
        for stage, count in enumerate(DARKNET_BLOCKS[1:], 2):
            dark = f"backbone.backbone.dark{stage}"
            theirs.append(f"{dark}.0")
            theirs += [f"{dark}.{block}.layer{number}" for block in range(1, count + 1) for number in (1, 2)]
        # our neck: the stages of its levels, coarsest first, then the laterals between them
        theirs += [f"backbone.backbone.dark5.{part}" for part in ("5", "6", "7.conv1", "7.conv2", "8", "9")]
        theirs += [f"backbone.out{level}.{number}" for level in (1, 2) for number in range(5)]
        theirs += ["backbone.out1_cbl", "backbone.out2_cbl"]
        for level in range(3):  # our heads, finest first
            theirs.append(f"head.stems.{level}")
            theirs += [f"head.{branch}_convs.{level}.{number}" for branch in ("cls", "reg") for number in (0, 1)]
            theirs += [f"head.{values}_preds.{level}" for values in ("cls", "reg", "obj")]
        return pair_names(model, darknet_order(model), theirs, BlockNames())

    def place(self, tensors: dict[str, Tensor], state: Mapping[str, Tensor], model: nn.Module, source: str) -> None:
        own = self.layout(model)[POOLED]
        tensors[own] = torch.cat(list(reversed(cast(Tensor, tensors[own]).chunk(4, dim=1))), dim=1)

    def lines(self, state: Mapping[str, Tensor]) -> list[str]:
        return ["pixels are BGR 0..255, as in YOLOX since 0.1.1; files of 0.0.1 look alike but need mean and deviation"]
