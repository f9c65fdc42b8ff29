"""Detectors by name: each is a triple of model, criterion and postprocess with the signatures of docs/contract.md."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from detection.losses import CRITERIA
from detection.models.darknet import Darknet53
from detection.models.mobilenet import mobilenet_v3_large_encoder, mobilenet_v3_small_encoder
from detection.models.yolov3 import YOLOv3
from detection.postprocessing import YOLOPostprocess
from detection.settings import EvaluationSettings, YoloSettings

ENCODERS: dict[str, Callable[[], Any]] = {  # each makes a module that is a `yolov3.Encoder`
    "darknet": Darknet53,
    "mobilenet_v3_large": mobilenet_v3_large_encoder,
    "mobilenet_v3_small": mobilenet_v3_small_encoder,
}


class Detector(NamedTuple):
    """outputs = model(images); losses = criterion(outputs, targets); found = postprocess(outputs)."""

    model: nn.Module
    criterion: nn.Module
    postprocess: nn.Module

    def to(self, device: torch.device, channels_last: bool) -> "Detector":
        """All three on the device, the model's weights in the memory layout that suits it."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model.to(memory_format=layout)
        return Detector(*(part.to(device) for part in self))


def build_detector(yolo: YoloSettings, evaluation: EvaluationSettings, num_classes: int) -> Detector:
    """The detector that the settings describe, with random weights, on the CPU."""
    model = YOLOv3(
        ENCODERS[yolo.encoder](),
        yolo.neck_channels,
        [len(level) for level in yolo.anchors],
        num_classes,
        yolo.objectness_prior,
        yolo.batch_norm_momentum,
    )
    weights = (yolo.box_weight, yolo.objectness_weight, yolo.class_weight)
    criterion = CRITERIA[yolo.loss](yolo.anchors, model.strides, yolo.ignore_threshold, yolo.class_loss, weights)
    postprocess = YOLOPostprocess(
        yolo.anchors,
        model.strides,
        evaluation.confidence_threshold,
        evaluation.iou_threshold,
        evaluation.max_detections,
        yolo.class_loss,
    )
    return Detector(model, criterion, postprocess)
