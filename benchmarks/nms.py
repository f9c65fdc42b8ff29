"""Milliseconds of NMS by number of boxes: this project's and torchvision's.

python3 -m benchmarks.nms [--device cpu|cuda] [--boxes 1000 10000]

80 classes. "clustered": ten boxes around each object, as a detector predicts them; "uniform": anywhere. Prints one
table, median and spread of the repeats:

ours         `nms.grouped_nms`, at most 100 per class, as the COCO metric counts
ours, all    the same without a limit
batched_nms  torchvision's, all
per class    one call of torchvision's `nms` for each, all; what the others are compared with

The last column says which of the others keep the same boxes in the same order: batched_nms gives equal scores in any
order, and up to 1,000 boxes (CUDA: 25,000) moves the classes apart, which rounds. About half a minute on 2 CPU cores.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor
from torchvision.ops import batched_nms, nms

from detection.config.command_line import Parser, at_least_one
from detection.data.workers import prepare_process
from detection.errors import exit_with_message
from detection.ops.nms import grouped_nms
from detection.runtime.devices import choose_device, describe_device, peak_memory_gib, synchronize
from detection.training.throughput import matmul_rates

CLASSES, IOU_THRESHOLD, MAX = 80, 0.45, 100
SIZE = 416  # pixels, side of the network input
BOXES_PER_OBJECT = 10


def main() -> None:
    prepare_process()
    parser = Parser("benchmarks.nms", __doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--boxes", nargs="+", type=at_least_one, default=[1000, 10_000, 25_000, 100_000])
    parser.add_argument("--repeats", type=at_least_one, default=15, help="(%(default)s)")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    ceiling = max(matmul_rates(2048, torch.float32, device, 3))
    print(
        f"{describe_device(device)}, torch {torch.__version__}, torchvision {torchvision.__version__}, float32, "
        f"{CLASSES} classes, IoU {IOU_THRESHOLD}; matmul {ceiling / 1e12:.2f} TFLOP/s"
    )
    print(f"{'boxes':>7} {'placed':<10}{'way':<12}{'ms':>9}{'spread':>18}{'of batched_nms':>16}{'kept':>7}  equal")
    for count in arguments.boxes:
        for placed in ("clustered", "uniform"):
            boxes = [values.to(device) for values in random_boxes(count, placed)]
            expected = per_class(*boxes)
            times, kept = {}, {}
            for name, function in WAYS.items():
                times[name] = milliseconds(function, boxes, device, arguments.repeats)
                kept[name] = function(*boxes)
            reference = statistics.median(times["batched_nms"])
            for name, values in times.items():
                median, spread = statistics.median(values), f"{min(values):.2f}..{max(values):.2f}"
                wanted = best_per_class(expected, boxes[2]) if name == "ours" else expected
                equal = "yes" if torch.equal(kept[name], wanted) else "NO"
                print(
                    f"{count:>7} {placed:<10}{name:<12}{median:>9.2f}{spread:>18}{median / reference:>16.2f}"
                    f"{len(kept[name]):>7}  {equal}",
                    flush=True,
                )
    if device.type == "cuda":
        print(f"peak memory {peak_memory_gib(device):.2f} GiB")


def random_boxes(count: int, placed: str) -> tuple[Tensor, Tensor, Tensor]:
    """Make boxes xyxy (N, 4), scores (N,) and labels (N,)."""
    generator = torch.Generator().manual_seed(count)
    objects = count // BOXES_PER_OBJECT if placed == "clustered" else count
    centres, sides = torch.rand(objects, 2, generator=generator) * SIZE, torch.rand(objects, 2, generator=generator)
    sides, labels = sides * 120 + 8, torch.randint(CLASSES, (objects,), generator=generator)
    if placed == "clustered":
        of_box = torch.randint(objects, (count,), generator=generator)
        centres, sides, labels = centres[of_box], sides[of_box], labels[of_box]
        centres = centres + torch.randn(count, 2, generator=generator) * 0.08 * sides
        sides = sides * torch.exp(torch.randn(count, 2, generator=generator) * 0.1)
    return torch.cat([centres - sides / 2, centres + sides / 2], dim=1), torch.rand(count, generator=generator), labels


def ours(boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    return by_score(grouped_nms(boxes, scores, labels, IOU_THRESHOLD, MAX), scores)


def ours_all(boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    return by_score(grouped_nms(boxes, scores, labels, IOU_THRESHOLD), scores)


def library(boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    return batched_nms(boxes, scores, labels, IOU_THRESHOLD)


def per_class(boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    of_classes = labels.argsort(stable=True).split(labels.bincount().tolist())
    return by_score(torch.cat([rows[nms(boxes[rows], scores[rows], IOU_THRESHOLD)] for rows in of_classes]), scores)


def by_score(kept: Tensor, scores: Tensor) -> Tensor:
    return kept[scores[kept].argsort(descending=True, stable=True)]


def best_per_class(kept: Tensor, labels: Tensor) -> Tensor:
    """Keep the first MAX of each class, in the same order."""
    of_classes = [(labels[kept] == label).nonzero()[:MAX, 0] for label in range(CLASSES)]
    return kept[torch.cat(of_classes).sort().values]


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ours": ours,
    "ours, all": ours_all,
    "batched_nms": library,
    "per class": per_class,
}


def milliseconds(
    function: Callable[..., Tensor], boxes: list[Tensor], device: torch.device, repeats: int
) -> list[float]:
    """Measure each repeat, after two for warm-up."""
    times = []
    for repeat in range(repeats + 2):
        synchronize(device)
        started = time.perf_counter()
        function(*boxes)
        synchronize(device)
        if repeat >= 2:
            times.append((time.perf_counter() - started) * 1e3)
    return times


if __name__ == "__main__":
    exit_with_message(main)
