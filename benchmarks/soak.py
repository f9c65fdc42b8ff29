"""Kill a training run with kill -9 at random moments, resume it, and compare it with an uninterrupted run.

python3 -m benchmarks.soak                      100 kills, about 15 minutes on 2 CPU cores
python3 -m benchmarks.soak --cycles 5           a try
python3 -m benchmarks.soak train.optimizer=sgd  other settings, as yolo-v3/main.py takes them

Both runs are real ones of `yolo-v3/main.py` on the built-in digits, with 2 loader workers. At the end weights, moving
average, optimizer, counters, best checkpoint and all logged numbers must be equal, bit for bit; exit code 1 otherwise.
"""

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from detection.checkpoints import load_checkpoint
from detection.config.command_line import Parser, at_least_one
from detection.errors import exit_with_message

ROOT = Path(__file__).resolve().parent.parent
MAIN = ROOT / "yolo-v3" / "main.py"
STEPS_PER_CYCLE = 4
EVALUATE_FREQUENCY = 10
SETTINGS = [
    "--config", str(ROOT / "recipes" / "quickstart.yaml"), f"data.root={ROOT / 'data' / 'digits'}", "--device", "cpu",
    "yolo.neck_channels=[16, 16, 16]", "train.image_size=96", "evaluation.image_size=96", "train.batch_size=4",
    "train.subdivisions=2", "train.resize_frequency=4", "train.multiscale_sizes=[64, 128]", "train.save_frequency=3",
    "train.keep_checkpoints=2", f"evaluation.evaluate_frequency={EVALUATE_FREQUENCY}", "evaluation.visualize_images=0",
    "run.log_frequency=1", "run.preflight=false", "scheduler.warmup=20",
]  # fmt: skip
LONGEST_DELAY = 1.0  # seconds from a step's log line to the kill: in the next steps, an evaluation, a save
NOT_REPRODUCIBLE = ("train/images_per_second", "train/wait_fraction")
TIMEOUT = 300.0  # seconds for a process to reach its next step


