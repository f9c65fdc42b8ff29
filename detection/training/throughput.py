"""Speed of training relative to the matrix-product speed of the device, and the cost of an epoch."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from detection.contract import Batch
from detection.training.skipped_steps import StepResult

COUNTED_SIDE = 4  # cells of the coarsest map; any size will do, since the FLOPs grow linearly with the area
MATRIX_SIDES = {"cuda": 8192, "cpu": 3072}  # of the measured products; other devices use that of the CPU
PRODUCT_SECONDS = 0.25  # one product is expected to take at most so long


@dataclass
class Throughput:
    """Sums over the training steps of this process, without evaluations."""

    images: float = 0
    pixels: float = 0  # of the network inputs
    seconds: float = 0.0
    waited: float = 0.0  # part of `seconds` spent waiting for the loader


@torch.no_grad()
def flops_per_pixel(model: nn.Module, size_multiple: int) -> float:
    """Count the floating point operations of a training step per input pixel: forward, and twice that backward."""
    device = next(model.parameters()).device
    side = COUNTED_SIDE * size_multiple
    were_training = [(module, module.training) for module in model.modules()]
    model.eval()  # keeps the batch-norm statistics
    try:
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device))
    finally:
        for module, training in were_training:
            module.training = training
    return 3 * counter.get_total_flops() / side**2


def matmul_ceiling(device: torch.device, dtype: torch.dtype | None) -> float | None:
    """Measure the floating point operations per second of square matrix products.

    Takes a few seconds at most. Advances torch's random state.

    Returns:
        The highest rate of a few products; None: out of memory.
    """
    largest = MATRIX_SIDES.get(device.type, MATRIX_SIDES["cpu"])
    best, side = 0.0, largest // 8
    try:
        # Emulated bfloat16 would need minutes for the largest.
        while side <= largest and not (best and 2 * side**3 / best > PRODUCT_SECONDS):
            best = max(best, *matmul_rates(side, dtype or torch.float32, device, 3))
            side *= 2
        return best
    except torch.OutOfMemoryError:
        return None


def summary_lines(
    total: Throughput,
    processes: int,
    flops: float,
    ceiling: float | None,
    precision: str,
    images_per_epoch: int,
    peak_gib: float,
) -> list[str]:
    """Format the speed and cost of a run; no lines if no step was timed.

    Args:
        total: sums of one process, or their mean over all.
        processes: number of processes.
        flops: floating point operations per pixel, see `flops_per_pixel`.
        ceiling: of the device of one process, see `matmul_ceiling`; None or 0: not measured.
        precision: name of the type of matrix products.
        images_per_epoch: images per epoch over all processes.
        peak_gib: peak memory.
    """
    if not total.images or not total.seconds:
        return []
    rate = processes * total.images / total.seconds
    share = "ceiling not measured"
    if ceiling:
        used = flops * total.pixels / total.seconds
        share = f"{used / ceiling:.0%} of the ceiling ({precision} matrix products, {ceiling / 1e12:.2f} TFLOP/s"
        share += f" x {processes})" if processes > 1 else ")"
    per_image = flops * total.pixels / total.images / 1e9
    return [
        f"speed       {rate:.1f} images/s at {per_image:.3g} GFLOP each, {share}, waiting for data "
        f"{total.waited / total.seconds:.1%}",
        f"cost        {images_per_epoch / rate:.1f} s per epoch of {images_per_epoch} images without evaluations, "
        f"peak memory {peak_gib:.1f} GiB",
    ]


def matmul_rates(size: int, dtype: torch.dtype, device: torch.device, repeats: int) -> list[float]:
    """Measure the floating point operations per second of square matrix products, one value per product.

    Args:
        size: number of rows and columns.
        repeats: number of measured products, after one for warm-up.
    """
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    rates = []
    for repeat in range(repeats + 1):
        started = time.perf_counter()
        (left @ right)[0, 0].item()  # reading a value waits for the device
        if repeat:
            rates.append(2 * size**3 / (time.perf_counter() - started))
    return rates


class Meter:
    """Mean losses and rates since the last `read`; losses stay on the device until then.

    Args:
        images_per_step: number of images of all processes.

    Attributes:
        total: sums up to the last `read`.
    """

    def __init__(self, images_per_step: int) -> None:
        self.images_per_step = images_per_step
        self.total = Throughput()
        self.restart()

    def restart(self) -> None:
        """Reset everything since the last `read`."""
        self.sums: dict[str, Tensor] = {}
        self.steps: Tensor | int = 0  # without skipped ones
        self.restart_clock()

    def restart_clock(self) -> None:
        """Exclude the time until now, such as an evaluation, from the rates; keeps the losses since the last `read`."""
        self.timed_steps, self.waited, self.started = 0, 0.0, time.perf_counter()
        self.images = self.pixels = 0  # of this process

    def add(self, result: StepResult, batches: Sequence[Batch] = ()) -> None:
        """Add a step and its micro-batches."""
        self.timed_steps += 1
        for images in (batch["images"] for batch in batches):
            self.images += len(images)
            self.pixels += len(images) * images.shape[2] * images.shape[3]
        self.steps = self.steps + result.finite
        for name, value in result.losses.items():
            self.sums[name] = self.sums.get(name, 0) + torch.where(result.finite, value, 0)

    def read(self) -> dict[str, float]:
        """Return the values by tag for the log, and restart; waits for the device."""
        steps = max(int(self.steps), 1)
        parts = {f"train/{name}": value.item() / steps for name, value in self.sums.items()}
        seconds = time.perf_counter() - self.started
        rates = {
            "train/images_per_second": self.timed_steps * self.images_per_step / seconds,
            "train/wait_fraction": self.waited / seconds,
        }
        self.total.images += self.images
        self.total.pixels += self.pixels
        self.total.seconds += seconds
        self.total.waited += self.waited
        self.restart()
        return {"train/loss": sum(parts.values()), **parts, **rates}

    def state(self) -> dict[str, Any]:
        """Return the losses for a checkpoint, so that the next row of a resumed run covers all steps since the last."""
        return {"steps": torch.as_tensor(self.steps), "sums": dict(self.sums)}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore what `state` returned."""
        self.restart()
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.steps = state["steps"].to(device) if self.sums else 0
