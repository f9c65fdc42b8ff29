"""`DarknetLoss` against the slow loop of `loss_cases.py`; properties of all criteria."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.support.operation_trace import OperationTrace
from detection.models.yolo import CRITERIA
from detection.models.yolo import criterion as criterion_module
from detection.models.yolo.darknet_loss import DarknetLoss
from tests.support.loss_cases import (
    HEIGHT,
    LEVELS,
    WIDTH,
    Case,
    all_predictions,
    box_targets,
    cross_entropy_of_bit,
    darknet_deltas,
    decode,
    gt_boxes_of,
    is_ignored,
    overlap,
    responsible,
)


def slow_losses(case: Case) -> dict[str, float]:
    totals = {"loss_box": 0.0, "loss_objectness": 0.0, "loss_class": 0.0}
    for image in range(len(case.boxes)):
        last_box: dict[tuple[int, int, int, int], list[float]] = {}
        classes: dict[tuple[int, int, int, int], set[int]] = {}
        for box, label in gt_boxes_of(case, image):
            if label >= 0:
                last_box[responsible(case, box)] = box
                classes.setdefault(responsible(case, box), set()).add(label)
        for place in all_predictions(case):
            level, anchor, row, column = place
            raw = case.outputs[level][image, anchor, row, column].tolist()
            if place in last_box:
                t, s = box_targets(case, last_box[place])
                xy = cross_entropy_of_bit(raw[0], t[0]) + cross_entropy_of_bit(raw[1], t[1])
                totals["loss_box"] += s * xy + s / 2 * ((t[2] - raw[2]) ** 2 + (t[3] - raw[3]) ** 2)
                totals["loss_objectness"] += cross_entropy_of_bit(raw[4], 1)
                for number in range(case.num_classes):
                    totals["loss_class"] += cross_entropy_of_bit(raw[5 + number], number in classes[place])
            elif not is_ignored(case, image, decode(case, raw, level, anchor, row, column)):
                totals["loss_objectness"] += cross_entropy_of_bit(raw[4], 0)
    return {name: total / len(case.boxes) for name, total in totals.items()}


def assert_matches_darknet(case: Case) -> None:
    losses, gradients = case.gradients()
    for gradient, delta in zip(gradients, darknet_deltas(case), strict=True):
        torch.testing.assert_close(gradient.double(), -delta, atol=1e-5, rtol=0)
    for name, value in slow_losses(case).items():
        assert losses[name].item() == pytest.approx(value, rel=1e-5, abs=1e-6), name


SMALL, LARGE = (WIDTH, HEIGHT), (224, 160)  # pixels of the network input
CASES: list[tuple[Any, ...]] = [  # arguments of `Case`
    ("three levels", 4, [6, 0, 17], 0, 0.7),
    ("three levels", 80, [9, 12], 1, 0.7),
    ("three levels", 1, [14, 5], 2, 0.5),
    ("two levels", 3, [11, 1, 0, 8], 3, 0.7),
    ("two levels", 1, [20], 4, 0.5),
    ("unequal levels", 2, [13, 20], 5, 0.6),
    ("equal strides", 3, [13, 0, 9], 6, 0.7),
    ("three levels", 3, [13, 0, 9], 7, 0.7, 0.6, SMALL, 1.2),
]
PUBLISHED: list[tuple[Any, ...]] = [
    ("full", 5, [19, 0, 14], 18, 0.7, 0.9, LARGE),
    ("tiny", 5, [21, 0, 16], 19, 0.7, 0.9, LARGE),
]


@pytest.mark.parametrize("arguments", CASES + PUBLISHED)
def test_gradients_and_values_are_darknets(arguments: tuple[Any, ...]) -> None:
    assert_matches_darknet(Case(*arguments))


def met_rules(case: Case) -> Counter[str]:
    """How often each rule of the loss applies in the case."""
    met: Counter[str] = Counter()
    deltas = darknet_deltas(case)
    for image in range(len(case.boxes)):
        gt_boxes = gt_boxes_of(case, image)
        met["empty image"] += not gt_boxes
        met["crowd"] += sum(label == -2 for _, label in gt_boxes)
        met["first class"] += sum(label == 0 for _, label in gt_boxes)
        met["last class"] += sum(label == case.num_classes - 1 for _, label in gt_boxes)
        places: dict[tuple[int, int, int, int], list[int]] = {}
        for box, label in gt_boxes:
            if label >= 0:
                places.setdefault(responsible(case, box), []).append(label)
        for labels in places.values():
            met["shared, same class"] += len(labels) > len(set(labels))
            met["shared, two classes"] += len(set(labels)) > 1
        for place in all_predictions(case):
            level, *position = place
            raw = case.outputs[level][(image, *position)].tolist()
            predicted = decode(case, raw, *place)
            if is_ignored(case, image, predicted):
                met["ignored and positive" if place in places else "ignored"] += 1
                met["ignored for a crowd region only"] += not any(
                    overlap(predicted, box, False) > case.threshold for box, _ in gt_boxes
                )
    met["levels with a positive"] += sum(int((delta[..., 2] != 0).any()) for delta in deltas)
    return met


def test_cases_contain_every_rule() -> None:
    """The random cases above include shared cells, ignored predictions and crowd regions."""
    met: Counter[str] = Counter()
    for arguments in CASES:
        met += met_rules(Case(*arguments))
    for rule, minimum in {
        "empty image": 2,
        "crowd": 5,
        "first class": 5,
        "last class": 5,
        "shared, same class": 3,
        "shared, two classes": 3,
        "ignored": 20,
        "ignored and positive": 5,
        "ignored for a crowd region only": 3,
        "levels with a positive": 18,
    }.items():
        assert met[rule] >= minimum, f"{rule}: {met[rule]}"
    for arguments, levels in zip(PUBLISHED, (3, 2), strict=True):
        met = met_rules(Case(*arguments))
        for rule in ("empty image", "crowd", "first class", "last class", "shared, two classes", "ignored"):
            assert met[rule] >= 1, rule
        assert met["levels with a positive"] == levels


@pytest.mark.parametrize("layout", ["full", "tiny"])
def test_three_gt_boxes_of_three_classes_in_one_prediction(layout: str) -> None:
    """The last gives the box target, all three the classes; a fourth shares the cell but not the anchor."""
    case = Case(layout, 5, [2, 0], seed=20, size=LARGE)
    centre = torch.tensor([103.0, 71.0])
    for row, (size, label) in enumerate([((31, 60), 4), ((30, 62), 0), ((33, 59), 2), ((100, 80), 1)]):
        half = torch.tensor(size) / 2
        case.boxes[0, row], case.labels[0, row] = torch.cat([centre - half, centre + half]), label
    places = [responsible(case, box) for box in case.boxes[0, :4].tolist()]
    assert places[0] == places[1] == places[2] != places[3]
    assert_matches_darknet(case)
    _, gradients = case.gradients()
    level, *position = places[0]
    assert (gradients[level][(0, *position)][5:] < 0).tolist() == [True, False, True, False, True]


# By hand


def one_cell(gt_boxes: list[list[float]], labels: list[int], classes: int, **arguments: Any) -> dict[str, float]:
    """The losses of raw 0 everywhere: a 32 x 32 input, one cell, one anchor of 16 x 16."""
    criterion = DarknetLoss([[(16, 16)]], [32], 0.7, **arguments)
    targets = {"boxes": torch.tensor([gt_boxes]), "labels": torch.tensor([labels])}
    return {name: loss.item() for name, loss in criterion([torch.zeros(1, 1, 1, 1, 5 + classes)], targets).items()}


LOG_2 = math.log(2)


@pytest.mark.parametrize(
    ("box", "label", "classes", "expected"),
    [
        # Centre (16, 16): t = 1/2 in x and y, the anchor's size: t = 0. s = 2 - 16 * 16 / (32 * 32) = 1.75.
        # BCE at logit 0 is log 2 whatever the target: 2 of them for xy, 1 for objectness (of a positive even if its IoU
        # exceeds the threshold), 3 for the classes.
        ([8.0, 8, 24, 24], 1, 3, (1.75 * 2 * LOG_2, LOG_2, 3 * LOG_2)),
        # 32 x 8: t_w = log 2, t_h = -log 2; s = 2 - 256 / 1024; s / 2 * 2 * log(2)^2 on top of the xy term
        ([0.0, 12, 32, 20], 0, 1, (1.75 * (2 * LOG_2 + LOG_2**2), LOG_2, LOG_2)),
        ([0.0, 0, 0, 0], -1, 1, (0, LOG_2, 0)),  # no ground truth: objectness against 0
    ],
)
def test_one_ground_truth_by_hand(box: list[float], label: int, classes: int, expected: tuple[float, ...]) -> None:
    losses = one_cell([box], [label], classes)
    assert [losses[f"loss_{part}"] for part in ("box", "objectness", "class")] == pytest.approx(expected)


def class_gradient(labels: list[int], classes: int) -> list[float]:
    """d loss_class / d class logits at logit 0 of ground-truth boxes that all share one prediction."""
    output = torch.zeros(1, 1, 1, 1, 5 + classes, requires_grad=True)
    boxes = torch.tensor([[[8.0, 8, 24, 24]] * len(labels)])
    losses = DarknetLoss([[(16, 16)]], [32], 0.7)([output], {"boxes": boxes, "labels": torch.tensor([labels])})
    losses["loss_class"].backward()
    assert output.grad is not None
    return output.grad[0, 0, 0, 0, 5:].tolist()


def test_classes_of_a_shared_prediction_unite() -> None:
    """sigmoid(0) - target: -1/2 for the classes of the ground-truth boxes, 1/2 for all others."""
    assert class_gradient([1], 4) == [0.5, -0.5, 0.5, 0.5]
    assert class_gradient([1, 3], 4) == class_gradient([3, 1], 4) == [0.5, -0.5, 0.5, -0.5]
    assert class_gradient([2, 2, 2], 4) == [0.5, 0.5, -0.5, 0.5]
    assert class_gradient([0, -1, 3, -2, 0], 4) == [-0.5, 0.5, 0.5, -0.5]
    assert class_gradient([-1, -2], 4) == [0, 0, 0, 0]


def test_last_of_shared_gt_boxes_gives_the_box() -> None:
    first, last = [8.0, 8, 24, 24], [4.0, 10, 28, 22]  # both centres and shapes belong to the only prediction
    for labels in ([0, 0], [0, 1]):
        both, alone = one_cell([first, last], labels, classes=2), one_cell([last], [0], classes=2)
        assert both["loss_box"] == alone["loss_box"]
        assert both["loss_objectness"] == alone["loss_objectness"]
    assert one_cell([last, first], [0, 0], classes=2)["loss_box"] != one_cell([last], [0], classes=2)["loss_box"]


def test_crowd_region_excuses_background_only() -> None:
    """Three 16 x 16 cells in a row, raw 0: boxes of 8 x 8 in the middle of each; the region covers the first two."""
    criterion = DarknetLoss([[(8, 8)]], [16], 0.7)
    region, gt = [0.0, 0, 32, 16], [20.0, 4, 28, 12]
    output = torch.zeros(1, 1, 1, 3, 6, requires_grad=True)
    losses = criterion([output], {"boxes": torch.tensor([[region]]), "labels": torch.tensor([[-2]])})
    assert losses["loss_box"] == 0 and losses["loss_class"] == 0
    losses["loss_objectness"].backward()
    assert output.grad is not None
    assert output.grad[0, 0, 0, :, 4].tolist() == [0, 0, 0.5]

    output.grad = None
    losses = criterion([output], {"boxes": torch.tensor([[region, gt]]), "labels": torch.tensor([[-2, 0]])})
    losses["loss_objectness"].backward()
    assert output.grad[0, 0, 0, :, 4].tolist() == [0, -0.5, 0.5]  # the ground-truth box inside the region is positive


# Special targets


@pytest.mark.parametrize("loss", CRITERIA)
def test_whole_batch_empty(loss: str) -> None:
    """Objectness against 0 everywhere; all outputs have a gradient, so no process of a distributed run waits."""
    case = Case("three levels", 4, [0, 0], seed=6, loss=loss)
    losses, gradients = case.gradients()
    assert losses["loss_box"] == 0 and losses["loss_class"] == 0
    for output, gradient in zip(case.outputs, gradients, strict=True):
        torch.testing.assert_close(gradient[..., 4], output[..., 4].sigmoid())
        assert not gradient[..., :4].any() and not gradient[..., 5:].any()


@pytest.mark.parametrize("loss", CRITERIA)
@pytest.mark.parametrize("rows_of_targets", [0, 1])
def test_batch_without_target_rows(rows_of_targets: int, loss: str) -> None:
    case = Case("two levels", 3, [0], seed=7, loss=loss)
    expected = case.criterion()(case.outputs, case.targets())
    targets = {"boxes": case.boxes[:, :rows_of_targets], "labels": case.labels[:, :rows_of_targets]}
    assert case.criterion()(case.outputs, targets) == expected


def test_gt_boxes_on_the_border() -> None:
    """Centres on the right and lower border and in the corner belong to the last cell, with target share 1."""
    case = Case("three levels", 3, [5, 5], seed=8)
    case.boxes[0, 0] = torch.tensor([WIDTH - 2.0, 20, WIDTH + 2, 25])
    case.boxes[0, 1] = torch.tensor([30.0, HEIGHT - 6, 42, HEIGHT + 6])
    case.boxes[0, 2] = torch.tensor([WIDTH - 20.0, HEIGHT - 20, WIDTH + 20, HEIGHT + 20])
    case.boxes[1, 0] = torch.tensor([-2.0, -3, 2, 3])
    case.boxes[1, 1] = torch.tensor([0.0, 0, WIDTH, HEIGHT])
    case.labels[:, :3] = torch.tensor([0, 1, 2])
    assert [responsible(case, box)[2:] for box in case.boxes[0, :3].tolist()] == [(2, 11), (7, 4), (1, 2)]
    assert_matches_darknet(case)


@pytest.mark.parametrize(("layout", "counts"), [("three levels", [160]), ("two levels", [3, 190])])
def test_very_many_gt_boxes(layout: str, counts: list[int]) -> None:
    assert_matches_darknet(Case(layout, 5, counts, seed=9))


@pytest.mark.parametrize("loss", CRITERIA)
def test_padding_changes_nothing(loss: str) -> None:
    """More padding rows, and rows that are not zero."""
    case = Case("three levels", 4, [6, 9], seed=10, loss=loss)
    expected = case.criterion()(case.outputs, case.targets())
    garbage = torch.rand(2, 40, 4, generator=case.generator) * 60
    garbage[:, 20:] = case.boxes[:, :1]  # copies of a ground-truth box
    targets = {
        "boxes": torch.cat([case.boxes, garbage], dim=1),
        "labels": torch.cat([case.labels, torch.full((2, 40), -1)], dim=1),
    }
    for name, loss in case.criterion()(case.outputs, targets).items():
        torch.testing.assert_close(loss, expected[name])


def test_order_of_gt_boxes_that_share_nothing_does_not_matter() -> None:
    case = Case("three levels", 4, [0, 0], seed=11)
    centres = torch.tensor([[12.0, 12], [44, 12], [76, 12], [12, 50], [44, 50], [76, 50]])  # more than a cell apart
    sizes = torch.tensor([[4.0, 5], [12, 24], [24, 18], [13, 9], [6, 12], [22, 26]])
    boxes = torch.cat([centres - sizes / 2, centres + sizes / 2], dim=1).expand(2, 6, 4)
    labels = torch.tensor([[0, 1, 2, 3, 0, -2]]).expand(2, 6)
    expected = case.criterion()(case.outputs, {"boxes": boxes, "labels": labels})
    for order in ([5, 4, 3, 2, 1, 0], [2, 0, 4, 1, 5, 3]):
        losses = case.criterion()(case.outputs, {"boxes": boxes[:, order], "labels": labels[:, order]})
        for name, loss in losses.items():
            torch.testing.assert_close(loss, expected[name])


# Batches and sizes


@pytest.mark.parametrize("loss", CRITERIA)
def test_batch_is_the_mean_of_its_images(loss: str) -> None:
    """So that equal micro-batches add up to a large batch. For mmdetection the sum."""
    case = Case("unequal levels", 3, [4, 0, 12], seed=12, loss=loss)
    criterion = case.criterion()
    singles = [
        criterion(
            [output[image : image + 1] for output in case.outputs],
            {name: target[image : image + 1] for name, target in case.targets().items()},
        )
        for image in range(3)
    ]
    for name, value in criterion(case.outputs, case.targets()).items():
        assert value.dtype == torch.float32 and value.shape == ()
        single = torch.stack([single[name] for single in singles])
        torch.testing.assert_close(value, single.sum() if loss == "mmdetection" else single.mean())


@pytest.mark.parametrize("loss", CRITERIA)
def test_input_size_may_change_between_calls(loss: str) -> None:
    """Multi-scale training: the tables cached for one size are not used for another."""
    generator = torch.Generator().manual_seed(13)
    strides, anchors = LEVELS["three levels"]
    remembering = CRITERIA[loss](anchors, strides, 0.7)
    targets = {"boxes": torch.tensor([[[3.0, 4, 8, 9], [20, 20, 44, 40]]]), "labels": torch.tensor([[0, 1]])}
    for height, width in [(64, 96), (96, 64), (64, 64), (64, 96)]:
        outputs = [torch.randn(1, 3, height // stride, width // stride, 7, generator=generator) for stride in strides]
        assert remembering(outputs, targets) == CRITERIA[loss](anchors, strides, 0.7)(outputs, targets)


# Precision


@pytest.mark.parametrize("loss", CRITERIA)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_under_autocast(dtype: torch.dtype, loss: str) -> None:
    """All arithmetic is float32: exactly the losses of the rounded outputs, close to those of the unrounded."""
    # planted=0: no IoU so near the threshold that rounding decides
    case = Case("three levels", 4, [6, 11], seed=14, planted=0, loss=loss)
    half = [output.to(dtype).requires_grad_() for output in case.outputs]
    with torch.autocast("cpu", dtype=dtype):
        losses = case.criterion()(half, case.targets())
    exact = case.criterion()([output.to(dtype).float() for output in case.outputs], case.targets())
    full = case.criterion()(case.outputs, case.targets())
    for name, value in losses.items():
        assert value.dtype == torch.float32
        assert value.item() == exact[name].item()
        assert value.item() == pytest.approx(full[name].item(), rel=1e-2)
    torch.stack(list(losses.values())).sum().backward()
    assert all(output.grad is not None and output.grad.isfinite().all() for output in half)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arguments", [CASES[0], CASES[3]])
def test_gradients_of_half_precision_outputs(dtype: torch.dtype, arguments: tuple[Any, ...]) -> None:
    """Darknet's gradients at the rounded outputs, themselves rounded once."""
    case = Case(*arguments)
    case.outputs = [output.to(dtype).float() for output in case.outputs]
    half = [output.to(dtype).requires_grad_() for output in case.outputs]
    torch.stack(list(case.criterion()(half, case.targets()).values())).sum().mul(len(case.boxes)).backward()
    for output, delta in zip(half, darknet_deltas(case), strict=True):
        assert output.grad is not None and output.grad.dtype == dtype
        torch.testing.assert_close(output.grad.double(), -delta, atol=1e-4, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("loss", CRITERIA)
@pytest.mark.parametrize("logit", [1e4, -1e4, 100, -100, 40, -40])
def test_extreme_logits_give_finite_losses_and_gradients(logit: float, loss: str) -> None:
    """Infinite decoded boxes, sigmoids of exactly 0 and 1."""
    case = Case("three levels", 3, [5, 0, 9], seed=15, loss=loss)
    case.outputs = [torch.full_like(output, logit) for output in case.outputs]
    losses, gradients = case.gradients()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(gradient.isfinite().all() for gradient in gradients)
    if logit == 1e4 and loss != "mmdetection":  # log(1 + e^1e4) = 1e4 for every negative, as none is ignored
        positives = {(i, responsible(case, box)) for i in range(3) for box, label in gt_boxes_of(case, i) if label >= 0}
        background = 3 * len(all_predictions(case)) - len(positives)
        assert losses["loss_objectness"].item() == pytest.approx(background * 1e4 / 3, rel=1e-5)


# The host never waits for the device


def traced(function: Any) -> OperationTrace:
    with OperationTrace() as trace:
        function()
    return trace


def test_trace_sees_what_waits() -> None:
    values = torch.arange(4.0)
    for function in (
        lambda: values.sum().item(),
        lambda: values[values > 1],
        lambda: values.nonzero(),
        lambda: bool(values.any()),
        lambda: values.unique(),
        lambda: F.one_hot(values.long()),
        lambda: values.clone().index_put_((values > 1,), values[0]),
        values.tolist,
        values.numpy,
        values.cpu,
        lambda: np.asarray(values),
    ):
        assert traced(function).host_reads
    assert not traced(lambda: values[values.long()] * 2).host_reads


@pytest.mark.parametrize("loss", CRITERIA)
@pytest.mark.parametrize("class_loss", ["bce", "cross_entropy"])
@pytest.mark.parametrize("rows_of_targets", [32, 160])
def test_no_host_synchronisation(class_loss: str, rows_of_targets: int, loss: str) -> None:
    """Forward and backward never wait, and run the same operations for 0, 7 and 30 ground-truth boxes per image."""
    case = Case("three levels", 4, [30, 30], seed=16, loss=loss)
    criterion = case.criterion(class_loss=class_loss)
    criterion(case.outputs, case.targets())  # the first call at a size makes its table
    traces = []
    for count in (0, 7, 30):
        boxes, labels = torch.zeros(2, rows_of_targets, 4), torch.full((2, rows_of_targets), -1)
        boxes[:, :count], labels[:, :count] = case.boxes[:, :count], case.labels[:, :count]
        targets = {"boxes": boxes, "labels": labels}
        outputs = [output.clone().requires_grad_() for output in case.outputs]
        trace = traced(lambda outputs=outputs, targets=targets: sum(criterion(outputs, targets).values()).backward())
        assert not trace.host_reads
        traces.append(trace.operations)
    assert traces[0] == traces[1] == traces[2]
    assert "aten.sigmoid.default" in traces[0] and "aten.gather.default" in traces[0]
    assert "aten.scatter_add_.default" in traces[0] or "aten.scatter_add.default" in traces[0]  # gather's backward


@pytest.mark.parametrize("loss", CRITERIA)
@pytest.mark.parametrize("class_loss", ["bce", "cross_entropy"])
def test_few_operations_whatever_the_boxes_and_the_batch(monkeypatch, class_loss: str, loss: str) -> None:
    """Assignment and loss, forward, views included; contiguous half-precision outputs need the most."""
    criterion = Case("three levels", 3, [1], seed=0, loss=loss).criterion(class_loss=class_loss)
    counts = {}
    for whole_batch, max_elements in ((True, 2**40), (False, 1)):  # 1: the batch is cut into pieces
        monkeypatch.setattr(criterion_module, "max_chunk_elements", lambda device, limit=max_elements: limit)
        for batch_size, rows, boxes_per_image in ((2, 32, 7), (2, 32, 30), (2, 128, 93), (64, 128, 93)):
            outputs = [torch.randn(batch_size, 3, side, side, 8).bfloat16() for side in (12, 6, 3)]
            corner = torch.rand(batch_size, rows, 2) * 60
            labels = torch.full((batch_size, rows), -1)
            labels[:, :boxes_per_image] = 1
            targets = {"boxes": torch.cat([corner, corner + 20], dim=-1), "labels": labels}
            criterion(outputs, targets)
            counts[whole_batch, batch_size, rows] = len(traced(lambda o=outputs, t=targets: criterion(o, t)).operations)
    most = 450 if loss == "multi" else 300  # three losses and an assignment of its own
    assert 100 < max(counts.values()) <= most, counts
    assert len({count for (whole_batch, *_), count in counts.items() if whole_batch}) == 1, counts


# Softmax over the classes


def test_cross_entropy_against_torch() -> None:
    """Softmax cross-entropy of the last box of each prediction; none for crowd regions and padding."""
    case = Case("three levels", 5, [7, 0, 13], seed=17)
    losses = case.criterion(class_loss="cross_entropy")(case.outputs, case.targets())
    expected = 0.0
    for image in range(3):
        last = {responsible(case, box): label for box, label in gt_boxes_of(case, image) if label >= 0}
        for (level, anchor, row, column), label in last.items():
            logits = case.outputs[level][image, anchor, row, column, 5:]
            expected += F.cross_entropy(logits, torch.tensor(label)).item()
    assert losses["loss_class"].item() == pytest.approx(expected / 3, rel=1e-5)
    bce = case.criterion()(case.outputs, case.targets())
    assert losses["loss_box"] == bce["loss_box"] and losses["loss_objectness"] == bce["loss_objectness"]


def test_cross_entropy_by_hand() -> None:
    """Equal logits: log of the number of classes. Shared prediction: once, for the last ground-truth box."""
    box = [8.0, 8, 24, 24]
    arguments = {"classes": 4, "class_loss": "cross_entropy"}
    assert one_cell([box], [2], **arguments)["loss_class"] == pytest.approx(math.log(4))
    assert one_cell([box, box], [2, 3], **arguments)["loss_class"] == pytest.approx(math.log(4))
    output = torch.zeros(1, 1, 1, 1, 9)
    output[..., 5:] = torch.tensor([1.0, 2, 3, 4])
    targets = {"boxes": torch.tensor([[box, box]]), "labels": torch.tensor([[3, 0]])}
    loss = DarknetLoss([[(16, 16)]], [32], 0.7, "cross_entropy")([output], targets)["loss_class"]
    # the last ground-truth box has class 0: log(e^1 + e^2 + e^3 + e^4) - 1
    assert loss.item() == pytest.approx(math.log(sum(math.exp(value) for value in (1, 2, 3, 4))) - 1)


@pytest.mark.parametrize("loss", CRITERIA)
def test_weights_scale_the_parts_and_their_gradients(loss: str) -> None:
    case = Case("three levels", 3, [6, 9], seed=21, loss=loss)
    plain, weighted = case.criterion(), case.criterion(weights=(0.25, 2.0, 5.0))
    for name, factor in [("loss_box", 0.25), ("loss_objectness", 2.0), ("loss_class", 5.0)]:
        gradients = []
        for criterion in (plain, weighted):
            outputs = [output.clone().requires_grad_() for output in case.outputs]
            criterion(outputs, case.targets())[name].backward()
            gradients.append(torch.cat([output.grad.flatten() for output in outputs if output.grad is not None]))
        assert gradients[0].any()
        torch.testing.assert_close(gradients[1], factor * gradients[0])
    assert case.criterion(weights=(1.0, 1.0, 1.0))(case.outputs, case.targets()) == plain(case.outputs, case.targets())


def test_scale_xy_changes_the_target_of_the_centre_by_hand() -> None:
    """Centre a quarter into the cell in x, on its border in y; s = 1.2: (0.25 + 0.1) / 1.2 and (0 + 0.1) / 1.2."""
    output = torch.zeros(1, 1, 2, 2, 6, requires_grad=True)
    # centre (20, 16), cells of 16: column 1, row 1
    targets = {"boxes": torch.tensor([[[12.0, 8, 28, 24]]]), "labels": torch.tensor([[0]])}
    losses = DarknetLoss([[(16, 16)]], [16], 0.7, scales_xy=[1.2])([output], targets)
    losses["loss_box"].backward()
    assert output.grad is not None
    s = 2 - 16 * 16 / (32 * 32)
    expected = [s * (0.5 - 0.35 / 1.2), s * (0.5 - 0.1 / 1.2), 0, 0]
    assert output.grad[0, 0, 1, 1, :4].tolist() == pytest.approx(expected, rel=1e-5)


def test_every_level_has_its_own_scale() -> None:
    """The gradient of a level is that of a criterion with its scale on all levels."""
    case = Case("three levels", 2, [20, 20], seed=22)
    scales = [1.05, 1.1, 1.2]
    outputs = [output.clone().requires_grad_() for output in case.outputs]
    case.criterion(scales_xy=scales)(outputs, case.targets())["loss_box"].backward()
    for level, scale in enumerate(scales):
        same = [output.clone().requires_grad_() for output in case.outputs]
        case.criterion(scales_xy=[scale] * 3)(same, case.targets())["loss_box"].backward()
        assert outputs[level].grad is not None and outputs[level].grad.any()
        assert torch.equal(outputs[level].grad, same[level].grad)


def test_numbers_of_levels_must_agree() -> None:
    with pytest.raises(ValueError, match="1 levels of anchors, 2 strides and 2 scales_xy"):
        DarknetLoss([[(8, 8)]], [8, 16], 0.7)
    with pytest.raises(ValueError, match="2 levels of anchors, 2 strides and 1 scales_xy"):
        DarknetLoss([[(8, 8)], [(16, 16)]], [8, 16], 0.7, scales_xy=[1.1])
