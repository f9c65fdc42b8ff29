"""EfficientNet against published counts, timm and torchvision; its weights in one form and refused in the other."""

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import efficientnet_b0, efficientnet_b5, resnet50

from detection.checkpoints import save_checkpoint
from detection.config.loading import load_settings
from detection.config.settings import BACKBONE_NAMES, DARKNET_CFG
from detection.errors import CheckpointError, SettingsError
from detection.models import build_detector
from detection.models.backbones import BACKBONES
from detection.models.backbones.efficientnet import (
    BlockShape,
    InvertedBlock,
    scale_channels,
    tensorflow_efficientnet,
    torchvision_efficientnet,
)
from detection.models.pretrained import load_pretrained
from tests.support.efficientdet_reference import random_state
from tests.support.paths import ARGS

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
NAMES = ["cat", "dog"]
SMALL_NECK = "yolo.neck_channels=[16, 12, 8]"


def load(backbone: str, value: Any, *more: str, seed: int = 0) -> tuple[Any, list[str]]:
    """A detector whose `model.pretrained` is the value, and the lines about it."""
    settings, _ = load_settings(
        ARGS, words=[f"model.backbone={backbone}", SMALL_NECK, *more, f"model.pretrained={value}"]
    )
    torch.manual_seed(seed)
    model: Any = build_detector(settings, 2).model
    return model, load_pretrained(model, settings.model, NAMES)


def refuse(backbone: str, value: Any, *more: str, error: type[Exception] = CheckpointError) -> str:
    with pytest.raises(error) as raised:
        load(backbone, value, *more)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def random_values(module: nn.Module) -> nn.Module:
    """Seeded values, moderate in a deep network."""
    module.load_state_dict(random_state({name: tuple(value.shape) for name, value in module.state_dict().items()}))
    return module.eval()


# The network


def test_rounding_of_channels() -> None:
    """By hand: 32 * 1.1 = 35.2 -> 32 (above 31.7); 16 * 1.4 = 22.4 -> 24; 24 * 1.4 = 33.6 -> 32; 9.6 -> 16."""
    assert [scale_channels(*pair) for pair in ((32, 1.1), (16, 1.4), (24, 1.4), (8, 1.2))] == [32, 24, 32, 16]


def test_every_name_of_the_settings_is_there() -> None:
    assert {*BACKBONES, DARKNET_CFG} == set(BACKBONE_NAMES)


@needs_timm
@pytest.mark.parametrize("form", ["", "tf_"])
def test_features_are_timms(form: str) -> None:
    import timm

    other = random_values(timm.create_model(f"{form}efficientnet_b0", features_only=True, out_indices=(2, 3, 4)))
    ours = BACKBONES[f"{form}efficientnet_b0"]().eval()
    ours.load_state_dict(other.state_dict(), strict=True)
    for size in ((64, 96), (75, 93)):
        images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            for found, expected in zip(ours(images), other(images), strict=True):
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
                assert expected.std() > 0.01


def test_forms_differ_in_padding_and_batch_norm_only() -> None:
    with torch.device("meta"):
        pair = tensorflow_efficientnet(0), torchvision_efficientnet(0)
    tensors = [{name: value.shape for name, value in one.state_dict().items()} for one in pair]
    assert tensors[0] == tensors[1] and [kinds_of_norm(one) for one in pair] == [{(1e-3, 0.01)}, {(1e-5, 0.1)}]


def kinds_of_norm(module: nn.Module) -> set[tuple[float, float | None]]:
    return {(norm.eps, norm.momentum) for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)}


def test_shares_of_drop_connect() -> None:
    """0.2 * block / blocks, of 23 blocks in B1; none in B0."""
    with torch.device("meta"):
        shares = [block.drop_connect for stage in tensorflow_efficientnet(1).blocks for block in stage]
        none = [block.drop_connect for stage in tensorflow_efficientnet(0).blocks for block in stage]
    assert shares == pytest.approx([0.2 * block / 23 for block in range(23)]) and none == [0] * 16


def test_drop_connect_skips_images_by_the_global_generator() -> None:
    block = InvertedBlock(BlockShape(4, 4, 3, 1, 6), True, nn.BatchNorm2d, 0.25).train()
    x, state = torch.randn(400, 4, 3, 3), torch.get_rng_state()
    with torch.no_grad():
        own = block.transform(x)
        found, after = block(x), torch.get_rng_state()
        torch.set_rng_state(state)
        assert torch.equal(block(x), found) and torch.equal(torch.get_rng_state(), after)
        assert not torch.equal(block(x), found)
        skipped = (found == x).flatten(1).all(1)
        assert 60 <= skipped.sum() <= 140  # 100 expected, deviation 8.7
        torch.testing.assert_close(found[~skipped], (x + own / 0.75)[~skipped])
        torch.testing.assert_close(block.eval()(x), x + block.transform(x))


