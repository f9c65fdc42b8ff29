"""Batches of a fixed form: which images, at which size, in which order, is a pure function of seed and step."""

import atexit
import math
import multiprocessing
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from detection.data.transforms import Sample
from detection.devices import pinning
from detection.host_memory import keep_freed_memory
from detection.settings import SIZE_MULTIPLE
from detection.stopping import STOPPING
from detection.target_assignment import PADDING_LABEL

SMALLEST_BUCKET = 32  # truths per image; the padded number is this times a power of two, so few shapes occur
# Streams of the one seed; the numbers only have to differ.
ORDER_STREAM, SIZE_STREAM, BALANCE_STREAM = 1, 2, 3

PREFETCHED = 2  # batches of each worker, torch's default

Batch = dict[str, Any]


class TrainingBatchSampler:
    """Positions (image index, epoch, size) of every micro-batch from `first_step` to the end of the run.

    The stream of images runs on across epochs, each epoch in its own order, and is cut into batches regardless of
    where an epoch ends: no tail, nothing dropped, and any step can be computed without the ones before.

    Args:
        num_images: of the dataset.
        batch_size: images per micro-batch.
        subdivisions: micro-batches per optimizer step.
        steps: (first, end): optimizer steps to produce.
        seed: of the run.
        size: side of the network input in pixels.
        resize_frequency: optimizer steps between changes of the size; 0: always `size`.
        multiscale_sizes: smallest and largest size of the changes.
        repeat_factors: how often each image is seen per epoch, (num_images,); None: once.
        size_step: pixels between the sizes; what the network's sizes must be a multiple of divides it.
        rank, ranks: of this process; each takes its share of every micro-batch of batch_size * ranks images.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        subdivisions: int,
        steps: tuple[int, int],
        seed: int,
        size: int,
        resize_frequency: int = 0,
        multiscale_sizes: tuple[int, int] = (320, 608),
        repeat_factors: np.ndarray | None = None,
        size_step: int = SIZE_MULTIPLE,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.rank, self.ranks = rank, ranks
        self.num_images = num_images
        self.size_step = size_step
        self.batch_size = batch_size
        self.subdivisions = subdivisions
        self.first_step, self.end_step = steps
        self.seed = seed
        self.size = size
        self.resize_frequency = resize_frequency
        self.multiscale_sizes = multiscale_sizes
        self.repeat_factors = repeat_factors
        # Rounded up: shrinking the factors to fit would leave some images out of some epochs.
        total = num_images if repeat_factors is None else float(repeat_factors.sum())
        self.images_per_epoch = math.ceil(round(total, 6))
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def __len__(self) -> int:
        return (self.end_step - self.first_step) * self.subdivisions

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for micro_step in range(self.first_step * self.subdivisions, self.end_step * self.subdivisions):
            size = self.size_of_step(micro_step // self.subdivisions)
            first = (micro_step * self.ranks + self.rank) * self.batch_size
            positions = range(first, first + self.batch_size)
            yield [(*self.image_at(position), size) for position in positions]

    def image_at(self, position: int) -> tuple[int, int]:
        """(image index, epoch) of a position in the endless stream of images."""
        epoch, place = divmod(position, self.images_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, self.order_of_epoch(epoch))
        return int(self._order[1][place]), epoch

    def order_of_epoch(self, epoch: int) -> np.ndarray:
        """Image indices of one epoch, shuffled; (images_per_epoch,) int64."""
        indices = np.arange(self.num_images)
        if self.repeat_factors is not None:
            # Systematic sampling: an image with factor 1.3 comes once or twice, 1.3 times on average, and the total
            # is the same in every epoch.
            ends = np.cumsum(self.repeat_factors) * (self.images_per_epoch / self.repeat_factors.sum())
            ends[-1] = self.images_per_epoch
            start = np.random.default_rng([self.seed, BALANCE_STREAM, epoch]).random()
            indices = np.repeat(indices, np.diff(np.floor(ends + start).astype(np.int64), prepend=0))
        return np.random.default_rng([self.seed, ORDER_STREAM, epoch]).permutation(indices)

    def size_of_step(self, step: int) -> int:
        """Side of the network input in optimizer step `step`, pixels."""
        if not self.resize_frequency:
            return self.size
        smallest, largest = self.multiscale_sizes
        generator = np.random.default_rng([self.seed, SIZE_STREAM, step // self.resize_frequency])
        return smallest + self.size_step * int(
            generator.integers((largest - smallest) // self.size_step, endpoint=True)
        )


def collate_samples(samples: Sequence[Sample]) -> Batch:
    """Stack samples into tensors of a few fixed shapes.

    Returns:
        "images" (B, 3, S, S) uint8, channels_last in memory because that is how images are decoded: no transposition;
        "boxes" (B, G, 4) float32 and "labels" (B, G) int64, padded with -1, G one of 32, 64, 128, ...;
        "indices" (B,) int64 of the images in the dataset; "letterboxes" list of B; "unreadable" list of lines.
    """
    # In a worker `default_collate` copies the images straight into the memory that the training process shares.
    images = default_collate([torch.from_numpy(sample.image) for sample in samples]).permute(0, 3, 1, 2)
    most = max(len(sample.labels) for sample in samples)
    padded = SMALLEST_BUCKET
    while padded < most:
        padded *= 2
    boxes = torch.zeros(len(samples), padded, 4)
    labels = torch.full((len(samples), padded), PADDING_LABEL, dtype=torch.int64)
    for row, sample in enumerate(samples):
        boxes[row, : len(sample.labels)] = torch.from_numpy(sample.boxes)
        labels[row, : len(sample.labels)] = torch.from_numpy(sample.labels)
    return {
        "images": images,
        "boxes": boxes,
        "labels": labels,
        "indices": torch.tensor([sample.index for sample in samples]),
        "letterboxes": [sample.letterbox for sample in samples],
        "unreadable": [line for sample in samples for line in sample.unreadable],
    }


def prepare_worker(_: int) -> None:
    """OpenCV's own threads would fight with the workers; signals to stop are the training process's to handle."""
    cv2.setNumThreads(0)
    keep_freed_memory()
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    # Errors of the dataset travel to the training process. What is left are those of the thread that hands batches
    # over, when the training process ends before it has taken them: no news to anybody.
    sys.excepthook = lambda *_: None


def prepare_process() -> None:
    """The training process's side of `prepare_worker`."""
    cv2.setNumThreads(0)
    keep_freed_memory()  # decoded images are large enough to be taken anew too
    # On a machine with fewer cores than workers torch prints two lines; what counts is train/wait_fraction.
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    atexit.unregister(kill_workers)  # once, however many loaders are built
    atexit.register(kill_workers)


