"""`model.pretrained`: the right tensors in the right places, or an error of one line."""

import importlib.util
import urllib.error
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v2, mobilenet_v3_large, mobilenet_v3_small

from detection.checkpoints import save_checkpoint
from detection.config.loading import load_settings
from detection.config.settings import Settings
from detection.errors import CheckpointError, SettingsError, UserError
from detection.models import build_detector, pretrained
from detection.models.darknet.weights import Header, write_darknet_weights
from detection.models.pretrained import load_pretrained
from tests.support.darknet_descriptions import conv, net, output, write_cfg, yolo
from tests.support.paths import ARGS
from tests.support.tiny_models import last_of_each_stride
from tests.support.toy_detector import ToyModel

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
SECOND = ["model.backbone=mobilenet_v2", "yolo.neck_channels=[16, 12, 8]"]
SMALL = ["model.backbone=mobilenet_v3_small", "yolo.neck_channels=[16, 12, 8]"]
LARGE = ["model.backbone=mobilenet_v3_large", "yolo.neck_channels=[16, 12, 8]"]
TIMM = ["model.backbone=timm/test_resnet", "yolo.neck_channels=[16, 12, 8]"]
TINY = ["model.backbone=darknet_tiny", "yolo.neck_channels=[16, 8]", "yolo.anchors=[[[10, 14]], [[81, 82]]]"]
# Names by which torch's hub caches the weights in pytorch.org's list of torchvision models
HUB_NAMES = {
    "v2": "mobilenet_v2-b0353104.pth",
    "small": "mobilenet_v3_small-047dcff4.pth",
    "large": "mobilenet_v3_large-8738ca79.pth",
}


def build(words: list[str], value: Any = False, num_classes: int = 3, seed: int = 0) -> tuple[nn.Module, Settings]:
    settings, _ = load_settings(
        ARGS, words=[*words, f"model.pretrained={str(value).lower() if value is True else value}"]
    )
    torch.manual_seed(seed)
    return build_detector(settings, num_classes).model, settings


def class_names(count: int) -> list[str]:
    return [f"class {label}" for label in range(count)]


def loaded(words: list[str], value: Any, names: Sequence[str] = class_names(3)) -> tuple[nn.Module, list[str]]:
    """A new model of these classes with the weights of `model.pretrained=value`, and the lines that say so."""
    model, settings = build(words, value, len(names))
    return model, load_pretrained(model, settings.model, names)


def refuse(words: list[str], value: Any, error: type[UserError] = CheckpointError, num_classes: int = 3) -> str:
    """Message with which the run ends before its first step; the model is as it was."""
    model, settings = build(words, value, num_classes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error) as raised:
        load_pretrained(model, settings.model, class_names(num_classes))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    message = str(raised.value)
    assert "\n" not in message and len(message) < 700
    return message


