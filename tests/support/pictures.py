"""Pictures and their orientation; probabilities and given random numbers for the tests of augmentation."""

import cv2
import numpy as np
from PIL import Image

from detection.config.augmentation import AugmentationSettings

# those of other systems; the others are albumentations
NAMED = (
    "expand", "iou_crop", "darknet_jitter", "darknet_hsv", "photometric_distortion",
    "mosaic", "mixup", "hsv", "random_interpolation",
)  # fmt: skip
NO_BOXES = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)


def probabilities(**chosen: float) -> list[str]:
    """Words that give the named augmentations their probability and all others 0."""
    names = sorted(AugmentationSettings.model_fields.keys() - {"min_visibility"})
    return [f"data.augmentation.{name}.p={chosen.get(name, 0)}" for name in names]


def picture(width: int = 64, height: int = 64, seed: int = 0) -> np.ndarray:
    """Smooth and colourful, with contrast everywhere."""
    coarse = np.random.default_rng(seed).integers(30, 226, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def oriented(orientation: int) -> Image.Exif:
    """EXIF data that says how a picture is to be turned, 1..8."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def bright_extent(image: np.ndarray) -> np.ndarray | None:
    """Bounding box of the bright pixels."""
    rows, columns = np.nonzero(image.max(axis=2) > 127)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) if len(rows) else None


class Scripted:
    """A generator whose numbers are given; `asked` holds the bounds of each uniform draw."""

    def __init__(self, *values: float) -> None:
        self.values, self.asked = list(values), []

    def random(self) -> float:
        return self.values.pop(0)

    def uniform(self, low: float, high: float) -> float:
        self.asked.append((low, high))
        return self.values.pop(0)
