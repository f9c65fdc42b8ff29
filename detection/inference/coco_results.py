"""COCO result file of detect.py: detections under the image ids and category ids of an annotation file."""

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from detection.data.annotation_file import read_without_boxes
from detection.data.annotations import follow_spelling
from detection.data.stored_image import ImageFile
from detection.drawing.files import replacing
from detection.errors import DataError, OutputError, name_list
from detection.inference.results import ImageDetections


class CocoResults:
    """Writer of a COCO result file. A context manager: the file is complete when it exits.

    Args:
        path: file to write, in an existing directory.
        annotations: annotation file with images and categories; its list of annotations may be absent.
        names: class names of the detector in label order.

    Attributes:
        boxes, images: numbers written.
        unlisted: classes whose detections are left out because the file has no such category.

    Raises:
        DataError: the annotation file cannot be read or has none of the classes.
        OutputError: the result file cannot be written.
    """

    def __init__(self, path: Path, annotations: Path, names: Sequence[str]) -> None:
        columns = read_without_boxes(annotations)
        self.path, self.annotations = path, annotations
        self.boxes = self.images = 0
        ids = {name: number for number, name in columns.categories.items()}
        spelled = follow_spelling(names, columns.category_names)
        self._category_ids = [ids.get(name) for name in spelled]
        self.unlisted = [name for name, number in zip(names, self._category_ids, strict=True) if number is None]
        if len(self.unlisted) == len(names):
            raise DataError(f"{annotations}: has none of the detector's classes ({name_list(names[:5])} ...)")
        file_names = [name.replace("\\", "/") for name in columns.file_names]
        self._image_ids = dict(zip(file_names, columns.image_ids.tolist(), strict=True))
        last_parts = [name.rpartition("/")[2] for name in file_names]
        once = Counter(last_parts)
        self._by_last_part = {
            last: number for last, number in zip(last_parts, columns.image_ids.tolist(), strict=True) if once[last] == 1
        }
        self._done: set[int] = set()
        self._files = contextlib.ExitStack()
        try:
            temporary = self._files.enter_context(replacing(path))
            self._file = self._files.enter_context(open(temporary, "w", encoding="utf-8"))  # noqa: SIM115
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror}") from None
        self._file.write("[")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with self._files:
            self._file.write("\n]\n")

    def image_id(self, file: ImageFile | str) -> int | None:
        """Find the image whose `file_name` is the end of a path, else the only one of the same last part."""
        parts = str(file).replace("\\", "/").split("/")
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        known = (self._image_ids[end] for end in ends if end in self._image_ids)
        return next(known, self._by_last_part.get(parts[-1]))

    def add(self, file: ImageFile | str, found: ImageDetections) -> str | None:
        """Write the detections of an image; returns why they were left out, None if they were not."""
        number = self.image_id(file)
        if number is None:
            return f"no image of {self.annotations} has this name (or several have)"
        if number in self._done:
            return f"image id {number} is in the result file already"
        self._done.add(number)
        corners = found.boxes.astype(np.float64)
        boxes = np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2]]).tolist()
        for box, label, score in zip(boxes, found.labels.tolist(), found.scores.tolist(), strict=True):
            if (category := self._category_ids[label]) is not None:
                row = {"image_id": number, "category_id": category, "bbox": box, "score": score}
                self._file.write((",\n" if self.boxes else "\n") + json.dumps(row))
                self.boxes += 1
        self.images += 1
        return None
