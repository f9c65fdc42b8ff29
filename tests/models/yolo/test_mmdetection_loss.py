"""`MMDetectionLoss` and its assignment against plain loops over all priors, from the rules of the original:

A prior (an anchor centred in its cell) is
    negative if it has no IoU above the threshold with a ground-truth box;
    positive, if its cell holds the centre of a ground-truth box, for the ground-truth box of highest IoU if that
        exceeds the threshold; then each ground-truth box in turn takes the priors of its highest IoU, all of equals;
    ignored otherwise.
d loss / d logit: sigmoid - target for objectness and classes, 2 * (sigmoid - target) for xy, 4 * (raw - target) for wh.
Crowd regions (ours): priors with more than the threshold of their area inside are not negative.
"""

import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detection.models.yolo import mmdetection_loss
from detection.models.yolo.mmdetection_loss import MMDetectionLoss, assign_by_grid
from tests.support.loss_cases import Case, all_predictions, cross_entropy_of_bit, gt_boxes_of, overlap, sigmoid

Place = tuple[int, int, int, int]
LARGE = (224, 160)
CASES: list[tuple[Any, ...]] = [  # arguments of `Case`
    ("three levels", 4, [6, 0, 17], 0, 0.5),
    ("two levels", 3, [11, 1, 0, 8], 3, 0.5),
    ("unequal levels", 2, [13, 20], 5, 0.4),
    ("equal strides", 3, [13, 0, 9], 6, 0.3),
    ("full", 5, [19, 0, 14], 18, 0.5, 0.0, LARGE),
    ("tiny", 1, [21, 0, 16], 19, 0.5, 0.0, LARGE),
    ("three levels", 3, [13, 0, 9], 7, 0.5, 0.0, (96, 64), 1.2),
]


def make_case(arguments: tuple[Any, ...]) -> Case:
    return Case(*arguments, loss="mmdetection")


