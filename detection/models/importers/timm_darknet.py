"""timm's Darknet-53, a classifier, as the backbone of our detectors.

Source: timm/models/cspnet.py of https://github.com/huggingface/pytorch-image-models, `darknet53`
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from detection.models.importers.formats import (
    DARKNET_BLOCKS,
    BlockNames,
    Format,
    bottom_blocks,
    darknet_order,
    pair_names,
)

CLASSIFIER = ("head.fc.weight", "head.fc.bias")
RELATIVES = ("stages.0.conv_exp.", "stages.0.conv_down.aa", "stages.0.conv_down.conv.aa")  # CSP, and anti-aliased


class TimmDarknet53(Format):
    """Slope 0.01 of the leaky ReLU; pixels with ImageNet's mean and deviation."""

    source = "timm's Darknet-53"
    marks = ("stages.0.conv_down.", "stages.4.conv_down.")
    whole = False

    def matches(self, state: Mapping[str, Tensor]) -> bool:
        return super().matches(state) and not any(name.startswith(RELATIVES) for name in state)

    def settings(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"model.backbone": "darknet", "model.leaky_slope": 0.01, "model.pixel_scaling": "imagenet"}

    def layout(self, model: nn.Module) -> dict[str, str]:
        residual = "stages.{stage}.blocks.{block}.conv"
        theirs = [
            "stem.conv1",
            *bottom_blocks(DARKNET_BLOCKS, "stages.{stage}.conv_down", f"{residual}1", f"{residual}2"),
        ]
        return pair_names(model, darknet_order(model), theirs, BlockNames())

    def others(self, state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """The classifier, whatever its classes; a file without one is read too."""
        return {name: state[name] for name in CLASSIFIER if name in state}
