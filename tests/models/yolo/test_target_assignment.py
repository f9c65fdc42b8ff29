import pytest
import torch
from torch import Tensor

from detection.models.yolo import criterion
from detection.models.yolo.criterion import MAX_PIECES, ignored_predictions, split_batch
from detection.models.yolo.darknet_loss import assign_targets
from detection.models.yolo.grid import anchor_table
from tests.support.loss_cases import overlap
from tests.support.slow_boxes import slow_iou

# Network input 96 wide, 64 high; the middle level has one anchor fewer than the others.
STRIDES = [8, 16, 32]
SIZES = [(8, 12), (4, 6), (2, 3)]  # rows, columns
ANCHORS = [
    torch.tensor([[4.0, 5.0], [6.0, 12.0], [13.0, 9.0]]),
    torch.tensor([[12.0, 24.0], [25.0, 18.0]]),
    torch.tensor([[46.0, 36.0], [62.0, 40.0], [80.0, 60.0]]),
]
SCALES_XY = [1.0, 1.0, 1.0]
TABLE = anchor_table(ANCHORS, STRIDES, SIZES, SCALES_XY)


def random_targets(images: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Boxes inside the 96 x 64 input, all with a class."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(torch.rand(images, count, 2, generator=generator) * 3) * torch.tensor([4.0, 3.0])
    size = size.clamp(max=torch.tensor([96.0, 64.0]))
    centre = size / 2 + torch.rand(images, count, 2, generator=generator) * (torch.tensor([96.0, 64.0]) - size)
    labels = torch.randint(0, 5, (images, count), generator=generator)
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1), labels


def slow_assignment(box: list[float]) -> dict[str, object]:
    """The best anchor of all levels, the first of equals, and the cell of the centre; index by walking all cells."""
    width, height = box[2] - box[0], box[3] - box[1]
    best_iou, best_level, best_anchor = -1.0, -1, -1
    for level, anchors in enumerate(ANCHORS):
        for anchor, (anchor_width, anchor_height) in enumerate(anchors.tolist()):
            iou = slow_iou((0, 0, width, height), (0, 0, anchor_width, anchor_height))
            if iou > best_iou:
                best_iou, best_level, best_anchor = iou, level, anchor
    rows, columns = SIZES[best_level]
    stride = STRIDES[best_level]
    best_column = min(int((box[0] + box[2]) / 2 / stride), columns - 1)
    best_row = min(int((box[1] + box[3]) / 2 / stride), rows - 1)
    places = [
        (level, row, column, anchor)
        for level, anchors in enumerate(ANCHORS)
        for row in range(SIZES[level][0])
        for column in range(SIZES[level][1])
        for anchor in range(len(anchors))
    ]
    return {
        "index": places.index((best_level, best_row, best_column, best_anchor)),
        "anchor": ANCHORS[best_level][best_anchor].tolist(),
        "cell": [best_column, best_row],
        "stride": stride,
        "level": best_level,
    }


# The table


def test_anchor_table_by_hand() -> None:
    table = anchor_table(
        [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])], [8, 16], [(2, 3), (1, 2)], [1, 1.5]
    )
    # width, height, stride, columns, rows, first index of the level, anchors per cell, number in the level, scale_xy
    assert table.tolist() == [
        [1, 2, 8, 3, 2, 0, 1, 0, 1],
        [3, 4, 16, 2, 1, 6, 2, 0, 1.5],
        [5, 6, 16, 2, 1, 6, 2, 1, 1.5],
    ]


# Assignment


def test_assignment_against_loop() -> None:
    boxes, labels = random_targets(3, 40, seed=0)
    assigned = assign_targets(boxes, labels, TABLE)
    levels = set()
    for image in range(3):
        for number, box in enumerate(boxes[image].tolist()):
            expected = slow_assignment(box)
            assert assigned.index[image, number] == expected["index"]
            assert assigned.anchor[image, number].tolist() == expected["anchor"]
            assert assigned.cell[image, number].tolist() == expected["cell"]
            assert assigned.stride[image, number] == expected["stride"]
            levels.add(expected["level"])
    assert assigned.valid.all()
    assert levels == {0, 1, 2}  # the random boxes exercise every level


