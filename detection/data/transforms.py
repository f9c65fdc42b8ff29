"""From an image and its boxes to the network input: letterbox, and for training the augmentation."""

import os
import random
from dataclasses import dataclass

import cv2
import numpy as np

from detection.data.color import ColorDistortion, has_color
from detection.data.letterbox import INTERPOLATIONS, letterbox_geometry, letterbox_image
from detection.data.placements import RandomPlacement, has_placement
from detection.postprocessing import Letterbox
from detection.settings import AugmentationSettings, DataSettings

# albumentations asks the package index for a newer version when it is imported; nothing here may need a network.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

MINIMUM_SIDE = 1.0  # pixels of the network input; a box that augmentation leaves smaller is removed


@dataclass(frozen=True)
class Sample:
    """One image as the collate function takes it."""

    image: np.ndarray  # (S, S, 3) uint8 RGB
    boxes: np.ndarray  # (G, 4) float32 xyxy, pixels of the network input
    labels: np.ndarray  # (G,) int64: class, or -2 crowd
    index: int  # of the image in its dataset
    letterbox: Letterbox  # of the image; augmentation then moves it further
    unreadable: tuple[str, ...] = ()  # what was wrong with the images that this one takes the place of


class Transform:
    """Validation: the letterbox alone. Training: the letterbox or a random placement, then augmentation at the size of
    the network input: albumentations, then the named colour distortions. What has no probability is not built.

    Every random choice is a pure function of (seed, epoch, index), whatever the worker, rank or order.

    Args:
        data: fill, aspect, interpolation and, for training, the augmentation.
        size: side of the network input in pixels, where the position gives none.
        seed: of the run.
        training: whether to augment.
    """

    def __init__(self, data: DataSettings, size: int, seed: int, training: bool) -> None:
        self.size = size
        self.seed = seed
        self.data = data
        augmentation = data.augmentation
        self.placement = RandomPlacement(data, seed) if training and has_placement(augmentation) else None
        self.compose = build_augmentation(augmentation, data.fill) if training else None
        self.color = ColorDistortion(augmentation, seed) if training and has_color(augmentation) else None

    def __call__(
        self, image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, index: int, epoch: int, size: int
    ) -> Sample:
        """Args:
        image: RGB uint8, (H, W, 3).
        boxes: xyxy in pixels of the image, (G, 4) float32.
        labels: class or -2 crowd, (G,) int64.
        index, epoch: choose the random stream.
        size: side of the network input, 0 for the default.
        """
        data, size = self.data, size or self.size
        layout = data.keep_aspect, data.letterbox_rounding
        if self.placement is not None:
            letterbox, *_ = letterbox_geometry(image.shape[1], image.shape[0], size, *layout)
            image, boxes, labels = self.placement(image, boxes, labels, size, epoch, index)
        else:
            interpolation = INTERPOLATIONS[data.interpolation]
            image, letterbox = letterbox_image(image, size, layout[0], data.fill, interpolation, layout[1])
            scale = np.array([letterbox.scale_x, letterbox.scale_y] * 2, dtype=np.float32)
            offset = np.array([letterbox.left, letterbox.top] * 2, dtype=np.float32)
            boxes = boxes * scale + offset
        if self.compose is not None:
            # One shared stream: `set_random_seed` would give every transform the same stream, so that all that are
            # applied with equal probability would be applied to the same images.
            self.compose.set_random_state(
                np.random.default_rng([self.seed, epoch, index]), random.Random(f"{self.seed},{epoch},{index}")
            )
            augmented = self.compose(image=image, bboxes=boxes, labels=labels)
            image = augmented["image"]
            boxes = np.asarray(augmented["bboxes"], dtype=np.float32).reshape(-1, 4)
            labels = np.asarray(augmented["labels"], dtype=np.int64).reshape(-1)
        if self.color is not None:
            image = self.color(image, epoch, index)
        return Sample(image, boxes, labels, index, letterbox)


def build_augmentation(augmentation: AugmentationSettings, fill: tuple[int, int, int]):
    """The albumentations pipeline of training; geometry first, so that noise is applied at network resolution."""
    import albumentations as A

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
        "random_fog": A.RandomFog,
    }
    transforms = []
    for name, transform in classes.items():
        arguments = getattr(augmentation, name).model_dump()
        if name == "affine":
            arguments |= {"fill": fill, "border_mode": cv2.BORDER_CONSTANT, "balanced_scale": False}
        if arguments["p"] > 0:
            transforms.append(transform(**arguments))
    return A.Compose(
        transforms,
        bbox_params=A.BboxParams(
            format="pascal_voc",
            label_fields=["labels"],
            clip=True,
            filter_invalid_bboxes=True,
            min_visibility=augmentation.min_visibility,
            min_width=MINIMUM_SIDE,
            min_height=MINIMUM_SIDE,
        ),
        strict=True,
    )
