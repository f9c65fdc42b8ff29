"""A second detector goes through the loop and every script: nothing outside its builder knows its name."""

import ast
import io
import json
import re
import tokenize
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import batch_overfit
import detect
import export
import validation
import visualization
import visualize_batch
from detection import models
from detection.checkpoints import load_checkpoint
from detection.contract import DetectorModel
from tests.support.paths import REPOSITORY
from tests.support.toy_detector import ToyModel, build_toy, toy_postprocess
from tests.support.training_runs import first_difference, load_main

WORDS = (
    *("model.detector=toy", "run.device=cpu", "run.precision=off", "data.num_workers=0", "run.preflight=false"),
    *("train.batch_size=3", "train.image_size=96", "evaluation.image_size=96", "train.learning_rate=0.01"),
    *("scheduler.strategy=constant", "scheduler.warmup=0", "train.ema_decay=0.9", "train.ema_ramp=0"),
    *("evaluation.evaluate_frequency=4", "run.log_frequency=1", "evaluation.confidence_threshold=0.01"),
)


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.DETECTORS, "toy", build_toy)
    monkeypatch.setitem(models.POSTPROCESSES, "toy", toy_postprocess)


def test_it_keeps_the_protocol() -> None:
    assert isinstance(ToyModel(2), DetectorModel)


def test_an_unknown_detector_is_one_line(run_script: Callable[..., Any], drawn_dataset: Path) -> None:
    result = run_script(load_main().main, f"data.root={drawn_dataset}", *WORDS, "model.detector=unknown")
    assert result.returncode == 2 and "model.detector = 'unknown': must be yolo" in result.stderr


def test_from_training_to_export(run_script: Callable[..., Any], drawn_dataset: Path, tmp_path: Path) -> None:
    """Train, resume bit for bit, validate, detect, look at the worst images, draw, export and validate the export."""
    words = [f"data.root={drawn_dataset}", *WORDS]

    def run(main: Callable[[], None], *arguments: str | Path) -> str:
        result = run_script(main, *arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        return str(result.stdout)

    text = run(load_main().main, *words, "train.steps=8", "--output", tmp_path / "whole")
    assert "letterbox at the top left" in text and "BGR 0..255" in text
    assert "regression" in text and "classification" in text and "objectness" not in text
    run(load_main().main, *words, "train.steps=4", "--output", tmp_path / "part")
    run(load_main().main, "--resume", tmp_path / "part", "train.steps=8")
    whole, part = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "part"))
    for key in ("model", "average", "optimizer"):
        assert first_difference(whole[key], part[key]) is None
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert any("val/loss_regression" in row for row in rows)

    best = tmp_path / "whole" / "best.pt"
    run(validation.main, "--weights", best, f"data.root={drawn_dataset}", "--output", tmp_path / "val")
    run(detect.main, "--weights", best, drawn_dataset / "val", "--output", tmp_path / "detect")
    run(visualization.main, "--weights", best, f"data.root={drawn_dataset}", "--output", tmp_path / "worst")
    run(visualize_batch.main, *words, "--output", tmp_path / "batch")
    run(export.main, "--weights", best, "--nms", "--output", tmp_path / "onnx")
    (onnx,) = (tmp_path / "onnx").glob("*.onnx")
    run(validation.main, "--weights", onnx, f"data.root={drawn_dataset}", "--output", tmp_path / "onnx_val")
    for name, weights in (("looks", best), ("onnx_looks", onnx)):
        looks = ["--tiles", "64", "--tta", "--no-pictures", "--confidence", "0.01"]
        text = run(detect.main, "--weights", weights, drawn_dataset / "val", *looks, "--output", tmp_path / name)
        assert " boxes " in text and " on 4 images, 0 left out" in text
        scaled = "the file takes 96 px only, so images are mirrored but not scaled" not in text
        assert scaled == (weights == best)
    one, other = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("val", "onnx_val"))
    assert other["AP50"] == pytest.approx(one["AP50"], abs=1e-3)
    result = run_script(visualize_batch.main, *words, "--targets")
    assert result.returncode == 2 and "shows no assignment" in result.stderr


def test_it_overfits_a_batch(run_script: Callable[..., Any], drawn_dataset: Path, tmp_path: Path) -> None:
    words = [f"data.root={drawn_dataset}", *WORDS, "train.ema_decay=null"]
    flags = ["--images", "3", "--steps", "300", "--threshold", "0.9", "--output", tmp_path / "out"]
    result = run_script(batch_overfit.main, *words, *flags)
    assert result.returncode == 0 and "learned: AP50" in result.stdout, result.stdout + result.stderr


FAMILY = ("detection/models/yolo/", "detection/models/darknet/", "detection/config/")
# The dict of detectors; a dataset format of that name.
ALLOWED = ("detection/models/__init__.py", "detection/data/conversion/", "detection/inference/results.py")


def test_no_yolo_outside_its_family() -> None:
    """No identifier, import or attribute of that name in shared code; texts may name its files."""
    found = []
    for path in sorted([*(REPOSITORY / "detection").rglob("*.py"), REPOSITORY / "yolo-v3" / "main.py"]):
        name = path.relative_to(REPOSITORY).as_posix()
        if name.startswith((*FAMILY, *ALLOWED)):
            continue
        source = path.read_text(encoding="utf-8")
        found += [
            f"{name}:{token.start[0]}: {token.string}"
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.NAME and re.search("yolo", token.string, re.IGNORECASE)
        ]
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found += [f"{name}:{node.lineno}: {word}" for word in re.findall(r"loss_objectness", node.value)]
    assert not found


def test_the_models_of_the_family_keep_the_protocol(default_settings: Callable[..., Any]) -> None:
    with torch.device("meta"):
        for words in ([], ["model.backbone=mobilenet_v3_small"]):
            assert isinstance(models.build_detector(default_settings(*words), 3).model, DetectorModel)