def test_best_anchor_is_sought_over_all_levels() -> None:
    """A box of 4 x 60, which fits no anchor well, gets the best of all levels."""
    # stride 8:  4 x 5: 20 / 240 = 0.08;  6 x 12: 48 / (240 + 72 - 48) = 0.18;  13 x 9: 36 / 321 = 0.11
    # stride 16: 12 x 24: 96 / (240 + 288 - 96) = 0.22;  25 x 18: 72 / 618 = 0.12
    # stride 32: 46 x 36: 144 / 1752 = 0.08;  62 x 40: 160 / 2560 = 0.06;  80 x 60: 240 / 4800 = 0.05
    boxes = torch.tensor([[[50.0, 2.0, 54.0, 62.0]]])
    assigned = assign_targets(boxes, torch.tensor([[0]]), TABLE)
    assert assigned.anchor.tolist() == [[[12, 24]]]
    # level 1 begins at 8 * 12 * 3 = 288; centre (52, 32) / 16: column 3, row 2; (2 * 6 + 3) * 2 anchors + 0
    assert assigned.cell.tolist() == [[[3, 2]]]
    assert assigned.index.tolist() == [[288 + 30]]


def test_centre_on_the_border_belongs_to_the_last_cell() -> None:
    """Boxes without the inner half: centres exactly on the right, the lower, and both borders of the input."""
    boxes = torch.tensor([[[94.0, 10, 98, 15], [10, 61.5, 14, 66.5], [94, 61.5, 98, 66.5], [-2, -2.5, 2, 2.5]]])
    assigned = assign_targets(boxes, torch.zeros(1, 4, dtype=torch.long), TABLE)
    # all are 4 x 5, the first anchor of stride 8: columns 0..11, rows 0..7
    assert assigned.cell.tolist() == [[[11, 1], [1, 7], [11, 7], [0, 0]]]
    assert assigned.index.tolist() == [[(1 * 12 + 11) * 3, (7 * 12 + 1) * 3, (7 * 12 + 11) * 3, 0]]


def test_centre_on_a_cell_boundary_belongs_to_the_next_cell() -> None:
    boxes = torch.tensor([[[14.0, 21.5, 18.0, 26.5]]])  # centre (16, 24), stride 8
    assert assign_targets(boxes, torch.tensor([[0]]), TABLE).cell.tolist() == [[[2, 3]]]


def test_equal_overlaps_take_the_first_anchor() -> None:
    """As in Darknet, which compares with `>`."""
    anchors = [torch.tensor([[20.0, 10.0], [10.0, 20.0]]), torch.tensor([[10.0, 20.0], [20.0, 10.0]])]
    table = anchor_table(anchors, [8, 16], [(4, 4), (2, 2)], [1, 1])
    # square: 15 * 10 shared with each; wide and tall: equal to one anchor of each level
    boxes = torch.tensor([[[0.0, 0, 15, 15], [0, 0, 20, 10], [0, 0, 10, 20]]])
    assigned = assign_targets(boxes, torch.zeros(1, 3, dtype=torch.long), table)
    assert assigned.stride.tolist() == [[8, 8, 8]]
    assert assigned.anchor.tolist() == [[[20, 10], [20, 10], [10, 20]]]


def test_padding_and_crowd_do_not_share_prediction_0() -> None:
    """Their index is 0, as that of a 4 x 5 box in the first cell, which nevertheless shares it with none."""
    boxes = torch.tensor([[[2.0, 2, 6, 7], [0, 0, 0, 0], [2, 2, 6, 7]]])
    assigned = assign_targets(boxes, torch.tensor([[3, -1, -2]]), TABLE)
    assert assigned.index.tolist() == [[0, 0, 0]]
    assert assigned.last.tolist() == [[True, False, False]]
    assert assigned.final.tolist() == [[0, 1, 2]]


