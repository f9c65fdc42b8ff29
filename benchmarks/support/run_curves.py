"""Columns of metrics.jsonl of many training runs over their steps: a figure each, and the best values as a table."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.support.run_results import Result
from detection.drawing.figures import draw_curves, new_figure, save_figure

TITLES = {"train/learning_rate": "learning rate", "val/loss": "validation loss", "val/AR100": "recall (AR100)"}
Points = list[tuple[float, float]]  # (step, value)


def draw_columns(
    work: Path, columns: Sequence[str], results: Sequence[Result], colors: Mapping[str, str | None]
) -> str:
    """Write a figure per column, COLUMN.png with _ for /: a panel per set and in it a curve per rung and budget.

    Args:
        work: directory of the runs and of the figures.
        columns: names in metrics.jsonl.
        results: completed runs; of several seeds the first is drawn.
        colors: rung -> a colour of matplotlib; None: the next of its own.

    Returns:
        A table of the best value of every curve that has one: the smallest loss, the largest of the others.
    """
    first: dict[tuple[str, str, str], Result] = {}
    for result in sorted(results, key=lambda result: result.job.seed):
        first.setdefault((result.job.set, result.job.rung, result.job.budget), result)
    order = [(result.job.set, result.job.rung, result.job.budget) for result in results]
    shown = [first[key] for key in dict.fromkeys(order)]
    points = {
        (result.job, column): found for result in shown for column, found in read_columns(work, result, columns).items()
    }
    for column in columns:
        _draw_column(work / f"{column.replace('/', '_')}.png", column, shown, points, colors)
    judged = [column for column in columns if column.startswith("val/")]
    head = ["set", "rung", *(title_of(column) for column in judged), "steps", "minutes"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for result in shown:
        cells = [result.job.set, result.job.rung]
        cells += [_best(column, points[result.job, column]) for column in judged]
        lines.append(f"| {' | '.join([*cells, str(result.steps), f'{result.minutes:.1f}'])} |")
    return "\n".join(["### Best of each curve, with its step", "", *lines, ""])


def read_columns(work: Path, result: Result, columns: Sequence[str]) -> dict[str, Points]:
    """Read columns of the metrics.jsonl of a run, steps ascending; of a step that was taken twice the last."""
    found: dict[str, dict[float, float]] = {column: {} for column in columns}
    for line in (result.job.directory(work) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for column in columns:
            value = row.get(column)
            if value is not None and math.isfinite(value):
                found[column][row["step"]] = value
    return {column: sorted(values.items()) for column, values in found.items()}


def title_of(column: str) -> str:
    """Name a column in words."""
    return TITLES.get(column, column.split("/")[-1])


def _best(column: str, points: Points) -> str:
    if not points:
        return "-"
    step, value = (min if column.endswith("loss") else max)(points, key=lambda point: point[1])
    return f"{value:.3f} ({step:.0f})"


def _draw_column(
    path: Path,
    column: str,
    results: Sequence[Result],
    points: Mapping[tuple[object, str], Points],
    colors: Mapping[str, str | None],
) -> None:
    sets = list(dict.fromkeys(result.job.set for result in results))
    if not sets:
        return
    figure, panels = new_figure((6.5 * len(sets), 4.5), columns=len(sets))
    for axes, set_name in zip(panels, sets, strict=True):
        mine = [result for result in results if result.job.set == set_name]
        several = len({result.job.budget for result in mine}) > 1
        names = [f"{result.job.rung}, {result.job.budget}" if several else result.job.rung for result in mine]
        curves = {name: points[result.job, column] for name, result in zip(names, mine, strict=True)}
        title = title_of(column)
        draw_curves(axes, curves, f"{set_name}: {title}", "optimizer step", title)
        for line, result in zip(axes.get_lines(), mine, strict=True):
            if (color := colors.get(result.job.rung)) is not None:
                line.set_color(color)
        axes.legend()  # drawn before the colours
        axes.set_xlim(left=0)
    save_figure(path, figure)