def prior_box(case: Case, place: Place) -> list[float]:
    level, anchor, row, column = place
    stride, (width, height) = case.strides[level], case.anchors[level][anchor]
    x, y = (column + 0.5) * stride, (row + 0.5) * stride
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def cell_of(case: Case, box: list[float], level: int) -> tuple[int, int]:
    stride = case.strides[level]
    row, column = (box[1] + box[3]) / 2 / stride, (box[0] + box[2]) / 2 / stride
    return min(int(row), case.height // stride - 1), min(int(column), case.width // stride - 1)


def slow_grid(case: Case, image: int, met: Counter[str] | None = None) -> tuple[dict[Place, int], set[Place]]:
    """The row of the ground-truth box of each positive, and the negatives."""
    met = Counter() if met is None else met
    boxes, labels = case.boxes[image].tolist(), case.labels[image].tolist()
    gt_rows = [number for number, label in enumerate(labels) if label >= 0]
    crowds = [number for number, label in enumerate(labels) if label == -2]
    iou = {
        place: {number: overlap(prior_box(case, place), boxes[number], False) for number in gt_rows}
        for place in all_predictions(case)
    }
    negatives = {
        place
        for place, of_place in iou.items()
        if all(value <= case.threshold for value in of_place.values())
        and all(overlap(prior_box(case, place), boxes[number], True) <= case.threshold for number in crowds)
    }
    available = [
        (level, anchor, row, column)
        for level, anchor, row, column in iou
        if any(cell_of(case, boxes[number], level) == (row, column) for number in gt_rows)
    ]
    positives: dict[Place, int] = {}
    for place in available:
        number = max(gt_rows, key=lambda number: iou[place][number])  # the first of equals
        if iou[place][number] > case.threshold:
            positives[place] = number
            met["above the threshold"] += 1
    met["above the threshold, not the best"] += len(positives)
    for number in gt_rows:
        best = max(iou[place][number] for place in available)
        for place in available:
            if best > 0 and iou[place][number] == best:
                met["overridden"] += positives.get(place, number) != number
                met["best below the threshold"] += best <= case.threshold
                met["above the threshold, not the best"] -= positives.get(place) == number
                positives[place] = number
    met["in another's cell"] += sum(
        cell_of(case, boxes[number], place[0]) != place[2:] for place, number in positives.items()
    )
    met["several for one ground-truth box"] += len(positives) - len(set(positives.values()))
    met["ground truth without a prior"] += len(gt_rows) - len(set(positives.values()))
    met["ignored"] += sum(place not in negatives and place not in positives for place in iou)
    met["several levels"] += len({place[0] for place in positives}) > 1
    return positives, negatives - set(positives)


def targets_of(case: Case, place: Place, box: list[float]) -> list[float]:
    level, anchor, row, column = place
    stride, (width, height), s = case.strides[level], case.anchors[level][anchor], case.scale_xy
    x, y = (box[0] + box[2]) / 2 / stride - column, (box[1] + box[3]) / 2 / stride - row
    x, y = (min(max((share + (s - 1) / 2) / s, 1e-6), 1 - 1e-6) for share in (x, y))
    return [x, y, math.log((box[2] - box[0]) / width), math.log((box[3] - box[1]) / height)]


def slow_losses_and_gradients(case: Case) -> tuple[dict[str, float], list[Tensor]]:
    losses = {"loss_box": 0.0, "loss_objectness": 0.0, "loss_class": 0.0}
    gradients = [torch.zeros(output.shape, dtype=torch.float64) for output in case.outputs]
    for image in range(len(case.boxes)):
        positives, negatives = slow_grid(case, image)
        for place in all_predictions(case):
            level, *position = place
            raw = case.outputs[level][(image, *position)].tolist()
            gradient = gradients[level][(image, *position)]
            if place in negatives:
                losses["loss_objectness"] += cross_entropy_of_bit(raw[4], 0)
                gradient[4] = sigmoid(raw[4])
            if place not in positives:
                continue
            number = positives[place]
            target = targets_of(case, place, case.boxes[image, number].tolist())
            for i in (0, 1):
                losses["loss_box"] += 2 * cross_entropy_of_bit(raw[i], target[i])
                gradient[i] = 2 * (sigmoid(raw[i]) - target[i])
            for i in (2, 3):
                losses["loss_box"] += 2 * (raw[i] - target[i]) ** 2
                gradient[i] = 4 * (raw[i] - target[i])
            losses["loss_objectness"] += cross_entropy_of_bit(raw[4], 1)
            gradient[4] = sigmoid(raw[4]) - 1
            for i in range(case.num_classes):
                is_class = case.labels[image, number].item() == i
                losses["loss_class"] += cross_entropy_of_bit(raw[5 + i], is_class)
                gradient[5 + i] = sigmoid(raw[5 + i]) - is_class
    return losses, gradients


def assert_matches_loop(case: Case) -> None:
    losses, gradients = case.gradients()
    slow_losses, slow_gradients = slow_losses_and_gradients(case)
    for gradient, expected in zip(gradients, slow_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), expected, atol=2e-5, rtol=0)
    for name, value in slow_losses.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("arguments", CASES)
def test_gradients_and_values_against_loop(arguments: tuple[Any, ...]) -> None:
    assert_matches_loop(make_case(arguments))


def test_cases_contain_every_rule() -> None:
    met: Counter[str] = Counter()
    for arguments in CASES:
        case = make_case(arguments)
        for image in range(len(case.boxes)):
            gt_boxes = gt_boxes_of(case, image)
            met["empty image"] += not gt_boxes
            met["crowd"] += sum(label == -2 for _, label in gt_boxes)
            slow_grid(case, image, met)
    for rule, minimum in {
        "empty image": 4,
        "crowd": 5,
        "above the threshold": 40,
        "above the threshold, not the best": 5,
        "best below the threshold": 20,
        "overridden": 5,
        "in another's cell": 5,
        "several for one ground-truth box": 20,
        "ground truth without a prior": 5,
        "ignored": 100,
        "several levels": 8,
    }.items():
        assert met[rule] >= minimum, f"{rule}: {met[rule]}"


