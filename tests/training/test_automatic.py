"""The plan for own data as a run gets it, the clock, the better of EMA and weights, and longer runs."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from detection.config.loading import dump_settings
from detection.training import automatic, clock, evaluation, supervisor
from detection.training.automatic import load_run_settings
from detection.training.moving_average import ExponentialMovingAverage
from detection.training.run import Clock
from tests.support.training_runs import first_difference, load_main

TINY = (
    "yolo.neck_channels=[8,8,8]", "train.image_size=64", "evaluation.image_size=64", "train.batch_size=3",
    "data.num_workers=0", "run.device=cpu", "run.log_frequency=1", "run.precision=off",
)  # fmt: skip
COCO_DEFAULTS = ("darknet", 150_000, "LambdaLR")


@pytest.fixture
def main(run_script: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *words: run_script(load_main().main, *words)


# The plan


def chosen(overlays: list[Path], *words: str) -> tuple[str, int | str, str]:
    settings, _ = load_run_settings(overlays, words)
    return settings.model.backbone, settings.train.steps, settings.scheduler.strategy


def test_a_small_dataset_without_a_recipe_gets_the_plan_for_own_data(
    drawn_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, cosine = f"data.root={drawn_dataset}", "CosineAnnealingWarmRestartsWithWarmup"
    assert chosen([], root, "run.device=cpu") == ("darknet", "300ep", cosine)
    assert chosen([], root, "run.device=cpu", "model.pretrained=true")[0] == "mobilenet_v3_small"
    assert chosen([], root, "run.device=cpu", "model.backbone=darknet_tiny")[0] == "darknet_tiny"  # words win
    assert chosen([automatic.OWN_DATA], root, "run.device=cpu")[1] == "300ep"  # named: the images are counted too
    assert chosen([automatic.DEFAULTS], root) == COCO_DEFAULTS  # a recipe is named
    assert chosen([], f"data.root={tmp_path / 'nowhere'}") == COCO_DEFAULTS  # the error about it comes later
    assert chosen([], "data.fake=true", "model.num_classes=2") == COCO_DEFAULTS
    monkeypatch.setattr(automatic, "COCO_SIZED", 9)  # as many as the dataset has
    assert chosen([], root) == COCO_DEFAULTS


def test_what_was_chosen_is_in_the_settings_and_chosen_once(drawn_dataset: Path, tmp_path: Path) -> None:
    words = [f"data.root={drawn_dataset}", "run.device=cpu", "model.detector=yolo"]
    settings, notices = load_run_settings([], words)
    assert settings.yolo.anchor_size == 320 and any("fitted to 12 boxes at 320 px" in line for line in notices)
    (tmp_path / "args.yaml").write_text(dump_settings(settings))
    assert load_run_settings([tmp_path / "args.yaml"], []) == (settings, [])


@pytest.mark.parametrize(
    ("cores", "processes", "workers"), [(16, None, 2), (3, "2", 1), (2, "4", 1), (4, "2", 2), (4, "x", 2)]
)
def test_processes_on_a_machine_share_its_cores(
    drawn_dataset: Path, monkeypatch: pytest.MonkeyPatch, cores: int, processes: str | None, workers: int
) -> None:
    """`data.num_workers: auto` under torchrun: 2 on a CPU where each process has as many cores."""
    monkeypatch.setattr(automatic.os, "sched_getaffinity", lambda process: range(cores))
    if processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    settings, _ = load_run_settings([], [f"data.root={drawn_dataset}", "run.device=cpu"])
    assert settings.data.num_workers == workers


def test_a_setting_that_a_script_does_not_use_is_named() -> None:
    words = ["data.fake=true", "model.num_classes=2", "train.steps=3"]
    assert load_run_settings([], words, unused=("scheduler", "train"))[1] == [
        "warning: train.steps is not used by this script"
    ]


@pytest.mark.parametrize(
    ("strategy", "word", "named"),
    [
        ("constant", "scheduler.gamma=0.5", True),
        ("WarmupMultiStepLR", "scheduler.gamma=0.5", False),
        ("LambdaLR", "scheduler.T_0=5", True),
        ("constant", "scheduler.warmup=5", False),
        ("LambdaLR", "scheduler.flat=0.3", True),
        ("FlatCosine", "scheduler.eta_min_factor=0.3", False),
    ],
)
def test_a_setting_of_another_strategy_is_named(strategy: str, word: str, named: bool) -> None:
    words = ["data.fake=true", "model.num_classes=2", f"scheduler.strategy={strategy}", word]
    line = f"warning: {word.partition('=')[0]} has no effect with scheduler.strategy = {strategy}"
    assert load_run_settings([], words)[1] == ([line] if named else [])


@pytest.mark.parametrize(
    ("words", "paths", "value"),
    [
        ("model.detector=yolox yolo.loss=ciou yolo.spp=true", "yolo.loss, yolo.spp have", "model.detector = yolox"),
        ("yolox.assigner=atss", "yolox.assigner has", "model.detector = yolo"),
        ("model.detector=yolox yolox.balance=objects", "yolox.balance has", "yolox.loss = yolox"),
        ("model.detector=yolox yolox.loss=aligned yolox.l1_weight=2", "yolox.l1_weight has", "yolox.loss = aligned"),
        ("model.detector=yolox yolox.loss=aligned yolox.balance=objects", None, None),
    ],
)  # fmt: skip
def test_a_setting_of_another_detector_or_loss_is_named(words: str, paths: str | None, value: str | None) -> None:
    notices = load_run_settings([], ["data.fake=true", "model.num_classes=2", *words.split()])[1]
    assert notices == ([] if paths is None else [f"warning: {paths} no effect with {value}"])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("train.steps=9",), "the warm-up takes 1000 of 9 steps"),
        (("scheduler.strategy=StepLR", "scheduler.step_size=5", "train.steps=4000"), "it falls before the warm-up"),
        (("train.steps=3001ep",), "3001 epochs over the same 9 images"),
        (("train.steps=30",), "no evaluation before the end of the run"),
        (("data.augmentation.vertical_flip.p=0.5", "data.class_names=[dog]"), "vertical_flip turns images upside down"),
    ],
)
def test_what_is_seldom_meant_is_a_warning(
    main: Callable[..., Any], drawn_dataset: Path, tmp_path: Path, words: tuple[str, ...], line: str
) -> None:
    file = tmp_path / "train.json"
    text = (drawn_dataset / "annotations" / "instances_train.json").read_text()
    file.write_text(text.replace('"red"', '"dog"'))
    for split in ("train", "validation"):
        words += (f"data.{split}_annotations={file}", f"data.{split}_images={drawn_dataset / 'train'}")
    result = main("--config", automatic.DEFAULTS, *TINY, "model.backbone=mobilenet_v3_small", *words, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert sum(text.startswith("warning ") and line in text for text in result.stdout.splitlines()) == 1


def test_a_learning_rate_of_zero_everywhere_is_refused(main: Callable[..., Any], drawn_dataset: Path) -> None:
    result = main(f"data.root={drawn_dataset}", *TINY, "train.learning_rate=0", "scheduler.eta_min=0", "--dry-run")
    assert result.returncode == 2 and result.stderr.startswith("the learning rate is 0 in every step")
    assert len(result.stderr.splitlines()) == 1


# EMA


def test_without_a_ramp_the_average_forgets_the_first_weights_at_once() -> None:
    """Decays 1/10, 2/11, then 0.15: the limit."""
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
        ema = ExponentialMovingAverage(model, 0.15, None)
        model.weight.fill_(0.0)
    for step, expected in ((0, 0.1), (1, 0.1 * 0.15), (2, 0.1 * 0.15**2)):
        ema.update(model, step)
        assert float(ema.model.weight) == pytest.approx(expected)
    ema = ExponentialMovingAverage(model, 0.99, None)
    with torch.no_grad():
        ema.model.weight.fill_(1.0)
    for step, decay in ((0, 1 / 10), (1, 2 / 11), (2, 3 / 12)):
        before = float(ema.model.weight)
        ema.update(model, step)
        assert float(ema.model.weight) == pytest.approx(before * decay)


@pytest.mark.parametrize(("ema", "weights", "holds_average"), [(0.3, 0.5, False), (0.5, 0.5, True), (0.5, 0.4, True)])
def test_best_pt_is_the_better_of_ema_and_weights(
    main: Callable[..., Any],
    drawn_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ema: float,
    weights: float,
    holds_average: bool,
) -> None:
    original = evaluation.evaluate_run

    def evaluate_run(run: Any, state: Any, supervisor: Any, model: Any = None) -> Any:
        result = original(run, state, supervisor, model)
        result.metrics[run.settings.evaluation.best_metric] = ema if model is None else weights
        return result

    monkeypatch.setattr(evaluation, "evaluate_run", evaluate_run)
    result = main(f"data.root={drawn_dataset}", *TINY, "train.steps=2", "--output", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    best, last = (torch.load(tmp_path / "run" / name, weights_only=True) for name in ("best.pt", "last.pt"))
    assert (best["average"] is not None) == holds_average and last["average"] is not None
    assert first_difference(best["model"], last["model"]) is None
    assert best["progress"]["best_value"] == max(ema, weights)


# SWA


@pytest.mark.slow
def test_swa_of_a_run_is_the_mean_of_its_cycles_also_when_resumed(
    main: Callable[..., Any], drawn_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two cycles of 2 after 2 steps: best.pt is the mean of the weights after steps 4 and 6; resumed after 3 too."""
    original = evaluation.evaluate_run

    def evaluate_run(run: Any, state: Any, supervisor: Any, model: Any = None) -> Any:
        result = original(run, state, supervisor, model)
        result.metrics["AP"] = 0.9 if model is not None and model is not state.model else 0.1
        return result

    monkeypatch.setattr(evaluation, "evaluate_run", evaluate_run)
    words = ("train.steps=2", "train.swa_cycles=2", "train.swa_cycle=2", "train.save_frequency=1", "scheduler.warmup=1")
    words += ("train.keep_checkpoints=9", "evaluation.evaluate_frequency=100")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    done = main(f"data.root={drawn_dataset}", *TINY, *words, "--output", whole)
    assert done.returncode == 0, done.stderr
    assert "SWA         2 cycles of 2 steps from step 2 on" in done.stdout
    assert "SWA of 2 cycles at step 6: AP 0.900, the highest: best.pt holds them" in done.stdout
    assert done.stdout.count("evaluation of the EMA") == 2  # after train.steps and at the end
    third, fourth, sixth = (torch.load(whole / f"step_{step:09d}.pt", weights_only=True) for step in (3, 4, 6))
    best = torch.load(whole / "best.pt", weights_only=True)
    assert (third["swa"]["count"], fourth["swa"]["count"], best["average"]) == (0, 1, None)
    for name, value in best["model"].items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (fourth["model"][name] + sixth["model"][name]) / 2, atol=1e-6, rtol=1e-5)
    assert any(not torch.equal(value, sixth["model"][name]) for name, value in best["model"].items())
    resumed.mkdir()
    shutil.copy(whole / "step_000000003.pt", resumed / "last.pt")
    assert main("--resume", resumed).returncode == 0
    for file in ("last.pt", "best.pt"):
        pair = [torch.load(directory / file, weights_only=True) for directory in (whole, resumed)]
        for key in ("model", "average", "swa", "optimizer"):
            assert first_difference(pair[0][key], pair[1][key]) is None, (file, key)
    refused = main("--resume", resumed, "train.steps=9")
    assert refused.returncode == 2 and "train.swa_cycles" in refused.stderr


