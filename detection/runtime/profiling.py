"""`--profile`: time spent by the operations of the first steps of a run."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

WARM_UP, RECORDED = 3, 5  # steps
WAIT = "wait for data"
SHOWN = 15  # operations in the table
TRACE = "trace.json.gz"


def waiting_for_data() -> AbstractContextManager[Any]:
    """Return a context that marks waiting for the loader in the profile; costs a microsecond if none is recorded."""
    return record_function(WAIT)


class StepProfiler:
    """Records a few steps with torch's profiler, then writes a trace and logs a table; the run goes on.

    Args:
        directory: run directory; the trace in it can be opened with https://ui.perfetto.dev.
        device: device of the run.
        log: called with each line of the table.
        enabled: false: do nothing.
    """

    def __init__(self, directory: Path, device: torch.device, log: Callable[[str], None], enabled: bool) -> None:
        self.directory, self.log, self.on_cuda = directory, log, device.type == "cuda"
        self.profiler: profile | None = None
        self.steps = 0
        if enabled:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_cuda else [])]
            plan = schedule(wait=0, warmup=WARM_UP, active=RECORDED, repeat=1)
            self.profiler = profile(activities=activities, schedule=plan, acc_events=True)
            self.profiler.start()

    def step(self) -> None:
        """Count a step; after the last recorded one, report."""
        if self.profiler is None:
            return
        self.steps += 1
        if self.steps == WARM_UP + RECORDED:
            self._stop(report=True)
        else:
            self.profiler.step()

    def close(self) -> None:
        """Stop a recording that the end of the run has cut short."""
        if self.profiler is not None:
            self.log(f"profile     the run ended after {self.steps} of {WARM_UP + RECORDED} steps; nothing recorded")
            self._stop(report=False)

    def _stop(self, report: bool) -> None:
        assert self.profiler is not None
        profiler, self.profiler = self.profiler, None
        profiler.stop()
        if report:
            path = self.directory / TRACE
            profiler.export_chrome_trace(str(path))
            for line in report_lines(profiler.key_averages(), self.on_cuda):
                self.log(line)
            self.log(f"profile     trace of {RECORDED} steps: {path}, to be opened in https://ui.perfetto.dev")


def report_lines(averages: Any, on_cuda: bool) -> list[str]:
    """Format a table of the operations with the most self time, in milliseconds per step.

    Args:
        averages: result of `profile.key_averages()`.
        on_cuda: rank by time on the device instead of the host.
    """
    steps = [event for event in averages if event.key.startswith("ProfilerStep")]
    microseconds = sum(event.cpu_time_total for event in steps)
    waited = sum(event.cpu_time_total for event in averages if event.key == WAIT)
    marks = {WAIT, *(event.key for event in steps)}
    times = [
        (event.self_device_time_total if on_cuda else event.self_cpu_time_total, event)
        for event in averages
        if event.key not in marks
    ]
    total = sum(time for time, _ in times) or 1
    where = "device" if on_cuda else "host"
    lines = [
        f"profile     {microseconds / RECORDED / 1e3:.1f} ms per step, waiting for data "
        f"{waited / max(microseconds, 1):.1%}; most time on the {where}:",
        f"{'operation':<52}{'ms/step':>10}{'share':>8}{'calls/step':>12}",
    ]
    for time, event in sorted(times, key=lambda pair: -pair[0])[:SHOWN]:
        milliseconds, calls = time / RECORDED / 1e3, event.count / RECORDED
        lines.append(f"{event.key[:50]:<52}{milliseconds:>10.2f}{time / total:>8.1%}{calls:>12.0f}")
    return lines
