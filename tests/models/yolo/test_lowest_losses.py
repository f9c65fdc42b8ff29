"""The floor of the box loss: the entropy of the centres with Darknet's and MMDetection's loss, else 0."""

import math

import pytest
import torch

from detection.models.yolo import CRITERIA

SIZE = 64
ANCHORS = [[(16.0, 16.0)], [(40.0, 24.0)]]
STRIDES = [16, 32]


def entropy(t: float) -> float:
    return -t * math.log(t) - (1 - t) * math.log(1 - t)


def targets_of(*boxes: tuple[float, float, float, float, int]) -> dict[str, torch.Tensor]:
    """From (centre x, centre y, width, height, label); one image, then padding."""
    rows = [(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h, _ in boxes]
    padded = torch.zeros(1, len(rows) + 2, 4)
    labels = torch.full((1, len(rows) + 2), -1)
    if rows:
        padded[0, : len(rows)] = torch.tensor(rows)
        labels[0, : len(rows)] = torch.tensor([label for *_, label in boxes])
    return {"boxes": padded, "labels": labels}


# Cell (1, 2) of stride 16, offsets 1/4 and 1/2; cell (1, 0) of stride 32, offsets 1/8 and 3/4.
BOXES = targets_of((20, 40, 14, 18, 1), (36, 24, 44, 20, 0))
SCALES = [2 - 14 * 18 / SIZE**2, 2 - 44 * 20 / SIZE**2]
ENTROPIES = [entropy(1 / 4) + entropy(1 / 2), entropy(1 / 8) + entropy(3 / 4)]
DARKNET = sum(scale * value for scale, value in zip(SCALES, ENTROPIES, strict=True))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        *(("darknet", DARKNET), ("freebies", DARKNET), ("iou", DARKNET), ("mmdetection", 2 * sum(ENTROPIES))),
        *(("giou", 0.0), ("ciou", 0.0), ("multi", 0.0)),
    ],
)
def test_floor_of_two_boxes(loss: str, expected: float) -> None:
    criterion = CRITERIA[loss](ANCHORS, STRIDES, 0.5, weights=(3.0, 1.0, 1.0))
    lowest = criterion.lowest_losses(BOXES, SIZE)
    assert lowest == {"loss_box": pytest.approx(3 * expected, abs=1e-4)}
    # no random output is below it
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        outputs = [torch.randn(1, 1, SIZE // stride, SIZE // stride, 7, generator=generator) for stride in STRIDES]
        assert float(criterion(outputs, BOXES)["loss_box"]) > lowest["loss_box"]


def test_no_box_no_floor() -> None:
    assert CRITERIA["darknet"](ANCHORS, STRIDES, 0.5).lowest_losses(targets_of(), SIZE) == {"loss_box": 0.0}


def test_of_boxes_that_share_a_prediction_the_last_counts() -> None:
    criterion = CRITERIA["darknet"](ANCHORS, STRIDES, 0.5)
    both = targets_of((17, 40, 15, 15, 0), (20, 40, 14, 18, 1))
    assert criterion.lowest_losses(both, SIZE)["loss_box"] == pytest.approx(SCALES[0] * ENTROPIES[0], abs=1e-4)
