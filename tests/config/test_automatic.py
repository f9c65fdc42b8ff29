"""Values that say auto: durations by hand, and the table of what a device, a backbone and a dataset get."""

from typing import Any

import pytest

from detection.config.automatic import Facts, ema_decay, evaluation_steps, fill_in, scale_anchors, warmup_steps
from detection.config.loading import leaf_items, merge_settings
from tests.support.paths import ARGS, REPOSITORY


@pytest.mark.parametrize(
    ("total", "epoch", "expected"),
    [
        (10_000, 200.0, 200),  # one epoch
        (10_000, 12.8, 50),  # at least 50 steps
        (300, 12.8, 30),  # at most a tenth of the run
        (5, 1.0, 0),
    ],
)
def test_warmup_by_hand(total: int, epoch: float, expected: int) -> None:
    assert warmup_steps(total, epoch) == expected


@pytest.mark.parametrize(
    ("total", "epoch", "expected"), [(1000, 10.0, 50), (1001, 10.0, 51), (1000, 80.4, 80), (3, 0.4, 1)]
)
def test_about_twenty_evaluations_and_an_epoch_between_them(total: int, epoch: float, expected: int) -> None:
    assert evaluation_steps(total, epoch) == expected


@pytest.mark.parametrize(("total", "horizon"), [(50, 10), (520, 20.8), (4400, 176), (50_000, 2000)])
def test_the_average_covers_four_percent_of_the_steps(total: int, horizon: float) -> None:
    assert 1 / (1 - ema_decay(total)) == pytest.approx(horizon)


def filled(*words: str, **facts: Any) -> tuple[dict[str, Any], list[str]]:
    tree, _, given = merge_settings(ARGS, [REPOSITORY / "recipes" / "own_data.yaml"], words)
    known = Facts(
        **{
            "accelerated": False, "cores": 16, "images": 1000, "names": ("cat",), "has_weights": lambda backbone: False,
            "fit_anchors": lambda tree: (None, "kept"), "given": tuple(given), "needs_anchors": False,
            "detector_of": lambda file: None, **facts,
        }
    )  # fmt: skip
    lines = fill_in(tree, merge_settings(ARGS)[0], known)
    return dict(leaf_items(tree)), lines


