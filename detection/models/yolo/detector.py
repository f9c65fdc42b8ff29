"""The YOLO family as a `Detector` (docs/contract.md)."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import nn

from detection.config.settings import DARKNET_CFG, EvaluationSettings, ModelSettings, Settings, YoloSettings
from detection.contract import AnchorLayout, Anchors, Detector, Geometry
from detection.errors import SettingsError
from detection.models.backbones import build_backbone
from detection.models.backbones.darknet import use_darknet_batch_norm
from detection.models.darknet.cfg import cfg_notices, format_cfg, parse_cfg, with_anchors
from detection.models.darknet.layers import build_layers
from detection.models.darknet.network import DarknetNetwork
from detection.models.necks import plain_stage, spp_stage, tiny_stage
from detection.models.yolo import CRITERIA
from detection.models.yolo.criterion import Criterion
from detection.models.yolo.fit import AnchorFit
from detection.models.yolo.loss_options import LossOptions
from detection.models.yolo.network import YOLOv3
from detection.models.yolo.postprocess import YOLOPostprocess

FILL = (124, 116, 104)  # RGB, ImageNet's mean
HEAD = ("head_channels", "output_kernels", "scale_xy", "new_coords", "iou_aware")
HELD_SETTINGS: dict[str, list[str]] = {
    "network": [f"yolo.{name}" for name in ("spp", "neck", "neck_channels", "anchors", "class_loss", *HEAD)],
    "decoding": ["yolo.score", "yolo.objectness_threshold", "yolo.iou_aware_factor"],
}


def build_yolo(
    model_settings: ModelSettings, yolo: YoloSettings, evaluation: EvaluationSettings, num_classes: int
) -> Detector:
    """Build the detector of the settings with random weights, on the CPU.

    Raises:
        SettingsError: see `build_model`.
    """
    model = build_model(model_settings, yolo, num_classes)
    if model_settings.batch_norm == "darknet":
        use_darknet_batch_norm(model)
    anchors: Anchors
    if isinstance(model, DarknetNetwork):  # the cfg overrides the settings
        anchors, scales_xy, new_coords = model.anchors, model.scales_xy, model.new_coords
        size_multiple = model.size_multiple
    else:
        anchors, scales_xy, new_coords = yolo.anchors, (yolo.scale_xy,) * len(yolo.anchors), yolo.new_coords
        size_multiple = model.strides[-1]
    criterion = None
    gaussian = isinstance(model, DarknetNetwork) and model.gaussian
    # The losses lack the uncertainties of the one; the raw sizes of the other cannot be compared, only its boxes.
    if not gaussian and not (new_coords and CRITERIA[yolo.loss].encodes):
        criterion = build_criterion(yolo, anchors, model.strides, scales_xy, new_coords)
    objectness = "objectness x certainty of the box" if gaussian else "objectness"
    if yolo.iou_aware:
        objectness = f"objectness^{1 - yolo.iou_aware_factor:g} x IoU^{yolo.iou_aware_factor:g}"
    metadata = {
        "strides": list(model.strides),
        "anchors": [[list(anchor) for anchor in level] for level in anchors],
        "scale_xy": list(scales_xy),
        "new_coords": new_coords,
        "iou_aware": yolo.iou_aware,
    }
    return Detector(
        model,
        criterion,
        build_postprocess(metadata, yolo, evaluation),
        Geometry(
            size_multiple,
            model_settings.placement or "letterbox",
            model_settings.rounding,
            model_settings.interpolation,
            model_settings.fill or FILL,
            pixel_mean=model.pixel_mean,
            pixel_std=model.pixel_std,
        ),
        name=model_settings.backbone,
        untrainable="model.cfg: a network with [Gaussian_yolo] can detect but not be trained here"
        if gaussian
        else "model.cfg: a network with new_coords = 1 can detect but not be trained here with "
        f"yolo.loss={yolo.loss}, only with giou, ciou or multi",
        plan=(
            f"model       {backbone_name(model_settings)}, {sum(p.numel() for p in model.parameters()):,} parameters",
        ),
        notices=CfgNotices(model_settings.cfg),
        score=f"{objectness} x class probability"
        if yolo.score == "product"
        else f"{objectness} of the likeliest class",
        deviations=tuple(
            text
            for text, deviates in (
                ("scored by objectness alone", yolo.score != "product"),
                (f"objectness above {yolo.objectness_threshold:g} only", yolo.objectness_threshold > 0),
            )
            if deviates
        ),
        metadata=metadata,
        held_settings=HELD_SETTINGS,
        anchors=anchor_layout(model_settings, yolo, model, anchors),
        check_fit=AnchorFit(anchors, model.strides, scales_xy),
    )


def backbone_name(settings: ModelSettings) -> str:
    """The backbone and, if they are not 1, its factors, for the plan."""
    factors = [f"{name} {value:g}" for name in ("width", "depth") if (value := getattr(settings, name)) != 1]
    return f"{settings.backbone} ({', '.join(factors)})" if factors else settings.backbone


def build_criterion(
    yolo: YoloSettings, anchors: Anchors, strides: Sequence[int], scales_xy: Sequence[float], new_coords: bool
) -> Criterion:
    """Build the criterion of the settings.

    Raises:
        SettingsError: a setting of the loss does not fit the levels or their grid scale.
    """
    balance = yolo.objectness_balance
    if balance is not None and len(balance) != len(strides):
        raise SettingsError(f"yolo.objectness_balance: has {len(balance)} values, but there are {len(strides)} levels")
    if yolo.neighbour_cells and min(scales_xy) < 2:
        raise SettingsError(
            f"yolo.neighbour_cells: a centre in the next cell is out of reach with scale_xy = {min(scales_xy):g}; "
            "yolo.scale_xy must be at least 2"
        )
    return CRITERIA[yolo.loss](
        anchors,
        strides,
        yolo.ignore_threshold,
        yolo.class_loss,
        (yolo.box_weight, yolo.objectness_weight, yolo.class_weight),
        scales_xy,
        new_coords,
        yolo.iou_aware,
        LossOptions(**{field.name: getattr(yolo, field.name) for field in fields(LossOptions)}),
    )


class CfgNotices:
    """`Detector.notices` of a network from a Darknet cfg."""

    def __init__(self, cfg: str | None) -> None:
        self.cfg = cfg

    def __call__(self, sizes: Mapping[str, int]) -> list[str]:
        return [] if self.cfg is None else [f"cfg         {line}" for line in cfg_notices(parse_cfg(self.cfg), sizes)]


def build_model(model_settings: ModelSettings, yolo: YoloSettings, num_classes: int) -> YOLOv3 | DarknetNetwork:
    """Build the network of the settings with random weights.

    Raises:
        SettingsError: backbone and anchors have different numbers of levels; the cfg is not a detector's.
    """
    prior, momentum = yolo.objectness_prior, model_settings.batch_norm_momentum
    if model_settings.cfg is not None:
        return DarknetNetwork(parse_cfg(model_settings.cfg), num_classes, prior, momentum)
    tiny = model_settings.backbone == "darknet_tiny"
    try:
        backbone = build_backbone(model_settings, len(yolo.anchors), "yolo.anchors")
    except SettingsError as error:
        if tiny:
            raise SettingsError(f"{error}; for YOLOv3-tiny: --config recipes/yolov3_tiny.yaml") from None
        raise
    return YOLOv3(
        backbone,
        yolo.neck_channels,
        [len(level) for level in yolo.anchors],
        num_classes,
        prior,
        momentum,
        tiny_stage if tiny else spp_stage if yolo.spp else plain_stage,
        yolo.neck == "pan",
        yolo.iou_aware,
        yolo.output_kernels,
        yolo.head_channels,
    )


def build_postprocess(
    metadata: Mapping[str, Any], yolo: YoloSettings, evaluation: EvaluationSettings
) -> YOLOPostprocess:
    """Build the postprocess for raw outputs.

    Args:
        metadata: `Detector.metadata`, possibly read from an exported file.
    """
    return YOLOPostprocess(
        metadata["anchors"],
        metadata["strides"],
        evaluation.confidence_threshold,
        evaluation.iou_threshold,
        evaluation.max_detections,
        yolo.class_loss,
        yolo.objectness_threshold,
        metadata["scale_xy"],
        metadata["new_coords"],
        yolo.score,
        yolo.iou_aware_factor if metadata.get("iou_aware", False) else None,  # older files lack it
    )


def postprocess_from_metadata(metadata: Mapping[str, Any], settings: Settings) -> nn.Module:
    """`build_postprocess` for raw outputs of an exported file."""
    return build_postprocess(metadata, settings.yolo, settings.evaluation)


def upgrade_metadata(entries: dict[str, Any]) -> dict[str, Any]:
    """Convert metadata of files exported before the settings had a section per detector and a geometry."""
    if "geometry" in entries or "letterbox" not in entries:
        return entries
    letterbox, yolo, thresholds = (entries[key] for key in ("letterbox", "yolo", "thresholds"))
    entries["geometry"] = {
        "size_multiple": entries["size_multiple"],
        "placement": "letterbox" if letterbox["keep_aspect"] else "squash",
        "rounding": letterbox["rounding"],
        "interpolation": letterbox["interpolation"],
        "fill": letterbox["fill"],
        "pixel_mean": entries["pixel_mean"],
        "pixel_std": entries["pixel_std"],
    }
    entries["decoding"] = {key: entries[key] for key in ("strides", "anchors", "scale_xy", "new_coords")}
    data = {
        "keep_aspect": letterbox["keep_aspect"],
        "letterbox_rounding": letterbox["rounding"],
        "interpolation": letterbox["interpolation"],
        "fill": letterbox["fill"],
    }
    entries["settings"] = {
        "yolo": yolo | {"score": entries["score"], "objectness_threshold": thresholds["objectness"]},
        "data": data,
    }
    entries["held_settings"] = HELD_SETTINGS
    product = "objectness x class probability"
    entries["score"] = product if entries["score"] == "product" else "objectness of the likeliest class"
    return entries


def anchor_layout(
    model_settings: ModelSettings, yolo: YoloSettings, model: YOLOv3 | DarknetNetwork, anchors: Anchors
) -> AnchorLayout:
    """Build `Detector.anchors`; for a network from a cfg it can rewrite the cfg."""
    if model_settings.backbone != DARKNET_CFG or model_settings.cfg is None:
        return AnchorLayout(anchors, model.strides, "yolo.anchors")
    sections = parse_cfg(model_settings.cfg)
    layers = [level.layer for level in sorted(build_layers(sections)[2], key=lambda level: level.stride)]

    def cfg_with(levels: Anchors) -> str:
        return format_cfg(with_anchors(sections, dict(zip(layers, levels, strict=True))))

    return AnchorLayout(anchors, model.strides, "model.cfg", cfg_with)
