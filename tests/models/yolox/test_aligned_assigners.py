"""The assigners of quality-aligned training against plain loops over images, boxes and points."""

import math
import statistics
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from benchmarks.support.operation_trace import OperationTrace
from detection.contract import PADDING_LABEL
from detection.models.yolox.assigners import Assigner
from detection.models.yolox.assigners.atss import assign_atss
from detection.models.yolox.assigners.soft_label import assign_soft_label
from detection.models.yolox.assigners.task_aligned import assign_aligned_half, assign_one_to_one, assign_task_aligned
from tests.support.assignment_scenes import (
    CLASSES,
    Scene,
    box_iou,
    in_centre_cell,
    random_scene,
    settle_by_loop,
    strictly_inside,
)

Loop = Callable[[Scene, int], tuple[dict[int, int], dict[tuple[int, int], float]]]


def image_of(scene: Scene, image: int) -> tuple[list, list, list, list, dict[int, list[float]], list[int]]:
    """Points, strides, probabilities, predicted boxes, ground truth by row, and its labels, of one image."""
    labels = scene.labels[image].tolist()
    boxes = {row: scene.boxes[image, row].tolist() for row, label in enumerate(labels) if label >= 0}
    probabilities = scene.class_logits[image].double().sigmoid().tolist()
    predicted = scene.predicted[image].tolist()
    return scene.points.centres.tolist(), scene.points.strides.tolist(), probabilities, predicted, boxes, labels


def loop_soft_label(scene: Scene, image: int) -> tuple[dict[int, int], dict[tuple[int, int], float]]:
    points, strides, probabilities, predicted, boxes, labels = image_of(scene, image)
    cost, quality, chosen = {}, {}, {}
    for row, box in boxes.items():
        candidates = [
            place
            for place, point in enumerate(points)
            if any(strictly_inside(point, other) for other in boxes.values())
            or in_centre_cell(point, strides[place], box)
        ]
        for place in candidates:
            iou = quality[row, place] = box_iou(box, predicted[place])
            classes = 0.0
            for label, p in enumerate(probabilities[place]):
                y = iou if label == labels[row] else 0.0
                classes += -(y * math.log(p) + (1 - y) * math.log(1 - p)) * abs(y - p) ** 2
            centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
            distance = math.dist(points[place], centre) / strides[place]
            cost[row, place] = classes - 3 * math.log(iou + 1e-7) + 10 ** (distance - 3)
        k = max(int(sum(sorted((quality[row, place] for place in candidates), reverse=True)[:13])), 1)
        chosen[row] = sorted(candidates, key=lambda place: cost[row, place])[:k]
    return settle_by_loop(chosen, cost), quality


def loop_task_aligned(alpha: float, beta: float, most: int) -> Loop:
    def loop(scene: Scene, image: int) -> tuple[dict[int, int], dict[tuple[int, int], float]]:
        points, strides, probabilities, predicted, boxes, labels = image_of(scene, image)
        key, quality, chosen = {}, {}, {}
        for row, box in boxes.items():
            candidates = [place for place, point in enumerate(points) if strictly_inside(point, box)]
            if not candidates:
                candidates = [place for place, point in enumerate(points) if in_centre_cell(point, strides[place], box)]
            iou = {place: box_iou(box, predicted[place]) for place in candidates}
            t = {place: probabilities[place][labels[row]] ** alpha * iou[place] ** beta for place in candidates}
            best = sorted(candidates, key=lambda place: -t[place])[:most]
            chosen[row] = [place for place in best if t[place] > 0] or best[:1]
            highest, overlap = max(t[p] for p in chosen[row]), max(iou[p] for p in chosen[row])
            for place in chosen[row]:
                key[row, place] = 1 - iou[place]
                quality[row, place] = t[place] / (highest + 1e-9) * overlap
        return settle_by_loop(chosen, key), quality

    return loop


def loop_atss(scene: Scene, image: int) -> tuple[dict[int, int], dict[tuple[int, int], float]]:
    points, strides, _, predicted, boxes, _ = image_of(scene, image)
    key, quality, chosen = {}, {}, {}
    for row, box in boxes.items():
        centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        candidates: list[int] = []
        for stride in sorted(set(strides)):
            of_level = [place for place in range(len(points)) if strides[place] == stride]
            candidates += sorted(of_level, key=lambda place: math.dist(points[place], centre))[:9]
        iou = {}
        for place in candidates:
            (x, y), half = points[place], 2.5 * strides[place]
            iou[place] = box_iou(box, [x - half, y - half, x + half, y + half])
        threshold = statistics.mean(iou.values()) + statistics.stdev(iou.values())
        chosen[row] = [p for p in candidates if iou[p] >= threshold and strictly_inside(points[p], box)]
        chosen[row] = chosen[row] or [max(candidates, key=lambda p: (iou[p], -math.dist(points[p], centre)))]
        for place in chosen[row]:
            key[row, place], quality[row, place] = -iou[place], box_iou(box, predicted[place])
    return settle_by_loop(chosen, key), quality