def test_two_gt_boxes_in_one_cell_the_last_gives_the_box() -> None:
    first, second = [20.0, 20, 24, 25], [20.5, 20, 24.5, 25]  # anchor 4 x 5, centres in column 2, row 2 of stride 8
    elsewhere, other_anchor = [60.0, 20, 64, 25], [19.0, 16, 25, 28]  # 6 x 12, same cell as the first
    boxes = torch.tensor([[first, elsewhere, other_anchor, second]])
    assigned = assign_targets(boxes, torch.tensor([[0, 1, 2, 3]]), TABLE)
    assert assigned.last.tolist() == [[False, True, True, True]]
    assert assigned.final.tolist() == [[3, 1, 2, 3]]


def test_last_and_final_against_loop() -> None:
    """Eighty ground-truth boxes at 12 places: many predictions are shared, some by three and more."""
    generator = torch.Generator().manual_seed(4)
    places, _ = random_targets(2, 12, seed=5)
    boxes = places[:, torch.randint(0, 12, (80,), generator=generator)]
    labels = torch.randint(-2, 3, (2, 80), generator=generator)
    assigned = assign_targets(boxes, labels, TABLE)
    shared = 0
    for image in range(2):
        index = assigned.index[image].tolist()
        valid = [label >= 0 for label in labels[image].tolist()]
        assert assigned.valid[image].tolist() == valid  # only labels count: padding may hold copies of such boxes
        for i in range(80):
            later = [j for j in range(i + 1, 80) if valid[j] and index[j] == index[i]]
            assert assigned.last[image, i].item() == (valid[i] and not later)
            shared += bool(later)
            assert assigned.final[image, i] == (later[-1] if valid[i] and later else i)
    assert shared > 20


def test_assignment_of_no_rows() -> None:
    assigned = assign_targets(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.long), TABLE)
    assert assigned.index.shape == assigned.final.shape == (2, 0)


# Ignored predictions


def slow_ignored(predicted: Tensor, boxes: Tensor, labels: Tensor, threshold: float) -> list[list[bool]]:
    return [
        [
            any(overlap(box, gt, label == -2) > threshold for gt, label in zip(*of_image, strict=True) if label != -1)
            for box in predicted_boxes
        ]
        for predicted_boxes, *of_image in zip(predicted.tolist(), boxes.tolist(), labels.tolist(), strict=True)
    ]


def near(boxes: Tensor, count: int, seed: int) -> Tensor:
    """Predictions around the given boxes, from almost equal to far off."""
    generator = torch.Generator().manual_seed(seed)
    chosen = boxes[:, torch.randint(0, boxes.shape[1], (count,), generator=generator)]
    size = (chosen[..., 2:] - chosen[..., :2]).repeat(1, 1, 2)
    noise = torch.linspace(0, 0.3, count)[:, None]
    moved = chosen + torch.randn(chosen.shape, generator=generator) * size * noise
    corners = torch.stack([moved[..., :2], moved[..., 2:]]).sort(dim=0).values
    return torch.cat([corners[0], corners[1]], dim=-1)


@pytest.mark.parametrize("threshold", [0.5, 0.7])
@pytest.mark.parametrize("count", [1, 9, 150])
@pytest.mark.parametrize("at_once", [10**9, 1])
def test_ignored_against_loop(monkeypatch, count: int, threshold: float, at_once: int) -> None:
    """Ground-truth boxes, crowd regions and padding; the batch in one piece and in several."""
    monkeypatch.setattr(criterion, "max_chunk_elements", lambda device: at_once)
    boxes, labels = random_targets(4, count, seed=7)
    labels[:, 1::5] = -1
    labels[:, 3::5] = -2
    predicted = near(boxes, 100, seed=8)
    ignored = ignored_predictions(predicted, boxes, labels, threshold)
    assert ignored.dtype == torch.bool
    assert ignored.tolist() == slow_ignored(predicted, boxes, labels, threshold)
    assert 0 < ignored.float().mean() < 1


