"""tune.py: the space, the halving, workers that die, and whole trials in processes of their own."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from detection.config.loading import load_settings
from detection.errors import SettingsError
from detection.tuning.halving import Standing, promotable, ranked, rung_lengths
from detection.tuning.report import write_report
from detection.tuning.space import check_space, read_space, start_values, values_of, word_of
from tests.support.fault_runs import NETWORK, OVERLAY, make_dataset
from tests.support.paths import ARGS, MAIN, REPOSITORY
from tests.support.training_runs import first_difference

RATE = {"train.learning_rate": {"type": "log", "low": 1e-4, "high": 1e-2}}
SCRIPT = REPOSITORY / "tune.py"


# The space


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train.learning_rat": RATE["train.learning_rate"]}, "unknown setting 'train.learning_rat'; the nearest"),
        ({"train": {"type": "int", "low": 1, "high": 2}}, "train is a section"),
        ({"learning_rate": RATE["train.learning_rate"]}, "learning_rate is an old name"),
        ({"train.steps": {"type": "int", "low": 1, "high": 2}}, "train.steps is fixed in a study"),
        ({"run.device": {"type": "choice", "choices": ["cpu", "cuda"]}}, "run.device is fixed in a study"),
        ({"train.momentum": 0.9}, "train.momentum: must be a mapping such as {type: log"),
        ({"train.momentum": {"type": "linear", "low": 0, "high": 1}}, "train.momentum.type: should be 'float'"),
        ({"train.momentum": {"type": "float", "low": 0.9, "high": 0.1}}, "low = 0.9 must be below high = 0.1"),
        ({"train.momentum": {"type": "log", "low": 0, "high": 0.1}}, "low = 0 of a log must be above 0"),
        ({"train.momentum": {"type": "float", "low": 0.9}}, "float needs low and high"),
        ({"train.batch_size": {"type": "int", "low": 1.5, "high": 2}}, "must be whole numbers"),
        ({"train.optimizer": {"type": "choice", "choices": ["adam"]}}, "a choice needs choices, two or more"),
        ({"train.optimizer": {"type": "choice", "choices": ["adam", "adam"]}}, "a choice occurs twice"),
        ({}, "names no setting"),
    ],
)
def test_a_wrong_space_is_one_line(content: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as raised:
        read_space(content, "space.yaml")
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "value"),
    [
        ({"train.optimizer": {"type": "choice", "choices": ["adam", "lion"]}}, '"lion"'),
        ({"train.learning_rate": {"type": "float", "low": -1.0, "high": 1.0}}, "-1.0"),
        ({"data.augmentation.to_gray.p": {"type": "float", "low": 0.5, "high": 1.5}}, "1.5"),
    ],
)
def test_an_impossible_value_is_refused(content: dict[str, Any], value: str) -> None:
    space = read_space(content, "space.yaml")
    with pytest.raises(SettingsError, match=rf"space\.yaml: {next(iter(content))}: {value} is impossible: "):
        check_space(space, load_settings(ARGS)[0], "space.yaml")


def test_our_own_space_fits_the_plan_for_own_data() -> None:
    pytest.importorskip("optuna")
    path = REPOSITORY / "recipes" / "search" / "own_data.yaml"
    space = read_space(yaml.safe_load(path.read_text()), path.name)
    check_space(space, load_settings(ARGS, [REPOSITORY / "recipes" / "rungs" / "r9_aligned.yaml"])[0], path.name)
    for dimension in space.values():
        dimension.distribution()


def test_values_of_a_choice_survive(tmp_path: Path) -> None:
    """Lists and null become text for Optuna, and words that the settings read to the same value."""
    pytest.importorskip("optuna")
    choices = [[0.5, 1.5], [0.9, 1.1]]
    space = read_space({"data.augmentation.affine.scale": {"type": "choice", "choices": choices}}, "space")
    ((name, dimension),) = space.items()
    texts = dimension.distribution().choices
    assert [values_of(space, {name: text})[name] for text in texts] == choices
    settings = load_settings(ARGS, [], [word_of(name, choices[0]), word_of("train.ema_decay", None)])[0]
    assert settings.data.augmentation.affine.scale == (0.5, 1.5) and settings.train.ema_decay is None


def test_the_first_trial_has_the_settings_as_they_are(tmp_path: Path) -> None:
    """A choice that is a list, a null, a number written differently; what lies outside the space is drawn."""
    pytest.importorskip("optuna")
    from detection.tuning.study import Study

    content: dict[str, Any] = {
        "data.augmentation.affine.scale": {"type": "choice", "choices": [[0.5, 1.5], [0.9, 1.1]]},
        "train.ema_decay": {"type": "choice", "choices": [0.9, None]},
        "data.augmentation.to_gray.p": {"type": "choice", "choices": [0, 1]},
        "train.batch_size": {"type": "int", "low": 2, "high": 8},
        "train.learning_rate": {"type": "log", "low": 1e-5, "high": 2e-5},
    }
    words = ["data.augmentation.affine.scale=[0.9, 1.1]", "train.ema_decay=null", "train.batch_size=8"]
    settings = load_settings(ARGS, [], [*words, "data.augmentation.to_gray.p=0.0", "train.learning_rate=0.1"])[0]
    space = read_space(content, "space")
    start = start_values(space, settings)
    assert list(start.values()) == [[0.9, 1.1], None, 0, 8]
    study = Study(tmp_path, space, rungs=1, reduction=2, seed=0, start=start)
    with study.working():
        first, second = study.next_job(2), study.next_job(1)
    assert {name: first.values[name] for name in start} == start
    assert 1e-5 <= first.values["train.learning_rate"] <= 2e-5 and second.number == 0
    assert "the settings without a search, but train.learning_rate." in "\n".join(write_report(study, "AP", [4]))


# Halving


def test_lengths_of_rungs() -> None:
    assert rung_lengths(270, 3, 3) == [30, 90, 270] and rung_lengths("60ep", 2, 4) == ["15ep", "60ep"]
    assert rung_lengths("10ep", 2, 3) == ["3.334ep", "10ep"] and rung_lengths(5, 1, 3) == [5]
    with pytest.raises(ValueError, match="the first one has no step"):
        rung_lengths(4, 3, 3)


def test_the_best_third_of_a_rung_goes_on() -> None:
    """Two of six at the lowest rung deserve the next, each once; higher rungs come first; a failed trial counts."""
    first = [Standing(number, (value,), 0) for number, value in enumerate((0.1, 0.6, 0.3, 0.5, 0.2, 0.4))]
    assert promotable(first[:2], 3, 3) is None  # a third of two is none
    assert promotable(first[:3], 3, 3) == first[1]
    on_the_way = [Standing(each.number, each.values, 1) if each.number == 1 else each for each in first]
    assert promotable(on_the_way, 3, 3) == first[3] and promotable(on_the_way[:5], 3, 3) is None
    second = [Standing(number, (0.9, value), 1) for number, value in ((6, 0.7), (7, 0.8), (8, 0.6))]
    assert promotable([*first, *second], 3, 3) == second[1]
    failed = Standing(9, (), 0, failed=True)
    assert promotable([*first[:2], failed], 3, 3) == first[1]
    assert not failed.is_due and on_the_way[1].is_due and not first[0].is_due
    assert [each.number for each in ranked([*first[:2], *second, failed])] == [7, 6, 8, 1, 0]


# The study


@pytest.fixture
def open_study(tmp_path: Path) -> Callable[[], Any]:
    pytest.importorskip("optuna")
    from detection.tuning.study import Study

    return lambda: Study(tmp_path, read_space(RATE, "space"), rungs=2, reduction=2, seed=0)


def test_two_workers_share_a_study(open_study: Callable[[], Any]) -> None:
    """Of four trials in pairs the better one is promoted; no trial is given to both; the end is the end for both."""
    one, two = open_study(), open_study()
    with one.working(), two.working():
        jobs = one.next_job(4), two.next_job(4)
        assert [(job.number, job.rung) for job in jobs] == [(0, 0), (1, 0)]
        assert jobs[0].values != jobs[1].values
        two.report(jobs[1], 0.5, 30.0, 10)
        third = two.next_job(4)  # one trial of one is no half
        assert (third.number, third.rung) == (2, 0)
        one.report(jobs[0], 0.2, 30.0, 10)
        better = one.next_job(4)
        assert (better.number, better.rung, better.values) == (1, 1, jobs[1].values)
        one.report(better, 0.6, 60.0, 20)
        two.fail(third, "exit code 4: the loss is non-finite")
        last = one.next_job(4)
        assert (last.number, last.rung) == (3, 0)
        assert two.next_job(4) is None and two.busy_trials(others=True) == {3}
        one.report(last, 0.1, 30.0, 10)
        more = two.next_job(4)
        assert (more.number, more.rung) == (0, 1)  # the second of four
        two.report(more, 0.3, 60.0, 20)
        assert one.next_job(4) is two.next_job(4) is None and not one.busy_trials(others=True)
    states = [trial.state.name for trial in one.trials()]
    assert states == ["COMPLETE", "COMPLETE", "FAIL", "RUNNING"]
    assert one.trials()[1].intermediate_values == {0: 0.5, 1: 0.6}
    assert one.minutes() == pytest.approx(two.minutes()) and one.importance() == {}


def test_the_trial_of_a_dead_worker_goes_on(open_study: Callable[[], Any]) -> None:
    """On this machine at once, on another one after a minute without a sign of life."""
    study, now = open_study(), time.time()
    query = "insert into workers (host, pid, started, beat, trial) values (?, ?, ?, ?, ?)"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with study.working():
        job = study.next_job(2)
        study._workers.execute(query, (socket.gethostname(), dead.pid, now, now, job.number))
        assert study.next_job(2) == job
        study.report(job, 0.5, 1.0, 1)
        job = study.next_job(2)
        assert (job.number, job.rung) == (1, 0)
        study._workers.execute(query, ("elsewhere", 1, now, now, job.number))
        assert study.next_job(2) is None and study.busy_trials(others=True) == {job.number}
        study._workers.execute("update workers set beat = beat - 100 where host = 'elsewhere'")
        assert study.next_job(2) == job


def next_new(study: Any) -> Any:
    """The next trial at the lowest rung; promoted ones are given a value."""
    while (job := study.next_job(None)).rung:
        study.report(job, 0.5, 1.0, 1)
    return job


@pytest.mark.slow
def test_importance_and_sampler(open_study: Callable[[], Any]) -> None:
    """With one setting its share is 1; the sampler's proposals follow the random ones and stay in the space."""
    study = open_study()
    with study.working():
        for _ in range(10):
            job = next_new(study)
            rate = job.values["train.learning_rate"]
            study.report(job, 1 - abs(rate - 2e-3), 1.0, 1)
    assert study.importance() == {"train.learning_rate": pytest.approx(1.0)}
    assert 1e-4 <= rate <= 1e-2


