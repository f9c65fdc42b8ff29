"""A file of weights that this program did not write is called what it is, in one clean line, and never executed."""

import io
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v3_small

from detection.checkpoints import load_checkpoint
from detection.config.command_line import DEFAULTS, weights_file
from detection.config.loading import load_settings
from detection.config.settings import ModelSettings
from detection.errors import CheckpointError
from detection.inference.weights import open_weights
from detection.models import build_detector
from detection.models.pretrained import load_pretrained
from tests.support.checkpoint_cases import Payload


def pickled_model(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An instance of a class of another program, which is not installed."""
    for end in range(1, module.count(".") + 2):
        package = ".".join(module.split(".")[:end])
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    made = type(name, (), {"__module__": module})
    monkeypatch.setattr(sys.modules[module], name, made, raising=False)
    return made()


def torch_bytes(content: Any, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def zip_bytes(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return file.getvalue()


ZERO = torch.zeros(1)
FILES = {
    "a plain state dict (2 tensors: a, b, ...)": lambda: torch_bytes({"a": ZERO, "b": ZERO}),
    "torchvision's weights of a MobileNet": lambda: torch_bytes(mobilenet_v3_small().state_dict()),
    "a state dict of YOLOv5, YOLOv8 or a relative": lambda: torch_bytes({"model.0.conv.weight": ZERO}),
    "a checkpoint of another program (with epoch, net)": lambda: torch_bytes({"epoch": 3, "net": [ZERO]}),
    "a list, saved with torch.save": lambda: torch_bytes([1, 2]),
    "TorchScript": lambda: zip_bytes("net/data.pkl", "net/code/__torch__.py", "net/constants.pkl"),
    "a zip archive without a checkpoint": lambda: zip_bytes("readme.txt"),
    "a Keras model": lambda: zip_bytes("metadata.json", "model.weights.h5"),
    "an archive of NumPy": lambda: zip_bytes("arr_0.npy"),
    "an HDF5 file": lambda: b"\x89HDF\r\n\x1a\n" + bytes(100),
    "a TensorFlow Lite file": lambda: b"\x1c\0\0\0TFL3" + bytes(100),
    "a pointer of Git LFS": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "a web page: the download failed": lambda: b"<!DOCTYPE html><html>not found</html>",
    "a web page": lambda: b"\xef\xbb\xbf\n <!-- an error --><HTML>",
    'a text file (it begins with {\\"message\\": \\"Not found\\"})': lambda: b'{"message": "Not found"}',
    "a safetensors file": lambda: b"\x10" + bytes(7) + b'{"a":{"x":1}}   ' + bytes(100),
    "a Python pickle": lambda: pickle.dumps({"a": 1}),
    "an empty file": lambda: b"",
}


@pytest.mark.parametrize("suffix", [".pth", ".weights"])
@pytest.mark.parametrize("what", FILES)
def test_files_of_other_programs_are_named(tmp_path: Path, what: str, suffix: str) -> None:
    path = tmp_path / f"foreign{suffix}"
    path.write_bytes(FILES[what]())
    with pytest.raises(CheckpointError) as raised:
        open_weights(path, None, None, DEFAULTS)
    line = str(raised.value)
    assert f"foreign{suffix} is {what}" in line and line.isprintable() and len(line) < 400, line


@pytest.fixture(scope="module")
def networks() -> list[tuple[nn.Module, ModelSettings]]:
    """A network that starts from Darknet files, and one that starts from torchvision's."""
    sections = ["yolo.neck_channels=[4, 4]", "yolo.anchors=[[[10, 14]], [[81, 82]]]"], ["yolo.neck_channels=[4, 4, 4]"]
    made = []
    for backbone, words in zip(("darknet_tiny", "mobilenet_v3_small"), sections, strict=True):
        settings = load_settings(DEFAULTS, words=[f"model.backbone={backbone}", *words])[0]
        made.append((build_detector(settings, 1).model, settings.model))
    return made


@pytest.mark.parametrize("suffix", [".pth", ".weights"])
@pytest.mark.parametrize("what", FILES)
def test_files_that_no_training_starts_from_are_named_alike(
    tmp_path: Path, networks: list[tuple[nn.Module, ModelSettings]], what: str, suffix: str
) -> None:
    path = tmp_path / f"foreign{suffix}"
    path.write_bytes(FILES[what]())
    for model, settings in networks[: 1 if "MobileNet" in what else 2]:
        with pytest.raises(CheckpointError) as raised:
            load_pretrained(model, settings.model_copy(update={"pretrained": str(path)}), ["a"])
        line = str(raised.value)
        assert f"foreign{suffix}" in line and what in line and line.isprintable() and len(line) < 400, line
        assert "starts from" in line or "does not fit this network" in line


@pytest.mark.parametrize("suffix", [".pt", ".weights"])
def test_bytes_without_meaning_are_one_line(
    tmp_path: Path, networks: list[tuple[nn.Module, ModelSettings]], suffix: str
) -> None:
    (tmp_path / f"x{suffix}").write_bytes(bytes(range(255, 0, -1)) * 9)
    lines = []
    with pytest.raises(CheckpointError) as raised:
        open_weights(tmp_path / f"x{suffix}", None, None, DEFAULTS)
    lines.append(str(raised.value))
    with pytest.raises(CheckpointError) as raised:
        model, settings = networks[0]
        load_pretrained(model, settings.model_copy(update={"pretrained": str(tmp_path / f"x{suffix}")}), ["a"])
    lines.append(str(raised.value))
    what = {".pt": "x.pt is no checkpoint and is refused", ".weights": "x.weights is not a Darknet weights file"}[
        suffix
    ]
    assert all(what in line and line.isprintable() for line in lines), lines


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("module", "what"),
    [
        ("ultralytics.nn.tasks", "a checkpoint of ultralytics"),
        ("models.yolo", "a checkpoint of YOLOv5, YOLOv7 or a relative"),
        ("mmengine.logging", "a checkpoint of OpenMMLab"),
        ("their.own", "a pickled object of another program (their.own.Model)"),
    ],
)
def test_pickled_models_are_named_by_their_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, what: str, zipped: bool
) -> None:
    path = tmp_path / "best.pt"
    content = {"epoch": 1, "model": pickled_model(module, "Model", monkeypatch), "ema": ZERO}
    path.write_bytes(torch_bytes(content, zipped))
    with pytest.raises(CheckpointError, match=r"best\.pt is ") as raised:
        load_checkpoint(path)
    assert what in str(raised.value) and str(raised.value).isprintable()


def test_naming_a_file_executes_nothing(tmp_path: Path) -> None:
    path, marker = tmp_path / "evil.pt", tmp_path / "marker"
    for content in (torch_bytes(Payload(marker)), pickle.dumps(Payload(marker))):
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            open_weights(path, None, None, DEFAULTS)
        assert not marker.exists()


def test_names_from_a_file_cannot_command_the_terminal(tmp_path: Path) -> None:
    torch.save({"\x1b[31mred\nline": ZERO, "b": 1}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="another program") as raised:
        load_checkpoint(tmp_path / "a.pt")
    assert str(raised.value).isprintable() and "u001b[31mred" in str(raised.value)


def test_a_run_directory_stands_for_its_best_weights(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(CheckpointError, match=r"run is a directory without best.pt.*evaluation$"):
        weights_file(run)
    (run / "last.pt").touch()
    with pytest.raises(CheckpointError, match=r"last\.pt is there"):
        open_weights(run, None, None, DEFAULTS)
    (run / "best.pt").touch()
    assert weights_file(str(run)) == run / "best.pt" and weights_file(run / "last.pt") == run / "last.pt"
