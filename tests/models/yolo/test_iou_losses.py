"""`GIoULoss` and `CIoULoss` against plain Python floats: values, and central differences for the box gradients.

Per image: s * (1 - GIoU) or s * (1 - CIoU) of the decoded box of each positive and its last ground-truth box,
s = 2 - w * h; objectness and class loss are Darknet's.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from detection.models.yolo.darknet_loss import MAX_EXPONENT
from tests.support.loss_cases import Case, box_targets, darknet_deltas, decode, last_gt, to_cxcywh
from tests.support.slow_boxes import slow_complete_iou, slow_generalized_iou, slow_overlap_and_hull, slow_v

Place = tuple[int, int, int, int]
LARGE = (224, 160)
CASES: list[tuple[Any, ...]] = [  # arguments of `Case`
    ("three levels", 4, [6, 0, 17], 0, 0.7),
    ("two levels", 1, [20], 4, 0.5),
    ("unequal levels", 2, [13, 20], 5, 0.6),
    ("full", 5, [19, 0, 14], 18, 0.7, 0.9, LARGE),
    ("tiny", 5, [21, 0, 16], 19, 0.7, 0.9, LARGE),
    ("three levels", 3, [13, 0, 9], 7, 0.7, 0.6, (96, 64), 1.2),
]


def slow_box_loss(case: Case, raw: list[float], place: Place, box: list[float], alpha: float | None = None) -> float:
    _, s = box_targets(case, box)
    predicted, gt = to_cxcywh(decode(case, raw, *place)), to_cxcywh(box)
    if case.loss == "giou":
        return s * (1 - slow_generalized_iou(predicted, gt))
    return s * (1 - slow_complete_iou(predicted, gt, alpha))


def slow_gradients(case: Case) -> list[Tensor]:
    """Darknet's with the box values replaced by central differences; alpha of CIoU held fixed."""
    gradients = [-delta for delta in darknet_deltas(case)]
    for gradient in gradients:
        gradient[..., :4] = 0
    for image, place, box in last_gt(case):
        level, *position = place
        raw = case.outputs[level][(image, *position)].tolist()
        predicted, gt = to_cxcywh(decode(case, raw, *place)), to_cxcywh(box)
        v, (intersection, union, _, _) = slow_v(predicted, gt), slow_overlap_and_hull(predicted, gt)
        alpha = v / (1 - intersection / union + v)
        for number in range(4):
            losses = []
            for step in (1e-6, -1e-6):
                moved = [value + step * (i == number) for i, value in enumerate(raw)]
                losses.append(slow_box_loss(case, moved, place, box, alpha))
            gradients[level][(image, *position, number)] = (losses[0] - losses[1]) / 2e-6
    return gradients


@pytest.mark.parametrize("loss", ["giou", "ciou"])
@pytest.mark.parametrize("arguments", CASES)
def test_gradients_and_values_against_loop(arguments: tuple[Any, ...], loss: str) -> None:
    case = Case(*arguments, loss=loss)
    losses, gradients = case.gradients()
    for gradient, expected in zip(gradients, slow_gradients(case), strict=True):
        torch.testing.assert_close(gradient.double(), expected, atol=3e-5, rtol=1e-4)
    total = 0.0
    for image, place, box in last_gt(case):
        level, *position = place
        total += slow_box_loss(case, case.outputs[level][(image, *position)].tolist(), place, box)
    assert losses["loss_box"].item() == pytest.approx(total / len(case.boxes), rel=1e-5)
    darknet = Case(*arguments).gradients()[0]
    assert losses["loss_objectness"] == darknet["loss_objectness"] and losses["loss_class"] == darknet["loss_class"]


def test_cases_contain_every_kind_of_overlap() -> None:
    kinds = {"apart": 0, "overlapping": 0, "one inside the other": 0}
    for arguments in CASES:
        case = Case(*arguments)
        for image, place, box in last_gt(case):
            level, *position = place
            predicted = to_cxcywh(decode(case, case.outputs[level][(image, *position)].tolist(), *place))
            gt = to_cxcywh(box)
            intersection, *_ = slow_overlap_and_hull(predicted, gt)
            smaller = min(predicted[2] * predicted[3], gt[2] * gt[3])
            inside = intersection == pytest.approx(smaller)
            kinds["one inside the other" if inside else "overlapping" if intersection else "apart"] += 1
    assert min(kinds.values()) >= 1 and kinds["overlapping"] > 30, kinds


@pytest.mark.parametrize("loss", ["giou", "ciou"])
def test_exact_prediction_has_no_box_loss(loss: str) -> None:
    """One cell of 32, anchor and ground truth 16 x 16 in its middle, raw 0."""
    case = Case("two levels", 2, [0], 0, loss=loss)
    case.anchors, case.strides = [[(16, 16)]], [32]
    output = torch.zeros(1, 1, 1, 1, 7, requires_grad=True)
    targets = {"boxes": torch.tensor([[[8.0, 8, 24, 24]]]), "labels": torch.tensor([[0]])}
    losses = case.criterion()([output], targets)
    losses["loss_box"].backward()
    assert losses["loss_box"].item() == 0 and output.grad is not None and output.grad.isfinite().all()


@pytest.mark.parametrize("loss", ["giou", "ciou"])
def test_one_ground_truth_by_hand(loss: str) -> None:
    """Ground truth 8 x 16 inside the predicted 16 x 16: IoU 1/2, hull = union; s = 2 - 128 / 1024."""
    case = Case("two levels", 2, [0], 0, loss=loss)
    case.anchors, case.strides = [[(16, 16)]], [32]
    targets = {"boxes": torch.tensor([[[12.0, 8, 20, 24]]]), "labels": torch.tensor([[0]])}
    losses = case.criterion()([torch.zeros(1, 1, 1, 1, 7)], targets)
    term = 0.5
    if loss == "ciou":  # v = 4 / pi^2 * (atan(1/2) - atan(1))^2 = 0.041956, alpha = v / (1/2 + v); same centre
        term += 0.041956**2 / (0.5 + 0.041956)
    assert losses["loss_box"].item() == pytest.approx((2 - 128 / 1024) * term, rel=1e-5)


@pytest.mark.parametrize("loss", ["giou", "ciou"])
@pytest.mark.parametrize("exponent", [-6.0, -3.0, 3.0, 6.0])
def test_very_small_and_very_large_predictions(exponent: float, loss: str) -> None:
    """1 / 400 to 400 anchors: the gradients are still the formula's."""
    case = Case("two levels", 2, [9], 3, loss=loss)
    for output in case.outputs:
        output[..., 2:4] += exponent
    for gradient, expected in zip(case.gradients()[1], slow_gradients(case), strict=True):
        torch.testing.assert_close(gradient.double(), expected, atol=3e-5, rtol=1e-3)


@pytest.mark.parametrize("loss", ["giou", "ciou"])
def test_no_gradient_beyond_the_bound_of_the_exponent(loss: str) -> None:
    case = Case("two levels", 2, [4], 3, loss=loss)
    for value in (-MAX_EXPONENT - 0.1, MAX_EXPONENT + 0.1):
        for output in case.outputs:
            output[..., 2:4] = value
        _, gradients = case.gradients()
        assert not any(gradient[..., 2:4].any() for gradient in gradients)
        assert any(gradient[..., 4].any() for gradient in gradients)
