"""Batch sampler of training: image order and input size as a pure function of seed and step."""

import math
from collections.abc import Iterator

import numpy as np

SIZE_STEP = 32  # minimum pixels between the sizes of multiscale training
# Independent random streams derived from the run's seed; the numbers only have to differ.
ORDER_STREAM, SIZE_STREAM, BALANCE_STREAM = 1, 2, 3


def size_step(size_multiple: int) -> int:
    """Return the pixels between sizes of multiscale training for a detector with this `Geometry.size_multiple`."""
    return math.lcm(SIZE_STEP, size_multiple)


class TrainingBatchSampler:
    """Yields lists of (image index, epoch, size), one per micro-batch, for a range of optimizer steps.

    Epochs, each shuffled on its own, form one endless stream that is cut into batches regardless of epoch boundaries.
    There is no partial batch, no image is dropped, and any step can be computed without the ones before it.

    Args:
        num_images: number of images in the dataset.
        batch_size: images per micro-batch and process.
        subdivisions: micro-batches per optimizer step.
        steps: (first, end) optimizer steps to produce, end excluded.
        seed: seed of the run.
        size: side of the network input in pixels.
        resize_frequency: optimizer steps between random changes of the size; 0: always `size`.
        multiscale_sizes: smallest and largest random size in pixels.
        repeat_factors: how often each image is seen per epoch, (num_images,); None: once.
        size_step: pixels between random sizes, a multiple of the network's size multiple.
        rank, ranks: rank of this process and number of processes, which share micro-batches of batch_size * ranks.
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
        size_step: int = SIZE_STEP,
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
        """Return (image index, epoch) at a position of the endless stream."""
        epoch, place = divmod(position, self.images_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, self.order_of_epoch(epoch))
        return int(self._order[1][place]), epoch

    def order_of_epoch(self, epoch: int) -> np.ndarray:
        """Return the shuffled image indices of one epoch, (images_per_epoch,) int64."""
        indices = np.arange(self.num_images)
        if self.repeat_factors is not None:
            # Systematic sampling: an image with factor 1.3 is drawn once or twice, 1.3 times on average, and every
            # epoch has the same length.
            ends = np.cumsum(self.repeat_factors) * (self.images_per_epoch / self.repeat_factors.sum())
            ends[-1] = self.images_per_epoch
            start = np.random.default_rng([self.seed, BALANCE_STREAM, epoch]).random()
            indices = np.repeat(indices, np.diff(np.floor(ends + start).astype(np.int64), prepend=0))
        return np.random.default_rng([self.seed, ORDER_STREAM, epoch]).permutation(indices)

    def size_of_step(self, step: int) -> int:
        """Return the side of the network input in pixels at an optimizer step."""
        if not self.resize_frequency:
            return self.size
        smallest, largest = self.multiscale_sizes
        generator = np.random.default_rng([self.seed, SIZE_STREAM, step // self.resize_frequency])
        return smallest + self.size_step * int(
            generator.integers((largest - smallest) // self.size_step, endpoint=True)
        )
