"""Detectors by name: each is a triple of model, criterion and postprocess with the signatures of docs/contract.md."""

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import nn

from detection.config.settings import DARKNET_CFG, EvaluationSettings, YoloSettings
from detection.contract import Detector
from detection.errors import SettingsError
from detection.models.backbones.darknet import Darknet53, DarknetTiny, use_darknet_batch_norm
from detection.models.backbones.mobilenet import mobilenet_v3_large_backbone, mobilenet_v3_small_backbone
from detection.models.backbones.timm_backbone import TIMM_PREFIX, timm_backbone
from detection.models.darknet.cfg import parse_cfg
from detection.models.darknet.network import DarknetNetwork
from detection.models.yolo import CRITERIA
from detection.models.yolo.grid import Anchors
from detection.models.yolo.network import Backbone, YOLOv3, spp_stage, tiny_stage, yolov3_stage
from detection.models.yolo.postprocess import YOLOPostprocess

BACKBONES: dict[str, Callable[[], Any]] = {  # each makes a module that is a `yolov3.Backbone`; beside these: timm/NAME
    "darknet": Darknet53,
    "darknet_tiny": DarknetTiny,
    "mobilenet_v3_large": mobilenet_v3_large_backbone,
    "mobilenet_v3_small": mobilenet_v3_small_backbone,
}


def build_detector(yolo: YoloSettings, evaluation: EvaluationSettings, num_classes: int) -> Detector:
    """The detector that the settings describe, with random weights, on the CPU."""
    model = build_model(yolo, num_classes)
    if yolo.batch_norm == "darknet":
        use_darknet_batch_norm(model)
    anchors, scales_xy = anchors_of(model, yolo)
    new_coords = isinstance(model, DarknetNetwork) and model.new_coords
    criterion = None
    if not new_coords:
        weights = (yolo.box_weight, yolo.objectness_weight, yolo.class_weight)
        criterion = CRITERIA[yolo.loss](
            anchors, model.strides, yolo.ignore_threshold, yolo.class_loss, weights, scales_xy
        )
    postprocess = YOLOPostprocess(
        anchors,
        model.strides,
        evaluation.confidence_threshold,
        evaluation.iou_threshold,
        evaluation.max_detections,
        yolo.class_loss,
        evaluation.objectness_threshold,
        scales_xy,
        new_coords,
        evaluation.score,
    )
    return Detector(model, criterion, postprocess)


def anchors_of(model: nn.Module, yolo: YoloSettings) -> tuple[Anchors, Sequence[float] | None]:
    """Anchors and scale_xy (None: 1) per level; a Darknet description says more than the settings."""
    return (model.anchors, model.scales_xy) if isinstance(model, DarknetNetwork) else (yolo.anchors, None)


def build_model(yolo: YoloSettings, num_classes: int) -> YOLOv3 | DarknetNetwork:
    if yolo.backbone == DARKNET_CFG:
        assert yolo.cfg is not None, "checked by the settings"
        return DarknetNetwork(parse_cfg(yolo.cfg), num_classes, yolo.objectness_prior, yolo.batch_norm_momentum)
    tiny = yolo.backbone == "darknet_tiny"
    return YOLOv3(
        build_backbone(yolo),
        yolo.neck_channels,
        [len(level) for level in yolo.anchors],
        num_classes,
        yolo.objectness_prior,
        yolo.batch_norm_momentum,
        tiny_stage if tiny else spp_stage if yolo.spp else yolov3_stage,
    )


def build_backbone(yolo: YoloSettings) -> Backbone:
    """The backbone that the settings name, with random weights.

    Raises:
        SettingsError: it does not have one map per level of anchors.
    """
    if yolo.backbone.startswith(TIMM_PREFIX):
        return timm_backbone(yolo.backbone.removeprefix(TIMM_PREFIX), len(yolo.anchors))
    backbone = BACKBONES[yolo.backbone]()
    if len(backbone.strides) != len(yolo.anchors):
        raise SettingsError(
            f"yolo.anchors: has {len(yolo.anchors)} levels, but yolo.backbone={yolo.backbone} has {len(backbone.strides)}"
            f" (strides {', '.join(map(str, backbone.strides))}); yolo.anchors and yolo.neck_channels need one each; "
            "for YOLOv3-tiny: --config recipes/yolov3_tiny.yaml"
        )
    return backbone


def size_multiple(model: nn.Module) -> int:
    """What the sides of the network input must be a multiple of, pixels."""
    return int(getattr(model, "size_multiple", None) or cast(tuple[int, ...], model.strides)[-1])


def check_image_size(model: nn.Module, name: str, size: int) -> None:
    """Refuse a size that the network's coarsest grid does not divide.

    Raises:
        SettingsError: names the setting.
    """
    multiple = size_multiple(model)
    if size % multiple:
        raise SettingsError(f"{name} = {size}: must be a multiple of {multiple}, the coarsest grid of this network")
