"""Random outputs and targets, and a slow loop over Darknet's gradients per logit, from their published definitions:

Per image, delta = minus the gradient of the loss with respect to a raw value,
    objectness: 1 - sigmoid on positives; else -sigmoid, or 0 if an IoU of the decoded prediction with a ground-truth
        box exceeds the threshold
    class:      one-hot - sigmoid on positives; a later ground-truth box of the same prediction sets its class only
    xy:         s * (t - sigmoid),  wh: s * (t - raw),  s = 2 - w * h relative to the network input
Crowd regions (ours, Darknet has none) are never assigned; predictions with more than the threshold of their area inside
have objectness delta 0.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from detection.models.levels import flatten_levels
from detection.models.yolo import CRITERIA
from detection.models.yolo.criterion import Criterion
from detection.models.yolo.head_layout import HeadLayout
from tests.support.slow_boxes import slow_intersection, slow_iou

WIDTH, HEIGHT = 96, 64  # default network input in pixels
LEVELS = {
    "three levels": (
        [8, 16, 32],
        [[(4, 5), (6, 12), (13, 9)], [(12, 24), (25, 18), (22, 45)], [(46, 36), (62, 40), (80, 60)]],
    ),
    "two levels": ([16, 32], [[(8, 7), (14, 20), (30, 18)], [(30, 44), (52, 36), (80, 60)]]),
    "full": (  # YOLOv3 on COCO
        [8, 16, 32],
        [[(10, 13), (16, 30), (33, 23)], [(30, 61), (62, 45), (59, 119)], [(116, 90), (156, 198), (373, 326)]],
    ),
    "tiny": ([16, 32], [[(10, 14), (23, 27), (37, 58)], [(81, 82), (135, 169), (344, 319)]]),  # YOLOv3-tiny on COCO
    "equal strides": ([16, 16, 32], [[(8, 7), (14, 20)], [(30, 18)], [(30, 44), (52, 36), (80, 60)]]),
    "unequal levels": ([8, 16, 32], [[(6, 7)], [(12, 24), (25, 18), (22, 45), (40, 20)], [(46, 36), (80, 60)]]),
}
Anchors = list[list[tuple[float, float]]]


class Case:
    """Random raw outputs and targets for every rule of the loss.

    Args:
        layout: key of `LEVELS`.
        num_classes: C.
        counts: ground-truth boxes and crowd regions per image.
        seed: of all that is random.
        threshold: the criterion's `ignore_threshold`.
        planted: fraction of the ground-truth boxes that some prediction nearly equals.
        size: (width, height) of the network input in pixels, multiples of 32.
        scale_xy: of all levels.
        loss: name of the criterion.
    """

    def __init__(
        self,
        layout: str,
        num_classes: int,
        counts: list[int],
        seed: int,
        threshold: float = 0.7,
        planted: float = 0.6,
        size: tuple[int, int] = (WIDTH, HEIGHT),
        scale_xy: float = 1.0,
        loss: str = "darknet",
    ) -> None:
        self.width, self.height = size
        self.scale_xy = scale_xy
        self.loss = loss
        self.strides, anchors = LEVELS[layout]
        self.anchors: Anchors = anchors
        self.threshold = threshold
        self.num_classes = num_classes
        self.generator = torch.Generator().manual_seed(seed)
        rows_of_targets = max([*counts, 1]) + 2
        self.boxes = torch.zeros(len(counts), rows_of_targets, 4)
        self.labels = torch.full((len(counts), rows_of_targets), -1)
        self.outputs = [
            torch.randn(
                len(counts),
                len(level),
                self.height // stride,
                self.width // stride,
                5 + num_classes,
                generator=self.generator,
            )
            for stride, level in zip(self.strides, self.anchors, strict=True)
        ]
        for image, count in enumerate(counts):
            for number in range(count):
                self._add_ground_truth(image, number)
            for number in range(count):
                if self._uniform() < planted:
                    self._plant(image, number)

    def _uniform(self) -> float:
        return torch.rand(1, generator=self.generator).item()

    def _add_ground_truth(self, image: int, number: int) -> None:
        """A random box; one in five nearly repeats an earlier box, one in ten is a crowd region."""
        if number and self._uniform() < 0.2:
            earlier = int(self._uniform() * number)
            box = self.boxes[image, earlier] + torch.rand(4, generator=self.generator) * 0.01
        else:
            scale = self.width / WIDTH
            size = torch.tensor([4 * math.exp(3 * self._uniform()), 4 * math.exp(2.6 * self._uniform())]) * scale
            corner = torch.tensor([self._uniform(), self._uniform()]) * (torch.tensor([self.width, self.height]) - size)
            box = torch.cat([corner, corner + size])
        self.boxes[image, number] = box
        self.labels[image, number] = -2 if self._uniform() < 0.1 else int(self._uniform() * self.num_classes)

    def _plant(self, image: int, number: int) -> None:
        """Make the prediction of a random anchor decode to almost this box, so that the ignore rule applies."""
        x1, y1, x2, y2 = self.boxes[image, number].tolist()
        level = int(self._uniform() * len(self.strides))
        stride = self.strides[level]
        anchor = int(self._uniform() * len(self.anchors[level]))
        x, y = (x1 + x2) / 2 / stride, (y1 + y2) / 2 / stride
        column, row = min(int(x), self.width // stride - 1), min(int(y), self.height // stride - 1)
        share_x, share_y = (
            min(max((share + (self.scale_xy - 1) / 2) / self.scale_xy, 0.02), 0.98) for share in (x - column, y - row)
        )
        anchor_width, anchor_height = self.anchors[level][anchor]
        raw = [
            math.log(share_x / (1 - share_x)),
            math.log(share_y / (1 - share_y)),
            math.log((x2 - x1) / anchor_width),
            math.log((y2 - y1) / anchor_height),
        ]
        noise = torch.randn(4, generator=self.generator) * 0.05
        self.outputs[level][image, anchor, row, column, :4] = torch.tensor(raw) + noise

    def criterion(self, **arguments: Any) -> Criterion:
        scales_xy = None if self.scale_xy == 1 else [self.scale_xy] * len(self.strides)
        arguments = {"scales_xy": scales_xy, **arguments}
        return CRITERIA[self.loss](self.anchors, self.strides, self.threshold, **arguments)

    def targets(self) -> dict[str, Tensor]:
        return {"boxes": self.boxes, "labels": self.labels}

    def gradients(self) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The losses, and the gradients of their sum over all images, as in Darknet."""
        outputs = [output.clone().requires_grad_() for output in self.outputs]
        losses = self.criterion()(outputs, self.targets())
        images = 1 if self.loss == "mmdetection" else len(self.boxes)  # mmdetection's loss is a sum already
        (torch.stack(list(losses.values())).sum() * images).backward()
        gradients = [output.grad for output in outputs]
        assert all(gradient is not None for gradient in gradients)
        return losses, [gradient for gradient in gradients if gradient is not None]


