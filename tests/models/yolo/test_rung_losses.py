"""Criteria `freebies`, `iou` and `multi`, and the choices of `LossOptions`, against loops of plain Python numbers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.support.operation_trace import OperationTrace
from detection.models.levels import flatten_levels
from detection.models.yolo import CRITERIA
from detection.models.yolo.criterion import Criterion
from detection.models.yolo.loss_options import LossOptions
from tests.support.loss_cases import (
    Case,
    all_predictions,
    box_targets,
    cross_entropy_of_bit,
    darknet_deltas,
    decode,
    is_ignored,
    last_gt,
    sigmoid,
    to_cxcywh,
)
from tests.support.multi_claims import Place, slow_claims
from tests.support.slow_boxes import slow_complete_iou, slow_efficient_iou, slow_iou, slow_plain_iou

CASES: list[tuple[Any, ...]] = [  # arguments of `Case`
    ("three levels", 4, [6, 0, 17], 0, 0.7),
    ("two levels", 1, [20], 4, 0.5),
    ("unequal levels", 2, [13, 20], 5, 0.6, 0.6, (96, 64), 1.05),
]


# freebies and iou


@pytest.mark.parametrize("arguments", CASES)
def test_freebies_gradients_against_loop(arguments: tuple[Any, ...]) -> None:
    """Darknet's, but for width and height: s times the sign of the difference."""
    case = Case(*arguments, loss="freebies")
    expected = [-delta for delta in darknet_deltas(case)]
    for image, (level, *position), box in last_gt(case):
        targets, s = box_targets(case, box)
        raw = case.outputs[level][(image, *position)].tolist()
        for number in (2, 3):
            expected[level][(image, *position, number)] = s * math.copysign(1, raw[number] - targets[number])
    for gradient, wanted in zip(case.gradients()[1], expected, strict=True):
        torch.testing.assert_close(gradient.double(), wanted, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("box_loss", [None, "eiou"])
@pytest.mark.parametrize("arguments", CASES)
def test_iou_loss_against_loop(arguments: tuple[Any, ...], box_loss: str | None) -> None:
    case = Case(*arguments, loss="iou")
    total = 0.0
    for image, place, box in last_gt(case):
        level, *position = place
        raw = case.outputs[level][(image, *position)].tolist()
        (tx, ty, tw, th), s = box_targets(case, box)
        predicted, gt = to_cxcywh(decode(case, raw, *place)), to_cxcywh(box)
        overlap = slow_plain_iou(predicted, gt) ** 2 if box_loss is None else slow_efficient_iou(predicted, gt)
        centre = cross_entropy_of_bit(raw[0], tx) + cross_entropy_of_bit(raw[1], ty)
        total += s * (centre + abs(raw[2] - tw) + abs(raw[3] - th) + 2.5 * (1 - overlap))
    losses = case.criterion(options=LossOptions(box_loss=box_loss))(case.outputs, case.targets())
    assert losses["loss_box"].item() == pytest.approx(total / len(case.boxes), rel=1e-5)
    darknet = Case(*arguments).criterion()(case.outputs, case.targets())
    assert losses["loss_objectness"] == darknet["loss_objectness"] and losses["loss_class"] == darknet["loss_class"]


# multi

FORMS = [
    {"anchor_match": "iou"},
    {"anchor_match": "ratio", "neighbour_cells": True, "new_coords": True, "scale_xy": 2.0, "objectness_target": "iou"},
    {
        "anchor_match": "best",
        "neighbour_cells": True,
        "scale_xy": 2.0,
        "objectness_balance": (4.0, 1.0, 0.4),
        "box_loss": "eiou",
    },
    {"anchor_match": "iou", "iou_aware": True, "label_smoothing": 0.1, "objectness_balance": (1.0, 2.0, 3.0)},
]


def decode_place(case: Case, raw: list[float], place: Place, new_coords: bool) -> list[float]:
    if not new_coords:
        return decode(case, raw, *place)
    level, anchor, _, _ = place
    sides = [
        side * (2 * sigmoid(value)) ** 2 for side, value in zip(case.anchors[level][anchor], raw[2:4], strict=True)
    ]
    x1, y1, x2, y2 = decode(case, [*raw[:2], 0.0, 0.0], *place)
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    return [x - sides[0] / 2, y - sides[1] / 2, x + sides[0] / 2, y + sides[1] / 2]


def multi_by_loop(case: Case, form: dict[str, Any]) -> dict[str, float]:
    """The four losses of the formulas in docs/losses.md."""
    new_coords, iou_aware = form.get("new_coords", False), form.get("iou_aware", False)
    smoothing, first_class = form.get("label_smoothing", 0.0), 6 if iou_aware else 5
    box_loss = class_loss = iou_loss = positives = assigned = 0.0
    objectness: list[list[float]] = [[] for _ in case.strides]
    for image in range(len(case.boxes)):
        boxes, labels = case.boxes[image].tolist(), case.labels[image].tolist()
        match, neighbours = form["anchor_match"], form.get("neighbour_cells", False)
        size = case.width, case.height
        found = slow_claims(case.anchors, case.strides, size, boxes, labels, match, neighbours)
        positives, assigned = positives + len(found), assigned + len(set(found.values()))
        for place in all_predictions(case):
            level, *position = place
            raw = case.outputs[level][(image, *position)].tolist()
            predicted = decode_place(case, raw, place, new_coords)
            if place not in found:
                loss = 0.0 if is_ignored(case, image, predicted) else cross_entropy_of_bit(raw[4], 0)
                objectness[level].append(loss)
                continue
            gt, label = to_cxcywh(boxes[found[place]]), labels[found[place]]
            overlap = slow_efficient_iou if form.get("box_loss") else slow_complete_iou
            box_loss += 1 - overlap(to_cxcywh(predicted), gt)
            iou = slow_plain_iou(to_cxcywh(predicted), gt)
            target = iou if form.get("objectness_target") == "iou" else 1
            objectness[level].append(cross_entropy_of_bit(raw[4], target))
            for number, logit in enumerate(raw[first_class:]):
                class_loss += cross_entropy_of_bit(logit, 1 - smoothing if number == label else smoothing)
            if iou_aware:
                iou_loss += cross_entropy_of_bit(raw[5], iou)
    images, every = len(case.boxes), sum(map(len, objectness))
    total = sum(map(sum, objectness))
    if balance := form.get("objectness_balance"):
        means = [sum(losses) / len(losses) for losses in objectness]
        total = sum(weight * mean for weight, mean in zip(balance, means, strict=True)) / sum(balance) * every
    divisor = images * max(positives / max(assigned, 1), 1)
    losses = {"loss_box": box_loss, "loss_objectness": total, "loss_class": class_loss}
    losses |= {"loss_iou": iou_loss} if iou_aware else {}
    return {name: loss / divisor for name, loss in losses.items()}


def multi_case(form: dict[str, Any], counts: list[int], seed: int) -> tuple[Case, Criterion]:
    case = Case("three levels", 3, counts, seed, scale_xy=form.get("scale_xy", 1.0), loss="multi")
    case.boxes = (case.boxes * 16).round() / 16  # see test_multi_assignment.random_targets
    if form.get("iou_aware"):
        case.outputs = [torch.cat([output, torch.randn(*output.shape[:-1], 1)], dim=-1) for output in case.outputs]
    options = {name: value for name, value in form.items() if name in LossOptions.__annotations__}
    layout = {name: form[name] for name in ("new_coords", "iou_aware") if name in form}
    return case, case.criterion(options=LossOptions(**options), **layout)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form))
