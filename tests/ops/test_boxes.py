import math
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor
from torchvision.ops import box_iou

from detection.ops.boxes import (
    box_area,
    clip_boxes,
    complete_iou,
    cxcywh_to_xyxy,
    distance_iou,
    efficient_iou,
    elementwise_iou,
    generalized_iou,
    generalized_iou_xyxy,
    pairwise_intersection,
    pairwise_iou,
    pairwise_wh_iou,
    scylla_iou,
    xyxy_to_cxcywh,
)
from tests.support.slow_boxes import (
    slow_complete_iou,
    slow_distance_iou,
    slow_efficient_iou,
    slow_generalized_iou,
    slow_intersection,
    slow_iou,
    slow_overlap_and_hull,
    slow_plain_iou,
    slow_scylla_iou,
    slow_v,
)


def random_boxes(*shape: int, seed: int = 0, size: float = 100.0) -> Tensor:
    """Valid boxes, some partly left of or above the origin."""
    generator = torch.Generator().manual_seed(seed)
    corner = (torch.rand(*shape, 2, generator=generator) - 0.2) * size
    return torch.cat([corner, corner + torch.rand(*shape, 2, generator=generator) * size], dim=-1)


# Formats


def test_formats_by_hand() -> None:
    # from (10, 20) to (40, 60): 30 wide, 40 high, centre (25, 40)
    assert xyxy_to_cxcywh(torch.tensor([10.0, 20, 40, 60])).tolist() == [25, 40, 30, 40]
    assert cxcywh_to_xyxy(torch.tensor([25.0, 40, 30, 40])).tolist() == [10, 20, 40, 60]


@pytest.mark.parametrize("shape", [(), (7,), (2, 5), (2, 3, 4, 5), (0,)])
def test_formats_are_inverse(shape: tuple[int, ...]) -> None:
    boxes = random_boxes(*shape)
    assert xyxy_to_cxcywh(boxes).shape == boxes.shape
    torch.testing.assert_close(cxcywh_to_xyxy(xyxy_to_cxcywh(boxes)), boxes)
    torch.testing.assert_close(xyxy_to_cxcywh(cxcywh_to_xyxy(boxes)), boxes)


def test_area_by_hand() -> None:
    boxes = torch.tensor([[1.0, 2, 4, 7], [5, 5, 5, 9]])  # 3 * 5, and a box without width
    assert box_area(boxes).tolist() == [15, 0]


# Overlaps


def test_iou_by_hand() -> None:
    box = torch.tensor([[0.0, 0, 10, 10]])
    others = torch.tensor(
        [
            [0.0, 0, 10, 10],  # equal: 1
            [5, 0, 15, 10],  # half of each shared: 50 / 150
            [2, 2, 7, 6],  # inside: 20 / 100
            [10, 0, 20, 10],  # touches along one side: 0
            [20, 20, 30, 30],  # apart in x and y, where the product of two negative lengths would be positive: 0
        ]
    )
    assert pairwise_intersection(box, others).tolist() == [[100, 50, 20, 0, 0]]
    torch.testing.assert_close(pairwise_iou(box, others), torch.tensor([[1, 1 / 3, 0.2, 0, 0]]))


def test_pairwise_overlaps_against_loop() -> None:
    boxes_1, boxes_2 = random_boxes(2, 6, seed=1), random_boxes(2, 9, seed=2)
    intersection, iou = pairwise_intersection(boxes_1, boxes_2), pairwise_iou(boxes_1, boxes_2)
    assert intersection.shape == iou.shape == (2, 6, 9)
    assert 0.2 < (iou > 0).float().mean() < 1  # the boxes overlap here and there
    for image in range(2):
        for n, box_1 in enumerate(boxes_1[image].tolist()):
            for m, box_2 in enumerate(boxes_2[image].tolist()):
                assert intersection[image, n, m].item() == pytest.approx(slow_intersection(box_1, box_2), rel=1e-4)
                assert iou[image, n, m].item() == pytest.approx(slow_iou(box_1, box_2), rel=1e-4, abs=1e-7)


