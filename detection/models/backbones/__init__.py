"""Backbones: images to one feature map per stride. Each declares channels, strides and pixel scaling."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from detection.config.settings import ModelSettings
from detection.errors import SettingsError
from detection.models.backbones.darknet import Darknet53, DarknetTiny
from detection.models.backbones.mobilenet import mobilenet_v3_large_backbone, mobilenet_v3_small_backbone
from detection.models.backbones.timm_backbone import TIMM_PREFIX, timm_backbone


class Backbone(Protocol):
    """What a backbone declares; it is an `nn.Module` that maps (B, 3, H, W) to one map per stride, ascending by 2."""

    out_channels: tuple[int, ...]
    strides: tuple[int, ...]
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]

    def __call__(self, images: Tensor) -> list[Tensor]: ...


BACKBONES: dict[str, Callable[[], Any]] = {  # beside these: timm/NAME
    "darknet": Darknet53,
    "darknet_tiny": DarknetTiny,
    "mobilenet_v3_large": mobilenet_v3_large_backbone,
    "mobilenet_v3_small": mobilenet_v3_small_backbone,
}


def build_backbone(settings: ModelSettings, levels: int, setting: str) -> Backbone:
    """Build the backbone of the settings with random weights.

    Args:
        levels: number of maps that the detector needs.
        setting: path of the setting that decides it, for the error.

    Raises:
        SettingsError: the backbone does not have as many maps.
    """
    if settings.backbone.startswith(TIMM_PREFIX):
        return timm_backbone(settings.backbone.removeprefix(TIMM_PREFIX), levels)
    backbone: Backbone = BACKBONES[settings.backbone]()
    if len(backbone.strides) != levels:
        raise SettingsError(
            f"{setting}: has {levels} levels, but model.backbone={settings.backbone} has {len(backbone.strides)} "
            f"(strides {', '.join(map(str, backbone.strides))})"
        )
    return backbone
