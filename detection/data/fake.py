"""Random images and boxes of the right shapes, to measure speed or try a set-up without a dataset."""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch

from detection.contract import PADDING_LABEL, Batch
from detection.data.annotations import AnnotationCounts, Annotations, Categories
from detection.data.augmentation.mixing import Annotated, Partners
from detection.data.partners import PartnerImages
from detection.data.sampler import Position
from detection.data.transforms import Sample, Transform

MEAN_BOXES = 7  # per image, as in COCO


class FakeDataset(torch.utils.data.Dataset):
    """Map-style dataset of random images of 640 x 480 pixels with random boxes; indexed like `CocoDataset`."""

    def __init__(self, num_images: int, class_names: Sequence[str], seed: int) -> None:
        self.sample_transform: Transform | None = None
        self.partners: PartnerImages | None = None
        self.source_lines: list[str] = []
        self.seed = seed
        generator = np.random.default_rng(seed)
        boxes_per_image = generator.integers(0, 15, num_images)
        first_box = np.concatenate([[0], np.cumsum(boxes_per_image)])
        centre = generator.uniform(0, (640, 480), (first_box[-1], 2))
        size = generator.uniform(8, 300, (first_box[-1], 2))
        corners = np.concatenate([centre - size / 2, centre + size / 2], axis=1)
        corners = corners.clip(0, (640, 480, 640, 480)).astype(np.float32)
        area = (corners[:, 2:] - corners[:, :2]).prod(axis=1)
        corners = corners[np.lexsort((-area, np.repeat(np.arange(num_images), boxes_per_image)))]
        coco_boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1).astype(np.float64)
        self.annotations = Annotations(
            image_ids=np.arange(1, num_images + 1),
            image_sizes=np.full((num_images, 2), (640, 480), dtype=np.int32),
            file_names=np.zeros(0, np.uint8),
            file_name_ends=np.zeros(num_images, np.int64),
            first_box=first_box,
            boxes=corners,
            labels=generator.integers(0, len(class_names), first_box[-1]),
            areas=coco_boxes[:, 2:].prod(axis=1),
            coco_boxes=coco_boxes,
            crowd=np.zeros(first_box[-1], bool),
            annotation_ids=np.arange(1, first_box[-1] + 1),
            file_order=np.arange(first_box[-1]),
            categories=Categories(tuple(class_names), tuple(range(1, len(class_names) + 1))),
            counts=AnnotationCounts(),
        )

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, position: int | Position) -> Sample:
        index, epoch, size, clean = Position(position) if isinstance(position, int) else Position(*position)
        assert self.sample_transform is not None, "set before images are asked for"
        mixed = self.partners is not None and not clean
        options: dict[str, Any] = {"partners": self.partners_of(index, epoch, [])} if mixed else {}
        return self.sample_transform(*self._annotated(index), index, epoch, size, **options)

    def partners_of(self, index: int, epoch: int, unreadable: list[str]) -> Partners:
        """As of `CocoDataset`; all images can be read."""
        order = self.partners
        assert order is not None, "set with the transform"
        return lambda generator, count: [self._annotated(at) for at in order.draw(index, epoch, count, generator)]

    def _annotated(self, index: int) -> Annotated:
        rows = slice(self.annotations.first_box[index], self.annotations.first_box[index + 1])
        return Annotated(self.load_image(index), self.annotations.boxes[rows], self.annotations.labels[rows])

    def load_image(self, index: int) -> np.ndarray:
        """Generate smooth noise, RGB uint8, (480, 640, 3)."""
        coarse = np.random.default_rng([self.seed, index]).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        return cv2.resize(coarse, (640, 480), interpolation=cv2.INTER_LINEAR)


def synthetic_batch(size: int, batch_size: int, num_classes: int) -> Batch:
    """Generate a collated batch of random images with `MEAN_BOXES` boxes each, padded to 32."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(batch_size, 32, 2, generator=generator) * size * 0.8
    boxes = torch.cat([corners, corners + 8 + torch.rand(corners.shape, generator=generator) * size * 0.2], dim=-1)
    labels = torch.randint(num_classes, (batch_size, 32), generator=generator)
    labels[:, MEAN_BOXES:] = PADDING_LABEL
    images = torch.randint(0, 256, (batch_size, size, size, 3), dtype=torch.uint8, generator=generator)
    return {
        "images": images.permute(0, 3, 1, 2),
        "boxes": boxes,
        "labels": labels,
        "indices": torch.arange(batch_size),
    }
