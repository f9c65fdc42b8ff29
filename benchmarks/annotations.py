"""Memory of the annotations of COCO train2017 in the training process and in each loader worker.

python3 -m benchmarks.annotations                    118,287 images and 860,001 boxes, 2 workers, one epoch
python3 -m benchmarks.annotations --images 20000     a try

Workers are forked and share the memory of the training process until one of them writes to it: what counts is what
they alone hold (Private_Clean + Private_Dirty of /proc/PID/smaps_rollup, Linux only) after one epoch, over what they
held after their first batches. The images are links to one small JPEG. About 80 seconds on 2 CPU cores.
"""

import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.support.synthetic_dataset import TRAIN2017, write_annotations, write_links
from detection.config.command_line import Parser, at_least_one
from detection.contract import Geometry
from detection.data.coco import CocoDataset
from detection.data.loaders import build_training_loader
from detection.data.sampler import TrainingBatchSampler
from detection.data.transforms import Transform
from detection.data.workers import prepare_process
from detection.errors import exit_with_message

BATCH, SIZE, WARM_UP = 64, 32, 20  # SIZE: of the network input, small: the time is not what is measured


def main() -> None:
    prepare_process()
    parser = Parser("benchmarks.annotations", __doc__)
    parser.add_argument("--images", type=at_least_one, default=TRAIN2017[0])
    parser.add_argument("--workers", type=at_least_one, default=2)
    arguments = parser.parse_args()
    count = arguments.images
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        file = root / "annotations.json"
        write_annotations(file, count, TRAIN2017[1] * count // TRAIN2017[0])
        write_links(root / "images", count, np.zeros((16, 16, 3), np.uint8))
        before, started = memory_of("self"), time.perf_counter()
        dataset = CocoDataset(root / "images", file, Transform(Geometry(32), SIZE))
        seconds = time.perf_counter() - started
        # The generated file says 640 x 480, which this image is not; nothing here looks at its size.
        dataset.annotations.image_sizes[:] = 0
        arrays = sum(value.nbytes for value in vars(dataset.annotations).values() if isinstance(value, np.ndarray))
        after, peak = memory_of("self"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        workers = epoch(dataset, arguments.workers)
        size = file.stat().st_size
    print(
        f"torch {torch.__version__}, NumPy {np.__version__}, file of {size / 1e6:.0f} MB, {count} images, "
        f"{len(dataset.annotations.labels)} boxes, read in {seconds:.1f} s"
    )
    print(f"{'MB':<44}{'private':>10}{'proportional':>14}")
    print(f"{'the arrays':<44}{arrays / 1e6:>10.1f}")
    print(f"{'training process, growth by reading':<44}{(after[0] - before[0]) / 1e6:>10.1f}")
    print(f"{'training process, peak':<44}{peak / 1e6:>10.1f}")
    for number, (first, last) in enumerate(workers.values()):
        for name, values in (("first batches", first), ("one epoch", last)):
            print(f"{f'worker {number} after {name}':<44}{values[0] / 1e6:>10.1f}{values[1] / 1e6:>14.1f}")
        print(f"{f'worker {number}, growth':<44}{(last[0] - first[0]) / 1e6:>10.1f}{(last[1] - first[1]) / 1e6:>14.1f}")


def epoch(dataset: CocoDataset, workers: int) -> dict[int, list[tuple[int, int]]]:
    """Measure the memory of each worker after its first batches and after one epoch."""
    steps = len(dataset) // BATCH
    sampler = TrainingBatchSampler(len(dataset), BATCH, 1, (0, steps), 0, SIZE)
    found: dict[int, list[tuple[int, int]]] = {}
    for step, _ in enumerate(build_training_loader(dataset, sampler, workers, torch.device("cpu"))):
        if step in (WARM_UP, steps - 2 * workers - 1):  # at the end the first of them have left
            for process in multiprocessing.active_children():
                found.setdefault(process.pid or 0, []).append(memory_of(str(process.pid)))
    return found


def memory_of(process: str) -> tuple[int, int]:
    """Return the bytes private to a process, and its proportional share of those shared with others."""
    sizes = {}
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]:
        name, value, _ = line.split()
        sizes[name] = int(value) * 1024
    return sizes["Private_Clean:"] + sizes["Private_Dirty:"], sizes["Pss:"]


if __name__ == "__main__":
    exit_with_message(main)
