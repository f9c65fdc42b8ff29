"""`load_detector`: trained weights as a function of images, for use from Python. See docs/python.md."""

import dataclasses
import numbers
import operator
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast, overload

import numpy as np
import torch
from PIL import Image

from detection.config.command_line import DEFAULTS
from detection.config.loading import Flag
from detection.drawing.boxes import draw_boxes, save_jpeg, save_png
from detection.errors import OutputError, SettingsError
from detection.inference.finder import BATCH_SIZE, Finder
from detection.inference.pictures import Picture, as_pixels, is_single, numbered_pixels
from detection.inference.results import ImageDetections
from detection.inference.sources import batches
from detection.inference.views import build_viewer
from detection.inference.weights import OpenedDetector, open_weights
from detection.runtime.devices import open_machine

LOWEST_CONFIDENCE = 0.001  # of the standard protocol: what scores less is dropped before NMS


class Detection(NamedTuple):
    """One object."""

    box: tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels of the image
    score: float  # 0..1
    label: int  # 0..C-1
    name: str  # of the class


@dataclass(frozen=True)
class Detections:
    """The objects found in one image, best score first.

    Has a length, iterates over `Detection`; an index gives one of them, a slice some of them as `Detections`.

    Attributes:
        image: the image as it was looked at, RGB uint8 (H, W, 3).
        boxes: x1, y1, x2, y2 in pixels of the image, (K, 4) float32.
        scores: 0..1, (K,) float32.
        labels: index into `class_names`, (K,) int64.
        class_names: names of all classes of the detector.
        category_ids: id of each label in the annotations it was trained on; None: unknown.
    """

    image: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...] | None = None

    @property
    def names(self) -> list[str]:
        """Class name of each object, K texts."""
        return [self.class_names[label] for label in self.labels.tolist()]

    def __len__(self) -> int:
        return len(self.scores)

    @overload
    def __getitem__(self, index: int) -> Detection: ...

    @overload
    def __getitem__(self, index: slice) -> "Detections": ...

    def __getitem__(self, index: int | slice) -> "Detection | Detections":
        if isinstance(index, slice):
            return dataclasses.replace(
                self, boxes=self.boxes[index], scores=self.scores[index], labels=self.labels[index]
            )
        index = operator.index(index)
        label = int(self.labels[index])
        x1, y1, x2, y2 = self.boxes[index].tolist()
        return Detection((x1, y1, x2, y2), float(self.scores[index]), label, self.class_names[label])

    def __iter__(self) -> Iterator[Detection]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        return f"<{len(self)} detections in an image of {width} x {height} pixels>"

    def draw(self) -> Image.Image:
        """Draw the boxes on a copy of the image, wider by a legend where small objects crowd.

        `numpy.asarray` of the result is RGB uint8 (H, W, 3).
        """
        return Image.fromarray(self._drawn())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the image with its boxes; the suffix .png, .jpg or .jpeg chooses the format.

        Raises:
            SettingsError: another suffix, or no path.
            OutputError: the file cannot be written.
        """
        path = as_path("path", path)
        if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
            raise SettingsError(f"{path}: pictures are written as .png, .jpg or .jpeg")
        try:
            (save_png if path.suffix.lower() == ".png" else save_jpeg)(path, self._drawn())
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror or error}") from None
        return path

    def to_coco(self, image_id: int, category_ids: Sequence[int] | np.ndarray | None = None) -> list[dict[str, Any]]:
        """Format the objects as rows of a COCO result file: boxes [x, y, width, height] in pixels.

        Args:
            image_id: id of the image in the annotation file.
            category_ids: id of each label; None: those the detector was trained with, else the labels themselves
                (Darknet files have no ids).

        Raises:
            SettingsError: an id is no whole number, or not one per class.
        """
        ids = self.category_ids if category_ids is None else category_ids
        ids = range(len(self.class_names)) if ids is None else ids
        if not isinstance(ids, Sequence | np.ndarray):
            raise SettingsError(f"category_ids: must be a list of numbers, one per class, not {type(ids).__name__}")
        if len(ids) != len(self.class_names):
            raise SettingsError(f"category_ids: {len(ids)} ids for {len(self.class_names)} classes")
        image_number = as_number("image_id", image_id, whole=True)
        numbers_of = [as_number("category_ids", number, whole=True) for number in ids]
        return [
            {
                "image_id": image_number,
                "category_id": numbers_of[label],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": score,
            }
            for (x1, y1, x2, y2), score, label, _ in self
        ]

    def _drawn(self) -> np.ndarray:
        return draw_boxes(self.image, self.boxes, self.labels, self.class_names, self.scores, legend=True)


class ImageDetector:
    """A trained detector that is called with images; made by `load_detector`.

    Attributes:
        names: class of each label.
        settings: resolved settings: those of the weights, with the arguments of `load_detector`.
        finder: what runs the network.
    """

    def __init__(self, opened: OpenedDetector) -> None:
        self.settings, self.category_ids = opened.settings, opened.category_ids
        batch_size = opened.settings.evaluation.batch_size or BATCH_SIZE
        self.finder = Finder(opened, build_viewer(opened, open_machine(opened.settings.run), batch_size), [])
        self.names = opened.class_names()

    @overload
    def __call__(self, images: Picture) -> Detections: ...  # type: ignore[overload-overlap]

    @overload
    def __call__(self, images: Iterable[Any]) -> list[Detections]: ...

    def __call__(self, images: Picture | Iterable[Any]) -> Detections | list[Detections]:
        """Detect objects in one image or, in batches, in several.

        Args:
            images: path or address (http, https) of a picture, whose EXIF orientation is applied; array uint8, RGB
                (H, W, 3) or grey (H, W); PIL image (taken as it is, not turned by EXIF); or a list, generator or other
                iterable of these, which is read as it is needed.

        Returns:
            The detections of the image; for an iterable one result per image, in its order.

        Raises:
            DataReadError: a file or an answer is missing, damaged or no image.
            DataError: an array of another shape or type, or no image at all.
        """
        if is_single(images):
            return self._find([as_pixels(images)])[0]
        return self._find(numbered_pixels(cast(Iterable[Any], images)))

    def _find(self, pixels: Iterable[np.ndarray]) -> list[Detections]:
        found: list[Detections] = []
        for batch in batches(pixels, self.finder.batch_size, lambda image: image.shape[0] * image.shape[1]):
            results = self.finder.find([self.finder.prepare(image) for image in batch])
            found += [self._result(*pair) for pair in zip(batch, results, strict=True)]
        return found

    def _result(self, image: np.ndarray, found: ImageDetections) -> Detections:
        return Detections(image, found.boxes, found.scores, found.labels, self.names, self.category_ids)


def as_path(name: str, value: Any) -> Path:
    """Return an argument that must be a path; SettingsError if it is none."""
    if isinstance(value, str | os.PathLike) and isinstance(path := os.fspath(value), str):
        return Path(path)
    raise SettingsError(f"{name}: must be a path, not {type(value).__name__}")


def as_number(name: str, value: Any, whole: bool = False) -> int | float:
    """Return an argument that must be a number as Python's own type (NumPy has others); SettingsError if it is none."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, bool) and not whole:
        return float(value)
    raise SettingsError(f"{name}: must be a {'whole ' * whole}number, not {value!r}")


