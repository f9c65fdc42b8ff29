"""The anchor-free family as a `Detector` (docs/contract.md)."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from detection.config.settings import DARKNET_CFG, EvaluationSettings, ModelSettings, Settings, YoloxSettings
from detection.contract import Detector, Geometry
from detection.errors import SettingsError
from detection.models.backbones import Backbone, build_backbone
from detection.models.backbones.darknet import use_darknet_batch_norm
from detection.models.necks import plain_stage, spp_stage
from detection.models.yolox import ASSIGNERS, CRITERIA, NECKS
from detection.models.yolox.layout import OutputLayout
from detection.models.yolox.network import YOLOX
from detection.models.yolox.postprocess import PointPostprocess

FILL = (124, 116, 104)  # RGB, ImageNet's mean
HELD_SETTINGS: dict[str, list[str]] = {
    "network": [
        f"yolox.{name}" for name in ("neck", "spp", "neck_channels", "head_channels", "head_depthwise", "pixels")
    ],
    "decoding": [],
}


def build_yolox(
    model_settings: ModelSettings, yolox: YoloxSettings, evaluation: EvaluationSettings, num_classes: int
) -> Detector:
    """Build the detector of the settings with random weights, on the CPU.

    Raises:
        SettingsError: the backbone has another number of levels, or brings a head of its own.
    """
    if model_settings.backbone == DARKNET_CFG:
        raise SettingsError(f"model.backbone={DARKNET_CFG} brings its own head: it needs model.detector=yolo")
    backbone = build_backbone(model_settings, len(yolox.neck_channels), "yolox.neck_channels")
    layout = OutputLayout()
    geometry = make_geometry(model_settings, yolox, backbone)
    model = YOLOX(
        backbone,
        NECKS[yolox.neck](backbone.out_channels, yolox.neck_channels, spp_stage if yolox.spp else plain_stage),
        yolox.head_channels,
        num_classes,
        layout,
        geometry,
        yolox.head_depthwise,
        yolox.prior,
        model_settings.batch_norm_momentum,
        yolox.batch_norm_epsilon,
    )
    if model_settings.batch_norm == "darknet":
        use_darknet_batch_norm(model)
    weights = (yolox.box_weight, yolox.objectness_weight, yolox.class_weight, yolox.l1_weight)
    metadata = {"strides": list(model.strides), "layout": layout.metadata()}
    return Detector(
        model,
        CRITERIA[yolox.loss](layout, model.strides, ASSIGNERS[yolox.assigner], weights),
        build_postprocess(metadata, evaluation),
        geometry,
        name=f"yolox {model_settings.backbone}",
        plan=(
            f"model       yolox, {model_settings.backbone}, {sum(p.numel() for p in model.parameters()):,} parameters",
        ),
        score="objectness x class probability" if layout.objectness else "class probability",
        metadata=metadata,
        held_settings=HELD_SETTINGS,
    )


def make_geometry(model_settings: ModelSettings, yolox: YoloxSettings, backbone: Backbone) -> Geometry:
    """Make the geometry: pixels as the backbone wants them, or YOLOX's BGR of 0..255."""
    plain = yolox.pixels == "bgr255"
    return Geometry(
        backbone.strides[-1],
        model_settings.placement or "letterbox",
        model_settings.rounding,
        model_settings.interpolation,
        model_settings.fill or FILL,
        pixel_range=255.0 if plain else 1.0,
        channel_order="bgr" if plain else "rgb",
        pixel_mean=(0.0, 0.0, 0.0) if plain else backbone.pixel_mean,
        pixel_std=(1.0, 1.0, 1.0) if plain else backbone.pixel_std,
    )


def build_postprocess(metadata: Mapping[str, Any], evaluation: EvaluationSettings) -> PointPostprocess:
    """Build the postprocess for raw outputs.

    Args:
        metadata: `Detector.metadata`, possibly read from an exported file.
    """
    return PointPostprocess(
        OutputLayout(**metadata["layout"]),
        metadata["strides"],
        evaluation.confidence_threshold,
        evaluation.iou_threshold,
        evaluation.max_detections,
    )


def postprocess_from_metadata(metadata: Mapping[str, Any], settings: Settings) -> nn.Module:
    """`build_postprocess` for raw outputs of an exported file."""
    return build_postprocess(metadata, settings.evaluation)
