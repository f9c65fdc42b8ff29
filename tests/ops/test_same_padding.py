"""Where TensorFlow lays strided windows."""

import pytest
import torch

from detection.ops.same_padding import SamePad2d, halve_by_max, same_padding


@pytest.mark.parametrize(
    ("size", "kernel_size", "expected"),
    [
        (512, 3, (0, 1)),  # (256 - 1) * 2 + 3 - 512 = 1, the odd one after
        (512, 5, (1, 2)),  # 255 * 2 + 5 - 512 = 3
        (511, 3, (1, 1)),  # 255 * 2 + 3 - 511 = 2
        (513, 5, (2, 2)),  # 256 * 2 + 5 - 513 = 4
        (1, 3, (1, 1)),  # 0 + 3 - 1 = 2
        (2, 1, (0, 0)),  # 0 * 2 + 1 - 2 < 0
    ],
)
def test_rows_by_hand(size: int, kernel_size: int, expected: tuple[int, int]) -> None:
    assert same_padding(size, kernel_size, 2) == expected


def test_the_window_count_is_the_size_over_the_stride_rounded_up() -> None:
    for size in range(1, 20):
        for kernel_size in (1, 2, 3, 5, 7):
            for stride in (1, 2, 3):
                total, windows = sum(same_padding(size, kernel_size, stride)), -(-size // stride)
                assert (size + total - kernel_size) // stride + 1 == windows
                if total:  # and not a row more
                    assert (size + total - 1 - kernel_size) // stride + 1 < windows


def test_each_axis_has_its_own_padding() -> None:
    padded = SamePad2d(3, 2)(torch.ones(1, 1, 4, 5))  # rows (0, 1), columns (1, 1)
    assert padded[0, 0].tolist() == [[0, 1, 1, 1, 1, 1, 0]] * 4 + [[0] * 7]


@pytest.mark.parametrize("same", [True, False])
def test_pooling_is_a_loop_over_windows(same: bool) -> None:
    for rows in range(1, 8):
        for columns in (1, 4, 5):
            x = torch.randn(1, 2, rows, columns) - 5  # all below zero: zeros outside would win
            found = halve_by_max(x, same)
            assert found.shape == (1, 2, -(-rows // 2), -(-columns // 2))
            top, left = ((0 if same and size % 2 == 0 else 1) for size in (rows, columns))
            for i in range(found.shape[2]):
                for j in range(found.shape[3]):
                    window = x[:, :, max(2 * i - top, 0) : 2 * i - top + 3, max(2 * j - left, 0) : 2 * j - left + 3]
                    assert torch.equal(found[:, :, i, j], window.amax((2, 3)))
