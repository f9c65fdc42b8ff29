"""detect.py as its users see it, with a network made in a moment from a small description."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import detect
from detection.models.darknet_cfg import parse_cfg
from detection.models.darknet_network import DarknetNetwork
from detection.models.darknet_weights import Header, write_darknet_weights

ROOT = Path(__file__).resolve().parent.parent
CFG = """
[net]
width=64
height=64
channels=3

[convolutional]
batch_normalize=1
filters=8
size=3
stride=4
pad=1
activation=leaky

[convolutional]
batch_normalize=1
filters=16
size=3
stride=4
pad=1
activation=leaky

[shortcut]
from=-1
activation=linear

[convolutional]
size=1
stride=1
pad=1
filters=14
activation=linear

[yolo]
mask=0,1
anchors=10,12, 30,28
classes=2
num=2
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """net.cfg, net.weights (random), net.names and a few images."""
    directory = tmp_path_factory.mktemp("files")
    (directory / "net.cfg").write_text(CFG)
    (directory / "net.names").write_text("red\ngreen\n")
    torch.manual_seed(0)
    network = DarknetNetwork(parse_cfg(CFG), num_classes=2, objectness_prior=0.9)
    with torch.no_grad():
        network.output_convolutions()[0].weight.mul_(20)
    write_darknet_weights(network, directory / "net.weights", Header(seen=77))
    (directory / "photos").mkdir()
    generator = np.random.default_rng(0)
    for name, size in (("wide.png", (40, 90, 3)), ("tall.jpg", (80, 50, 3))):
        cv2.imwrite(str(directory / "photos" / name), generator.integers(0, 256, size, dtype=np.uint8))
    (directory / "photos" / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    (directory / "photos" / "notes.txt").write_text("no image either")
    return directory


Run = Callable[..., Any]


@pytest.fixture
def run(run_script) -> Run:
    def started(script: str, *arguments: str | Path, cwd: Path = ROOT) -> Any:
        return run_script({"detect.py": detect}[script].main, *arguments, cwd=cwd)

    return started


def test_scripts_run_from_anywhere_without_installation(files: Path, tmp_path: Path) -> None:
    for script in ("detect.py", "export.py", "validation.py"):
        command = [sys.executable, ROOT / script, "--help"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
        assert result.returncode == 0 and f"python {script} --weights" in result.stdout, result.stderr


def weights_of(files: Path) -> list[str | Path]:
    return ["--weights", files / "net.weights", "--cfg", files / "net.cfg", "--names", files / "net.names"]


def test_detect_draws_and_lists(run: Run, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(
        "detect.py", *weights_of(files), files / "photos", files / "photos" / "wide.png",
        "evaluation.visualization_threshold=0.3", "run.precision=off", "--output", out, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0 and "broken.jpg" in result.stderr and "1 left out" in result.stdout
    rows = json.loads((out / "detections.json").read_text())
    assert [Path(row["file"]).name for row in rows] == ["tall.jpg", "wide.png", "wide.png"]
    assert (rows[0]["width"], rows[0]["height"]) == (50, 80)
    found = [detection for row in rows for detection in row["detections"]]
    assert found, "the random network should find something at this threshold"
    for row in rows:
        for detection in row["detections"]:
            x1, y1, x2, y2 = detection["box"]
            assert 0 <= x1 <= x2 <= row["width"] and 0 <= y1 <= y2 <= row["height"]
            assert detection["class"] == ["red", "green"][detection["label"]] and detection["score"] >= 0.3
    assert rows[1]["detections"] == rows[2]["detections"]
    pictures = sorted(path.name for path in out.glob("*.png"))
    assert pictures == ["00001_tall.png", "00002_wide.png", "00003_wide.png"]
    assert cv2.imread(str(out / "00001_tall.png")).shape == (80, 50, 3)


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        ([], 2, "no images named"),
        (["nowhere.jpg"], 2, "nowhere.jpg"),
        (["photos", "evaluation.nonsense=1"], 2, "evaluation.nonsense"),
        (["photos/broken.jpg"], 3, "no image could be read"),
    ],
)
def test_detect_refuses_in_one_line(
    run: Run, files: Path, tmp_path: Path, words: list[str], code: int, part: str
) -> None:
    result = run("detect.py", *weights_of(files), *words, "--output", tmp_path / "out", cwd=files)
    assert result.returncode == code and part in result.stderr.strip().splitlines()[-1]


def test_detect_on_a_full_disk_is_one_line(run: Run, files: Path, tmp_path: Path, full_disk) -> None:
    (tmp_path / "out").mkdir()
    with full_disk(1000):
        result = run("detect.py", *weights_of(files), files / "photos" / "tall.jpg", "--output", tmp_path / "out")
    assert result.returncode == 6 and "out" in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr
