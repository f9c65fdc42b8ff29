"""The loss of YOLOX against a plain loop over predictions, and what it must bear."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.support.operation_trace import OperationTrace
from detection.models.yolox import ASSIGNERS, CRITERIA, YOLOXLoss
from detection.models.yolox.layout import Decoding, OutputLayout, decode_centre_size
from detection.models.yolox.points import make_points
from detection.models.yolox.postprocess import PointPostprocess
from tests.support.point_cases import STRIDES, point_case
from tests.support.slow_boxes import slow_intersection, slow_iou

HEIGHT, WIDTH, CLASSES = 64, 96, 3
NAMES = ("loss_box", "loss_objectness", "loss_class", "loss_l1")


def outputs_of(seed: int, images: int, spread: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(images, 1, HEIGHT // stride, WIDTH // stride, 5 + CLASSES, generator=generator) * spread
        for stride in STRIDES
    ]


def criterion_of(assigner: str = "simota", **arguments: Any) -> YOLOXLoss:
    return YOLOXLoss(OutputLayout(), STRIDES, ASSIGNERS[assigner], **arguments)


def slow_losses(criterion: YOLOXLoss, outputs: list[Tensor], boxes: Tensor, labels: Tensor) -> list[float]:
    """Box, objectness, class and L1 loss in plain numbers; only the assignment is the criterion's."""
    *_, assignment = criterion.assign(outputs, boxes, labels)
    sums, count = [0.0] * 4, 0
    for image in range(len(labels)):
        point = 0
        for stride, output in zip(STRIDES, outputs, strict=True):
            for row, line in enumerate(output[image, 0].tolist()):
                for column, (tx, ty, tw, th, objectness, *logits) in enumerate(line):
                    x, y, w, h = (
                        (column + tx) * stride,
                        (row + ty) * stride,
                        math.exp(tw) * stride,
                        math.exp(th) * stride,
                    )
                    predicted = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
                    positive = bool(assignment.positive[image, point])
                    crowds = [
                        box for box, label in zip(boxes[image].tolist(), labels[image], strict=True) if label == -2
                    ]
                    if positive or not any(slow_intersection(predicted, box) > 0.5 * w * h for box in crowds):
                        sums[1] += cross_entropy(objectness, float(positive))
                    if positive:
                        count += 1
                        gt = int(assignment.gt[image, point])
                        x1, y1, x2, y2 = boxes[image, gt].tolist()
                        iou = slow_iou(predicted, [x1, y1, x2, y2])
                        sums[0] += 1 - iou**2
                        for number, logit in enumerate(logits):
                            sums[2] += cross_entropy(logit, iou if number == labels[image, gt] else 0.0)
                        sums[3] += abs(tx - ((x1 + x2) / 2 / stride - column)) + abs(
                            ty - ((y1 + y2) / 2 / stride - row)
                        )
                        sums[3] += abs(tw - math.log((x2 - x1) / stride)) + abs(th - math.log((y2 - y1) / stride))
                    point += 1
    return [value * weight / max(count, 1) for value, weight in zip(sums, criterion.weights, strict=True)]


def cross_entropy(logit: float, target: float) -> float:
    return math.log1p(math.exp(logit)) - target * logit


