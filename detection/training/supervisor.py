"""Monitoring of the training loop: signals, unreadable images, watchdog, waiting times, profile and progress bar."""

import contextlib
import functools
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from tqdm import tqdm

from detection.contract import Batch
from detection.data.workers import restore_default_sigchld
from detection.errors import OUT_OF_MEMORY, UserError, known_failure, say
from detection.runtime.distributed import Watchdog
from detection.runtime.profiling import StepProfiler, waiting_for_data
from detection.runtime.signals import StopRequest, stopped_by
from detection.training.loggers import Loggers
from detection.training.prefetch import Prefetcher
from detection.training.run import Run
from detection.training.state import RunState
from detection.training.unreadable_images import STOP_UNREADABLE, UnreadableImages

LATE, OVER = 1.02, 1.03  # shares of `train.minutes` beyond which evaluations are left out, and training ends
MIN_BAR_COLUMNS = 40  # of a terminal that gets a progress bar


class Supervisor:
    """Monitors the training loop. A context manager around the loop, which also closes the batches.

    In each step call `begin`, `next_batches` and `end`, in this order. All processes stop after the same step: each
    votes at the beginning of a step and reads the result at its end, so that the exchange overlaps with the step.

    Args:
        run: the run.
        state: its state.
        batches: micro-batches of the remaining steps.
        loggers: loggers of the run.
        stop: stop request with installed signal handlers.
        profile: record a few steps with torch's profiler.
    """

    def __init__(
        self, run: Run, state: RunState, batches: Prefetcher, loggers: Loggers, stop: StopRequest, profile: bool = False
    ) -> None:
        self.run, self.state, self.batches, self.loggers, self.stop = run, state, batches, loggers, stop
        self.profile = profile and run.ranks.is_first
        self.unreadable = UnreadableImages(len(run.training_set), run.settings.data.max_unreadable_fraction)
        # Other processes have no log, but must report their unreadable images too.
        to_stderr = functools.partial(say, error=True)
        self.warn: Callable[[str], None] = loggers.line if run.ranks.is_first else to_stderr
        self.first_step = self.step = state.step
        self.vote: Callable[[], int] = lambda: 0

    def __enter__(self) -> Self:
        run = self.run
        restore_default_sigchld()
        self.watchdog = Watchdog(run.ranks, lambda: self.state.step)
        self.profiler = StepProfiler(self.loggers.directory, run.device, self.loggers.line, self.profile)
        # No bar on a terminal of unknown width (0 columns).
        columns = shutil.get_terminal_size((0, 0)).columns
        has_bar = run.ranks.is_first and sys.stderr.isatty() and columns >= MIN_BAR_COLUMNS
        self.bar = tqdm(total=run.steps, initial=self.step, unit="step", dynamic_ncols=True, disable=not has_bar)
        self.started, self.in_steps = time.perf_counter(), 0.0
        self.state.meter.restart_clock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.watchdog.rest()
        self.profiler.close()
        self.bar.close()
        self.batches.close()

    def begin(self, step: int) -> None:
        """Start a step, numbered from 0: reset the watchdog and send this process's vote."""
        self.step, self.begun = step, time.perf_counter()
        self.watchdog.beat()
        self.vote = self.run.ranks.all_reduce_max_async(self._ballot)

    def next_batches(self, count: int) -> list[Batch]:
        """Wait for the next `count` micro-batches.

        Raises:
            DataReadError: an image cannot be read or a worker has died; the state is unchanged.
        """
        with self._waiting():
            try:
                micro_batches = [next(self.batches) for _ in range(count)]
            except RuntimeError as error:
                failure = known_failure(error, OUT_OF_MEMORY)
                if failure is None:
                    raise
                raise failure from None
        for line in (line for batch in micro_batches for line in self.unreadable.note(batch)):
            self.warn(line)
        # With several processes the vote decides, because the others wait for the gradient of this one.
        if self.unreadable.too_many() and self.run.ranks.size == 1:
            raise self.unreadable.error()
        return micro_batches

    def end(self) -> UserError | None:
        """End a step: count it, prefetch the batches of the next one, read the vote.

        Returns:
            The error with which all processes end the run; None: the run goes on.
        """
        self.bar.update(1)
        with self._waiting():
            self.batches.prefetch(self.run.settings.train.subdivisions)
        self.profiler.step()
        result = self.vote()
        self.in_steps += time.perf_counter() - self.begun
        if not result:
            return None
        return self.unreadable.error() if result == STOP_UNREADABLE else stopped_by(result)

    def between_batches(self) -> None:
        """Check for signals or reset the watchdog; call it after each batch of an evaluation.

        Raises:
            StoppedBySignal: a signal was received; only a single process stops during an evaluation.
        """
        if self.run.ranks.size == 1:
            self.stop.check()
        else:  # the others wait for this process's share
            self.watchdog.beat()

    def rest(self) -> None:
        """Pause the watchdog until the next step, while the first process computes the metrics."""
        self.watchdog.rest()

    def minutes(self) -> float:
        """Return the minutes since the loop started, including evaluations."""
        return (time.perf_counter() - self.started) / 60

    def seconds_left(self) -> float:
        """Estimate the seconds until the end of the run."""
        done = self.state.step - self.first_step
        return (time.perf_counter() - self.started) / done * (self.run.steps - self.state.step)

    def skips_evaluation(self) -> bool:
        """Return whether a run with `train.minutes` is late, so that an evaluation on the way is left out."""
        late = self.state.step < self.run.steps and self._beyond(LATE)
        if late:
            self.loggers.line(f"step {self.state.step}: no evaluation, train.minutes would not suffice")
        return late

    def out_of_time(self) -> bool:
        """Return whether a run with `train.minutes` must end now, before its last step; asked when progress is logged.

        The steps were measured before the first one; this is for a machine that has become slower.
        """
        logged = self.run.logs_at(self.state.step) and self.state.step < self.run.steps
        over = logged and self._beyond(OVER, left=0)
        if over:
            self.loggers.line(
                f"ended at step {self.state.step} of {self.run.steps}: train.minutes is over, the steps took longer "
                "than at the start"
            )
        return over

    def _beyond(self, share: float, left: int | None = None) -> bool:
        """Return whether the run would end beyond a share of its budget, with `left` more steps (None: all)."""
        clock, state = self.run.clock, self.state
        if clock is None:
            return False
        step_seconds = self.in_steps / max(state.step - self.first_step, 1)
        left = self.run.steps - state.step if left is None else left
        return self.run.ranks.broadcast(clock.end_share(left, step_seconds) > share)

    def _ballot(self) -> int:
        return STOP_UNREADABLE if self.unreadable.too_many() else self.stop.signal_number or 0

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        started = time.perf_counter()
        with waiting_for_data():
            yield
        self.state.meter.waited += time.perf_counter() - started
