"""Augmentation with albumentations: the library draws parameters and changes pixels; all geometry is one warp."""

import random
from typing import Any

import cv2
import numpy as np

from detection.config.augmentation import AugmentationSettings
from detection.contract import Geometry
from detection.data.resize import INTERPOLATIONS, Placed, resize_placed, warp_placed

IN_THE_WARP = {"Affine", "HorizontalFlip", "VerticalFlip"}  # moves boxes too; all others change pixels only
MINIMUM_SIDE = 1.0  # pixels of the network input; smaller boxes are removed after augmentation


class Augmentation:
    """Applies albumentations' transforms, geometry first so that noise has the resolution of the network input.

    Transforms of probability 0 are not built.

    Args:
        settings: settings of all transforms.
        geometry: geometry of the detector; its fill and interpolation are used.
        seed: seed of the run.
    """

    def __init__(self, settings: AugmentationSettings, geometry: Geometry, seed: int) -> None:
        self.settings, self.geometry, self.seed = settings, geometry, seed
        self.compose = build_augmentation(settings, geometry.fill)
        steps = {type(step).__name__: step for step in self.compose.transforms}
        self.affine, *self.flips = (steps.pop(name, None) for name in ("Affine", "HorizontalFlip", "VerticalFlip"))
        self.pixelwise = list(steps.values())

    def __call__(
        self, placed: Placed, boxes: np.ndarray, labels: np.ndarray, size: int, epoch: int, index: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the network input (size, size, 3) uint8, and the boxes and labels that remain visible.

        Args:
            boxes: xyxy in pixels of the square, (G, 4) float32.
        """
        # One shared stream: `set_random_seed` would give every transform the same stream, so those of equal probability
        # would be applied to the same images.
        numbers, chance = self.streams(epoch, index)
        self.compose.set_random_state(numbers, chance)
        chance.random()  # the number that `Compose` draws for its own probability
        matrix = np.eye(3)
        moved = self.affine is not None and self.affine.should_apply()
        if moved:
            matrix = self.affine.get_params_dependent_on_data({"shape": (size, size, 3)}, {})["bbox_matrix"]
        mirrored = [flip is not None and flip.should_apply() for flip in self.flips]
        for axis in np.flatnonzero(mirrored):
            matrix[axis] = (0, 0, size) - matrix[axis]

        image = self.transform_image(placed, matrix, moved, mirrored, size)
        rotate_method = self.settings.affine.rotate_method if moved else "largest_box"
        boxes, kept = move_boxes(boxes, matrix, size, rotate_method, self.settings.min_visibility)
        for step in self.pixelwise:
            image = step(image=image)["image"]
        return image, boxes[kept], labels[kept]

    def streams(self, epoch: int, index: int) -> tuple[np.random.Generator, random.Random]:
        return np.random.default_rng([self.seed, epoch, index]), random.Random(f"{self.seed},{epoch},{index}")

    def transform_image(
        self, placed: Placed, matrix: np.ndarray, moved: bool, mirrored: list[bool], size: int
    ) -> np.ndarray:
        """Resize and warp the image, with a single resampling if `Geometry.interpolation` is that of the warp."""
        if moved and self.geometry.interpolation == "linear":
            return warp_placed(placed, matrix, size, self.geometry.fill)
        image = resize_placed(placed, size, self.geometry.fill, INTERPOLATIONS[self.geometry.interpolation])
        if moved:
            return warp_placed(Placed(image, 0, 0, size, size), matrix, size, self.geometry.fill)
        if any(mirrored):
            return cv2.flip(image, -1 if all(mirrored) else 1 if mirrored[0] else 0)
        return image


def move_boxes(
    boxes: np.ndarray, matrix: np.ndarray, size: int, rotate_method: str, min_visibility: float
) -> tuple[np.ndarray, np.ndarray]:
    """Enclose the transformed boxes ("largest_box") or the transformed ellipses inside them ("ellipse").

    Args:
        boxes: xyxy in pixels of the square, (G, 4) float32; clipped to it first.
        matrix: affine from square to square, (3, 3).
        min_visibility: fraction of the transformed box that must be inside the square.

    Returns:
        Boxes clipped to the square, (G, 4) float32, and which of them to keep, (G,) bool.
    """
    inside = boxes.astype(np.float64).clip(0, size)
    centre, half = (inside[:, 2:] + inside[:, :2]) / 2, (inside[:, 2:] - inside[:, :2]) / 2
    centre = centre @ matrix[:2, :2].T + matrix[:2, 2]
    # Half extent along an axis: the sum over both half sides of a parallelogram, the root of squares of an ellipse.
    if rotate_method == "ellipse":
        half = np.sqrt(half**2 @ (matrix[:2, :2] ** 2).T)
    else:
        half = half @ np.abs(matrix[:2, :2]).T
    whole = np.concatenate([centre - half, centre + half], axis=1)
    seen = whole.clip(0, size)
    sides = seen[:, 2:] - seen[:, :2]
    kept = (sides >= MINIMUM_SIDE).all(axis=1) & (sides.prod(axis=1) >= min_visibility * 4 * half.prod(axis=1))
    return seen.astype(np.float32), kept


def build_augmentation(augmentation: AugmentationSettings, fill: tuple[int, int, int]) -> Any:
    """Build albumentations' transforms as a strict `Compose`, which refuses unknown arguments."""
    import albumentations as A

    from detection.data.augmentation.fog import RandomFog

    classes = {
        "affine": A.Affine,
        "horizontal_flip": A.HorizontalFlip,
        "vertical_flip": A.VerticalFlip,
        "multiplicative_noise": A.MultiplicativeNoise,
        "clahe": A.CLAHE,
        "posterize": A.Posterize,
        "to_gray": A.ToGray,
        "random_brightness_contrast": A.RandomBrightnessContrast,
        "rgb_shift": A.RGBShift,
        "color_jitter": A.ColorJitter,
        "gauss_noise": A.GaussNoise,
        "random_fog": RandomFog,
    }
    transforms = []
    for name, transform in classes.items():
        arguments = getattr(augmentation, name).model_dump()
        if name == "affine":
            arguments |= {"fill": fill, "border_mode": cv2.BORDER_CONSTANT, "balanced_scale": False}
        if arguments["p"] > 0:
            transforms.append(transform(**arguments))
    moving = [type(step).__name__ for step in transforms if isinstance(step, A.DualTransform)]
    if set(moving) - IN_THE_WARP:
        raise TypeError(f"{moving}: only {sorted(IN_THE_WARP)} move pixels here, because boxes follow the warp alone")
    return A.Compose(transforms, strict=True)