@pytest.mark.parametrize(("counts", "seed"), [([6, 0, 17], 0), ([0], 1), ([1, 25], 2)])
def test_multi_against_loop(form: dict[str, Any], counts: list[int], seed: int) -> None:
    case, criterion = multi_case(form, counts, seed)
    losses = criterion(case.outputs, case.targets())
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(multi_by_loop(case, form), rel=2e-5)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form))
def test_every_form_takes_few_operations_and_reads_nothing_back(form: dict[str, Any]) -> None:
    case, criterion = multi_case(form, [25, 25], 7)
    criterion(case.outputs, case.targets())  # makes its table
    counts = []
    for boxes in (0, 25):
        labels = torch.where(torch.arange(case.labels.shape[1]) < boxes, case.labels, -1)
        targets = {"boxes": case.boxes, "labels": labels, "weights": torch.ones(labels.shape)}
        with OperationTrace() as trace:
            losses = criterion(case.outputs, targets)
        assert not trace.host_reads and all(loss.isfinite() for loss in losses.values())
        counts.append(len(trace.operations))
    assert counts[0] == counts[1] <= 450, counts


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form))
def test_pictures_show_what_is_assigned(form: dict[str, Any]) -> None:
    """`assigned_predictions`, which visualize_batch.py --targets draws; a square input."""
    _, criterion = multi_case(form, [0], 0)
    case = Case("three levels", 3, [9, 14], 5, size=(96, 96))
    case.boxes = (case.boxes * 16).round() / 16
    pairs = criterion.assigned_predictions(case.boxes, case.labels, 96)
    assert not any(pair.overruled for pair in pairs)
    for image in range(2):
        found = {(p.level, p.anchor, p.row, p.column): p.gt for p in pairs if p.image == image}
        boxes, labels = case.boxes[image].tolist(), case.labels[image].tolist()
        match, neighbours = form["anchor_match"], form.get("neighbour_cells", False)
        assert found == slow_claims(case.anchors, case.strides, (96, 96), boxes, labels, match, neighbours)


