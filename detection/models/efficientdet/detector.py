"""EfficientDet and RetinaNet as a `Detector` (docs/contract.md)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from detection.config.settings import DARKNET_CFG, EfficientDetSettings, EvaluationSettings, ModelSettings, Settings
from detection.contract import Detector, Geometry
from detection.errors import SettingsError
from detection.models.backbones import build_backbone
from detection.models.backbones.darknet import use_darknet_batch_norm
from detection.models.efficientdet.anchors import AnchorGrid
from detection.models.efficientdet.criterion import EfficientDetLoss
from detection.models.efficientdet.fit import AnchorGridFit
from detection.models.efficientdet.network import EfficientDet
from detection.models.efficientdet.postprocess import AnchorPostprocess
from detection.models.efficientdet.variants import VARIANTS
from detection.models.postprocess import Selection

FILL = (124, 116, 104)  # RGB, ImageNet's mean
BACKBONE_STRIDES = (8, 16, 32)  # coarser levels are the pyramid's own
SELECTION_SETTINGS = [f"efficientdet.{name}" for name in ("nms", "soft_sigma", "max_candidates", "max_per_image")]
HELD_SETTINGS: dict[str, list[str]] = {
    "network": [f"efficientdet.{name}" for name in ("variant", "anchor_scale", "aspects", "redundant_bias")],
    "decoding": SELECTION_SETTINGS,  # a decoded file carries its selection
}


def build_efficientdet(
    model_settings: ModelSettings, efficientdet: EfficientDetSettings, evaluation: EvaluationSettings, num_classes: int
) -> Detector:
    """Build the detector of the settings with random weights, on the CPU.

    Raises:
        SettingsError: the backbone has other levels than strides 8, 16 and 32, or brings a head of its own.
    """
    if model_settings.backbone == DARKNET_CFG:
        raise SettingsError(f"model.backbone={DARKNET_CFG} brings its own head: it needs model.detector=yolo")
    variant = VARIANTS[efficientdet.variant]
    if efficientdet.anchor_scale is not None:
        variant = dataclasses.replace(variant, anchor_scale=efficientdet.anchor_scale)
    backbone = build_backbone(model_settings, len(BACKBONE_STRIDES), f"efficientdet.variant={variant.name}")
    if tuple(backbone.strides) != BACKBONE_STRIDES:
        strides = ", ".join(map(str, backbone.strides))
        raise SettingsError(
            f"model.backbone={model_settings.backbone}: has strides {strides}; efficientdet needs 8, 16, 32"
        )
    geometry = Geometry(
        variant.strides[-1],
        model_settings.placement or "top_left",
        model_settings.rounding,
        model_settings.interpolation,
        model_settings.fill or FILL,
        pixel_mean=backbone.pixel_mean,
        pixel_std=backbone.pixel_std,
    )
    model = EfficientDet(
        backbone,
        variant,
        num_classes,
        geometry,
        efficientdet.redundant_bias,
        model_settings.batch_norm_momentum,
        efficientdet.prior,
    )
    if model_settings.batch_norm == "darknet":
        use_darknet_batch_norm(model)
    selection = make_selection(efficientdet)
    metadata = {
        "strides": list(variant.strides),
        "anchor_scale": variant.anchor_scale,
        "aspects": [list(aspect) if isinstance(aspect, tuple) else aspect for aspect in efficientdet.aspects],
        "selection": selection.metadata(),
    }
    grid = grid_from_metadata(metadata)
    anchors = len(grid.shapes[0])
    parameters = sum(p.numel() for p in model.parameters())
    other = "" if model_settings.backbone == variant.backbone else f" (published: {variant.backbone})"
    return Detector(
        model,
        EfficientDetLoss(
            grid,
            efficientdet.alpha,
            efficientdet.gamma,
            efficientdet.delta,
            efficientdet.box_weight,
            efficientdet.class_weight,
            efficientdet.label_smoothing,
            efficientdet.positive_iou,
            efficientdet.background_iou,
        ),
        build_postprocess(metadata, evaluation, selection),
        geometry,
        name=f"efficientdet {variant.name} {model_settings.backbone}",
        plan=(
            f"model       efficientdet {variant.name}, {model_settings.backbone}{other}, {parameters:,} parameters, "
            f"{anchors} anchors per cell, strides {', '.join(map(str, variant.strides))}",
        ),
        score="class probability",
        deviations=selection.deviations(),
        metadata=metadata,
        held_settings=HELD_SETTINGS,
        check_fit=AnchorGridFit(grid, efficientdet.positive_iou),
    )


def make_selection(efficientdet: EfficientDetSettings) -> Selection:
    """Return which detections the settings keep."""
    sigma = efficientdet.soft_sigma if efficientdet.nms == "soft" else None
    return Selection(efficientdet.max_candidates, efficientdet.max_per_image, sigma)


def grid_from_metadata(metadata: Mapping[str, Any]) -> AnchorGrid:
    """Return the anchors of `Detector.metadata`, possibly read from an exported file."""
    aspects = [tuple(aspect) if isinstance(aspect, list) else aspect for aspect in metadata["aspects"]]
    return AnchorGrid(metadata["strides"], metadata["anchor_scale"], aspects)


def build_postprocess(
    metadata: Mapping[str, Any], evaluation: EvaluationSettings, selection: Selection
) -> AnchorPostprocess:
    """Build the postprocess for raw outputs.

    Args:
        metadata: `Detector.metadata`, possibly read from an exported file.
        selection: which detections are kept.
    """
    return AnchorPostprocess(
        grid_from_metadata(metadata),
        evaluation.confidence_threshold,
        evaluation.iou_threshold,
        evaluation.max_detections,
        selection,
    )


def postprocess_from_metadata(metadata: Mapping[str, Any], settings: Settings) -> nn.Module:
    """`build_postprocess` for raw outputs of an exported file, with the selection of the settings."""
    return build_postprocess(metadata, settings.evaluation, make_selection(settings.efficientdet))
