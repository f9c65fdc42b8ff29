"""Everything a run writes down while it trains: numbers, pictures and lines of text, behind one small interface.

In the run directory: `metrics.jsonl` (all numbers), `results.csv` (one row per evaluation), `train.log` (lines),
TensorBoard events (numbers and pictures).
"""

import errno
import fcntl
import json
import math
import os
import posixpath
import re
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import numpy as np
from tqdm import tqdm

from detection.drawing.boxes import encode_jpeg
from detection.errors import OutputError

STEP = "step"


class RunLogger:
    """Writes one run directory; made by one process of the run. Use as a context manager, or call `close`.

    Each row is handed to the operating system before the method returns, so a killed process loses nothing.
    Every method raises OSError if its file cannot be written.
    """

    def __init__(self, directory: Path, resume_step: int | None = None, evaluated_step: int | None = None) -> None:
        """Open the files of a run, new or continued.

        Args:
            directory: the run directory; made if absent. Existing files are continued, never emptied.
            resume_step: last step that the continued run need not repeat. Rows of later steps, which will come again,
                are moved to `<name>.discarded`; TensorBoard hides them.
            evaluated_step: the same for evaluations, which are written before the checkpoint that knows of them; None:
                `resume_step`.

        Raises:
            OSError: if the directory or a file cannot be written.
            OutputError: if another process writes there.
        """
        directory.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            self._log = opened.enter_context(_open_to_append(directory / "train.log"))
            _lock(self._log, directory)
            self._open_rest(directory, resume_step, evaluated_step, opened)
            self._opened = opened.pop_all()

    def _open_rest(
        self, directory: Path, resume_step: int | None, evaluated_step: int | None, opened: ExitStack
    ) -> None:
        metrics_path, results_path = directory / "metrics.jsonl", directory / "results.csv"
        last_step = math.inf if resume_step is None else resume_step
        last_evaluation = last_step if evaluated_step is None else evaluated_step

        def step_of_json(row: str) -> float:
            values = json.loads(row)
            again = values[STEP] > last_evaluation and any(tag.startswith("val/") for tag in values)
            return math.inf if again else int(values[STEP])

        moved_rows = {
            metrics_path.name: _move_rows(metrics_path, step_of_json, last_step),
            results_path.name: _move_rows(results_path, _step_of_csv, last_evaluation),
        }
        self._metrics = opened.enter_context(_open_to_append(metrics_path))
        self._results = opened.enter_context(_open_to_append(results_path))
        self._columns = _read_columns(results_path)
        for name, count in moved_rows.items():
            if count:
                self.line(f"{name}: {count} rows that are torn or will come again moved to {name}.discarded")
        self._tensorboard = self._open_tensorboard(directory, resume_step)
        if self._tensorboard is not None:
            opened.callback(self._tensorboard.close)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers of one step to `metrics.jsonl` and TensorBoard.

        Args:
            step: optimizer steps done.
            values: Python numbers by tag; NaN and infinity become null. Tensors are refused: reading one waits for
                the device, and such a wait must be visible in the training loop.

        Raises:
            TypeError: if a value is not a number.
            ValueError: if a tag is not legal in TensorBoard and MLflow.
        """
        self._write_numbers(step, values)

    def evaluation(self, step: int, row: Mapping[str, float | None]) -> None:
        """Write the metrics of one evaluation as a row of `results.csv`, to `metrics.jsonl` and to TensorBoard.

        The first row ever fixes the columns. None (not defined, such as the AP of absent small objects), NaN and
        infinity leave their field empty.

        Args:
            step: optimizer steps done.
            row: numbers by tag, as in `scalars`.
        """
        self._write_numbers(step, row)
        if self._columns is None:
            self._columns = list(row)
            self._results.write(",".join([STEP, *self._columns]) + "\n")
        fields = [_finite_or_none(row.get(column)) for column in self._columns]
        # No quoting needed: a legal tag has no comma, quote or line end.
        self._results.write(",".join([str(step), *("" if field is None else repr(field) for field in fields)]) + "\n")
        without_column = [tag for tag in row if tag not in self._columns]
        if without_column:
            self.line(f"results.csv has no column {', '.join(without_column)}: written to metrics.jsonl only")

    def image(self, step: int, tag: str, image: np.ndarray) -> None:
        """Show a picture in TensorBoard; without TensorBoard nothing happens.

        Args:
            step: optimizer steps done.
            tag: as in `scalars`.
            image: RGB uint8 (H, W, 3).
        """
        _check_tag(tag)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"{tag}: an image must be RGB uint8 (H, W, 3), this is {image.dtype} {image.shape}")
        if self._tensorboard is not None:
            # `add_image` knows PNG only: photographs would take more room than all numbers of a run.
            height, width, _ = image.shape
            picture = {"height": height, "width": width, "colorspace": 3, "encoded_image_string": encode_jpeg(image)}
            self._show([{"tag": tag, "image": picture}], step)

    def line(self, text: str, show: bool = True) -> None:
        """Append a line to `train.log` and, if `show`, print it, above the progress bar if there is one."""
        self._log.write(text + "\n")
        if not show:
            return
        encoding = sys.stdout.encoding or "utf-8"
        printable = text.encode(encoding, "backslashreplace").decode(encoding)  # a class name must not stop a run
        with tqdm.external_write_mode():  # takes the bars away while we print, as `tqdm.write` does
            print(printable, flush=True)

    def close(self) -> None:
        """Close all files, also those after one that fails."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except OSError:
            if error is None:  # otherwise the first error is the one to report
                raise

    def _open_tensorboard(self, directory: Path, resume_step: int | None) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.line("TensorBoard is not installed: no event files (pip install tensorboard)")
            return None
        threading.excepthook = _print_exception_of_thread
        # TensorBoard purges the steps >= purge_step; the resumed step itself is not repeated.
        return SummaryWriter(str(directory), purge_step=None if resume_step is None else resume_step + 1)

    def _write_numbers(self, step: int, values: Mapping[str, float | None]) -> None:
        if not isinstance(step, int):
            raise TypeError(f"step must be an int, not {type(step).__name__}")
        for tag, value in values.items():
            _check_tag(tag)
            if value is not None and not isinstance(value, (int, float)):
                raise TypeError(f"{tag} must be a Python number, not {type(value).__name__}: convert it with float()")
        row = {STEP: step} | {tag: _finite_or_none(value) for tag, value in values.items()}
        self._metrics.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        if self._tensorboard is not None:
            defined = [(tag, float(value)) for tag, value in values.items() if value is not None]
            self._show([{"tag": tag, "simple_value": value} for tag, value in defined], step)

    def _show(self, values: list[dict[str, Any]], step: int) -> None:
        """One event for all values: `add_scalar` and `add_image` write one each, of twice the size."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._tensorboard.file_writer.add_summary(Summary(value=values), step)
        self._tensorboard.flush()


class SilentLogger(RunLogger):
    """Of the processes that write nothing: one process of a run does."""

    def __init__(self) -> None:
        self._opened = ExitStack()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def evaluation(self, step: int, row: Mapping[str, float | None]) -> None:
        pass

    def image(self, step: int, tag: str, image: np.ndarray) -> None:
        pass

    def line(self, text: str, show: bool = True) -> None:
        pass


def _check_tag(tag: str) -> None:
    """Refuse what MLflow refuses (`mlflow/utils/validation.py`); TensorBoard allows more."""
    if not re.fullmatch(r"[\w\-. :/]+", tag):
        raise ValueError(f"tag {tag!r}: allowed are letters, digits, _ - . space : and /")
    if posixpath.normpath(tag) != tag or tag.startswith(("/", "..")) or tag in (".", STEP):
        raise ValueError(f"tag {tag!r}: must be a plain relative path such as loss/box, and not {STEP!r}")


def _finite_or_none(value: float | None) -> float | None:
    """JSON knows neither NaN nor infinity. Also turns NumPy's subclasses of float into plain ones."""
    if value is None or not math.isfinite(value):
        return None
    return int(value) if isinstance(value, int) else float(value)