def test_boxes_that_share_everything_leave_the_last() -> None:
    """Equal boxes of two classes in one image: prediction, box and class of the second; divided by one box."""
    case, criterion = multi_case(FORMS[0], [1], 3)
    once = case.targets()
    both = {"boxes": case.boxes.clone(), "labels": case.labels.clone()}
    once["labels"][0, 0], both["boxes"][0, 1] = 2, both["boxes"][0, 0]
    both["labels"][0, :2] = torch.tensor([1, 2])
    expected = criterion(case.outputs, once)
    assert {name: loss.item() for name, loss in criterion(case.outputs, both).items()} == {
        name: loss.item() for name, loss in expected.items()
    }


@pytest.mark.parametrize("new_coords", [False, True])
def test_floor_of_multi_is_zero_where_the_decoding_reaches(new_coords: bool) -> None:
    criterion = CRITERIA["multi"]([[(16, 16)], [(40, 24)]], [16, 32], 0.7, scales_xy=[2.0, 2.0], new_coords=new_coords)
    targets = {"boxes": torch.tensor([[[13.0, 31, 27, 49], [14, 14, 58, 34]]]), "labels": torch.tensor([[1, 0]])}
    assert criterion.lowest_losses(targets, 64) == {"loss_box": pytest.approx(0, abs=1e-4)}


# Choices that several criteria have


def shares_case(loss: str, iou_aware: bool = False) -> tuple[Case, Criterion]:
    case = Case("three levels", 3, [9, 0, 14], 11, loss=loss)
    if iou_aware:
        case.outputs = [torch.cat([output, torch.randn(*output.shape[:-1], 1)], dim=-1) for output in case.outputs]
    options = LossOptions(anchor_match="iou") if loss == "multi" else LossOptions()
    return case, case.criterion(options=options, iou_aware=iou_aware)


def flat_gradient(case: Case, criterion: Criterion, targets: dict[str, Tensor], *names: str) -> Tensor:
    """Gradient of the sum of the losses, or of those of the names, (B, P, V)."""
    outputs = [output.clone().requires_grad_() for output in case.outputs]
    losses = criterion(outputs, targets)
    sum(losses[name] for name in names or losses).backward()  # type: ignore[union-attr]
    return flatten_levels([output.grad for output in outputs if output.grad is not None])


