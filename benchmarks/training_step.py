"""Speed of a whole training step, beside the matrix product rate of the same minute.

python3 -m benchmarks.training_step                                          Darknet-53 at 416 px, batch 2
python3 -m benchmarks.training_step --sizes 320 416 608 --batch 64 --device cuda
python3 -m benchmarks.training_step --batch 16 yolo.encoder=mobilenet_v3_small yolo.neck_channels=[128,96,64]
python3 -m benchmarks.training_step --peers                                  torchvision's detectors beside it
python3 -m benchmarks.training_step --real --sizes 416 data.root=data/coco   with the loader: share of time it waits

Prints one table: images/s (median and spread of the repeats), the share of the matrix product rate, how long the loader
was waited for, and for MobileNetV3 what its depthwise convolutions cost in bfloat16 on the CPU. Weights are random.
About a minute on 2 cores.
"""

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from detection.command_line import DEFAULTS
from detection.data import build_datasets
from detection.data.loaders import Batch, TrainingBatchSampler, build_training_loader
from detection.devices import (
    autocast,
    build_scaler,
    choose_device,
    compile_forward,
    describe_device,
    matmul_rates,
    synchronize,
)
from detection.errors import exit_with_message
from detection.measuring import BOXES, synthetic_batch
from detection.models import Detector, build_detector
from detection.models.mobilenet import DepthwiseConv2d
from detection.prefetch import Prefetcher
from detection.settings import Settings, load_settings
from detection.throughput import MATRIX_SIDES, flops_per_pixel
from detection.training import build_optimizer, train_step

WARM_UP = 3  # steps
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
PEERS = ("ssdlite320_mobilenet_v3_large", "retinanet_resnet50_fpn")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="key.path=value")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--sizes", type=int, nargs="+", default=[416], help="pixels")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="the network compiled too")
    parser.add_argument("--real", action="store_true", help="batches of the dataset of the settings too")
    parser.add_argument("--peers", action="store_true", help="torchvision's ssdlite and retinanet too")
    arguments = parser.parse_intermixed_args()
    settings, _ = load_settings(DEFAULTS, words=arguments.settings)
    device = choose_device(arguments.device)
    side = MATRIX_SIDES.get(device.type, MATRIX_SIDES["cpu"])
    ceilings = {name: max(matmul_rates(side, dtype or torch.float32, device, 3)) for name, dtype in PRECISIONS.items()}
    detector = build_detector(settings.yolo, settings.evaluation, arguments.classes).to(device, channels_last=True)
    flops = flops_per_pixel(detector.model)
    print(
        f"{settings.yolo.encoder}, neck {list(settings.yolo.neck_channels)}, batch {arguments.batch}; "
        f"{describe_device(device)}, torch {torch.__version__}; "
        + ", ".join(f"{name} products {rate / 1e12:.2f} TFLOP/s" for name, rate in ceilings.items())
    )
    print(f"{'':<34}{'size':>6}{'GFLOP':>8}{'images/s':>10}{'spread':>16}{'of ceiling':>12}{'waiting':>9}")

    def show(name: str, size: int, operations: float, precision: str, rates: list[float], wait: float = 0.0) -> None:
        median, spread = statistics.median(rates), f"{min(rates):.2f}..{max(rates):.2f}"
        share = f"{median * operations / ceilings[precision]:.1%}"
        line = f"{name + ', ' + precision:<34}{size:>6}{operations / 1e9:>8.1f}{median:>10.2f}{spread:>16}"
        print(f"{line}{share:>12}{wait:>9.1%}", flush=True)

    for size, (precision, dtype) in itertools.product(arguments.sizes, PRECISIONS.items()):
        batches = itertools.repeat(synthetic_batch(size, arguments.batch, arguments.classes))
        steps = functools.partial(time_steps, detector, settings, device, dtype, arguments.repeats)
        show("step", size, flops * size**2, precision, *steps(batches))
        if arguments.compile:
            show("compiled", size, flops * size**2, precision, *steps(batches, compiled=True))
        if settings.yolo.encoder.startswith("mobilenet") and device.type == "cpu" and dtype is not None:
            show("depthwise too", size, flops * size**2, precision, *steps(batches, depthwise=True))
        if arguments.real:
            show("real data", size, flops * size**2, precision, *steps(real_batches(settings, size, arguments, device)))
    for name, size in itertools.product(PEERS if arguments.peers else (), arguments.sizes):
        for precision, dtype in PRECISIONS.items():
            operations, rates = time_peer(name, size, arguments, device, dtype)
            show(name.partition("_")[0], size, operations, precision, rates)


