"""Speed of a whole training step on synthetic batches, beside the matrix product rate of the same minute.

python3 -m benchmarks.training_step                                               MobileNetV3-small at 320 px, batch 16
python3 -m benchmarks.training_step --batch 2 yolo.encoder=darknet train.image_size=416

Prints one table: images/s (median and spread of the repeats), the share of the matrix product rate in float32 and
bfloat16, and for MobileNetV3 what its depthwise convolutions cost in bfloat16 on the CPU. About a minute on 2 cores.
"""

import argparse
import functools
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from detection.data.loaders import Batch
from detection.devices import autocast, build_scaler, choose_device, matmul_rates
from detection.errors import exit_with_message
from detection.models import Detector, build_detector
from detection.models.mobilenet import DepthwiseConv2d
from detection.settings import Settings, load_settings
from detection.training import build_optimizer, train_step

ARGS = Path(__file__).resolve().parent.parent / "yolo-v3" / "args.yaml"
DEFAULTS = ["yolo.encoder=mobilenet_v3_small", "yolo.neck_channels=[128,96,64]", "train.image_size=320"]
BOXES = 7  # per image, the mean of COCO


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="key.path=value")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_intermixed_args()
    settings, _ = load_settings(ARGS, words=[*DEFAULTS, *arguments.settings])
    device = choose_device(arguments.device)
    ceilings = {dtype: max(matmul_rates(3072, dtype, device, 3)) for dtype in (torch.float32, torch.bfloat16)}

    detector = build_detector(settings.yolo, settings.evaluation, arguments.classes).to(device, channels_last=True)
    batch = synthetic_batch(settings.train.image_size, arguments.batch, arguments.classes)
    with FlopCounterMode(display=False) as counter:
        detector.model.eval()(batch["images"][:1].to(device))
    operations = 3 * counter.get_total_flops()  # forward, and twice that backward
    print(
        f"{settings.yolo.encoder}, neck {list(settings.yolo.neck_channels)}, {settings.train.image_size} px, batch "
        f"{arguments.batch}, {operations / 1e9:.1f} GFLOP per training image; {device}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads"
    )
    print(f"{'precision':<32}{'images/s':>10}{'spread':>16}{'matmul TFLOP/s':>16}{'share':>8}")
    rows = [("float32", None, False), ("bfloat16", torch.bfloat16, False)]
    if settings.yolo.encoder.startswith("mobilenet") and device.type == "cpu":
        rows.append(("bfloat16, depthwise too", torch.bfloat16, True))
    for name, dtype, depthwise in rows:
        rates = step_rates(detector, settings, batch, device, dtype, depthwise, arguments.repeats)
        ceiling = ceilings[dtype or torch.float32]
        median = statistics.median(rates)
        spread = f"{min(rates):.1f}..{max(rates):.1f}"
        print(f"{name:<32}{median:>10.1f}{spread:>16}{ceiling / 1e12:>16.2f}{median * operations / ceiling:>8.0%}")


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


def step_rates(
    detector: Detector,
    settings: Settings,
    batch: Batch,
    device: torch.device,
    dtype: torch.dtype | None,
    depthwise: bool,
    repeats: int,
) -> list[float]:
    """Images per second of each repeat after three warm-up steps.

    Args:
        depthwise: leave the depthwise convolutions to autocast, as torchvision does.
    """
    forward = DepthwiseConv2d.forward
    if depthwise:
        DepthwiseConv2d.forward = nn.Conv2d.forward  # type: ignore[method-assign]
    model, optimizer = detector.model.train(), build_optimizer(detector.model, settings.train)
    rates = []
    try:
        for repeat in range(repeats + 3):
            started = time.perf_counter()
            result = train_step(
                model,
                detector.criterion,
                optimizer,
                build_scaler(device, dtype),
                [batch],
                functools.partial(autocast, device, dtype),
                device,
                settings.train.clip_norm,
            )
            result.finite.item()  # waits for the device
            if repeat >= 3:
                rates.append(len(batch["images"]) / (time.perf_counter() - started))
    finally:
        DepthwiseConv2d.forward = forward  # type: ignore[method-assign]
    return rates


if __name__ == "__main__":
    exit_with_message(main)