@pytest.mark.parametrize("assigner", ASSIGNERS)
@pytest.mark.parametrize("counts", [(7, 3, 0), (0, 0), (1,)])
def test_losses_equal_the_loop(assigner: str, counts: tuple[int, ...]) -> None:
    for seed in range(5):
        case, outputs = point_case(seed, counts=counts), outputs_of(seed, len(counts))
        criterion = criterion_of(assigner, weights=(5.0, 1.0, 2.0, 0.5) if seed else (5.0, 1.0, 1.0, 1.0))
        expected = slow_losses(criterion, outputs, case.boxes, case.labels)
        targets = {"boxes": case.boxes, "labels": case.labels}
        before = criterion(outputs, targets)
        assert tuple(before) == NAMES and before["loss_l1"].item() == 0
        assert [before[name].item() for name in NAMES[:3]] == pytest.approx(expected[:3], rel=1e-4, abs=1e-5)
        criterion.set_progress(0.9, True)
        after = criterion(outputs, targets)
        assert [after[name].item() for name in NAMES] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_negative_in_a_crowd_region_has_no_loss() -> None:
    outputs = [torch.zeros(1, 1, HEIGHT // stride, WIDTH // stride, 6) for stride in STRIDES]
    whole = torch.tensor([[[-50.0, -50, 200, 200]]])
    for label, points in ((-1, 96 + 24 + 6), (-2, 0)):
        loss = criterion_of()(outputs, {"boxes": whole, "labels": torch.tensor([[label]])})
        assert loss["loss_objectness"].item() == pytest.approx(points * math.log(2))


def exact_outputs(boxes: list[list[float]], cells: list[tuple[int, int, int]]) -> list[Tensor]:
    """Outputs of one image whose prediction at (level, row, column) is the box, of class 0; the rest is background."""
    outputs = [torch.zeros(1, 1, HEIGHT // stride, WIDTH // stride, 6) for stride in STRIDES]
    for output in outputs:
        output[..., 2:4], output[..., 4:] = -4, -20
    for (x1, y1, x2, y2), (level, row, column) in zip(boxes, cells, strict=True):
        stride = STRIDES[level]
        centre = [(x1 + x2) / 2 / stride - column, (y1 + y2) / 2 / stride - row]
        size = [math.log((x2 - x1) / stride), math.log((y2 - y1) / stride)]
        outputs[level][0, 0, row, column] = torch.tensor([*centre, *size, 20, 20])
    return outputs


def test_exact_predictions_cost_nothing() -> None:
    boxes, cells = [[10.0, 10, 30, 34], [50.0, 4, 90, 40]], [(0, 2, 2), (2, 0, 2)]
    criterion = criterion_of()
    criterion.set_progress(1.0, True)
    losses = criterion(
        exact_outputs(boxes, cells), {"boxes": torch.tensor([boxes]), "labels": torch.zeros(1, 2, dtype=torch.long)}
    )
    assert [loss.item() for loss in losses.values()] == pytest.approx([0, 0, 0, 0], abs=1e-5)
    found = criterion.assigned_by_outputs(exact_outputs(boxes, cells), torch.tensor([boxes]), torch.zeros(1, 2).long())
    assert [(one.gt, one.level, one.row, one.column, one.stride) for one in found] == [
        (0, 0, 2, 2, 8),
        (1, 2, 0, 2, 32),
    ]
    assert {one.anchor_size for one in found} == {None}


HARD = {
    "no row": (torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.long)),
    "padding": (torch.full((2, 3, 4), 1e9), torch.full((2, 3), -1)),
    "crowd": (torch.tensor([[[0.0, 0, 90, 60]]] * 2), torch.full((2, 1), -2)),
    "without area": (torch.tensor([[[20.0, 20, 20, 20], [0, 0, 0, 30]]] * 2), torch.zeros(2, 2, dtype=torch.long)),
    "tiny": (torch.tensor([[[20.0, 20, 20.001, 20.001], [0, 0, 1e-6, 1e-6]]] * 2), torch.ones(2, 2, dtype=torch.long)),
    "outside": (torch.tensor([[[500.0, 500, 600, 600]]] * 2), torch.ones(2, 1, dtype=torch.long)),
}


@pytest.mark.parametrize("spread", [1.0, 300.0])
@pytest.mark.parametrize("kind", HARD)
def test_losses_and_gradients_are_finite(kind: str, spread: float) -> None:
    boxes, labels = HARD[kind]
    for assigner in ASSIGNERS:
        criterion = criterion_of(assigner)
        criterion.set_progress(1.0, True)
        outputs = [output.requires_grad_() for output in outputs_of(3, 2, spread)]
        losses = criterion(outputs, {"boxes": boxes, "labels": labels})
        torch.stack(list(losses.values())).sum().backward()
        assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
        assert all(output.grad is not None and output.grad.isfinite().all() for output in outputs)


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("loss", CRITERIA)
def test_a_step_takes_few_operations_and_reads_nothing(
    loss: str, pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same number whatever the boxes, also where a large batch is compared in pieces."""
    if pieces:
        monkeypatch.setattr("detection.models.yolo.criterion.max_chunk_elements", lambda device: 1)
    counts = []
    for real in (0, 30):
        labels = torch.full((3, 32), -1)
        labels[:, :real] = 1
        corner = torch.rand(3, 32, 2) * 50
        targets = {"boxes": torch.cat([corner, corner + 9], dim=-1), "labels": labels}
        criterion = CRITERIA[loss](OutputLayout(), STRIDES, ASSIGNERS["simota"])
        criterion.set_progress(1.0, True)
        outputs = [output.requires_grad_() for output in outputs_of(1, 3)]
        criterion(outputs, targets)  # makes the points
        with OperationTrace() as trace:
            torch.stack(list(criterion(outputs, targets).values())).sum().backward()
        assert not trace.host_reads
        counts.append(len(trace.operations))
    assert counts[0] == counts[1] <= 450


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_are_compared_in_float32(dtype: torch.dtype) -> None:
    case = point_case(2)
    targets = {"boxes": case.boxes, "labels": case.labels}
    outputs = [output.to(dtype) for output in outputs_of(2, 3)]
    expected = criterion_of()([output.float() for output in outputs], targets)
    with torch.autocast("cpu", torch.bfloat16):
        found = criterion_of()(outputs, targets)
    assert {name: value.item() for name, value in found.items()} == {
        name: value.item() for name, value in expected.items()
    }


# Decoding


def test_decode_by_hand() -> None:
    """Cell (column 2, row 1) of stride 16: centre (2.5, 0.75) cells, 2 x 1/2 strides; raw 0: its corner, 1 x 1."""
    points = make_points((16,), [(2, 3)], "cpu")
    raw = torch.zeros(1, 6, 4)
    raw[0, 5] = torch.tensor([0.5, -0.25, math.log(2), -math.log(2)])
    boxes = decode_centre_size(raw, points)[0]
    assert boxes[5].tolist() == pytest.approx([40 - 16, 12 - 4, 40 + 16, 12 + 4])
    assert boxes[4].tolist() == pytest.approx([16 - 8, 16 - 8, 16 + 8, 16 + 8])
    assert points.centres[5].tolist() == [40, 24] and points.cells[5].tolist() == [2, 1]
    assert decode_centre_size(raw + 1e30, points).isfinite().all()


@pytest.mark.parametrize("objectness", [True, False])
def test_scores_and_order(objectness: bool) -> None:
    """Levels by ascending stride, rows, columns; the layout says whether there is an objectness."""
    layout = OutputLayout(objectness=objectness)
    outputs = [output if objectness else output[..., :-1] for output in outputs_of(4, 2)]
    boxes, scores = PointPostprocess(layout, STRIDES).decode(outputs)
    for level, first, stride in ((0, 0, 8), (1, 96, 16), (2, 120, 32)):
        rows, columns = HEIGHT // stride, WIDTH // stride
        values = outputs[level][1, 0, rows - 1, 1]
        point = first + (rows - 1) * columns + 1
        likely = values[5:].sigmoid() * values[4].sigmoid() if objectness else values[4:].sigmoid()
        assert torch.allclose(scores[1, point], likely)
        centre = (boxes[1, point, :2] + boxes[1, point, 2:]) / 2
        assert centre.tolist() == pytest.approx(
            [(1 + values[0].item()) * stride, (rows - 1 + values[1].item()) * stride], abs=1e-3
        )
    assert OutputLayout(**layout.metadata()) == layout


def test_points_are_made_once_for_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    decoding = Decoding(OutputLayout(), STRIDES)
    first: Callable[..., Any] = lambda size: decoding.points([(size, size)] * 3, torch.device("cpu"))  # noqa: E731
    assert first(4) is first(4) and first(4) is not first(5)
