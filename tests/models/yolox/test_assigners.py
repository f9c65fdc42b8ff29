"""Assigners against plain loops over images and boxes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.support.operation_trace import OperationTrace
from detection.models.yolox import ASSIGNERS
from detection.models.yolox.assigners import Assignment
from detection.models.yolox.assigners.choice import take_cheapest
from detection.models.yolox.points import make_points
from tests.support.point_cases import PointCase, point_case
from tests.support.slow_boxes import slow_iou


def iou_of(box: Tensor, predicted: Tensor) -> Tensor:
    """IoU of a box with every prediction, (P,) float32."""
    corner = torch.maximum(box[:2], predicted[:, :2])
    width, height = (torch.minimum(box[2:], predicted[:, 2:]) - corner).clamp(min=0).unbind(-1)
    areas = [(boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1]) for boxes in (box, predicted)]
    return width * height / (areas[0] + areas[1] - width * height)


def slow_simota(case: PointCase) -> list[dict[int, tuple[int, float]]]:
    """Per image prediction -> (row of its box, IoU), by the published algorithm."""
    found = []
    for image in range(len(case.labels)):
        classes, objectness, predicted, boxes, labels = case.image(image)
        q = classes.sigmoid() if objectness is None else (classes.sigmoid() * objectness.sigmoid()[:, None]).sqrt()
        real = [row for row, label in enumerate(labels.tolist()) if label >= 0]
        near = {
            row: (
                (case.points.centres - (boxes[row, :2] + boxes[row, 2:]) / 2).abs() < 1.5 * case.points.strides[:, None]
            )
            .all(dim=1)
            .tolist()
            for row in real
        }
        candidates = [point for point in range(len(q)) if any(near[row][point] for row in real)]
        costs, ious, takers = {}, {}, {}
        for row in real:
            one_hot = torch.zeros_like(q)
            one_hot[:, labels[row]] = 1
            ious[row] = iou_of(boxes[row], predicted)
            far = torch.tensor([0.0 if is_near else 1e6 for is_near in near[row]])
            class_cost = F.binary_cross_entropy(q, one_hot, reduction="none").sum(-1)
            costs[row] = (class_cost - 3 * (ious[row] + 1e-8).log() + far).tolist()
        for row in real:
            largest = ious[row][candidates].sort(descending=True).values[:10]
            k = max(int(largest.sum()), 1)
            for point in sorted(candidates, key=lambda point: (costs[row][point], point))[:k]:
                takers.setdefault(point, []).append(row)
        chosen = {}
        for point, rows in takers.items():
            row = rows[0] if len(rows) == 1 else min(real, key=lambda row: (costs[row][point], row))
            chosen[point] = (row, ious[row][point].item())
        found.append(chosen)
    return found


def slow_centre(case: PointCase, nearest_only: bool) -> list[dict[int, tuple[int, float]]]:
    """The cells around the centre, or the centre's cell, on the level of the box's size; the smallest box first."""
    found = []
    strides, centres = case.points.strides.tolist(), case.points.centres.tolist()
    for image in range(len(case.labels)):
        _, _, predicted, boxes, labels = case.image(image)
        chosen: dict[int, tuple[float, int]] = {}
        for row, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
            if labels[row] < 0:
                continue
            fitting = [stride for stride in sorted(set(strides)) if max(x2 - x1, y2 - y1) / 2 <= 8 * stride]
            level = fitting[0] if fitting else max(strides)
            distance = {
                point: max(abs((x1 + x2) / 2 - x), abs((y1 + y2) / 2 - y))
                for point, (x, y) in enumerate(centres)
                if strides[point] == level
            }
            close = [point for point in distance if distance[point] < 1.5 * level]
            if nearest_only:
                close = [min(distance, key=lambda point: (round(distance[point], 3), point))]
            for point in close:
                chosen[point] = min(chosen.get(point, (float("inf"), 0)), ((x2 - x1) * (y2 - y1), row))
        found.append(
            {
                point: (row, slow_iou(predicted[point].tolist(), boxes[row].tolist()))
                for point, (_, row) in chosen.items()
            }
        )
    return found


class LargestTensor(TorchDispatchMode):
    """`elements` of the largest tensor that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)))
        return result


SLOW = {
    "simota": slow_simota,
    "centre": lambda case: slow_centre(case, False),
    "centre_cell": lambda case: slow_centre(case, True),
}


def as_found(assignment: Assignment) -> list[dict[int, tuple[int, float]]]:
    assert not assignment.gt[~assignment.positive].any() and not assignment.quality[~assignment.positive].any()
    return [
        {int(point): (int(gt[point]), float(quality[point])) for point in positive.nonzero()[:, 0]}
        for positive, gt, quality in zip(*assignment, strict=True)
    ]


VARIANTS = {
    "three images": {},
    "no objectness": {"objectness": False, "num_classes": 1},
    "crowded": {"counts": (25,), "spread": 0.3},
    "ties": {"ties": True, "counts": (9, 4), "num_classes": 1},  # so that equal costs are equal in any order of sums
    "two levels": {"strides": (16, 32), "counts": (6, 1)},
    "one cell": {"size": (32, 32), "strides": (32,), "counts": (3,)},
    "empty": {"counts": (0, 0)},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SLOW)
