"""Weights of other programs in use: opened, converted, fine-tuned, and by a name of the catalogue."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import convert_weights
from detection.config.loading import load_settings
from detection.errors import CheckpointError, SettingsError
from detection.inference.weights import OpenedDetector, open_weights
from detection.models import build_detector, catalogue
from detection.models.importers import read_checkpoint
from detection.models.pretrained import load_pretrained
from detection.training.automatic import load_run_settings
from tests.support import foreign_networks as foreign
from tests.support.paths import ARGS

WORDS = ["model.backbone=mobilenet_v3_small", "yolo.neck_channels=[288, 144, 72]", "yolo.output_kernels=[1, 3, 1]"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint.pth.tar of the research repository."""
    state = foreign.with_second_names(foreign.synthetic_file(foreign.research_mobilenet_small, 4))
    path = tmp_path_factory.mktemp("weights") / "checkpoint.pth.tar"
    torch.save({"state_dict": state, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4, "params": [0]}]}}, path)
    return path


@pytest.fixture(scope="module")
def state(file: Path) -> dict[str, Tensor]:
    return torch.load(file, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def converted(file: Path) -> Path:
    path = file.with_name("own.pt")
    run_convert(file, "--output", path)
    return path


def run_convert(*words: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["convert_weights.py", *map(str, words)])
        convert_weights.main()


def detections(opened: OpenedDetector, images: Tensor) -> tuple[Tensor, Tensor]:
    """All boxes and scores before any selection."""
    with torch.no_grad():
        return opened.detector.postprocess.decode(opened.detector.model(images))


def test_opened_directly_and_converted(file: Path, converted: Path, state: dict[str, Tensor]) -> None:
    images = foreign.images_of(64)
    direct, own = open_weights(file, None, None, ARGS), open_weights(converted, None, None, ARGS)
    with torch.no_grad():
        outputs = foreign.research_mobilenet_small(foreign.File(state), images)
    # the rule of the research repository: the score is the objectness, the class the likeliest one
    objectness = torch.cat([level[..., 4].flatten(1) for level in outputs], 1).sigmoid()
    for opened in (direct, own):
        assert opened.names is not None and opened.names[:2] == ("person", "bicycle")
        assert opened.category_ids is not None and opened.category_ids[-1] == 90
        assert (opened.settings.evaluation.image_size, opened.settings.yolo.score) == (416, "objectness")
        boxes, scores = detections(opened, images)
        found = scores.sum(-1).sort().values  # predictions have an order of ours
        torch.testing.assert_close(found, objectness.sort().values, rtol=0, atol=1e-4)
        assert (scores > 0).sum() == objectness.numel() and boxes.shape == (1, objectness.numel(), 4)
        assert any("YOLOv3 of the research repository" in line for line in opened.lines)
        assert any("91 classes in the file, of which 80" in line for line in opened.lines)
    torch.testing.assert_close(detections(direct, images), detections(own, images), rtol=0, atol=0)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """timm's Darknet-53."""
    path = tmp_path_factory.mktemp("timm") / "darknet53.pth"
    torch.save(foreign.synthetic_file(foreign.timm_darknet53, 1), path)
    return path


def test_convert_refuses(file: Path, converted: Path, backbone: Path, tmp_path: Path) -> None:
    names = tmp_path / "two.names"
    names.write_text("a\nb\n")
    unknown = tmp_path / "unknown.pth"
    torch.save({"layer.weight": torch.ones(2)}, unknown)
    for words, error, text in (
        ([file, "--output", converted], SettingsError, "exists already"),
        ([converted, "--output", tmp_path / "x.pt"], CheckpointError, "a checkpoint of this program already"),
        ([file, "--output", tmp_path / "x.pt", "--names", names], SettingsError, "has 2 names, the weights 80 classes"),
        ([backbone, "--output", tmp_path / "x.pt"], CheckpointError, "a backbone only"),
        ([unknown], CheckpointError, "in no format"),
        (["yolox_darknet53.pth"], CheckpointError, "does not exist"),
    ):
        with pytest.raises(error, match=text):
            run_convert(*words)
    assert not (tmp_path / "x.pt").exists()
    with pytest.raises(CheckpointError, match=r"holds a backbone only .timm's Darknet-53.; it starts a training"):
        read_checkpoint(backbone)


def load(path: Path, names: Sequence[str], *words: str) -> tuple[dict[str, Tensor], list[str]]:
    settings, _ = load_settings(ARGS, words=[*WORDS, *words, f"model.pretrained={path}"])
    torch.manual_seed(0)
    model = build_detector(settings, len(names)).model
    lines = load_pretrained(model, settings.model, names)
    return model.state_dict(), lines


@pytest.mark.parametrize("kind", ["direct", "converted"])
def test_rows_of_classes_of_equal_names(kind: str, file: Path, converted: Path, state: dict[str, Tensor]) -> None:
    """Own classes dog (COCO's category id 18, label 16), bird (16, 14) and one that COCO lacks."""
    own, lines = load(file if kind == "direct" else converted, ["dog", "newt", "bird"])
    bias = state["conv_s3.bias"].view(3, 96)  # per anchor: box, objectness, a score per category id; finest level
    given = own["heads.2.1.bias"].view(3, 8)
    assert torch.equal(given[:, :5], bias[:, :5])
    assert torch.equal(given[:, 5], bias[:, 5 + 18]) and torch.equal(given[:, 7], bias[:, 5 + 16])
    assert given[:, 6].tolist() == pytest.approx([-0.6931472] * 3)  # the prior of three classes, -log(3 - 1)
    assert lines[-1] == "  0 dog: row 16 of the file; 1 newt: new; 2 bird: row 14 of the file"


def test_a_network_that_differs_is_refused(file: Path, converted: Path) -> None:
    for path in (file, converted):
        with pytest.raises(CheckpointError, match="has the backbone mobilenet_v3_small, this run mobilenet_v3_large"):
            load(path, ["dog"], "model.backbone=mobilenet_v3_large")
    _, lines = load(file, ["dog"], "yolo.output_kernels=null")
    assert "start anew: the file has output convolutions of another size" in lines[-1]


def test_slope_and_pixels_must_be_those_of_the_weights(backbone: Path) -> None:
    needed = ("model.leaky_slope=0.01", "model.pixel_scaling=imagenet")
    for words, text in (
        (needed[1:], "has the leaky_slope 0.01, this run 0.1"),
        (needed[:1], r"the mean of the pixels \(model.pixel_scaling\) must be \(0.485, "),
    ):
        settings, _ = load_settings(ARGS, words=[*words, f"model.pretrained={backbone}"])
        with torch.device("meta"):
            model = build_detector(settings, 2).model
        with pytest.raises(CheckpointError, match=text):
            load_pretrained(model, settings.model, ["a", "b"])


def test_the_network_of_a_run_follows_its_weights(file: Path, converted: Path, tmp_path: Path) -> None:
    """Below overlays and words, which may say otherwise."""
    data = "data.root=/nonexistent"
    for path in (file, converted):
        settings, notices = load_run_settings([], [data, f"model.pretrained={path}"])
        assert (settings.model.backbone, settings.yolo.neck_channels) == ("mobilenet_v3_small", (288, 144, 72))
        assert settings.yolo.output_kernels == (1, 3, 1) and settings.train.image_size == 416
        assert f"model.pretrained={path}: model.backbone = mobilenet_v3_small" in notices
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(f"model: {{pretrained: {file}, fill: [1, 2, 3]}}")
    settings, _ = load_run_settings([overlay], [data, "yolo.output_kernels=null"])
    assert settings.model.fill == (1, 2, 3) and settings.yolo.output_kernels is None
    assert settings.model.backbone == "mobilenet_v3_small"


def test_a_name_of_the_catalogue(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "WEIGHTS_DIRECTORY", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"240224_LambdaLR: no address .* put 240224_LambdaLR\.pth\.tar into"):
        open_weights(Path("240224_LambdaLR"), None, None, ARGS)
    with pytest.raises(CheckpointError, match=r"fetch it with: models/weights/download_weights\.sh yolox_darknet53"):
        open_weights(Path("yolox_darknet53"), None, None, ARGS)
    (tmp_path / "240224_LambdaLR.pth.tar").symlink_to(file)
    assert open_weights(Path("240224_LambdaLR"), None, None, ARGS).settings.evaluation.image_size == 416
    assert catalogue.find_weights("some/240224_LambdaLR") == Path("some/240224_LambdaLR")
