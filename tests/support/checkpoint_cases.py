"""Helpers for tests of checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# What `--resume` reads of a run after three steps, without its settings and random state.
STOPPED: dict[str, Any] = {
    "step": 3,
    "categories": {"names": ["cat", "dog"], "ids": [1, 2]},
    "model": {"weight": torch.zeros(1)},
    "average": None,
    "data_digest": "",
    "optimizer": {"state": {}, "param_groups": [{"lr": 0.001, "betas": (0.9, 0.999), "params": [0]}]},
    "progress": {"best_value": 0.5, "best_step": 2, "evaluations_without_rise": 0, "evaluated_step": 2},
}


def equal(first: Any, second: Any) -> bool:
    """Same types, keys in the same order, same bits (a NaN equals itself, 0.0 does not equal -0.0)."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        if first.dtype != second.dtype or first.shape != second.shape:
            return False
        # Bytes: as floats NaN would differ from itself and the sign of zero would not count.
        first, second = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (first, second))
        return torch.equal(first, second)
    if isinstance(first, dict) and isinstance(second, dict):
        return list(first) == list(second) and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple) and type(first) is type(second):
        return len(first) == len(second) and all(map(equal, first, second))
    return type(first) is type(second) and repr(first) == repr(second)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, (str(self.marker), "w")
