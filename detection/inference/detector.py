"""`load_detector`: trained weights as a function of images, for use from Python. See docs/python.md."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from PIL import Image

from detection.config.command_line import DEFAULTS
from detection.config.loading import Flag
from detection.data.image_file import read_image
from detection.drawing.boxes import draw_boxes, save_jpeg, save_png
from detection.errors import DataError, OutputError, SettingsError
from detection.inference.finder import BATCH_SIZE, Finder
from detection.inference.results import ImageDetections
from detection.inference.sources import batches
from detection.inference.views import build_viewer
from detection.inference.weights import OpenedDetector, open_weights
from detection.runtime.devices import open_machine

Picture = str | Path | np.ndarray | Image.Image
GREY = (128, 128, 128)  # behind transparent pixels, as `read_image` has it
LOWEST_CONFIDENCE = 0.001  # of the standard protocol: what scores less is dropped before NMS
DEEP_MODES = ("I", "F")  # Pillow's modes of more than 8 bits per channel


class Detection(NamedTuple):
    """One object."""

    box: tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels of the image
    score: float  # 0..1
    label: int  # 0..C-1
    name: str  # of the class


@dataclass(frozen=True)
class Detections:
    """The objects found in one image, best score first. Has a length and iterates over `Detection`.

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

    def __getitem__(self, index: int) -> Detection:
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

    def save(self, path: str | Path) -> Path:
        """Write the image with its boxes; the suffix .png, .jpg or .jpeg chooses the format.

        Raises:
            SettingsError: another suffix.
            OutputError: the file cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
            raise SettingsError(f"{path}: pictures are written as .png, .jpg or .jpeg")
        try:
            (save_png if path.suffix.lower() == ".png" else save_jpeg)(path, self._drawn())
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror or error}") from None
        return path

    def to_coco(self, image_id: int, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Format the objects as rows of a COCO result file: boxes [x, y, width, height] in pixels.

        Args:
            image_id: id of the image in the annotation file.
            category_ids: id of each label; None: those the detector was trained with, else the labels themselves
                (Darknet files have no ids).

        Raises:
            SettingsError: not one id per class.
        """
        ids = category_ids or self.category_ids or range(len(self.class_names))
        if len(ids) != len(self.class_names):
            raise SettingsError(f"category_ids: {len(ids)} ids for {len(self.class_names)} classes")
        return [
            {"image_id": image_id, "category_id": int(ids[label]), "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
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
    def __call__(self, images: Picture) -> Detections: ...

    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...]) -> list[Detections]: ...

    def __call__(self, images: Picture | list[Any] | tuple[Any, ...]) -> Detections | list[Detections]:
        """Detect objects in one image or, in batches, in a list of them.

        Args:
            images: path of an image file (its EXIF orientation is applied), RGB uint8 array (H, W, 3), PIL image
                (taken as it is, not turned by EXIF), or a list or tuple of these.

        Returns:
            The detections of the image; for a list one result per image, in its order.

        Raises:
            DataReadError: a file is missing, damaged or no image.
            DataError: an array of another shape or type, or no image at all.
        """
        if not isinstance(images, list | tuple):
            return self([images])[0]
        found: list[Detections] = []
        pixels = (as_pixels(image) for image in images)
        for batch in batches(pixels, self.finder.batch_size, lambda image: image.shape[0] * image.shape[1]):
            results = self.finder.find([self.finder.prepare(image) for image in batch])
            found += [self._result(*pair) for pair in zip(batch, results, strict=True)]
        return found

    def _result(self, image: np.ndarray, found: ImageDetections) -> Detections:
        return Detections(image, found.boxes, found.scores, found.labels, self.names, self.category_ids)


def as_pixels(image: Any) -> np.ndarray:
    """Return an image as RGB uint8 (H, W, 3); arguments and errors: see `ImageDetector.__call__`."""
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        if image.mode.split(";")[0] in DEEP_MODES:
            raise DataError(f"a PIL image of mode {image.mode}: give 8 bits per channel, or the path of its file")
        if "A" in image.getbands() or "transparency" in image.info:
            layer = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", layer.size, (*GREY, 255)), layer)
        return np.asarray(image.convert("RGB"))
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size:
            return np.ascontiguousarray(image)
        hint = "; several images go into a list" if image.ndim == 4 else ""
        raise DataError(f"an array must be RGB uint8 (H, W, 3), this is {image.dtype} {image.shape}{hint}")
    raise DataError(f"an image is a path, an RGB uint8 array (H, W, 3) or a PIL image, not {type(image).__name__}")


def load_detector(
    weights: str | Path,
    cfg: str | Path | None = None,
    names: str | Path | Sequence[str] | None = None,
    *,
    device: str | None = None,
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
        SettingsError: an argument is impossible, or contradicts the file.
    """
    given = {
        "run.device": ("device", device),
        "evaluation.visualization_threshold": ("confidence_threshold", confidence_threshold),
        "evaluation.iou_threshold": ("iou_threshold", iou_threshold),
        "evaluation.max_detections": ("max_detections", max_detections),
        "evaluation.batch_size": ("batch_size", batch_size),
    }
    if confidence_threshold is not None and confidence_threshold < LOWEST_CONFIDENCE:
        given["evaluation.confidence_threshold"] = ("confidence_threshold", confidence_threshold)
    flags = [Flag(name, path, value) for path, (name, value) in given.items() if value is not None]
    named = Path(names) if isinstance(names, str | Path) else None if names is None else tuple(names)
    return ImageDetector(open_weights(Path(weights), None if cfg is None else Path(cfg), named, DEFAULTS, flags=flags))
