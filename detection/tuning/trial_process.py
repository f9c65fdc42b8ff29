"""A trial as a process of yolo-v3/main.py: its command line, its start, its result."""

import contextlib
import ctypes
import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detection.config.command_line import DEFAULTS
from detection.tuning.space import word_of

MAIN = DEFAULTS.parent / "main.py"
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


def command_of(
    directory: Path, overlays: Sequence[Path], words: Sequence[str], values: Mapping[str, Any], own: Sequence[str]
) -> list[str]:
    """Build the command line that begins a trial, or continues it where it has a checkpoint.

    Args:
        directory: run directory of the trial.
        overlays, words: of the study.
        values: searched settings.
        own: words of this piece: its end, the device of the worker.
    """
    if (directory / "last.pt").exists():
        return [sys.executable, str(MAIN), "--resume", str(directory), "run.preflight=false", *own]
    files = [part for overlay in overlays for part in ("--config", str(overlay))]
    searched = [word_of(name, value) for name, value in values.items()]
    return [sys.executable, str(MAIN), *files, *words, *searched, *own, "--output", str(directory)]


def start(command: Sequence[str], directory: Path) -> subprocess.Popen[bytes]:
    """Start a trial; what it prints is appended to a file beside its directory.

    It is in a session of its own, so that Ctrl-C reaches the worker alone. Where the worker is killed, Linux sends the
    trial SIGTERM: it saves and ends.
    """
    if directory.exists() and not (directory / "last.pt").exists():  # killed before its first checkpoint
        shutil.rmtree(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)

    def follow_parent() -> None:
        if sys.platform.startswith("linux"):
            ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)

    with open(directory.with_suffix(".out"), "ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=follow_parent,
        )


def last_evaluation(directory: Path, metric: str) -> tuple[int, float]:
    """Return step and metric of the newest evaluation of a run; a metric without ground truth is 0."""
    found = 0, math.nan
    with contextlib.suppress(OSError), open(directory / "metrics.jsonl", encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(ValueError):  # the last line may be torn
                row = json.loads(line)
                if f"val/{metric}" in row:
                    found = row["step"], row[f"val/{metric}"] or 0.0
    return found


def last_line(directory: Path) -> str:
    """Return the last line that a trial has printed."""
    try:
        text = directory.with_suffix(".out").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")
