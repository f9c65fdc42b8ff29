"""Rank images by the mistakes of a detector: missed ground-truth boxes and false detections."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from detection.contract import Batch
from detection.data.annotations import Annotations
from detection.data.coco import CocoDataset
from detection.data.loaders import build_evaluation_loader, collate_samples
from detection.data.transforms import Sample
from detection.errors import DataReadError
from detection.evaluation.detections import Detections
from detection.evaluation.evaluate import evaluate
from detection.evaluation.matching import IN_CROWD, NO_GROUND_TRUTH, match_detections
from detection.evaluation.report import protocol_line
from detection.inference.weights import OpenedDetector
from detection.runtime.devices import Machine, describe_device

RULE = "worst first: most missed ground-truth boxes + false detections, then the surest false detection"


@dataclass(frozen=True)
class ImageMistakes:
    """Counts per image, all (M,)."""

    gt_boxes: np.ndarray  # int64, without crowd regions
    found: np.ndarray  # int64: ground-truth boxes with a matching detection
    missed: np.ndarray  # int64: ground-truth boxes without one
    false: np.ndarray  # int64: detections without a matching ground-truth box
    in_crowd: np.ndarray  # int64: detections in crowd regions, which are ignored
    surest_false: np.ndarray  # float64: highest score of a false detection; 0: there is none

    def worst_first(self) -> np.ndarray:
        """Return the positions of the images ordered by `RULE`, ties in dataset order, (M,) int64."""
        return np.lexsort((-self.surest_false, -(self.missed + self.false)))


def count_mistakes(annotations: Annotations, detections: Detections, matches: np.ndarray) -> ImageMistakes:
    """Count the mistakes in each image.

    Args:
        detections: K detections, such as all above a score.
        matches: result of `match_detections` for them, (K,).
    """
    images = len(annotations)
    image_of_box = np.repeat(np.arange(images), np.diff(annotations.first_box))
    gt_boxes = np.bincount(image_of_box[~annotations.crowd], minlength=images)

    def count(of: np.ndarray) -> np.ndarray:
        return np.bincount(detections.image_index[of], minlength=images)

    surest_false = np.zeros(images)
    wrong = matches == NO_GROUND_TRUTH
    np.maximum.at(surest_false, detections.image_index[wrong], detections.scores[wrong])
    found = count(matches >= 0)
    return ImageMistakes(gt_boxes, found, gt_boxes - found, count(wrong), count(matches == IN_CROWD), surest_false)


def write_mistakes(path: Path, annotations: Annotations, mistakes: ImageMistakes, order: np.ndarray) -> None:
    """Write one CSV row per image, in the given order of positions."""
    with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["rank", "image_id", "file_name", "gt_boxes", "found", "missed", "false", "in_crowd", "surest_false"]
        )
        for rank, index in enumerate(order.tolist(), start=1):
            counts = (mistakes.gt_boxes, mistakes.found, mistakes.missed, mistakes.false, mistakes.in_crowd)
            writer.writerow(
                [
                    rank,
                    int(annotations.image_ids[index]),
                    annotations.file_name(index),
                    *(int(values[index]) for values in counts),
                    f"{mistakes.surest_false[index]:.4f}",
                ]
            )


@dataclass(frozen=True)
class Findings:
    """Detections on a dataset at or above a score threshold, and their mistakes."""

    detections: Detections
    matches: np.ndarray  # result of `match_detections`, (K,)
    mistakes: ImageMistakes
    threshold: float


class Readable(torch.utils.data.Dataset):
    """Dataset that returns (position, error message) for an unreadable image instead of raising."""

    def __init__(self, dataset: CocoDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample | tuple[int, str]:
        try:
            return self.dataset[index]
        except DataReadError as error:
            return index, error.line


def collate_readable(items: Sequence[Sample | tuple[int, str]]) -> dict[str, Any]:
    """Collate the samples of `Readable` to "batch" (None if there are none) and the rest to "unreadable"."""
    samples = [item for item in items if isinstance(item, Sample)]
    unreadable = [item for item in items if not isinstance(item, Sample)]
    return {"batch": collate_samples(samples) if samples else None, "unreadable": unreadable}


def find_mistakes(
    opened: OpenedDetector, machine: Machine, dataset: CocoDataset, unreadable: dict[int, str]
) -> Findings:
    """Run the detector on every readable image and count its mistakes.

    Args:
        opened: trained weights with their settings.
        machine: device and precision.
        unreadable: filled with position -> error message of the other images.

    Raises:
        DataReadError: no image can be read.
    """
    settings, device = opened.settings, machine.device
    print(f"{describe_device(device)}; {protocol_line(settings, opened.detector)}", flush=True)
    detector = machine.to_device(opened.detector)
    batch_size = settings.evaluation.batch_size or settings.train.micro_batch
    loader = build_evaluation_loader(
        Readable(dataset), batch_size, settings.data.num_workers, device, collate=collate_readable
    )

    def batches() -> Iterator[Batch]:
        for loaded in tqdm(loader, unit="batch", disable=None):
            for index, line in loaded["unreadable"]:
                unreadable[index] = line
                tqdm.write(f"left out: {line}")
            if loaded["batch"] is not None:
                yield loaded["batch"]
        if len(unreadable) == len(dataset):
            raise DataReadError(f"none of {len(dataset)} images can be read; {unreadable[0]}")

    found = evaluate(
        detector.model,
        None,
        detector.postprocess,
        batches(),
        dataset.annotations,
        device,
        machine.autocast,
        settings.evaluation.backend,
    ).detections
    threshold = max(settings.evaluation.visualization_threshold, settings.evaluation.confidence_threshold)
    shown = found.scores >= threshold
    detections = Detections(found.image_index[shown], found.boxes[shown], found.scores[shown], found.labels[shown])
    matches = match_detections(dataset.annotations, detections)
    return Findings(detections, matches, count_mistakes(dataset.annotations, detections, matches), threshold)
