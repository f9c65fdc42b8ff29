"""Random placement of an image in the network input: which part of it is shown, and where.

`expand` and `iou_crop` choose a view, a rectangle in pixels of the image that may exceed it. The letterbox,
`scale_jitter` or `darknet_jitter` chooses the target, the rectangle of the square that the view fills; `scale_jitter`
may reduce the view to a part. Pixels are not touched here, so an image is resampled only once and no canvas larger than
the network input is needed.
"""

from typing import NamedTuple

import numpy as np
import torch
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes

from detection.config.augmentation import AugmentationSettings, IoUCrop
from detection.contract import CROWD_LABEL, Geometry
from detection.data.resize import Placed
from detection.runtime.reproducibility import sample_stream, torch_stream

# Random streams of an image; unlike 0 and those in color.py, mixing.py and transforms.py.
EXPAND_STREAM, IOU_CROP_STREAM, JITTER_STREAM, SCALE_STREAM = 1, 2, 3, 10


class Rectangle(NamedTuple):
    """Rectangle in whole pixels of the image or of the network input."""

    left: int
    top: int
    width: int
    height: int


def has_placement(augmentation: AugmentationSettings) -> bool:
    """Whether `RandomPlacement` has anything to do."""
    sections = (augmentation.expand, augmentation.iou_crop, augmentation.scale_jitter, augmentation.darknet_jitter)
    return any(section.p > 0 for section in sections)


class RandomPlacement:
    """Places an image and its boxes in the network input by `expand`, `iou_crop` and one of the jitters, in this order.

    Args:
        settings: settings of all transforms.
        geometry: geometry of the detector, which places the view unless one of the last two does.
        seed: seed of the run.
    """

    def __init__(self, settings: AugmentationSettings, geometry: Geometry, seed: int) -> None:
        self.settings, self.geometry, self.seed = settings, geometry, seed
        self.expand = v2.RandomZoomOut(side_range=settings.expand.ratio)
        self.iou_crop = build_iou_crop(settings.iou_crop)

    def __call__(
        self, image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, size: int, epoch: int, index: int
    ) -> tuple[Placed, np.ndarray, np.ndarray]:
        """Return the part of the image with its place in a square of `size`, and the boxes and labels kept.

        Arguments as in `Transform.__call__`.
        """
        view, inside = self.draw_view(image.shape[1], image.shape[0], boxes, labels, epoch, index)
        view, target = self.draw_target(view, size, epoch, index)
        placed, visible, boxes = place_view(image, boxes, view, target, size)
        kept = inside & (visible > 0) & (visible >= self.settings.min_visibility)
        return placed, boxes[kept], labels[kept]

    def draw_view(
        self, width: int, height: int, boxes: np.ndarray, labels: np.ndarray, epoch: int, index: int
    ) -> tuple[Rectangle, np.ndarray]:
        """Draw the view in pixels of the image, and which boxes it keeps, (G,) bool.

        A crowd region is not an object: no crop is chosen for it, and its centre may be outside the crop.
        """
        view, counts = Rectangle(0, 0, width, height), np.ones(len(boxes), bool)
        generator = sample_stream(self.seed, epoch, index, EXPAND_STREAM)
        if generator.random() < self.settings.expand.p:
            with torch_stream(generator):
                view = expanded(view, self.expand)
        inside = boxes.clip(0, np.array([width, height] * 2, np.float32))  # unclipped if the file states no image size
        objects = (labels != CROWD_LABEL) & (inside[:, 2:] > inside[:, :2]).all(axis=1)
        generator = sample_stream(self.seed, epoch, index, IOU_CROP_STREAM)
        if generator.random() < self.settings.iou_crop.p:
            with torch_stream(generator):
                view, counts[objects] = cropped(view, inside[objects], self.iou_crop)
        return view, counts

    def draw_target(self, view: Rectangle, size: int, epoch: int, index: int) -> tuple[Rectangle, Rectangle]:
        """Draw the rectangle of the square that the view fills; returns the view, or what is left of it, and this."""
        scale_jitter, settings = self.settings.scale_jitter, self.settings.darknet_jitter
        if scale_jitter.p:
            generator = sample_stream(self.seed, epoch, index, SCALE_STREAM)
            if generator.random() < scale_jitter.p:
                return rescaled(view, size, generator.uniform(*scale_jitter.scale), self.geometry, generator.random(2))
        generator = sample_stream(self.seed, epoch, index, JITTER_STREAM)
        if generator.random() < settings.p:
            return view, jittered(view.width, view.height, size, settings.jitter, generator)
        letterbox, width, height = self.geometry.place(view.width, view.height, size)
        return view, Rectangle(letterbox.left, letterbox.top, width, height)


def build_iou_crop(settings: IoUCrop) -> v2.RandomIoUCrop:
    """Build torchvision's crop with mmdetection's options: 1 keeps the image, 0 requires no overlap."""
    return v2.RandomIoUCrop(min_scale=settings.min_crop_size, sampler_options=[1.0, *settings.min_ious, 0.0])


def expanded(view: Rectangle, zoom_out: v2.RandomZoomOut) -> Rectangle:
    """Extend the view to a larger canvas at a random position around it."""
    canvas = BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(view.height, view.width))
    left, top, right, bottom = zoom_out.make_params([canvas])["padding"]
    return Rectangle(view.left - left, view.top - top, view.width + left + right, view.height + top + bottom)


