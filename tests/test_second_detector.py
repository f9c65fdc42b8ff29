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
from detection.config.command_line import DEFAULTS
from detection.contract import DetectorModel
from detection.inference.weights import open_weights
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
    exported, trained = (open_weights(path, None, None, DEFAULTS) for path in (onnx, best))
    assert exported.detector.geometry == trained.detector.geometry  # rounding and interpolation are its own
    assert exported.lines[-1].startswith("toy, 2 classes") and trained.lines[-1].endswith("steps, toy, 2 classes")
    text = run(validation.main, "--weights", onnx, f"data.root={drawn_dataset}", "--output", tmp_path / "onnx_val")
    for name, weights in (("looks", best), ("onnx_looks", onnx)):
        looks = ["--tiles", "64", "--tta", "--no-pictures", "--confidence", "0.01"]
        text = run(detect.main, "--weights", weights, drawn_dataset / "val", *looks, "--output", tmp_path / name)
        assert " boxes " in text and " on 4 images, 0 left out" in text
        scaled = "the file takes 96 px only, so images are mirrored but not scaled" not in text
        assert scaled == (weights == best)
    one, other = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("val", "onnx_val"))
    assert other["AP50"] == pytest.approx(one["AP50"], abs=1e-3)
    for main, flags, line in (
        (visualize_batch.main, [*words, "--targets"], "shows no assignment"),
        (validation.main, ["--weights", best, "--score", "product"], "yolo.score, which the detector toy of"),
        (load_main().main, [*words, "model.pretrained=true"], "toy with backbone mobilenet_v3_small has no standard"),
    ):
        result = run_script(main, *flags)
        assert result.returncode == 2 and line in result.stderr


def test_it_overfits_a_batch(run_script: Callable[..., Any], drawn_dataset: Path, tmp_path: Path) -> None:
    words = [f"data.root={drawn_dataset}", *WORDS, "train.ema_decay=null"]
    flags = ["--images", "3", "--steps", "300", "--threshold", "0.9", "--output", tmp_path / "out"]
    result = run_script(batch_overfit.main, *words, *flags)
    assert result.returncode == 0 and "learned: AP50" in result.stdout, result.stdout + result.stderr


def test_a_detector_without_criterion_gives_its_own_reason(
    run_script: Callable[..., Any], drawn_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"criterion": None, "untrainable": "a toy to look at"}
    monkeypatch.setitem(models.DETECTORS, "toy", lambda *sections: build_toy(*sections).replace(**parts))
    for main, flags in ((load_main().main, []), (batch_overfit.main, ["--images", "3"])):
        result = run_script(main, f"data.root={drawn_dataset}", *WORDS, *flags)
        assert (result.returncode, result.stderr) == (2, "a toy to look at\n")


FAMILY = ("detection/models/yolo/", "detection/models/yolox/", "detection/models/darknet/", "detection/config/")
FAMILY += ("detection/models/efficientdet/",)  # reads the cells of yolo's grid
# The dict of detectors; a dataset format of that name; the programs whose files are named, and whose weights are read.
ALLOWED = ("detection/models/__init__.py", "detection/data/conversion/", "detection/inference/results.py")
ALLOWED += ("convert_dataset.py", "detection/foreign_files.py", "detection/data/converted.py")
ALLOWED += ("detection/data/dataset_formats.py", "detection/data/sources.py", "detection/models/importers/")


def names_of_yolo(source: str, name: str = "yolo") -> list[str]:
    """Identifiers with that name, and strings that are one word or the path of a setting; texts may name its files."""
    found = [
        f"{token.start[0]}: {token.string}"
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.NAME and re.search(name, token.string, re.IGNORECASE)
    ]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += [
                f"{node.lineno}: {word}" for word in re.findall(rf"^[\w.]*{name}[\w.]*=?$|loss_objectness", node.value)
            ]
    return found


def test_no_yolo_outside_its_family() -> None:
    scripts = [*REPOSITORY.glob("*.py"), REPOSITORY / "yolo-v3" / "main.py"]
    for path in (*(REPOSITORY / "detection").rglob("*.py"), *scripts):
        name = path.relative_to(REPOSITORY).as_posix()
        if not name.startswith((*FAMILY, *ALLOWED)):
            assert (name, names_of_yolo(path.read_text(encoding="utf-8"))) == (name, [])
    for line in ('a == "yolo"', '"yolo" in a', 'f"yolo.score={a}"', "settings.yolo", 'a["loss_objectness"]'):
        assert names_of_yolo(line), line
    assert not names_of_yolo('print("continue with: yolo-v3/main.py")')


def decisions_by_name(source: str) -> list[int]:
    """Lines that compare with the name of a detector or read its section."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            constants = [inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant)]
            lines += [node.lineno] * any(name in constants for name in models.DETECTORS)
        elif isinstance(node, ast.Attribute) and node.attr in models.DETECTORS:
            lines.append(node.lineno)
    return lines


def test_the_general_settings_ask_the_section_of_a_detector() -> None:
    for file in ("relations.py", "settings.py"):
        source = (REPOSITORY / "detection" / "config" / file).read_text(encoding="utf-8")
        assert (file, decisions_by_name(source)) == (file, [])
    for line in ('name in ("yolox", "efficientdet")', 'name == "yolo"', "settings.efficientdet.nms"):
        assert decisions_by_name(line) == [1], line


def test_a_weighted_mixup_needs_a_criterion_that_weighs_boxes(
    run_script: Callable[..., Any], drawn_dataset: Path
) -> None:
    words = [f"data.root={drawn_dataset}", *WORDS, "data.augmentation.mixup={p: 0.5, beta: 1.5}"]
    for main in (load_main().main, visualize_batch.main):
        result = run_script(main, *words)
        line = "data.augmentation.mixup.beta: the losses of toy do not weigh boxes; must be null\n"
        assert (result.returncode, result.stderr) == (2, line)


def test_the_models_of_the_family_keep_the_protocol(default_settings: Callable[..., Any]) -> None:
    with torch.device("meta"):
        for words in ([], ["model.backbone=mobilenet_v3_small"]):
            assert isinstance(models.build_detector(default_settings(*words), 3).model, DetectorModel)
