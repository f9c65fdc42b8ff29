"""Asynchronous checkpoints: the training loop copies its state, and a thread writes and verifies it."""

import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detection.checkpoints import remove_leftovers, save_checkpoint
from detection.errors import OutputError
from detection.training.loggers import Loggers
from detection.training.run import Run
from detection.training.state import RunState

LAST, BEST = "last.pt", "best.pt"
NUMBERED = "step_[0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9].pt"  # of step n: format(n, "09d")


class CheckpointWriter:
    """Writes checkpoints one at a time in a thread. A context manager that waits for the last write on exit.

    `save` copies the tensors into host memory, which is reused by the next call, so that training may change them while
    the file is written. Another `save` first waits for the previous write, so there is never more than one copy. The
    error of a failed write is raised by the next call of `save`, `wait` or `check`.

    Args:
        directory: run directory; partial files of a killed process are removed from it.
        keep: number of checkpoints `step_<n>.pt` to keep beside last.pt and best.pt; older ones are removed.
    """

    def __init__(self, directory: Path, keep: int = 0) -> None:
        self.directory, self.keep = directory, keep
        remove_leftovers(directory)
        self._thread: threading.Thread | None = None
        self._error: OutputError | None = None
        self._written: deque[Path] = deque()  # appended by the thread
        self._memory: dict[tuple[int, ...], Tensor] = {}

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if error is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()

    def save(
        self, content: dict[str, Any], *, last: bool = True, best: bool = False, number: int | None = None
    ) -> None:
        """Start writing the content under one or more names.

        Args:
            content: tensors on any device and plain values, in nested dicts, lists and tuples.
            last: write last.pt.
            best: also write best.pt.
            number: also write step_<number>.pt, if any are kept.

        Raises:
            OutputError: the previous write failed.
        """
        self.wait()
        names = [LAST] * last + [BEST] * best  # the first one is replaced last: it implies the others
        if number is not None and self.keep:
            names.append(f"step_{number:09d}.pt")
        copied = self._copy(content, ())
        self._thread = threading.Thread(target=self._write, args=(copied, names), name="checkpoint writer")
        self._thread.start()

    def wait(self) -> None:
        """Wait until everything is on the disk.

        Raises:
            OutputError: a write failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise the error of a write that has failed; does not wait.

        Raises:
            OutputError: a write failed.
        """
        error, self._error = self._error, None
        if error is not None:
            raise error

    def take_written(self) -> list[Path]:
        """Return the files that have been completed since the last call."""
        return [self._written.popleft() for _ in range(len(self._written))]

    def _write(self, content: dict[str, Any], names: list[str]) -> None:
        try:
            save_checkpoint(self.directory / names[0], content, names[1:])
            if self.keep:
                # By age, not by number: a run resumed from an older checkpoint writes lower numbers again.
                numbered = sorted(self.directory.glob(NUMBERED), key=lambda path: (path.stat().st_mtime_ns, path.name))
                for path in numbered[: -self.keep]:
                    path.unlink()
            self._written.extend(self.directory / name for name in names)
        except OutputError as error:
            self._error = error
        except Exception as error:  # noqa: BLE001  (in a thread it would only be printed)
            self._error = OutputError(f"checkpoint in {self.directory}: {type(error).__name__}: {error}")

    def _copy(self, value: Any, place: tuple[int, ...]) -> Any:
        """Copy the tensors of `value` to the host; `place` is its position in the content."""
        if isinstance(value, Tensor):
            memory = self._memory.get(place)
            if memory is None or memory.shape != value.shape or memory.dtype != value.dtype:
                memory = self._memory[place] = torch.empty_like(value, device="cpu", requires_grad=False)
            return memory.copy_(value.detach())
        if isinstance(value, dict):
            return {key: self._copy(inner, (*place, number)) for number, (key, inner) in enumerate(value.items())}
        if isinstance(value, list | tuple):
            return [self._copy(inner, (*place, number)) for number, inner in enumerate(value)]
        return value


class Saver:
    """Decides when a run writes checkpoints; only its first process does.

    Announces `best.pt` to the loggers once it is on the disk.
    """

    def __init__(self, run: Run, state: RunState, loggers: Loggers) -> None:
        self.run, self.state, self.loggers = run, state, loggers
        keep = run.settings.train.keep_checkpoints
        self.writer = CheckpointWriter(loggers.directory, keep) if run.ranks.is_first else None
        self.saved = time.monotonic()

    def due(self) -> bool:
        """Return whether `train.save_frequency` or `train.save_minutes` asks for a checkpoint after this step."""
        minutes = self.run.settings.train.save_minutes
        late = minutes is not None and time.monotonic() - self.saved >= 60 * minutes
        return late or self.state.step % self.run.save_frequency == 0

    def save(self, best: bool = False, numbered: bool = False) -> None:
        """Copy the state and start writing it to last.pt.

        Args:
            best: also write best.pt.
            numbered: also write step_<n>.pt, if any are kept.

        Raises:
            OutputError: the previous write failed.
        """
        self.saved = time.monotonic()
        if self.writer is not None:
            number = self.state.step if numbered else None
            self.writer.save(self.run.checkpoint(self.state), best=best, number=number)
            self._announce()

    def save_best_of(self, model: nn.Module) -> None:
        """Write best.pt with the weights of this model and no EMA, and last.pt as ever."""
        if self.writer is not None:
            content = self.run.checkpoint(self.state)
            self.writer.save({**content, "model": model.state_dict(), "average": None}, last=False, best=True)
            self.save()

    def check(self) -> None:
        """Raise the error of a write that has failed; does not wait.

        Raises:
            OutputError: a write failed.
        """
        if self.writer is not None:
            self.writer.check()
            self._announce()

    def wait(self) -> None:
        """Wait until everything is on the disk; raises like `check`."""
        if self.writer is not None:
            self.writer.wait()
            self._announce()

    def _announce(self) -> None:
        assert self.writer is not None
        for path in self.writer.take_written():
            if path.name == BEST:
                self.loggers.artifact(path)
