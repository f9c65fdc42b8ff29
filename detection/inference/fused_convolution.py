"""A convolution for inference on x86 processors: weights packed once, the activation computed with the sums."""

import platform
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = "none"  # oneDNN's name for no activation


def can_fuse() -> bool:
    """Whether this build of torch has oneDNN's fused convolutions, those that Inductor calls; needs no compiler."""
    operators = torch.ops.mkldnn
    names = ("_convolution_pointwise", "_reorder_convolution_weight")
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return is_x86 and torch.backends.mkldnn.is_available() and all(hasattr(operators, name) for name in names)


def fused_name(activation: nn.Module) -> tuple[str, list[float]] | None:
    """Name and numbers of an activation for oneDNN; None: it has none."""
    if isinstance(activation, nn.LeakyReLU):
        return "leaky_relu", [activation.negative_slope]
    if isinstance(activation, nn.Hardtanh):  # ReLU6 is one
        return "hardtanh", [activation.min_val, activation.max_val]
    names: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "swish", nn.Hardswish: "hardswish"}
    name = names.get(type(activation))
    return None if name is None else (name, [])


class FusedConv2d(nn.Module):
    """The convolution of `convolution` with an activation; no gradients, and a copy of its weights in oneDNN's order.

    Args:
        convolution: with zeros as padding, given as numbers.
        activation: see `fused_name`.
        numbers: of the activation.
        dtype: of the product and its result; None: float32.
    """

    weight: Tensor | None  # until it is packed; part of no state dict
    packed: Tensor | None  # opaque
    bias: Tensor | None

    def __init__(
        self, convolution: nn.Conv2d, activation: str, numbers: list[float], dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        assert not isinstance(convolution.padding, str)
        self.dtype = dtype or torch.float32
        shape = list(convolution.padding), list(convolution.stride), list(convolution.dilation), convolution.groups
        operators: Any = torch.ops.mkldnn
        self.weight, self.packed = convolution.weight.detach().to(self.dtype).contiguous(), None
        self.bias = None if convolution.bias is None else convolution.bias.detach().to(self.dtype)
        self._compute, self._rest = operators._convolution_pointwise, (*shape, activation, numbers, "")

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, H, W); the result lies in channels-last format."""
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        if self.packed is None:
            # Without the size of an input oneDNN guesses an order, which made bfloat16 slower than no fusing at all
            # (docs/decisions.md). Other sizes stay right: it reorders where it needs another one.
            reorder: Any = torch.ops.mkldnn._reorder_convolution_weight
            self.packed, self.weight = reorder(self.weight, *self._rest[:4], list(x.shape)), None
        result: Tensor = self._compute(x, self.packed, self.bias, *self._rest)
        return result

    def extra_repr(self) -> str:
        return f"{self._rest[4]}, {str(self.dtype).removeprefix('torch.')}"
