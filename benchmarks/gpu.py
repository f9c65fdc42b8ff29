"""Everything that waits for a GPU, in one go and one file of results.

make gpu [MINUTES=12]
python3 -m benchmarks.gpu [--device cuda|cpu] [--minutes 12] [--parts tests training nms] [--output FILE]

Runs, one after the other, the tests marked gpu, the GPU rows of docs/performance.md with the benchmarks that they name,
and one short training on the built-in digits. Writes one Markdown file (default: logs/gpu_<YYMMDD-HHMMSS>.md) after
every part, so that what was measured stays when the machine is taken away: device and versions, a table of the parts,
then the command and the output of each. A part that takes longer than its share of the time is stopped, the next one
begins; what does not fit any more is named. On a CPU sizes are small: this shows that it works, it measures nothing.

Exit code 0: every part ran to its end; 1: at least one did not.
"""

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from detection.config.command_line import Parser
from detection.drawing.files import replace_file
from detection.errors import SettingsError, exit_with_message
from detection.runtime.devices import choose_device, describe_device

ROOT = Path(__file__).resolve().parents[1]
MOST_LINES = 60  # of the output of a part that the file keeps, the last ones
LEAST_SECONDS = 5.0  # a part is not begun with less
PYTHON = sys.executable
DONE, FAILED, STOPPED, LEFT_OUT = "done", "failed", "stopped: its time was over", "left out: no time"


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        name: as in `--parts`.
        rows: of docs/performance.md that it answers.
        seconds: that it may take at most.
        words: the command.
    """

    name: str
    rows: str
    seconds: float
    words: tuple[str, ...]

    @property
    def command(self) -> str:
        """The command as one types it."""
        quoted = (f'"{word}"' if set(word) & set("[ *") else word for word in self.words)
        return " ".join(quoted).replace(PYTHON, "python3")


@dataclass(frozen=True)
class Outcome:
    """What became of a part."""

    part: Part
    status: str
    seconds: float
    output: str


def gpu_parts(device: str, gpus: int) -> list[Part]:
    """List the parts for a CUDA device; the order is that of their worth, should the time be short."""

    def benchmark(name: str, rows: str, seconds: float, *words: str, of: str | None = None) -> Part:
        return Part(name, rows, seconds, (PYTHON, "-m", f"benchmarks.{of or name}", "--device", device, *words))

    main = (PYTHON, "yolo-v3/main.py")
    parts = [
        Part("tests", "", 150, (PYTHON, "-m", "pytest", "-q", "-m", "gpu")),
        benchmark("training_step", "P1", 150, "--batch", "64", "--sizes", "416", "608", "--compile"),
        Part("training", "P20", 150, (*main, "--config", "recipes/quickstart.yaml", f"run.device={device}")),
        benchmark("nms", "P12", 45),
        benchmark("optimizer", "P9", 45),
        benchmark("inference", "P13", 90, "--batches", "1", "32", "--ways", "torch", "compiled"),
        benchmark("memory", "P15", 90, "--batches", "8", "64", "--precision", "off"),
        benchmark("loss", "P6, P7", 45),
    ]
    words = ("data.fake=true", "model.num_classes=80", "train.steps=100", "evaluation.evaluate_frequency=null")
    for count in (1, gpus) if gpus > 1 else ():
        torchrun = (PYTHON, "-m", "torch.distributed.run", f"--nproc_per_node={count}", *main[1:], *words)
        parts.append(Part(f"processes_{count}", "P14", 60, torchrun))
    return parts


def cpu_parts() -> list[Part]:
    """List the same parts in small sizes, to show that they work."""

    def benchmark(name: str, rows: str, *words: str) -> Part:
        return Part(name, rows, 120, (PYTHON, "-m", f"benchmarks.{name}", "--device", "cpu", *words))

    small = ("model.backbone=mobilenet_v3_small", "yolo.neck_channels=[16,16,16]")
    short = ("--config", "recipes/quickstart.yaml", "run.device=cpu", "train.steps=10", "train.image_size=64",
             "evaluation.image_size=64", "evaluation.max_images=8", "scheduler.warmup=2")  # fmt: skip
    return [
        # The tests marked gpu are collected and left out where there is none.
        Part("tests", "", 120, (PYTHON, "-m", "pytest", "-q", "-m", "gpu", "--collect-only")),
        benchmark("training_step", "P1", "--batch", "2", "--sizes", "64", "--repeats", "1", *small),
        Part("training", "P20", 240, (PYTHON, "yolo-v3/main.py", *short)),
        benchmark("nms", "P12", "--boxes", "100", "--repeats", "1"),
        benchmark("optimizer", "P9", "--backbone", "mobilenet_v3_small", "--repeats", "1"),
        benchmark("inference", "P13", "--batches", "1", "--networks", "mobilenet_v3_small", "--ways", "torch",
                  "--repeats", "1"),
        benchmark("memory", "P15", "--backbone", "mobilenet_v3_small", "--batches", "1", "--sizes", "64"),
        benchmark("loss", "P6, P7", "--batch", "2", "--size", "64", "--repeats", "1"),
    ]  # fmt: skip


def run_part(part: Part, seconds: float) -> Outcome:
    """Run a part with all that it starts in a process group of its own, for so long at most."""
    started = time.monotonic()
    process = subprocess.Popen(
        part.words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=seconds)
        status = DONE if process.returncode == 0 else f"{FAILED}: exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = STOPPED
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return Outcome(part, status, time.monotonic() - started, output)


def run_parts(parts: Sequence[Part], minutes: float, head: Sequence[str], output: Path) -> list[Outcome]:
    """Run the parts one after the other, at most so long; the file is complete after each."""
    end = time.monotonic() + 60 * minutes
    outcomes: list[Outcome] = []
    for part in parts:
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            outcomes.append(Outcome(part, LEFT_OUT, 0.0, ""))
        else:
            print(f"{part.name}: {part.command}", flush=True)
            outcomes.append(run_part(part, min(left, part.seconds)))
            print(f"{part.name}: {outcomes[-1].status} after {outcomes[-1].seconds:.0f} s", flush=True)
        replace_file(output, report(head, outcomes).encode())
    return outcomes


def report(head: Sequence[str], outcomes: Sequence[Outcome]) -> str:
    """Format the file of results."""
    lines = ["# What waited for a GPU", "", *head, "", "| part | rows | result | seconds |", "|---|---|---|---|"]
    for outcome in outcomes:
        part = outcome.part
        lines.append(f"| {part.name} | {part.rows or '-'} | {outcome.status} | {outcome.seconds:.0f} |")
    for outcome in outcomes:
        shown = outcome.output.replace("```", "'''").splitlines()
        cut = [f"... {len(shown) - MOST_LINES} lines before"] if len(shown) > MOST_LINES else []
        lines += [
            "",
            f"## {outcome.part.name}",
            "",
            "```",
            f"$ {outcome.part.command}",
            *cut,
            *shown[-MOST_LINES:],
            "```",
        ]
    return "\n".join(lines) + "\n"


def describe_machine(device: torch.device, gpus: int) -> list[str]:
    """Say what it runs on, for the head of the file."""
    cuda = f", CUDA {torch.version.cuda}" if device.type == "cuda" else ""
    lines = [
        f"{time.strftime('%Y-%m-%d %H:%M')}, {describe_device(device)}, {gpus} GPUs, {os.cpu_count()} CPU cores, "
        f"Python {platform.python_version()}, PyTorch {torch.__version__}{cuda}."
    ]
    if device.type != "cuda":
        lines.append("**No GPU: small sizes, these numbers measure nothing.**")
    return lines


def main() -> None:
    parser = Parser("benchmarks.gpu", __doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--minutes", type=float, default=12.0, help="that all parts together may take (%(default)s)")
    parser.add_argument("--parts", nargs="+", help="of them only these")
    parser.add_argument("--output", type=Path, metavar="FILE", help="(default: logs/gpu_<YYMMDD-HHMMSS>.md)")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    gpus = torch.cuda.device_count()
    parts = gpu_parts(str(device), gpus) if device.type == "cuda" else cpu_parts()
    if arguments.parts:
        names = [part.name for part in parts]
        if unknown := [name for name in arguments.parts if name not in names]:
            raise SettingsError(f"--parts {unknown[0]}: must be {', '.join(names)}")
        parts = [part for part in parts if part.name in arguments.parts]
    output = arguments.output or ROOT / "logs" / time.strftime("gpu_%y%m%d-%H%M%S.md")
    output.parent.mkdir(parents=True, exist_ok=True)
    outcomes = run_parts(parts, arguments.minutes, describe_machine(device, gpus), output)
    print(f"results in {output}", flush=True)
    if any(outcome.status != DONE for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `run_part` ends what it has started
    exit_with_message(main)
