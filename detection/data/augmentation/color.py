"""Colour distortions of other systems: HSV as in Darknet and YOLOX, photometric as in SSD and mmdetection."""

import cv2
import numpy as np
import torch
from torchvision.transforms import v2

from detection.config.augmentation import AugmentationSettings
from detection.runtime.reproducibility import sample_stream, torch_stream

# Random streams of an image; unlike 0 and those in crop_and_scale.py.
HSV_STREAM, PHOTOMETRIC_STREAM, SHIFT_STREAM = 4, 5, 8
# OpenCV's 8-bit "FULL" conversions disagree: the hue circle has 256 levels to HSV, but 255 from HSV.
HUE_LEVELS_TO_HSV, HUE_LEVELS_FROM_HSV = 256, 255
HUES = 180  # of OpenCV's 8-bit HSV


def has_color(augmentation: AugmentationSettings) -> bool:
    """Whether `ColorDistortion` has anything to do."""
    return max(augmentation.darknet_hsv.p, augmentation.photometric_distortion.p, augmentation.hsv.p) > 0


class ColorDistortion:
    """Applies `darknet_hsv`, `photometric_distortion` and `hsv`, in this order, to (S, S, 3) uint8 RGB.

    Args:
        augmentation: settings of all three.
        seed: seed of the run.
    """

    def __init__(self, augmentation: AugmentationSettings, seed: int) -> None:
        self.seed = seed
        self.hsv, self.photometric = augmentation.darknet_hsv, augmentation.photometric_distortion
        self.shift = augmentation.hsv
        self.distort = v2.RandomPhotometricDistort(**self.photometric.model_dump(exclude={"p"}))

    def __call__(self, image: np.ndarray, epoch: int, index: int) -> np.ndarray:
        generator = sample_stream(self.seed, epoch, index, HSV_STREAM)
        if generator.random() < self.hsv.p:
            hue = generator.uniform(-self.hsv.hue, self.hsv.hue)
            saturation = draw_scale(self.hsv.saturation, generator)
            image = distort_hsv(image, hue, saturation, draw_scale(self.hsv.exposure, generator))
        generator = sample_stream(self.seed, epoch, index, PHOTOMETRIC_STREAM)
        if generator.random() < self.photometric.p:
            with torch_stream(generator):
                planes = self.distort(torch.from_numpy(image).permute(2, 0, 1))  # (3, S, S)
            image = np.ascontiguousarray(planes.permute(1, 2, 0).numpy())
        if self.shift.p > 0:
            generator = sample_stream(self.seed, epoch, index, SHIFT_STREAM)
            if generator.random() < self.shift.p:
                gains = self.shift.hue, self.shift.saturation, self.shift.value
                shifts = generator.uniform(-1, 1, 3) * gains * generator.integers(0, 2, 3)
                image = shift_hsv(image, *shifts.astype(int).tolist())
        return image


def draw_scale(largest: float, generator: np.random.Generator) -> float:
    """Draw a factor from 1 to `largest`, or with probability 1/2 its inverse."""
    scale = generator.uniform(1, largest)
    return scale if generator.random() < 0.5 else 1 / scale


def distort_hsv(image: np.ndarray, hue: float, saturation: float, exposure: float) -> np.ndarray:
    """Shift the hue by a fraction of the circle and multiply saturation and value; (H, W, 3) uint8 RGB.

    Hue and saturation are rounded to 8 bits, the hue to 1/256 of the circle. The value scales the colour, so it is
    multiplied in RGB, exactly and clipped at 255 as in Darknet. Differs: saturation is clipped at 1 before the
    conversion back to RGB; Darknet clips the colour after it.

    Source: distort_image in src/image.c of https://github.com/pjreddie/darknet
    """
    levels = np.arange(256)
    hues = np.rint((levels / HUE_LEVELS_TO_HSV + hue) % 1 * HUE_LEVELS_FROM_HSV)
    saturations = np.rint(levels * saturation).clip(0, 255)
    table = np.stack([hues, saturations, levels], axis=1).astype(np.uint8)[None]  # (1, 256, 3)
    hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL), table)
    return cv2.convertScaleAbs(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL), alpha=exposure)


def shift_hsv(image: np.ndarray, hue: int, saturation: int, value: int) -> np.ndarray:
    """Add to hue (units of 2 degrees, around the circle), saturation and value (0..255, clipped); (H, W, 3) uint8 RGB.

    Source: augment_hsv in yolox/data/data_augment.py of https://github.com/Megvii-BaseDetection/YOLOX (Apache-2.0)
    """
    levels = np.arange(256)
    parts = (levels + hue) % HUES, (levels + saturation).clip(0, 255), (levels + value).clip(0, 255)
    table = np.stack(parts, axis=1).astype(np.uint8)[None]  # (1, 256, 3)
    return cv2.cvtColor(cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), table), cv2.COLOR_HSV2RGB)
