"""Cost of assignment and loss: operations, host reads, milliseconds, share of a training step.

python3 -m benchmarks.loss                                  416 px, batch 16, three numbers of boxes, all losses
python3 -m benchmarks.loss --batch 64 --device cuda

The step is forward and backward of a network on the same batch (`--backbone`), measured once with the default loss.
About 30 seconds on 2 CPU cores.
"""

import argparse
import statistics
from typing import Any

import torch

from benchmarks.support.operation_trace import OperationTrace
from benchmarks.support.timing import milliseconds
from detection.config.command_line import DEFAULTS, Parser, at_least_one
from detection.config.loading import load_settings
from detection.data.fake import synthetic_batch
from detection.data.loaders import SMALLEST_BUCKET, batch_to_device
from detection.data.workers import prepare_process
from detection.errors import exit_with_message
from detection.models import build_detector
from detection.models.yolo import CRITERIA
from detection.models.yolo.criterion import Criterion
from detection.models.yolo.darknet_loss import assign_targets
from detection.runtime.devices import choose_device, describe_device
from detection.training.throughput import matmul_ceiling

BOXES = (7, 30, 93)  # per image: mean, many, most of COCO
CLASSES = 80


def main() -> None:
    prepare_process()
    parser = Parser("benchmarks.loss", __doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backbone", default="mobilenet_v3_small", help="of the step (default: mobilenet_v3_small)")
    parser.add_argument("--batch", type=at_least_one, default=16)
    parser.add_argument("--size", type=at_least_one, default=416, help="pixels")
    parser.add_argument("--repeats", type=at_least_one, default=7)
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    settings, _ = load_settings(DEFAULTS, words=[f"model.backbone={arguments.backbone}"])
    detector = build_detector(settings, CLASSES).to(device, channels_last=True)
    detector.geometry.check_size("--size", arguments.size)
    batch = synthetic_batch(arguments.size, arguments.batch, CLASSES)
    images, _ = batch_to_device(batch, device)
    model = detector.model.train()
    outputs = [output.detach().requires_grad_() for output in model(images)]

    def step() -> None:
        losses = detector.criterion(model(images), batch_to_device(batch, device)[1])
        sum(losses.values()).backward()

    whole = statistics.median(milliseconds(step, device, 3))
    ceiling = (matmul_ceiling(device, None) or 0) / 1e12
    print(
        f"{describe_device(device)}, torch {torch.__version__}, float32, {arguments.size} px, batch {arguments.batch}; "
        f"forward and backward of {arguments.backbone}: {whole:.0f} ms; matrix products {ceiling:.2f} TFLOP/s"
    )
    print(
        f"{'loss':<28}{'boxes':>6}{'rows':>6}{'operations':>12}{'host reads':>12}{'assign ms/img':>15}"
        f"{'forward ms':>12}{'with backward':>15}{'spread':>16}{'of step':>9}"
    )
    for loss in CRITERIA:
        for class_loss in ("bce", "cross_entropy"):
            criterion = CRITERIA[loss](settings.yolo.anchors, model.strides, 0.7, class_loss).to(device)
            for boxes in BOXES:
                row = measure(criterion, outputs, boxes_of(batch, boxes, arguments.size, device), device, arguments)
                print(f"{f'{loss}, {class_loss}':<28}{boxes:>6}{row} {whole_share(row, whole):>8}")


def boxes_of(batch: dict[str, Any], count: int, size: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Make `count` boxes per image, padded as the loader does."""
    rows = SMALLEST_BUCKET
    while rows < count:
        rows *= 2
    images = len(batch["labels"])
    generator = torch.Generator().manual_seed(count)
    corner = torch.rand(images, rows, 2, generator=generator) * size * 0.8
    sides = 8 + torch.rand(images, rows, 2, generator=generator) * size * 0.2
    labels = torch.full((images, rows), -1)
    labels[:, :count] = torch.randint(CLASSES, (images, count), generator=generator)
    return {"boxes": torch.cat([corner, corner + sides], -1).to(device), "labels": labels.to(device)}


def measure(
    criterion: Criterion,
    outputs: list[torch.Tensor],
    targets: dict[str, torch.Tensor],
    device: torch.device,
    arguments: argparse.Namespace,
) -> str:
    criterion(outputs, targets)  # makes its tables
    with OperationTrace() as trace:
        criterion(outputs, targets)
    table = criterion.layout.tables([(output.shape[2], output.shape[3]) for output in outputs]).anchors
    assign = milliseconds(
        lambda: assign_targets(targets["boxes"], targets["labels"], table), device, 3 * arguments.repeats
    )
    with torch.no_grad():
        forward = milliseconds(lambda: criterion(outputs, targets), device, arguments.repeats)
    both = milliseconds(lambda: sum(criterion(outputs, targets).values()).backward(), device, arguments.repeats)
    return (
        f"{targets['labels'].shape[1]:>6}{len(trace.operations):>12}{len(trace.host_reads):>12}"
        f"{statistics.median(assign) / arguments.batch:>15.4f}{statistics.median(forward):>12.1f}"
        f"{statistics.median(both):>15.1f}{f'{min(both):.1f}..{max(both):.1f}':>16}"
    )


def whole_share(row: str, whole: float) -> str:
    return f"{float(row.split()[-2]) / whole:.1%}"


if __name__ == "__main__":
    exit_with_message(main)
