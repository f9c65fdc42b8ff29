"""`grouped_nms` against a call of torchvision's `nms` per group, and against a plain loop."""

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor

from detection.ops import nms
from detection.ops.nms import grouped_nms
from tests.support.slow_boxes import slow_nms

Boxes = tuple[Tensor, Tensor, Tensor]


def on_device(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, max_per_group: int | None) -> Tensor:
    """The path of `grouped_nms` for CUDA tensors, run on the CPU."""
    order = scores.argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]
    sizes = groups.bincount()
    return order[nms._nms_on_device(boxes[order], sizes, iou_threshold, max_per_group)]


@pytest.fixture(params=[grouped_nms, on_device], ids=["cpu", "accelerator"])
def function(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    return request.param


def per_group(
    boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, max_per_group: int | None
) -> list[int]:
    kept = []
    for group in groups.unique().tolist():
        rows = (groups == group).nonzero()[:, 0]
        kept += rows[torchvision.ops.nms(boxes[rows], scores[rows], iou_threshold)[:max_per_group]].tolist()
    return kept


def slow(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> list[int]:
    """Greedy NMS of each group, one box after the other."""
    kept = []
    for group in groups.unique().tolist():
        rows = (groups == group).nonzero()[:, 0]
        kept += rows[slow_nms(boxes[rows].tolist(), scores[rows].tolist(), iou_threshold)].tolist()
    return kept


def crowded(count: int, classes: int, seed: int = 0, objects: int | None = None, levels: int | None = None) -> Boxes:
    """Boxes around a few places, as a detector predicts them; with levels many scores are equal."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(objects or max(count // 8, 1), 4, generator=generator) * torch.tensor([400.0, 400, 80, 80])
    places[:, 2:] += 10
    chosen = torch.randint(len(places), (count,), generator=generator)
    noise = torch.randn(count, 4, generator=generator) * 0.1 * places[chosen][:, [2, 3, 2, 3]]
    centre_size = places[chosen] + noise
    sides = centre_size[:, 2:].abs() + 1
    boxes = torch.cat([centre_size[:, :2] - sides / 2, centre_size[:, :2] + sides / 2], dim=1)
    scores = torch.rand(count, generator=generator)
    if levels:
        scores = (scores * levels).ceil() / levels
    # skewed: large groups and small ones
    groups = (torch.rand(count, generator=generator) ** 3 * classes).long()
    return boxes, scores, groups


@pytest.mark.parametrize("max_per_group", [1, 10, 100, None])
@pytest.mark.parametrize(
    ("count", "classes", "levels"), [(1, 1, None), (60, 30, 4), (1000, 80, None), (6000, 80, 5), (3000, 1, None)]
)
def test_equal_to_a_call_per_group(
    function: Callable[..., Tensor], count: int, classes: int, levels: int | None, max_per_group: int | None
) -> None:
    boxes, scores, groups = crowded(count, classes, levels=levels)
    for threshold in (0.0, 0.45, 0.6):
        expected = per_group(boxes, scores, groups, threshold, max_per_group)
        assert function(boxes, scores, groups, threshold, max_per_group).tolist() == expected
    if count == 6000:  # both CPU paths
        assert groups.bincount().min() <= nms.SMALL_GROUP < groups.bincount()[:10].min()


def test_more_than_the_first_share_is_looked_at_where_it_is_too_few(function: Callable[..., Tensor]) -> None:
    boxes, scores, groups = crowded(2500, 1, objects=30)
    expected = per_group(boxes, scores, groups, 0.45, 100)
    best = scores.argsort(descending=True)[: nms.FIRST_SHARE * 100]
    assert len(per_group(boxes[best], scores[best], groups[best], 0.45, 100)) < len(expected)
    assert function(boxes, scores, groups, 0.45, 100).tolist() == expected


def test_equal_to_a_plain_loop_on_whole_pixels(function: Callable[..., Tensor]) -> None:
    """Whole pixels are exact, so that an IoU may be exactly the threshold: such a box stays."""
    generator = torch.Generator().manual_seed(1)
    corners = torch.randint(0, 30, (400, 2), generator=generator)
    boxes = torch.cat([corners, corners + torch.randint(1, 4, (400, 2), generator=generator) * 8], dim=1).float()
    scores = torch.randint(1, 6, (400,), generator=generator) / 8
    groups = torch.randint(0, 5, (400,), generator=generator)
    expected = slow(boxes, scores, groups, 0.5)
    assert function(boxes, scores, groups, 0.5, None).tolist() == expected
    assert expected != slow(boxes, scores, groups, 0.4999)  # some are exactly 0.5


@pytest.mark.parametrize("odd", [1e9, 1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("count", [300, 5000])
def test_huge_and_non_finite_boxes_change_nothing_elsewhere(
    function: Callable[..., Tensor], odd: float, count: int
) -> None:
    boxes, scores, groups = crowded(count, 20)
    boxes[::50, 2:] = odd
    boxes[::75] = torch.tensor([-odd, -odd, odd, odd])
    kept = function(boxes, scores, groups, 0.45, 100).tolist()
    assert kept == per_group(boxes, scores, groups, 0.45, 100)
    if odd != odd:  # NaN: those boxes neither remove others nor are removed
        usual = torch.ones(count, dtype=torch.bool)
        usual[::50] = usual[::75] = False
        rows = usual.nonzero()[:, 0]
        rest = per_group(boxes[rows], scores[rows], groups[rows], 0.45, None)
        all_kept = function(boxes, scores, groups, 0.45, None)
        assert all_kept[usual[all_kept]].tolist() == rows[rest].tolist()
        assert torch.isin((~usual).nonzero()[:, 0], all_kept).all()


def test_boxes_without_area_and_equal_boxes(function: Callable[..., Tensor]) -> None:
    boxes = torch.tensor([[5.0, 5, 5, 9], [5, 5, 5, 9], [1, 1, 4, 4], [1, 1, 4, 4], [1, 1, 4, 4]])
    scores, groups = torch.tensor([0.5, 0.5, 0.5, 0.7, 0.5]), torch.tensor([0, 0, 0, 0, 1])
    # 0 / 0 is no overlap: both lines stay; of the equal boxes the better one, in each group
    assert function(boxes, scores, groups, 0.45, None).tolist() == [3, 0, 1, 4]


def test_half_precision_is_computed_in_float32(function: Callable[..., Tensor]) -> None:
    boxes, scores, groups = crowded(500, 10)
    boxes, scores = boxes.half(), scores.half()
    expected = per_group(boxes.float(), scores.float(), groups, 0.45, 100)
    assert function(boxes if function is grouped_nms else boxes.float(), scores, groups, 0.45, 100).tolist() == expected


def test_nothing(function: Callable[..., Tensor]) -> None:
    kept = function(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0.45, 100)
    assert (kept.dtype, kept.shape) == (torch.int64, (0,))


@pytest.mark.parametrize("size", [1, 50, 3000])
def test_pieces_change_nothing(function: Callable[..., Tensor], size: int, monkeypatch) -> None:
    boxes, scores, groups = crowded(300, 20)
    groups = groups * 3 + 2  # some numbers have no box
    for name in ("PAIRS_AT_A_TIME", "PAIRS_AT_A_TIME_CPU"):
        monkeypatch.setattr(nms, name, size)
    for block in (1, 16, 256):
        monkeypatch.setattr(nms, "BLOCK", block)
        for max_per_group in (7, None):
            expected = per_group(boxes, scores, groups, 0.45, max_per_group)
            assert function(boxes, scores, groups, 0.45, max_per_group).tolist() == expected


def test_one_after_the_other_along_a_chain(function: Callable[..., Tensor]) -> None:
    """Each box overlaps only its neighbours: every second one is kept, which needs one pass per box."""
    corner = torch.arange(50.0)[:, None] * 3
    boxes = torch.cat([corner, torch.zeros(50, 1), corner + 10, torch.full((50, 1), 10.0)], dim=1)
    # IoU of neighbours 7 / 13, of the next but one 4 / 16
    scores = torch.linspace(1, 0.1, 50)
    assert function(boxes, scores, torch.zeros(50, dtype=torch.int64), 0.45, None).tolist() == list(range(0, 50, 2))


@pytest.mark.gpu
def test_cuda_equals_the_cpu() -> None:
    for count, classes in ((1000, 80), (20_000, 80)):
        boxes, scores, groups = crowded(count, classes, levels=200)
        expected = grouped_nms(boxes, scores, groups, 0.45, 100)
        kept = grouped_nms(boxes.cuda(), scores.cuda(), groups.cuda(), 0.45, 100)
        assert torch.equal(kept.cpu(), expected)