@pytest.mark.parametrize("counts", [[84], [3, 133]])
def test_many_gt_boxes_all_at_once_and_in_pieces(monkeypatch, counts: list[int]) -> None:
    assert_matches_loop(make_case(("two levels", 3, counts, 8, 0.5)))
    monkeypatch.setattr(mmdetection_loss, "MAX_OVERLAPS", 1)
    assert_matches_loop(make_case(("two levels", 3, counts, 8, 0.5)))


def test_centres_on_the_border_belong_to_the_last_cell() -> None:
    """The target is just below 1, so the loss stays finite at a sigmoid of 1."""
    case = make_case(("three levels", 3, [4], 9, 0.5))
    case.boxes[0, 0] = torch.tensor([94.0, 20, 98, 25])
    case.boxes[0, 1] = torch.tensor([30.0, 58, 42, 70])
    case.labels[0, :2] = torch.tensor([0, 1])
    assert cell_of(case, case.boxes[0, 0].tolist(), 0) == (2, 11)
    assert_matches_loop(case)


# By hand


def two_cells(
    gt_boxes: list[list[float]], labels: list[int], threshold: float = 0.5
) -> tuple[dict[str, Tensor], Tensor]:
    """Losses and gradients of raw 0 in two cells of 16 in a row, anchors 12 x 12 and 6 x 6, three classes."""
    output = torch.zeros(1, 2, 1, 2, 8, requires_grad=True)
    criterion = MMDetectionLoss([[(12, 12), (6, 6)]], [16], threshold)
    losses = criterion([output], {"boxes": torch.tensor([gt_boxes]), "labels": torch.tensor([labels])})
    torch.stack(list(losses.values())).sum().backward()
    assert output.grad is not None
    return losses, output.grad[0, :, 0]  # (anchor, column, 8)


def test_one_ground_truth_by_hand() -> None:
    # 12 x 9 in the middle of the first cell: IoU 108 / 144 = 3/4 with the large prior, 36 / 108 = 1/3 with the small
    losses, gradient = two_cells([[2.0, 3.5, 14, 12.5]], [2])
    log_2, t_h = math.log(2), math.log(9 / 12)
    assert losses["loss_box"].item() == pytest.approx(2 * 2 * log_2 + 2 * t_h**2)
    assert losses["loss_objectness"].item() == pytest.approx(4 * log_2)  # one positive, three negatives
    assert losses["loss_class"].item() == pytest.approx(3 * log_2)
    assert gradient[0, 0].tolist() == pytest.approx([0, 0, 0, -4 * t_h, -0.5, 0.5, 0.5, -0.5])
    assert gradient[:, :, 4].tolist() == [[-0.5, 0.5], [0.5, 0.5]]


# 12 x 12 around (15.9, 8), in the first cell. IoU with the large priors 49.2 / 238.8 = 0.206 and 46.8 / 241.2 = 0.194,
# with the small ones 6.6 / 173.4 = 0.038 and 5.4 / 174.6 = 0.031.
BETWEEN = [9.9, 2.0, 21.9, 14.0]


def test_ignored_prior_by_hand() -> None:
    """A prior with an IoU above the threshold in a cell without a centre."""
    _, gradient = two_cells([BETWEEN], [0], threshold=0.15)
    assert gradient[:, :, 4].tolist() == [[-0.5, 0], [0.5, 0.5]]


