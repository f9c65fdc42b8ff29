"""The quality-aligned criterion against a plain loop, and its decoding of distributions by hand."""

import math

import pytest
import torch
from torch import Tensor

from benchmarks.support.operation_trace import OperationTrace
from detection.contract import CROWD_LABEL, PADDING_LABEL
from detection.models.yolox.aligned import AlignedLoss
from detection.models.yolox.assigners.atss import assign_atss
from detection.models.yolox.assigners.soft_label import assign_soft_label
from detection.models.yolox.assigners.task_aligned import assign_task_aligned
from detection.models.yolox.layout import OutputLayout, decode_distribution
from detection.models.yolox.points import make_points
from tests.support.assignment_scenes import CLASSES, SIZE, STRIDES, random_scene

BINS = 9
LAYOUTS = {"plain": OutputLayout(4, False), "distribution": OutputLayout(4 * BINS, False, "distribution")}


def make_case(seed: int, layout: OutputLayout) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Raw outputs of three levels with gradient, and targets with padding, crowds and, for some seeds, no box."""
    generator = torch.Generator().manual_seed(seed)
    scene = random_scene(seed, images=2)
    outputs = []
    for stride in STRIDES:
        cells = SIZE // stride
        raw = torch.randn(2, 1, cells, cells, layout.box_values + CLASSES, generator=generator)
        outputs.append(raw.requires_grad_())
    return outputs, {"boxes": scene.boxes, "labels": scene.labels}


def slow_giou(one: list[float], other: list[float]) -> float:
    width = max(min(one[2], other[2]) - max(one[0], other[0]), 0.0)
    height = max(min(one[3], other[3]) - max(one[1], other[1]), 0.0)
    shared = width * height
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - shared
    hull = (max(one[2], other[2]) - min(one[0], other[0])) * (max(one[3], other[3]) - min(one[1], other[1]))
    return shared / union - (hull - union) / hull


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("class_loss", ["quality_focal", "varifocal"])
@pytest.mark.parametrize("balance", ["predictions", "objects"])
def test_losses_against_a_loop(kind: str, class_loss: str, balance: str) -> None:
    layout = LAYOUTS[kind]
    with_boxes = 0
    for seed in range(1, 20):
        criterion = AlignedLoss(layout, STRIDES, assign_soft_label, (2.0, 1.0, 0.5), class_loss, balance)
        outputs, targets = make_case(seed, layout)
        raw, points, predicted, boxes, labels, assigned = criterion.assign(outputs, targets["boxes"], targets["labels"])
        classes_sum = box_sum = distribution_sum = quality_sum = 0.0
        of_classes: dict[tuple[int, int], float] = {}  # sum over the predictions of each ground-truth box
        of_objects: dict[
            tuple[int, int], list[tuple[float, float]]
        ] = {}  # losses of each ground-truth box's predictions
        for image in range(2):
            crowds = boxes[image][labels[image] == CROWD_LABEL].tolist()
            for place in range(len(points.strides)):
                box = predicted[image, place].tolist()
                positive = bool(assigned.positive[image, place])
                row, q = int(assigned.gt[image, place]), float(assigned.quality[image, place])
                inside = max((share_inside(box, crowd) for crowd in crowds), default=0.0)
                for label, z in enumerate(raw.classes[image, place].tolist()):
                    y = q if positive and label == int(labels[image, row]) else 0.0
                    p = 1 / (1 + math.exp(-z))
                    cross_entropy = -(y * math.log(p) + (1 - y) * math.log(1 - p))
                    weight = (y - p) ** 2 if class_loss == "quality_focal" else y or 0.75 * p**2
                    if positive:
                        of_classes[image, row] = of_classes.get((image, row), 0.0) + weight * cross_entropy
                    elif inside <= 0.5:
                        classes_sum += weight * cross_entropy
                if not positive:
                    continue
                wanted = boxes[image, row].tolist()
                quality_sum += q
                distance, of_box = 0.0, 1 - slow_giou(box, wanted)
                box_sum += q * of_box
                if kind == "distribution":
                    x, y = points.centres[place].tolist()
                    stride = float(points.strides[place])
                    sides = [(x - wanted[0]), (y - wanted[1]), (wanted[2] - x), (wanted[3] - y)]
                    logits = raw.boxes[image, place].view(4, BINS).double().log_softmax(-1).tolist()
                    for side, logarithms in zip(sides, logits, strict=True):
                        target = min(max(side / stride, 0.0), BINS - 1.01)
                        lower = int(target)
                        part = target - lower
                        distance -= ((1 - part) * logarithms[lower] + part * logarithms[lower + 1]) / 4
                distribution_sum += q * distance
                of_objects.setdefault((image, row), []).append((of_box, distance))
        normaliser = max(quality_sum, 1.0)
        box_sum, distribution_sum = box_sum / normaliser, distribution_sum / normaliser
        factors = dict.fromkeys(of_objects, 1.0)
        if balance == "objects":
            mean = sum(len(pairs) for pairs in of_objects.values()) / len(of_objects)
            factors = {key: mean / len(pairs) for key, pairs in of_objects.items()}
            means = [
                [sum(values) / len(values) for values in zip(*pairs, strict=True)] for pairs in of_objects.values()
            ]
            box_sum, distribution_sum = (sum(column) / len(means) for column in zip(*means, strict=True))
        classes_sum += sum(factors[key] * loss for key, loss in of_classes.items())
        expected = {"loss_box": 2 * box_sum, "loss_class": classes_sum / normaliser}
        if kind == "distribution":
            expected["loss_distribution"] = 0.5 * distribution_sum
        losses = criterion(outputs, targets)
        assert {name: float(loss.detach()) for name, loss in losses.items()} == pytest.approx(
            expected, rel=2e-4, abs=1e-5
        )
        with_boxes += quality_sum > 1  # elsewhere the normaliser is 1
    assert with_boxes > 2


def share_inside(box: list[float], crowd: list[float]) -> float:
    width = max(min(box[2], crowd[2]) - max(box[0], crowd[0]), 0.0)
    height = max(min(box[3], crowd[3]) - max(box[1], crowd[1]), 0.0)
    return width * height / max((box[2] - box[0]) * (box[3] - box[1]), 1e-9)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_finite_whatever_the_boxes(kind: str, scale: float) -> None:
    """Empty images, targets without rows, extreme raw values: losses and gradients are finite and not all zero."""
    layout = LAYOUTS[kind]
    for seed, rows in ((0, None), (4, None), (5, 0)):
        criterion = AlignedLoss(layout, STRIDES, assign_task_aligned, balance="objects" if seed else "predictions")
        outputs, targets = make_case(seed, layout)
        if rows == 0:
            targets = {"boxes": torch.zeros(2, 0, 4), "labels": torch.zeros(2, 0, dtype=torch.int64)}
        elif seed == 4:
            targets["labels"][:] = PADDING_LABEL
        losses = criterion([scale * output for output in outputs], targets)
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values())
        assert all(output.grad is not None and output.grad.isfinite().all() for output in outputs)
        assert any(bool(output.grad.any()) for output in outputs)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_operations_and_host_reads(kind: str) -> None:
    criterion = AlignedLoss(LAYOUTS[kind], STRIDES, assign_soft_label, balance="objects")
    outputs, targets = make_case(1, LAYOUTS[kind])
    criterion(outputs, targets)  # the table of points is made once per size
    with OperationTrace() as trace:
        sum(criterion(outputs, targets).values()).backward()
    assert not trace.host_reads and len(trace.operations) <= 450


def test_atss_assigns_in_the_first_share_of_the_run() -> None:
    criterion = AlignedLoss(LAYOUTS["plain"], STRIDES, assign_task_aligned, atss_share=0.33)
    chosen = []
    for share in (0.0, 0.32, 0.33, 0.9):
        criterion.set_progress(share, False)
        chosen.append(criterion.assigner)
    assert chosen == [assign_atss, assign_atss, assign_task_aligned, assign_task_aligned]


def test_distributions_by_hand() -> None:
    """Three bins of equal weight are 1 stride; all weight on bin 2 is 2 strides; point (24, 8) of stride 16."""
    raw = torch.zeros(1, 8, 12)
    raw[0, 1, 5] = 1e4  # top: bin 2
    raw[0, 1, 9] = math.log(2)  # bottom: bins 1, 1, 2 ... of the right side below
    points = make_points([16], [(2, 4)], "cpu")
    left, right = 16.0, 16.0
    bottom = 16 * (0 * 2 + 1 + 2) / 4
    expected = [24 - left, 8 - 32.0, 24 + right, 8 + bottom]
    torch.testing.assert_close(decode_distribution(raw, points)[0, 1], torch.tensor(expected))


def test_untrained_distributions_have_the_wanted_mean() -> None:
    """Sides of two strides to each side of the point; the 17 bins cut off (2/3)^17 = 0.1 % of the distribution."""
    raw = OutputLayout(4 * 17, False, "distribution").initial_bias(4.0).expand(1, 1, -1)
    box = decode_distribution(raw, make_points([16], [(1, 1)], "cpu"))[0, 0]
    torch.testing.assert_close(box, torch.tensor([8 - 32.0, 8 - 32.0, 8 + 32.0, 8 + 32.0]), atol=0.7, rtol=0)
