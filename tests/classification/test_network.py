"""Classifiers, their loss, and their backbone in a detector."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detection.checkpoints import save_checkpoint
from detection.classification.evaluation import ClassEvaluation, draw_class_confusion
from detection.classification.network import SIMPLE_CNN, ClassLoss, LikeliestClass, build_classifier
from detection.config.settings import Settings
from detection.errors import CheckpointError, SettingsError
from detection.models import build_detector
from detection.models.own_classifier import CLASSIFIER, form_of
from detection.models.pretrained import OF_BACKBONE, detector_of, load_pretrained, needed_settings

SMALL = ("model.width=0.25", "model.depth=0.1")


def test_simple_cnn_has_the_parameters_of_its_source(default_settings: Callable[..., Settings]) -> None:
    detector = build_classifier(default_settings("train.image_size=32", "evaluation.image_size=32"), 10, SIMPLE_CNN)
    # 5 * 5 * 3 * 6 + 6, 5 * 5 * 6 * 16 + 16, 400 * 120 + 120, 120 * 84 + 84, 84 * 10 + 10
    assert sum(p.numel() for p in detector.model.parameters()) == 456 + 2416 + 48120 + 10164 + 850
    images = torch.full((2, 3, 32, 32), 255, dtype=torch.uint8)
    assert detector.model(images).shape == (2, 10)
    assert detector.model.normalize(images).unique().tolist() == [1.0]  # (1 - 0.5) / 0.5
    with pytest.raises(SettingsError, match="must be 32"):
        build_classifier(default_settings(), 10, SIMPLE_CNN)


@pytest.mark.parametrize("name", ["darknet", "darknet_tiny", "mobilenet_v3_small", "efficientnet_b0", "resnet50"])
def test_a_classifier_of_every_kind_of_backbone(default_settings: Callable[..., Settings], name: str) -> None:
    words = SMALL if name == "darknet" else ()
    model = build_classifier(default_settings(f"model.backbone={name}", *words), 5, None).model.eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        logits = model(images)
        single = model(images[1:])
        coarsest = model.backbone(model.normalize(images))[-1]
    assert logits.shape == (2, 5)
    torch.testing.assert_close(logits[1:], single, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits, model.head(coarsest.flatten(2).mean(2)), rtol=1e-3, atol=1e-4)


def test_the_loss_is_the_mean_over_the_images_that_are_left() -> None:
    logits = torch.tensor([[0.0, 0.0], [3.0, 0.0], [9.0, 1.0]])
    labels = torch.tensor([[0, -1], [1, -1], [-1, -1]])  # the third image lost its box
    expected = (np.log(2) + np.log(1 + np.exp(3.0))) / 2
    assert ClassLoss()(logits, {"labels": labels})["loss_class"].item() == pytest.approx(expected, rel=1e-6)
    none = ClassLoss()(logits[2:], {"labels": labels[2:]})["loss_class"]
    assert none.item() == 0


def test_the_likeliest_class() -> None:
    found = LikeliestClass()(torch.tensor([[0.0, 0.0, np.log(2.0)]]))[0]
    assert found["labels"].tolist() == [2] and found["scores"].item() == pytest.approx(0.5)


def test_top1_confusion_and_mistakes() -> None:
    made = ClassEvaluation(np.array([0, 1, 1, 2]), np.array([0, 2, 0, 2]), np.array([0.9, 0.5, 0.8, 0.7]), 0.0)
    assert made.top1 == 0.5 and made.mistakes().tolist() == [2, 1]
    assert made.confusion(3).tolist() == [[1, 0, 0], [1, 0, 1], [0, 0, 1]]
    picture = draw_class_confusion(made.confusion(3), ["a", "b", "c"])
    assert picture.dtype == np.uint8 and picture.shape[2] == 3


def save_classifier(path: Path, settings: Settings, **changes: Any) -> Any:
    """Write what classify.py writes; returns the model."""
    model = build_classifier(settings, 4, None).model
    content = {
        "step": 7,
        "settings": settings.model_dump(mode="json"),
        "categories": {"names": list("abcd"), "ids": [0, 1, 2, 3]},
        "model": model.state_dict(),
        "average": None,
        CLASSIFIER: {"network": None, "crops": False, "form": form_of(model), "top1": 0.5},
        "needs": {f"model.{name}": getattr(settings.model, name) for name in OF_BACKBONE},
    }
    save_checkpoint(path, content | changes)
    return model


@pytest.mark.parametrize("detector", ["yolo", "yolox"])
@pytest.mark.parametrize("name", ["darknet", "mobilenet_v3_small", "efficientnet_b0"])
def test_a_detector_has_the_features_of_its_classifier(
    tmp_path: Path, default_settings: Callable[..., Settings], name: str, detector: str
) -> None:
    words = [f"model.backbone={name}", *(SMALL if name == "darknet" else ())]
    path = tmp_path / "best.pt"
    classifier = save_classifier(path, default_settings(*words)).eval()
    assert needed_settings(str(path))["model.backbone"] == name and detector_of(str(path)) is None
    settings = default_settings(*words, f"model.pretrained={path}", f"model.detector={detector}")
    model = build_detector(settings, 2).model.eval()
    (line,) = load_pretrained(model, settings.model, ["x", "y"])
    assert "top-1 0.500" in line and "2 tensors of its last layer left out" in line
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        pairs = zip(
            classifier.backbone(classifier.normalize(images)), model.backbone(model.normalize(images)), strict=True
        )
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.backbone=mobilenet_v3_small"], "has the backbone darknet, this run mobilenet_v3_small"),
        (["model.width=0.5", "model.depth=0.1"], "has the width 0.25, this run 0.5"),
        ([*SMALL, "model.leaky_slope=0.01"], "has the leaky_slope 0.1, this run 0.01"),
        ([*SMALL, "model.pixel_scaling=imagenet"], "pixels must be RGB 0..1, mean 0 0 0"),
        ([*SMALL, "model.detector=yolox", "yolox.pixels=bgr255"], "is BGR 0..255"),
        ([*SMALL, "model.batch_norm=darknet"], "batch norm must be BatchNorm2d with epsilon 1e-05"),
        ([*SMALL, "model.detector=yolox", "yolox.batch_norm_epsilon=1e-3"], "is BatchNorm2d with epsilon 0.001"),
    ],
)
def test_another_form_is_one_line(
    tmp_path: Path, default_settings: Callable[..., Settings], words: list[str], message: str
) -> None:
    path = tmp_path / "best.pt"
    save_classifier(path, default_settings(*SMALL))
    settings = default_settings(*words, f"model.pretrained={path}")
    model = build_detector(settings, 2).model
    with pytest.raises(CheckpointError, match=message) as error:
        load_pretrained(model, settings.model, ["x", "y"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("part", "name"), [("padding", "efficientnet_b0"), ("activations", "mobilenet_v3_small")])
def test_padding_and_activation_are_compared(
    tmp_path: Path, default_settings: Callable[..., Settings], part: str, name: str
) -> None:
    # In practice the names of the backbones differ already; here a stored form alone does.
    path = tmp_path / "best.pt"
    own = default_settings(f"model.backbone={name}")
    form = form_of(build_classifier(own, 4, None).model)
    assert form[part]
    form[part] = form[part][1:]
    save_classifier(path, own, **{CLASSIFIER: {"network": None, "form": form, "top1": None}})
    settings = default_settings(f"model.backbone={name}", f"model.pretrained={path}").model
    with pytest.raises(CheckpointError, match=f"{part} must be"):
        load_pretrained(build_detector(own, 2).model, settings, ["x", "y"])


def test_a_simple_cnn_starts_no_detector(tmp_path: Path, default_settings: Callable[..., Settings]) -> None:
    path = tmp_path / "best.pt"
    save_classifier(path, default_settings(*SMALL), **{CLASSIFIER: {"network": SIMPLE_CNN}})
    settings = default_settings(*SMALL, f"model.pretrained={path}")
    with pytest.raises(CheckpointError, match="network simple_cnn, which is no backbone"):
        load_pretrained(build_detector(settings, 2).model, settings.model, ["x", "y"])
