"""Seconds and memory of the COCO metric on a synthetic set of COCO's size, per evaluator.

python3 -m benchmarks.evaluation               arrays at all sizes, pycocotools at the smallest
python3 -m benchmarks.evaluation --all         both at all sizes, 4 minutes

5,000 images, 36,335 ground-truth boxes of 80 classes, some of them crowds; 201,097, 628,352 and 1,547,498 detections,
the counts of a YOLOv3 on val2017 at confidence 0.01, 0.001 and 0.0001. Prints one table: seconds from arrays to the
twelve numbers (median and spread of the repeats), the largest difference to pycocotools among these and the precisions
of all classes, IoU and recalls, and the memory that scoring adds to a process that holds the detections. Each case runs
in its own process. About a minute on 2 CPU cores.
"""

import argparse
import contextlib
import importlib.metadata
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from detection.config.command_line import Parser, at_least_one
from detection.data.annotations import AnnotationCounts, Annotations, Categories
from detection.errors import exit_with_message
from detection.evaluation.coco_metric import METRIC_NAMES, score
from detection.evaluation.detections import Detections
from detection.training.throughput import matmul_rates

COUNTS = (201_097, 628_352, 1_547_498)
IMAGES, GT_BOXES, CLASSES = 5000, 36_335, 80
SIZE = 640  # pixels, side of an image
BACKENDS = ("pycocotools", "arrays")  # the first is the reference


