"""The next batches go to the device while it computes."""

from collections import deque
from collections.abc import Iterator

import torch

from detection.contract import Batch
from detection.data.loaders import targets_to
from detection.errors import UserError

COPIED = ("images", "boxes", "labels")


class Prefetcher:
    """An iterator over batches; on CUDA those asked for by `prefetch` are copied on a stream of their own.

    Elsewhere it hands the loader's batches on as they are. The order is the loader's; an error of the loader comes when
    the batches before it have been taken.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device) -> None:
        self.batches, self.device = batches, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ready: deque[tuple[Batch, torch.cuda.Event]] = deque()
        self._error: Exception | None = None

    def prefetch(self, count: int) -> None:
        """Have `count` batches on their way. To be called when the device has work: it waits for the loader."""
        if self.stream is None or self._error is not None:
            return
        try:
            while len(self._ready) < count:
                batch = next(self.batches)
                with torch.cuda.stream(self.stream):
                    images, targets = targets_to(batch, self.device)
                self._ready.append((batch | {"images": images, **targets}, self.stream.record_event()))
        except (StopIteration, UserError, RuntimeError, OSError) as error:
            self._error = error

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._ready:
            batch, copied = self._ready.popleft()
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(copied)
            for name in COPIED:
                batch[name].record_stream(stream)  # its memory is not given to the next copy before that stream is done
            return batch
        if self._error is not None:
            raise self._error
        return next(self.batches)
