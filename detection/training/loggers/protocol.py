"""Interface of the loggers of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from detection.config.settings import Settings

RUNNING = "running"
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"  # status of a run that has ended


class Resumed(NamedTuple):
    """Where a run is resumed.

    Args:
        run_id: name of the run directory, which identifies the run to a tracking service.
        step: last step that is not repeated; rows of later steps will be logged again.
        evaluated_step: last step whose evaluation is not repeated.
    """

    run_id: str
    step: int
    evaluated_step: int


class Logger(Protocol):
    """Recorder of one run. Only the first process of a run has loggers; every call comes from its main thread.

    A method may raise any exception: the run goes on without this logger, see `Loggers`. Data must be recorded when a
    method returns, so that a killed process loses nothing.
    """

    def start(
        self, directory: Path, settings: Settings, environment: Mapping[str, Any], resumed: Resumed | None
    ) -> None:
        """Start recording; called before any other method.

        Args:
            directory: run directory; created if absent.
            settings: all resolved settings.
            environment: see `environment_report`.
            resumed: where the run is resumed; None: a new run.
        """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record scalars of training.

        Args:
            step: optimizer steps done.
            values: Python numbers by tag, such as "train/loss".
        """

    def evaluation(self, step: int, row: Mapping[str, float | None]) -> None:
        """Record the scalars of an evaluation; None: the metric is undefined, such as AP of absent small objects."""

    def line(self, text: str) -> None:
        """Record a line of text."""

    def image(self, step: int, tag: str, image: np.ndarray) -> None:
        """Record an image, RGB uint8 (H, W, 3); step 0 is the first batch, other steps are evaluations."""

    def artifact(self, path: Path) -> None:
        """Record a complete file in the run directory, such as `best.pt` or the results of an evaluation."""

    def finish(self, status: str) -> None:
        """Stop recording.

        Args:
            status: `FINISHED`, `STOPPED` by a signal, or `FAILED`.
        """
