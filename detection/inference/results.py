"""Result files of `detect.py`: pictures with boxes, crops, detections.json and YOLO txt."""

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from tqdm import tqdm

from detection.data.image_file import UniqueNames
from detection.drawing.boxes import draw_boxes, save_jpeg, save_png
from detection.drawing.files import replace_file, replacing, safe_name
from detection.errors import escape
from detection.inference.sources import Source
from detection.inference.video import Frame

SAVERS = {"png": save_png, "jpg": save_jpeg}


@dataclass(frozen=True)
class ImageDetections:
    """Detections of one image by descending score: boxes xyxy in pixels of the image (K, 4), labels and scores (K,)."""

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray

    def at_least(self, score: float) -> "ImageDetections":
        """Select those with at least a score."""
        rows = self.scores >= score
        return ImageDetections(self.boxes[rows], self.labels[rows], self.scores[rows])


class Results:
    """Writer of the result files. A context manager: detections.json is complete when it exits.

    Every method raises OSError if its file cannot be written.

    Args:
        directory: existing directory for the files.
        names: class names.
        picture_format: "png" or "jpg"; None: no pictures.
        crop_format: "png" or "jpg": also cut out every detection, in a folder per class; None: no crops.
        txt: "boxes": also write YOLO txt; "scores": with the score on each line; None: no txt.

    Attributes:
        images, frames: number of images and video frames processed.
        boxes: number of detections in them.
        left_out: number of damaged inputs that were skipped.
        pictures: paths of the pictures of images.
    """

    def __init__(
        self,
        directory: Path,
        names: Sequence[str],
        picture_format: str | None,
        txt: str | None,
        crop_format: str | None = None,
    ) -> None:
        self.directory, self.names = directory, names
        self.picture_format, self.txt, self.crop_format = picture_format, txt, crop_format
        folders = UniqueNames()
        self._crop_folders = [folders.take(safe_name(name)) for name in names]
        self.images = self.frames = self.boxes = self.left_out = 0
        self.pictures: list[Path] = []
        if self.txt:
            replace_file(directory / "classes.txt", "".join(f"{name}\n" for name in names).encode())
        # Written row by row, because the detections of hours of video may not fit in memory.
        self._files = contextlib.ExitStack()
        temporary = self._files.enter_context(replacing(directory / "detections.json"))
        self._json = self._files.enter_context(open(temporary, "w", encoding="utf-8"))  # noqa: SIM115
        self._json.write("[")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with self._files:  # whatever happened: what was found so far is whole
            self._json.write("\n]\n")

    def draw(self, image: np.ndarray, found: ImageDetections, legend: bool = False) -> np.ndarray:
        """Draw the detections on a copy of an RGB uint8 image (H, W, 3); `legend`: see `draw_boxes`."""
        return draw_boxes(image, found.boxes, found.labels, self.names, found.scores, legend=legend)

    def picture_path(self, source: Source) -> Path:
        """Path of the picture of an image."""
        return self.directory / f"{source.name}.{self.picture_format}"

    def save_picture(self, source: Source, image: np.ndarray, found: ImageDetections) -> None:
        """Draw and write the picture of an image; safe in threads."""
        SAVERS[str(self.picture_format)](self.picture_path(source), self.draw(image, found, legend=True))

    def add(self, source: Source, image: np.ndarray, found: ImageDetections, frame: Frame | None = None) -> None:
        """Write the row of detections.json, YOLO txt file and crops of an image or, with `frame`, of a video frame."""
        height, width = image.shape[:2]
        name = source.name
        row: dict[str, Any] = {"file": source.label}
        if frame is None:
            self.images += 1
            if self.picture_format:
                self.pictures.append(self.picture_path(source))
                row["picture"] = self.pictures[-1].relative_to(self.directory).as_posix()
        else:
            self.frames += 1
            row |= {"frame": frame.number, "seconds": round(frame.seconds, 6)}
            name += f"/frame_{frame.number:06d}"
        detections = describe(found, self.names)
        row |= {"width": width, "height": height, "detections": detections}
        self._json.write(("," if self.images + self.frames > 1 else "") + "\n" + json.dumps(row))
        self.boxes += len(detections)
        if self.txt:
            lines = yolo_lines(found, width, height, self.txt == "scores")
            replace_file(self.directory / "labels" / f"{name}.txt", "".join(lines).encode())
        if self.crop_format:
            self._write_crops(name, image, found)

    def _write_crops(self, name: str, image: np.ndarray, found: ImageDetections) -> None:
        """Write the part of the image in each box, whole pixels that the box touches, numbered by falling score."""
        height, width = image.shape[:2]
        outer = np.hstack([np.floor(found.boxes[:, :2]), np.ceil(found.boxes[:, 2:])])
        corners = outer.clip(0, [width, height, width, height]).astype(int).tolist()
        for number, ((x1, y1, x2, y2), label) in enumerate(zip(corners, found.labels.tolist(), strict=True)):
            if x1 < x2 and y1 < y2:
                path = self.directory / "crops" / self._crop_folders[label] / f"{name}_{number}.{self.crop_format}"
                SAVERS[str(self.crop_format)](path, np.ascontiguousarray(image[y1:y2, x1:x2]))

    def leave_out(self, reason: str) -> None:
        """Count an input that cannot be read, and print why."""
        self.left_out += 1
        tqdm.write(escape(f"left out: {reason}"), file=sys.stderr)

    def summary(self, threshold: float, seconds: float) -> str:
        """Format what was found and how fast, as the last line of detect.py."""
        counts = [(self.images, "images"), (self.frames, "video frames")]
        inputs = " and ".join(f"{count} {what}" for count, what in counts if count) or "0 images"
        return (
            f"{self.boxes} boxes with a score of at least {threshold:g} on {inputs}, {self.left_out} left out, "
            f"{(self.images + self.frames) / seconds:.1f} images/s all in all: {self.directory}"
        )


def describe(found: ImageDetections, names: Sequence[str]) -> list[dict[str, Any]]:
    """Format detections for detections.json."""
    columns = zip(found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
    return [
        {"class": names[label], "label": label, "score": round(score, 6), "box": [round(value, 3) for value in box]}
        for label, score, box in columns
    ]


def yolo_lines(found: ImageDetections, width: int, height: int, with_scores: bool) -> list[str]:
    """Format detections as YOLO txt: label, centre x, centre y, width, height relative to the image, optional score."""
    corners = found.boxes.astype(np.float64) / [width, height, width, height]
    centres, sides = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
    numbers = np.hstack([centres, sides, *([found.scores[:, None]] if with_scores else [])])
    return [
        f"{label} {' '.join(f'{value:.6f}' for value in row)}\n"
        for label, row in zip(found.labels.tolist(), numbers.tolist(), strict=True)
    ]