CASES: dict[str, tuple[Assigner, Loop]] = {
    "soft_label": (assign_soft_label, loop_soft_label),
    "task_aligned": (assign_task_aligned, loop_task_aligned(1.0, 6.0, 13)),
    "aligned_half": (assign_aligned_half, loop_task_aligned(0.5, 6.0, 10)),
    "one_to_one": (assign_one_to_one, loop_task_aligned(0.5, 6.0, 1)),
    "atss": (assign_atss, loop_atss),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_a_plain_loop(name: str) -> None:
    """Two hundred images: padding, crowds, empty images, boxes of one pixel, boxes beyond the border."""
    assign, loop = CASES[name]
    compared = differing = 0
    for seed in range(67):
        scene = random_scene(seed)
        assigned = assign(*scene.arguments())
        for image in range(len(scene.labels)):
            winner, quality = loop(scene, image)
            positive = assigned.positive[image].nonzero().flatten().tolist()
            compared += 1
            # A cost may be equal to single precision, a sum of IoUs may be a whole number: rare, never hidden.
            if {place: int(assigned.gt[image, place]) for place in positive} != winner:
                differing += 1
                continue
            for place, row in winner.items():
                assert float(assigned.quality[image, place]) == pytest.approx(quality[row, place], abs=2e-4)
            others = ~assigned.positive[image]
            assert not assigned.gt[image][others].any() and not assigned.quality[image][others].any()
    assert compared == 201 and differing <= 1


@pytest.mark.parametrize("name", CASES)
def test_of_equal_predictions_the_first(name: str) -> None:
    """An untrained head predicts the same everywhere; boxes of whole pixels then have many predictions alike."""
    assign, loop = CASES[name]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scene = random_scene(1)
        half = scene.points.strides[:, None] * 2
        predicted = torch.cat([scene.points.centres - half, scene.points.centres + half], dim=-1).expand(3, -1, -1)
        start = 4 * torch.randint(0, 12, (3, 6, 2), generator=generator)
        side = 8 * torch.randint(1, 4, (3, 6, 2), generator=generator)
        boxes = torch.cat([start, start + side], dim=-1).float()
        scene = replace(
            scene, class_logits=torch.full_like(scene.class_logits, -2.0), predicted=predicted, boxes=boxes,
            labels=torch.randint(0, CLASSES, (3, 6), generator=generator),
        )  # fmt: skip
        assigned = assign(*scene.arguments())
        for image in range(3):
            positive = assigned.positive[image].nonzero().flatten().tolist()
            winner, _ = loop(scene, image)
            assert {place: int(assigned.gt[image, place]) for place in positive} == winner


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "box", [[30.0, 30.0, 31.0, 31.0], [0.0, 0.0, 1.5, 1.0], [63.0, 2.0, 64.0, 60.0], [1, 1, 63, 63]]
)
def test_a_lone_box_with_its_centre_inside_has_a_positive(name: str, box: list[float]) -> None:
    """However small, and also if no prediction overlaps it."""
    for seed in range(5):
        scene = random_scene(seed)
        scene.labels[:] = PADDING_LABEL
        scene.labels[:, 2], scene.boxes[:, 2] = 1, torch.tensor(box)
        scene.predicted[1] = torch.tensor([-9.0, -9.0, -8.0, -8.0])
        assigned = CASES[name][0](*scene.arguments())
        assert (assigned.positive.sum(1) >= 1).all()
        assert (assigned.gt[assigned.positive] == 2).all()


@pytest.mark.parametrize("name", CASES)
def test_equal_boxes_go_to_the_first(name: str) -> None:
    scene = random_scene(3)
    scene.labels[:] = PADDING_LABEL
    scene.labels[:, [1, 4]], scene.boxes[:, [1, 4]] = 0, torch.tensor([10.0, 12.0, 40.0, 44.0])
    assigned = CASES[name][0](*scene.arguments())
    assert assigned.positive.any(1).all() and (assigned.gt[assigned.positive] == 1).all()


@pytest.mark.parametrize("name", CASES)
def test_few_operations_and_no_host_read(name: str) -> None:
    counts = []
    for rows in (1, 40):
        scene = random_scene(1, images=2, rows=rows)
        with OperationTrace() as trace:
            assigned = CASES[name][0](*scene.arguments())
        assert not trace.host_reads
        counts.append(len(trace.operations))
        assert assigned.positive.shape == (2, 84)
    assert counts[0] == counts[1] < 215  # ATSS chooses on each of three levels


@pytest.mark.parametrize("name", CASES)
def test_bad_predictions_choose_nothing_else(name: str) -> None:
    """Infinite and inverted boxes of an early step leave the quality finite."""
    scene = random_scene(2)
    scene.predicted[0, ::2] = torch.tensor([-torch.inf, -torch.inf, torch.inf, torch.inf])
    scene.predicted[0, 1::2] = torch.tensor([9.0, 9.0, 3.0, 3.0])
    assigned = CASES[name][0](*scene.arguments())
    assert assigned.quality.isfinite().all() and (assigned.quality >= 0).all() and (assigned.quality <= 1).all()
