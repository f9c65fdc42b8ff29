"""Statistics of a dataset: classes, sizes, shapes and positions of its boxes, boxes per image."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from detection.data.annotations import Annotations

# Square pixels. Source: areaRng in PythonAPI/pycocotools/cocoeval.py, github.com/cocodataset/cocoapi
SIZE_LIMITS = (32**2, 96**2)
SIZE_NAMES = ("small", "medium", "large")
PERCENTILES = (5, 25, 50, 75, 95)
CENTRE_CELLS = 10  # rows and columns of the table of centres in `summary`


@dataclass(frozen=True)
class DatasetStatistics:
    """Statistics of M images, C classes and N boxes (no crowd regions), K of them in images of known size."""

    class_names: tuple[str, ...]
    boxes_per_class: np.ndarray  # (C,) int64
    images_per_class: np.ndarray  # (C,) int64: images with at least one box of the class
    crowd_per_class: np.ndarray  # (C,) int64 crowd regions
    boxes_per_image: np.ndarray  # (M,) int64
    crowd_per_image: np.ndarray  # (M,) int64
    sizes: np.ndarray  # (N, 2) float64 width, height in original pixels
    areas: np.ndarray  # (N,) float64: the file's `area`, as the metric counts it
    relative_areas: np.ndarray  # (K,) float64: width x height as a share of the image
    centres: np.ndarray  # (K, 2) float64: x, y as shares of the image, 0 is left or top
    image_sizes: np.ndarray  # (images with a stated size, 2) int32 width, height

    @property
    def size_counts(self) -> np.ndarray:
        """Number of small, medium and large boxes as in COCO, (3,); an area on a limit counts as the larger size."""
        return np.bincount(np.searchsorted(SIZE_LIMITS, self.areas, side="right"), minlength=3)

    def summary(self) -> dict[str, Any]:
        """Return all statistics as plain numbers for JSON; None for percentiles of no values."""
        widths, heights = self.sizes.T
        rows = zip(
            self.class_names,
            self.boxes_per_class.tolist(),
            self.images_per_class.tolist(),
            self.crowd_per_class.tolist(),
            strict=True,
        )
        per_image, images_with = np.unique(self.boxes_per_image, return_counts=True)
        cells = (self.centres * CENTRE_CELLS).astype(np.int64).clip(0, CENTRE_CELLS - 1)
        centres = np.zeros((CENTRE_CELLS, CENTRE_CELLS), np.int64)
        np.add.at(centres, (cells[:, 1], cells[:, 0]), 1)
        return {
            "images": len(self.boxes_per_image),
            "boxes": len(self.areas),
            "crowd_regions": int(self.crowd_per_class.sum()),
            "images_without_boxes": int(((self.boxes_per_image == 0) & (self.crowd_per_image == 0)).sum()),
            "images_with_crowd_regions": int((self.crowd_per_image > 0).sum()),
            "images_with_crowd_regions_only": int(((self.boxes_per_image == 0) & (self.crowd_per_image > 0)).sum()),
            "images_without_stated_size": len(self.boxes_per_image) - len(self.image_sizes),
            "classes": {
                name: {"boxes": boxes, "images": images, "crowd_regions": crowd} for name, boxes, images, crowd in rows
            },
            "sizes": dict(zip(SIZE_NAMES, self.size_counts.tolist(), strict=True)),
            "percentiles": {
                "width": percentiles(widths),
                "height": percentiles(heights),
                "aspect": percentiles(widths / heights),
                "relative_area": percentiles(self.relative_areas),
                "boxes_per_image": percentiles(self.boxes_per_image),
                "image_width": percentiles(self.image_sizes[:, 0]),
                "image_height": percentiles(self.image_sizes[:, 1]),
            },
            "boxes_per_image": {
                str(boxes): images for boxes, images in zip(per_image.tolist(), images_with.tolist(), strict=True)
            },
            "centres": centres.tolist(),  # boxes per tenth of the image, rows from top to bottom
        }


def measure_dataset(annotations: Annotations) -> DatasetStatistics:
    """Compute the statistics of the unclipped boxes; crowd regions are counted separately."""
    num_classes = len(annotations.categories.names)
    image_of_box = np.repeat(np.arange(len(annotations)), np.diff(annotations.first_box))
    real = ~annotations.crowd
    labels, images, boxes = annotations.labels[real], image_of_box[real], annotations.coco_boxes[real]
    pairs = np.unique(labels * len(annotations) + images)  # each class once per image
    limits = annotations.image_sizes[images].astype(np.float64)
    known = (limits > 0).all(axis=1)
    placed, limits = boxes[known], limits[known]
    return DatasetStatistics(
        class_names=annotations.categories.names,
        boxes_per_class=np.bincount(labels, minlength=num_classes),
        images_per_class=np.bincount(pairs // len(annotations), minlength=num_classes),
        crowd_per_class=np.bincount(annotations.labels[~real], minlength=num_classes),
        boxes_per_image=np.bincount(images, minlength=len(annotations)),
        crowd_per_image=np.bincount(image_of_box[~real], minlength=len(annotations)),
        sizes=boxes[:, 2:],
        areas=annotations.areas[real],
        relative_areas=placed[:, 2:].prod(axis=1) / limits.prod(axis=1),
        centres=((placed[:, :2] + placed[:, 2:] / 2) / limits).clip(0, 1),
        image_sizes=annotations.image_sizes[(annotations.image_sizes > 0).all(axis=1)],
    )


def percentiles(values: np.ndarray) -> dict[str, float] | None:
    """Return the 5th, 25th, 50th, 75th and 95th percentile; None if there are no values."""
    if not len(values):
        return None
    numbers = np.percentile(values, PERCENTILES).tolist()
    return {str(percent): round(number, 6) for percent, number in zip(PERCENTILES, numbers, strict=True)}