# train.minutes


def fake_run(frequency: int | str, average: float = 2.0) -> Any:
    run = SimpleNamespace(
        settings=SimpleNamespace(
            train=SimpleNamespace(minutes=average), evaluation=SimpleNamespace(evaluate_frequency=frequency)
        ),
        # Two processes; the other one has no validation image, so it measured no time for them.
        ranks=SimpleNamespace(average=lambda values: values, gather=lambda one: [one, 0.0], broadcast=lambda one: one),
        ema=(0.9, None),
        steps_per_epoch=10.0,
        in_steps=int,
        evaluate_frequency=1,
        set_length=lambda steps, frequency: vars(run).update(steps=steps, frequency=frequency),
    )
    return run


@pytest.mark.parametrize(
    ("frequency", "steps", "expected"),
    [
        # 120 s, 10 gone, 2 to start; the end takes 4 s and two evaluations of 3 s: 98 s are left for steps of 0.5 s.
        # 12 % of 98 s hold 3 evaluations, one of which is at the end: (98 - 2 * 3) / 0.5 = 184 steps, 62 apart.
        ("auto", 184, 62),
        # Every 20 steps: a step costs 0.5 + 3 / 20 = 0.65 s.
        (20, 150, 20),
    ],
)
def test_steps_that_fit_by_hand(
    monkeypatch: pytest.MonkeyPatch, frequency: int | str, steps: int, expected: int
) -> None:
    monkeypatch.setattr(clock, "measure_step", lambda run, seconds: 0.5)
    monkeypatch.setattr(clock, "measure_evaluation", lambda run: 3.0)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: 1010.0)
    run = fake_run(frequency)
    clock.fit_to_clock(run, started=1000.0)
    assert (run.steps, run.frequency) == (steps, expected)
    assert run.clock == Clock(1000.0, 120.0, 10.0)