# The oracle: plain Python numbers, one prediction and one ground-truth box at a time


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def cross_entropy_of_bit(logit: float, target: float) -> float:
    return -target * math.log(sigmoid(logit)) - (1 - target) * math.log(1 - sigmoid(logit))


def decode(case: Case, raw: list[float], level: int, anchor: int, row: int, column: int) -> list[float]:
    stride, scale, (anchor_width, anchor_height) = case.strides[level], case.scale_xy, case.anchors[level][anchor]
    x = (column + scale * sigmoid(raw[0]) - (scale - 1) / 2) * stride
    y = (row + scale * sigmoid(raw[1]) - (scale - 1) / 2) * stride
    width, height = anchor_width * math.exp(raw[2]), anchor_height * math.exp(raw[3])
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def overlap(predicted: list[float], gt: list[float], crowd: bool) -> float:
    """IoU, or for a crowd region intersection over the prediction's area."""
    if crowd:
        return slow_intersection(predicted, gt) / ((predicted[2] - predicted[0]) * (predicted[3] - predicted[1]))
    return slow_iou(predicted, gt)


def gt_boxes_of(case: Case, image: int) -> list[tuple[list[float], int]]:
    pairs = zip(case.boxes[image].tolist(), case.labels[image].tolist(), strict=True)
    return [(box, label) for box, label in pairs if label != -1]


def is_ignored(case: Case, image: int, predicted: list[float]) -> bool:
    return any(overlap(predicted, box, label == -2) > case.threshold for box, label in gt_boxes_of(case, image))