def test_iou_against_torchvision() -> None:
    boxes_1, boxes_2 = random_boxes(50, seed=3), random_boxes(70, seed=4)
    torch.testing.assert_close(pairwise_iou(boxes_1, boxes_2), box_iou(boxes_1, boxes_2))


def test_iou_broadcasts_over_images() -> None:
    """One set of boxes against the sets of several images."""
    boxes_1, boxes_2 = random_boxes(6, seed=5), random_boxes(3, 4, seed=6)
    together = pairwise_iou(boxes_1, boxes_2)
    for image in range(3):
        assert torch.equal(together[image], pairwise_iou(boxes_1, boxes_2[image]))


def test_degenerate_boxes_have_iou_zero_not_nan() -> None:
    point, segment, box = [5.0, 5, 5, 5], [0.0, 5, 10, 5], [0.0, 0, 10, 10]
    degenerate = torch.tensor([point, segment, [0.0, 0, 0, 0]])
    assert torch.equal(pairwise_iou(degenerate, degenerate), torch.zeros(3, 3))
    assert torch.equal(pairwise_iou(degenerate, torch.tensor([box])), torch.zeros(3, 1))
    assert torch.equal(pairwise_iou(torch.tensor([box]), degenerate), torch.zeros(1, 3))
    assert torch.equal(pairwise_wh_iou(torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [3.0, 4.0]])), torch.zeros(2, 2))


def test_overlaps_of_no_boxes_have_shape() -> None:
    none, some = torch.zeros(0, 4), random_boxes(3)
    assert pairwise_iou(none, some).shape == (0, 3)
    assert pairwise_iou(some, none).shape == (3, 0)
    assert pairwise_intersection(none, none).shape == (0, 0)


def test_overlaps_leave_their_input_alone() -> None:
    """Arguments are unchanged by the in-place operations on intermediates."""
    boxes_1, boxes_2 = random_boxes(5, seed=10), random_boxes(5, seed=11)
    before = boxes_1.clone(), boxes_2.clone()
    pairwise_iou(boxes_1, boxes_2)
    pairwise_wh_iou(boxes_1[:, 2:], boxes_2[:, 2:])
    assert torch.equal(boxes_1, before[0]) and torch.equal(boxes_2, before[1])


def test_wh_iou_by_hand() -> None:
    shapes = torch.tensor([[10.0, 20.0], [20.0, 10.0]])
    anchors = torch.tensor([[10.0, 20.0], [5.0, 10.0], [40.0, 40.0]])
    expected = torch.tensor(
        [
            [1, 50 / 200, 200 / 1600],  # equal; half in each direction; inside
            [100 / 300, 50 / 200, 200 / 1600],  # shared 10 x 10 of 200 + 200 - 100; shared 5 x 10 of 200
        ]
    )
    torch.testing.assert_close(pairwise_wh_iou(shapes, anchors), expected)


def test_wh_iou_equals_iou_of_boxes_on_one_corner() -> None:
    generator = torch.Generator().manual_seed(12)
    shapes, anchors = torch.rand(2, 30, 2, generator=generator) * 50, torch.rand(9, 2, generator=generator) * 50
    boxes = torch.cat([torch.zeros(2, 30, 2), shapes], dim=-1)
    anchor_boxes = torch.cat([torch.zeros(9, 2), anchors], dim=-1)
    torch.testing.assert_close(pairwise_wh_iou(shapes, anchors), pairwise_iou(boxes, anchor_boxes))


# Clipping


def test_clip_by_hand() -> None:
    boxes = torch.tensor(
        [
            [10.0, 20, 30, 40],  # inside: unchanged
            [-5, -6, 300, 200],  # larger than the 100 x 50 image on every side
            [90, 40, 110, 45],  # over the right side only
            [150, 60, 160, 70],  # outside: becomes a point on the corner
        ]
    )
    expected = [[10, 20, 30, 40], [0, 0, 100, 50], [90, 40, 100, 45], [100, 50, 100, 50]]
    assert clip_boxes(boxes, width=100, height=50).tolist() == expected
    assert boxes[1, 0] == -5  # the input is left alone


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_box_functions_keep_the_float_type(dtype: torch.dtype) -> None:
    boxes = torch.tensor([[0, 0, 4, 8], [2, 0, 6, 8]], dtype=dtype)
    assert xyxy_to_cxcywh(boxes).dtype == cxcywh_to_xyxy(boxes).dtype == clip_boxes(boxes, 5, 5).dtype == dtype
    iou = pairwise_iou(boxes, boxes)
    assert iou.dtype == dtype
    assert math.isclose(iou[0, 1].item(), 16 / 48, rel_tol=torch.finfo(dtype).eps)


