"""Compare training runs: curves in one figure and best results in one table.

python compare_runs.py logs/240224-211713_LambdaLR logs/240312-101500_CosineAnnealing_T2
python compare_runs.py logs/24* --x time --smooth 20
python compare_runs.py logs/A logs/B --output comparison

Reads results.csv (evaluations) and metrics.jsonl (learning rate, training loss) of each run directory, and the
evaluations of validation.py --follow, including runs that are still running or were killed in the middle of a line.
Draws learning rate, training and validation loss, AP50, AP and recall (AR100) over --x: step, epoch, images seen, or
training time without evaluations. A star marks the best evaluation. Missing data is reported and left out. --smooth N
draws the moving average of about N logged training losses, with the raw values in a pale colour behind it; nothing else
is smoothed.

Writes compare.png, compare.csv (one row per run) and compare.json (the same with the curves) into a new directory below
logs/. Takes a few seconds.
"""

import argparse
import csv
import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from detection.config.command_line import Parser
from detection.config.yaml_files import read_settings_file
from detection.drawing.figures import draw_curves, figure_pixels, new_figure, save_figure
from detection.drawing.files import replace_csv, replace_file
from detection.drawing.window import browse
from detection.errors import DataError, SettingsError, exit_with_message, say
from detection.runtime.run_directory import EVALUATOR, new_run_directory, writing_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = {  # column -> title, function that chooses the best value (None: there is no best)
    "train/learning_rate": ("learning rate", None),
    "train/loss": ("training loss", None),
    "val/loss": ("validation loss", min),
    "val/AP50": ("AP50", max),
    "val/AP": ("AP", max),
    "val/AR100": ("recall (AR100)", max),
}
AXES = {"step": "optimizer step", "epoch": "epoch", "images": "images seen", "time": "training time"}


@dataclass(frozen=True)
class Run:
    """The numbers of one run directory."""

    name: str
    directory: Path
    columns: dict[str, np.ndarray]  # (step, value) points of each column, (N, 2), steps ascending
    images_per_step: int | None
    notices: list[str]  # what could not be read

    def points(self, column: str) -> np.ndarray:
        """Return the (step, value) points of a column, (N, 2), steps ascending; (0, 2) if the run has none."""
        return self.columns.get(column, np.zeros((0, 2)))

    @property
    def last_step(self) -> int:
        """The highest step of any row; 0 without rows."""
        return int(max((points[-1, 0] for points in self.columns.values() if len(points)), default=0))

    def at(self, steps: np.ndarray, axis: str) -> np.ndarray | None:
        """Convert steps to the unit of an axis (time in hours); None if the run lacks the data for it."""
        if axis == "step":
            return steps
        if axis == "images":
            return None if self.images_per_step is None else steps * self.images_per_step
        if axis == "epoch":
            epochs = self.points("epoch")
            return steps * (epochs[-1, 1] / epochs[-1, 0]) if len(epochs) and epochs[-1, 0] else None
        speed = self.points("train/images_per_second")
        if self.images_per_step is None or not len(speed) or (speed[:, 1] <= 0).any():
            return None
        # Each row holds the mean speed since the row before it.
        seconds = np.cumsum(np.diff(speed[:, 0], prepend=0) * self.images_per_step / speed[:, 1])
        return np.interp(steps, np.append(0, speed[:, 0]), np.append(0, seconds)) / 3600

    def best(self, column: str) -> tuple[int, float] | None:
        """Return step and value of the best evaluation, the first of equals."""
        points, choose = self.points(column), PANELS[column][1]
        if choose is None or not len(points):
            return None
        step, value = choose(points.tolist(), key=lambda point: point[1])
        return int(step), value

    def summary(self) -> dict[str, Any]:
        """Return one row of the table; None where the run lacks the number."""
        end = np.array([float(self.last_step)])
        row: dict[str, Any] = {"run": self.name, "steps": self.last_step}
        for name, axis in (("epochs", "epoch"), ("images", "images"), ("training hours", "time")):
            there = self.at(end, axis)
            row[name] = None if there is None else float(there[0])
        for column in ("val/AP50", "val/AP", "val/AR100", "val/loss"):
            points, (step, value) = self.points(column), self.best(column) or (None, None)
            name = column.removeprefix("val/")
            row |= {f"best {name}": value, f"best {name} step": step}
            row[f"last {name}"] = float(points[-1, 1]) if len(points) else None
        return row


