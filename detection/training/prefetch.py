"""Prefetching: copy the next batches to the device while it computes."""

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from detection.contract import Batch
from detection.data.loaders import TARGETS, batch_to_device
from detection.errors import UserError


class Prefetcher:
    """Iterator over the loader's batches; on CUDA, `prefetch` copies the next ones on a separate stream.

    On other devices the batches pass through unchanged. The order is kept; an error of the loader is raised after the
    batches that precede it.

    Args:
        batches: iterator of the loader.
        device: target device.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device) -> None:
        self.batches, self.device = batches, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ready: deque[tuple[Batch, torch.cuda.Event]] = deque()
        self._error: Exception | None = None

    def prefetch(self, count: int) -> None:
        """Start copying the next `count` batches; call it while the device is busy, because it waits for the loader."""
        if self.stream is None or self._error is not None:
            return
        try:
            while len(self._ready) < count:
                batch = next(self.batches)
                with torch.cuda.stream(self.stream):
                    images, targets = batch_to_device(batch, self.device)
                copied: Batch = {**batch, "images": images, **targets}  # type: ignore[typeddict-item]
                self._ready.append((copied, self.stream.record_event()))
        except (StopIteration, UserError, RuntimeError, OSError) as error:
            self._error = error

    def close(self) -> None:
        """Drop the loader's iterator, which ends its workers."""
        self.batches = iter(())
        self._ready.clear()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._ready:
            batch, copied = self._ready.popleft()
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(copied)
            for key in ("images", *(key for key in TARGETS if key in batch)):
                tensor: Tensor = batch[key]  # type: ignore[literal-required]
                tensor.record_stream(stream)  # the next copy must not reuse its memory before that stream is done
            return batch
        if self._error is not None:
            raise self._error
        return next(self.batches)