def main() -> None:
    parser = Parser("benchmarks.evaluation", __doc__)
    parser.add_argument("--counts", nargs="+", type=at_least_one, default=COUNTS, metavar="K", help="detections")
    parser.add_argument(
        "--repeats", type=at_least_one, default=5, help="of arrays; pycocotools runs once (%(default)s)"
    )
    parser.add_argument("--all", action="store_true", help="both evaluators at all sizes")
    parser.add_argument("--case", nargs=3, metavar=("BACKEND", "DETECTIONS", "RESULT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        backend, detections, result = arguments.case
        run_case(backend, Path(detections), Path(result), arguments.repeats)
        return
    ceiling = max(matmul_rates(2048, torch.float32, torch.device("cpu"), 3))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("numpy", BACKENDS[0]))
    print(
        f"{IMAGES} images, {GT_BOXES} ground-truth boxes, {CLASSES} classes; cpu ({platform.machine()}), {versions}; "
        f"one thread, float64; matmul float32 {ceiling / 1e12:.2f} TFLOP/s on {torch.get_num_threads()} threads"
    )
    print(
        f"{'detections':>10}  {'evaluator':<17}{'seconds':>8}{'spread':>14}{'AP':>9}{'difference':>12}{'added MiB':>11}"
    )
    gt = synthetic_ground_truth()
    with tempfile.TemporaryDirectory() as directory:
        for count in sorted(arguments.counts):
            detections = Path(directory) / "detections.npz"
            np.savez(detections, **vars(synthetic_detections(gt, count)))
            reference = None
            for backend in BACKENDS:
                if backend != "arrays" and count > min(arguments.counts) and not arguments.all:
                    continue
                result = in_own_process(backend, detections, arguments.repeats if backend == "arrays" else 1)
                reference = result if backend == BACKENDS[0] else reference
                difference = "not compared" if reference is None else f"{largest_difference(result, reference):.1e}"
                seconds, added = result["seconds"], float(result["added"]) / 2**20
                print(
                    f"{count:>10}  {backend:<17}{statistics.median(seconds):>8.2f}"
                    f"{f'{min(seconds):.2f}..{max(seconds):.2f}':>14}{result['stats'][0]:>9.5f}{difference:>14}"
                    f"{added:>11.0f}",
                    flush=True,
                )


def in_own_process(backend: str, detections: Path, repeats: int) -> dict[str, np.ndarray]:
    result = detections.with_name("result.npz")
    case = ["--case", backend, str(detections), str(result), "--repeats", str(repeats)]
    subprocess.run([sys.executable, "-m", "benchmarks.evaluation", *case], check=True)
    with np.load(result) as arrays:
        return dict(arrays)


def run_case(backend: str, file: Path, result: Path, repeats: int) -> None:
    annotations = synthetic_ground_truth()
    # Read from a file: memory freed after making them here would be reused by scoring and not be counted.
    with np.load(file) as arrays:
        detections = Detections(**arrays)
    score(annotations, detections.take(slice(0, 1000)), backend)  # warm-up: imports
    before, seconds = reset_peak_memory(), []
    for _ in range(repeats):
        started = time.perf_counter()
        scores = score(annotations, detections, backend)
        seconds.append(time.perf_counter() - started)
    stats = [np.nan if scores.metrics[name] is None else scores.metrics[name] for name in METRIC_NAMES]
    np.savez(result, seconds=seconds, added=peak_memory() - before, stats=stats, precision=scores.precision)


def largest_difference(result: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> float:
    return max(float(np.abs(result[name] - reference[name]).max()) for name in ("stats", "precision"))


def reset_peak_memory() -> int:
    """Reset the peak if Linux allows it; returns the bytes in use."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def peak_memory() -> int:
    """Return the largest resident set so far in bytes."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def synthetic_ground_truth() -> Annotations:
    """Make ground truth as in COCO: an image has few classes, and few classes have most boxes."""
    generator = np.random.default_rng(0)
    image = np.sort(generator.choice(IMAGES, GT_BOXES, p=generator.dirichlet(np.ones(IMAGES))))
    frequency = 1 / np.arange(2, CLASSES + 2)
    of_image = generator.choice(CLASSES, (IMAGES, 3), p=frequency / frequency.sum())
    labels = of_image[image, generator.choice(3, GT_BOXES, p=(0.6, 0.3, 0.1))]
    sides = np.exp(generator.normal(4.0, 1.0, (GT_BOXES, 2))).clip(4, SIZE).round(2)
    corners = (generator.random((GT_BOXES, 2)) * (SIZE - sides)).round(2)
    crowd = generator.random(GT_BOXES) < 0.01
    return Annotations(
        image_ids=np.arange(1, IMAGES + 1),
        image_sizes=np.full((IMAGES, 2), SIZE, dtype=np.int32),
        file_names=np.zeros(0, dtype=np.uint8),
        file_name_ends=np.zeros(IMAGES, dtype=np.int64),
        first_box=np.searchsorted(image, np.arange(IMAGES + 1)),
        boxes=np.concatenate([corners, corners + sides], axis=1).astype(np.float32),
        labels=labels,
        areas=sides.prod(axis=1) * 0.7,  # a mask fills its box to about that share
        coco_boxes=np.concatenate([corners, sides], axis=1),
        crowd=crowd,
        annotation_ids=np.arange(1, GT_BOXES + 1),
        file_order=np.arange(GT_BOXES),
        categories=Categories(tuple(map(str, range(CLASSES))), tuple(range(1, CLASSES + 1))),
        counts=AnnotationCounts(),
    )


def synthetic_detections(annotations: Annotations, count: int) -> Detections:
    """Make good boxes for most ground truth, worse ones around it and the rest anywhere; good ones score higher."""
    generator = np.random.default_rng(count)
    image_of_box = np.repeat(np.arange(IMAGES), np.diff(annotations.first_box))
    good = np.flatnonzero(generator.random(GT_BOXES) < 0.7)[:count]
    near = generator.integers(0, GT_BOXES, (count - len(good)) // 2)
    gt = np.concatenate([good, near])
    noise = np.where(np.arange(len(gt)) < len(good), 0.08, 0.3)[:, None]
    x_y, sides = annotations.coco_boxes[gt, :2], annotations.coco_boxes[gt, 2:]
    corners = x_y + generator.normal(size=x_y.shape) * noise * sides
    sides = sides * np.exp(generator.normal(size=x_y.shape) * noise)
    anywhere = count - len(gt)
    far_sides = np.exp(generator.normal(4.0, 1.0, (anywhere, 2))).clip(4, SIZE)
    corners = np.concatenate([corners, generator.random((anywhere, 2)) * (SIZE - far_sides)])
    boxes = np.concatenate([corners, corners + np.concatenate([sides, far_sides])], axis=1).clip(0, SIZE)
    scores = generator.random(count) ** np.where(np.arange(count) < len(good), 1, 8).astype(np.float64)
    image = np.concatenate([image_of_box[gt], generator.integers(0, IMAGES, anywhere)])
    order = np.argsort(image, kind="stable")
    labels = np.concatenate([annotations.labels[gt], generator.integers(0, CLASSES, anywhere)])
    boxes, scores = boxes.astype(np.float32).astype(np.float64), scores.astype(np.float32).astype(np.float64)
    return Detections(image[order], boxes[order], scores[order], labels[order])


if __name__ == "__main__":
    exit_with_message(main)