def test_ground_truth_may_take_a_prior_in_the_cell_of_another() -> None:
    """As the original does. 4 x 4 in the second cell: IoU 16 / 144 with its large prior, 16 / 36 with its small one."""
    _, gradient = two_cells([BETWEEN, [22.0, 6, 26, 10]], [0, 1], threshold=0.15)
    assert gradient[:, :, 4].tolist() == [[-0.5, -0.5], [0.5, -0.5]]
    assert gradient[0, 1, 5:].tolist() == [-0.5, 0.5, 0.5]  # the second large prior learns the first ground-truth box
    assert gradient[1, 1, 5:].tolist() == [0.5, -0.5, 0.5]
    # its centre is left of that cell: target 0 (1e-6), gradient 2 * (1/2 - 0)
    assert gradient[0, 1, 0].item() == pytest.approx(1, abs=1e-5)


def test_later_ground_truth_overrides_and_gives_its_class() -> None:
    """Two ground-truth boxes with the same best prior: the last one takes it, even with the lower IoU."""
    exact, loose = [2.0, 2, 14, 14], [2.0, 2, 14, 13]
    for gt_boxes, labels, expected in [([exact, loose], [0, 1], 1), ([loose, exact], [2, 0], 0)]:
        losses, gradient = two_cells(gt_boxes, labels)
        assert gradient[0, 0, 5:].tolist() == [-0.5 if number == expected else 0.5 for number in range(3)]
        assert losses["loss_class"].item() == pytest.approx(3 * math.log(2))  # counted once
    t_h = math.log(11 / 12)
    assert two_cells([exact, loose], [0, 1])[1][0, 0, 3].item() == pytest.approx(-4 * t_h)


def test_equal_anchors_both_learn() -> None:
    output = torch.zeros(1, 2, 1, 1, 6, requires_grad=True)
    criterion = MMDetectionLoss([[(12, 6), (6, 12)]], [16], 0.5)
    losses = criterion([output], {"boxes": torch.tensor([[[4.0, 4, 12, 12]]]), "labels": torch.tensor([[0]])})
    losses["loss_objectness"].backward()
    assert output.grad is not None and output.grad[0, :, 0, 0, 4].tolist() == [-0.5, -0.5]


def test_crowd_region_excuses_background_only() -> None:
    region = [0.0, 0, 16, 16]  # the first cell
    losses, gradient = two_cells([region], [-2])
    assert losses["loss_box"] == 0 and losses["loss_class"] == 0
    assert gradient[:, :, 4].tolist() == [[0, 0.5], [0, 0.5]]
    _, gradient = two_cells([region, [2.0, 2, 14, 14]], [-2, 0])
    assert gradient[:, :, 4].tolist() == [[-0.5, 0.5], [0, 0.5]]


def test_cross_entropy_against_torch() -> None:
    case = make_case(("three levels", 5, [7, 0, 13], 17, 0.5))
    losses = case.criterion(class_loss="cross_entropy")(case.outputs, case.targets())
    expected = 0.0
    for image in range(3):
        for (level, *position), number in slow_grid(case, image)[0].items():
            expected += F.cross_entropy(case.outputs[level][(image, *position)][5:], case.labels[image, number]).item()
    assert losses["loss_class"].item() == pytest.approx(expected, rel=1e-5)


def test_assignment_names_the_gt_boxes_and_repeats_no_positive() -> None:
    """What the loss reads from the assignment, place by place."""
    case = make_case(("three levels", 4, [6, 0, 25], 10, 0.5))
    grid = assign_by_grid(
        case.boxes,
        case.labels,
        case.criterion().layout.tables([tuple(output.shape[2:4]) for output in case.outputs]).anchors,
        0.5,
    )
    flat = sorted(all_predictions(case), key=lambda place: (place[0], place[2], place[3], place[1]))
    for image in range(3):
        positives = slow_grid(case, image)[0]
        found = {}
        for slot in grid.positive[image].nonzero().flatten().tolist():
            place = flat[grid.index[image, slot].item()]
            assert place not in found
            found[place] = grid.gt[image, slot].item()
            level, anchor, row, column = place
            assert tuple(grid.anchor[image, slot].tolist()) == case.anchors[level][anchor]
            assert grid.cell[image, slot].tolist() == [column, row]
            assert grid.stride[image, slot] == case.strides[level]
        assert found == positives