def responsible(case: Case, box: list[float]) -> tuple[int, int, int, int]:
    """(level, anchor, row, column) of the anchor of highest width-height IoU, in the cell of the centre."""
    width, height = box[2] - box[0], box[3] - box[1]
    best_iou, best = 0.0, (-1, -1)
    for level, anchors in enumerate(case.anchors):
        for number, (anchor_width, anchor_height) in enumerate(anchors):
            iou = slow_iou((0, 0, width, height), (0, 0, anchor_width, anchor_height))
            if iou > best_iou:
                best_iou, best = iou, (level, number)
    level, number = best
    stride = case.strides[level]
    column = min(int((box[0] + box[2]) / 2 / stride), case.width // stride - 1)
    row = min(int((box[1] + box[3]) / 2 / stride), case.height // stride - 1)
    return level, number, row, column


def last_gt(case: Case) -> Iterator[tuple[int, tuple[int, int, int, int], list[float]]]:
    """(image, place, box) of every positive."""
    for image in range(len(case.boxes)):
        last = {responsible(case, box): box for box, label in gt_boxes_of(case, image) if label >= 0}
        for place, box in last.items():
            yield image, place, box


def to_cxcywh(box: list[float]) -> list[float]:
    return [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2, box[2] - box[0], box[3] - box[1]]


def box_targets(case: Case, box: list[float]) -> tuple[list[float], float]:
    """(t_x, t_y, t_w, t_h) at the responsible prediction and s; t_x and t_y are the targets of the sigmoids."""
    level, number, row, column = responsible(case, box)
    stride, (anchor_width, anchor_height) = case.strides[level], case.anchors[level][number]
    width, height = box[2] - box[0], box[3] - box[1]
    t = [
        ((box[0] + box[2]) / 2 / stride - column + (case.scale_xy - 1) / 2) / case.scale_xy,
        ((box[1] + box[3]) / 2 / stride - row + (case.scale_xy - 1) / 2) / case.scale_xy,
        math.log(width / anchor_width),
        math.log(height / anchor_height),
    ]
    return t, 2 - (width / case.width) * (height / case.height)


def all_predictions(case: Case) -> list[tuple[int, int, int, int]]:
    return [
        (level, anchor, row, column)
        for level, output in enumerate(case.outputs)
        for anchor in range(output.shape[1])
        for row in range(output.shape[2])
        for column in range(output.shape[3])
    ]


def darknet_deltas(case: Case) -> list[Tensor]:
    """Deltas of Darknet's yolo layer, per level in the shape of the outputs, float64."""
    deltas = [torch.zeros(output.shape, dtype=torch.float64) for output in case.outputs]
    for image in range(len(case.boxes)):
        for level, anchor, row, column in all_predictions(case):
            raw = case.outputs[level][image, anchor, row, column].tolist()
            predicted = decode(case, raw, level, anchor, row, column)
            if not is_ignored(case, image, predicted):
                deltas[level][image, anchor, row, column, 4] = 0 - sigmoid(raw[4])
        seen = set()
        for box, label in gt_boxes_of(case, image):
            if label == -2:
                continue
            place = level, anchor, row, column = responsible(case, box)
            raw = case.outputs[level][image, anchor, row, column].tolist()
            delta = deltas[level][image, anchor, row, column]
            t, s = box_targets(case, box)
            delta[0] = s * (t[0] - sigmoid(raw[0]))
            delta[1] = s * (t[1] - sigmoid(raw[1]))
            delta[2] = s * (t[2] - raw[2])
            delta[3] = s * (t[3] - raw[3])
            delta[4] = 1 - sigmoid(raw[4])
            for number in range(case.num_classes):
                if place not in seen:
                    delta[5 + number] = (number == label) - sigmoid(raw[5 + number])
                elif number == label:
                    delta[5 + number] = 1 - sigmoid(raw[5 + number])
            seen.add(place)
    return deltas


def decode_boxes(raw: Tensor, anchors: Tensor, stride: int, scale_xy: float = 1.0, new_coords: bool = False) -> Tensor:
    """Boxes of one level, (B, A, H, W, X) to (B, A, H, W, 4)."""
    layout = HeadLayout([anchors.tolist()], [stride], [scale_xy], new_coords)
    batch, count, rows, columns = raw.shape[:4]
    boxes = layout.decode(flatten_levels([raw]), [(rows, columns)])
    return boxes.view(batch, rows, columns, count, 4).permute(0, 3, 1, 2, 4)
