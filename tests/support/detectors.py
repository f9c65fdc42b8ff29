"""Datasets and transforms with the geometry of a detector, without building one."""

from typing import Any

import numpy as np

from detection.config.settings import Settings
from detection.contract import Geometry
from detection.data.build import DetectionDataset, build_datasets
from detection.data.resize import Placed, resize_placed
from detection.data.transforms import Transform
from detection.ops.letterbox import Letterbox, Placement, place_image


def geometry_of(settings: Settings) -> Geometry:
    """Geometry of a YOLOv3 with these settings."""
    model = settings.model
    fill = model.fill or (124, 116, 104)
    return Geometry(32, model.placement or "letterbox", model.rounding, model.interpolation, fill)


def transform_of(settings: Settings, size: int, seed: int = 0, training: bool = False) -> Transform:
    return Transform(geometry_of(settings), size, seed, settings.data.augmentation if training else None)


def datasets_of(
    settings: Settings,
    training_size: int,
    validation_size: int,
    seed: int = 0,
    num_classes: int | None = None,
    max_validation_images: int | None = None,
) -> tuple[Any, Any]:
    """Training and validation set, ready for a loader."""
    sets: tuple[DetectionDataset, DetectionDataset] = build_datasets(
        settings.data, seed, num_classes, max_validation_images
    )
    sets[0].sample_transform = transform_of(settings, training_size, seed, training=True)
    sets[1].sample_transform = transform_of(settings, validation_size, seed)
    return sets


def letterbox_image(
    image: np.ndarray,
    size: int,
    placement: Placement,
    fill: tuple[int, int, int],
    interpolation: int,
    rounding: str = "nearest",
) -> tuple[np.ndarray, Letterbox]:
    """The letterboxed image, (size, size, 3), and its letterbox."""
    letterbox, width, height = place_image(image.shape[1], image.shape[0], size, placement, rounding)
    return resize_placed(
        Placed(image, letterbox.left, letterbox.top, width, height), size, fill, interpolation
    ), letterbox
