"""Peak memory of a training step per batch and size, with and without activation checkpointing, beside the estimate.

python3 -m benchmarks.memory                                          Darknet-53, Adam, batch 2, 416 and 608 px
python3 -m benchmarks.memory --batches 8 64 --precision off --device cuda

Each line is a process of its own. On the CPU the peak is its resident set less what was there before the model; on CUDA
what was allocated. About a minute on 2 cores.
"""

import argparse
import functools
import itertools
import subprocess
import sys
import time

import torch

from detection.config.command_line import DEFAULTS, Parser, at_least_one
from detection.config.loading import load_settings
from detection.data.fake import synthetic_batch
from detection.errors import exit_with_message
from detection.models import build_detector
from detection.models.backbones.activation_checkpointing import recompute_backbone
from detection.runtime.devices import (
    autocast,
    build_scaler,
    choose_device,
    choose_precision,
    describe_device,
    peak_memory_gib,
    synchronize,
)
from detection.training.memory.estimate import estimate_memory
from detection.training.optimizer import build_optimizer
from detection.training.step import train_step
from detection.training.throughput import matmul_ceiling

STEPS = 2  # the second has the optimizer's state


def main() -> None:
    parser = Parser("benchmarks.memory", __doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp16", "off"])
    parser.add_argument("--backbone", default="darknet")
    parser.add_argument("--batches", type=at_least_one, nargs="+", default=[2], help="images")
    parser.add_argument("--sizes", type=at_least_one, nargs="+", default=[416, 608], help="pixels")
    parser.add_argument("--one", type=int, nargs=3, metavar=("BATCH", "SIZE", "CHECKPOINTING"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    dtype = choose_precision(device, arguments.precision)
    if arguments.one:
        measure(arguments.backbone, device, dtype, *arguments.one)
        return
    precision = dtype or torch.float32
    ceiling = (matmul_ceiling(device, dtype) or 0) / 1e12
    print(
        f"{describe_device(device)}, torch {torch.__version__}, {arguments.backbone} with Adam, {precision}, "
        f"matrix products {ceiling:.2f} TFLOP/s"
    )
    print(f"{'batch':>6}{'size':>6}{'checkpointing':>15}{'peak GiB':>10}{'estimate GiB':>14}{'step s':>8}", flush=True)
    for batch, size, recomputed in itertools.product(arguments.batches, arguments.sizes, (0, 1)):
        words = [sys.executable, "-m", "benchmarks.memory", "--one", str(batch), str(size), str(recomputed)]
        for name in ("device", "precision", "backbone"):
            words += [f"--{name}", getattr(arguments, name)]
        code = subprocess.run(words, check=False).returncode
        if code:
            sys.exit(code)  # it has said why


def measure(
    backbone: str, device: torch.device, dtype: torch.dtype | None, batch_size: int, size: int, recomputed: int
) -> None:
    settings, _ = load_settings(DEFAULTS, words=[f"model.backbone={backbone}", f"train.batch_size={batch_size}"])
    context = functools.partial(autocast, device, dtype)
    before = peak_memory_gib(device)
    detector = build_detector(settings, 80).to(device, channels_last=True)
    detector.geometry.check_size("--sizes", size)
    if recomputed:
        recompute_backbone(detector.model)
    model, optimizer = detector.model.train(), build_optimizer(detector.model, settings.train)
    estimate = estimate_memory(model, detector.criterion, settings.train, batch_size, size, context, device)
    batch = synthetic_batch(size, batch_size, 80)
    for _ in range(STEPS):
        started = time.perf_counter()
        train_step(model, detector.criterion, optimizer, build_scaler(device, dtype), [batch], context, device, 35.0)
        synchronize(device)
    seconds = time.perf_counter() - started
    peak = peak_memory_gib(device) - before
    kept = "yes" if recomputed else "no"
    print(f"{batch_size:>6}{size:>6}{kept:>15}{peak:>10.2f}{estimate.total / 2**30:>14.2f}{seconds:>8.2f}", flush=True)


if __name__ == "__main__":
    exit_with_message(main)