def _open_to_append(path: Path) -> TextIO:
    # Line buffered: each complete row goes to the operating system at once.
    return open(path, "a", buffering=1, encoding="utf-8", errors="backslashreplace", newline="\n")


def _print_exception_of_thread(arguments: threading.ExceptHookArgs) -> None:
    """The usual, but for TensorBoard's thread: what it cannot write, the next call of its writer raises again."""
    if type(arguments.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(arguments)


def _lock(file: TextIO, directory: Path) -> None:
    """Until this process ends, however it ends, no other one gets here; its loader workers do not hold the lock."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise OutputError(f"another process writes to {directory}; wait for its end, or choose another") from None
        # A file system without locks cannot tell.


def _step_of_csv(row: str) -> float:
    first_field = row.split(",")[0]
    return -math.inf if first_field == STEP else int(first_field)  # the header always stays


def _read_columns(path: Path) -> list[str] | None:
    """Columns of `results.csv` without the step; None while it has no header."""
    with open(path, encoding="utf-8") as file:
        header = file.readline().rstrip("\n")
    return header.split(",")[1:] if header else None


def _move_rows(path: Path, step_of_row: Callable[[str], float], last_step: float) -> int:
    """Move the rows after a step, and those torn by a crash, to `<name>.discarded`. A crash here loses no row.

    Returns:
        Rows moved.
    """
    if not path.exists():
        return 0
    kept: list[str] = []
    moved: list[str] = []
    for row in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            stays = row.endswith("\n") and step_of_row(row.strip()) <= last_step
        except (ValueError, KeyError, TypeError):
            stays = False
        (kept if stays else moved).append(row)
    if moved:
        with open(path.with_name(f"{path.name}.discarded"), "a", encoding="utf-8", newline="\n") as discarded:
            discarded.writelines(row.rstrip("\n") + "\n" for row in moved)
            discarded.flush()
            os.fsync(discarded.fileno())
        shortened = path.with_name(f"{path.name}.tmp")
        shortened.write_text("".join(kept), encoding="utf-8", newline="\n")
        os.replace(shortened, path)
    return len(moved)
