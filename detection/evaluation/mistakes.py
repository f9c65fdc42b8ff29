"""The mistakes of a detector, image by image: missed ground-truth boxes and false detections, counted and drawn."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from detection.contract import CROWD_LABEL
from detection.data.annotations import Annotations
from detection.data.build import DetectionDataset
from detection.drawing.boxes import draw_boxes, make_grid
from detection.drawing.files import replace_csv
from detection.drawing.fonts import printable
from detection.evaluation.detections import Detections
from detection.evaluation.matching import IN_CROWD, NO_GROUND_TRUTH

LONGEST_FILE_NAME = 30  # characters of a file name above its image
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
    header = ["rank", "image_id", "file_name", "gt_boxes", "found", "missed", "false", "in_crowd", "surest_false"]
    counts = (mistakes.gt_boxes, mistakes.found, mistakes.missed, mistakes.false, mistakes.in_crowd)
    rows = (
        [
            rank,
            int(annotations.image_ids[index]),
            annotations.file_name(index),
            *(int(values[index]) for values in counts),
            f"{mistakes.surest_false[index]:.4f}",
        ]
        for rank, index in enumerate(order.tolist(), start=1)
    )
    replace_csv(path, itertools.chain([header], rows))


@dataclass(frozen=True)
class Findings:
    """Detections on a dataset at or above a score threshold, and their mistakes."""

    detections: Detections
    matches: np.ndarray  # result of `match_detections`, (K,)
    mistakes: ImageMistakes
    threshold: float


def draw_tile(dataset: DetectionDataset, index: int, side: int, findings: Findings | None) -> np.ndarray:
    """Draw an image with its ground truth and, with `findings`, its detections beside it.

    Args:
        index: position of the image in the dataset.
        side: longer side of the drawn image in pixels.

    Raises:
        DataReadError: the image cannot be read.
    """
    annotations = dataset.annotations
    names = [printable(name) for name in annotations.categories.names]
    image = dataset.load_image(index)
    factor = side / max(image.shape[:2])
    size = [max(1, round(length * factor)) for length in (image.shape[1], image.shape[0])]
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
    rows = np.arange(*annotations.first_box[index : index + 2])
    boxes = annotations.boxes[rows] * factor
    labels = np.where(annotations.crowd[rows], CROWD_LABEL, annotations.labels[rows])
    head = f"id {annotations.image_ids[index]}"
    if findings is None:
        file_name = printable(annotations.file_name(index))
        if len(file_name) > LONGEST_FILE_NAME:
            file_name = f"...{file_name[-LONGEST_FILE_NAME:]}"
        return draw_boxes(image, boxes, labels, names, title=f"{head}  {file_name}  {len(rows)} boxes", legend=True)
    mine = np.flatnonzero(findings.detections.image_index == index)
    matches = findings.matches[mine]
    missed = ~np.isin(rows, matches) & ~annotations.crowd[rows]
    gt = draw_boxes(
        image,
        boxes,
        labels,
        names,
        title=f"{head}  ground truth: {(~annotations.crowd[rows]).sum()}, missed {missed.sum()}",
        notes=np.where(missed, "missed", "").tolist(),
        legend=True,
    )
    found = draw_boxes(
        image,
        findings.detections.boxes[mine] * factor,
        findings.detections.labels[mine],
        names,
        findings.detections.scores[mine],
        title=f"detections: {len(mine)}, false {(matches == NO_GROUND_TRUTH).sum()}",
        notes=np.where(matches == NO_GROUND_TRUTH, "false", "").tolist(),
        legend=True,
    )
    return make_grid([gt, found], columns=2, padding=2)
