"""Every file of the catalogue in its true layout and size: fetched, checked, pinned, and put to use."""

import hashlib
import os
import pickle
import re
import struct
import subprocess
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor

import detect
from detection.config.loading import load_settings
from detection.errors import CheckpointError
from detection.models import build_detector, catalogue
from detection.models.catalogue import Entry, find_weights, read_catalogue
from detection.models.pretrained import load_pretrained, needed_settings
from tests.support import darknet_descriptions, efficientdet_reference, foreign_mmdetection
from tests.support import foreign_networks as foreign
from tests.support.paths import ARGS
from tests.support.weights_server import SCRIPT, needs_tools

ENTRIES = read_catalogue()
SMALL = "mobilenet_v3_small.imagenet1k_v1"
FOREIGN: dict[str, foreign.Network] = {
    "PaddleDetection YOLOv3": foreign.paddle,
    "MMDetection YOLOv3": foreign_mmdetection.mmdetection,
    "MMDetection YOLOv3 on MobileNetV2": foreign_mmdetection.mmdetection_mobilenet,
    "YOLOX on Darknet-53": foreign.yolox,
    "YOLOv3 of the research repository": foreign.research_darknet,
    "timm's Darknet-53": foreign.timm_darknet53,
}
# Width and depth of B0 to B7, table of `efficientnet_builder.py` in github tensorflow/tpu.
SCALES = [(1.0, 1.0), (1.0, 1.1), (1.1, 1.2), (1.2, 1.4), (1.4, 1.8), (1.6, 2.2), (1.8, 2.6), (2.0, 3.1)]
# Channels, cells, repeats, levels, learned fusion, backbone of D0 to D7x; `hparams_config.py` in github google/automl.
DETECTORS = {
    "d0": (64, 3, 3, 5, True, 0), "d1": (88, 4, 3, 5, True, 1), "d2": (112, 5, 3, 5, True, 2),
    "d3": (160, 6, 4, 5, True, 3), "d4": (224, 7, 4, 5, True, 4), "d5": (288, 7, 4, 5, True, 5),
    "d6": (384, 8, 5, 5, False, 6), "d7": (384, 8, 5, 5, False, 6), "d7x": (384, 8, 5, 6, False, 7),
}  # fmt: skip
CFGS: dict[str, Callable[[], str]] = {
    "yolov3-tiny.weights": darknet_descriptions.yolov3_tiny,
    "yolov3-spp.weights": lambda: darknet_descriptions.yolov3(spp=True),
    "yolov4.weights": darknet_descriptions.yolov4,
    "yolov4-tiny.weights": darknet_descriptions.yolov4_tiny,
}