def test_yolox_with_either_form() -> None:
    for backbone in ("tf_efficientnet_b0", "resnet50"):
        words = ["model.detector=yolox", f"model.backbone={backbone}", "yolox.neck_channels=[24, 16, 8]"]
        settings, _ = load_settings(ARGS, words=[*words, "yolox.head_channels=8"])
        model = build_detector(settings, 3).model.eval()
        with torch.no_grad():
            outputs = model(torch.rand(1, 3, 64, 64))
        assert [tuple(output.shape) for output in outputs] == [(1, 1, side, side, 8) for side in (8, 4, 2)]


# Weights


def maps_of(features: nn.Module, images: Tensor) -> list[Tensor]:
    """torchvision's maps after the layers 3, 5 and 7."""
    maps = []
    with torch.no_grad():
        for number, layer in enumerate(features[:8]):
            images = layer(images)
            maps += [images] * (number in (3, 5, 7))
    return maps


def test_torchvision_file(tmp_path: Path) -> None:
    classifier, path = random_values(efficientnet_b0(weights=None)), tmp_path / "file.pth"
    torch.save(classifier.state_dict(), path)
    model, (line,) = load("efficientnet_b0", path)
    kept = sum(not name.startswith(("features.8.", "classifier.")) for name in classifier.state_dict())
    assert str(path) in line and f"{kept} tensors" in line
    images = torch.rand(1, 3, 64, 75, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model.eval().backbone(images)
    for own, expected in zip(found, maps_of(classifier.features, images), strict=True):
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-5)
    message = refuse("tf_efficientnet_b0", path)
    assert (
        "symmetric padding, batch norm epsilon 1e-05" in message and "SAME padding, batch norm epsilon 0.001" in message
    )
    assert "of another shape" in refuse("efficientnet_b2", path)
    assert "starts from the state dict of torchvision's classifier" in refuse("efficientnet_b0", write(path, {"a": 1}))
    assert "of torchvision" not in refuse("tf_efficientnet_b0", write(path, {"a": torch.zeros(1)}))


def write(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def test_torchvisions_larger_networks_have_the_same_names_and_batch_norm() -> None:
    with torch.device("meta"):
        other, ours = efficientnet_b5(weights=None), torchvision_efficientnet(5)
    names = {f"features.{name}" for name in ours.torchvision_names()}
    assert kinds_of_norm(ours) == kinds_of_norm(other) == {(1e-3, 0.01)}
    assert names == {name for name in other.state_dict() if not name.startswith(("features.8.", "classifier."))}


def test_resnet_file(tmp_path: Path) -> None:
    """Its maps are torchvision's, see `test_retinanet_is_torchvisions`."""
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in resnet50(weights=None).state_dict().items()}
    state = random_state(shapes)
    model, (line,) = load("resnet50", write(tmp_path / "resnet.pth", state))
    assert "318 tensors" in line and "fc.weight" in state  # 53 convolutions, 53 batch norms of five tensors
    assert torch.equal(model.backbone.stages[2][-1].conv3.weight, state["layer4.2.conv3.weight"])
    assert torch.equal(model.backbone.stages[0].stem.bn1.running_mean, state["bn1.running_mean"])


def test_standard_weights_come_from_torchvision(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    state = random_values(efficientnet_b0(weights=None)).state_dict()
    # the name in pytorch.org's list of torchvision models
    torch.save(state, tmp_path / "hub" / "checkpoints" / "efficientnet_b0_rwightman-7f5810bc.pth")
    model, (line,) = load("efficientnet_b0", "true")
    assert "IMAGENET1K_V1" in line
    assert torch.equal(model.backbone.conv_stem.weight, state["features.0.0.weight"])


@functools.cache
def timm_state() -> dict[str, Tensor]:
    """The layout of timm's classifiers, which both forms share; the last layers by their published shapes."""
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in tensorflow_efficientnet(0).state_dict().items()}
    last = {"conv_head.weight": (1280, 320, 1, 1), "bn2.weight": (1280,), "classifier.bias": (7,)}
    return random_state(shapes | last)