def real_batches(settings: Settings, size: int, arguments: Any, device: torch.device) -> Iterator[Batch]:
    """Those of a training run."""
    dataset, _ = build_datasets(settings.data, size, size, settings.run.seed, arguments.classes, 1)
    steps = (0, WARM_UP + arguments.repeats + 1)
    sampler = TrainingBatchSampler(len(dataset), arguments.batch, 1, steps, 0, size, 0, (size, size))
    return iter(build_training_loader(dataset, sampler, settings.data.num_workers, device))


def time_steps(
    detector: Detector,
    settings: Settings,
    device: torch.device,
    dtype: torch.dtype | None,
    repeats: int,
    source: Iterator[Batch],
    compiled: bool = False,
    depthwise: bool = False,
) -> tuple[list[float], float]:
    """Images per second of each repeat, and the share of time in which batches were waited for.

    Args:
        depthwise: leave the depthwise convolutions to autocast, as torchvision does.
    """
    forward = DepthwiseConv2d.forward
    if depthwise:
        DepthwiseConv2d.forward = nn.Conv2d.forward  # type: ignore[method-assign]
    model, optimizer = detector.model.train(), build_optimizer(detector.model, settings.train)
    called = compile_forward(model, device) if compiled else model
    batches, scaler = Prefetcher(source, device), build_scaler(device, dtype)
    rates, waited, whole = [], 0.0, 0.0
    try:
        for repeat in range(repeats + WARM_UP):
            started = time.perf_counter()
            batch = next(batches)
            waiting = time.perf_counter() - started
            train_step(
                called,
                detector.criterion,
                optimizer,
                scaler,
                [batch],
                functools.partial(autocast, device, dtype),
                device,
                settings.train.clip_norm,
            )
            fetching = time.perf_counter()
            batches.prefetch(1)
            waiting += time.perf_counter() - fetching
            synchronize(device)
            seconds = time.perf_counter() - started
            if repeat >= WARM_UP:
                rates.append(len(batch["images"]) / seconds)
                waited, whole = waited + waiting, whole + seconds
    finally:
        DepthwiseConv2d.forward = forward  # type: ignore[method-assign]
    return rates, waited / whole


def time_peer(
    name: str, size: int, arguments: Any, device: torch.device, dtype: torch.dtype | None
) -> tuple[float, list[float]]:
    """Operations per training image and images per second of a detector of torchvision, with SGD."""
    from torchvision.models import get_model

    model = get_model(name, weights=None, weights_backbone=None, num_classes=arguments.classes)
    model.transform.min_size, model.transform.max_size, model.transform.fixed_size = (size,), size, (size, size)
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    batch = synthetic_batch(size, arguments.batch, arguments.classes)
    images = list(batch["images"].to(device).float() / 255)
    targets = [
        {"boxes": boxes[:BOXES].to(device), "labels": labels[:BOXES].to(device).clamp(min=1)}
        for boxes, labels in zip(batch["boxes"], batch["labels"], strict=True)
    ]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, dtype):
            losses = model(images, targets)
        sum(losses.values()).backward()
        optimizer.step()
        synchronize(device)

    rates = [len(images) / seconds(step) for _ in range(WARM_UP + arguments.repeats)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images, targets)
    return 3 * counter.get_total_flops() / len(images), rates[WARM_UP:]


def seconds(function: Callable[[], None]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


if __name__ == "__main__":
    exit_with_message(main)