def test_it_equals_the_loop(name: str, variant: str) -> None:
    positives = 0
    for seed in range(40 if name == "simota" else 15):
        case = point_case(seed, **VARIANTS[variant])
        found, expected = as_found(case.run(ASSIGNERS[name])), SLOW[name](case)
        for image, (ours, loop) in enumerate(zip(found, expected, strict=True)):
            assert {p: row for p, (row, _) in ours.items()} == {p: row for p, (row, _) in loop.items()}, (seed, image)
            assert [ours[p][1] for p in sorted(ours)] == pytest.approx([loop[p][1] for p in sorted(loop)], abs=1e-5)
            positives += len(ours)
            real = {row for row, label in enumerate(case.labels[image].tolist()) if label >= 0}
            assert {row for row, _ in ours.values()} <= real
    assert (positives > 0) == (variant != "empty")


def test_there_are_ties() -> None:
    """Without the rule for equal costs, what the loop and the assigner share would be chance."""
    case = point_case(0, **VARIANTS["ties"])
    box, predicted = case.boxes[0, 0], case.predicted[0]
    pairs = list(zip(iou_of(box, predicted).tolist(), case.classes[0].flatten().tolist(), strict=True))
    assert len(set(pairs)) < len(pairs) / 3


def test_take_cheapest_by_hand() -> None:
    infinity = float("inf")
    cost = torch.tensor([[3.0, 1, 2, 1, 2, 2], [5.0, infinity, 4, infinity, infinity, 6], [0.0, 0, 0, 0, 0, 0]])
    taken = take_cheapest(cost, torch.tensor([4, 2, 1]), 5)
    assert taken.int().tolist() == [[0, 1, 1, 1, 1, 0], [1, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]


def test_simota_by_hand() -> None:
    """One level of 4 x 4 cells of stride 8. A box of 16 px around (16, 16): the points at 12 and 20 px are near.

    Two of these four predict it exactly, so k = 2 + 2 * 1/4 rounded down; the others are quarters of it. A second box
    has no prediction that overlaps it: it takes one, the cheapest.
    """
    points = make_points((8,), [(4, 4)], "cpu")
    predicted = torch.cat([points.centres - 2, points.centres + 2], dim=-1)
    for point, box in {5: (8, 8, 24, 24), 10: (8, 8, 24, 24), 6: (16, 8, 24, 16), 9: (8, 16, 16, 24)}.items():
        predicted[point] = torch.tensor(box, dtype=torch.float32)
    boxes = torch.tensor([[[8.0, 8, 24, 24], [30.5, 0.5, 31.5, 1.5]]])
    labels, classes, objectness = torch.tensor([[1, 0]]), torch.zeros(1, 16, 2), torch.zeros(1, 16)
    classes[0, 3, 0] = 1.0
    found = as_found(ASSIGNERS["simota"](classes, objectness, predicted[None], boxes, labels, points))
    assert {point: row for point, (row, _) in found[0].items()} == {5: 0, 10: 0, 3: 1}
    assert [found[0][point][1] for point in (5, 10, 3)] == [1.0, 1.0, 0.0]


def test_levels_by_size() -> None:
    """Boxes of 128, 130 and 600 px: strides 8, 16 and 32, as half of them is 64, 65 and 300 px."""
    points = make_points((8, 16, 32), [(80, 80), (40, 40), (20, 20)], "cpu")
    predicted = torch.cat([points.centres - 4, points.centres + 4], dim=-1)[None]
    boxes = torch.tensor([[[100.0, 100, 228, 130], [300, 300, 320, 430], [10, 10, 610, 610]]])
    arguments = (
        torch.zeros(1, len(points.strides), 2),
        None,
        predicted,
        boxes,
        torch.zeros(1, 3, dtype=torch.long),
        points,
    )
    for name, counts in (("centre", (4, 6, 9)), ("centre_cell", (1,))):  # 2 or 3 cells along an axis
        assignment = ASSIGNERS[name](*arguments)
        for row, stride in enumerate((8, 16, 32)):
            own = assignment.positive[0] & (assignment.gt[0] == row)
            assert set(points.strides[own].tolist()) == {stride}
            assert int(own.sum()) in counts


@pytest.mark.parametrize("name", SLOW)
def test_a_box_with_its_centre_in_the_image_has_a_prediction(name: str) -> None:
    """Alone, wherever it lies and however small it is, and however far its prediction is."""
    for seed in range(100):
        case = point_case(seed, counts=(1, 1), strides=(8, 16, 32) if seed % 2 else (16, 32))
        tiny = case.boxes[1, 0].clone()
        tiny[2:] = tiny[:2] + 0.01
        case.boxes[1, 0] = tiny
        assignment = case.run(ASSIGNERS[name])
        assert assignment.positive.any(dim=1).all()


@pytest.mark.parametrize("name", SLOW)
def test_static_shapes_without_host_reads(name: str) -> None:
    """As many operations for no box as for thirty, and no tensor over boxes, points and classes together."""
    counts = []
    full = point_case(1, counts=(30, 30), num_classes=50)
    for case in (full, full._replace(labels=torch.full_like(full.labels, -1))):
        with OperationTrace() as trace, LargestTensor() as made:
            case.run(ASSIGNERS[name])
        assert not trace.host_reads
        counts.append(len(trace.operations))
        assert made.elements <= case.classes.numel()  # 50 classes are more than 32 boxes
    assert counts[0] == counts[1] < 120
