"""EfficientDet through the loop and the scripts; tests/test_second_detector.py does it for any detector."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

import batch_overfit
import check_dataset
import export
import validation
import visualize_batch
from detection.checkpoints import load_checkpoint
from detection.config.efficientdet_settings import VariantName
from detection.config.relations import no_effect
from detection.models import build_detector
from detection.models.carried_classes import carry_outputs
from detection.models.efficientdet.anchors import AnchorGrid
from detection.models.efficientdet.fit import AnchorGridFit
from detection.models.efficientdet.variants import VARIANTS
from detection.ops.boxes import pairwise_iou
from tests.support.training_runs import first_difference, load_main

PAIRS = ((1.0, 1.0), (1.4, 0.7), (0.7, 1.4))
WORDS = (
    *("model.detector=efficientdet", "model.backbone=mobilenet_v3_small", "efficientdet.anchor_scale=1.5"),
    *("efficientdet.prior=0.3", "model.rounding=down", "run.device=cpu", "run.precision=off", "data.num_workers=0"),
    *("run.preflight=false", "train.batch_size=3", "train.image_size=128", "evaluation.image_size=128"),
    *("train.learning_rate=0.002", "scheduler.strategy=constant", "scheduler.warmup=0", "train.ema_decay=0.9"),
    *("train.ema_ramp=null", "train.clip_tensor_norm=1", "evaluation.evaluate_frequency=4", "run.log_frequency=1"),
    *("evaluation.iou_threshold=0.5", "data.augmentation.scale_jitter={p: 1.0, scale: [0.5, 2.0]}"),
)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["mobilenet_v3_small", "tf_efficientnet_b1"])  # the second one has drop-connect
def test_resume_is_exact(run_script: Callable[..., Any], drawn_dataset: Path, tmp_path: Path, backbone: str) -> None:
    words = [f"data.root={drawn_dataset}", *WORDS, f"model.backbone={backbone}"]
    for arguments in (
        [*words, "train.steps=4", "--output", tmp_path / "whole"],
        [*words, "train.steps=2", "--output", tmp_path / "part"],
        ["--resume", tmp_path / "part", "train.steps=4"],
    ):
        result = run_script(load_main().main, *arguments)
        assert result.returncode == 0, result.stdout + result.stderr
    whole, part = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "part"))
    for key in ("model", "average", "optimizer"):
        assert first_difference(whole[key], part[key]) is None


@pytest.mark.slow
def test_targets_doctor_and_export(run_script: Callable[..., Any], drawn_dataset: Path, tmp_path: Path) -> None:
    words = [f"data.root={drawn_dataset}", *WORDS]

    def run(main: Callable[[], None], *arguments: str | Path, code: int = 0) -> str:
        result = run_script(main, *arguments)
        assert result.returncode == code, result.stdout + result.stderr
        return str(result.stdout + result.stderr)

    text = run(load_main().main, *words, "train.steps=4", "--output", tmp_path / "run")
    assert "efficientdet d0, mobilenet_v3_small (published: tf_efficientnet_b0)" in text
    assert "letterbox at the top left" in text
    text = run(visualize_batch.main, *words, "--targets", "--output", tmp_path / "batch")
    assert "level 1, stride 16" in text or "stride 16:" in text
    rows = json.loads((tmp_path / "batch" / "batch.json").read_text())["images"]
    assert any(target["anchor_size"] for row in rows for target in row["targets"])
    assert "mean best IoU" in run(check_dataset.main, *words, "--output", tmp_path / "doctor")

    best = tmp_path / "run" / "best.pt"
    text = run(validation.main, "--weights", best, f"data.root={drawn_dataset}", "--output", tmp_path / "val")
    assert "the best 5,000 candidates of an image, 100 detections per image" in text
    found = {"val": json.loads((tmp_path / "val" / "detections.json").read_text())}
    for kind, flags in (("raw", ["--outputs", "raw"]), ("decoded", []), ("nms", ["--nms"])):
        run(export.main, "--weights", best, *flags, f"data.root={drawn_dataset}", "--output", tmp_path / kind)
        (onnx,) = (tmp_path / kind).glob("*.onnx")
        run(validation.main, "--weights", onnx, f"data.root={drawn_dataset}", "--output", tmp_path / f"{kind}_val")
        found[kind] = json.loads((tmp_path / f"{kind}_val" / "detections.json").read_text())
    for kind, detections in found.items():
        assert len(detections) == len(found["val"]) > 100, kind
        scores = [sorted(row["score"] for row in rows) for rows in (detections, found["val"])]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    soft = ["efficientdet.nms=soft", "--output"]
    assert "ONNX has no operator for soft-NMS" in run(
        export.main, "--weights", best, "--nms", *soft, tmp_path / "soft", code=2
    )
    run(validation.main, "--weights", best, f"data.root={drawn_dataset}", *soft, tmp_path / "soft_val")
    changed = ["efficientdet.max_candidates=10", f"data.root={drawn_dataset}"]
    decoded = next((tmp_path / "decoded").glob("*.onnx"))
    assert "was exported with 5000 inside" in run(validation.main, "--weights", decoded, *changed, code=2)


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("efficientdet.variant=retinanet", "model.backbone=resnet50")])
def test_it_overfits_a_batch(
    run_script: Callable[..., Any], drawn_dataset: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    flags = ["--images", "3", "--steps", "150", "--threshold", "0.95", "--output", tmp_path / "out"]
    still = ("train.ema_decay=null", "efficientdet.prior=0.01", "data.augmentation.scale_jitter.p=0")
    rate = ("train.learning_rate=0.0003",) if words else ()
    result = run_script(batch_overfit.main, f"data.root={drawn_dataset}", *WORDS, *still, *words, *rate, *flags)
    assert result.returncode == 0 and "learned: AP50" in result.stdout, result.stdout + result.stderr


def test_the_best_anchor_of_every_box() -> None:
    """Against the IoUs with all anchors; the nearest anchor of each shape is enough."""
    grid = AnchorGrid((8, 16, 32), 1.5, PAIRS)
    anchors = grid.anchors([(16, 16), (8, 8), (4, 4)], torch.device("cpu")).xyxy.double()
    generator = np.random.default_rng(0)
    corner, sides = generator.uniform(0, 100, (200, 2)), generator.uniform(1, 60, (200, 2))
    boxes = np.concatenate([corner, np.minimum(corner + sides, 128)], axis=1)
    iou = pairwise_iou(torch.from_numpy(boxes), anchors)
    best_iou, best_anchor = AnchorGridFit(grid, 0.5).best_anchors(boxes, 128)
    np.testing.assert_allclose(best_iou, iou.amax(1).numpy(), rtol=1e-5)
    np.testing.assert_allclose(iou[torch.arange(200), torch.from_numpy(best_anchor)].numpy(), best_iou, rtol=1e-5)


def test_the_doctor_names_boxes_without_an_anchor_of_their_own() -> None:
    """The second tiny box in a cell has the same best anchor as the first, and no other; the large one fits."""
    grid = AnchorGrid((8, 16, 32), 1.5, PAIRS)
    boxes = np.array([[10.0, 10, 12, 12], [13, 13, 14, 14], [40, 40, 64, 64.0]])
    report = AnchorGridFit(grid, 0.5)(boxes, np.array([0, 0, 0]), 128)
    assert {kind: items for kind, items, _ in report.findings}["shared_prediction"] == [1]
    assert report.numbers["recall_at_iou_0.5"] == pytest.approx(1 / 3)
    assert "33.3% of the boxes at IoU 0.5 or more, at 128 px" in report.line
    apart = AnchorGridFit(grid, 0.5)(boxes, np.array([0, 1, 2]), 128)
    assert {kind: items for kind, items, _ in apart.findings}["shared_prediction"] == []


def test_classes_are_carried_over_by_name(default_settings: Callable[..., Any]) -> None:
    """Of the file's classes (a, b, c) the run has (c, d): c keeps its filters at every anchor, d is new, boxes stay."""
    settings = default_settings(*WORDS)
    theirs, own = (build_detector(settings, count).model for count in (3, 2))
    state, before = dict(theirs.state_dict()), {name: value.clone() for name, value in own.state_dict().items()}
    lines = carry_outputs(own, state, ["a", "b", "c"], ["c", "d"])
    assert "from the file: c" in lines[0] and "anew: d" in lines[0]
    own.load_state_dict(state)
    classes, boxes = own.output_convolutions()
    their_classes, their_boxes = theirs.output_convolutions()
    assert torch.equal(boxes.weight, their_boxes.weight)
    by_anchor, theirs_by_anchor = classes.weight.unflatten(0, (9, 2)), their_classes.weight.unflatten(0, (9, 3))
    assert torch.equal(by_anchor[:, 0], theirs_by_anchor[:, 2])
    (name,) = (name for name, module in own.named_modules() if module is classes)
    assert torch.equal(by_anchor[:, 1], before[f"{name}.weight"].unflatten(0, (9, 2))[:, 1])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["model.backbone=darknet_tiny"],
            "has 3 levels, but model.backbone=darknet_tiny has 2",
        ),
        (["train.image_size=96"], "train.image_size = 96: must be a multiple of 128"),
        (["efficientdet.variant=d8"], "efficientdet.variant = 'd8'"),
        (["efficientdet.background_iou=0.6"], "background_iou: must not be above efficientdet.positive_iou, 0.5"),
        (["efficientdet.aspects=[1, 2]"], "efficientdet.aspects = [1, 2]: must be three ratios of width to height"),
        (["data.augmentation.mixup={p: 0.5, beta: 1.5}"], "the losses of efficientdet do not weigh boxes"),
    ],
)
def test_bad_settings_are_one_line(
    run_script: Callable[..., Any], drawn_dataset: Path, words: list[str], line: str
) -> None:
    result = run_script(load_main().main, f"data.root={drawn_dataset}", *WORDS, *words, "--dry-run")
    assert result.returncode == 2 and line in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_settings_without_effect_are_named(default_settings: Callable[..., Any]) -> None:
    settings = default_settings(*WORDS)
    (line,) = no_effect(["efficientdet.soft_sigma"], settings)
    assert line == "warning: efficientdet.soft_sigma has no effect with efficientdet.nms = hard"
    (line,) = no_effect(["evaluation.iou_threshold"], default_settings(*WORDS, "efficientdet.nms=soft"))
    assert "no effect with efficientdet.nms = soft" in line
    for words in (("efficientdet.nms=hard",), ("model.detector=yolo", "efficientdet.nms=soft")):
        assert no_effect(["evaluation.iou_threshold"], default_settings(*WORDS, *words)) == []


def test_variants_of_settings_and_network_are_the_same(default_settings: Callable[..., Any]) -> None:
    assert get_args(VariantName) == tuple(VARIANTS)
    with torch.device("meta"):
        detector = build_detector(
            default_settings("model.detector=efficientdet", "model.backbone=tf_efficientnet_b0"), 90
        )
    assert "3,880,067 parameters" in detector.plan[0] and "published" not in detector.plan[0]
    geometry = detector.geometry
    assert (geometry.placement, geometry.size_multiple, geometry.fill) == ("top_left", 128, (124, 116, 104))
    assert geometry.pixel_mean == (0.485, 0.456, 0.406) and geometry.pixel_std == (0.229, 0.224, 0.225)