@pytest.mark.parametrize(
    ("name", "backbone", "expected"),
    [
        ("tf_efficientnet_b0-0af12548.pth", "tf_efficientnet_b0", "a classifier timm/tf_efficientnet_b0"),
        ("efficientnet_b0_ra-3dd342df.pth", "efficientnet_b0", "a classifier timm/efficientnet_b0"),
        ("file.pth", "tf_efficientnet_b0", "nothing says whether it is of this form (SAME padding"),
        ("file.pth", "efficientnet_b0", "nothing says whether it is of this form (symmetric padding"),
    ],
)
def test_timm_file_of_the_same_form(name: str, backbone: str, expected: str, tmp_path: Path) -> None:
    state = timm_state()
    model, (line,) = load(backbone, write(tmp_path / name, state))
    assert expected in line and ("nothing says" in line) == (name == "file.pth")
    assert all(torch.equal(value, state[key]) for key, value in model.backbone.state_dict().items())


@pytest.mark.parametrize(
    ("name", "backbone", "expected"),
    [
        ("tf_efficientnet_b0-0af12548.pth", "efficientnet_b0", "form (SAME padding, batch norm epsilon 0.001) is not"),
        ("efficientnet_b0_ra-3dd342df.pth", "tf_efficientnet_b0", "form (symmetric padding, batch norm epsilon 1e-05)"),
        (
            "tf_efficientnet_b0_ap-f262efe1.pth",
            "tf_efficientnet_b0",
            "pixels of mean 0.5 0.5 0.5; the backbone has 0.4",
        ),
    ],
)
def test_timm_file_of_another_form(name: str, backbone: str, expected: str, tmp_path: Path) -> None:
    assert expected in refuse(backbone, write(tmp_path / name, timm_state()))


@needs_timm
def test_the_hubs_description_beside_a_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(timm_state(), tmp_path / "model.safetensors")
    pixels = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    for architecture in ("tf_efficientnet_b0", "efficientnet_b0"):
        described = {"architecture": architecture, "pretrained_cfg": pixels}
        (tmp_path / "config.json").write_text(json.dumps(described))
        other = "tf_efficientnet_b0" if architecture == "efficientnet_b0" else "efficientnet_b0"
        assert architecture in load(architecture, tmp_path / "model.safetensors")[1][0]
        assert f"is of {architecture}; its form" in refuse(other, tmp_path / "model.safetensors")


@needs_timm
def test_standard_weights_of_tensorflows_form_come_from_timm(monkeypatch) -> None:
    import timm
    from timm.models import _builder

    state = random_values(timm.create_model("tf_efficientnet_b0")).state_dict()
    monkeypatch.setattr(_builder, "load_state_dict_from_hf", lambda *_, **__: dict(state))  # what the hub would send
    model, (line,) = load("tf_efficientnet_b0", "true")
    assert "https://huggingface.co/timm/tf_efficientnet_b0" in line
    assert torch.equal(model.backbone.bn1.running_var, state["bn1.running_var"])


def test_a_detector_that_changes_the_form_cannot_take_the_weights(tmp_path: Path) -> None:
    path = write(tmp_path / "tf_efficientnet_b0.pth", timm_state())
    yolox = ("model.detector=yolox", "yolox.neck_channels=[24, 16, 8]", "yolox.head_channels=8")
    load("tf_efficientnet_b0", path, *yolox, "yolox.batch_norm_epsilon=0.001")  # the weights' own
    for word, expected in (
        (
            "yolox.batch_norm_epsilon=0.00001",
            "needs BatchNorm2d with epsilon 0.001 in the backbone, which has BatchNorm2d",
        ),
        ("model.batch_norm=darknet", "which has DarknetBatchNorm2d"),
        ("yolox.pixels=bgr255", "needs RGB in 0..1 with mean 0.485 0.456 0.406"),
    ):
        assert expected in refuse("tf_efficientnet_b0", path, *yolox, word)


def test_a_checkpoint_records_the_form(tmp_path: Path) -> None:
    settings, _ = load_settings(ARGS, words=["model.backbone=tf_efficientnet_b0", SMALL_NECK])
    model = build_detector(settings, 2).model
    content = {"step": 1, "settings": settings.model_dump(mode="json"), "average": None, "model": model.state_dict()}
    save_checkpoint(tmp_path / "own.pt", content | {"categories": {"names": NAMES, "ids": [1, 2]}})
    assert "has the backbone tf_efficientnet_b0, this run efficientnet_b0" in refuse(
        "efficientnet_b0", tmp_path / "own.pt"
    )
    load("tf_efficientnet_b0", tmp_path / "own.pt")


def test_without_timm(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    assert "need the package timm" in refuse("tf_efficientnet_b0", "true", error=SettingsError)
