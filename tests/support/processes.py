"""Runs of several processes started by torchrun."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.support.paths import REPOSITORY

TESTS = Path(__file__).resolve().parent
STEPS = 10
OVERLAY: dict[str, Any] = {
    "run": {"log_frequency": 1, "precision": "off", "preflight": False, "device": "cpu"},
    "data": {"num_workers": 0},
    "model": {"backbone": "mobilenet_v3_small"},
    "yolo": {"neck_channels": [8, 8, 8]},
    "train": {
        "steps": STEPS, "image_size": 64, "learning_rate": 1e-3, "ema_decay": 0.9, "ema_ramp": 2, "clip_norm": 10.0,
        "save_frequency": 4, "resize_frequency": 2, "multiscale_sizes": [64, 96],
    },
    "scheduler": {"strategy": "constant", "warmup": 2},
    "evaluation": {"image_size": 64, "evaluate_frequency": 5, "batch_size": 3, "visualize_images": 0},
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(processes: int, directory: Path, *arguments: str | Path, fault: str = "none") -> subprocess.Popen[str]:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "overlay.yaml").write_text(yaml.safe_dump(OVERLAY))
    words = ["--config", directory / "overlay.yaml", *arguments]
    return subprocess.Popen(
        command(processes, fault, words),
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def output_of(process: subprocess.Popen[str], seconds: float = 120) -> str:
    """Wait for the process and return its output."""
    try:
        return process.communicate(timeout=seconds)[0]
    finally:
        process.kill()


def rows_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def losses_of(directory: Path) -> list[float]:
    return [row["train/loss"] for row in rows_of(directory) if "train/loss" in row]


def command(processes: int, fault: str, arguments: list[str | Path]) -> list[str]:
    if processes == 1:
        return [sys.executable, str(TESTS / "two_ranks.py"), fault, *map(str, arguments)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    address = ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    return [*torchrun, *address, str(TESTS / "two_ranks.py"), fault, *map(str, arguments)]
