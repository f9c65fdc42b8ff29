"""Size of the logs of a run per 100,000 steps.

python3 -m benchmarks.logs [run.log_frequency=10 evaluation.evaluate_frequency=5000 ...]

A training of 100 steps that logs each of them writes the rows of 1,000 steps logged every tenth; a small network on
synthetic images writes what a large one does. Takes about half a minute on 2 CPU cores.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from detection.config.command_line import DEFAULTS, Parser, at_least_one
from detection.config.loading import load_settings
from detection.errors import DataError, SettingsError, exit_with_message

ROOT = Path(__file__).resolve().parent.parent
STEPS = 100_000
SMALL = (
    "data.fake=true", "model.num_classes=80", "model.backbone=mobilenet_v3_small", "yolo.neck_channels=[8,8,8]",
    "train.image_size=64", "train.resize_frequency=0", "train.batch_size=2", "train.subdivisions=1",
    "evaluation.image_size=64", "data.num_workers=1", "run.device=cpu",
)  # fmt: skip


def main() -> None:
    parser = Parser("benchmarks.logs", __doc__)
    parser.add_settings()
    parser.add_argument("--rows", type=at_least_one, default=100, metavar="N", help="logged steps (default: 100)")
    arguments = parser.parse_intermixed_args()
    settings, _ = load_settings(DEFAULTS, arguments.config, arguments.settings)
    every, evaluation = settings.run.log_frequency, settings.evaluation.evaluate_frequency
    if not isinstance(evaluation, int):
        raise SettingsError(f"evaluation.evaluate_frequency is {evaluation!r}: say it in steps")
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "run"
        steps = (f"train.steps={arguments.rows}", "run.log_frequency=1", f"evaluation.evaluate_frequency={evaluation}")
        words = [*arguments.settings, *SMALL, *steps, "--output", str(directory)]
        run = subprocess.run(
            [sys.executable, ROOT / "yolo-v3" / "main.py", *words], capture_output=True, text=True, check=False
        )
        if run.returncode:
            raise DataError(f"the training failed: {run.stderr.strip().splitlines()[-1]}")
        numbers, pictures = event_bytes(directory)
        rows = {name: (directory / name).stat().st_size for name in ("train.log", "metrics.jsonl")}
        shown = sum(file.stat().st_size for file in (directory / "images").glob("validation_*"))
    per_row = {**rows, "TensorBoard, numbers": numbers}
    per_evaluation = {"TensorBoard, pictures": pictures, "images/": shown}
    print(f"torch {torch.__version__}, a row every {every} steps, an evaluation every {evaluation}")
    print(f"{'what':<28}{'bytes':>12}{'MB per 100,000 steps':>24}")
    total = 0.0
    for part, times in ((per_row, STEPS / every / arguments.rows), (per_evaluation, STEPS / evaluation)):
        for name, size in part.items():
            total += size * times
            print(f"{name:<28}{size:>12,}{size * times / 1e6:>24.2f}")
    print(f"{'together':<40}{total / 1e6:>24.2f}")


def event_bytes(directory: Path) -> tuple[int, int]:
    """Return the bytes of scalars and of images in the event files of a run; images of one evaluation only."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    numbers = pictures = 0
    for file in directory.glob("events.*"):
        for event in EventFileLoader(str(file)).Load():
            is_picture = any(value.metadata.plugin_data.plugin_name == "images" for value in event.summary.value)
            if not is_picture:
                numbers += event.ByteSize() + 16  # length and checksums of the record
            elif event.step:
                pictures += event.ByteSize() + 16
    return numbers, pictures


if __name__ == "__main__":
    exit_with_message(main)
