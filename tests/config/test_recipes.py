"""Every recipe loads, names its source, and holds the numbers it is published with."""

import math
from pathlib import Path

import pytest

from detection.config.loading import changed_settings, leaf_paths, load_settings
from detection.config.settings import Settings
from detection.config.yaml_files import read_settings_file
from detection.models import build_detector
from detection.models.efficientdet.variants import VARIANTS
from detection.training.schedules import build_schedule
from tests.support.paths import ARGS, REPOSITORY

OWN_DATA = "own_data"  # its auto values need a dataset: tests/training/test_automatic.py
RECIPES = sorted(path for path in (REPOSITORY / "recipes").glob("*.yaml") if path.stem != OWN_DATA)
COCO_IMAGES = 118_287  # train2017


def load(name: str, *words: str) -> Settings:
    return load_settings(ARGS, [REPOSITORY / "recipes" / f"{name}.yaml"], words)[0]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_shows_how_to_run_it(path: Path) -> None:
    defaults = load_settings(ARGS)[0]
    settings, notices = load_settings(ARGS, [path])
    assert settings != defaults and notices == []  # our own files use the full names
    header = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert f"recipes/{path.name}" in header
    assert (
        "Source:" in header or "research repository" in header or path.stem in ("quickstart", "bccd", "bccd_finetune")
    )


RUNGS = sorted((REPOSITORY / "recipes" / "rungs").glob("*.yaml"))


@pytest.mark.parametrize("path", RUNGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("below", ["bccd", "quickstart", "darknet_416", "yolov3_tiny"])
def test_a_rung_fits_on_other_recipes_and_changes_only_what_it_names(path: Path, below: str) -> None:
    recipe = REPOSITORY / "recipes" / f"{below}.yaml"
    settings, notices = load_settings(ARGS, [recipe, path])
    changed = changed_settings(load_settings(ARGS, [recipe])[0], settings)
    assert notices == [] and changed and set(changed) <= set(leaf_paths(read_settings_file(path)))
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"--config recipes/rungs/{path.name}" in line for line in header)
    assert any("Source:" in line for line in header)
    if below != "darknet_416":  # Darknet-53 as a whole takes a second
        assert build_detector(settings, 2).criterion is not None  # and its detector can be built


def rates(settings: Settings, *steps: int) -> list[float]:
    train = settings.train
    steps_per_epoch = COCO_IMAGES / (train.batch_size * train.subdivisions)
    total = int(train.steps) if isinstance(train.steps, int) else round(float(train.steps[:-2]) * steps_per_epoch)
    schedule = build_schedule(settings.scheduler, train.learning_rate, total, steps_per_epoch)
    return [schedule.at(step) for step in steps]


@pytest.mark.parametrize("size", [416, 608])
def test_darknet_numbers(size: int) -> None:
    settings = load(f"darknet_{size}")
    train = settings.train
    assert train.batch_size * train.subdivisions == 64 and train.steps == 500_200 and train.optimizer == "sgd"
    assert (train.momentum, train.weight_decay, train.clip_norm) == (0.9, 5e-4, None)
    assert (train.resize_frequency, train.multiscale_sizes) == (10, (320, 608))
    # burn-in ((step + 1) / 1000)^4, then drops at 400,000 and 450,000
    assert rates(settings, 499, 999, 399_999, 400_000, 450_000) == pytest.approx([1e-3 / 16, 1e-3, 1e-3, 1e-4, 1e-5])
    assert settings.evaluation.image_size == size and settings.yolo.ignore_threshold == 0.7


@pytest.mark.parametrize(
    ("name", "batch", "rate", "warmup", "milestones"),
    [
        ("d53_320_273e", 64, 1e-3, 2000, (218, 246)),
        ("d53_mstrain-608_273e", 64, 1e-3, 2000, (218, 246)),
        ("d53_320_273e_8x16 train.subdivisions=8", 128, 1.5e-3, 1000, (228, 256)),  # in place of 8 devices
        ("d53_320_273e_8x32_bf16 train.subdivisions=8", 256, 2e-3, 400, (228, 256)),
    ],
)
def test_mmdetection_numbers(name: str, batch: int, rate: float, warmup: int, milestones: tuple[int, int]) -> None:
    settings = load(*name.split())
    train = settings.train
    assert train.batch_size * train.subdivisions == batch and train.steps == "273ep"
    assert (train.optimizer, train.clip_norm, train.backbone_batch_norm) == ("sgd", 35.0, "frozen")
    epoch = COCO_IMAGES / batch
    drops = [round(milestone * epoch) for milestone in milestones]
    found = rates(settings, 0, warmup, drops[0] - 1, drops[0], drops[1])
    assert found == pytest.approx([0.1 * rate, rate, rate, rate / 10, rate / 100])
    assert settings.yolo.loss == "mmdetection" and settings.yolo.ignore_threshold == 0.5


