"""Random predictions and targets of an anchor-free detector, for assigners and criteria."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from detection.models.yolox.points import Points, make_points

STRIDES = (8, 16, 32)


class PointCase(NamedTuple):
    """What an assigner takes; two boxes in three have predictions that nearly equal them."""

    classes: Tensor  # (B, P, C) logits
    objectness: Tensor | None  # (B, P) logits
    predicted: Tensor  # (B, P, 4) xyxy
    boxes: Tensor  # (B, G, 4) xyxy
    labels: Tensor  # (B, G)
    points: Points

    def run(self, assigner: Any) -> Any:
        return assigner(*self)

    def image(self, number: int) -> Any:
        """Predictions, boxes and labels of an image."""
        objectness = None if self.objectness is None else self.objectness[number]
        return self.classes[number], objectness, self.predicted[number], self.boxes[number], self.labels[number]


def point_case(
    seed: int,
    counts: tuple[int, ...] = (7, 3, 0),
    num_classes: int = 3,
    size: tuple[int, int] = (64, 96),
    strides: tuple[int, ...] = STRIDES,
    objectness: bool = True,
    ties: bool = False,
    spread: float = 0.1,
) -> PointCase:
    """Make a case: boxes of every size, some tiny, on the border, repeated or crowd regions; two rows of padding.

    Args:
        seed: of all that is random.
        counts: boxes and crowd regions per image.
        num_classes: C.
        size: (height, width) in pixels.
        strides: per level.
        objectness: whether the head has one.
        ties: logits and coordinates are coarse, so that many costs are equal.
        spread: how far predictions lie from the boxes they imitate, in sides of them.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    height, width = size
    points = make_points(strides, [(height // stride, width // stride) for stride in strides], "cpu")
    images, rows, number = len(counts), max([*counts, 1]) + 2, len(points.strides)
    boxes, labels = torch.zeros(images, rows, 4), torch.full((images, rows), -1)
    limits = torch.tensor([width, height])
    for image, count in enumerate(counts):
        sides = torch.exp(uniform(count, 2) * 4.4 - 0.5).clamp(max=60.0)  # 0.6 to 49 pixels
        corner = uniform(count, 2) * (limits - sides)
        if count > 1:
            corner[0], sides[1] = 0.0, limits - corner[1]  # at the upper left corner; to the lower right one
        boxes[image, :count] = torch.cat([corner, corner + sides], dim=-1)
        labels[image, :count] = torch.randint(num_classes, (count,), generator=generator)
        if count > 4:
            boxes[image, 4] = boxes[image, 3]  # two objects in one place
            labels[image, 2] = -2
    predicted = torch.cat([points.centres, points.centres], dim=-1).repeat(images, 1, 1)
    half = points.strides[:, None] * torch.exp(uniform(images, number, 2) * 2 - 1) / 2
    predicted = predicted + torch.cat([-half, half], dim=-1)
    for image, count in enumerate(counts):
        for row in range(count):
            if uniform(1) > 0.67:
                continue
            close = (points.centres - (boxes[image, row, :2] + boxes[image, row, 2:]) / 2).abs().amax(-1)
            imitators = close < points.strides * 2
            side = (boxes[image, row, 2:] - boxes[image, row, :2]).repeat(2)
            noise = (uniform(number, 4) - 0.5) * 2 * spread * side
            predicted[image] = torch.where(imitators[:, None], boxes[image, row] + noise, predicted[image])
    predicted = torch.cat([torch.minimum(predicted[..., :2], predicted[..., 2:] - 0.01), predicted[..., 2:]], dim=-1)
    classes = torch.randn(images, number, num_classes, generator=generator) * 2
    of_objects = torch.randn(images, number, generator=generator) * 2
    if ties:
        boxes, predicted = (boxes / 8).round() * 8, (predicted / 8).round() * 8
        boxes[..., 2:] = torch.where(labels[..., None] == -1, 0.0, torch.maximum(boxes[..., 2:], boxes[..., :2] + 8))
        classes, of_objects = (classes / 3).round(), (of_objects / 3).round()
    return PointCase(classes, of_objects if objectness else None, predicted, boxes, labels, points)
