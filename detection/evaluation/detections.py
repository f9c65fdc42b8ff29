"""Detections on a dataset as flat arrays, and their file in COCO result format."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detection.data.annotations import Annotations
from detection.drawing.files import replacing

WRITTEN_AT_A_TIME = 10_000  # detections turned into text at once


@dataclass(frozen=True)
class Detections:
    """K detections on a dataset as flat arrays, grouped by image."""

    image_index: np.ndarray  # (K,) int64, position in the dataset
    boxes: np.ndarray  # (K, 4) float64 xyxy, original pixels
    scores: np.ndarray  # (K,) float64
    labels: np.ndarray  # (K,) int64, dense

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, rows: np.ndarray | slice) -> "Detections":
        """Select rows by number, slice or mask."""
        return Detections(self.image_index[rows], self.boxes[rows], self.scores[rows], self.labels[rows])

    def of_image(self, index: int) -> "Detections":
        """Select the detections of one image."""
        return self.take(self.image_index == index)

    def above(self, confidence: float) -> "Detections":
        """Select what the detector would return with a higher confidence threshold.

        Exact: NMS is greedy by falling score and keeps the largest scores per class, so a detection depends on better
        ones alone. The threshold is rounded to float32, as the detector rounds it.
        """
        return self.take(self.scores > float(np.float32(confidence)))


def box_areas(boxes: np.ndarray) -> np.ndarray:
    """Areas in square pixels of boxes (x1, y1, x2, y2), (K, 4) to (K,)."""
    areas: np.ndarray = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return areas


def result_rows(annotations: Annotations, detections: Detections) -> Iterator[dict[str, Any]]:
    """Yield the detections one by one in COCO result format."""
    boxes = detections.boxes.copy()
    boxes[:, 2:] -= boxes[:, :2]
    columns = zip(
        annotations.image_ids[detections.image_index].tolist(),
        np.asarray(annotations.categories.ids)[detections.labels].tolist(),
        boxes.tolist(),
        detections.scores.tolist(),
        strict=True,
    )
    for image, category, box, confidence in columns:
        yield {"image_id": image, "category_id": category, "bbox": box, "score": confidence}


def write_detections(path: Path, annotations: Annotations, detections: Detections) -> None:
    """Write COCO result format: ids of the annotation file, boxes [x, y, width, height] in original pixels."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write("[")
        for start in range(0, len(detections), WRITTEN_AT_A_TIME):
            rows = result_rows(annotations, detections.take(slice(start, start + WRITTEN_AT_A_TIME)))
            file.write((",\n" if start else "") + json.dumps(list(rows))[1:-1])
        file.write("]")


def read_detections(path: Path, annotations: Annotations) -> Detections:
    """Read what `write_detections` wrote for the same annotations, some rows at a time.

    Raises:
        OSError: the file cannot be read.
        ValueError, KeyError: it is not such a file, or of other annotations.
    """
    image_of = {number: index for index, number in enumerate(annotations.image_ids.tolist())}
    label_of = {number: label for label, number in enumerate(annotations.categories.ids)}
    parts: list[np.ndarray] = [np.zeros((0, 7))]
    with open(path, encoding="utf-8") as file:
        for line in file:
            rows = json.loads(f"[{line.strip().strip('[],')}]")
            parts.append(
                np.array(
                    [
                        (image_of[row["image_id"]], label_of[row["category_id"]], *row["bbox"], row["score"])
                        for row in rows
                    ],
                    dtype=np.float64,
                ).reshape(-1, 7)
            )
    table = np.concatenate(parts)
    boxes = table[:, 2:6].copy()
    boxes[:, 2:] += boxes[:, :2]
    return Detections(table[:, 0].astype(np.int64), boxes, table[:, 6], table[:, 1].astype(np.int64))