# IoU of boxes one by one, for losses


def random_boxes_cxcywh(count: int, seed: int) -> Tensor:
    """Overlapping boxes near the origin, float64."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 12
    size = torch.exp(torch.randn(count, 2, generator=generator, dtype=torch.float64) + 1.5)
    return torch.cat([centre, size], dim=-1)


def test_generalized_iou_by_hand() -> None:
    boxes = torch.tensor([[2.0, 2, 4, 4], [2, 2, 4, 4], [1, 1, 2, 2], [2, 2, 4, 4]])
    others = torch.tensor([[4.0, 2, 4, 4], [2, 2, 4, 4], [5, 1, 2, 2], [2, 2, 2, 2]])
    # half over: 8 / 24, hull 6 x 4 full; equal: 1; apart: IoU 0, union 8, hull 6 x 2 = 12; inside: 4 / 16
    assert generalized_iou(boxes, others).tolist() == pytest.approx([1 / 3, 1, -4 / 12, 1 / 4])


def test_complete_iou_by_hand() -> None:
    boxes = torch.tensor([[2.0, 2, 4, 4], [2, 2, 4, 4], [1, 1, 2, 2], [2, 2, 4, 4], [2, 2, 4, 4]])
    others = torch.tensor([[4.0, 2, 4, 4], [2, 2, 4, 4], [5, 1, 2, 2], [2, 2, 2, 2], [2, 2, 4, 1e-9]])
    # half over: 1/3, distance 2, diagonal^2 = 36 + 16; equal; apart: distance 4, diagonal^2 = 36 + 4; inside: 1/4;
    # a line: IoU 0, v = 4 / pi^2 * (pi / 2 - pi / 4)^2 = 1/4, alpha = 1/4 / (1 + 1/4)
    expected = [1 / 3 - 4 / 52, 1, -16 / 40, 1 / 4, -1 / 5 * 1 / 4]
    assert complete_iou(boxes, others).tolist() == pytest.approx(expected)


def giou_of_corners(boxes: Tensor, others: Tensor) -> Tensor:
    return generalized_iou_xyxy(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(others))


@pytest.mark.parametrize("seed", [0, 1])
def test_generalized_and_complete_iou_against_loop_and_torchvision(seed: int) -> None:
    boxes, others = random_boxes_cxcywh(60, seed), random_boxes_cxcywh(60, seed + 10)
    pairs = list(zip(boxes.tolist(), others.tolist(), strict=True))
    overlapping = sum(slow_overlap_and_hull(*pair)[0] > 0 for pair in pairs)
    assert 10 < overlapping < 55
    for ours, slow, theirs in [
        (generalized_iou, slow_generalized_iou, torchvision.ops.generalized_box_iou_loss),
        (giou_of_corners, slow_generalized_iou, torchvision.ops.generalized_box_iou_loss),
        (complete_iou, slow_complete_iou, torchvision.ops.complete_box_iou_loss),
    ]:
        values = ours(boxes, others)
        assert values.tolist() == pytest.approx([slow(*pair) for pair in pairs], abs=1e-12)
        torch.testing.assert_close(1 - values, theirs(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(others)), atol=1e-6, rtol=0)


def test_gradients_of_generalized_and_complete_iou_against_central_differences() -> None:
    boxes, others = random_boxes_cxcywh(60, 2), random_boxes_cxcywh(60, 12)
    for name, ours in [("giou", generalized_iou), ("giou", giou_of_corners), ("ciou", complete_iou)]:
        leaf = boxes.clone().requires_grad_()
        ours(leaf, others).sum().backward()
        assert leaf.grad is not None
        for gradient, box, other in zip(leaf.grad.tolist(), boxes.tolist(), others.tolist(), strict=True):
            v, (intersection, union, _, _) = slow_v(box, other), slow_overlap_and_hull(box, other)
            alpha = v / (1 - intersection / union + v)
            for number in range(4):
                values = []
                for step in (1e-6, -1e-6):
                    moved = [value + step * (i == number) for i, value in enumerate(box)]
                    values.append(
                        slow_generalized_iou(moved, other) if name == "giou" else slow_complete_iou(moved, other, alpha)
                    )
                assert gradient[number] == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-7)


SLOW = {
    elementwise_iou: slow_plain_iou,
    distance_iou: slow_distance_iou,
    efficient_iou: slow_efficient_iou,
    scylla_iou: slow_scylla_iou,
}


@pytest.mark.parametrize("function", SLOW)
def test_further_overlaps_and_their_gradients_against_loop(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Boxes apart, touching, overlapping, one inside the other; central differences."""
    boxes, others = random_boxes_cxcywh(60, 4), random_boxes_cxcywh(60, 14)
    leaf = boxes.clone().requires_grad_()
    values = function(leaf, others)
    values.sum().backward()
    assert leaf.grad is not None
    for value, gradient, box, other in zip(
        values.tolist(), leaf.grad.tolist(), boxes.tolist(), others.tolist(), strict=True
    ):
        slow = SLOW[function]
        assert value == pytest.approx(slow(box, other), abs=1e-12)
        for number in range(4):
            moved = [[side + step * (i == number) for i, side in enumerate(box)] for step in (1e-6, -1e-6)]
            expected = (slow(moved[0], other) - slow(moved[1], other)) / 2e-6
            assert gradient[number] == pytest.approx(expected, abs=1e-6)


