"""Vectorised version of albumentations' RandomFog. Imports albumentations, so import this module lazily."""

from typing import Any

import albumentations as A
import cv2
import numpy as np

PARTICLES_PER_REGION = 10
SHRINK = 0.1  # relative decrease of the region's sides from one region to the next
MAX_REGIONS = 10


class RandomFog(A.RandomFog):
    """`A.RandomFog` without a loop over discs: white discs at random positions, denser in the centre, blurred.

    albumentations blends about a thousand discs into the image one by one. Each moves a pixel by the same fraction
    `alpha` towards white, so the result depends only on the number k of discs that cover it:

        pixel = 255 - (255 - pixel) * (1 - alpha)^k

    Differs: rounded once instead of k times; positions and radii use other numbers of the same random stream.

    Source: RandomFog and add_fog of albumentations 2.0.8 (MIT)
    """

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        height, width = params["shape"][:2]
        intensity = self.py_random.uniform(*self.fog_coef_range)
        region = max(1, int(width // 3 * intensity))
        counts: list[int] = []
        sides: list[tuple[int, int]] = []
        region_width, region_height = width, height
        while region_width > region and region_height > region and len(counts) < MAX_REGIONS:
            counts.append(int(region_width * region_height / region**2 * intensity * PARTICLES_PER_REGION))
            sides.append((region_width // 2, region_height // 2))
            region_width, region_height = int(region_width * (1 - SHRINK)), int(region_height * (1 - SHRINK))
        reach = np.repeat(np.array(sides, dtype=np.int64).reshape(-1, 2), counts, axis=0)  # (K, 2)
        centre = int(width / 2 - 0.5), int(height / 2 - 0.5)
        largest = max(2, int(min(height, width) * 0.1 * intensity))
        return {
            "intensity": intensity,
            "particle_positions": centre + self.random_generator.integers(-reach, reach, endpoint=True),
            "radiuses": self.random_generator.integers(max(1, largest // 2), largest, len(reach)),
        }

    def apply(
        self, img: np.ndarray, particle_positions: np.ndarray, radiuses: np.ndarray, intensity: float, **params: Any
    ) -> np.ndarray:
        counts = count_discs(np.asarray(particle_positions), np.asarray(radiuses), img.shape[0], img.shape[1])
        return blur_fog(thicken(img, counts, self.alpha_coef * intensity))


def count_discs(centres: np.ndarray, radii: np.ndarray, height: int, width: int) -> np.ndarray:
    """Count the discs that cover each pixel, (height, width) int64.

    Args:
        centres: x, y in whole pixels, (K, 2).
        radii: radii in whole pixels, (K,).
    """
    heights = 2 * radii + 1  # rows of each disc
    disc = np.repeat(np.arange(len(radii)), heights)
    offset = np.arange(len(disc)) - np.repeat(np.cumsum(heights) - heights, heights) - radii[disc]
    reach = np.sqrt(radii[disc] ** 2 - offset**2).astype(np.int64)  # half the width of the disc in this row
    row, centre = centres[disc, 1] + offset, centres[disc, 0]
    first, end = np.clip(centre - reach, 0, width), np.clip(centre + reach + 1, 0, width)
    inside = (row >= 0) & (row < height)
    start = row[inside] * (width + 1)  # one extra column for ends at the right border
    length = height * (width + 1)
    changes = np.bincount(start + first[inside], minlength=length) - np.bincount(start + end[inside], minlength=length)
    return np.cumsum(changes.reshape(height, width + 1), axis=1)[:, :-1]


def thicken(image: np.ndarray, counts: np.ndarray, alpha: float) -> np.ndarray:
    """Blend `counts` (H, W) white discs of opacity `alpha` into each pixel of (H, W, 3) uint8."""
    shares = ((1 - alpha) ** np.arange(counts.max(initial=0) + 1)).astype(np.float32)
    clear = cv2.merge([shares[counts]] * 3)
    return cv2.bitwise_not(cv2.multiply(cv2.bitwise_not(image), clear, dtype=cv2.CV_8U))


def blur_fog(image: np.ndarray) -> np.ndarray:
    """Blur with a Gaussian kernel of a thirtieth of the shorter side, as albumentations does last."""
    side = max(3, min(image.shape[:2]) // 30)
    side += side % 2 == 0
    return cv2.GaussianBlur(image, (side, side), 0)
