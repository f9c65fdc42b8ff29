"""What benchmarks share: a batch like those of COCO, and a clock that waits for the device."""

import time
from collections.abc import Callable
from typing import Any

import torch

from detection.data.loaders import Batch
from detection.devices import synchronize

BOXES = 7  # per image, the mean of COCO


def synthetic_batch(size: int, batch_size: int, num_classes: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(batch_size, 32, 2, generator=generator) * size * 0.8
    boxes = torch.cat([corners, corners + 8 + torch.rand(corners.shape, generator=generator) * size * 0.2], dim=-1)
    labels = torch.randint(num_classes, (batch_size, 32), generator=generator)
    labels[:, BOXES:] = -1
    images = torch.randint(0, 256, (batch_size, size, size, 3), dtype=torch.uint8, generator=generator)
    return {
        "images": images.permute(0, 3, 1, 2),
        "boxes": boxes,
        "labels": labels,
        "indices": torch.arange(batch_size),
    }


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