def scaled(number: int) -> tuple[int, list[tuple[int, int]]]:
    """Stem and stages of B0 to B7; channels are rounded to multiples of 8, down by at most a tenth."""
    width, depth = SCALES[number]

    def channels(count: int) -> int:
        rounded = max(8, int(count * width + 4) // 8 * 8)
        return rounded + 8 * (rounded < 0.9 * count * width)

    stem, stages = efficientdet_reference.B0
    return channels(stem), [(int(np.ceil(count * depth)), channels(out)) for count, out in stages]


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    recorder = foreign.Recorder(len(shapes))
    for name, shape in shapes.items():
        recorder(name, *shape)
    return recorder.state


def efficientnet_file(number: int) -> dict[str, Tensor]:
    """A classifier of timm: the backbone of EfficientDet, a last convolution and the output of 1000 classes."""
    backbone = scaled(number)
    shapes = {
        name.removeprefix("backbone."): shape
        for name, shape in efficientdet_reference.public_shapes(8, 1, 1, 1, 5, True, backbone).items()
        if name.startswith("backbone.")
    }
    last, head = backbone[1][-1][1], int(1280 * SCALES[number][0] + 4) // 8 * 8
    shapes |= {"conv_head.weight": (head, last, 1, 1), **dict(efficientdet_reference.norm("bn2", head))}
    return drawn({**shapes, "classifier.weight": (1000, head), "classifier.bias": (1000,)})


def state_of(entry: Entry) -> dict[str, Tensor]:
    """The tensors of a published file, from layouts that share nothing with ours; torchvision makes its own."""
    if entry.family in FOREIGN:
        return foreign.synthetic_file(FOREIGN[entry.family], seed=len(entry.name))
    if entry.family == "EfficientDet":
        channels, cells, repeats, levels, fast, number = DETECTORS[entry.name.rpartition("_")[2]]
        return drawn(efficientdet_reference.public_shapes(channels, cells, repeats, 90, levels, fast, scaled(number)))
    if entry.name.startswith("tf_efficientnet_b"):
        return efficientnet_file(int(entry.name[len("tf_efficientnet_b")]))
    network = getattr(torchvision.models, entry.name.partition(".")[0])()
    return drawn({name: tuple(value.shape) for name, value in network.state_dict().items()})


def write_file(entry: Entry, path: Path) -> None:
    """A file in the layout of its program; where the catalogue states a size, it must come out to the byte."""
    if entry.family.endswith("of Darknet"):
        assert entry.size is not None
        values = (
            np.random.default_rng(0).random((entry.size - 20) // 4, dtype=np.float32) * 0.05
        )  # variances: not below 0
        path.write_bytes(struct.pack("<3iQ", 0, 2, 0, 32013312) + values.astype("<f4").tobytes())
        return
    state = OrderedDict(state_of(entry))
    content: Any = state
    if path.suffix == ".pdparams":
        path.write_bytes(pickle.dumps(OrderedDict((name, value.numpy()) for name, value in state.items()), 4))
        return
    if entry.family.startswith("MMDetection"):
        content = {"meta": {"epoch": 273}, "state_dict": state}
    elif entry.family.startswith("YOLOX"):
        content = {"start_epoch": 300, "model": state}
    elif path.suffix == ".tar":
        content = {"state_dict": state, "optimizer": {"state": {}, "param_groups": []}}
    # EfficientDet's are of torch before 1.6, whose files had another container
    torch.save(content, path, _use_new_zipfile_serialization=entry.family != "EfficientDet")
    assert entry.size in (None, path.stat().st_size), "the tensors are not those of the published file"


def replaced_digest(entry: Entry, digest: str) -> str:
    """The catalogue with as many digits of the synthetic file's digest as it knows of the published one's."""
    text = catalogue.CATALOGUE.read_text()
    start = text.index(f"- name: {entry.name}\n")
    known = "null" if entry.sha256 is None else f'"{digest[: len(entry.sha256)]}"'
    return text[:start] + re.sub(r"(?m)^  sha256: .*$", f"  sha256: {known}", text[start:], count=1)


@needs_tools
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == SMALL else pytest.mark.slow) for name in ENTRIES]
)
def test_a_file_from_its_address_to_its_use(
    name: str, served: Path, tmp_path: Path, run_script: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, weights = ENTRIES[name], catalogue.WEIGHTS_DIRECTORY
    path, file = served / entry.file, weights / entry.file
    write_file(entry, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "catalogue.yaml").write_text(replaced_digest(entry, digest))
    monkeypatch.setattr(catalogue, "CATALOGUE", tmp_path / "catalogue.yaml")
    assert read_catalogue(catalogue.CATALOGUE)[name].size == entry.size
    command = ["sh", str(SCRIPT), name]
    variables = {"WEIGHTS_DIRECTORY": str(weights), "WEIGHTS_CATALOGUE": str(catalogue.CATALOGUE)}

    def download(code: int) -> str:
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
        assert done.returncode == code, done.stderr
        return done.stderr

    if entry.by_hand is not None:  # no address; the script checks and pins what a user put there
        monkeypatch.delenv("WEIGHTS_URL")
        assert f"no address gives this file to a program: {entry.by_hand}" in download(1)
        file.hardlink_to(path)
    assert f"{name}: complete" in download(0) and file.samefile(path) == (entry.by_hand is not None)
    pinned = file.with_name(f"{entry.file}.sha256")
    assert pinned.exists() == (len(entry.sha256 or "") != 64)
    assert not pinned.exists() or pinned.read_text() == f"{digest}  {entry.file}\n"
    use(entry, tmp_path, run_script)

    # Another file of the same size: refused by its digest, and nothing is left under its name.
    with open(path, "r+b") as changed:
        changed.seek(path.stat().st_size // 2)
        byte = changed.read(1)[0]
        changed.seek(-1, os.SEEK_CUR)
        changed.write(bytes([byte ^ 1]))
    if entry.by_hand is None:
        file.unlink()
    text = download(1)
    assert f"not {digest}" in text and not file.exists(), text
    with pytest.raises(CheckpointError, match="no address gives" if entry.by_hand else f"not {digest}.*; put "):
        find_weights(name, fetch=True)


def use(entry: Entry, tmp_path: Path, run_script: Callable[..., Any]) -> None:
    """`model.pretrained=NAME` takes every tensor; `detect.py --weights NAME photo.jpg` opens a detector."""
    name = entry.name
    words = [f"{path}={str(value).replace('None', 'null')}" for path, value in needed_settings(name).items()]
    if name.startswith(("mobilenet", "tf_efficientnet")):
        words = [f"model.backbone={name.partition('.')[0]}"]
    cfg = []
    if name in CFGS:
        (tmp_path / "network.cfg").write_text(CFGS[name]())
        cfg, words = ["--cfg", "network.cfg"], ["model.backbone=darknet_cfg", "model.cfg=network.cfg"]
    elif entry.family.endswith("of Darknet"):
        words = ["model.backbone=darknet"]
    settings, _ = load_settings(ARGS, words=[*words, f"model.pretrained={name}"])
    torch.manual_seed(0)
    model: Any = build_detector(settings, 80).model
    part = model if entry.part == "detector" else model.backbone
    before = {key: value.clone() for key, value in part.state_dict().items() if value.is_floating_point()}
    lines = load_pretrained(model, settings.model, [f"class {number}" for number in range(80)])
    assert entry.file in " ".join(lines)
    kept = [key for key, value in part.state_dict().items() if key in before and torch.equal(before[key], value)]
    # The names of the 80 classes are none of the file's, so their outputs start anew.
    assert not [key for key in kept if not is_output(model, part, key)], kept
    del model, part, before

    cv2.imwrite(str(tmp_path / "photo.jpg"), np.full((48, 64, 3), 90, np.uint8))
    confidence = ["--confidence", "0.999999", "evaluation.image_size=256", "run.device=cpu"]
    done = run_script(detect.main, "--weights", name, *cfg, "photo.jpg", "--output", "found", *confidence)
    if entry.part == "backbone":
        assert done.returncode in (2, 7) and done.stderr.count("\n") == 1, done.stderr
        return
    assert done.returncode == 0 and (tmp_path / "found" / "detections.json").is_file(), done.stderr


def is_output(model: Any, part: Any, key: str) -> bool:
    """Whether a tensor is of an output convolution of the detector."""
    if part is not model:
        return False
    return any(part.get_submodule(key.rpartition(".")[0]) is module for module in model.output_convolutions())
