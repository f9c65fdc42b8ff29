"""The anchor-free detector through the loop and the scripts; tests/test_second_detector.py does it for any detector."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import batch_overfit
import export
import validation
import visualize_batch
from detection.checkpoints import load_checkpoint
from tests.support.training_runs import first_difference, load_main

pytestmark = pytest.mark.slow

WORDS = (
    *("model.detector=yolox", "model.backbone=mobilenet_v3_small", "yolox.neck_channels=[16, 16, 16]"),
    *("yolox.head_channels=16", "yolox.prior=0.3", "run.device=cpu", "run.precision=off", "data.num_workers=0"),
    *("run.preflight=false", "train.batch_size=3", "train.image_size=96", "evaluation.image_size=96"),
    *("train.learning_rate=0.002", "scheduler.strategy=constant", "scheduler.warmup=0", "train.ema_decay=0.9"),
    *("train.ema_ramp=0", "evaluation.evaluate_frequency=4", "run.log_frequency=1"),
)


def test_training_resume_targets_and_export(
    run_script: Callable[..., Any], drawn_dataset: Path, tmp_path: Path
) -> None:
    words = [f"data.root={drawn_dataset}", *WORDS]

    def run(main: Callable[[], None], *arguments: str | Path) -> str:
        result = run_script(main, *arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        return str(result.stdout)

    run(load_main().main, *words, "train.steps=4", "--output", tmp_path / "whole")
    run(load_main().main, *words, "train.steps=2", "--output", tmp_path / "part")
    run(load_main().main, "--resume", tmp_path / "part", "train.steps=4")
    whole, part = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "part"))
    for key in ("model", "average", "optimizer"):
        assert first_difference(whole[key], part[key]) is None

    best = tmp_path / "whole" / "best.pt"
    text = run(visualize_batch.main, *words, "--targets", "--weights", best, "--output", tmp_path / "batch")
    assert "EMA after 4 steps, 2 classes" in text and "level 2, stride 32:" in text
    rows = json.loads((tmp_path / "batch" / "batch.json").read_text())["images"]
    targets = [(row, target) for row in rows for target in row["targets"]]
    assert targets and all(target["anchor_size"] is None for _, target in targets)
    for row, target in targets:  # of SimOTA: near the box or, rarely, near another one
        assert 0 <= target["gt"] < len(row["boxes"]) and 0 <= target["column"] < 96 / target["stride"]
    text = run(visualize_batch.main, *words, "--targets", "yolox.assigner=centre", "--output", tmp_path / "random")
    assert "the predictions are those of random weights" in text

    run(validation.main, "--weights", best, f"data.root={drawn_dataset}", "--output", tmp_path / "val")
    run(export.main, "--weights", best, "--nms", f"data.root={drawn_dataset}", "--output", tmp_path / "onnx")
    onnx = tmp_path / "onnx" / "best.onnx"
    run(validation.main, "--weights", onnx, f"data.root={drawn_dataset}", "--output", tmp_path / "onnx_val")
    one, other = (json.loads((tmp_path / name / "detections.json").read_text()) for name in ("val", "onnx_val"))
    assert len(one) == len(other) > 20
    by_score = [sorted(found, key=lambda row: (row["image_id"], -row["score"])) for found in (one, other)]
    for ours, exported in zip(*by_score, strict=True):
        assert exported["score"] == pytest.approx(ours["score"], abs=1e-4)

    result = run_script(visualize_batch.main, *words, "--weights", best)
    assert result.returncode == 2 and "--weights belongs to --targets" in result.stderr


ALIGNED = ("yolox.loss=aligned", "yolox.box_weight=2", "yolox.size_prior=4")
CRITERIA = {
    "simota": ("yolox.assigner=simota",),
    "centre": ("yolox.assigner=centre",),
    "centre_cell": ("yolox.assigner=centre_cell",),
    "aligned": (*ALIGNED, "yolox.assigner=soft_label", "yolox.balance=objects"),
    "task_aligned": (*ALIGNED, "yolox.assigner=task_aligned", "yolox.class_loss=varifocal", "yolox.bins=17"),
    "atss": (*ALIGNED, "yolox.assigner=atss"),
    "one_to_one": (*ALIGNED, "yolox.assigner=task_aligned_half", "yolox.one_to_one=true"),
}


@pytest.mark.parametrize("criterion", CRITERIA)
def test_it_overfits_a_batch(
    run_script: Callable[..., Any], drawn_dataset: Path, tmp_path: Path, criterion: str
) -> None:
    words = [f"data.root={drawn_dataset}", *WORDS, "train.ema_decay=null", "yolox.prior=0.01"]
    flags = ["--images", "3", "--steps", "150", "--threshold", "0.9", "--output", tmp_path / "out"]
    result = run_script(batch_overfit.main, *words, *CRITERIA[criterion], *flags)
    assert result.returncode == 0 and "learned: AP50" in result.stdout, result.stdout + result.stderr
