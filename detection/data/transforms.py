"""Transform from an image and its boxes to the network input: letterbox and, in training, augmentation."""

from dataclasses import dataclass

import numpy as np

from detection.config.augmentation import AugmentationSettings
from detection.contract import Geometry
from detection.data.augmentation.affine_and_pixels import Augmentation
from detection.data.augmentation.color import ColorDistortion, has_color
from detection.data.augmentation.crop_and_scale import RandomPlacement, has_placement
from detection.data.augmentation.mixing import Annotated, Layer, Mixing, Partners, has_mixing
from detection.data.resize import INTERPOLATIONS, Placed, resize_placed
from detection.ops.letterbox import Letterbox
from detection.runtime.reproducibility import sample_stream

INTERPOLATION_STREAM = 9  # random stream of an image; unlike 0 and those of data/augmentation
RANDOM_INTERPOLATIONS = ("nearest", "linear", "cubic", "area", "lanczos")


@dataclass(frozen=True)
class Sample:
    """One transformed image, the input of the collate function."""

    image: np.ndarray  # (S, S, 3) uint8 RGB
    boxes: np.ndarray  # (G, 4) float32 xyxy, pixels of the network input
    labels: np.ndarray  # (G,) int64: class, or -2 crowd
    index: int  # position of the image in its dataset
    letterbox: Letterbox  # before augmentation
    unreadable: tuple[str, ...] = ()  # errors of unreadable images that this one replaces
    weights: np.ndarray | None = None  # (G,) float32: a box's share in a weighted mixup


class Transform:
    """Maps an image and its boxes to the network input.

    Validation letterboxes only. Training letterboxes or places the image at random, then applies albumentations and the
    colour distortions at the size of the network input; mosaic and mixup put it together with other images before that.
    Augmentations of probability 0 are not built. Every random choice is a pure function of (seed, epoch, index),
    independent of worker, rank and order.

    Args:
        geometry: geometry of the detector.
        size: default side of the network input in pixels.
        seed: seed of the run.
        augmentation: settings of training's augmentation; None: no augmentation.

    Attributes:
        mixing: draws mosaic and mixup, which need `partners`; None: neither is on.
    """

    def __init__(
        self, geometry: Geometry, size: int, seed: int = 0, augmentation: AugmentationSettings | None = None
    ) -> None:
        self.size = size
        self.seed = seed
        self.geometry = geometry
        self.placement: RandomPlacement | None = None
        self.augmentation: Augmentation | None = None
        self.color: ColorDistortion | None = None
        self.mixing: Mixing | None = None
        self.weighted, self.random_interpolation = False, 0.0
        if augmentation is None:
            return
        self.augmentation = Augmentation(augmentation, geometry, seed)
        if has_placement(augmentation):
            self.placement = RandomPlacement(augmentation, geometry, seed)
        if has_color(augmentation):
            self.color = ColorDistortion(augmentation, seed)
        if has_mixing(augmentation):
            self.mixing = Mixing(augmentation, geometry, seed, self.placement)
        self.weighted = augmentation.mixup.p > 0 and augmentation.mixup.beta is not None
        self.random_interpolation = augmentation.random_interpolation.p

    def __call__(
        self,
        image: np.ndarray,
        boxes: np.ndarray,
        labels: np.ndarray,
        index: int,
        epoch: int,
        size: int,
        partners: Partners | None = None,
    ) -> Sample:
        """Transform one image.

        Args:
            image: RGB uint8, (H, W, 3).
            boxes: xyxy in pixels of the image, (G, 4) float32.
            labels: class, or -2 for crowd, (G,) int64.
            index, epoch: select the random stream.
            size: side of the network input in pixels, 0 for the default.
            partners: gives other images for mosaic and mixup; None: without both.
        """
        geometry, size = self.geometry, size or self.size
        letterbox, width, height = geometry.place(image.shape[1], image.shape[0], size)
        layers = None
        if self.mixing is not None and partners is not None:
            layers = self.mixing(Annotated(image, boxes, labels), index, epoch, size, partners)
            if layers is None:
                image = image.copy()  # other images may need this one
        if layers is None:
            if self.placement is not None:
                placed, boxes, labels = self.placement(image, boxes, labels, size, epoch, index)
            else:
                scale = np.array([letterbox.scale_x, letterbox.scale_y] * 2, dtype=np.float32)
                offset = np.array([letterbox.left, letterbox.top] * 2, dtype=np.float32)
                placed = Placed(image, letterbox.left, letterbox.top, width, height)
                boxes = boxes * scale + offset
            layers = [Layer((placed,), boxes, labels)]
        weights = None
        if self.augmentation is not None:
            interpolation = self.draw_interpolation(epoch, index)
            image, boxes, labels, weights = self.augmentation(layers, size, epoch, index, interpolation)
        else:
            image = resize_placed(layers[0].tiles[0], size, geometry.fill, INTERPOLATIONS[geometry.interpolation])
        if self.color is not None:
            image = self.color(image, epoch, index)
        return Sample(image, boxes, labels, index, letterbox, weights=weights if self.weighted else None)

    def draw_interpolation(self, epoch: int, index: int) -> str:
        """Draw the interpolation of an image's resize in training, a key of `INTERPOLATIONS`."""
        if self.random_interpolation:
            generator = sample_stream(self.seed, epoch, index, INTERPOLATION_STREAM)
            if generator.random() < self.random_interpolation:
                return RANDOM_INTERPOLATIONS[generator.integers(len(RANDOM_INTERPOLATIONS))]
        return self.geometry.interpolation
