"""A network of one convolution whose detections are known by hand, and detect.py run with it.

The network looks at the top left pixel of each cell of 16 x 16: where it is red or green, it finds a box of the cell's
size there, of the class of that name, with a score near 1.
"""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import detect
from detection.models.darknet.cfg import parse_cfg
from detection.models.darknet.network import DarknetNetwork
from detection.models.darknet.weights import Header, write_darknet_weights
from tests.support.darknet_descriptions import net, output, write_cfg, yolo

CFG = write_cfg([net(64), output(7, stride=16), yolo("0", "16,16", 2)])
RED, GREEN = (255, 0, 0), (0, 255, 0)
Run = Callable[..., Any]


@pytest.fixture(scope="session")
def block_weights(tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    """Return the options for the network's files."""
    directory = tmp_path_factory.mktemp("net")
    (directory / "net.cfg").write_text(CFG)
    (directory / "net.names").write_text("red\ngreen\n")
    network = DarknetNetwork(parse_cfg(CFG), num_classes=2)
    (convolution,) = network.output_convolutions()
    with torch.no_grad():
        convolution.weight.zero_()
        convolution.bias.zero_()  # x, y in the middle of the cell; width and height of the anchor
        convolution.weight[4, :2, 0, 0] = 20.0  # objectness: red or green
        convolution.weight[5, 0, 0, 0] = convolution.weight[6, 1, 0, 0] = 20.0
        convolution.bias[4:] = -10.0
    write_darknet_weights(network, directory / "net.weights", Header())
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


def block_image(*blocks: tuple[int, int, tuple[int, int, int]], side: int = 64) -> np.ndarray:
    """Draw a black RGB image with a block of 16/64 of the side at each (column, row, colour)."""
    image = np.zeros((side, side, 3), np.uint8)
    cell = side // 4
    for column, row, color in blocks:
        x, y = cell * column, cell * row
        image[max(y - cell // 2, 0) : y + cell // 2, max(x - cell // 2, 0) : x + cell // 2] = color
    return image


def cell_box(column: int, row: int, side: int = 64) -> list[float]:
    cell = side / 4
    return [cell * column, cell * row, cell * column + cell, cell * row + cell]


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
