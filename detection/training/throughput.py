"""How fast training was, against what the device could do, and what an epoch costs."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from detection.devices import matmul_rates
from detection.models import size_multiple

COUNTED_SIDE = 4  # cells of the coarsest map; the operations of convolutions grow with the area
MATRIX_SIDES = {"cuda": 8192, "cpu": 3072}  # of the product that is measured; elsewhere the CPU's


@dataclass
class Throughput:
    """Sums over the training steps of this process, without evaluations."""

    images: float = 0
    pixels: float = 0  # of their network inputs
    seconds: float = 0.0
    waited: float = 0.0  # of these for the loader


@torch.no_grad()
def flops_per_pixel(model: nn.Module) -> float:
    """Floating point operations of a training step per pixel of the network input: forward, and twice that backward."""
    device = next(model.parameters()).device
    side = COUNTED_SIDE * size_multiple(model)
    were_training = [(module, module.training) for module in model.modules()]
    model.eval()  # statistics stay
    try:
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device))
    finally:
        for module, training in were_training:
            module.training = training
    return 3 * counter.get_total_flops() / side**2


def matmul_ceiling(device: torch.device, dtype: torch.dtype | None) -> float | None:
    """Floating point operations per second of the best of a few square matrix products; None: there is no memory left.

    Takes a fraction of a second. Draws random numbers.
    """
    side = MATRIX_SIDES.get(device.type, MATRIX_SIDES["cpu"])
    try:
        return max(matmul_rates(side, dtype or torch.float32, device, 3))
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
    """What to print when a run ends; nothing where no step was timed.

    Args:
        total: of one process, or the mean over them.
        flops: per pixel, see `flops_per_pixel`.
        ceiling: of one process's device, see `matmul_ceiling`.
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