def test_runs_of_the_research_repository() -> None:
    lambda_run = load("240224_LambdaLR")
    found = rates(lambda_run, 999, 74_999, 75_000, 100_000, 125_000, 149_999)
    assert found == pytest.approx([1e-4, 1e-4, 5e-5, 1e-5, 5e-6, 5e-6])
    for name, growth in (("240308_CosineAnnealing_T1", 1), ("240312_CosineAnnealing_T2", 2)):
        settings = load(name)
        assert settings.scheduler.T_mult == growth
        second, third = 1000 + 10_000, 1000 + 10_000 + 10_000 * growth
        assert rates(settings, 1000, second - 1, second, third) == pytest.approx([1e-4, 1e-6, 1e-4, 1e-4], rel=1e-4)
    for name in ("240224_LambdaLR", "240308_CosineAnnealing_T1", "240312_CosineAnnealing_T2"):
        settings = load(name)
        assert (settings.train.optimizer, settings.train.batch_size, settings.train.steps) == ("adam", 64, 150_000)
        assert settings.model.pretrained is True and settings.train.image_size == 416


def test_the_pedl_variant() -> None:
    settings = load("pedl_spp_adam")
    assert settings.yolo.spp and settings.train.optimizer == "adam" and settings.train.learning_rate == 5.79e-4
    epoch = COCO_IMAGES / 64
    found = rates(settings, 0, round(3 * epoch) + 1, round(0.8 * 273 * epoch) + 1, round(0.9 * 273 * epoch) + 1)
    assert found == pytest.approx([5.79e-4, 5.79e-4, 5.79e-5, 5.79e-6])
    train = settings.train
    schedule = build_schedule(settings.scheduler, train.learning_rate, round(273 * epoch), epoch)
    assert schedule.at(0, "biases") == 0.1 and schedule.at(round(3 * epoch) + 1, "biases") == 5.79e-4


def test_the_darknet_protocol() -> None:
    settings = load("darknet_protocol")
    evaluation = settings.evaluation
    assert (settings.yolo.objectness_threshold, evaluation.confidence_threshold) == (0.005, 0.005)
    assert (evaluation.iou_threshold, evaluation.max_detections) == (0.45, None)
    assert (settings.model.interpolation, settings.model.rounding) == ("darknet", "down")
    assert settings.model.fill == (127, 127, 127) and settings.model.batch_norm == "darknet"


def test_paddle_numbers() -> None:
    settings = load("paddle_270e")
    train, mixup = settings.train, settings.data.augmentation.mixup
    assert train.batch_size * train.subdivisions == 64 and (train.optimizer, train.clip_norm) == ("sgd", None)
    epoch = COCO_IMAGES / 64
    drops = [round(milestone * epoch) for milestone in (216, 243)]
    found = rates(settings, 0, 2000, 4000, drops[0] - 1, drops[0], drops[1])
    assert found == pytest.approx([0, 5e-4, 1e-3, 1e-3, 1e-4, 1e-5])
    assert (mixup.p, mixup.beta) == (1.0, 1.5) and train.clean_finish == pytest.approx(20 / 270)
    assert settings.yolo.loss == "freebies" and settings.model.pixel_scaling == "imagenet"


EFFICIENTDETS = {"d0": 64, "d1": 88, "d2": 112, "d3": 160, "d4": 224, "d5": 288, "d6": 384, "d7": 384, "d7x": 384}


def test_efficientdet_numbers() -> None:
    """One recipe in nine sizes: batch and accumulation aside they differ in what table 1 says, and in their length."""
    own = {"run.name", "model.backbone", "efficientdet.variant", "train.image_size", "evaluation.image_size"}
    own |= {"train.batch_size", "train.subdivisions", "train.steps", "evaluation.batch_size"}
    base = load("efficientdet_d0")
    for name, channels in EFFICIENTDETS.items():
        settings = load(f"efficientdet_{name}")
        variant, train = VARIANTS[settings.efficientdet.variant], settings.train
        assert set(changed_settings(base, settings)) <= own
        assert (variant.name, variant.fpn_channels) == (name, channels)
        assert settings.model.backbone == variant.backbone and train.batch_size * train.subdivisions == 64
        assert train.image_size == settings.evaluation.image_size == variant.image_size
        assert train.steps == ("600ep" if name in ("d7", "d7x") else "300ep")
        assert variant.image_size % variant.strides[-1] == 0
    # .08 for 64 images; a linear rise from a tenth over an epoch, then a cosine that counts from the first step
    epoch = round(COCO_IMAGES / 64)
    total = round(300 * COCO_IMAGES / 64)
    expected = [0.008, 0.5 * 0.08 * (1 + math.cos(math.pi * 2 * epoch / (total - epoch)))]
    assert rates(base, 0, 2 * epoch) == pytest.approx(expected)


def test_retinanet_numbers() -> None:
    settings = load("retinanet")
    assert rates(settings, 0, 500, 59_999, 60_000, 80_000) == pytest.approx([0.00333, 0.01, 0.01, 1e-3, 1e-4], rel=1e-3)
    own = settings.efficientdet
    assert (own.gamma, own.background_iou, own.box_weight * own.delta) == (2.0, 0.4, pytest.approx(4, rel=1e-4))
