"""What a logger of a run must provide."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from detection.config.settings import Settings

FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"  # status of a run that has ended


class Resumed(NamedTuple):
    """Where a run is continued.

    Args:
        run_id: name of the run directory; a tracking service finds its run by it.
        step: last step that is not repeated. Rows of later steps will be logged again.
        evaluated_step: the same for evaluations, which are logged before the checkpoint that counts them.
    """

    run_id: str
    step: int
    evaluated_step: int


class Logger(Protocol):
    """Records one run. Only the first process of a run has loggers; every call comes from its main thread.

    A method may raise any exception: the run goes on without this logger, see `Loggers`. What a method was given is
    recorded when it returns, so that a killed process loses nothing.
    """

    def start(
        self, directory: Path, settings: Settings, environment: Mapping[str, Any], resumed: Resumed | None
    ) -> None:
        """Begin to record, before any other method is called.

        Args:
            directory: of the run; made if absent.
            settings: all resolved settings.
            environment: see `environment_report`.
            resumed: where the run is continued; None: a new run.
        """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers of training.

        Args:
            step: optimizer steps done.
            values: Python numbers by tag, such as "train/loss".
        """

    def evaluation(self, step: int, row: Mapping[str, float | None]) -> None:
        """Record the numbers of an evaluation; None is an undefined metric, such as AP of absent small objects."""

    def line(self, text: str) -> None:
        """Record a line of text."""

    def image(self, step: int, tag: str, image: np.ndarray) -> None:
        """Record a picture, RGB uint8 (H, W, 3). Step 0 shows the input, other steps an evaluation."""

    def artifact(self, path: Path) -> None:
        """Take note of a complete file in the run directory: `best.pt`, results of an evaluation."""

    def finish(self, status: str) -> None:
        """Stop recording.

        Args:
            status: `FINISHED`, `STOPPED` by a signal, or `FAILED`.
        """