@pytest.mark.parametrize(
    ("loss", "iou_aware"), [*((loss, False) for loss in CRITERIA), ("iou", True), ("multi", True), ("darknet", True)]
)
def test_the_share_of_a_box_scales_what_its_positives_contribute(loss: str, iou_aware: bool) -> None:
    case, criterion = shares_case(loss, iou_aware)
    targets = case.targets()
    shares = torch.rand(case.labels.shape, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.1
    plain, mixed = (flat_gradient(case, criterion, targets | more) for more in ({}, {"weights": shares}))
    factor = torch.ones(plain.shape[:2])
    sizes = [(output.shape[2], output.shape[3]) for output in case.outputs]
    positive, index, gt, overruled = criterion.assign(case.boxes, case.labels, sizes)
    for image, place in (positive & ~overruled).nonzero().tolist():
        factor[image, index[image, place]] = shares[image, gt[image, place]]
    assert (factor < 1).sum() > 5
    torch.testing.assert_close(mixed, plain * factor[..., None], atol=1e-6, rtol=1e-4)
    ones = {"weights": torch.ones_like(shares)}
    torch.testing.assert_close(flat_gradient(case, criterion, targets | ones), plain)


@pytest.mark.parametrize(("amount", "classes", "d"), [(0.1, 3, 0.1), ("auto", 3, 1 / 40), ("auto", 80, 1 / 80)])
@pytest.mark.parametrize("loss", ["darknet", "mmdetection", "iou", "multi"])
def test_smoothed_classes_by_hand(loss: str, amount: float | str, classes: int, d: float) -> None:
    """The gradient of a class logit 0 is 1/2 - d, and 1/2 - (1 - d) for the class of the box."""
    criterion = CRITERIA[loss]([[(16, 16)]], [32], 0.5, options=LossOptions(label_smoothing=amount))  # type: ignore[arg-type]
    output = torch.zeros(1, 1, 1, 1, 5 + classes, requires_grad=True)
    targets = {"boxes": torch.tensor([[[8.0, 8, 24, 24]]]), "labels": torch.tensor([[1]])}
    criterion([output], targets)["loss_class"].backward()
    assert output.grad is not None
    expected = [0.5 - d] * classes
    expected[1] = d - 0.5
    assert output.grad[0, 0, 0, 0, 5:].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("loss", ["darknet", "ciou", "iou", "multi"])
def test_objectness_and_predicted_iou_learn_the_overlap_without_moving_the_box(loss: str) -> None:
    case, _ = shares_case(loss, iou_aware=True)
    criterion = case.criterion(iou_aware=True, options=LossOptions(objectness_target="iou"))
    gradient = flat_gradient(case, criterion, case.targets(), "loss_objectness", "loss_iou") * len(case.boxes)
    assert not gradient[..., :4].any() and not gradient[..., 6:].any()
    starts = [0, *torch.tensor([output[0, ..., 0].numel() for output in case.outputs]).cumsum(0).tolist()]
    positives = list(last_gt(case))
    assert (gradient[..., 5] != 0).sum() == len(positives) > 10
    for image, (level, anchor, row, column), box in positives if loss != "multi" else []:  # others win there
        raw = case.outputs[level][image, anchor, row, column].tolist()
        iou = slow_iou(decode(case, raw, level, anchor, row, column), box)
        _, anchors, _, columns, _ = case.outputs[level].shape
        flat = starts[level] + (row * columns + column) * anchors + anchor
        expected = [sigmoid(raw[4]) - iou, sigmoid(raw[5]) - iou]
        assert gradient[image, flat, 4:6].tolist() == pytest.approx(expected, abs=1e-5)


def test_without_the_predicted_iou_the_other_losses_are_the_same() -> None:
    for loss in ("darknet", "iou", "multi"):
        case, criterion = shares_case(loss, iou_aware=True)
        with_iou = criterion(case.outputs, case.targets())
        case.outputs = [torch.cat([output[..., :5], output[..., 6:]], dim=-1) for output in case.outputs]
        without = case.criterion(options=criterion.options)(case.outputs, case.targets())
        assert list(with_iou) == [*without, "loss_iou"]
        assert {name: with_iou[name].item() for name in without} == {
            name: loss.item() for name, loss in without.items()
        }