@pytest.mark.parametrize(
    ("words", "facts", "expected"),
    [
        ((), {}, {"model.backbone": "darknet", "model.width": 0.25, "model.depth": 0.34, "model.pretrained": False}),
        ((), {}, {"yolo.neck_channels": [128, 96, 64], "yolox.neck_channels": [128, 96, 64]}),
        (("model.pretrained=true",), {}, {"model.backbone": "mobilenet_v3_small", "model.width": 1.0}),
        (("model.pretrained=true",), {}, {"yolox.neck_channels": [128, 96, 64], "train.learning_rate": 2e-3}),
        (("model.width=0.5",), {}, {"model.backbone": "darknet", "model.width": 0.5, "model.depth": 0.34}),
        (("model.backbone=darknet",), {}, {"model.width": 1.0, "model.depth": 1.0, "train.learning_rate": 1e-3}),
        ((), {"accelerated": True}, {"model.width": 1.0, "model.depth": 1.0}),
        ((), {}, {"train.image_size": 320, "evaluation.image_size": 320, "train.learning_rate": 2e-3}),
        ((), {"accelerated": True}, {"model.backbone": "darknet", "yolo.neck_channels": [512, 256, 128]}),
        ((), {"accelerated": True}, {"train.image_size": 416, "train.learning_rate": 1e-3, "data.num_workers": 8}),
        (("model.backbone=darknet",), {}, {"yolo.neck_channels": [512, 256, 128], "train.image_size": 320}),
        ((), {}, {"model.detector": "yolox", "yolox.head_channels": 64}),
        (("model.backbone=darknet_cfg",), {}, {"model.detector": "yolo"}),
        (("yolo.loss=ciou",), {}, {"model.detector": "yolo", "yolo.anchor_match": "best", "yolo.box_weight": 1.0}),
        (("yolo.anchors=auto",), {}, {"yolo.loss": "multi", "yolo.anchor_match": "iou", "yolo.box_weight": 5.0}),
        ((), {}, {"yolo.loss": "darknet", "yolo.objectness_target": "one", "yolo.anchor_iou": 0.213}),
        (("yolo.loss=ciou", "model.detector=yolox"), {}, {"model.detector": "yolox"}),
        (("model.pretrained=a.pt",), {"detector_of": {"a.pt": "yolo"}.get}, {"model.detector": "yolo"}),
        (("model.pretrained=a.weights",), {}, {"model.detector": "yolo"}),
        (("model.pretrained=a.conv.74",), {}, {"model.detector": "yolox"}),
        (("train.image_size=96",), {}, {"evaluation.image_size": 96}),
        (("model.backbone=darknet_tiny",), {}, {"yolo.neck_channels": [256, 128]}),
        (("model.width=0.25",), {"accelerated": True}, {"yolo.neck_channels": [128, 64, 32]}),
        (("model.depth=0.33",), {"accelerated": True, "has_weights": bool}, {"model.pretrained": False}),
        ((), {}, {"data.augmentation.horizontal_flip.p": 0.5}),
        ((), {"names": ("car", "turn left")}, {"data.augmentation.horizontal_flip.p": 0.0}),
        ((), {"names": ("leftover", "7")}, {"data.augmentation.horizontal_flip.p": 0.0}),
        ((), {"names": ("leftover", "stop sign")}, {"data.augmentation.horizontal_flip.p": 0.5}),
        ((), {"cores": 1}, {"data.num_workers": 1}),
        ((), {"images": 205}, {"train.steps": "146ep"}),  # 30,000 images seen: 146.3 epochs
        ((), {"images": 40}, {"train.steps": "300ep"}),
        ((), {"images": 5000}, {"train.steps": "30ep"}),
        (
            (),
            {"has_weights": lambda backbone: backbone == "mobilenet_v3_small"},
            {"model.backbone": "mobilenet_v3_small", "model.width": 1.0, "model.pretrained": True},
        ),
        ((), {}, {"model.pretrained": False, "yolo.anchor_size": None}),
        ((), {"fit_anchors": lambda tree: ([[[1, 2]]], "")}, {"yolo.anchor_size": None}),  # yolox has none
        (
            ("model.detector=yolo",),
            {"fit_anchors": lambda tree: ([[[1, 2]]], "")},
            {"yolo.anchors": [[[1, 2]]], "yolo.anchor_size": 320},
        ),
    ],
)
def test_what_a_run_gets(words: tuple[str, ...], facts: dict[str, Any], expected: dict[str, Any]) -> None:
    settings, _ = filled(*words, **facts)
    assert {key: settings[key] for key in expected} == expected


def test_two_levels_get_the_published_anchors_of_the_coarser_ones() -> None:
    settings, _ = filled("model.backbone=darknet_tiny", "model.detector=yolo")
    assert settings["yolo.anchors"] == [[[30, 61], [62, 45], [59, 119]], [[116, 90], [156, 198], [373, 326]]]


def test_anchors_made_for_another_size_are_scaled_and_it_is_said() -> None:
    words = ("yolo.anchors=[[[10, 20]], [[30, 30]], [[50, 60]]]", "yolo.anchor_size=416", "train.image_size=208")
    tree = merge_settings(ARGS, [], words)[0]
    assert scale_anchors(tree) == ["yolo.anchors: made for 416 px, scaled to 208 px"]
    assert tree["yolo"]["anchors"] == [[[5, 10]], [[15, 15]], [[25, 30]]] and tree["yolo"]["anchor_size"] == 208
    assert scale_anchors(tree) == []  # a continued run finds them as they are


def test_the_narrow_network_says_how_to_get_given_weights() -> None:
    assert any("model.pretrained=true takes MobileNetV3 small" in line for line in filled()[1])
    lines = filled("model.width=0.5", accelerated=True)[1]
    assert "model.pretrained = False: random weights; none were published for other widths and depths" in lines
