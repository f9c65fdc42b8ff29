"""Time from `python3 yolo-v3/main.py` to the first optimizer step, with annotations of the size of COCO train2017.

python3 -m benchmarks.start_up                                     generated data, MobileNetV3-small at 320 px
python3 -m benchmarks.start_up model.backbone=darknet --repeats 3    Darknet-53
python3 -m benchmarks.start_up data.root=data/coco                 a real dataset

The script runs in a process of its own, with a clock around its stages, and is stopped where its first step would
begin. Once more with the pre-flight, whose forward and backward passes are shown on their own. The files are in the
page cache. Generating 118,287 images (links to one) and 860,001 boxes takes 15 s of the minute on 2 CPU cores.
"""

import functools
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.support.synthetic_dataset import TRAIN2017, VAL2017, write_annotations, write_links
from detection.config.command_line import Parser, at_least_one
from detection.config.loading import load_settings
from detection.data.workers import prepare_process
from detection.errors import exit_with_message
from detection.runtime.devices import describe_device, open_machine
from detection.training.throughput import matmul_rates

ROOT = Path(__file__).resolve().parent.parent
MAIN = ROOT / "yolo-v3" / "main.py"
DEFAULTS = [
    "model.backbone=mobilenet_v3_small",
    "yolo.neck_channels=[128,96,64]",
    "train.image_size=320",
    "train.batch_size=16",
    "evaluation.image_size=320", "evaluation.batch_size=16", "data.num_workers=2",
]  # fmt: skip
# stage -> where its function is called
STAGES = {
    "read and check annotations": ("detection.training.run", "build_datasets"),
    "digest of the annotations": ("detection.training.run", "annotations_digest"),
    "build the network": ("detection.training.run", "build_detector"),
    "check the data": ("detection.training.run", "check_before_training"),
    "pre-flight: step": ("detection.training.dry_run", "try_step"),
    "pre-flight: evaluation": ("detection.training.dry_run", "try_evaluation"),
}
STARTED = "START_UP_BENCHMARK"  # environment variable: time at which the process was started


def main() -> None:
    prepare_process()
    parser = Parser("benchmarks.start_up", __doc__)
    parser.add_argument("settings", nargs="*", metavar="key.path=value")
    parser.add_argument("--device", default="auto", help="(default: the first accelerator, else the CPU)")
    parser.add_argument("--repeats", type=at_least_one, default=2, metavar="N", help="starts measured (default: 2)")
    arguments = parser.parse_intermixed_args()
    words = [*DEFAULTS, f"run.device={arguments.device}", *arguments.settings]
    settings, _ = load_settings(ROOT / "yolo-v3" / "args.yaml", words=words)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(settings.data.root)
        if not any(word.startswith("data.root=") for word in arguments.settings):
            root = Path(directory) / "data"
            for split, size in (("train2017", TRAIN2017), ("val2017", VAL2017)):
                write_annotations(root / "annotations" / f"instances_{split}.json", *size)
                write_links(root / split, size[0])
        words += [f"data.root={root}", f"run.logs_path={directory}"]
        runs = [start([*words, "run.preflight=false"]) for _ in range(arguments.repeats)]
        with_preflight = start([*words, "run.preflight=true"])
        size = (root / "annotations" / "instances_train2017.json").stat().st_size / 1e6
    import torch

    device = open_machine(settings.run).device
    rate = max(matmul_rates(2048, torch.float32, device, 3)) / 1e12
    print(
        f"{describe_device(device)}, torch {torch.__version__}, {settings.model.backbone}, "
        f"annotations of {size:.0f} MB; "
        f"matmul float32 {rate:.2f} TFLOP/s"
    )
    print(f"{'seconds':<36}{'median':>8}{'spread':>16}")
    for name in runs[0]:
        values = [run[name] for run in runs]
        print(f"{name:<36}{statistics.median(values):>8.2f}{f'{min(values):.2f}..{max(values):.2f}':>16}")
    for name in ("pre-flight: step", "pre-flight: evaluation"):
        print(f"{name:<36}{with_preflight[name]:>8.2f}")
    apart = sum(with_preflight[name] for name in with_preflight if name.startswith("pre-flight: "))
    print(f"{'all but the pre-flight, run with it':<36}{with_preflight['all'] - apart:>8.2f}")


def start(words: list[str]) -> dict[str, float]:
    """Measure the seconds of each stage of a start."""
    started = time.time()
    command = [sys.executable, "-c", "from benchmarks.start_up import run_timed; run_timed()", *words]
    environment = {**os.environ, STARTED: repr(started)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in run.stdout.splitlines() if line.startswith('{"imports"')]
    if not lines:
        sys.exit(f"the script failed:\n{run.stdout}{run.stderr}")
    return json.loads(lines[0])


def run_timed() -> None:
    """Run the script with timed stages; called in the new process."""
    started = float(os.environ[STARTED])
    seconds: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            before = time.time()
            try:
                return function(*arguments, **keywords)
            finally:
                seconds[name] = seconds.get(name, 0) + time.time() - before

        return call

    script = runpy.run_path(str(MAIN), run_name="started for its time")
    seconds["imports"] = time.time() - started
    scope = script["main"].__globals__  # of all functions of the script
    for name, (module, function) in STAGES.items():
        holder = scope if module == "__main__" else vars(sys.modules[module])
        holder[function] = timed(name, holder[function])
    run_module = sys.modules["detection.training.run"]
    build_loader = run_module.build_training_loader

    def build_and_note(*arguments: Any) -> Any:
        seconds["until the loader is built"] = time.time() - started
        return build_loader(*arguments)

    def stop_at_the_first_step(*_: Any, **__: Any) -> None:
        seconds["all"] = time.time() - started
        seconds["first batch"] = seconds["all"] - seconds.pop("until the loader is built")
        staged = sum(seconds[name] for name in seconds if name != "all")
        seconds["the rest"] = seconds["all"] - staged
        seconds["all"] = seconds.pop("all")
        print(json.dumps(seconds), flush=True)
        os._exit(0)

    run_module.build_training_loader = build_and_note
    scope["train_step"] = stop_at_the_first_step  # the pre-flight has its own
    script["main"]()


if __name__ == "__main__":
    exit_with_message(main)
