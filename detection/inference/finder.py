"""A detector in use: images in, boxes in their pixels out. Shared by detect.py and `load_detector`."""

from collections.abc import Sequence

import numpy as np
import torch

from detection.errors import SettingsError, name_list
from detection.inference.results import ImageDetections
from detection.inference.views import Viewed, Viewer
from detection.inference.weights import OpenedDetector

BATCH_SIZE = 8  # if evaluation.batch_size is null


class Finder:
    """Detects objects in images.

    Args:
        opened: trained weights with their settings.
        viewer: how the detector looks at images, and on which machine.
        wanted: names of the classes to detect; empty: all.

    Raises:
        SettingsError: a class is unknown, or the minimum score is below evaluation.confidence_threshold.
    """

    def __init__(self, opened: OpenedDetector, viewer: Viewer, wanted: Sequence[str]) -> None:
        settings, self.names = opened.settings, opened.class_names()
        if unknown := [name for name in wanted if name not in self.names]:
            raise SettingsError(f"--class {unknown[0]}: no class of these weights; they have {name_list(self.names)}")
        self.prepare, self.batch_size, self._viewer = viewer.prepare, viewer.images_at_a_time, viewer
        self.looks_once = viewer.looks_once
        self.threshold = settings.evaluation.visualization_threshold
        self.lowest = settings.evaluation.confidence_threshold
        if self.threshold < self.lowest:
            raise SettingsError(
                f"scores from {self.threshold:g} were asked for; evaluation.confidence_threshold = {self.lowest:g} "
                "drops what is below; lower it too"
            )
        self.wanted = np.array([name in wanted or not wanted for name in self.names])

    def find(self, images: Sequence[Viewed], all_scores: bool = False) -> list[ImageDetections]:
        """Detect in a batch of prepared images.

        Args:
            all_scores: also return what scores less than evaluation.visualization_threshold.
        """
        return [self._of_image(found, 0.0 if all_scores else self.threshold) for found in self._viewer.find(images)]

    def _of_image(self, found: dict[str, torch.Tensor], lowest: float) -> ImageDetections:
        boxes, labels, scores = (found[name].numpy() for name in ("boxes", "labels", "scores"))
        # A diverged network may predict NaN boxes, which cannot be drawn or written.
        shown = (scores >= lowest) & self.wanted[labels] & np.isfinite(boxes).all(axis=1)
        return ImageDetections(boxes[shown], labels[shown], scores[shown])
