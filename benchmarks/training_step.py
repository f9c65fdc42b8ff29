"""Speed of a whole training step, relative to the matrix-product rate measured at the same time.

python3 -m benchmarks.training_step                                          Darknet-53 at 416 px, batch 2
python3 -m benchmarks.training_step --sizes 320 416 608 --batch 64 --device cuda
python3 -m benchmarks.training_step --batch 16 model.backbone=mobilenet_v3_small yolo.neck_channels=[128,96,64]
python3 -m benchmarks.training_step --peers                                  torchvision's detectors beside it
python3 -m benchmarks.training_step --real --sizes 416 data.root=data/coco   with the loader: share of time it waits

Prints one table: images/s (median and spread of the repeats), the matrix product rate measured just before and after
them and the share of it that was reached, how long the loader was waited for; with --compile the compiled network, on
CUDA with CUDA graphs too; for MobileNetV3 what its depthwise convolutions cost in bfloat16 on the CPU. Weights are
random. About a minute on 2 cores.
"""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from detection.config.command_line import DEFAULTS, Parser, at_least_one
from detection.config.loading import load_settings
from detection.config.settings import Settings
from detection.contract import Batch, Detector
from detection.data.build import build_datasets
from detection.data.fake import MEAN_BOXES, synthetic_batch
from detection.data.loaders import build_training_loader
from detection.data.sampler import TrainingBatchSampler
from detection.data.transforms import Transform
from detection.data.workers import prepare_process
from detection.errors import SettingsError, exit_with_message
from detection.models import build_detector
from detection.models.backbones.mobilenet import DepthwiseConv2d
from detection.runtime.devices import (
    CUDA_GRAPHS,
    autocast,
    build_scaler,
    choose_device,
    compile_forward,
    describe_device,
    emulates_bfloat16,
    synchronize,
)
from detection.training.optimizer import build_optimizer
from detection.training.prefetch import Prefetcher
from detection.training.step import train_step
from detection.training.throughput import flops_per_pixel, matmul_ceiling

WARM_UP = 3  # steps
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
# Operations per training image, images per second of each repeat, share of the time that data was waited for.
Measured = tuple[float, list[float], float]
PEERS = ("ssdlite320_mobilenet_v3_large", "retinanet_resnet50_fpn")


def main() -> None:
    prepare_process()
    parser = Parser("benchmarks.training_step", __doc__)
    parser.add_argument("settings", nargs="*", metavar="key.path=value")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=at_least_one, default=2)
    parser.add_argument("--sizes", type=at_least_one, nargs="+", default=[416], help="pixels")
    parser.add_argument("--classes", type=at_least_one, default=80)
    parser.add_argument("--repeats", type=at_least_one, default=5)
    parser.add_argument("--compile", action="store_true", help="the network compiled too")
    parser.add_argument("--real", action="store_true", help="batches of the dataset of the settings too")
    parser.add_argument("--peers", action="store_true", help="torchvision's ssdlite and retinanet too")
    arguments = parser.parse_intermixed_args()
    for word in arguments.settings:
        if word.startswith(("run.", "train.batch_size", "train.image_size")):
            raise SettingsError(f"{word}: here say --device, --batch or --sizes")
    settings, _ = load_settings(DEFAULTS, words=arguments.settings)
    device = choose_device(arguments.device)
    detector = build_detector(settings, arguments.classes).to(device, channels_last=True)
    for size in arguments.sizes:
        detector.geometry.check_size("--sizes", size)
    flops = flops_per_pixel(detector.model, detector.geometry.size_multiple)
    print(
        f"{settings.model.backbone}, neck {list(settings.yolo.neck_channels)}, {settings.train.optimizer}, batch "
        f"{arguments.batch}; {describe_device(device)}, torch {torch.__version__}"
    )
    print(f"{'':<34}{'size':>6}{'GFLOP':>8}{'images/s':>10}{'spread':>16}{'TFLOP/s':>9}{'of it':>8}{'waiting':>9}")

    def show(name: str, size: int, precision: str, work: Callable[[], Measured]) -> None:
        dtype = PRECISIONS[precision]
        before = matmul_ceiling(device, dtype)
        operations, rates, wait = work()
        ceiling = max(rate for rate in (before, matmul_ceiling(device, dtype), 0.0) if rate is not None)
        median, spread = statistics.median(rates), f"{min(rates):.2f}..{max(rates):.2f}"
        share = f"{median * operations / ceiling:.1%}" if ceiling else "-"
        line = f"{name + ', ' + precision:<34}{size:>6}{operations / 1e9:>8.1f}{median:>10.2f}{spread:>16}"
        print(f"{line}{ceiling / 1e12:>9.2f}{share:>8}{wait:>9.1%}", flush=True)

    precisions = {"float32": None} if emulates_bfloat16(device) else PRECISIONS
    for size, (precision, dtype) in itertools.product(arguments.sizes, precisions.items()):

        def steps(source: Iterator[Batch], size: int = size, dtype: Any = dtype, **options: Any) -> Measured:
            return flops * size**2, *time_steps(detector, settings, device, dtype, arguments.repeats, source, **options)

        batches = itertools.repeat(synthetic_batch(size, arguments.batch, arguments.classes))
        show("step", size, precision, functools.partial(steps, batches))
        if arguments.compile:
            for mode in (None, CUDA_GRAPHS) if device.type == "cuda" else (None,):
                name = "compiled" if mode is None else "compiled, CUDA graphs"
                forward = compile_forward(detector.model, device, len(arguments.sizes), mode)
                show(name, size, precision, functools.partial(steps, batches, called=forward))
        if settings.model.backbone.startswith("mobilenet") and device.type == "cpu" and dtype is not None:
            show("depthwise too", size, precision, functools.partial(steps, batches, depthwise=True))
        if arguments.real:
            real = real_batches(settings, size, arguments, device)
            show("real data", size, precision, functools.partial(steps, real))
    for name, size in itertools.product(PEERS if arguments.peers else (), arguments.sizes):
        for precision, dtype in precisions.items():
            work = functools.partial(time_peer, name, size, arguments, device, dtype)
            show(name.partition("_")[0], size, precision, work)