@pytest.mark.parametrize(
    ("images", "max_values", "sizes"),
    [
        (8, 80, [8]),  # 10 values per image: all at once
        (8, 79, [4, 4]),
        (7, 30, [3, 3, 1]),  # no more pieces, however large they are
        (2, 1, [1, 1]),  # no more pieces than images
        (0, 1, [0]),
    ],
)
def test_pieces_of_a_batch(images: int, max_values: int, sizes: list[int]) -> None:
    rows = torch.arange(images)
    pieces = split_batch(10, max_values, rows, rows * 2)
    assert [len(piece[0]) for piece in pieces] == sizes and len(pieces) <= MAX_PIECES
    assert torch.equal(torch.cat([first for first, _ in pieces]), rows)
    assert all(torch.equal(first * 2, second) for first, second in pieces)


@pytest.mark.parametrize("position", [0, 63, 137])
@pytest.mark.parametrize("label", [0, -2])
def test_the_only_ground_truth_may_stand_anywhere(position: int, label: int) -> None:
    """A ground-truth box or crowd region counts in any row, with padding around it."""
    boxes, labels = torch.zeros(1, 138, 4), torch.full((1, 138), -1)
    boxes[0, position], labels[0, position] = torch.tensor([10.0, 10, 30, 30]), label
    predicted = torch.tensor([[[10.0, 10, 30, 28], [12.0, 12, 20, 20], [50.0, 10, 70, 28]]])
    # nearly equal; small and inside, which counts for a crowd region only; elsewhere
    assert ignored_predictions(predicted, boxes, labels, 0.7).tolist() == [[True, label == -2, False]]


def test_crowd_counts_the_share_inside_by_hand() -> None:
    """A small prediction inside a large crowd region is ignored, inside a large ground-truth box it is not."""
    region = torch.tensor([[[0.0, 0, 90, 60]]])
    predicted = torch.tensor(
        [
            [
                [10.0, 10, 20, 20],  # all of it inside: share 1, IoU 100 / 5400
                [82.0, 10, 92, 20],  # 80 of 100 inside: share 0.8
                [84.0, 10, 94, 20],  # 60 of 100 inside: share 0.6
                [0.0, 0, 90, 60],  # equal: both are 1
                [-90.0, -60, 180, 120],  # contains the region: share 5400 / 48600 = IoU
            ]
        ]
    )
    crowd, gt = torch.tensor([[-2]]), torch.tensor([[3]])
    assert ignored_predictions(predicted, region, crowd, 0.7).tolist() == [[True, True, False, True, False]]
    assert ignored_predictions(predicted, region, gt, 0.7).tolist() == [[False, False, False, True, False]]


def test_threshold_is_exclusive() -> None:
    """IoU exactly 0.5 (50 of 100): not above 0.5."""
    predicted, boxes = torch.tensor([[[0.0, 0, 10, 5], [0, 0, 10, 6]]]), torch.tensor([[[0.0, 0, 10, 10]]])
    assert ignored_predictions(predicted, boxes, torch.tensor([[0]]), 0.5).tolist() == [[False, True]]


def test_padding_ignores_nothing_whatever_it_holds() -> None:
    predicted = near(random_targets(1, 5, seed=9)[0], 30, seed=10)
    labels = torch.full((1, 30), -1)
    assert not ignored_predictions(predicted, predicted, labels, 0.5).any()
    assert not ignored_predictions(predicted, torch.zeros(1, 0, 4), torch.zeros(1, 0, dtype=torch.long), 0.5).any()


def test_degenerate_predictions_are_not_ignored() -> None:
    """Empty and infinite predictions, as of a diverging network, are background; nothing becomes NaN."""
    infinity = float("inf")
    predicted = torch.tensor(
        [
            [
                [20.0, 20, 20, 20],
                [20.0, 10, 20, 30],
                [-infinity, -infinity, infinity, infinity],
                [-infinity, 20, infinity, 20],  # infinite width times no height is not a number
            ]
        ]
    )
    boxes = torch.tensor([[[10.0, 10, 30, 30], [0.0, 0, 90, 60]]])
    assert not ignored_predictions(predicted, boxes, torch.tensor([[0, -2]]), 0.7).any()