def test_a_time_too_short_for_a_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "measure_step", lambda run, seconds: 60.0)
    monkeypatch.setattr(clock, "measure_evaluation", lambda run: 1.0)
    with pytest.raises(Exception, match=r"train.minutes=0.5: no step fits, one takes 60.00 s"):
        clock.fit_to_clock(fake_run("auto", 0.5), time.perf_counter())


@pytest.mark.parametrize(
    ("spent", "steps_left", "skips", "ends"),
    [(50.0, 40, False, False), (60.0, 40, True, False), (97.0, 1, True, False), (100.0, 1, True, True)],
)
def test_a_late_run_leaves_evaluations_out_and_ends(
    monkeypatch: pytest.MonkeyPatch, spent: float, steps_left: int, skips: bool, ends: bool
) -> None:
    """100 s of budget, 5 s for the end, steps of 1 s: late beyond 102 s expected, over when 103 s are certain."""
    watch = object.__new__(supervisor.Supervisor)
    watch.run = SimpleNamespace(
        steps=100, clock=Clock(0.0, 100.0, 5.0), logs_at=lambda step: True,
        ranks=SimpleNamespace(broadcast=lambda value: value),
    )  # fmt: skip
    watch.state = SimpleNamespace(step=100 - steps_left)
    watch.first_step, watch.in_steps = 0, float(100 - steps_left)
    watch.loggers = SimpleNamespace(line=lambda line: None)
    monkeypatch.setattr(time, "perf_counter", lambda: spent)
    assert (watch.skips_evaluation(), watch.out_of_time()) == (skips, ends)
    watch.run.clock = None  # a resumed run has its number of steps
    assert (watch.skips_evaluation(), watch.out_of_time()) == (False, False)


