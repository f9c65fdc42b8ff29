"""Augmentation with albumentations: the library draws parameters and changes pixels; all geometry is one warp."""

import random
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from detection.config.augmentation import AugmentationSettings
from detection.contract import Geometry
from detection.data.augmentation.mixing import Layer
from detection.data.resize import INTERPOLATIONS, Placed, resize_placed, warp_placed, warp_tiles

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
        self, layers: Sequence[Layer], size: int, epoch: int, index: int, interpolation: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return the network input (size, size, 3) uint8, and of the visible boxes (G, 4), labels and shares (G,).

        Args:
            layers: one, or two that are blended; boxes of several images are sorted by falling area.
            interpolation: of a resize, a key of `INTERPOLATIONS`.
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

        rotate_method = self.settings.affine.rotate_method if moved else "largest_box"
        images, found = [], []
        for layer in layers:
            if layer.matrix is None:
                to_square, method = matrix, rotate_method
                images.append(self.transform_image(layer, matrix, moved, mirrored, size, interpolation))
            else:
                to_square, method = layer.matrix, "largest_box"
                images.append(self.transform_image(layer, to_square, True, [], size, interpolation))
            bounds = layer.bounds or (0, size)
            boxes, kept = move_boxes(layer.boxes, to_square, size, method, self.settings.min_visibility, bounds)
            found.append((boxes[kept], layer.labels[kept], np.full(kept.sum(), layer.share, np.float32)))
        image = (
            images[0]
            if len(images) == 1
            else cv2.addWeighted(images[0], layers[0].share, images[1], layers[1].share, 0)
        )
        boxes, labels, shares = (np.concatenate(parts) for parts in zip(*found, strict=True))
        if len(layers) > 1 or len(layers[0].tiles) > 1:  # the order of the targets, docs/contract.md
            order = np.argsort(-(boxes[:, 2:] - boxes[:, :2]).prod(axis=1), kind="stable")
            boxes, labels, shares = boxes[order], labels[order], shares[order]
        for step in self.pixelwise:
            image = step(image=image)["image"]
        return image, boxes, labels, shares

    def streams(self, epoch: int, index: int) -> tuple[np.random.Generator, random.Random]:
        return np.random.default_rng([self.seed, epoch, index]), random.Random(f"{self.seed},{epoch},{index}")

    def transform_image(
        self, layer: Layer, matrix: np.ndarray, moved: bool, mirrored: list[bool], size: int, interpolation: str
    ) -> np.ndarray:
        """Resize and warp images, with a single resampling of each if `interpolation` is that of the warp."""
        if layer.bounds is not None or not layer.tiles:
            bounds, method = layer.bounds or (0, size), INTERPOLATIONS[interpolation]
            return warp_tiles(layer.tiles, bounds, matrix, size, self.geometry.fill, method)
        (placed,) = layer.tiles
        if moved and interpolation == "linear":
            return warp_placed(placed, matrix, size, self.geometry.fill)
        image = resize_placed(placed, size, self.geometry.fill, INTERPOLATIONS[interpolation])
        if moved:
            return warp_placed(Placed(image, 0, 0, size, size), matrix, size, self.geometry.fill)
        if any(mirrored):
            return cv2.flip(image, -1 if all(mirrored) else 1 if mirrored[0] else 0)
        return image


def move_boxes(
    boxes: np.ndarray,
    matrix: np.ndarray,
    size: int,
    rotate_method: str,
    min_visibility: float,
    bounds: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Enclose the transformed boxes ("largest_box") or the transformed ellipses inside them ("ellipse").

    Args:
        boxes: xyxy in the coordinates of the frame, (G, 4) float32; clipped to its bounds first.
        matrix: affine from the frame to the square, (3, 3).
        min_visibility: fraction of the transformed box that must be inside the square.
        bounds: first and last coordinate of the frame, on both axes; of a single image (0, size).

    Returns:
        Boxes clipped to the square, (G, 4) float32, and which of them to keep, (G,) bool.
    """
    inside = boxes.astype(np.float64).clip(*bounds)
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
