"""What a search has found: a table of its trials, the importance of settings, and the winner as an overlay."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detection.config.command_line import DEFAULTS
from detection.config.loading import leaf_items
from detection.config.yaml_files import read_settings_file, write_yaml
from detection.drawing.files import replace_file
from detection.errors import say
from detection.tuning.halving import Standing, ranked
from detection.tuning.space import values_of
from detection.tuning.study import PIECES, Study
from detection.tuning.trial_process import MAIN

DRAWN_RUNS = 8
# Of a run, not of what it learns, so not in an overlay.
LEFT_OUT = ("run.", "data.num_workers", "data.cache", "data.decoder", "train.minutes", "train.save_", "train.keep_")


def write_report(study: Study, metric: str, lengths: Sequence[int | str]) -> list[str]:
    """Write tune.md, tune.json, best.yaml and compare/ into a study's directory; returns lines for the terminal."""
    trials, standings = study.trials(), study.standings()
    order, importance = ranked(standings), study.importance()
    rows = [row_of(study, trials[standing.number], standing, metric, lengths) for standing in order]
    failed = [trial for trial, standing in zip(trials, standings, strict=True) if standing.failed]
    lines = [*markdown_table(rows, list(study.space), metric), ""]
    lines += [f"trial {trial.number:04d} failed: {trial.user_attrs.get('reason', '')}" for trial in failed]
    minutes = study.minutes()
    reached = [sum(len(standing.values) > rung for standing in standings) for rung in range(study.rungs)]
    counts = ", ".join(f"{count} to {length}" for count, length in zip(reached, lengths, strict=True))
    lines.append(f"{len(standings)} trials in {minutes:.1f} minutes of workers; trained: {counts}.")
    if study.start:
        drawn = [name for name in study.space if name not in study.start]
        lines.append("Trial 0000 has the settings without a search" + (f", but {', '.join(drawn)}." if drawn else "."))
    if importance:
        shares = ", ".join(f"{name} {share:.2f}" for name, share in importance.items())
        lines.append(f"Importance (share of the variance of {metric} at the first rung, fANOVA): {shares}.")
    else:
        lines.append("Importance: too few different trials yet.")
    content = {"metric": metric, "rungs": list(lengths), "minutes": minutes, "importance": importance, "trials": rows}
    replace_file(study.directory / "tune.json", (json.dumps(content, indent=1) + "\n").encode())
    if order:
        best = study.trial_directory(order[0].number)
        replace_file(study.directory / "best.yaml", winner_overlay(study, rows[0], metric, lengths[-1]).encode())
        lines.append(f"Best: trial {best.name}; as an overlay: {study.directory / 'best.yaml'}")
        if len(order[0].values) < study.rungs:
            lines.append(
                f"It is not trained to the end: {MAIN.parent.name}/main.py --resume {best} run.stop_after=null"
            )
        draw_runs(study, [study.trial_directory(standing.number) for standing in order[:DRAWN_RUNS]])
    replace_file(study.directory / "tune.md", ("\n".join(lines) + "\n").encode())
    return lines


def row_of(study: Study, trial: Any, standing: Standing, metric: str, lengths: Sequence[int | str]) -> dict[str, Any]:
    """Return the row of a trial that has completed a rung."""
    pieces = trial.user_attrs.get(PIECES, {})
    rung = len(standing.values) - 1
    return {
        "trial": trial.number,
        "trained": lengths[rung],
        "step": pieces.get(str(rung), [0, 0])[1],
        metric: standing.values[-1],
        f"{metric} by rung": list(standing.values),
        "minutes": sum(seconds for seconds, _ in pieces.values()) / 60,
        "settings": values_of(study.space, trial.params),
    }


def markdown_table(rows: Sequence[dict[str, Any]], names: Sequence[str], metric: str) -> list[str]:
    """Format the rows, best first; the metric at each rung from the first on."""
    # The last part of a name where no other has it: learning_rate for train.learning_rate.
    last = [name.rpartition(".")[2] for name in names]
    short = [
        end if last.count(end) == 1 else ".".join(name.split(".")[-2:]) for name, end in zip(names, last, strict=True)
    ]
    head = ["trial", "trained", "step", f"{metric} by rung", "minutes", *short]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        values = ", ".join(f"{value:.3f}" for value in row[f"{metric} by rung"])
        settings = [
            f"{value:.3g}" if isinstance(value, float) else str(value)
            for value in (row["settings"].get(name, "-") for name in names)
        ]
        cells = [f"{row['trial']:04d}", row["trained"], row["step"], values, f"{row['minutes']:.1f}", *settings]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def winner_overlay(study: Study, row: dict[str, Any], metric: str, length: int | str) -> str:
    """Return an overlay with the winner's settings that differ from args.yaml; its head names the searched ones."""
    directory = study.trial_directory(row["trial"])
    found = [f"#   {name}: {json.dumps(value)}" for name, value in row["settings"].items()]
    head = [
        f"# The best trial of {len(study.trials())} in {study.directory}: {directory.name},",
        f"# {metric} {row[metric]:.4f} after step {row['step']} of a run of {length}.",
        "# With all settings of that run, so it needs no other overlay:",
        f"#   python3 yolo-v3/main.py --config {study.directory / 'best.yaml'}",
        "# Searched:",
        *found,
    ]
    tree, defaults = read_settings_file(directory / "args.yaml"), dict(leaf_items(read_settings_file(DEFAULTS)))
    overlay: dict[str, Any] = {}
    for path, value in leaf_items(tree):
        if path in row["settings"] or (value != defaults.get(path) and not path.startswith(LEFT_OUT)):
            *sections, name = path.split(".")
            branch = overlay
            for section in sections:
                branch = branch.setdefault(section, {})
            branch[name] = value
    return "\n".join(head) + "\n" + write_yaml(overlay)


def draw_runs(study: Study, directories: Sequence[Path]) -> None:
    """Draw the curves of runs with compare_runs.py into compare/; several workers may do so at once."""
    there = [directory for directory in directories if (directory / "metrics.jsonl").is_file()]
    new = study.directory / f".compare_{os.getpid()}"
    shutil.rmtree(new, ignore_errors=True)
    script = DEFAULTS.parent.parent / "compare_runs.py"
    command = [sys.executable, str(script), *map(str, there), "--output", str(new)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        say(f"no figure: {(done.stderr or done.stdout).strip().splitlines()[-1:]}", error=True)
        return
    shutil.rmtree(study.directory / "compare", ignore_errors=True)
    new.rename(study.directory / "compare")
