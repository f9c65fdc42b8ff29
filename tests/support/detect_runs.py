"""detect.py run with the network of block_network.py."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import detect
from tests.support.block_network import GREEN, RED, block_image, write_block_network

Run = Callable[..., Any]


@pytest.fixture(scope="session")
def block_weights(tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    """Return the options for the network's files."""
    directory = write_block_network(tmp_path_factory.mktemp("net"))
    return ["--weights", directory / "net.weights", "--cfg", directory / "net.cfg", "--names", directory / "net.names"]


@pytest.fixture
def run_detect(run_script, block_weights: list[str | Path], tmp_path: Path) -> Iterator[Run]:
    """Runner of detect.py into tmp_path/out: `run_detect(SOURCE, ...)`. Restores the signal handlers."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where pytest runs behind a `&`

    def started(*arguments: str | Path, out: str = "out") -> Any:
        return run_script(
            detect.main, *block_weights, *arguments, "run.precision=off", "--output", tmp_path / out, cwd=tmp_path
        )

    yield started
    for number, handler in handlers.items():
        signal.signal(number, handler)


def save(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image[..., ::-1])
    return path


def save_video(path: Path, images: list[np.ndarray], codec: str = "mp4v", rate: float = 12.5) -> Path:
    height, width = images[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), rate, (width, height))
    for image in images:
        writer.write(image[..., ::-1].copy())
    writer.release()
    return path


def walk(side: int = 64, frames: int = 8) -> list[np.ndarray]:
    """Write a video whose frame k has a block at column k % 4, row k // 4."""
    return [block_image((k % 4, k // 4, RED if k % 2 else GREEN), side=side) for k in range(frames)]


def rows_of(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "detections.json").read_text())


def boxes_of(row: dict[str, Any]) -> list[tuple[str, list[float]]]:
    return [(found["class"], found["box"]) for found in row["detections"]]
