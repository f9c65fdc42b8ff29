"""Draw the losses of one process and of two with the same images per step, laid over one another.

python3 -m docs.draw_two_processes

Trains 60 steps on the built-in digits twice: one process with a batch of 8, torchrun with two of 4, batch norm
frozen (its statistics are those of one process's images otherwise). Writes docs/two_processes.png and prints the
largest relative difference. About 2 minutes on 2 CPU cores.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from detection.drawing.figures import draw_curves, new_figure, save_figure

STEPS = 60
WORDS = [
    "--config", "recipes/quickstart.yaml", f"train.steps={STEPS}", "run.log_frequency=1", "run.precision=off",
    "run.preflight=false", "run.device=cpu", "scheduler.warmup=10", "train.learning_rate=1e-3",
]  # fmt: skip


def losses(processes: int, directory: Path) -> list[tuple[float, float]]:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    words = [*WORDS, f"train.batch_size={8 // processes}", "--output", str(directory)]
    subprocess.run([*start, "tests/support/two_ranks.py", "none", *words], check=True)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        one, two = (losses(processes, Path(name) / str(processes)) for processes in (1, 2))
    curves = {"one process, 8 images": one, "two processes, 4 images each": two}
    title = "One process and two, the same images per step"
    figure, (axes,) = new_figure()
    draw_curves(axes, curves, title, "optimizer step", "training loss")
    save_figure(Path("docs/two_processes.png"), figure)
    differences = [abs(b[1] - a[1]) / a[1] for a, b in zip(one, two, strict=True)]
    print(f"largest relative difference: {max(differences[:10]):.1e} in 10 steps, {max(differences):.1e} in {STEPS}")


if __name__ == "__main__":
    main()
