"""What `--resume` accepts as the name of a run; what a criterion is told of the progress, before and after."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from detection.checkpoints import save_checkpoint
from detection.config.relations import follows_length
from detection.errors import CheckpointError, SettingsError
from detection.models.yolo.darknet_loss import DarknetLoss
from detection.training.resume import open_resumed_run
from detection.training.schedules import first_finishing_step
from tests.support.training_runs import load_main


def test_resume_takes_the_run_or_its_last_checkpoint(tmp_path: Path, default_settings) -> None:
    run = tmp_path / "run"
    run.mkdir()
    content = {
        "step": 3, "settings": default_settings().model_dump(mode="json"), "categories": {}, "optimizer": {},
        "model": {"weight": torch.zeros(1)}, "data_digest": "", "progress": {},
    }  # fmt: skip
    for name in ("last.pt", "best.pt"):
        save_checkpoint(run / name, content)

    def resumed(path: Path) -> Path:
        common = {"config": [], "output": None, "settings": [], "accept_changes": False, "extend": False}
        words = argparse.Namespace(resume=str(path), **common)
        return open_resumed_run(words, [])[1]

    assert resumed(run) == resumed(run / "last.pt") == run
    with pytest.raises(SettingsError, match=r"best\.pt: a run is continued from its last\.pt$"):
        resumed(run / "best.pt")
    (run / "train.log").write_text("x")
    with pytest.raises(SettingsError, match=r"train\.log: a run is continued from its last\.pt$"):
        resumed(run / "train.log")
    with pytest.raises(CheckpointError, match="does not exist"):
        resumed(tmp_path / "gone" / "last.pt")


def test_the_last_part_of_a_run() -> None:
    assert [first_finishing_step(share, 100) for share in (0.0, 0.15, 1.0)] == [100, 85, 0]
    assert first_finishing_step(0.3, 7) == 5  # 4.9 steps


def test_a_criterion_is_told_the_progress_before_each_step(
    run_script: Callable[..., Any], drawn_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """6 steps, the last 2 without mosaic. An evaluation is told what the step before it was."""
    told: list[Any] = []
    monkeypatch.setattr(DarknetLoss, "set_progress", lambda _, *told_now: told.append(told_now), raising=False)
    module = load_main()
    evaluate = module.evaluate_and_keep
    monkeypatch.setattr(module, "evaluate_and_keep", lambda *words: told.append("evaluation") or evaluate(*words))
    run = tmp_path / "run"
    words = (
        f"data.root={drawn_dataset}", "model.backbone=mobilenet_v3_small", "yolo.neck_channels=[8,8,8]",
        "yolo.loss=darknet", "train.image_size=64", "evaluation.image_size=64",
        "train.batch_size=3", "data.num_workers=0",
        "run.device=cpu", "run.preflight=false", "scheduler.warmup=1", "train.patience=null", "run.precision=off",
        "train.steps=6", "train.ema_decay=null", "train.clean_finish=0.3",
        "evaluation.evaluate_frequency=3", "data.augmentation.mosaic.p=0.5", "train.learning_rate=1e-5",
    )  # fmt: skip
    steps = [(step / 6, step >= 4) for step in range(6)]
    result = run_script(module.main, *words, "--output", run)
    assert result.returncode == 0 and "from step 4 without mosaic and mixup" in result.stdout, result.stderr
    assert told == [*steps[:3], "evaluation", steps[2], *steps[3:], "evaluation", steps[5]]
    told.clear()
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    assert checkpoint["settings"]["train"]["clean_finish"] == 0.3
    monkeypatch.setattr(module.Run, "evaluates_at", lambda self, step: step == 6)
    checkpoint.pop("digest")
    save_checkpoint(
        run / "last.pt", {**checkpoint, "step": 6, "progress": {**checkpoint["progress"], "evaluated_step": 0}}
    )
    assert run_script(module.main, "--resume", run).returncode == 0
    assert told == ["evaluation", steps[5]]  # the evaluation that a stop had left out


@pytest.mark.parametrize(("detector", "names"), [("yolox", ["yolox.atss_share"]), ("yolo", [])])
def test_the_share_of_the_first_assigner_follows_the_length(default_settings, detector: str, names: list[str]) -> None:
    settings = default_settings(f"model.detector={detector}", "yolox.loss=aligned", "yolox.atss_share=0.3")
    assert follows_length(settings) == names
