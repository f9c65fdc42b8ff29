"""Partners of an image for mosaic and mixup: other images of its block in the order of the epoch."""

from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from detection.data.sampler import ImageOrder

MAX_BYTES = 64 * 2**20  # of decoded images that a process keeps; a block of 640 x 480 has 15 MB


class PartnerImages:
    """Draws partners, and keeps decoded images: those of a block are asked for several times, one after another.

    Which partners an image gets depends on seed, epoch and index alone; what is kept changes only the time it takes.

    Args:
        order: order of the images in the run.
        max_bytes: upper bound of the decoded images that are kept; those used longest ago go first.
    """

    def __init__(self, order: ImageOrder, max_bytes: int = MAX_BYTES) -> None:
        self.order, self.max_bytes = order, max_bytes
        self.images: OrderedDict[int, np.ndarray] = OrderedDict()
        self.bytes = 0

    def draw(self, index: int, epoch: int, count: int, generator: np.random.Generator) -> list[int]:
        """Draw so many images of the block, each once if there are enough; the image itself if it is alone."""
        others = self.order.neighbours(index, epoch)
        if not others:
            return [index] * count
        return [others[place] for place in generator.choice(len(others), count, replace=len(others) < count)]

    def load(self, index: int, load_image: Callable[[int], np.ndarray]) -> np.ndarray:
        """Return an image, (H, W, 3) uint8, which must not be written to: kept, or else loaded."""
        image = self.images.get(index)
        if image is not None:
            self.images.move_to_end(index)
            return image
        image = load_image(index)
        if image.nbytes <= self.max_bytes:
            self.images[index] = image
            self.bytes += image.nbytes
        while self.bytes > self.max_bytes:
            self.bytes -= self.images.popitem(last=False)[1].nbytes
        return image
