"""Logger of plain files: settings, environment, status, scalars, lines and images in the run directory."""

import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from detection.config.loading import dump_settings
from detection.config.settings import Settings
from detection.drawing.boxes import save_jpeg, save_png
from detection.drawing.files import replace_file
from detection.runtime.run_directory import lock_directory, write_status
from detection.training.loggers.protocol import RUNNING, Resumed
from detection.training.loggers.terminal import show_line

STEP = "step"
LOG, METRICS, RESULTS = "train.log", "metrics.jsonl", "results.csv"


class FilesLogger:
    """Writes the plain files of a run: `args.yaml`, `train.log`, `metrics.jsonl`, `results.csv`, `images/` and others.

    Each row is passed to the operating system before the method returns, so a killed process loses nothing. The
    directory is locked against other processes. A file that is removed or renamed in mid-run, by hand or by a rotation
    of logs, is made anew, with a line about it. Every method raises OSError if its file cannot be written.
    """

    def start(
        self, directory: Path, settings: Settings, environment: Mapping[str, Any], resumed: Resumed | None
    ) -> None:
        """Open the files of a new or resumed run.

        Existing files are appended to. Rows that a resumed run will log again, and rows truncated by a crash, are moved
        to `<name>.discarded`.

        Raises:
            OSError: the directory or a file cannot be written.
            OutputError: another process has locked the directory.
        """
        self.directory = directory
        self._files: dict[str, TextIO] = {}
        directory.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            self._opened = opened
            opened.enter_context(lock_directory(directory))
            self._open(LOG)
            write_status(directory, RUNNING)
            self._open_tables(resumed)
            (directory / "images").mkdir(exist_ok=True)
            replace_file(directory / "args.yaml", dump_settings(settings).encode())
            # The environment may differ each time a run is resumed.
            name = "environment.json" if resumed is None else f"environment_{resumed.step}.json"
            replace_file(directory / name, json.dumps(environment, indent=2).encode())
            self._opened = opened.pop_all()

    def _open_tables(self, resumed: Resumed | None) -> None:
        metrics_path, results_path = self.directory / METRICS, self.directory / RESULTS
        last_step = math.inf if resumed is None else resumed.step
        last_evaluation = math.inf if resumed is None else resumed.evaluated_step

        def step_of_json(row: str) -> float:
            values = json.loads(row)
            again = values[STEP] > last_evaluation and any(tag.startswith("val/") for tag in values)
            return math.inf if again else int(values[STEP])

        moved_rows = {
            METRICS: _move_rows(metrics_path, step_of_json, last_step),
            RESULTS: _move_rows(results_path, _step_of_csv, last_evaluation),
        }
        self._open(METRICS)
        self._open(RESULTS)
        self._columns = _read_columns(results_path)
        for name, count in moved_rows.items():
            if count:
                self._notify(f"{name}: {count} rows that are torn or will come again moved to {name}.discarded")

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Append a row to `metrics.jsonl`; NaN and infinity become null."""
        row = {STEP: step} | {tag: _finite_or_none(value) for tag, value in values.items()}
        self._write(METRICS, json.dumps(row, ensure_ascii=False, allow_nan=False))

    def evaluation(self, step: int, row: Mapping[str, float | None]) -> None:
        """Append a row to `metrics.jsonl` and `results.csv`.

        The first row fixes the columns of `results.csv`, which begins with their names; None, NaN and infinity become
        empty fields.
        """
        self.log(step, row)
        if self._columns is None:
            self._columns = list(row)
        if os.fstat(self._current(RESULTS).fileno()).st_size == 0:  # also where it was emptied or made anew
            self._write(RESULTS, ",".join([STEP, *self._columns]))
        fields = [_finite_or_none(row.get(column)) for column in self._columns]
        # Valid tags need no quoting: they have no comma, quote or line break.
        self._write(RESULTS, ",".join([str(step), *("" if field is None else repr(field) for field in fields)]))
        without_column = [tag for tag in row if tag not in self._columns]
        if without_column:
            self._notify(f"results.csv has no column {', '.join(without_column)}: written to metrics.jsonl only")

    def line(self, text: str) -> None:
        """Append a line to `train.log`."""
        self._write(LOG, text)

    def image(self, step: int, tag: str, image: np.ndarray) -> None:
        """Write `images/<tag>.png` (step 0, lossless) or `images/<tag>_<step>.jpg`."""
        if step == 0:
            save_png(self.directory / "images" / f"{tag}.png", image)
        else:
            save_jpeg(self.directory / "images" / f"{tag}_{step:06d}.jpg", image)

    def artifact(self, path: Path) -> None:
        """Do nothing: the file is in the run directory already."""

    def finish(self, status: str) -> None:
        """Record the status and close all files, even if one of them fails."""
        with self._opened:
            if self.directory.is_dir():  # it may have been lost, which is then the error that is told
                write_status(self.directory, status)

    def _open(self, name: str) -> None:
        self._files[name] = self._opened.enter_context(_open_to_append(self.directory / name))

    def _current(self, name: str) -> TextIO:
        """Return a file that is open to append, made anew if its name is gone or is that of another file."""
        try:
            here = os.path.samestat(os.stat(self.directory / name), os.fstat(self._files[name].fileno()))
        except FileNotFoundError:
            here = False
        except OSError:  # it cannot be known, such as without permission; the open file can still be written
            here = True
        if not here:
            self._files[name].close()
            self._open(name)
            self._notify(f"warning: {name} was removed or renamed while the run writes to it; it goes on in a new one")
        return self._files[name]

    def _write(self, name: str, row: str) -> None:
        self._current(name).write(row + "\n")

    def _notify(self, text: str) -> None:
        self.line(text)
        show_line(text)


def _finite_or_none(value: float | None) -> float | None:
    """Convert NaN and infinity, which JSON lacks, to None, and NumPy's subclasses of float to plain numbers."""
    if value is None or not math.isfinite(value):
        return None
    return int(value) if isinstance(value, int) else float(value)


def _open_to_append(path: Path) -> TextIO:
    # Line buffered: each complete row goes to the operating system at once.
    return open(path, "a", buffering=1, encoding="utf-8", errors="backslashreplace", newline="\n")


def _step_of_csv(row: str) -> float:
    first_field = row.split(",")[0]
    return -math.inf if first_field == STEP else int(first_field)  # the header is always kept


def _read_columns(path: Path) -> list[str] | None:
    """Read the columns of `results.csv` without the step; None if it has no header yet."""
    with open(path, encoding="utf-8") as file:
        header = file.readline().rstrip("\n")
    return header.split(",")[1:] if header else None


def _move_rows(path: Path, step_of_row: Callable[[str], float], last_step: float) -> int:
    """Move rows after `last_step` and truncated rows to `<name>.discarded`, written first, so that a crash loses none.

    Returns:
        Number of rows moved.
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
