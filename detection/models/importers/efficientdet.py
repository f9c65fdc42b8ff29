"""EfficientDet D0 to D7x in the form of TensorFlow's weights, `tf_efficientdet_*`, whose names of tensors ours are.

Source: effdet/{efficientdet,config/model_config}.py of https://github.com/rwightman/efficientdet-pytorch
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from detection.errors import CheckpointError
from detection.models.efficientdet.network import ANCHORS
from detection.models.efficientdet.variants import VARIANTS
from detection.models.importers.coco_classes import COCO_IDS, COCO_NAMES
from detection.models.importers.formats import Format

PYRAMID = "fpn.resample.3.conv.conv.weight"  # its filters tell the size
BIAS = "fpn.resample.3.conv.conv.bias"  # only in the form of TensorFlow's weights
SIXTH_LEVEL = "class_net.bn_rep.0.5.bn.weight"  # only D7x has
CLASSES = "class_net.predict.conv_pw.bias"
RAW_CLASSES = 90  # a class per COCO category id from 1 to 90, of which ten have no objects


class TensorFlowEfficientDet(Format):
    """Pixels RGB 0..1 with ImageNet's mean and deviation; images keep their aspect and lie at the top left."""

    source = "EfficientDet"
    marks = ("fpn.cell.0.fnode.", "class_net.bn_rep.")

    def variant(self, state: Mapping[str, Tensor]) -> str:
        """Size of the network: by the width of its pyramid, of the widest by its levels.

        Raises:
            CheckpointError: no published size has such a pyramid, or its padding is symmetric.
        """
        if BIAS not in state and not any(name.endswith("conv_pw.bias") and "fnode" in name for name in state):
            raise CheckpointError("without biases before batch norm, so with symmetric padding; only tf_* is read")
        width = state[PYRAMID].shape[0] if PYRAMID in state else None
        fitting = [name for name, variant in VARIANTS.items() if variant.fpn_cells and variant.fpn_channels == width]
        if not fitting:
            raise CheckpointError(f"{PYRAMID} has {width or 'no'} filters, as no published size")
        return "d7x" if "d7x" in fitting and SIXTH_LEVEL in state else fitting[0]

    def settings(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        name = self.variant(state)
        return {
            "model.detector": "efficientdet",
            "model.backbone": VARIANTS[name].backbone,
            "model.placement": "top_left",
            "model.rounding": "down",
            "model.interpolation": "linear",
            "model.batch_norm_momentum": 0.01,
            "efficientdet.variant": name,
        }

    def validation(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        size = VARIANTS[self.variant(state)].image_size
        return {"evaluation.image_size": size, "evaluation.iou_threshold": 0.5}

    def num_classes(self, state: Mapping[str, Tensor]) -> int:
        count = state[CLASSES].numel() if CLASSES in state else 0
        if not count or count % ANCHORS:
            raise CheckpointError(f"{CLASSES} has {count} values, not {ANCHORS} per class")
        return count // ANCHORS

    def layout(self, model: nn.Module) -> dict[str, str]:
        return {name: name for name in model.state_dict()}

    def kept_classes(self, count: int) -> list[int] | None:
        """Of a class per category id those that COCO has."""
        return [number - 1 for number in COCO_IDS] if count == RAW_CLASSES else None

    def classes(self, content: Any, count: int) -> tuple[tuple[str, ...] | None, tuple[int, ...] | None]:
        if count != RAW_CLASSES:
            return super().classes(content, count)
        known, ids = dict(zip(COCO_IDS, COCO_NAMES, strict=True)), tuple(range(1, RAW_CLASSES + 1))
        return tuple(known.get(number, f"unused_{number}") for number in ids), ids

    def lines(self, state: Mapping[str, Tensor]) -> list[str]:
        if self.variant(state) != "d6":
            return []
        return ["taken for D6; D7 has the same tensors: efficientdet.variant=d7 evaluation.image_size=1536"]
