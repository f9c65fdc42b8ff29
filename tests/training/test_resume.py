"""What `--resume` accepts as the name of a run; what a criterion is told of the progress, before and after."""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from detection.checkpoints import save_checkpoint
from detection.config.relations import follows_length
from detection.errors import CheckpointError, OutputError, SettingsError
from detection.models.yolo.darknet_loss import DarknetLoss
from detection.training import resume
from detection.training.resume import check_same_start, open_resumed_run, start_or_continue
from detection.training.schedules import first_finishing_step
from tests.support.checkpoint_cases import STOPPED
from tests.support.training_runs import first_difference, load_main


def test_resume_takes_the_run_or_its_last_checkpoint(tmp_path: Path, default_settings) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("last.pt", "best.pt"):
        save_checkpoint(run / name, STOPPED | {"settings": default_settings().model_dump(mode="json")})

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


# --resume auto


def auto(**given: Any) -> argparse.Namespace:
    common = {"config": [Path("a.yaml")], "output": None, "settings": [], "extend": False, "model_dir": None}
    return argparse.Namespace(**{**common, "resume": "auto", **given})


def test_auto_starts_where_there_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("absent", "empty"):
        arguments = auto(output=tmp_path / name)
        start_or_continue(arguments)
        assert arguments == auto(output=tmp_path / name, resume=None)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])  # without last.pt, what is there is named by `load_last`
def test_auto_continues_what_is_there_without_what_it_began_with(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    for known in (False, True):
        if known:
            began = {"command": ["main.py", "train.batch_size=auto", "--output", "run"]}
            (tmp_path / "environment.json").write_text(json.dumps(began))
        arguments = auto(output=tmp_path, settings=["train.batch_size=auto", "data.num_workers=1"])
        start_or_continue(arguments)
        assert (arguments.resume, arguments.output, arguments.config) == (str(tmp_path), None, [])
        dropped = ["train.batch_size=auto"] * known
        assert arguments.settings == ["train.batch_size=auto", "data.num_workers=1"][known:]
        assert arguments.notices[0].endswith(f"not read again: {', '.join(['a.yaml', *dropped])}")


def test_auto_begins_anew_where_nothing_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2):
        run = tmp_path / "run"
        run.mkdir()
        for name in ("train.log", "args.yaml"):
            (run / name).write_text(str(number))
        monkeypatch.setattr(resume, "read_environment", lambda: (1, 1, 2))
        start_or_continue(auto(output=run))  # another process than the first leaves it alone
        monkeypatch.setattr(resume, "read_environment", lambda: (0, 0, 2))
        monkeypatch.setattr(resume, "is_locked", lambda _: True)
        with pytest.raises(OutputError, match="another process writes"):
            start_or_continue(auto(output=run))
        monkeypatch.setattr(resume, "is_locked", lambda _: None)
        start_or_continue(auto(output=run))
        assert not run.exists() and (tmp_path / f"run_unsaved_{number}" / "train.log").read_text() == str(number)


def test_auto_does_not_touch_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    arguments = auto(output=tmp_path)
    start_or_continue(arguments)  # `new_run_directory` refuses it: not empty
    assert arguments.output == tmp_path and (tmp_path / "notes.txt").exists()


def test_auto_needs_a_directory(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="needs --output"):
        start_or_continue(auto())
    with pytest.raises(SettingsError, match="--extend lengthens a run once"):
        start_or_continue(auto(output=tmp_path, extend=True))
    arguments = auto(model_dir=tmp_path)
    start_or_continue(arguments)  # --model_dir starts or continues by itself
    assert arguments.resume is None


@pytest.mark.parametrize(
    ("own", "first", "message"),
    [
        (None, 5, "rank 1 sees no last.pt, the first process continues from step 5"),
        (3, 5, "rank 1 continues from step 3, the first process continues from step 5"),
        (3, None, "rank 1 continues from step 3, the first process starts a new run"),
        (5, 5, None),
        (None, None, None),
    ],
)
def test_processes_must_see_the_same_checkpoint(own: int | None, first: int | None, message: str | None) -> None:
    ranks: Any = SimpleNamespace(rank=1, broadcast=lambda _: first)
    checkpoint = None if own is None else {"step": own}
    if message is None:
        check_same_start(ranks, checkpoint)
    else:
        with pytest.raises(SettingsError, match=message):
            check_same_start(ranks, checkpoint)


def test_the_same_command_starts_continues_and_ends(
    run_script: Callable[..., Any], drawn_dataset: Path, tmp_path: Path
) -> None:
    """Of 4 steps, the checkpoint of step 2 is put back as if the machine had been taken away; then nothing is left."""
    main, run = load_main().main, tmp_path / "run"
    words: list[str | Path] = [
        f"data.root={drawn_dataset}", "model.backbone=mobilenet_v3_small", "yolo.neck_channels=[8,8,8]",
        "train.image_size=64", "evaluation.image_size=64", "train.batch_size=auto", "data.num_workers=0",
        "run.device=cpu", "run.preflight=false", "scheduler.warmup=1", "train.patience=null", "run.precision=off",
        "train.steps=4", "train.save_frequency=1", "train.keep_checkpoints=9", "--resume", "auto", "--output", run,
    ]  # fmt: skip
    first = run_script(main, *words)
    assert first.returncode == 0 and "from step 0" in first.stdout, first.stderr
    whole = torch.load(run / "last.pt", weights_only=True)
    shutil.copy(run / "step_000000002.pt", run / "last.pt")
    second = run_script(main, *words)
    assert second.returncode == 0 and "from step 2" in second.stdout, second.stderr
    assert "train.batch_size=auto" in second.stdout.split("not read again: ")[1].splitlines()[0]
    again = torch.load(run / "last.pt", weights_only=True)
    assert first_difference(whole["model"], again["model"]) is None and again["step"] == 4
    third = run_script(main, *words)
    assert third.returncode == 0 and "from step 4" in third.stdout, third.stderr


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
