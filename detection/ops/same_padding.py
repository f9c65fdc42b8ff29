"""Padding of strided windows as TensorFlow's "SAME" does it, which is asymmetric where the size is even."""

import torch.nn.functional as F
from torch import Tensor, nn


def same_padding(size: int, kernel_size: int, stride: int) -> tuple[int, int]:
    """Rows or columns to add before and after so that ceil(size / stride) windows fit; the odd one comes after.

    Symmetric padding gives as many windows, but with a stride of 2 and an even size they lie one pixel earlier: weights
    trained with the one kind are wrong with the other.

    Source: `tf.nn.convolution`, padding "SAME", https://www.tensorflow.org/api_docs/python/tf/nn
    """
    total = max(kernel_size - (size % stride or stride), 0)
    return total // 2, total - total // 2


class SamePad2d(nn.Module):
    """Pad (B, C, H, W) with zeros for a convolution that has no padding of its own, see `same_padding`."""

    def __init__(self, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (same_padding(size, self.kernel_size, self.stride) for size in x.shape[2:])
        return F.pad(x, (*columns, *rows))


def halve_by_max(x: Tensor, same: bool) -> Tensor:
    """Max pooling over 3 x 3 with stride 2; (B, C, H, W) to (B, C, ceil(H / 2), ceil(W / 2)).

    Args:
        x: maps.
        same: windows as `same_padding` lays them, else around every second cell; what lies outside never counts.
    """
    # An even size needs one row after the last: `ceil_mode` has it without a copy. An odd one needs one on each side.
    padding = tuple(size % 2 for size in x.shape[2:]) if same else (1, 1)
    return F.max_pool2d(x, 3, 2, padding, ceil_mode=same)