def test_further_overlaps_by_hand() -> None:
    """Side by side, 2 apart, equal 4 x 4 boxes: IoU 1/3, hull 6 x 4; then one of half the width in the middle."""
    boxes, others = torch.tensor([[2.0, 2, 4, 4], [2, 2, 4, 4]]), torch.tensor([[4.0, 2, 4, 4], [2, 2, 2, 4]])
    assert elementwise_iou(boxes, others).tolist() == pytest.approx([1 / 3, 1 / 2])
    assert distance_iou(boxes, others).tolist() == pytest.approx([1 / 3 - 4 / 52, 1 / 2])
    assert efficient_iou(boxes, others).tolist() == pytest.approx([1 / 3 - 4 / 52, 1 / 2 - 4 / 16])
    shift, change = 1 - math.exp(-2 * 4 / 36), (1 - math.exp(-1 / 2)) ** 4
    assert scylla_iou(boxes, others).tolist() == pytest.approx([1 / 3 - shift / 2, 1 / 2 - change / 2])


@pytest.mark.parametrize("function", [generalized_iou, giou_of_corners, complete_iou, *SLOW])
def test_iou_of_extreme_boxes_is_finite_with_finite_gradients(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Equal, touching, huge, tiny and line-shaped boxes, far from the origin too; float32."""
    others = torch.tensor([[5000.0, 5000, 10, 20]]).expand(8, 4)
    boxes = torch.tensor(
        [
            [5000.0, 5000, 10, 20],
            [5010, 5000, 10, 20],
            [5000, 5000, 1e7, 1e7],
            [5000, 5000, 1e-6, 1e-6],
            [5000, 5000, 1e7, 1e-6],
            [0, 0, 1e-6, 1e7],
            [-1e6, 1e6, 1e-3, 1e-3],
            [5000, 5000, 10, 20.000001],
        ],
        requires_grad=True,
    )
    values = function(boxes, others)
    values.sum().backward()
    assert values.isfinite().all() and boxes.grad is not None and boxes.grad.isfinite().all()
    assert (values <= 1 + 1e-6).all() and values[0] == 1


def test_small_boxes_far_from_the_origin_keep_their_digits() -> None:
    """Boxes of 0.01 pixels at x = 600, where float32 numbers are 6e-5 apart."""
    boxes = torch.tensor([[600.0, 600, 0.01, 0.01]])
    others = torch.tensor([[600.0, 600, 0.02, 0.01]])
    assert generalized_iou(boxes, others).item() == pytest.approx(0.5, rel=1e-5)