def main() -> None:
    arguments = parse_arguments()
    directories = list({directory.resolve(): directory for directory in arguments.runs}.values())
    names = short_names([directory.resolve() for directory in directories])
    runs = [read_run(directory, name) for directory, name in zip(directories, names, strict=True)]
    notices = [f"{run.name}: {notice}" for run in runs for notice in run.notices]
    if len(directories) < len(arguments.runs):
        notices.append(f"{len(arguments.runs) - len(directories)} directories were given twice")
    drawn = [run for run in runs if run.at(np.zeros(1), arguments.x) is not None]
    notices += [f"{run.name}: has no {AXES[arguments.x]}, not drawn" for run in runs if run not in drawn]
    if not drawn:
        raise SettingsError(f"--x {arguments.x}: no run has {AXES[arguments.x]}; --x step always works")
    if not any(len(run.points(column)) for run in drawn for column in PANELS):
        raise DataError(
            f"no run has a readable row in metrics.jsonl or results.csv: {', '.join(map(str, directories))}"
        )
    for run in drawn:
        if missing := [title for column, (title, _) in PANELS.items() if not len(run.points(column))]:
            notices.append(f"{run.name}: has no {', '.join(missing)} (yet)")
    say(*notices, *table(runs))

    directory = new_run_directory(Path("logs"), "compare", arguments.output)
    figure = draw(drawn, arguments.x, arguments.smooth)
    with writing_results(directory):
        save_figure(directory / "compare.png", figure)
        write_summary(directory, runs)
    say(f"figure and numbers in {directory}")
    if arguments.show:
        browse("runs", 1, lambda page: figure_pixels(figure))


