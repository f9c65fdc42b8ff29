"""A clock that waits for the device."""

import time
from collections.abc import Callable
from typing import Any

import torch

from detection.runtime.devices import synchronize


def milliseconds(function: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Of each repeat after one warm-up."""
    times = []
    for repeat in range(repeats + 1):
        started = time.perf_counter()
        function()
        synchronize(device)
        if repeat:
            times.append(1e3 * (time.perf_counter() - started))
    return times
