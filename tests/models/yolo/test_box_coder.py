import math

import pytest
import torch
from torch import Tensor

from detection.models.yolo.box_coder import decode_cxcywh, encode_boxes
from detection.ops.boxes import cxcywh_to_xyxy
from tests.support.loss_cases import decode_boxes

ANCHORS = torch.tensor([[10.0, 13.0], [33.0, 23.0], [59.0, 119.0]])


def logit(share: Tensor) -> Tensor:
    return (share / (1 - share)).log()


# sigmoid(log 3) = 3/4, sigmoid(-log 3) = 1/4; s = 1.2: 1.2 * 3/4 - 0.1 = 0.8, 1.2 * 1/4 - 0.1 = 0.2
@pytest.mark.parametrize(("scale_xy", "share_x", "share_y"), [(1.0, 0.75, 0.25), (1.2, 0.8, 0.2)])
def test_decode_one_cell_by_hand(scale_xy: float, share_x: float, share_y: float) -> None:
    """Anchor 1 (33 x 23), row 2, column 5, stride 16; the other cells of that anchor and level stay at raw 0."""
    raw = torch.zeros(1, 3, 4, 7, 6)
    raw[0, 1, 2, 5, :4] = torch.tensor([math.log(3), -math.log(3), math.log(2), math.log(0.5)])
    boxes = decode_boxes(raw, ANCHORS, stride=16, scale_xy=scale_xy)
    assert boxes.shape == (1, 3, 4, 7, 4)
    x, y = (5 + share_x) * 16, (2 + share_y) * 16  # size (33 * 2, 23 / 2) = (66, 11.5)
    torch.testing.assert_close(boxes[0, 1, 2, 5], torch.tensor([x - 33, y - 5.75, x + 33, y + 5.75]))
    # raw 0 is the anchor in the middle of the cell: row 3, column 0 has its centre at (8, 56)
    torch.testing.assert_close(boxes[0, 2, 3, 0], torch.tensor([8 - 29.5, 56 - 59.5, 8 + 29.5, 56 + 59.5]))


def test_decode_against_loop() -> None:
    raw = torch.randn(2, 3, 3, 5, 9, generator=torch.Generator().manual_seed(0))
    boxes = decode_boxes(raw, ANCHORS, stride=8)
    for image in range(2):
        for anchor, (anchor_width, anchor_height) in enumerate(ANCHORS.tolist()):
            for row in range(3):
                for column in range(5):
                    x, y, width, height = raw[image, anchor, row, column, :4].tolist()
                    x, y = (column + 1 / (1 + math.exp(-x))) * 8, (row + 1 / (1 + math.exp(-y))) * 8
                    width, height = anchor_width * math.exp(width), anchor_height * math.exp(height)
                    expected = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
                    assert boxes[image, anchor, row, column].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize(("rows", "columns", "stride"), [(4, 4, 32), (2, 9, 16), (13, 5, 8), (1, 1, 32)])
def test_decode_inverts_encode(rows: int, columns: int, stride: int) -> None:
    """One random box per cell and anchor: encode, write the values into a raw output, decode."""
    generator = torch.Generator().manual_seed(rows)
    shape = (2, 3, rows, columns)
    column = torch.arange(columns).expand(shape)
    row = torch.arange(rows)[:, None].expand(shape)
    share = torch.rand(*shape, 2, generator=generator) * 0.9 + 0.05
    cells = torch.stack([column, row], dim=-1).float()
    size = torch.exp(torch.randn(*shape, 2, generator=generator) + 3)
    boxes_cxcywh = torch.cat([(cells + share) * stride, size], dim=-1)
    anchors = ANCHORS[:, None, None].expand(*shape, 2)

    encoded_share, raw_wh = encode_boxes(boxes_cxcywh, anchors, cells, torch.full(shape, float(stride)))
    torch.testing.assert_close(encoded_share, share, atol=1e-5, rtol=1e-5)
    decoded = decode_boxes(torch.cat([logit(encoded_share), raw_wh], dim=-1), ANCHORS, stride)
    torch.testing.assert_close(decoded, cxcywh_to_xyxy(boxes_cxcywh), atol=1e-3, rtol=1e-4)