def leave_worker_deaths() -> None:
    """A worker that dies is found by its loader when its batch does not come, after a step, not in the middle of one.

    To be called when a loader has started its workers: torch's handler raises wherever the program is, with the weights
    half moved.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def kill_workers() -> None:
    """At exit multiprocessing ends the workers that are left by SIGTERM, which they ignore, and would wait forever.

    Some are left whenever an error leaves the loop over a loader: its traceback keeps the loader alive.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call each of them a failure
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def build_training_loader(
    dataset: Dataset, sampler: TrainingBatchSampler, num_workers: int, device: torch.device
) -> DataLoader:
    """Micro-batches in the sampler's order, one pass over the whole rest of the run."""
    prepare_process()
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate_samples,
        worker_init_fn=prepare_worker,
        generator=torch.Generator(),  # the loader draws a number at its start; not from the run's random state
        **pinning(device),
    )


def build_evaluation_loader(
    dataset: Dataset, batch_size: int, num_workers: int, device: torch.device, rank: int = 0, ranks: int = 1
) -> DataLoader:
    """Every image once, in the dataset's order; of several processes each has its own images."""
    prepare_process()
    return DataLoader(
        dataset,
        sampler=range(rank, len(dataset), ranks),  # type: ignore[arg-type]
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate_samples,
        worker_init_fn=prepare_worker,
        generator=torch.Generator(),  # the loader draws a number at its start; not from the run's random state
        **pinning(device),
    )


def batches_ahead(workers: int) -> int:
    """How many batches lie in memory at most beside the one that is worked on, and that one."""
    return workers * PREFETCHED + 1


def targets_to(batch: Batch, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """Images and padded targets on the device; the copy does not wait when the batch is pinned."""
    images = batch["images"].to(device, non_blocking=True)
    targets = {key: batch[key].to(device, non_blocking=True) for key in ("boxes", "labels")}
    return images, targets
