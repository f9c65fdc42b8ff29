"""detect.py and export.py as their users see them, with a network made in a moment from a small description."""

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
import export
from detection.models.darknet_cfg import format_cfg, parse_cfg
from detection.models.darknet_network import DarknetNetwork
from detection.models.darknet_weights import Header, load_darknet_weights, write_darknet_weights

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
        return run_script({"detect.py": detect, "export.py": export}[script].main, *arguments, cwd=cwd)

    return started


def test_scripts_run_from_anywhere_without_installation(files: Path, tmp_path: Path) -> None:
    for script in ("detect.py", "export.py", "validation.py"):
        command = [sys.executable, ROOT / script, "--help"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
        assert result.returncode == 0 and f"python {script} --weights" in result.stdout, result.stderr


def weights_of(files: Path) -> list[str | Path]:
    return ["--weights", files / "net.weights", "--cfg", files / "net.cfg", "--names", files / "net.names"]


def test_darknet_export_is_the_same_file(run: Run, files: Path, tmp_path: Path) -> None:
    result = run("export.py", *weights_of(files), "--format", "darknet", "--output", tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "net.weights").read_bytes() == (files / "net.weights").read_bytes()
    assert (tmp_path / "net.names").read_text() == "red\ngreen\n"
    assert (tmp_path / "net.cfg").read_text() == format_cfg(parse_cfg(CFG + "ignore_thresh=0.7\n"))
    again = run("export.py", *weights_of(files), "--format", "darknet", "--output", tmp_path)
    assert again.returncode == 6 and "exists" in again.stderr


def test_darknet_export_describes_the_size_it_was_asked_for(run: Run, files: Path, tmp_path: Path) -> None:
    """Read back without any setting, the exported pair finds the same boxes."""
    for directory, arguments in (("a", ["evaluation.image_size=96"]), ("b", [])):
        out = tmp_path / directory
        source = weights_of(files) if arguments else weights_of(tmp_path)
        result = run("detect.py", *source, files / "photos", *arguments, "run.precision=off", "--output", out)
        assert result.returncode == 0, result.stderr
        if arguments:
            exported = run("export.py", *source, *arguments, "--format", "darknet", "--output", tmp_path)
            assert exported.returncode == 0, exported.stderr
    assert "width=96\nheight=96" in (tmp_path / "net.cfg").read_text()
    first, second = (json.loads((tmp_path / name / "detections.json").read_text()) for name in "ab")
    assert first == second and any(row["detections"] for row in first)


def test_backbone_export_ends_after_the_encoder(run: Run, files: Path, tmp_path: Path) -> None:
    result = run("export.py", *weights_of(files), "--format", "backbone", "--output", tmp_path)
    assert result.returncode == 0, result.stderr
    # 2 convolutions: 4 * 8 + 3 * 3 * 3 * 8 and 4 * 16 + 3 * 3 * 8 * 16 values behind a header of 20 bytes
    assert (tmp_path / "net.conv.2").stat().st_size == 20 + 4 * (4 * 8 + 27 * 8 + 4 * 16 + 72 * 16)
    loaded = load_darknet_weights(DarknetNetwork(parse_cfg(CFG), 2), tmp_path / "net.conv.2")
    assert loaded.convolutions == 2
    refused = run("detect.py", "--weights", tmp_path / "net.conv.2", "--cfg", files / "net.cfg", files / "photos")
    assert refused.returncode == 7 and "backbone" in refused.stderr


def test_onnx_export_computes_the_same(run: Run, files: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    result = run("export.py", *weights_of(files), "--output", tmp_path)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]  # one file, nothing left beside it
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    (image_input,) = session.get_inputs()
    assert image_input.name == "images" and image_input.type == "tensor(uint8)" and image_input.shape[1:] == [3, 64, 64]
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["names"]) == ["red", "green"] and metadata["image_size"] == "64"
    assert json.loads(metadata["pixel_mean"]) == [0, 0, 0] and json.loads(metadata["pixel_std"]) == [1, 1, 1]

    network = DarknetNetwork(parse_cfg(CFG), 2).eval()
    load_darknet_weights(network, files / "net.weights")
    images = np.random.default_rng(1).integers(0, 256, (5, 3, 64, 64), dtype=np.uint8)
    with torch.no_grad():
        raw = network(torch.from_numpy(images))[0].numpy()  # (5, 2, 4, 4, 7)
    boxes, scores = session.run(None, {"images": images})
    assert boxes.shape == (5, 32, 4) and scores.shape == (5, 32, 2)
    sigmoid = 1 / (1 + np.exp(-raw))
    row, column, anchor = 2, 1, 1  # by hand: cells of 16 px, anchor 30 x 28
    flat = (row * 4 + column) * 2 + anchor
    for image in range(5):
        cell, logits = sigmoid[image, anchor, row, column], raw[image, anchor, row, column]
        x, y = (cell[0] + column) * 16, (cell[1] + row) * 16
        width, height = 30 * np.exp(logits[2]), 28 * np.exp(logits[3])
        expected = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        np.testing.assert_allclose(boxes[image, flat], expected, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(scores[image, flat], cell[4] * cell[5:], atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["--weights", "missing.pt"], 7, "missing.pt"),
        (["--weights", "yolov3.weights"], 7, "download_darknet_weights.sh"),
        (["--weights", "net.weights", "--cfg", "net.names"], 2, "net.names"),
        (["--weights", "net.weights"], 7, "bytes"),
        (["--weights", "net.weights", "--cfg", "net.cfg", "evaluation.image_size=72"], 2, "16"),
        (["--weights", "net.weights", "--format", "tflite"], 2, "tflite"),
        (["--weights", "net.onnx"], 7, "ONNX"),
        (["--weights", "net.weights", "--cfg", "net.cfg", "--device", "cuda"], 2, "--device"),
    ],
)
def test_export_refuses_in_one_line(run: Run, files: Path, arguments: list[str], code: int, part: str) -> None:
    result = run("export.py", *arguments, cwd=files)
    assert result.returncode == code and part in result.stderr and len(result.stderr.strip().splitlines()) == 1
