"""classify.py from images to a detector that starts from its backbone; one small network throughout."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import classify
from detection.checkpoints import load_checkpoint
from tests.support.class_folders import write_folders
from tests.support.training_runs import first_difference, load_main, rows_of

WORDS = (
    "run.device=cpu", "run.precision=off", "run.loggers=[files]", "run.log_frequency=1", "data.num_workers=0",
    "model.width=0.25", "model.depth=0.1", "train.batch_size=4", "train.subdivisions=2", "train.steps=5",
    "train.image_size=32", "evaluation.image_size=32", "evaluation.evaluate_frequency=4", "train.save_frequency=2",
    "train.ema_decay=0.9", "train.learning_rate=0.02", "scheduler.warmup=1",
)  # fmt: skip


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_folders(tmp_path / "images" / "train", {"red": 11, "green": 10})
    write_folders(tmp_path / "images" / "val", {"red": 5, "green": 5})
    return tmp_path / "images"


class Killed(BaseException):
    """Nothing catches it, as nothing catches kill -9."""


def test_a_killed_run_continues_bit_for_bit(
    run_script: Callable[..., Any], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run_script(classify.main, f"data.root={images}", *WORDS, "--output", whole)
    assert done.returncode == 0, done.stderr
    steps = 0
    real = classify.train_step

    def dying(*arguments: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise Killed
        return real(*arguments, **options)

    monkeypatch.setattr(classify, "train_step", dying)
    with pytest.raises(Killed):
        run_script(classify.main, f"data.root={images}", *WORDS, "--output", killed)
    monkeypatch.setattr(classify, "train_step", real)
    for thread in threading.enumerate():
        if thread.name == "checkpoint writer":
            thread.join()
    assert load_checkpoint(killed / "last.pt")["step"] == 2
    again = run_script(classify.main, "--resume", killed)
    assert again.returncode == 0, again.stderr
    first, second = (load_checkpoint(run / "last.pt") for run in (whole, killed))
    assert first["step"] == 5 and first_difference(first, second) is None
    assert rows_of(whole) == rows_of(killed)
    # What a run leaves behind.
    metrics = json.loads((whole / "metrics.json").read_text())
    assert 0 <= metrics["top1"] <= 1 and sum(map(sum, metrics["confusion"])) == metrics["images"] == 10
    pictures = {path.name for path in (whole / "images").iterdir()}
    assert {"train_batch.png", "confusion_000004.jpg", "confusion_000005.jpg"} <= pictures
    # A detector starts from it; its network follows the weights.
    started = load_main().main
    words = ("data.fake=true", "model.num_classes=2", "run.device=cpu", "train.batch_size=2", "train.image_size=64")
    plan = run_script(started, *words, f"model.pretrained={whole / 'best.pt'}", "yolo.neck_channels=[16,16,16]",
                      "evaluation.image_size=64", "train.steps=2", "scheduler.warmup=0", "--dry-run")  # fmt: skip
    assert plan.returncode == 0, plan.stderr
    assert "model.width = 0.25" in plan.stdout and "tensors of its last layer left out" in plan.stdout
    # Neither script continues the other's runs.
    other = run_script(started, "--resume", whole)
    assert other.returncode == 2 and "is a run of classify.py" in other.stderr


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["data.augmentation.mixup.p=0.5"], 2, "data.augmentation.mixup.p: not for a classifier"),
        (["train.minutes=3"], 2, "train.minutes: not for a classifier"),
        (["model.num_classes=3"], 2, "the data has 2 classes"),
        (["--network", "simple_cnn", "train.image_size=64"], 2, "must be 32"),
        (["train.image_size=40"], 2, "multiple of 32"),
        (["train.batchsize=3"], 2, "train.batch_size"),
        (["--network", "simple_cnn", "--resume"], 2, "are both given"),
    ],
)
def test_what_is_refused(
    run_script: Callable[..., Any], images: Path, words: list[str], code: int, message: str
) -> None:
    done = run_script(classify.main, f"data.root={images}", *(() if "--resume" in words else WORDS), *words)
    assert done.returncode == code and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_simple_cnn_learns_colours(run_script: Callable[..., Any], images: Path, tmp_path: Path) -> None:
    words = [word for word in WORDS if not word.startswith(("model.", "train.ema"))]
    more = ("train.steps=150", "train.ema_decay=null", "evaluation.evaluate_frequency=null", "run.log_frequency=50")
    output = ("--output", tmp_path / "run")
    done = run_script(classify.main, "--network", "simple_cnn", f"data.root={images}", *words, *more, *output)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["top1"] == 1
    weights = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert weights["classifier"]["network"] == "simple_cnn" and weights["needs"] == {}


def test_run_stop_after_ends_a_run_early(run_script: Callable[..., Any], images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = run_script(classify.main, f"data.root={images}", *WORDS, "run.stop_after=2", "--output", run)
    assert done.returncode == 0 and "stopped after step 2" in done.stderr, done.stderr
    assert "continue with: classify.py --resume" in done.stderr
    assert load_checkpoint(run / "last.pt")["step"] == 2
    done = run_script(classify.main, "--resume", run, "run.stop_after=null")
    assert done.returncode == 0 and load_checkpoint(run / "last.pt")["step"] == 5, done.stderr
