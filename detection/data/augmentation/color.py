"""Training's named colour distortions: as the program Darknet does it, and as SSD and mmdetection do."""

import cv2
import numpy as np
import torch
from torchvision.transforms import v2

from detection.config.augmentation import AugmentationSettings
from detection.runtime.reproducibility import sample_stream, torch_stream

# Streams of the one seed; the numbers only have to differ, here and in placements.py, and not be 0.
HSV_STREAM, PHOTOMETRIC_STREAM = 4, 5
# OpenCV's two 8-bit conversions "FULL" disagree: to HSV the circle has 256 levels, from HSV it has 255.
HUE_LEVELS_TO_HSV, HUE_LEVELS_FROM_HSV = 256, 255


def has_color(augmentation: AugmentationSettings) -> bool:
    return max(augmentation.darknet_hsv.p, augmentation.photometric_distortion.p) > 0


class ColorDistortion:
    """`darknet_hsv`, then `photometric_distortion`, on (S, S, 3) uint8 RGB.

    Args:
        augmentation: the two sections.
        seed: of the run.
    """

    def __init__(self, augmentation: AugmentationSettings, seed: int) -> None:
        self.seed = seed
        self.hsv, self.photometric = augmentation.darknet_hsv, augmentation.photometric_distortion
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
        return image


def draw_scale(largest: float, generator: np.random.Generator) -> float:
    """A factor in 1..largest, or with probability 1/2 its inverse."""
    scale = generator.uniform(1, largest)
    return scale if generator.random() < 0.5 else 1 / scale


def distort_hsv(image: np.ndarray, hue: float, saturation: float, exposure: float) -> np.ndarray:
    """Turn the hue by a fraction of the circle, multiply saturation and value; (H, W, 3) uint8 RGB.

    Hue and saturation are rounded to 8 bits, the hue thereby to 1/256 of the circle. The value is the size of the
    colour, so it is multiplied in RGB, which is exact and cut at 255 as in Darknet. Differs: saturation is cut at 1
    before the conversion back, there the colour is cut after it.

    Source: distort_image in src/image.c of https://github.com/pjreddie/darknet
    """
    levels = np.arange(256)
    hues = np.rint((levels / HUE_LEVELS_TO_HSV + hue) % 1 * HUE_LEVELS_FROM_HSV)
    saturations = np.rint(levels * saturation).clip(0, 255)
    table = np.stack([hues, saturations, levels], axis=1).astype(np.uint8)[None]  # (1, 256, 3)
    hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL), table)
    return cv2.convertScaleAbs(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL), alpha=exposure)
