"""Batch sampler of training: image order and input size as a pure function of seed and step."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

SIZE_STEP = 32  # minimum pixels between the sizes of multiscale training
# Independent random streams derived from the run's seed; the numbers only have to differ.
ORDER_STREAM, SIZE_STREAM, BALANCE_STREAM = 1, 2, 3
BLOCK = 16  # images of the stream from which mosaic and mixup take their partners
KEPT_EPOCHS = 3  # a block, or a batch, seldom lies in more


def size_step(size_multiple: int) -> int:
    """Return the pixels between sizes of multiscale training for a detector with this `Geometry.size_multiple`."""
    return math.lcm(SIZE_STEP, size_multiple)


class Position(NamedTuple):
    """What a dataset is asked for."""

    image: int  # index in the dataset
    epoch: int = 0
    size: int = 0  # side of the network input in pixels; 0: the transform's default
    clean: bool = False  # without mosaic and mixup


class ImageOrder:
    """The endless stream of images: epochs, each shuffled on its own, one after another.

    Args:
        num_images: number of images in the dataset.
        seed: seed of the run.
        repeat_factors: how often each image is seen per epoch, (num_images,); None: once.
    """

    def __init__(self, num_images: int, seed: int, repeat_factors: np.ndarray | None = None) -> None:
        self.num_images, self.seed, self.repeat_factors = num_images, seed, repeat_factors
        # Rounded up: shrinking the factors to fit would leave some images out of some epochs.
        total = num_images if repeat_factors is None else float(repeat_factors.sum())
        self.images_per_epoch = math.ceil(round(total, 6))
        self._orders: dict[int, np.ndarray] = {}
        self._places: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def at(self, position: int) -> tuple[int, int]:
        """Return (image index, epoch) at a position of the stream."""
        epoch, place = divmod(position, self.images_per_epoch)
        return int(self.of_epoch(epoch)[place]), epoch

    def of_epoch(self, epoch: int) -> np.ndarray:
        """Return the shuffled image indices of one epoch, (images_per_epoch,) int64."""
        if epoch not in self._orders:
            if len(self._orders) == KEPT_EPOCHS:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = self._shuffle(epoch)
        return self._orders[epoch]

    def _shuffle(self, epoch: int) -> np.ndarray:
        indices = np.arange(self.num_images)
        if self.repeat_factors is not None:
            # Systematic sampling: an image with factor 1.3 is drawn once or twice, 1.3 times on average, and every
            # epoch has the same length.
            ends = np.cumsum(self.repeat_factors) * (self.images_per_epoch / self.repeat_factors.sum())
            ends[-1] = self.images_per_epoch
            start = np.random.default_rng([self.seed, BALANCE_STREAM, epoch]).random()
            indices = np.repeat(indices, np.diff(np.floor(ends + start).astype(np.int64), prepend=0))
        return np.random.default_rng([self.seed, ORDER_STREAM, epoch]).permutation(indices)

    def neighbours(self, index: int, epoch: int) -> list[int]:
        """List the other images in an image's block of the stream, at most `BLOCK` - 1, each once.

        The block is that of the first place of the image in the epoch. Blocks are those of the stream, not of the
        epoch, because batches are too: a worker that loads a batch of 16, or a multiple, loads whole blocks.
        """
        if self._places[0] != epoch:
            order = self.of_epoch(epoch)
            places = np.zeros(self.num_images, np.int64)
            places[order[::-1]] = np.arange(len(order))[::-1]  # of equal indices the last assignment holds
            self._places = (epoch, places)
        first = (epoch * self.images_per_epoch + int(self._places[1][index])) // BLOCK * BLOCK
        images = dict.fromkeys(self.at(position)[0] for position in range(first, first + BLOCK))
        return [image for image in images if image != index]


class TrainingBatchSampler:
    """Yields lists of `Position`, one per micro-batch, for a range of optimizer steps.

    The stream of `ImageOrder` is cut into batches regardless of epoch boundaries. There is no partial batch, no image
    is dropped, and any step can be computed without the ones before it.

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
        finish_step: optimizer step from which positions are clean; None: none is.
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
        finish_step: int | None = None,
    ) -> None:
        self.rank, self.ranks = rank, ranks
        self.finish_step = math.inf if finish_step is None else finish_step
        self.size_step = size_step
        self.batch_size = batch_size
        self.subdivisions = subdivisions
        self.first_step, self.end_step = steps
        self.seed = seed
        self.size = size
        self.resize_frequency = resize_frequency
        self.multiscale_sizes = multiscale_sizes
        self.order = ImageOrder(num_images, seed, repeat_factors)
        self.images_per_epoch = self.order.images_per_epoch

    def __len__(self) -> int:
        return (self.end_step - self.first_step) * self.subdivisions

    def __iter__(self) -> Iterator[list[Position]]:
        for micro_step in range(self.first_step * self.subdivisions, self.end_step * self.subdivisions):
            step = micro_step // self.subdivisions
            size, clean = self.size_of_step(step), step >= self.finish_step
            first = (micro_step * self.ranks + self.rank) * self.batch_size
            positions = range(first, first + self.batch_size)
            yield [Position(*self.image_at(position), size, clean) for position in positions]

    def image_at(self, position: int) -> tuple[int, int]:
        """Return (image index, epoch) at a position of the endless stream."""
        return self.order.at(position)

    def size_of_step(self, step: int) -> int:
        """Return the side of the network input in pixels at an optimizer step."""
        if not self.resize_frequency:
            return self.size
        smallest, largest = self.multiscale_sizes
        generator = np.random.default_rng([self.seed, SIZE_STREAM, step // self.resize_frequency])
        return smallest + self.size_step * int(
            generator.integers((largest - smallest) // self.size_step, endpoint=True)
        )
