"""A detector in use: images in, boxes in their pixels out. Shared by detect.py and `load_detector`."""

from collections.abc import Sequence

import numpy as np
import torch

from detection.data.loaders import collate_samples
from detection.data.transforms import Sample, Transform
from detection.errors import SettingsError, name_list
from detection.inference.results import ImageDetections
from detection.inference.weights import OpenedDetector
from detection.ops.letterbox import boxes_to_original
from detection.runtime.devices import Machine

BATCH_SIZE = 8  # if evaluation.batch_size is null


class Finder:
    """Detects objects in images.

    Args:
        opened: trained weights with their settings.
        machine: device and precision.
        wanted: names of the classes to detect; empty: all.

    Raises:
        SettingsError: a class is unknown, or the minimum score is below evaluation.confidence_threshold.
    """

    def __init__(self, opened: OpenedDetector, machine: Machine, wanted: Sequence[str]) -> None:
        settings, self.names = opened.settings, opened.class_names()
        if unknown := [name for name in wanted if name not in self.names]:
            raise SettingsError(f"--class {unknown[0]}: no class of these weights; they have {name_list(self.names)}")
        self.machine, self.detector = machine, machine.to_device(opened.detector)
        self.transform = Transform(self.detector.geometry, settings.evaluation.image_size)
        self.threshold, lowest = settings.evaluation.visualization_threshold, settings.evaluation.confidence_threshold
        if self.threshold < lowest:
            raise SettingsError(
                f"scores from {self.threshold:g} were asked for; evaluation.confidence_threshold = {lowest:g} drops "
                "what is below; lower it too"
            )
        self.batch_size = settings.evaluation.batch_size or BATCH_SIZE
        self.wanted = np.array([name in wanted or not wanted for name in self.names])

    def prepare(self, image: np.ndarray) -> Sample:
        """Transform an image, RGB uint8 (H, W, 3), to the network input."""
        return self.transform(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), 0, 0, 0)

    def find(self, samples: Sequence[Sample]) -> list[ImageDetections]:
        """Run the detector on a batch of prepared images."""
        with torch.no_grad(), self.machine.autocast():
            outputs = self.detector.model(collate_samples(samples)["images"].to(self.machine.device))
        detections = zip(self.detector.postprocess(outputs), samples, strict=True)
        return [self._of_image(found, sample) for found, sample in detections]

    def _of_image(self, found: dict[str, torch.Tensor], sample: Sample) -> ImageDetections:
        boxes = boxes_to_original(found["boxes"], sample.letterbox).cpu().numpy()
        labels, scores = found["labels"].cpu().numpy(), found["scores"].cpu().numpy()
        # A diverged network may predict NaN boxes, which cannot be drawn or written.
        shown = (scores >= self.threshold) & self.wanted[labels] & np.isfinite(boxes).all(axis=1)
        return ImageDetections(boxes[shown], labels[shown], scores[shown])