def with_noise(module: nn.Module, seed: int = 1) -> nn.Module:
    """Change all tensors, so that a forgotten one is noticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) / 10 + 0.1)
            else:
                tensor.fill_(17)
    return module


def changed(model: nn.Module, words: list[str], num_classes: int = 3) -> set[str]:
    """Names of the tensors that differ from those of a new model."""
    fresh = build(words, num_classes=num_classes)[0].state_dict()
    return {name for name, value in model.state_dict().items() if not torch.equal(value, fresh[name])}


def parts(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_false_loads_nothing() -> None:
    model, lines = loaded(SMALL, False)
    assert lines == [] and not changed(model, SMALL)


# torchvision


@pytest.fixture
def hub(tmp_path: Path, monkeypatch) -> Path:
    """An empty directory of torch's hub on a machine without a network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "urlopen", lambda *_, **__: (_ for _ in ()).throw(urllib.error.URLError("no way")))
    (tmp_path / "torch" / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.mark.parametrize(
    ("words", "size", "network"),
    [(SMALL, "small", mobilenet_v3_small), (LARGE, "large", mobilenet_v3_large), (SECOND, "v2", mobilenet_v2)],
)
def test_standard_weights_of_mobilenet(words: list[str], size: str, network: Any, hub: Path) -> None:
    classifier = with_noise(network(weights=None))
    torch.save(classifier.state_dict(), hub / HUB_NAMES[size])
    model, (line,) = loaded(words, True)
    assert HUB_NAMES[size] in line and "IMAGENET1K_V1" in line
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        maps = model.eval().backbone(images)
    features = classifier.features[: 18 if size == "v2" else None]  # the last one of MobileNetV2 is the classifier's
    for found, expected in zip(maps, last_of_each_stride(features, images), strict=True):
        assert torch.equal(found, expected)
    assert changed(model, words) == {name for name in model.state_dict() if name.startswith("backbone.")}


def test_without_a_network_or_with_a_damaged_download(hub: Path) -> None:
    message = refuse(SMALL, True)
    for word in ("https://download.pytorch.org/models/", HUB_NAMES["small"], "no way", "model.pretrained=FILE"):
        assert word in message
    (hub / HUB_NAMES["small"]).write_bytes(b"not a zip file")
    assert HUB_NAMES["small"] in refuse(SMALL, True)


def test_files_of_a_classifier(tmp_path: Path) -> None:
    state = with_noise(mobilenet_v3_small(weights=None)).state_dict()
    features = {name[len("features.") :]: value for name, value in state.items() if name.startswith("features.")}
    for content in (state, features, {"model": state, "epoch": 3}, {"state_dict": state}):
        torch.save(content, tmp_path / "file.pth")
        model, (line,) = loaded(SMALL, tmp_path / "file.pth")
        assert str(tmp_path / "file.pth") in line and f"{len(features)} tensors" in line
        # the second stage begins with torchvision's layer 4
        assert torch.equal(model.backbone.stages[1][0].block[0][0].weight, state["features.4.block.0.0.weight"])
        assert torch.equal(model.backbone.stages[2][-1][1].running_var, state["features.12.1.running_var"])
        assert parts(changed(model, SMALL)) == {"backbone"}


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    state = mobilenet_v3_small(weights=None).state_dict()
    first = "features.0.0.weight"
    for content, *expected in (
        ({name: value for name, value in state.items() if name != first}, "1 missing: 0.0.weight"),
        (state | {"features.99.weight": torch.zeros(1)}, "1 unknown: 99.weight"),
        (state | {"extra": torch.zeros(1)}, "1 unknown: extra"),
        (state | {first: torch.zeros(16, 3, 5, 5)}, "0.0.weight (16, 3, 5, 5) instead of (16, 3, 3, 3)"),
        (mobilenet_v3_large(weights=None).state_dict(), "missing: ", "unknown: ", "of another shape: "),
        ({"a": 1}, "a checkpoint of another program (with a)"),
        ([1, 2], "a list, saved with torch.save"),
        ({}, "an empty dict", "starts from the state dict of torchvision's classifier"),
        ({"a": Path("x")}, "is a pickled object of another program"),
    ):
        torch.save(content, path)
        message = refuse(SMALL, path)
        for word in (str(path), *expected):
            assert word in message
    assert "does not exist" in refuse(SMALL, tmp_path / "nothing.pth")
    path.write_bytes(b"abc")
    assert str(path) in refuse(SMALL, path)


# Darknet


def test_darknet53_starts_from_the_backbone_file(tmp_path: Path, monkeypatch) -> None:
    words = ["yolo.neck_channels=[16, 12, 8]"]
    monkeypatch.setattr(pretrained, "WEIGHTS_DIRECTORY", tmp_path)
    assert "download_darknet_weights.sh darknet53.conv.74" in refuse(words, True)

    source = with_noise(build(words)[0])
    write_darknet_weights(source, tmp_path / "darknet53.conv.74", Header(), count=52)
    model, lines = loaded(words, True)
    assert any("first 52 of 75 convolutions" in line for line in lines)
    assert parts(changed(model, words)) == {"backbone"}
    for name, tensor in model.backbone.state_dict().items():
        if tensor.is_floating_point():
            assert torch.equal(tensor, source.backbone.state_dict()[name]), name


def test_darknet_file_of_other_classes(tmp_path: Path) -> None:
    source = with_noise(build(TINY, num_classes=7)[0])
    write_darknet_weights(source, tmp_path / "tiny.weights", Header())
    model, lines = loaded(TINY, tmp_path / "tiny.weights")
    message = " ".join(lines)
    assert "7 classes" in message and "network 3" in message and "by position" not in message
    counters = {name for name in model.state_dict() if name.endswith("num_batches_tracked")}
    outputs = {f"heads.{level}.1.{kind}" for level in (0, 1) for kind in ("weight", "bias")}
    assert changed(model, TINY) == set(model.state_dict()) - counters - outputs


def test_classes_of_darknet_files_are_taken_by_position(tmp_path: Path) -> None:
    source = with_noise(build(TINY)[0])
    write_darknet_weights(source, tmp_path / "tiny.weights", Header())
    model, lines = loaded(TINY, tmp_path / "tiny.weights", ["a", "b", "c"])
    assert lines[-1] == "the file has no class names; its classes are taken by position: a, b, c"
    assert torch.equal(model.state_dict()["heads.0.1.weight"], source.state_dict()["heads.0.1.weight"])


def test_darknet_files_need_a_darknet(tmp_path: Path) -> None:
    write_darknet_weights(build(TINY)[0], tmp_path / "tiny.weights", Header())
    assert "darknet_tiny" in refuse(SMALL, tmp_path / "tiny.weights")
    torch.save(mobilenet_v3_small(weights=None).state_dict(), tmp_path / "small.pth")
    assert "model.backbone=darknet_tiny starts from" in refuse(TINY, tmp_path / "small.pth")
    assert "darknet_tiny has no standard weights" in refuse(TINY, True, SettingsError)


# Our own checkpoints


def save_run(path: Path, words: list[str], num_classes: int, average: bool, **changes: Any) -> nn.Module:
    """What a run leaves; returns the network whose weights are to be used."""
    model, settings = build(words, num_classes=num_classes, seed=5)
    best = with_noise(model, 1).state_dict()
    other = with_noise(build(words, num_classes=num_classes)[0], 2).state_dict()
    content = {
        "step": 40,
        "settings": settings.model_dump(mode="json"),
        "categories": {"names": class_names(num_classes), "ids": list(range(num_classes))},
        "model": other if average else best,
        "average": best if average else None,
    }
    save_checkpoint(path, content | changes)
    return model


@pytest.mark.parametrize("average", [False, True])
def test_whole_detector(average: bool, tmp_path: Path) -> None:
    source = save_run(tmp_path / "best.pt", SMALL, 3, average)
    model, (line,) = loaded(SMALL, tmp_path / "best.pt")
    kind = "EMA" if average else "weights"
    assert f"{kind} after 40 steps, 3 classes" in line and str(tmp_path / "best.pt") in line
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


OUTPUTS = {f"heads.{level}.1.{kind}" for level in range(3) for kind in ("weight", "bias")}
OTHER_ANCHORS = "yolo.anchors=[[[9, 9]], [[20, 20], [30, 30]], [[80, 80]]]"


# 3 anchors * (5 + 1) values are as many as 2 anchors * (5 + 4), so shapes alone would not tell
@pytest.mark.parametrize("classes", [3, 5])
def test_other_anchors(classes: int, tmp_path: Path) -> None:
    source = save_run(tmp_path / "best.pt", [*SMALL, OTHER_ANCHORS], classes, average=True)
    model, lines = loaded(SMALL, tmp_path / "best.pt")
    assert len(lines) == 2 and "output convolutions start anew: the file has other anchors" in lines[1]
    assert ("other classes (class 0, class 1, class 2, class 3, class 4)" in lines[1]) == (classes == 5)
    assert changed(model, SMALL) == set(model.state_dict()) - OUTPUTS
    for name in set(model.state_dict()) - OUTPUTS:
        assert torch.equal(model.state_dict()[name], source.state_dict()[name])


NEW = None  # a filter as the new model begins


# The file's classes are cat and dog: 7 filters per anchor, of them 0..4 for box and objectness, 5 for cat, 6 for dog.
@pytest.mark.parametrize(
    ("names", "filters", "words"),
    [
        (["cat", "dog"], [5, 6], []),
        (["dog", "cat"], [6, 5], ["same classes in another order, put into this run's: dog, cat"]),
        (["dog", "bird", "cat"], [6, NEW, 5], ["classes from the file: dog, cat; starting anew: bird"]),
        (["dog"], [6], ["classes from the file: dog; starting anew: none; not used: cat"]),
        (["bird", "dog"], [NEW, 6], ["classes from the file: dog; starting anew: bird; not used: cat"]),
        (
            ["x", "y", "Cat"],
            [NEW, NEW, NEW],
            ["classes from the file: none; starting anew: x, y, Cat; not used: cat, dog"],
        ),
    ],
)
def test_classes_are_taken_by_name(
    names: list[str], filters: list[int | None], words: list[str], tmp_path: Path
) -> None:
    source, settings = build(SMALL, num_classes=2, seed=5)
    state = with_noise(source).state_dict()
    for name in OUTPUTS:
        for number in range(3 * 7):
            state[name][number] = number
    content = {"step": 1, "settings": settings.model_dump(mode="json"), "model": state, "average": None}
    save_checkpoint(tmp_path / "own.pt", content | {"categories": {"names": ["cat", "dog"], "ids": [1, 2]}})
    model, lines = loaded(SMALL, tmp_path / "own.pt", names)
    assert len(lines) == 1 + 2 * len(words) and all(word in lines[1] for word in words)
    rows = [
        f"{label} {name}: {'new' if number is None else f'row {number - 5} of the file'}"
        for label, (name, number) in enumerate(zip(names, filters, strict=True))
    ]
    assert not words or lines[2] == f"  {'; '.join(rows)}"
    fresh = build(SMALL, num_classes=len(names))[0].state_dict()
    expected = [
        NEW if number is None else 7 * anchor + number for anchor in range(3) for number in (*range(5), *filters)
    ]
    for name, value in model.state_dict().items():
        if name not in OUTPUTS:
            assert torch.equal(value, state[name]), name
            continue
        for row, new, number in zip(value, fresh[name], expected, strict=True):
            assert torch.equal(row, new if number is None else torch.full_like(row, number)), name
        if name.endswith("bias") and names[0] == "x":
            assert value[5:8].tolist() == pytest.approx([-0.6931472] * 3)  # of three equal classes: -log(3 - 1)


def test_a_detector_without_class_rows_starts_anew_for_other_classes(tmp_path: Path) -> None:
    """It may lay out its outputs in any way, so only equal names in equal order fit."""
    source, path = with_noise(ToyModel(2)), tmp_path / "toy.pt"
    settings = build(SMALL, path)[1]
    save_run(
        path, SMALL, 2, average=False, model=source.state_dict(), categories={"names": ["cat", "dog"], "ids": [1, 2]}
    )
    for names, taken in ((["cat", "dog"], True), (["dog", "cat"], False), (["cat", "dog", "bird"], False)):
        model = ToyModel(len(names))
        fresh = model.head.weight.clone()
        lines = load_pretrained(model, settings.model, names)
        assert torch.equal(model.head.weight, source.head.weight if taken else fresh)
        assert len(lines) == 2 - taken and (taken or lines[1].endswith("the file has other classes (cat, dog)"))
        assert torch.equal(model.backbone[0][0].weight, source.backbone[0][0].weight)


def test_equal_shapes_of_other_classes_are_not_taken(tmp_path: Path) -> None:
    two = "yolo.anchors=[[[9, 9], [10, 10]], [[20, 20], [30, 30]], [[80, 80], [90, 90]]]"
    save_run(tmp_path / "best.pt", [*SMALL, two], 4, average=False)  # 2 * (5 + 4) filters
    model, lines = loaded(SMALL, tmp_path / "best.pt", class_names(1))  # 3 * (5 + 1) filters
    assert "start anew: the file has other anchors and other classes" in lines[1]
    assert not any(name.startswith("heads.0.1.") for name in changed(model, SMALL, num_classes=1))


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    save_run(path, LARGE, 3, average=False)
    message = refuse(SMALL, path)
    assert "mobilenet_v3_large" in message and "mobilenet_v3_small" in message
    save_run(path, [SMALL[0], "yolo.neck_channels=[24, 12, 8]"], 3, average=False)
    assert "of another shape: neck.0.0.0.weight (24, 576, 1, 1) instead of (16, 576, 1, 1), " in refuse(SMALL, path)
    save_run(path, SMALL, 3, average=False, settings={})
    assert "no settings" in refuse(SMALL, path)
    save_run(path, SMALL, 3, average=False)
    path.write_bytes(path.read_bytes()[:-1000])
    assert "damaged" in refuse(SMALL, path)


# timm


def timm_classifier(**arguments: Any) -> nn.Module:
    import timm

    return with_noise(timm.create_model("test_resnet", **arguments))


@needs_timm
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("num_classes", [1000, 7])
def test_timm_classifier_file(num_classes: int, suffix: str, tmp_path: Path) -> None:
    classifier = timm_classifier(num_classes=num_classes)
    path = tmp_path / f"file{suffix}"
    if suffix == ".pth":
        torch.save(classifier.state_dict(), path)
    else:
        from safetensors.torch import save_file

        save_file(classifier.state_dict(), path)
    model, (line,) = loaded(TIMM, path)
    assert str(path) in line and "timm/test_resnet" in line
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        # the classifier's own last map, in front of its pooling
        expected = classifier.eval().forward_features(images)
        torch.testing.assert_close(model.eval().backbone(images)[-1], expected)
    assert parts(changed(model, TIMM)) == {"backbone"}


@needs_timm
def test_timm_files_that_do_not_fit(tmp_path: Path) -> None:
    state = timm_classifier().state_dict()
    name = next(iter(state))
    for content, expected in (
        ({key: value for key, value in state.items() if key != name}, f"1 missing: {name}"),
        (state | {"extra.weight": torch.zeros(1)}, "1 unknown: extra.weight"),
        (state | {name: torch.zeros(1)}, f"1 of another shape: {name} (1,) instead of"),
    ):
        torch.save(content, tmp_path / "file.pth")
        assert expected in refuse(TIMM, tmp_path / "file.pth")
    for content, expected in ((b"ab\0", "cannot be read"), (b"<html>", "is a web page"), (b"", "is an empty file")):
        (tmp_path / "file.safetensors").write_bytes(content)
        assert f"file.safetensors {expected}" in refuse(TIMM, tmp_path / "file.safetensors")
    assert "nothing.safetensors: does not exist" in refuse(TIMM, tmp_path / "nothing.safetensors")


@needs_timm
def test_timm_standard_weights(tmp_path: Path, monkeypatch) -> None:
    from timm.models import _builder

    state = timm_classifier().state_dict()
    monkeypatch.setattr(_builder, "load_state_dict_from_hf", lambda *_, **__: dict(state))  # what the hub would send
    model, (line,) = loaded(TIMM, True)
    assert "https://huggingface.co/timm/test_resnet" in line
    images = torch.rand(1, 3, 64, 96)
    classifier = timm_classifier().eval()
    with torch.no_grad():
        torch.testing.assert_close(model.eval().backbone(images)[-1], classifier.forward_features(images))

    class HubIsAway(Exception):
        """Such errors share no base."""

    def fail(*_: Any, **__: Any) -> None:
        raise HubIsAway("name resolution\nfailed")

    monkeypatch.setattr(_builder, "load_state_dict_from_hf", fail)
    message = refuse(TIMM, True)
    for word in ("timm/test_resnet", "HubIsAway: name resolution failed", "model.safetensors", "model.pretrained=FILE"):
        assert word in message


def test_a_described_network_has_no_standard_weights(tmp_path: Path) -> None:
    layers = [conv(4, 3, 2, batch_normalize=0), output(18), yolo("0,1,2", "8,8, 9,9, 20,20", 1)]
    (tmp_path / "a.cfg").write_text(write_cfg([net(64), *layers]))
    words = ["model.backbone=darknet_cfg", f"model.cfg={tmp_path / 'a.cfg'}"]
    assert "darknet_cfg has no standard weights" in refuse(words, True, SettingsError)
    # a checkpoint of the same description for other classes
    source = save_run(tmp_path / "best.pt", words, 4, average=False)
    model, lines = loaded(words, tmp_path / "best.pt", ["class 2"])
    assert "4 classes" in lines[0] and "classes from the file: class 2; starting anew: none" in lines[1]
    assert torch.equal(model.state_dict()["backbone.0.0.weight"], source.state_dict()["backbone.0.0.weight"])
    (new,), (old,) = model.output_convolutions(), source.output_convolutions()
    assert torch.equal(new.bias, old.bias[[9 * anchor + value for anchor in range(3) for value in (0, 1, 2, 3, 4, 7)]])
