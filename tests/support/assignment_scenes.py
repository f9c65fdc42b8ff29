"""Random predictions and ground truth for tests of the assigners, and the geometry of a slow loop over them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from detection.contract import CROWD_LABEL, PADDING_LABEL
from detection.models.yolox.points import Points, make_points

STRIDES, SIZE, CLASSES = (8, 16, 32), 64, 3


@dataclass
class Scene:
    """Arguments of an assigner: 84 points on three levels of a 64 px input, B images, G rows of ground truth."""

    class_logits: Tensor
    objectness_logits: Tensor
    predicted: Tensor
    boxes: Tensor
    labels: Tensor
    points: Points

    def arguments(self) -> tuple:
        return (
            self.class_logits, self.objectness_logits, self.predicted, self.boxes, self.labels, self.points,
        )  # fmt: skip


def random_scene(seed: int, images: int = 3, rows: int = 6) -> Scene:
    """Boxes of 1 to 60 px, some at the border; padding, crowds, empty images; predictions near boxes, far, or empty."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    points = make_points(STRIDES, [(SIZE // stride, SIZE // stride) for stride in STRIDES], "cpu")
    sides = torch.exp(uniform(images, rows, 2, low=0.0, high=math.log(60)))
    centres = uniform(images, rows, 2, low=0.01, high=SIZE - 0.01)
    boxes = torch.cat([centres - sides / 2, centres + sides / 2], dim=-1)  # may reach beyond the image
    labels = torch.randint(0, CLASSES, (images, rows), generator=generator)
    labels[uniform(images, rows) < 0.25] = PADDING_LABEL
    labels[uniform(images, rows) < 0.15] = CROWD_LABEL
    if seed % 4 == 0:
        labels[0] = PADDING_LABEL
    boxes[labels == PADDING_LABEL] = 0.0
    count = len(points.strides)
    predicted = torch.cat([points.centres, points.strides[:, None].expand(-1, 2)], dim=-1).repeat(images, 1, 1)
    predicted[..., :2] += uniform(images, count, 2, low=-0.5, high=0.5) * points.strides[:, None]
    predicted[..., 2:] *= torch.exp(uniform(images, count, 2, low=-2.0, high=2.0))
    predicted = torch.cat(
        [predicted[..., :2] - predicted[..., 2:] / 2, predicted[..., :2] + predicted[..., 2:] / 2], -1
    )
    for image in range(images):  # a third of the predictions are near a box
        rows_of = torch.randint(0, rows, (count,), generator=generator)
        near = uniform(count) < 0.33
        noisy = boxes[image, rows_of] + uniform(count, 4, low=-2.0, high=2.0)
        wide = (noisy[:, 2:] > noisy[:, :2]).all(dim=1)
        predicted[image, near & wide] = noisy[near & wide]
    return Scene(
        uniform(images, count, CLASSES, low=-4.0, high=2.0), uniform(images, count, low=-4.0, high=2.0),
        predicted, boxes, labels, points,
    )  # fmt: skip


def box_iou(one: list[float], other: list[float]) -> float:
    """IoU of two boxes xyxy, in double precision."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = (one[2] - one[0]) * (one[3] - one[1]) + (other[2] - other[0]) * (other[3] - other[1]) - shared
    return shared / union if union > 0 else 0.0


def strictly_inside(point: list[float], box: list[float]) -> bool:
    return box[0] < point[0] < box[2] and box[1] < point[1] < box[3]


def in_centre_cell(point: list[float], stride: float, box: list[float], radius: float = 0.5) -> bool:
    centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    return all(abs(point[axis] - centre[axis]) <= radius * stride for axis in (0, 1))


def settle_by_loop(chosen: dict[int, list[int]], key: dict[tuple[int, int], float]) -> dict[int, int]:
    """Prediction -> ground-truth row of the lowest key among the rows that chose it, of equals the first."""
    winner: dict[int, int] = {}
    for row in sorted(chosen):
        for place in chosen[row]:
            if place not in winner or key[row, place] < key[winner[place], place]:
                winner[place] = row
    return winner
