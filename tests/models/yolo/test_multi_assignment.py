"""`assign_several` against plain loops, over random boxes with padding, crowds, repeated, tiny and border boxes."""

import math

import pytest
import torch
from torch import Tensor

from detection.models.yolo.head_layout import HeadLayout
from detection.models.yolo.multi_assignment import Claims, assign_several
from tests.support.loss_cases import LEVELS
from tests.support.multi_claims import Place, best_anchor, cells_of, slow_claims

SIZE = (96, 64)  # width, height
FORMS = [(match, neighbours) for match in ("best", "iou", "ratio") for neighbours in (False, True)]


def layout_of(name: str) -> tuple[HeadLayout, list[tuple[int, int]], list[Place]]:
    """The layout, its sizes and the place of each flat index."""
    strides, anchors = LEVELS[name]
    sizes = [(SIZE[1] // stride, SIZE[0] // stride) for stride in strides]
    places = [
        (level, anchor, row, column)
        for level, (rows, columns) in enumerate(sizes)
        for row in range(rows)
        for column in range(columns)
        for anchor in range(len(anchors[level]))
    ]
    return HeadLayout(anchors, strides), sizes, places


def random_targets(images: int, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Boxes of 0.5 to 90 px, clipped to the image, a fifth equal to an earlier one; a fifth padding, a tenth crowds."""
    generator = torch.Generator().manual_seed(seed)
    sides = torch.exp(torch.rand(images, rows, 2, generator=generator) * math.log(180)) / 2
    centres = torch.rand(images, rows, 2, generator=generator) * torch.tensor(SIZE)
    whole = torch.rand(images, rows, 1, generator=generator) < 0.3
    centres = torch.where(whole, (centres / 8).round() * 8, centres)  # on the borders of cells
    boxes = torch.cat([centres - sides / 2, centres + sides / 2], dim=-1)
    # Sixteenths of a pixel: centres are exact numbers, so that loop and program see the same cell at its border.
    boxes = (boxes * 16).round() / 16
    boxes[..., 2:] = torch.maximum(boxes[..., 2:], boxes[..., :2] + 1 / 16)
    boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([*SIZE, *SIZE]).float())
    labels = torch.randint(0, 4, (images, rows), generator=generator)
    kind = torch.rand(images, rows, generator=generator)
    earlier = (torch.rand(rows, generator=generator) * torch.arange(rows)).long()
    boxes = torch.where((kind < 0.2)[..., None], boxes[:, earlier], boxes)
    return boxes, torch.where(kind > 0.8, -1, torch.where(kind > 0.7, -2, labels))


def assign(name: str, boxes: Tensor, labels: Tensor, match: str, neighbours: bool) -> tuple[Claims, list[Place]]:
    layout, sizes, places = layout_of(name)
    table = layout.tables(sizes).anchors
    return assign_several(boxes, labels, table, len(places), match, 0.213, 4.0, neighbours), places


@pytest.mark.parametrize(("match", "neighbours"), FORMS)
@pytest.mark.parametrize("name", ["three levels", "two levels", "unequal levels"])
def test_against_loops_over_images_and_boxes(name: str, match: str, neighbours: bool) -> None:
    strides, anchors = LEVELS[name]
    shared = beside = 0
    for rows, seed in ((1, 0), (5, 1), (24, 2)):
        boxes, labels = random_targets(20, rows, seed)
        claims, places = assign(name, boxes, labels, match, neighbours)
        for image in range(len(boxes)):
            own = claims.positive[image]
            indices, gt = claims.index[image][own].tolist(), claims.gt[image][own].tolist()
            assert len(set(indices)) == len(indices)
            found = dict(zip((places[index] for index in indices), gt, strict=True))
            box_list, label_list = boxes[image].tolist(), labels[image].tolist()
            expected = slow_claims(anchors, strides, SIZE, box_list, label_list, match, neighbours)
            assert found == expected
            check_every_box_has_a_prediction(name, box_list, label_list, expected)
            alone = sum(
                len(slow_claims(anchors, strides, SIZE, [box], [label], match, neighbours))
                for box, label in zip(box_list, label_list, strict=True)
            )
            shared += alone - len(expected)
            beside += len(expected)
    assert shared > 20 and beside > 300  # the cases contain conflicts


def check_every_box_has_a_prediction(
    name: str, boxes: list[list[float]], labels: list[int], found: dict[Place, int]
) -> None:
    """A box without one has the best anchor and the cell of another box that has one."""
    strides, anchors = LEVELS[name]
    places = {}
    for gt, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        if label >= 0:
            level, number = best_anchor(box, anchors)
            grid = SIZE[0] // strides[level], SIZE[1] // strides[level]
            places[gt] = level, number, *cells_of(box, strides[level], *grid, False)[0]
    for gt in places.keys() - set(found.values()):
        winner = found[places[gt]]
        assert winner != gt and places[winner] == places[gt]


def one_image(*boxes: tuple[float, float, float, float]) -> tuple[Tensor, Tensor]:
    """From (centre x, centre y, width, height), padded by one row."""
    rows = [(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h in boxes]
    return torch.tensor([[*rows, (0, 0, 0, 0)]]), torch.tensor([[0] * len(rows) + [-1]])


def owner(place: Place, *boxes: tuple[float, float, float, float], match: str = "iou", neighbours: bool = False) -> int:
    """The row of the box that a prediction of "three levels" belongs to; -1: none."""
    claims, places = assign("three levels", *one_image(*boxes), match, neighbours)
    mine = claims.positive[0] & (claims.index[0] == places.index(place))
    return int(claims.gt[0][mine].item()) if mine.any() else -1


def test_who_wins_a_shared_prediction_by_hand() -> None:
    """Anchors (4, 5), (6, 12), (13, 9) in cell (1, 2) of stride 8."""
    near, far = (20, 12, 13, 9), (20, 12, 12, 8)  # both have the best anchor (13, 9); the first equals it
    assert owner((0, 2, 1, 2), near, far) == 0 == owner((0, 2, 1, 2), near, near, far) - 1  # of equals the last
    assert owner((0, 2, 1, 2), far, near) == 1
    # (6, 12): the best anchor of the second box only, though the first has the higher IoU with it
    wide, narrow = (20, 12, 10, 11), (20, 12, 3, 11)
    assert best_anchor((0, 0, 10, 11), LEVELS["three levels"][1]) == (0, 2)
    assert best_anchor((0, 0, 3, 11), LEVELS["three levels"][1]) == (0, 1)
    assert owner((0, 1, 1, 2), wide) == 0
    assert owner((0, 1, 1, 2), wide, narrow) == 1 == owner((0, 1, 1, 2), narrow, wide) + 1
    # A best anchor in a neighbour cell is no first claim: there the IoU decides.
    beside = (26, 12, 12, 8)  # cell (1, 3), nearer to the left
    assert owner((0, 2, 1, 2), beside, neighbours=True) == 0
    assert owner((0, 2, 1, 2), beside, (20, 12, 10, 11), match="best", neighbours=True) == 1


def test_thresholds_are_exclusive_and_the_best_anchor_always_counts() -> None:
    assert owner((2, 2, 0, 0), (20, 12, 20, 15), match="ratio") == -1  # 80 / 20 = 60 / 15 = 4
    assert owner((2, 2, 0, 0), (20, 12, 20.1, 15.1), match="ratio") == 0
    huge = (48, 32, 96, 64)
    assert [owner((2, 2, 1, 1), huge, match=match) for match in ("best", "iou", "ratio")] == [0, 0, 0]
    tiny = (20, 12, 0.01, 0.01)  # below every threshold
    assert [owner((0, 0, 1, 2), tiny, match=match) for match in ("best", "iou", "ratio")] == [0, 0, 0]