def main() -> None:
    parser = Parser("benchmarks.soak", __doc__)
    parser.add_argument("settings", nargs="*", metavar="key.path=value")
    parser.add_argument("--cycles", type=at_least_one, default=100, help="kills (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    parser.add_argument("--output", type=Path, help="directory of both runs, a new one; default: a temporary one")
    arguments = parser.parse_intermixed_args()
    if arguments.output is None:
        with tempfile.TemporaryDirectory() as directory:
            same = soak(Path(directory), arguments)
    else:
        same = soak(arguments.output, arguments)
    sys.exit(0 if same else 1)


def soak(directory: Path, arguments: argparse.Namespace) -> bool:
    steps = STEPS_PER_CYCLE * arguments.cycles + EVALUATE_FREQUENCY
    words = [*SETTINGS, f"train.steps={steps}", *arguments.settings]
    directory.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    whole, killed = directory / "whole", directory / "killed"
    with start([*words, "--output", str(whole)], directory / "whole.out") as process:
        if process.wait() != 0:
            sys.exit(f"the undisturbed run failed:\n{(directory / 'whole.out').read_text()}")
    minutes = (time.monotonic() - started) / 60

    chance, places, repeated, last = random.Random(arguments.seed), Counter[str](), 0, 0
    for cycle in range(arguments.cycles + 1):
        # The first steps may come again before there is a checkpoint to continue.
        new = ["--resume", str(killed)] if (killed / "last.pt").exists() else [*words, "--output", str(killed)]
        if new[0] != "--resume" and killed.exists():
            killed.rename(directory / f"killed_before_its_first_checkpoint_{cycle}")
            last = 0
        output = directory / "killed.out"
        with start(new, output) as process:
            if cycle == arguments.cycles:
                if process.wait() != 0:
                    sys.exit(f"the last continuation failed:\n{output.read_text()}")
                break
            share = max(1, round(2 * (steps - last) / (arguments.cycles - cycle)))
            wait_for_step(process, killed, min(last + chance.randint(0, share), steps - 1), output)
            time.sleep(chance.uniform(0, LONGEST_DELAY))
            if process.poll() is not None:
                sys.exit(f"ended before kill {cycle + 1}, give it more steps:\n{output.read_text()}")
            process.send_signal(signal.SIGKILL)
        places[place_of_kill(killed)] += 1
        reached, last = newest_step(killed), saved_step(killed)
        repeated += reached - last
        print(f"kill {cycle + 1}: after step {reached} of {steps}, continues from {last}", flush=True)

    differences = compare(whole, killed)
    print(f"\nkills {arguments.cycles}: " + ", ".join(f"{count} in {place}" for place, count in sorted(places.items())))
    print(f"steps {steps}, of which {repeated} were taken again")
    print(f"minutes {minutes:.1f} undisturbed, {(time.monotonic() - started) / 60 - minutes:.1f} with the kills")
    print("\n".join(differences) or "equal bit for bit: last.pt, best.pt, metrics.jsonl, results.csv")
    return not differences


def start(arguments: list[str], output: Path) -> subprocess.Popen[bytes]:
    with open(output, "wb") as file:
        return subprocess.Popen(
            [sys.executable, str(MAIN), *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def rows_of(directory: Path) -> list[dict[str, Any]]:
    """Read the complete rows of metrics.jsonl."""
    path = directory / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{key: value for key, value in row.items() if key not in NOT_REPRODUCIBLE} for row in rows]


def newest_step(directory: Path) -> int:
    return max((row["step"] for row in rows_of(directory)), default=0)


def saved_step(directory: Path) -> int:
    return load_checkpoint(directory / "last.pt")["step"] if (directory / "last.pt").exists() else 0


def wait_for_step(process: subprocess.Popen[bytes], directory: Path, step: int, output: Path) -> None:
    """Wait until the process has started and its log has reached this step."""
    deadline = time.monotonic() + TIMEOUT
    while f"run directory {directory}, from step" not in output.read_text() or newest_step(directory) < step:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            sys.exit(f"did not reach step {step}:\n{output.read_text()}")
        time.sleep(0.02)


def place_of_kill(directory: Path) -> str:
    """Describe what the process was doing when it was killed, judging by its files."""
    if list(directory.glob(".*.tmp")):
        return "a save"
    step = newest_step(directory)
    scored = any(row["step"] == step and "val/AP" in row for row in rows_of(directory))
    return "an evaluation" if step % EVALUATE_FREQUENCY == 0 and step and not scored else "a step"


def compare(whole: Path, killed: Path) -> list[str]:
    """List the differences between the two runs."""
    differences = []
    for name in ("last.pt", "best.pt"):
        difference = first_difference(load_checkpoint(whole / name), load_checkpoint(killed / name))
        if difference is not None:
            differences.append(f"{name} differs at {difference}")
    if rows_of(whole) != rows_of(killed):
        differences.append("metrics.jsonl differs")
    if (whole / "results.csv").read_text() != (killed / "results.csv").read_text():
        differences.append("results.csv differs")
    return differences


def first_difference(first: Any, second: Any, place: str = "") -> str | None:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        same = first.dtype == second.dtype and first.shape == second.shape
        bits = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (first, second))
        return None if same and torch.equal(*bits) else place
    if type(first) is not type(second):
        return place
    if isinstance(first, dict):
        if list(first) != list(second):
            return place
        pairs = [(first[key], second[key], f"{place}/{key}") for key in first]
    elif isinstance(first, list | tuple):
        if len(first) != len(second):
            return place
        pairs = [(*pair, f"{place}/{number}") for number, pair in enumerate(zip(first, second, strict=True))]
    else:
        nan = isinstance(first, float) and math.isnan(first) and math.isnan(second)
        return None if first == second or nan else place
    return next((found for pair in pairs if (found := first_difference(*pair)) is not None), None)


if __name__ == "__main__":
    exit_with_message(main)
