"""Loggers of a run, without the run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from detection.config.command_line import DEFAULTS
from detection.config.loading import load_settings
from detection.training.loggers import Loggers, build_loggers
from detection.training.loggers.protocol import FINISHED, Resumed


@contextmanager
def logging_to(directory: Path, resumed: Resumed | None = None, *, tensorboard: bool = True) -> Iterator[Loggers]:
    """Loggers that are started and, unless an error leaves the context, finished."""
    names = ["files", "tensorboard"] if tensorboard else ["files"]
    loggers = Loggers(directory, build_loggers(names))
    loggers.start(load_settings(DEFAULTS)[0], {"python": "3"}, resumed)
    yield loggers
    loggers.finish(FINISHED)


def resumed_at(step: int) -> Resumed:
    return Resumed("run", step, evaluated_step=step)
