"""Detectors by name. Each family is a package here, and this file is where it is listed."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from detection.config.settings import EvaluationSettings, ModelSettings, Settings
from detection.contract import Detector
from detection.errors import SettingsError
from detection.models.efficientdet.detector import build_efficientdet
from detection.models.efficientdet.detector import postprocess_from_metadata as anchor_postprocess_from_metadata
from detection.models.yolo.detector import build_yolo, postprocess_from_metadata, upgrade_metadata
from detection.models.yolox.detector import build_yolox
from detection.models.yolox.detector import postprocess_from_metadata as point_postprocess_from_metadata

# Name -> builder: (section `model`, the detector's own section, section `evaluation`, number of classes) -> Detector
# with random weights, on the CPU.
DETECTORS: dict[str, Callable[[ModelSettings, Any, EvaluationSettings, int], Detector]] = {
    "yolo": build_yolo,
    "yolox": build_yolox,
    "efficientdet": build_efficientdet,
}
# Name -> builder of the postprocess for raw outputs of an exported file: (`Detector.metadata`, settings) -> module.
POSTPROCESSES: dict[str, Callable[[Mapping[str, Any], Settings], nn.Module]] = {
    "yolo": postprocess_from_metadata,
    "yolox": point_postprocess_from_metadata,
    "efficientdet": anchor_postprocess_from_metadata,
}

__all__ = ["DETECTORS", "POSTPROCESSES", "build_detector", "check_input_sizes", "check_shares", "upgrade_metadata"]


def build_detector(settings: Settings, num_classes: int) -> Detector:
    """Build the detector that the settings name, with random weights, on the CPU.

    Raises:
        SettingsError: unknown detector, or its settings contradict one another.
    """
    name = settings.model.detector
    if name not in DETECTORS:
        raise SettingsError(f"model.detector = {name!r}: must be {' or '.join(DETECTORS)}")
    return DETECTORS[name](settings.model, getattr(settings, name, None), settings.evaluation, num_classes)


def check_input_sizes(detector: Detector, settings: Settings) -> None:
    """Check the input sizes of training and evaluation against the detector's `size_multiple`.

    Raises:
        SettingsError: a size is not a multiple; names the setting.
    """
    train = settings.train
    detector.geometry.check_size("train.image_size", train.image_size)
    for size in train.multiscale_sizes if train.resize_frequency else ():
        detector.geometry.check_size("train.multiscale_sizes", size)
    detector.geometry.check_size("evaluation.image_size", settings.evaluation.image_size)


def check_shares(detector: Detector, settings: Settings) -> None:
    """Check that the criterion weighs the boxes of a weighted mixup, where there is one.

    Raises:
        SettingsError: it does not; half-visible objects would count as whole ones.
    """
    mixup = settings.data.augmentation.mixup
    weighs = detector.criterion is None or getattr(detector.criterion, "weighs_boxes", False)
    if mixup.p and mixup.beta is not None and not weighs:
        raise SettingsError(
            f"data.augmentation.mixup.beta: the losses of {settings.model.detector} do not weigh boxes; must be null"
        )
