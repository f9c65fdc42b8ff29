"""Backbones by name."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, cast

from torch import Tensor

from detection.config.settings import ModelSettings
from detection.errors import SettingsError
from detection.models.backbones.darknet import LEAKY_SLOPE, Darknet53, DarknetTiny
from detection.models.backbones.efficientnet import FACTORS, tensorflow_efficientnet, torchvision_efficientnet
from detection.models.backbones.form import BackboneForm
from detection.models.backbones.mobilenet import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    mobilenet_v2_backbone,
    mobilenet_v3_large_backbone,
    mobilenet_v3_small_backbone,
)
from detection.models.backbones.resnet import ResNet50
from detection.models.backbones.timm_backbone import TIMM_PREFIX, timm_backbone


class Backbone(Protocol):
    """Protocol of an `nn.Module` that maps (B, 3, H, W) to one feature map per stride, each twice the one before.

    `pixel_mean` and `pixel_std` normalise RGB in 0..1.
    """

    out_channels: tuple[int, ...]
    strides: tuple[int, ...]
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]

    def __call__(self, images: Tensor) -> list[Tensor]: ...


BACKBONES: dict[str, Callable[..., Any]] = {  # and timm/NAME
    "darknet": Darknet53,
    "darknet_tiny": DarknetTiny,
    "mobilenet_v2": mobilenet_v2_backbone,
    "mobilenet_v2_leaky": partial(mobilenet_v2_backbone, LEAKY_SLOPE),
    "mobilenet_v3_large": mobilenet_v3_large_backbone,
    "mobilenet_v3_small": mobilenet_v3_small_backbone,
    "resnet50": ResNet50,
    **{f"efficientnet_b{number}": partial(torchvision_efficientnet, number) for number in range(len(FACTORS))},
    **{f"tf_efficientnet_b{number}": partial(tensorflow_efficientnet, number) for number in range(len(FACTORS))},
}


def build_backbone(settings: ModelSettings, levels: int, setting: str) -> Backbone:
    """Build the backbone of the settings with random weights.

    Args:
        levels: number of feature maps that the detector needs.
        setting: path of the setting that `levels` comes from, for the error.

    Raises:
        SettingsError: the backbone has another number of feature maps; or see `timm_backbone`.
    """
    backbone: Backbone
    if settings.backbone.startswith(TIMM_PREFIX):
        backbone = timm_backbone(settings.backbone.removeprefix(TIMM_PREFIX), levels)
    else:
        # `ModelSettings` refuses these of other backbones.
        own = (settings.width, settings.depth, settings.leaky_slope) if settings.backbone == "darknet" else ()
        backbone = BACKBONES[settings.backbone](*own)
    cast(Any, backbone).built_as = BackboneForm.of(backbone)  # for `check_form`, before a detector changes it
    if settings.pixel_scaling == "imagenet":
        backbone.pixel_mean, backbone.pixel_std = IMAGENET_MEAN, IMAGENET_STD
    if len(backbone.strides) != levels:
        raise SettingsError(
            f"{setting}: has {levels} levels, but model.backbone={settings.backbone} has {len(backbone.strides)} "
            f"(strides {', '.join(map(str, backbone.strides))})"
        )
    return backbone
