"""Training runs in slices of time: each in a directory and a process of its own, pinned to one core, resumable."""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
LEDGER = "ledger.jsonl"  # a line per process: job, seconds, exit code
DONE = "report.html"  # written at the end of a completed run
GOES_ON = (0, 130, 143, -signal.SIGTERM, -signal.SIGKILL)  # exit codes of a run that is complete or can be continued
LEAST_SECONDS = 20.0  # left of a slice, for which no further process is started
GRACE_SECONDS = 120.0  # for saving, after SIGTERM
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Job:
    """One training run: a rung on a set with a seed, in a share of the yardstick's time or with its own steps."""

    rung: str
    set: str
    seed: int
    budget: str

    @property
    def name(self) -> str:
        return f"{self.rung}/{self.set}/{self.seed}/{self.budget}"

    def directory(self, work: Path) -> Path:
        return work / "runs" / self.budget / self.set / f"{self.rung}_{self.seed}"


class Ledger:
    """What every process of a job took and how it ended, one JSON line each; survives this program."""

    def __init__(self, work: Path) -> None:
        self.path = work / LEDGER
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        # The last line may be cut off where the program was killed.
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        if text and not text.endswith("\n"):
            self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")

    def add(self, job: Job, seconds: float, code: int, kept: bool = True) -> None:
        """Record a process.

        Args:
            kept: false: it took no step that was saved, so its time is not that of the run.
        """
        row = {"job": job.name, "seconds": round(seconds, 1), "code": code, "kept": kept, "at": round(time.time())}
        self.rows.append(row)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def of(self, job: Job) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["job"] == job.name]

    def minutes(self, job: Job) -> float:
        """Minutes that the run of a job has taken so far, over all its processes."""
        return sum(row["seconds"] for row in self.of(job) if row["kept"]) / 60

    def failed(self, job: Job) -> bool:
        """Whether the last process of a job ended with an error."""
        rows = self.of(job)
        return bool(rows) and rows[-1]["code"] not in GOES_ON


def is_done(job: Job, work: Path) -> bool:
    return (job.directory(work) / DONE).exists()


def steps_done(directory: Path) -> int:
    """Return the newest step in the log of a run."""
    path = directory / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


@dataclass
class Process:
    """A running process of a job."""

    job: Job
    popen: subprocess.Popen[bytes]
    started: float
    first_step: int


def run_slice(
    jobs: Iterable[Job],
    work: Path,
    cores: Sequence[int],
    seconds: float,
    command: Callable[[Job, bool], Sequence[str]],
    retry: bool = False,
    say: Callable[[str], None] = print,
) -> Ledger:
    """Run jobs in this order, one per core at a time, for so many seconds; those not complete then are stopped.

    A stopped run has saved its state, and the next slice continues it. A job whose last process failed is left out
    unless `retry` is true.

    Args:
        jobs: all jobs, complete ones too.
        work: directory of the runs and of the ledger.
        cores: each process is pinned to one of them; where the system cannot, it floats.
        command: (job, whether it continues) -> command line.
        say: gets a line per start and end.

    Returns:
        The ledger.
    """
    ledger, deadline = Ledger(work), time.monotonic() + seconds
    waiting = [job for job in jobs if not is_done(job, work) and (retry or not ledger.failed(job))]
    running: dict[int, Process] = {}
    try:
        while (waiting and deadline - time.monotonic() > LEAST_SECONDS) or running:
            for core in cores:
                if core not in running and waiting and deadline - time.monotonic() > LEAST_SECONDS:
                    running[core] = _start(waiting.pop(0), core, work, command, say)
            _collect(running, work, ledger, say)
            if time.monotonic() >= deadline:
                break
            time.sleep(POLL_SECONDS)
    finally:
        for process in running.values():
            process.popen.send_signal(signal.SIGTERM)
        last = time.monotonic() + GRACE_SECONDS
        while running and time.monotonic() < last:
            _collect(running, work, ledger, say)
            time.sleep(POLL_SECONDS)
        for process in running.values():
            process.popen.kill()
            process.popen.wait()
        _collect(running, work, ledger, say)
    return ledger


def _start(
    job: Job, core: int, work: Path, command: Callable[[Job, bool], Sequence[str]], say: Callable[[str], None]
) -> Process:
    directory = job.directory(work)
    continues = (directory / "last.pt").exists()
    if directory.exists() and not continues:  # stopped before its first checkpoint
        shutil.rmtree(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)

    def pin() -> None:
        if hasattr(os, "sched_setaffinity"):  # Linux
            os.sched_setaffinity(0, {core})
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # saves and ends if this program is killed

    with open(directory.with_suffix(".out"), "ab") as output:
        popen = subprocess.Popen(
            list(command(job, continues)),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=pin,
        )
    say(f"core {core}: {job.name} {'continues' if continues else 'begins'}")
    return Process(job, popen, time.monotonic(), steps_done(directory))


def _collect(running: dict[int, Process], work: Path, ledger: Ledger, say: Callable[[str], None]) -> None:
    """Record the processes that have ended."""
    for core, process in list(running.items()):
        code = process.popen.poll()
        if code is None:
            continue
        del running[core]
        job, directory = process.job, process.job.directory(work)
        # Stopped before its first step or checkpoint, it has done nothing that the run took time for.
        kept = is_done(job, work) or ((directory / "last.pt").exists() and steps_done(directory) > process.first_step)
        ledger.add(job, time.monotonic() - process.started, code, kept)
        what = "complete" if is_done(job, work) else f"stopped after step {steps_done(directory)}"
        if code not in GOES_ON:
            what = f"failed with exit code {code}: {last_line(directory.with_suffix('.out'))}"
        say(f"core {core}: {job.name} {what}, {ledger.minutes(job):.1f} minutes so far")


def last_line(path: Path) -> str:
    """Return the last line of a text file that is not empty."""
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""