def cropped(view: Rectangle, boxes: np.ndarray, iou_crop: v2.RandomIoUCrop) -> tuple[Rectangle, np.ndarray]:
    """Crop the view so that it overlaps an object by a drawn IoU.

    Args:
        view: rectangle in pixels of the image.
        boxes: boxes of objects, xyxy in pixels of the image and inside it, (G, 4) float32.
        iou_crop: draws from torch's global generator.

    Returns:
        The crop, and which boxes have their centre in it, (G,) bool.
    """
    everything = np.ones(len(boxes), bool)
    # torchvision divides by the height of its crop, which rounds to 0 for views of a few pixels.
    if len(boxes) == 0 or min(view.width, view.height) * iou_crop.min_scale < 2:
        return view, everything
    on_canvas = torch.from_numpy(boxes - np.array([view.left, view.top] * 2, np.float32))
    parameters = iou_crop.make_params([BoundingBoxes(on_canvas, format="XYXY", canvas_size=(view.height, view.width))])
    if not parameters:
        return view, everything
    crop = Rectangle(
        view.left + parameters["left"], view.top + parameters["top"], parameters["width"], parameters["height"]
    )
    return crop, parameters["is_within_crop_area"].numpy()


def rescaled(
    view: Rectangle, size: int, scale: float, geometry: Geometry, place: np.ndarray
) -> tuple[Rectangle, Rectangle]:
    """Fit the view into a square of `scale` times the side; what is larger than the square itself is cropped.

    Args:
        view: in pixels of the image.
        size: side of the square in pixels.
        scale: see above.
        geometry: whether a view smaller than the square lies in its middle or at the top left.
        place: x, y: share of what is cropped that lies before the crop, 0 to below 1.

    Returns:
        The part of the view that is seen, in whole pixels of the image, and the rectangle of the square that it fills.

    Source: `dataloader.py` of https://github.com/google/automl, folder efficientdet. Differs: the
        crop has whole pixels of the image, there of the enlarged one; boxes follow the pixels as they are.
    """
    _, *sides = geometry.place(view.width, view.height, max(round(scale * size), 1))
    spans = []
    for first, length, side, share in zip(view[:2], view[2:], sides, place, strict=True):
        if side <= size:
            free = 0 if geometry.placement == "top_left" else (size - side) // 2
            spans.append((first, length, free, side))
        else:
            shown = max(round(length * size / side), 1)
            spans.append((first + int(share * (length - shown + 1)), shown, 0, size))
    (left, width, x, new_width), (top, height, y, new_height) = spans
    return Rectangle(left, top, width, height), Rectangle(x, y, new_width, new_height)


def jittered(width: int, height: int, size: int, jitter: float, generator: np.random.Generator) -> Rectangle:
    """Draw a target with a random change of aspect ratio; it touches two opposite sides of the square.

    aspect = (width + U(-1, 1) * jitter * width) / (height + U(-1, 1) * jitter * height)

    Source: load_data_detection in src/data.c of https://github.com/pjreddie/darknet (scale = 1). Differs: Darknet does
    not round the boxes to the whole pixels of the image.
    """
    aspect = (width + generator.uniform(-jitter * width, jitter * width)) / (
        height + generator.uniform(-jitter * height, jitter * height)
    )
    new_width, new_height = (size * aspect, size) if aspect < 1 else (size, size / aspect)
    left = int(generator.uniform(0, size - new_width))
    top = int(generator.uniform(0, size - new_height))
    return Rectangle(left, top, max(int(new_width), 1), max(int(new_height), 1))


def place_view(
    image: np.ndarray,
    boxes: np.ndarray,
    view: Rectangle,
    target: Rectangle,
    size: int,
) -> tuple[Placed, np.ndarray, np.ndarray]:
    """Map the view of an image onto the target rectangle of the square.

    Args:
        image: (H, W, 3) uint8.
        boxes: xyxy in pixels of the image, (G, 4) float32.
        view: rectangle in pixels of the image; must overlap it.
        target: rectangle in pixels of the square; inside it.

    Returns:
        The visible part of the image with its place; the visible fraction of each box's area, (G,) float64; and the
        visible part of each box in pixels of the square, (G, 4) float32, undefined if the fraction is 0.
    """
    x1, x2, left, right = _span(view.left, view.width, target.left, target.width, image.shape[1], size)
    y1, y2, top, bottom = _span(view.top, view.height, target.top, target.height, image.shape[0], size)
    shown = boxes.astype(np.float64).clip((x1, y1, x1, y1), (x2, y2, x2, y2))
    area, shown_area = ((sides[:, 2:] - sides[:, :2]).prod(axis=1) for sides in (boxes.astype(np.float64), shown))
    scale = np.array([(right - left) / (x2 - x1), (bottom - top) / (y2 - y1)] * 2)
    placed = (shown - (x1, y1, x1, y1)) * scale + (left, top, left, top)
    part = Placed(image[y1:y2, x1:x2], left, top, right - left, bottom - top)
    return part, shown_area / area, placed.astype(np.float32)


def _span(
    view: int, view_length: int, target: int, target_length: int, length: int, size: int
) -> tuple[int, int, int, int]:
    """Return, along one axis, the visible range (first, end) of the image's pixels and its place in the square."""
    first, end = max(view, 0), min(view + view_length, length)
    scale = target_length / view_length
    start = min(round(target + (first - view) * scale), size - 1)
    stop = min(max(round(target + (end - view) * scale), start + 1), size)
    return first, end, start, stop