@pytest.mark.slow
def test_the_number_of_steps_is_kept_and_measuring_changes_nothing(
    main: Callable[..., Any], drawn_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run of `train.minutes` equals one of so many steps, bit for bit, also when it is continued."""
    monkeypatch.setattr(clock, "START", 0.0)
    monkeypatch.setattr(clock, "FINISH", 0.0)
    original = clock.measure_step
    monkeypatch.setattr(clock, "measure_step", lambda run, seconds: (original(run, 0.0), 1.0)[1])  # real, unused
    monkeypatch.setattr(clock, "measure_evaluation", lambda run: 1e-6)
    monkeypatch.setattr(supervisor, "LATE", 1e9)  # a busy machine must not end this run early
    monkeypatch.setattr(supervisor, "OVER", 1e9)
    words = (f"data.root={drawn_dataset}", *TINY)
    started = load_main()
    monkeypatch.setattr(started, "STARTED", time.perf_counter())
    result = main(*words, "train.minutes=0.3", "--output", tmp_path / "timed")
    assert result.returncode == 0, result.stderr
    args = yaml.safe_load((tmp_path / "timed" / "args.yaml").read_text())
    steps = args["train"]["steps"]
    assert args["train"]["minutes"] == 0.3 and 1 <= steps <= 18  # a second each
    again = main("--config", tmp_path / "timed" / "args.yaml", "train.minutes=null", "--output", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    timed, counted = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("timed", "again"))
    for key in ("model", "average", "optimizer", "step"):
        assert first_difference(timed[key], counted[key]) is None
    result = main("--resume", tmp_path / "timed")
    assert result.returncode == 0 and f"step {steps}" in result.stdout and "time  " not in result.stdout


# --extend


def test_a_cosine_run_becomes_longer_on_request_only(
    main: Callable[..., Any], drawn_dataset: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ("scheduler.warmup=1", "train.ema_decay=null", "evaluation.evaluate_frequency=100")
    assert main(f"data.root={drawn_dataset}", *TINY, *words, "train.steps=4", "--output", run).returncode == 0
    refused = main("--resume", run, "train.steps=8")
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert "the cosine schedule" in refused.stderr and "--extend goes on from here" in refused.stderr
    shorter = main("--resume", run, "--extend", "train.steps=3")
    assert shorter.returncode == 2 and "must be more than the 4" in shorter.stderr
    epochs = main("--resume", run, "--extend", "train.steps=1ep")  # less than 4 steps
    assert epochs.returncode == 2 and "are 3 steps, not more than the 4 that are done" in epochs.stderr
    assert main("--extend", f"data.root={drawn_dataset}").stderr == "--extend belongs to --resume\n"
    longer = main("--resume", run, "--extend", "train.steps=8")
    assert longer.returncode == 0, longer.stderr
    assert "extended from step 4 on: the schedule is that of 8 steps, it was that of 4" in longer.stdout
    rates = [
        row["train/learning_rate"] for row in map(json.loads, (run / "metrics.jsonl").open()) if "train/loss" in row
    ]
    # cosine from 2e-3 to 2e-5 after one step of warm-up: over 3 steps, then over 7
    expected = [2e-3, *(2e-5 + 1.98e-3 * (1 + torch.cos(torch.tensor(torch.pi * k / n)).item()) / 2
                        for k, n in ((0, 3), (1, 3), (2, 3), (3, 7), (4, 7), (5, 7), (6, 7)))]  # fmt: skip
    assert rates == pytest.approx(expected, rel=1e-4)
    assert torch.load(run / "last.pt", weights_only=True)["extended"] == [[4, "4", "8"]]


def test_the_rate_of_the_batch_and_a_flat_cosine(main: Callable[..., Any], drawn_dataset: Path, tmp_path: Path) -> None:
    """A rate for 12 images, in steps of 3: a quarter of it, said in the plan, flat and then a cosine in the log."""
    run = tmp_path / "run"
    words = ("scheduler.strategy=FlatCosine", "scheduler.warmup=0", "scheduler.eta_min_factor=0", "train.steps=4")
    words += ("train.learning_rate=0.004", "train.learning_rate_batch=12", "evaluation.evaluate_frequency=100")
    done = main(f"data.root={drawn_dataset}", *TINY, *words, "train.ema_decay=null", "--output", run)
    assert done.returncode == 0, done.stderr
    assert "rate        0.001 for 3 images per step: train.learning_rate = 0.004 is for 12" in done.stdout
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    rates = [row["train/learning_rate"] for row in rows if "train/loss" in row]
    assert rates == pytest.approx([0.001, 0.001, 0.001, 0.0005])
    refused = main("--resume", run, "train.steps=8")
    assert refused.returncode == 2 and "the cosine schedule (scheduler.strategy: FlatCosine)" in refused.stderr