# The script


def write_study_files(tmp_path: Path) -> list[str]:
    make_dataset(tmp_path / "data")
    overlay = {**OVERLAY, "scheduler": {"strategy": "CosineAnnealingWarmRestartsWithWarmup", "warmup": 2}}
    overlay["model"] = {"backbone": "darknet_cfg", "cfg": NETWORK}
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(RATE))
    return ["--space", "space.yaml", "--config", "overlay.yaml", "data.root=data", "run.loggers=[files]"]


def tune(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *words]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400, env=environment)


def test_what_is_refused_before_the_start(run_script: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    import tune as script

    words = write_study_files(tmp_path)
    for more, message in (
        ([], "say when it ends with --minutes or --trials"),
        (["--trials", "2", "--rungs", "4"], "--rungs 4 --reduction 3: 4 rungs of a run of 8 steps"),
        (["--trials", "2", "train.minutes=3"], "train.minutes: a trial has a fixed length"),
        (["--trials", "2", "learning_rate=1"], "contradict each other: train.learning_rate = 1 or 0.0001"),
        (["--trials", "2", "run.stop_after=3"], "run.stop_after: the study decides"),
    ):
        done = run_script(script.main, "--study", "study", *words, *more)
        assert done.returncode == 2 and message in done.stderr, done
        assert done.stderr.count("\n") == 1 and not (tmp_path / "study").exists()


def test_a_study_keeps_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command and --study alone go on; other words are refused; overlays are kept as they were."""
    import tune as script

    monkeypatch.chdir(tmp_path)
    words = ["--study", "study", "--trials", "2", *write_study_files(tmp_path)]

    def plan_of(*arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["tune.py", *arguments])
        return script.open_plan(script.parse_arguments())

    plan = plan_of(*words)
    assert plan == plan_of(*words) == plan_of("--study", "study", "--minutes", "3")
    assert (plan["metric"], plan["steps"], plan["rungs"], plan["trials"]) == ("AP50", 8, 3, 2)
    kept = script.overlays_of(tmp_path / "study")
    assert [yaml.safe_load(path.read_text()) for path in kept] == plan["overlays"]
    with pytest.raises(SettingsError, match=r"study\.yaml: the study was begun with other words; continue it with"):
        plan_of(*words, "train.momentum=0.8")
    with pytest.raises(SettingsError, match="with other rungs"):
        plan_of("--study", "study", "--rungs", "2")
    (tmp_path / "overlay.yaml").write_text("train: {steps: 9}")
    with pytest.raises(SettingsError, match="with other overlays"):
        plan_of(*words)


@pytest.mark.slow
def test_a_promoted_trial_equals_a_run_that_never_stopped(tmp_path: Path) -> None:
    """Two trials of two rungs in two workers, one of them killed; then the promoted one beside the same run at once."""
    pytest.importorskip("optuna")
    words = write_study_files(tmp_path)
    start = ["--study", "study", "--rungs", "2", "--reduction", "2", "--trials", "2", *words]
    worker = subprocess.Popen([sys.executable, str(SCRIPT), *start], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    assert "trial 0000 begins, to 4" in worker.stdout.readline()
    time.sleep(1.0)
    worker.kill()
    worker.communicate()
    done = tune(tmp_path, "--study", "study")
    assert done.returncode == 0, done.stderr
    assert (
        "continues, to 8" in done.stdout and "2 trials in" in done.stdout and "trained: 2 to 4, 1 to 8." in done.stdout
    )
    report = json.loads((tmp_path / "study" / "tune.json").read_text())
    best, other = report["trials"]
    assert best["step"] == 8 and other["step"] == 4 and len(best["AP50 by rung"]) == 2
    assert {path.name for path in (tmp_path / "study" / "compare").iterdir()} >= {"compare.png", "compare.csv"}

    overlay = str(tmp_path / "study" / "best.yaml")
    whole = [sys.executable, str(MAIN), "--config", overlay, "data.num_workers=0", "run.loggers=[files]", "--output"]
    settings = ["run.device=cpu", "run.precision=off", "run.seed=3", "run.preflight=false", "run.log_frequency=1"]
    subprocess.run([*whole, "whole", *settings], cwd=tmp_path, check=True, capture_output=True, timeout=300)
    run = tmp_path / "study" / "trials" / f"{best['trial']:04d}"
    first, second = (torch.load(directory / "last.pt") for directory in (tmp_path / "whole", run))
    for key in ("model", "average", "optimizer", "step"):
        assert first_difference(first[key], second[key]) is None, key