def real_batches(settings: Settings, size: int, arguments: Any, device: torch.device) -> Iterator[Batch]:
    """Load the micro-batches of a training run."""
    dataset, _ = build_datasets(settings.data, settings.run.seed, arguments.classes, 1)
    geometry = build_detector(settings, arguments.classes).geometry
    dataset.sample_transform = Transform(geometry, size, settings.run.seed, settings.data.augmentation)
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
    called: nn.Module | None = None,
    depthwise: bool = False,
) -> tuple[list[float], float]:
    """Measure images per second of each repeat, and the share of time spent waiting for batches.

    Args:
        called: the compiled network.
        depthwise: leave the depthwise convolutions to autocast, as torchvision does.
    """
    forward = DepthwiseConv2d.forward
    if depthwise:
        DepthwiseConv2d.forward = nn.Conv2d.forward  # type: ignore[method-assign]
    model, optimizer = detector.model.train(), build_optimizer(detector.model, settings.train)
    batches, scaler = Prefetcher(source, device), build_scaler(device, dtype)
    rates, waited, whole = [], 0.0, 0.0
    try:
        for repeat in range(repeats + WARM_UP):
            started = time.perf_counter()
            batch = next(batches)
            waiting = time.perf_counter() - started
            train_step(
                model if called is None else called,
                detector.criterion,
                optimizer,
                scaler,
                [batch],
                functools.partial(autocast, device, dtype),
                device,
                settings.train.clip_norm,
                clip_tensor_norm=settings.train.clip_tensor_norm,
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


def time_peer(name: str, size: int, arguments: Any, device: torch.device, dtype: torch.dtype | None) -> Measured:
    """Build a torchvision detector with SGD."""
    from torchvision.models import get_model

    model = get_model(name, weights=None, weights_backbone=None, num_classes=arguments.classes)
    model.transform.min_size, model.transform.max_size, model.transform.fixed_size = (size,), size, (size, size)
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    batch = synthetic_batch(size, arguments.batch, arguments.classes)
    images = list(batch["images"].to(device).float() / 255)
    targets = [
        {"boxes": boxes[:MEAN_BOXES].to(device), "labels": labels[:MEAN_BOXES].to(device).clamp(min=1)}
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
    return 3 * counter.get_total_flops() / len(images), rates[WARM_UP:], 0.0


def seconds(function: Callable[[], None]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


if __name__ == "__main__":
    exit_with_message(main)
