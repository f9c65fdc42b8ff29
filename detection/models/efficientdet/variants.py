"""The published sizes of EfficientDet, and RetinaNet."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Variant:
    """What distinguishes a network of the family from the others.

    Attributes:
        name: as in the setting `efficientdet.variant`.
        backbone: a name of `BACKBONES`, the one of the published network.
        image_size: side of the network input in the published training, pixels.
        fpn_channels: of all maps of the feature pyramid and of the heads.
        fpn_cells: BiFPN cells one after another; 0: the plain top-down pyramid of RetinaNet.
        head_repeats: convolutions of each head before its predictions.
        fusion: how a BiFPN node joins its inputs: "fast" (learned weights, normalised) or "sum".
        anchor_scale: side of the smallest square anchor of a level, in strides.
        max_level: of the coarsest map, whose stride is 2**max_level; the finest is 3.
        separable: convolutions of the heads are depthwise-separable with a batch norm per level; else plain 3x3
            convolutions without batch norm.

    Source: EfficientDet, table 1, https://arxiv.org/abs/1911.09070, with `efficientdet/hparams_config.py` of
        github google/automl, which alone says what D6 to D7x are; RetinaNet, https://arxiv.org/abs/1708.02002
    """

    name: str
    backbone: str
    image_size: int
    fpn_channels: int
    fpn_cells: int
    head_repeats: int
    fusion: Literal["fast", "sum"] = "fast"
    anchor_scale: float = 4.0
    max_level: int = 7
    separable: bool = True

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per cell of each level, ascending."""
        return tuple(2**level for level in range(MIN_LEVEL, self.max_level + 1))


MIN_LEVEL = 3  # of the finest map

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("d0", "tf_efficientnet_b0", 512, 64, 3, 3),
        Variant("d1", "tf_efficientnet_b1", 640, 88, 4, 3),
        Variant("d2", "tf_efficientnet_b2", 768, 112, 5, 3),
        Variant("d3", "tf_efficientnet_b3", 896, 160, 6, 4),
        Variant("d4", "tf_efficientnet_b4", 1024, 224, 7, 4),
        Variant("d5", "tf_efficientnet_b5", 1280, 288, 7, 4),
        Variant("d6", "tf_efficientnet_b6", 1280, 384, 8, 5, "sum"),
        Variant("d7", "tf_efficientnet_b6", 1536, 384, 8, 5, "sum", anchor_scale=5.0),
        Variant("d7x", "tf_efficientnet_b7", 1536, 384, 8, 5, "sum", max_level=8),
        Variant("retinanet", "resnet50", 800, 256, 0, 4, separable=False),
    )
}
