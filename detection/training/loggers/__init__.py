"""Loggers of a training run: one small protocol, chosen by the setting `run.loggers`."""

import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from detection.config.settings import Settings
from detection.errors import OutputError, SettingsError, escape
from detection.runtime.devices import describe_device
from detection.runtime.reproducibility import environment_report
from detection.runtime.run_directory import new_run_directory
from detection.training.loggers.files import STEP, FilesLogger
from detection.training.loggers.mlflow import MLflowLogger
from detection.training.loggers.protocol import Logger, Resumed
from detection.training.loggers.tensorboard import TensorBoardLogger
from detection.training.loggers.terminal import show_line
from detection.training.run import Run

LOGGERS: dict[str, Callable[[], Logger]] = {
    "files": FilesLogger,
    "tensorboard": TensorBoardLogger,
    "mlflow": MLflowLogger,
}


class Loggers:
    """The loggers of a run, called in turn, and the lines that it prints.

    An error of `FilesLogger` ends the run, because resuming needs its files. Any other logger that fails is switched
    off, with a warning.

    Args:
        directory: run directory.
        loggers: loggers by name; empty in processes that write nothing.
        show: also print lines.
    """

    def __init__(self, directory: Path, loggers: Mapping[str, Logger], show: bool = True) -> None:
        self.directory = directory
        self.show = show
        self._loggers = dict(loggers)

    def start(self, settings: Settings, environment: Mapping[str, Any], resumed: Resumed | None = None) -> None:
        """Start every logger, see `Logger.start`."""
        waiting, self._loggers = self._loggers, {}
        for name, logger in waiting.items():
            self._loggers[name] = logger
            self._call(name, lambda logger: logger.start(self.directory, settings, environment, resumed))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers of one step.

        Args:
            step: optimizer steps done.
            values: Python numbers by tag. Tensors are refused, because reading them would hide a wait for the device.

        Raises:
            TypeError: a value is not a number.
            ValueError: a tag is not legal in TensorBoard or MLflow.
        """
        _check_numbers(step, values)
        self._each(lambda logger: logger.log(step, values))

    def evaluation(self, step: int, row: Mapping[str, float | None]) -> None:
        """Record the numbers of one evaluation, as in `log`; None is an undefined metric."""
        _check_numbers(step, row)
        self._each(lambda logger: logger.evaluation(step, row))

    def line(self, text: str, show: bool = True) -> None:
        """Record a line and, if `show`, print it, above the progress bar if there is one; see `errors.escape`."""
        text = escape(text)
        self._each(lambda logger: logger.line(text))
        if show and self.show:
            show_line(text)

    def image(self, step: int, tag: str, image: np.ndarray) -> None:
        """Record a picture, RGB uint8 (H, W, 3), under a tag as in `log`; see `Logger.image`."""
        _check_tag(tag)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"{tag}: an image must be RGB uint8 (H, W, 3), this is {image.dtype} {image.shape}")
        self._each(lambda logger: logger.image(step, tag, image))

    def artifact(self, path: Path) -> None:
        """Announce a complete file in the run directory."""
        self._each(lambda logger: logger.artifact(path))

    def finish(self, status: str) -> None:
        """Finish all loggers, `FilesLogger` last, so that it can record the failure of another."""
        for name in reversed(list(self._loggers)):
            self._call(name, lambda logger: logger.finish(status))
            self._loggers.pop(name, None)

    def _each(self, call: Callable[[Logger], None]) -> None:
        for name in list(self._loggers):
            self._call(name, call)

    def _call(self, name: str, call: Callable[[Logger], None]) -> None:
        logger = self._loggers.get(name)
        if logger is None:  # switched off while the others were called
            return
        try:
            call(logger)
        except Exception as error:
            if isinstance(logger, FilesLogger):
                raise
            del self._loggers[name]
            reason = " ".join(str(error).split()) or type(error).__name__
            self.line(f"warning: logger {name} is switched off: {reason}")


class _Unusable:
    """Stands for a logger that could not be built: fails when started, so that it is named and switched off."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def start(self, *_: object) -> None:
        raise self.error


def check_loggers(names: Sequence[str]) -> None:
    """Check the names in `run.loggers`, before anything expensive.

    Raises:
        SettingsError: a name is unknown, or "files" is missing.
    """
    for name in names:
        if name not in LOGGERS:
            raise SettingsError(f"run.loggers: unknown logger {name!r}; allowed are {', '.join(LOGGERS)}")
    if "files" not in names:
        raise SettingsError(f"run.loggers = {list(names)}: files must be among them, a run is continued from its files")


def build_loggers(names: Sequence[str]) -> dict[str, Logger]:
    """Build the loggers of `run.loggers`; nothing is written before they are started.

    Raises:
        SettingsError: see `check_loggers`.
    """
    check_loggers(names)
    loggers: dict[str, Logger] = {}
    for name, build in LOGGERS.items():  # "files" comes first, because it locks the directory
        if name in names:
            try:
                loggers[name] = build()
            except Exception as error:
                if name == "files":
                    raise
                loggers[name] = cast(Logger, _Unusable(error))
    return loggers


def open_loggers(run: Run, directory: Path | None, checkpoint: Mapping[str, Any] | None) -> Loggers:
    """Create or reopen the run directory and start the loggers; only the first process of a run writes.

    Args:
        directory: run directory; None: a new one below `run.logs_path`.
        checkpoint: checkpoint that the run is resumed from; None: a new run.

    Raises:
        OutputError: the directory cannot be written, is not empty, or is in use by another process.
    """
    settings, ranks = run.settings, run.ranks
    if checkpoint is None and ranks.is_first:
        name = settings.run.name or settings.scheduler.strategy
        directory = new_run_directory(Path(settings.run.logs_path), name, directory)
    directory = Path(ranks.broadcast(str(directory)))
    if not ranks.is_first:
        return Loggers(directory, {}, show=False)
    resumed = None
    if checkpoint is not None:
        resumed = Resumed(directory.name, checkpoint["step"], checkpoint["progress"]["evaluated_step"])
    loggers = Loggers(directory, build_loggers(settings.run.loggers))
    try:
        loggers.start(settings, environment_report(describe_device(run.device), run.precision), resumed)
    except OSError as error:
        raise OutputError(f"run directory {directory} cannot be written: {error}") from None
    return loggers


def _check_numbers(step: int, values: Mapping[str, float | None]) -> None:
    if not isinstance(step, int):
        raise TypeError(f"step must be an int, not {type(step).__name__}")
    for tag, value in values.items():
        _check_tag(tag)
        if value is not None and not isinstance(value, (int, float)):
            raise TypeError(f"{tag} must be a Python number, not {type(value).__name__}: convert it with float()")


def _check_tag(tag: str) -> None:
    """Refuse what MLflow refuses (`mlflow/utils/validation.py`); TensorBoard allows more."""
    if not re.fullmatch(r"[\w\-. :/]+", tag):
        raise ValueError(f"tag {tag!r}: allowed are letters, digits, _ - . space : and /")
    if posixpath.normpath(tag) != tag or tag.startswith(("/", "..")) or tag in (".", STEP):
        raise ValueError(f"tag {tag!r}: must be a plain relative path such as loss/box, and not {STEP!r}")
