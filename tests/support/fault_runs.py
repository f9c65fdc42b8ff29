"""yolo-v3/main.py in processes of its own, with a fault inside: started by the fixture `launch`, and by torchrun.

The processes are forked from one that has imported everything (multiprocessing's "forkserver"): importing torch takes
seconds. Otherwise they equal processes started by a shell.
"""

import atexit
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

import albumentations  # noqa: F401  (imported later by what is forked, once per process)
import cv2
import numpy as np
import pytest
import torch
import torch.utils.tensorboard

from detection.training import console, throughput
from tests.support.darknet_descriptions import conv, net, output, route, upsample, write_cfg, yolo
from tests.support.guards import switch_off
from tests.support.paths import MAIN
from tests.support.training_runs import load_main

GUARD_OFF = "FAULTS_GUARD_OFF"  # environment variable: arguments of `switch_off` as JSON
Fault = Callable[[ModuleType], None]  # changes something in the loaded script before it runs

ANCHORS = "10,10, 20,20, 40,40"
# A network of two levels that takes some milliseconds per step, with everything that larger ones have.
LAYERS = [conv(8, 3, 2), conv(8, 3, 2), conv(16, 3, 2), conv(16, 3, 2), conv(16, 3, 2)]
HEADS = [output(21), yolo("0,1,2", ANCHORS, 2), route(-3), upsample(), route(-1, -6), output(21)]
NETWORK = write_cfg([net(64), *LAYERS, *HEADS, yolo("0,1,2", ANCHORS, 2)])
OVERLAY: dict[str, Any] = {
    "run": {"device": "cpu", "precision": "off", "log_frequency": 1, "seed": 3, "preflight": False},
    "data": {"num_workers": 0},
    "model": {"backbone": "darknet_cfg"},
    "train": {
        "batch_size": 2, "subdivisions": 2, "steps": 8, "image_size": 64, "resize_frequency": 2,
        "multiscale_sizes": [64, 96], "learning_rate": 1e-3, "ema_decay": 0.9, "ema_ramp": 2, "save_frequency": 1000,
    },
    "scheduler": {"warmup": 3, "index": [5], "scale": [1.0, 0.5]},
    "evaluation": {"evaluate_frequency": 4, "image_size": 64, "visualize_images": 0, "batch_size": 2},
}  # fmt: skip


load_main()
throughput.MATRIX_SIDES["cpu"] = 64  # each run measures the speed of matrix products at its end, for seconds


def leave_out_report() -> None:
    """Its pictures take as long as a small training."""
    console.report_run = lambda *_: None


def run_script(
    arguments: list[str], directory: str, output: str, fault: Fault | None, guard_off: str | None, report: bool
) -> None:
    """The forked process: `cd directory; main.py arguments > output.out 2> output.err`."""
    os.setsid()
    os.chdir(directory)
    for number, name in ((0, os.devnull), (1, f"{output}.out"), (2, f"{output}.err")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644), number)
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as everywhere on Linux until Python 3.14
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where pytest runs behind a `&`
    torch.set_num_threads(1)
    sys.argv = [str(MAIN), *arguments]
    main = load_main()
    if not report:
        leave_out_report()
    if guard_off:
        switch_off(*json.loads(guard_off), pytest.MonkeyPatch())
    if fault is not None:
        fault(main)
    try:
        main.exit_with_message(main.main, main.OUT_OF_MEMORY)
    finally:  # what the interpreter does at exit, but not in a forked process
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()


@dataclass
class Run:
    """A started run of the script."""

    process: BaseProcess
    output: Path

    @property
    def out(self) -> str:
        return Path(f"{self.output}.out").read_text()

    @property
    def err(self) -> str:
        return Path(f"{self.output}.err").read_text()

    def wait(self, seconds: float = 120) -> int:
        """Exit code, minus the number of a signal."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s:\n{self.out}{self.err}"
        return self.process.exitcode

    def ends_with(self, code: int, *words: str) -> str:
        """Assert the exit code and a single line on stderr besides notices of signals; returns the line.

        `words` are those of the line; of the output where the code is 0 and there is no line.
        """
        found = self.wait()
        assert found == code, f"exit code {found}\n{self.out}{self.err}"
        lines = [line for line in self.err.splitlines() if "received: finishing the step" not in line]
        assert len(lines) == (code != 0), self.err
        text = lines[0] if lines else self.out
        for word in words:
            assert word in text, text
        return text

    def until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.is_alive(), f"ended early:\n{self.out}{self.err}"
            assert time.monotonic() < deadline
            time.sleep(0.01)


def at_step(main: ModuleType, step: int, action: Callable[[], None]) -> None:
    """Do something in an optimizer step, numbered from 0, when its batches are there and all before is saved."""
    next_batches = main.Supervisor.next_batches

    def next_batches_and_fault(supervisor: Any, count: int) -> Any:
        batches = next_batches(supervisor, count)
        if supervisor.step == step:
            for thread in threading.enumerate():
                if thread.name == "checkpoint writer":
                    thread.join()
            action()
        return batches

    main.Supervisor.next_batches = next_batches_and_fault


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def make_dataset(
    root: Path, count: int = 13, empty: bool = False, sizes: Sequence[tuple[int, int]] = ((64, 64),)
) -> None:
    """COCO layout: `count` training and 4 validation images, each with up to two coloured boxes of two classes.

    `sizes`: width and height in turn; `empty`: only the first training image has boxes.
    """
    generator = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split, number in (("train", count), ("val", 4)):
        (root / split).mkdir()
        images, rows = [], []
        for index in range(number):
            image_width, image_height = sizes[index % len(sizes)]
            image = generator.integers(90, 130, (image_height, image_width, 3), dtype=np.uint8)
            images.append({"id": index + 1, "file_name": f"{index}.png", "width": image_width, "height": image_height})
            for _ in range(0 if empty and split == "train" and index else (index + 1) % 3):
                x, y, width, height = (int(value) for value in generator.integers([0, 0, 15, 15], [30, 30, 30, 30]))
                category = int(generator.choice([1, 7]))
                image[y : y + height, x : x + width] = (255, 0, 0) if category == 1 else (0, 255, 0)
                box = {"bbox": [x, y, width, height], "area": width * height, "iscrowd": 0}
                rows.append({"id": len(rows) + 1, "image_id": index + 1, "category_id": category, **box})
            cv2.imwrite(str(root / split / f"{index}.png"), image)
        categories = [{"id": 1, "name": "blue"}, {"id": 7, "name": "green"}]
        content = {"images": images, "annotations": rows, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
