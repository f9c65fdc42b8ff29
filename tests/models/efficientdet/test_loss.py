"""Anchors, box coder, assignment and loss of EfficientDet against published numbers and a plain loop over images."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.support.operation_trace import OperationTrace
from detection.models.efficientdet import assignment
from detection.models.efficientdet.anchors import AnchorGrid, anchor_shapes
from detection.models.efficientdet.assignment import assign
from detection.models.efficientdet.coder import decode, encode
from detection.models.efficientdet.criterion import EfficientDetLoss
from detection.models.efficientdet.focal_loss import BACKGROUND, IGNORED, focal_loss_sum
from detection.models.efficientdet.variants import VARIANTS
from tests.support.slow_boxes import slow_intersection, slow_iou

CPU = torch.device("cpu")
PAIRS, RATIOS = ((1.0, 1.0), (1.4, 0.7), (0.7, 1.4)), (1.0, 2.0, 0.5)
STRIDES, SIZES = (8, 16, 32), [(8, 12), (4, 6), (2, 3)]  # of an image of 96 x 64
SMALL = AnchorGrid(STRIDES, 1.5, PAIRS)  # sides of 12 to 76 pixels

# --- anchors and coder ---


def test_published_anchors() -> None:
    shapes = anchor_shapes((8, 16, 32, 64, 128), 4.0, PAIRS)
    squares = [[round(level[place][0], 2) for place in (0, 3, 6)] for level in shapes]
    assert squares[0] == [32, 40.32, 50.8] and squares[2] == [128, 161.27, 203.19] and squares[4][2] == 812.75
    assert shapes[0][1] == pytest.approx((44.8, 22.4)) and shapes[0][2] == pytest.approx((22.4, 44.8))
    assert anchor_shapes((8,), 4.0, RATIOS)[0][1] == pytest.approx((45.2548, 22.6274), abs=1e-4)
    anchors = AnchorGrid((8, 16), 4.0, PAIRS).anchors([(2, 3), (1, 2)], CPU)
    assert anchors.xyxy[:3].tolist() == [
        pytest.approx(box) for box in ([-12, -12, 20, 20], [-18.4, -7.2, 26.4, 15.2], [-7.2, -18.4, 15.2, 26.4])
    ]
    # after 9 anchors comes the next column, after a row the next one, after the cells of a level the next level
    centres = anchors.cxcywh[::9, :2].tolist()
    assert centres == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12], [8, 8], [24, 8]]


COUNTS = {"d0": 49_104, "d1": 76_725, "d2": 110_484, "d3": 150_381, "d4": 196_416, "d5": 306_900, "d7": 441_936}


@pytest.mark.parametrize(("name", "count"), [*COUNTS.items(), ("d7x", 442_260)])
def test_published_number_of_anchors(name: str, count: int) -> None:
    variant = VARIANTS[name]
    assert sum(9 * math.ceil(variant.image_size / stride) ** 2 for stride in variant.strides) == count


def test_box_coder_by_hand() -> None:
    anchor = torch.tensor([[4.0, 4.0, 32.0, 32.0]])
    box = torch.tensor([[0.0, 0.0, 16.0, 32.0]])  # centre (8, 16), half as wide
    values = encode(box, anchor)
    torch.testing.assert_close(values, torch.tensor([[0.375, 0.125, 0.0, -math.log(2)]]))
    torch.testing.assert_close(decode(values, anchor), box, atol=1e-4, rtol=0)
    # a published pair: anchor yxyx (-12, -12, 20, 20) and box yxyx (0, 0, 16, 32), written with x first
    values = encode(torch.tensor([[0.0, 0.0, 32.0, 16.0]]), anchor)
    torch.testing.assert_close(values, torch.tensor([[0.125, 0.375, -0.693147, 0.0]]), atol=1e-6, rtol=0)


# --- focal loss ---


@pytest.mark.parametrize(
    ("logit", "target", "expected"),
    [
        *((0, 1, 0.061266134), (0, 0, 0.183798402), (-4.59511985, 0, 7.538e-6), (-4.59511985, 1, 1.134066404)),
        *((2, 1, 0.001305954), (2, 0, 1.318644878)),
    ],
)
def test_focal_loss_of_published_numbers(logit: float, target: int, expected: float) -> None:
    logits = torch.tensor([[[logit]]], dtype=torch.float64)
    loss = focal_loss_sum(logits, torch.tensor([[0 if target else BACKGROUND]]), 0.25, 1.5)
    assert loss.item() == pytest.approx(expected, rel=1e-4 if expected < 1e-4 else 1e-6)


@pytest.mark.parametrize(("gamma", "smoothing"), [(1.5, 0.0), (2.0, 0.1), (0.0, 0.2), (0.5, 0.0)])
def test_focal_loss_is_that_of_a_formula_per_element(gamma: float, smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, 4, dtype=torch.float64, generator=generator) * 3
    classes = torch.randint(IGNORED, 4, (2, 7), generator=generator)
    expected = 0.0
    for image, row, column in itertools.product(range(2), range(7), range(4)):
        label, x = classes[image, row].item(), logits[image, row, column].item()
        if label == IGNORED:
            continue
        p, target = 1 / (1 + math.exp(-x)), float(label == column)
        soft = target * (1 - smoothing) + smoothing / 2
        cross_entropy = -soft * math.log(p) - (1 - soft) * math.log(1 - p)
        weight = 0.25 * (1 - p) ** gamma if target else 0.75 * p**gamma
        expected += weight * cross_entropy
    assert focal_loss_sum(logits, classes, 0.25, gamma, smoothing).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda x: focal_loss_sum(x, classes, 0.25, gamma, smoothing), logits.requires_grad_()
    )


def test_focal_loss_of_extreme_logits_is_finite() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.tensor([[[-300.0, 300, 0], [300, -300, 0]]], dtype=dtype, requires_grad=True)
        loss = focal_loss_sum(logits, torch.tensor([[0, 1]]), 0.25, 1.5)
        # both positives cost 0.25 * 300, both large negatives 0.75 * 300
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(600 + 2 * 0.183798402, rel=1e-3)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.isfinite().all() and gradient.dtype == dtype


def test_first_loss_of_an_empty_image(default_settings: Callable[..., Any]) -> None:
    """49,104 anchors and 80 classes at the prior: 29.61; anything far above means a wrong bias or divisor."""
    grid = AnchorGrid(VARIANTS["d0"].strides, 4.0, PAIRS)
    outputs = [torch.zeros(1, 9, 512 // stride, 512 // stride, 84) for stride in grid.strides]
    for level in outputs:
        level[..., 4:] = -math.log(99)
    targets = {"boxes": torch.zeros(1, 2, 4), "labels": torch.full((1, 2), -1)}
    losses = EfficientDetLoss(grid)(outputs, targets)
    assert losses["loss_class"].item() == pytest.approx(29.61, abs=0.005) and losses["loss_box"] == 0


# --- assignment ---


def random_targets(seed: int, coarse: bool) -> tuple[Tensor, Tensor]:
    """Boxes of three images: one, up to nine, none; some tiny, equal, crowds or without an area; padding after them."""
    generator = torch.Generator().manual_seed(seed)
    counts = (1, int(torch.randint(2, 10, (1,), generator=generator)), 0)
    boxes, labels = torch.zeros(3, max(counts) + 1, 4), torch.full((3, max(counts) + 1), -1)
    for image, count in enumerate(counts):
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([90.0, 58.0])
        sides = torch.exp(torch.rand(count, 2, generator=generator) * 5 - 1)  # 0.4 to 55 pixels
        box = torch.cat([corner, torch.minimum(corner + sides, torch.tensor([96.0, 64.0]))], dim=1)
        if coarse:  # many equal IoUs: anchors lie on a grid of 4 pixels
            box = (box / 4).round() * 4
        boxes[image, :count] = box  # rounding may leave no area
        labels[image, :count] = torch.randint(3, (count,), generator=generator)
        if count > 3:
            boxes[image, 3], labels[image, 2] = boxes[image, 1], -2
    return boxes, labels


def slow_assign(
    anchors: list[list[float]], boxes: list[list[float]], labels: list[int], limits: tuple[float, float]
) -> list[Any]:
    """For each anchor of an image its ground-truth row, "background" or "ignored"."""
    usable = [row for row, box in enumerate(boxes) if labels[row] >= 0 and box[2] > box[0] and box[3] > box[1]]
    overlaps = {row: [slow_iou(boxes[row], anchor) for anchor in anchors] for row in usable}
    result: list[Any] = []
    for place, anchor in enumerate(anchors):
        best, owner = 0.0, None
        for row in usable:
            if overlaps[row][place] > best:
                best, owner = overlaps[row][place], row
        area = (anchor[2] - anchor[0]) * (anchor[3] - anchor[1])
        crowds = [box for box, label in zip(boxes, labels, strict=True) if label == -2]
        if best >= limits[0]:
            result.append(owner)
        elif best >= limits[1] or any(slow_intersection(anchor, crowd) > 0.5 * area for crowd in crowds):
            result.append("ignored")
        else:
            result.append("background")
    forced: dict[int, int] = {}
    for row in usable:
        largest = max(overlaps[row])
        if largest > 0:
            forced.setdefault(overlaps[row].index(largest), row)
    for place, row in forced.items():
        result[place] = row
    return result


def read(assigned: assignment.Assignment, image: int) -> list[Any]:
    rows = zip(assigned.gt[image].tolist(), assigned.positive[image], assigned.background[image], strict=True)
    return [gt if positive else "background" if background else "ignored" for gt, positive, background in rows]


# Anchors with sides of whole powers of two, so that equal overlaps are equal to the last bit in every precision.
EXACT = AnchorGrid.__new__(AnchorGrid)
EXACT.strides, EXACT._anchors = STRIDES, {}
EXACT.shapes = [[(stride * a, stride * b) for a, b in ((1, 1), (2, 1), (1, 2), (2, 2))] for stride in STRIDES]


@pytest.mark.parametrize("seed", range(30))
def test_assignment_is_that_of_a_loop(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = (0.5, 0.5) if seed % 2 else (0.5, 0.4)
    grid = EXACT if seed % 3 else SMALL
    # float64, as the loop has it: the ties of symmetric anchors would be broken by rounding, and not alike
    anchors = grid.anchors(SIZES, CPU).xyxy.double()
    boxes, labels = random_targets(seed, coarse=grid is EXACT)
    boxes = boxes.double()
    if seed % 5 == 0:  # two rows of the ground truth at a time
        monkeypatch.setattr(assignment, "MAX_PAIRS", 2 * 3 * len(anchors))
    assigned = assign(anchors, boxes, labels, *limits)
    positives = 0
    for image in range(3):
        expected = slow_assign(anchors.tolist(), boxes[image].tolist(), labels[image].tolist(), limits)
        assert read(assigned, image) == expected
        positives += sum(isinstance(row, int) for row in expected)
    usable = (labels >= 0) & (boxes[..., 2:] > boxes[..., :2]).all(-1)
    assert positives == assigned.positive.sum() and (positives > 0) == bool(usable.any())


def test_forced_matches_by_hand() -> None:
    """Two equal boxes want the same anchor: the first has it, the second only what reaches 0.5; padding has nothing."""
    anchors = torch.tensor([[0.0, 0, 8, 8], [8, 0, 16, 8], [0, 0, 16, 16]])
    tiny = [9.0, 1, 10, 2]
    boxes = torch.tensor([[tiny, tiny, [0.0, 0, 8, 8], [0, 0, 0, 0], [3, 3, 3, 9]]])
    assigned = assign(anchors, boxes, torch.tensor([[2, 1, 0, -1, 1]]))
    assert read(assigned, 0) == [2, 0, "background"]
    everything_padding = assign(anchors, boxes, torch.full((1, 5), -1))
    assert not everything_padding.positive.any() and everything_padding.background.all()
    no_rows = assign(anchors, boxes[:, :0], torch.zeros(1, 0, dtype=torch.int64))
    assert not no_rows.positive.any() and no_rows.background.all()
    # an anchor that is best for one box and reaches 0.5 with another goes to the one that has no other
    anchors = torch.tensor([[0.0, 0, 10, 10]])
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 8]]])
    assert read(assign(anchors, boxes, torch.zeros(1, 2, dtype=torch.int64)), 0) == [0]
    assert read(assign(anchors, boxes.flip(1), torch.zeros(1, 2, dtype=torch.int64)), 0) == [0]  # both force it


# --- the whole criterion ---


def random_outputs(seed: int, grid: AnchorGrid, sizes: Sequence[tuple[int, int]], num_classes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(3, len(shapes), *size, 4 + num_classes, generator=generator)
        for shapes, size in zip(grid.shapes, sizes, strict=True)
    ]


def slow_losses(
    grid: AnchorGrid, outputs: list[Tensor], boxes: Tensor, labels: Tensor, limits: tuple[float, float]
) -> tuple[float, float]:
    """Box and class loss with alpha 0.25, gamma 1.5, delta 0.1, weights 50 and 1, one prediction at a time."""
    anchors = grid.anchors(SIZES, CPU)
    class_sum, box_sum, positives = 0.0, 0.0, 0
    for image in range(len(boxes)):
        owners = slow_assign(anchors.xyxy.tolist(), boxes[image].tolist(), labels[image].tolist(), limits)
        raw = [
            level[image, number, row, column].tolist()
            for level in outputs
            for row in range(level.shape[2])
            for column in range(level.shape[3])
            for number in range(level.shape[1])
        ]
        for owner, values, (x, y, width, height) in zip(owners, raw, anchors.cxcywh.tolist(), strict=True):
            label = labels[image, owner].item() if isinstance(owner, int) else -1
            for column, logit in enumerate(values[4:]):
                p = 1 / (1 + math.exp(-logit))
                if owner != "ignored":
                    positive = -0.25 * (1 - p) ** 1.5 * math.log(p)
                    class_sum += positive if column == label else -0.75 * p**1.5 * math.log(1 - p)
            if isinstance(owner, int):
                x1, y1, x2, y2 = boxes[image, owner].tolist()
                wanted = [
                    *(((y1 + y2) / 2 - y) / height, ((x1 + x2) / 2 - x) / width),
                    *(math.log((y2 - y1) / height), math.log((x2 - x1) / width)),
                ]
                for value, target in zip(values[:4], wanted, strict=True):
                    error = abs(value - target)
                    box_sum += error**2 / 2 if error <= 0.1 else 0.1 * (error - 0.05)
                positives += 1
    return 50 * box_sum / (4 * (positives + 1)), class_sum / (positives + 1)


@pytest.mark.parametrize("seed", range(8))
def test_losses_are_those_of_a_loop(seed: int) -> None:
    limits = (0.5, 0.5) if seed % 2 else (0.5, 0.4)
    boxes, labels = random_targets(seed, coarse=True)
    outputs = random_outputs(seed, EXACT, SIZES, 3)
    criterion = EfficientDetLoss(EXACT, positive_iou=limits[0], background_iou=limits[1])
    losses = criterion(outputs, {"boxes": boxes, "labels": labels})
    expected = slow_losses(EXACT, outputs, boxes, labels, limits)
    found = (losses["loss_box"].item(), losses["loss_class"].item())
    assert found == pytest.approx(expected, rel=1e-4) and expected[0] > 0
    more = torch.nn.functional.pad(boxes, (0, 0, 0, 23)), torch.nn.functional.pad(labels, (0, 23), value=-1)
    padded = criterion(outputs, dict(zip(("boxes", "labels"), more, strict=True)))
    assert padded["loss_box"] == losses["loss_box"] and padded["loss_class"] == losses["loss_class"]


@pytest.mark.parametrize(("error", "expected"), [(0.05, 0.00125), (0.1, 0.005), (0.5, 0.045), (-1, 0.095)])
def test_huber_of_published_numbers(error: float, expected: float) -> None:
    """One box equal to an anchor of 96 px: one positive, N = 2; all four values are off by the same."""
    grid = AnchorGrid((64,), 1.5, (1.0, 1.0, 1.0))
    outputs = [torch.zeros(1, 9, 1, 1, 5)]
    outputs[0][0, 0, 0, 0, :4] = error
    targets = {"boxes": torch.tensor([[[-16.0, -16, 80, 80]]]), "labels": torch.zeros(1, 1, dtype=torch.int64)}
    criterion = EfficientDetLoss(grid, box_weight=1.0, positive_iou=0.99)
    count = criterion.assigned_predictions(targets["boxes"], targets["labels"], 64)
    assert len(count) == 3  # the three equal aspects of the first size
    losses = criterion(outputs, targets)
    plain = EfficientDetLoss(grid, box_weight=1.0, positive_iou=0.99)([outputs[0] * 0], targets)
    assert plain["loss_box"].item() == pytest.approx(0, abs=1e-9)
    assert losses["loss_box"].item() == pytest.approx(4 * expected / (4 * 4), rel=1e-4)


def test_gradients_reach_positives_and_stay_finite() -> None:
    """Whatever negatives predict for their boxes, infinities included, has neither loss nor gradient."""
    boxes, labels = random_targets(3, coarse=False)
    outputs = random_outputs(3, SMALL, SIZES, 3)
    positive = assign(SMALL.anchors(SIZES, CPU).xyxy, boxes, labels).positive
    raw = torch.cat([level.permute(0, 2, 3, 1, 4).flatten(1, 3) for level in outputs], dim=1)
    raw[..., :4] = torch.where(positive[..., None], raw[..., :4], torch.inf)
    counts = [rows * columns * 9 for rows, columns in SIZES]
    levels = [
        part.view(3, *size, 9, 7).permute(0, 3, 1, 2, 4).detach().requires_grad_()
        for part, size in zip(raw.split(counts, dim=1), SIZES, strict=True)
    ]
    losses = EfficientDetLoss(SMALL)(levels, {"boxes": boxes, "labels": labels})
    gradients = torch.autograd.grad(losses["loss_box"] + losses["loss_class"], levels)
    flat = torch.cat([gradient.permute(0, 2, 3, 1, 4).flatten(1, 3) for gradient in gradients], dim=1)
    assert flat.isfinite().all() and (flat[..., :4][~positive] == 0).all() and (flat[..., :4][positive] != 0).any()


def test_half_precision_outputs_give_float32_losses() -> None:
    boxes, labels = random_targets(1, coarse=False)
    outputs = [level.bfloat16() for level in random_outputs(1, SMALL, SIZES, 3)]
    with torch.autocast("cpu", torch.bfloat16):
        found = EfficientDetLoss(SMALL)(outputs, {"boxes": boxes, "labels": labels})
    expected = EfficientDetLoss(SMALL)([level.float() for level in outputs], {"boxes": boxes, "labels": labels})
    for name, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name])


def test_operations_and_host_reads_of_a_loss() -> None:
    boxes, labels = random_targets(2, coarse=False)
    outputs = [level.requires_grad_() for level in random_outputs(2, SMALL, SIZES, 3)]
    criterion = EfficientDetLoss(SMALL)
    targets = {"boxes": boxes, "labels": labels}
    sum(criterion(outputs, targets).values()).backward()  # makes the table of anchors
    with OperationTrace() as trace:
        sum(criterion(outputs, targets).values()).backward()
    assert not trace.host_reads and len(trace.operations) <= 450
    names = {name for name in trace.operations if "index" in name or "nonzero" in name or "one_hot" in name}
    assert not names  # shapes do not depend on the boxes


def test_assigned_predictions_name_the_places() -> None:
    boxes, labels = random_targets(4, coarse=False)
    found = EfficientDetLoss(SMALL).assigned_predictions(boxes, labels, 96)
    anchors = SMALL.anchors([(12, 12), (6, 6), (3, 3)], CPU)
    places = assign(anchors.xyxy, boxes, labels)
    assert len(found) == places.positive.sum() > 0
    starts = {0: 0, 1: 9 * 144, 2: 9 * (144 + 36)}
    for one in found:
        place = starts[one.level] + (one.row * (96 // one.stride) + one.column) * 9 + one.anchor
        assert places.positive[one.image, place] and places.gt[one.image, place] == one.gt
        expected = [(one.column + 0.5) * one.stride, (one.row + 0.5) * one.stride, *one.anchor_size]
        assert anchors.cxcywh[place].tolist() == pytest.approx(expected)
