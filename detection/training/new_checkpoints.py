"""What another process sees of a run: its new checkpoints, and how it ended. Only reads."""

import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from detection.checkpoints import DETECTOR_FIELDS, load_fields
from detection.errors import CheckpointError
from detection.runtime.run_directory import is_locked, read_status
from detection.training.checkpoint_writer import LAST, NUMBERED
from detection.training.loggers.protocol import FAILED, FINISHED, RUNNING, STOPPED
from detection.training.loggers.terminal import show_line

DIED = "died"  # beside the statuses of `loggers.protocol`: the process has left its lock without a last word
ATTEMPTS = 3  # to read a checkpoint: of a remote directory the file may vanish under the reader


class Checkpoint(NamedTuple):
    """One checkpoint of a run."""

    path: Path
    content: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.content["step"])


class NewCheckpoints:
    """Finds the checkpoints of a run directory that were not evaluated, each once, also while they are replaced.

    Args:
        directory: run directory.
        done: steps that are evaluated; grows.
    """

    def __init__(self, directory: Path, done: set[int]) -> None:
        self.directory, self.done = directory, done
        self._read: set[tuple[int, int, int]] = set()  # files, last.pt in each of its versions
        self._failures: Counter[tuple[int, int, int]] = Counter()

    def __iter__(self) -> Iterator[Checkpoint]:
        """Yield what is new at this moment, by ascending step of the numbered ones, last.pt at the end."""
        for path in [*sorted(self.directory.glob(NUMBERED)), self.directory / LAST]:
            if path.name != LAST and int(path.stem.removeprefix("step_")) in self.done:
                continue
            try:
                state = path.stat()
            except OSError:  # none yet, or one more than train.keep_checkpoints
                continue
            version = (state.st_ino, state.st_mtime_ns, state.st_size)
            if version in self._read:
                continue
            try:
                checkpoint = Checkpoint(path, load_fields(path, DETECTOR_FIELDS))
            except CheckpointError as error:
                self._failures[version] += 1
                if path.exists() and self._failures[version] >= ATTEMPTS:
                    self._read.add(version)
                    show_line(f"warning: left out: {error}")
                continue
            self._read.add(version)
            if checkpoint.step not in self.done:
                self.done.add(checkpoint.step)
                yield checkpoint


def end_of(directory: Path) -> str | None:
    """Return how a run ended: `FINISHED`, `STOPPED`, `FAILED`, `DIED`; None: it goes on, or nobody can know."""
    recorded = read_status(directory)
    status = recorded.get("status")
    if status in (FINISHED, STOPPED, FAILED):
        return str(status)
    # Locks of another machine are not seen in every file system, so a free one proves something on this machine only.
    here = status == RUNNING and recorded.get("host") == socket.gethostname()
    return DIED if here and is_locked(directory) is False else None
