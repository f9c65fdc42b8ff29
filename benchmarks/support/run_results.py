"""Results of many training runs: what best.pt of each reached, as a table and as figures."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.support.slices import Job, Ledger, is_done
from detection.drawing.figures import draw_curves, new_figure, save_figure


@dataclass(frozen=True)
class Result:
    """A completed run: AP and AP50 of the evaluation with the highest AP; steps, minutes; (share of the run, AP)."""

    job: Job
    ap: float
    ap50: float
    steps: int
    minutes: float
    curve: tuple[tuple[float, float], ...]


def read_result(job: Job, work: Path, ledger: Ledger) -> Result:
    """Read the result of a completed run from its results.csv and metrics.json.

    The evaluation of the weights without EMA, made last, has no row; metrics.json is of the last evaluation.
    """
    directory = job.directory(work)
    with open(directory / "results.csv", encoding="utf-8", newline="") as file:
        rows = [
            (int(row["step"]), float(row["val/AP"] or 0), float(row["val/AP50"] or 0)) for row in csv.DictReader(file)
        ]
    last = json.loads((directory / "metrics.json").read_text(encoding="utf-8"))
    candidates = [*rows, (last["step"], last["AP"], last["AP50"])]
    _, ap, ap50 = max(candidates, key=lambda row: row[1])
    steps = last["step"]
    curve = tuple((step / steps, value) for step, value, _ in rows)
    return Result(job, ap, ap50, steps, ledger.minutes(job), curve)


def read_results(jobs: Sequence[Job], work: Path) -> list[Result]:
    ledger = Ledger(work)
    return [read_result(job, work, ledger) for job in jobs if is_done(job, work)]


def markdown_table(jobs: Sequence[Job], results: Sequence[Result]) -> str:
    """Format one table per budget: mean over the seeds, smallest and largest AP in brackets."""
    lines: list[str] = []
    for budget in dict.fromkeys(job.budget for job in jobs):
        lines += [
            f"### {budget}",
            "",
            "| set | rung | runs | AP | AP50 | AP/AP50 | steps | minutes |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for set_name, rung in dict.fromkeys((job.set, job.rung) for job in jobs if job.budget == budget):
            planned = [job for job in jobs if (job.budget, job.set, job.rung) == (budget, set_name, rung)]
            found = [result for result in results if result.job in planned]
            cells = [set_name, rung, f"{len(found)} of {len(planned)}", *(_cells(found) if found else ["-"] * 5)]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _cells(results: Sequence[Result]) -> list[str]:
    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    aps = [result.ap for result in results]
    spread = f" ({min(aps):.3f} to {max(aps):.3f})" if len(aps) > 1 else ""
    ap, ap50 = mean(aps), mean([result.ap50 for result in results])
    ratio = f"{ap / ap50:.3f}" if ap50 else "-"
    steps, minutes = mean([result.steps for result in results]), mean([result.minutes for result in results])
    return [f"{ap:.3f}{spread}", f"{ap50:.3f}", ratio, f"{steps:.0f}", f"{minutes:.1f}"]


def draw_set(path: Path, set_name: str, results: Sequence[Result]) -> None:
    """Draw AP of every run of a set by rung and budget, and its AP on the way."""
    mine = [result for result in results if result.job.set == set_name]
    groups: dict[str, list[Result]] = {}
    for result in mine:
        groups.setdefault(f"{result.job.rung}, {result.job.budget}", []).append(result)
    figure, (points, curves) = new_figure((12, 5), columns=2)
    for place, found in enumerate(groups.values()):
        points.plot([place] * len(found), [result.ap for result in found], "o", markersize=6)
        mean = sum(result.ap for result in found) / len(found)
        points.plot([place - 0.25, place + 0.25], [mean, mean], "-", color="black", linewidth=1.5)
        points.annotate(f"{mean:.3f}", (place, mean), textcoords="offset points", xytext=(14, 4))
    points.set_xticks(range(len(groups)), list(groups), rotation=20)
    points.set_xlim(-0.6, max(len(groups) - 0.4, 0.6))
    points.set_title(f"{set_name}: AP of best.pt, one point per seed, line: mean")
    points.set_ylabel("AP")
    points.grid(alpha=0.3)
    lines = {name: list(min(found, key=lambda result: result.job.seed).curve) for name, found in groups.items()}
    draw_curves(curves, lines, "on the way, first seed", "share of the run", "AP of the evaluations")
    save_figure(path, figure)