def parse_arguments() -> argparse.Namespace:
    parser = Parser("compare_runs.py", __doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN_DIRECTORY", help="run directories of yolo-v3/main.py")
    add("--x", choices=list(AXES), default="step", help="x axis (default: step)")
    add(
        "--smooth",
        type=int,
        default=1,
        metavar="N",
        help="moving average of the training loss over about N logged values (default: off)",
    )
    parser.add_output()
    arguments = parser.parse_intermixed_args()
    if arguments.smooth < 1:
        raise SettingsError(f"--smooth {arguments.smooth}: must be at least 1")
    return arguments


def short_names(directories: Sequence[Path]) -> list[str]:
    """Return the shortest unique endings of the paths: without the start time, with it, with parents."""
    names = []
    for directory in directories:
        candidates = [shorten(directory, length) for length in range(len(directory.parts) + 1)]
        others = [other for other in directories if other != directory]
        names.append(
            next(
                name
                for length, name in enumerate(candidates)
                if all(shorten(other, length) != name for other in others)
            )
        )
    return names


def shorten(directory: Path, length: int) -> str:
    """Return the last parts of a path; with length 0 the name without its leading start time."""
    if length == 0:
        return re.sub(r"^\d{6}-\d{6}_(?=.)", "", directory.name)
    return "/".join(directory.parts[-length:])


def read_run(directory: Path, name: str) -> Run:
    """Read all numbers of a run directory.

    Raises:
        SettingsError: it is not a run directory, or cannot be read.
    """
    results, metrics = directory / "results.csv", directory / "metrics.jsonl"
    if not results.is_file() and not metrics.is_file():
        reason = "has neither results.csv nor metrics.jsonl" if directory.is_dir() else "is no directory"
        raise SettingsError(f"{directory}: {reason}; name directories that training made, such as those below logs/")
    notices: list[str] = []
    points: dict[str, dict[float, float]] = {}
    try:
        rows = [*read_rows(metrics, parse_json, notices), *read_rows(results, CsvParser(), notices)]
        if (followed := directory / EVALUATOR / metrics.name).is_file():
            rows = [*read_rows(followed, parse_json, notices), *rows]  # where both evaluated a step, the run's own
        images_per_step = read_images_per_step(directory)
    except OSError as error:
        raise SettingsError(f"{directory}: cannot be read: {error}") from None
    for row in rows:
        for column, value in row.items():
            points.setdefault(column, {})[row["step"]] = value
    columns = {column: np.array(sorted(values.items())) for column, values in points.items()}
    return Run(name, directory, columns, images_per_step, notices)


def read_rows(path: Path, parse: Any, notices: list[str]) -> list[dict[str, float]]:
    """Read the numbers of each line; damaged lines and a missing file are reported in `notices`."""
    if not path.is_file():
        notices.append(f"no {path.name}")
        return []
    rows, bad = [], []
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        try:
            # A line without a line break may be truncated within its last number.
            row = parse(line.strip()) if line.endswith("\n") else None
        except (ValueError, TypeError, AttributeError):
            row = None
        if row is None or (row and not math.isfinite(row.get("step", math.nan))):
            bad.append(number)
        elif row:
            rows.append(row)
    if bad:
        end = " (still being written, or cut)" if bad == [number] else ""
        notices.append(f"{path.name}: left out line {', '.join(map(str, bad[:5]))}{' ...' * (len(bad) > 5)}{end}")
    return rows


def parse_json(line: str) -> dict[str, float]:
    """Parse a line of metrics.jsonl; null becomes no entry."""
    return {key: float(value) for key, value in json.loads(line).items() if value is not None}


class CsvParser:
    """Parse the lines of results.csv; the first one, the header, gives no row."""

    def __init__(self) -> None:
        self.header: list[str] | None = None

    def __call__(self, line: str) -> dict[str, float]:
        fields = next(csv.reader([line]))
        if self.header is None:
            self.header = fields
            return {}
        values = zip(self.header, fields, strict=True)
        return {key: float(value) for key, value in values if value}


def read_images_per_step(directory: Path) -> int | None:
    """Read the images per optimizer step of all processes from train.log, or of one process from args.yaml."""
    log = directory / "train.log"
    if log.is_file():
        with open(log, encoding="utf-8", errors="replace") as file:
            for line in itertools.islice(file, 200):
                if match := re.search(r"= (\d+) images per step", line):
                    return int(match[1])
    try:
        train = read_settings_file(directory / "args.yaml")["train"]
        return int(train["batch_size"]) * int(train["subdivisions"])
    except (SettingsError, KeyError, TypeError, ValueError):
        return None


def table(runs: Sequence[Run]) -> list[str]:
    """Format the best numbers of each run, aligned for the terminal."""
    rows = [["run", "steps", "epochs", "training", "best AP50", "at step", "last AP50", "best AP", "AR100"]]
    for run in runs:
        row = run.summary()
        hours = row["training hours"]
        rows.append(
            [
                row["run"],
                str(row["steps"]),
                "-" if row["epochs"] is None else f"{row['epochs']:.1f}",
                "-" if hours is None else f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min",
                *(shown(row[name]) for name in ("best AP50", "best AP50 step", "last AP50", "best AP", "best AR100")),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) if number else cell.ljust(width) for number, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]


def shown(value: float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"


def draw(runs: Sequence[Run], axis: str, smooth: int) -> "Figure":
    """Draw one panel per column, one colour per run, and a common legend above."""
    figure, panels = new_figure((15, 8.5), rows=2, columns=3)
    factor, unit = 1.0, AXES[axis]
    if axis == "time":
        in_minutes = all((run.summary()["training hours"] or 0) < 2 for run in runs)
        factor, unit = (60, "minutes of training") if in_minutes else (1, "hours of training")

    def at(run: Run, steps: np.ndarray) -> np.ndarray:
        x = run.at(steps, axis)
        assert x is not None, "runs without the axis are left out"
        return x * factor

    for axes, (column, (title, _)) in zip(panels, PANELS.items(), strict=True):
        smoothed = column == "train/loss" and smooth > 1
        curves = {}
        for run in runs:
            steps, values = run.points(column).T
            y = centred_mean(values, smooth) if smoothed else values
            curves[run.name] = list(zip(at(run, steps).tolist(), y.tolist(), strict=True))
        draw_curves(axes, curves, f"{title}, mean of {smooth} logged values" if smoothed else title, unit, "")
        if not any(curves.values()):
            axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", color="grey")
        for run, line in zip(runs, axes.get_lines(), strict=True):
            steps, values = run.points(column).T
            if smoothed:
                axes.plot(at(run, steps), values, color=line.get_color(), alpha=0.3, linewidth=0.8, zorder=1)
            if best := run.best(column):
                place = at(run, np.array([float(best[0])]))
                axes.plot(place, best[1:], "*", color=line.get_color(), markersize=14, markeredgecolor="black")
        axes.set_xlim(left=0)
        if (legend := axes.get_legend()) is not None:
            legend.remove()
    lines = panels[0].get_lines()[: len(runs)]
    figure.legend(lines, [run.name for run in runs], loc="outside upper center", ncols=min(len(runs), 5))
    return figure


def centred_mean(values: np.ndarray, count: int) -> np.ndarray:
    """Average each value with `count // 2` on either side, fewer at the ends; same length."""
    sums, index = np.cumsum(np.append(0, values)), np.arange(len(values))
    starts, ends = np.maximum(index - count // 2, 0), np.minimum(index + count // 2 + 1, len(values))
    means: np.ndarray = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def write_summary(directory: Path, runs: Sequence[Run]) -> None:
    """Write compare.csv, a row per run, and compare.json, the same with the curves."""
    rows = [run.summary() | {"directory": str(run.directory)} for run in runs]
    replace_csv(directory / "compare.csv", [list(rows[0]), *(row.values() for row in rows)])
    content = [
        row | {"curves": {column: run.points(column).tolist() for column in PANELS}}
        for row, run in zip(rows, runs, strict=True)
    ]
    replace_file(directory / "compare.json", json.dumps({"runs": content}, indent=1).encode())


if __name__ == "__main__":
    exit_with_message(main)