def load_detector(
    weights: str | os.PathLike[str],
    cfg: str | os.PathLike[str] | None = None,
    names: str | os.PathLike[str] | Sequence[str] | None = None,
    *,
    device: str | torch.device | None = None,
    confidence_threshold: float | None = None,
    iou_threshold: float | None = None,
    max_detections: int | None = None,
    batch_size: int | None = None,
) -> ImageDetector:
    """Open trained weights as a detector of images; the results are those of detect.py.

    Args:
        weights: checkpoint .pt, run directory (its best.pt), .onnx written by export.py, or Darknet .weights.
        cfg: Darknet .cfg of .weights; None: YOLOv3 as configured.
        names: file with the class names of Darknet .weights, one per line, or the names themselves.
        device: auto (None), cpu, cuda, cuda:N, mps or hpu.
        confidence_threshold: minimum score, 0..1; None: `evaluation.visualization_threshold` of the weights (0.5
            unless changed).
        iou_threshold: of NMS, 0..1; None: that of the weights.
        max_detections: boxes per class and image; None: as the weights have it.
        batch_size: images per run of the network; None: 8.

    Raises:
        CheckpointError: the weights are missing, damaged, foreign or do not fit.
        SettingsError: an argument is impossible or of another type, or contradicts the file.
    """
    given: dict[str, tuple[str, Any]] = {
        "evaluation.visualization_threshold": ("confidence_threshold", confidence_threshold),
        "evaluation.iou_threshold": ("iou_threshold", iou_threshold),
        "evaluation.max_detections": ("max_detections", max_detections),
        "evaluation.batch_size": ("batch_size", batch_size),
    }
    flags = [Flag(name, path, as_number(name, value)) for path, (name, value) in given.items() if value is not None]
    if confidence_threshold is not None and confidence_threshold < LOWEST_CONFIDENCE:
        flags.append(Flag("confidence_threshold", "evaluation.confidence_threshold", flags[0].value))
    if device is not None:
        flags.append(Flag("device", "run.device", str(device) if isinstance(device, torch.device) else device))
    named = names if names is None or not isinstance(names, str | os.PathLike) else as_path("names", names)
    if named is not None and not isinstance(named, Path):
        if not isinstance(named, Sequence | np.ndarray) or not all(isinstance(name, str) for name in named):
            raise SettingsError("names: must be a file with one class name per line, or a list of the names")
        named = tuple(named)
    cfg_path = None if cfg is None else as_path("cfg", cfg)
    return ImageDetector(open_weights(as_path("weights", weights), cfg_path, named, DEFAULTS, flags=flags))