def test_encode_by_hand() -> None:
    """Boxes of different levels in one call: each has its own anchor, cell and stride."""
    boxes_cxcywh = torch.tensor([[[92.0, 36.0, 66.0, 11.5], [416.0, 208.0, 10.0, 26.0]]])
    anchors = torch.tensor([[[33.0, 23.0], [10.0, 13.0]]])
    cells = torch.tensor([[[5.0, 2.0], [51.0, 26.0]]])  # the second box has its centre on the right border
    share, raw_wh = encode_boxes(boxes_cxcywh, anchors, cells, torch.tensor([[16.0, 8.0]]))
    # 92 / 16 - 5, 36 / 16 - 2; 416 / 8 - 51, 208 / 8 - 26
    assert share.tolist() == [[[0.75, 0.25], [1.0, 0.0]]]
    torch.testing.assert_close(raw_wh, torch.tensor([[[math.log(2), math.log(0.5)], [0, math.log(2)]]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decode_of_half_precision_is_float32(dtype: torch.dtype) -> None:
    """All arithmetic is float32: rounding the raw values first is the only loss."""
    raw = (torch.randn(1, 3, 4, 4, 8, generator=torch.Generator().manual_seed(1)) * 2).to(dtype)
    boxes = decode_boxes(raw, ANCHORS, 32)
    assert boxes.dtype == torch.float32
    assert torch.equal(boxes, decode_boxes(raw.float(), ANCHORS, 32))


def test_decode_reads_only_the_first_four_values() -> None:
    raw = torch.randn(1, 3, 2, 2, 10, generator=torch.Generator().manual_seed(2))
    changed = raw.clone()
    changed[..., 4:] = float("nan")
    assert torch.equal(decode_boxes(changed, ANCHORS, 8), decode_boxes(raw, ANCHORS, 8))


# scale_xy and new_coords


def test_decode_with_new_coords_by_hand() -> None:
    """Size = anchor * (2 * sigmoid)^2: sigmoid 3/4 gives 9/4 anchors, 1/4 gives 1/4, 1/2 gives 1; s = 2."""
    raw = torch.zeros(1, 3, 1, 1, 4)
    raw[0, 0, 0, 0] = torch.tensor([math.log(3), -math.log(3), math.log(3), -math.log(3)])
    boxes = decode_boxes(raw, ANCHORS, stride=8, scale_xy=2.0, new_coords=True)
    # centre 2 * 3/4 - 1/2 = 1 and 2 * 1/4 - 1/2 = 0 of the cell; size 10 * 9/4 and 13 / 4
    expected = torch.tensor([8 - 11.25, 0 - 1.625, 8 + 11.25, 0 + 1.625])
    torch.testing.assert_close(boxes[0, 0, 0, 0], expected)
    torch.testing.assert_close(boxes[0, 1, 0, 0], torch.tensor([4 - 16.5, 4 - 11.5, 4 + 16.5, 4 + 11.5]))
    huge = decode_boxes(torch.full((1, 3, 1, 1, 4), 1e4), ANCHORS, stride=8, new_coords=True)
    torch.testing.assert_close(huge[0, :, 0, 0, 2] - huge[0, :, 0, 0, 0], ANCHORS[:, 0] * 4)  # at most four anchors


def test_decode_inverts_encode_with_new_coords_up_to_four_anchors() -> None:
    generator = torch.Generator().manual_seed(3)
    anchors = torch.rand(40, 2, generator=generator) * 50 + 5
    boxes = torch.cat(
        [torch.rand(40, 2, generator=generator) * 16, anchors * torch.linspace(0.1, 3.9, 40)[:, None]], -1
    )
    cells = torch.zeros(40, 2)
    target, raw_wh = encode_boxes(boxes, anchors, cells, torch.full((40,), 16.0), 2.0, new_coords=True)
    raw = torch.cat([target.logit(), raw_wh], dim=-1)
    torch.testing.assert_close(decode_cxcywh(raw, anchors, cells, 16, 2.0, True), boxes, atol=1e-3, rtol=1e-4)
    largest = encode_boxes(boxes * 99, anchors, cells, torch.full((40,), 16.0), 2.0, new_coords=True)[1]
    assert largest.isfinite().all()


@pytest.mark.parametrize("scale_xy", [1.0, 1.05, 1.1, 1.2, 2.0])
def test_decode_inverts_encode_with_scale(scale_xy: float) -> None:
    """Any centre of the cell, its borders too (finite raw values where the scale exceeds 1)."""
    generator = torch.Generator().manual_seed(3)
    cells = torch.tensor([5.0, 2.0]).expand(40, 2)
    share = torch.rand(40, 2, generator=generator) if scale_xy > 1 else torch.rand(40, 2, generator=generator) / 2 + 0.2
    if scale_xy > 1:
        share[0], share[1] = 0.0, 1.0
    boxes_cxcywh = torch.cat([(cells + share) * 16, torch.exp(torch.randn(40, 2, generator=generator) + 3)], dim=-1)
    anchors = ANCHORS[1].expand(40, 2)
    target, raw_wh = encode_boxes(boxes_cxcywh, anchors, cells, torch.full((40,), 16.0), scale_xy)
    assert (target > 0).all() and (target < 1).all()
    raw = torch.cat([logit(target), raw_wh], dim=-1)
    torch.testing.assert_close(decode_cxcywh(raw, anchors, cells, 16, scale_xy), boxes_cxcywh, atol=1e-3, rtol=1e-5)


def test_encode_with_a_scale_per_box_by_hand() -> None:
    boxes_cxcywh = torch.tensor([[20.0, 16, 16, 16], [20, 16, 16, 16]])
    share, _ = encode_boxes(
        boxes_cxcywh, torch.ones(2, 2), torch.ones(2, 2), torch.full((2,), 16.0), torch.tensor([[1.0], [1.2]])
    )
    # a quarter of the cell in x, its border in y
    torch.testing.assert_close(share, torch.tensor([[0.25, 0], [0.35 / 1.2, 0.1 / 1.2]]))
