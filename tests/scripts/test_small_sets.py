"""Bookkeeping of benchmarks/small_sets.py, with a stand-in for the training script: slices, ledger, T, table."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import small_sets
from benchmarks.small_sets import command_of, measure_yardstick, read_plan, wanted
from benchmarks.support import slices
from benchmarks.support.run_curves import draw_columns, read_columns
from benchmarks.support.run_results import draw_set, markdown_table, read_results
from benchmarks.support.slices import Job, Ledger, is_done, run_slice, steps_done
from detection.config.loading import merge_settings
from detection.errors import SettingsError
from tests.support.paths import ARGS

# What a run does, in steps of 0.05 s: logs, saves when it is told to stop, ends after its last step.
STAND_IN = """
import json, os, pathlib, signal, sys, time
directory, steps = pathlib.Path(sys.argv[2]), int(sys.argv[3])
directory.mkdir(exist_ok=True)
if sys.argv[1] == "fail":
    sys.exit("data.root: there is nothing")
state = directory / "last.pt"
step = int(state.read_text()) if state.exists() else 0
(directory / "cores").write_text(str(sorted(os.sched_getaffinity(0))))
told = []
signal.signal(signal.SIGTERM, signal.SIG_IGN if sys.argv[1] == "deaf" else lambda *_: told.append(1))
while step < steps:
    time.sleep(0.05)
    if told:
        state.write_text(str(step))
        sys.exit(143)
    step += 1
    with open(directory / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step}) + "\\n")
state.write_text(str(step))
(directory / "report.html").write_text("")
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(slices, "LEAST_SECONDS", 0.3)
    monkeypatch.setattr(slices, "GRACE_SECONDS", 5.0)
    (tmp_path / "run.py").write_text(STAND_IN)
    return tmp_path / "run.py"


@pytest.mark.slow
def test_slices_continue_and_end(script: Path, tmp_path: Path) -> None:
    """Two long runs on two cores, then a short and a failing one: every step once, nothing repeated, times added."""
    long, other, short, bad = (Job(rung, "cells", 0, "half") for rung in ("long", "other", "short", "bad"))
    jobs, said, begun = [long, other, bad, short], [], []

    def command(job: Job, continues: bool) -> list[str]:
        begun.append((job.rung, continues))
        steps = 3 if job is short else 40
        mode = "fail" if job is bad else "run"
        return [sys.executable, "-IS", str(script), mode, str(job.directory(tmp_path)), str(steps)]

    for number in range(40):  # slices that grow: on a busy machine a process may take seconds to begin
        run_slice(jobs, tmp_path, [0, 1], 1.5 + 0.5 * number, command, say=said.append)
        if all(is_done(job, tmp_path) for job in (long, other, short)):
            break
    assert ("long", True) in begun and begun.count(("bad", False)) == 1
    for job, steps in ((long, 40), (other, 40), (short, 3)):
        rows = (job.directory(tmp_path) / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == list(range(1, steps + 1))
    places = {job.rung: (job.directory(tmp_path) / "cores").read_text() for job in (long, other)}
    assert all(place in ("[0]", "[1]") for place in places.values())
    ledger = Ledger(tmp_path)
    run_slice([bad], tmp_path, [0], 30.0, command, True, said.append)
    assert begun.count(("bad", False)) == 2
    assert ledger.failed(bad) and not ledger.failed(long) and not is_done(bad, tmp_path)
    assert any("bad/cells/0/half failed with exit code 1: data.root: there is nothing" in line for line in said)
    assert {0, 143} <= {row["code"] for row in ledger.of(long)}
    assert ledger.minutes(long) == pytest.approx(sum(row["seconds"] for row in ledger.of(long) if row["kept"]) / 60)
    assert ledger.minutes(long) > 2 / 60


@pytest.mark.slow
def test_a_run_without_a_checkpoint_begins_anew(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "GRACE_SECONDS", 0.3)
    job, continued = Job("R0", "cells", 0, "half"), []

    def command(job: Job, continues: bool) -> list[str]:
        continued.append(continues)
        return [sys.executable, "-IS", str(script), "deaf", str(job.directory(tmp_path)), "10000"]

    log = job.directory(tmp_path) / "metrics.jsonl"
    for number in range(20):
        ledger = run_slice([job], tmp_path, [0], 1.5 + number, command, say=lambda line: None)
        if len(continued) > 1 and log.exists():
            break
    assert not any(continued) and ledger.minutes(job) == 0
    steps = [json.loads(row)["step"] for row in log.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))  # those of the last process alone


def test_a_ledger_that_was_cut_off(tmp_path: Path) -> None:
    job = Job("R0", "cells", 0, "half")
    Ledger(tmp_path).add(job, 60.0, 143)
    with open(tmp_path / "ledger.jsonl", "a") as file:
        file.write('{"job": "R0/ce')
    ledger = Ledger(tmp_path)
    ledger.add(job, 30.0, 0)
    assert Ledger(tmp_path).minutes(job) == 1.5
    Ledger(tmp_path).add(job, 600.0, 143, kept=False)
    assert Ledger(tmp_path).minutes(job) == 1.5


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ([], True),
        (["R8"], True),
        (["R*/bccd/1"], True),
        (["R8/bccd/1/half"], True),
        (["R8/bccd/2"], False),
        (["bccd"], False),
        (["R0", "*/*/1"], True),
        (["R8/bccd/1/half/more"], False),
    ],
)
def test_patterns(patterns: list[str], expected: bool) -> None:
    assert wanted(Job("R8", "bccd", 1, "half"), patterns) is expected


PLAN = """
sets: {cells: {words: [a=1]}}
rungs: {R0: {overlays: [recipes/bccd.yaml]}}
yardstick: {rung: R0, set: cells, seeds: [0, 1], steps: 100}
budgets: {half: {share: 0.5, rungs: [R0], sets: [cells], seeds: [0]}}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rungs: [R0]", "rungs: [R7]", "half names the rung 'R7'; there are R0"),
        ("set: cells", "set: sells", "yardstick names the set 'sells'; there are cells"),
        ("bccd.yaml", "none.yaml", "rungs.R0: there is no overlay recipes/none.yaml"),
        ("share: 0.5", "share: 0", "budgets.half.share: Input should be greater than 0"),
        ("half:", "yardstick:", "yardstick is the name of the yardstick's own"),
        ("steps: 100", "step: 100", "yardstick.steps: Field required"),
        (
            "yardstick: {rung: R0, set: cells, seeds: [0, 1], steps: 100}",
            "curves: [val/loss]",
            "budgets.half: has a share of T, but the plan has no yardstick",
        ),
    ],
)
def test_a_wrong_plan_is_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN.replace(old, new))
    with pytest.raises(SettingsError) as raised:
        read_plan(tmp_path / "plan.yaml")
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["small_sets", "narrow_darknet"])
def test_every_run_of_the_plan_has_settings_that_exist(name: str, tmp_path: Path) -> None:
    plan = read_plan(Path(small_sets.__file__).with_name(f"{name}.yaml"))
    names = {"data": "/data", "work": str(tmp_path)}
    jobs = plan.jobs()
    assert len(set(jobs)) == len(jobs) and jobs[0].budget == "yardstick"
    for job in jobs:
        command = command_of(plan, job, False, 20.0, names, tmp_path, "cpu")
        overlays = [Path(command[index + 1]) for index, word in enumerate(command) if word == "--config"]
        words = [word for word in command[2:] if "=" in word]
        tree, _, given = merge_settings(ARGS, overlays, words)
        share = None if job.budget == "yardstick" else 20.0 * plan.budgets[job.budget].share
        assert tree["train"]["minutes"] == share and tree["run"]["seed"] == job.seed and "data.root" in given
        assert command_of(plan, job, True, None, names, tmp_path, "cpu")[2:] == [
            "--resume",
            str(job.directory(tmp_path)),
            "run.preflight=false",
        ]
    plan = plan.model_copy(
        update={"sets": {name: value.model_copy(update={"words": ("a={x}",)}) for name, value in plan.sets.items()}}
    )
    with pytest.raises(SettingsError, match=r"a=\{x\}: say what it is with --let"):
        command_of(plan, jobs[0], False, None, names, tmp_path, "cpu")


@pytest.mark.parametrize("name", ["backbones", "schedules"])
def test_the_plans_of_equal_steps(name: str, tmp_path: Path) -> None:
    """No yardstick, no time: every run of a plan differs from the others in nothing but what its rung is named for."""
    plan = read_plan(Path(small_sets.__file__).with_name(f"{name}.yaml"))
    names = {"data": "/data", "work": str(tmp_path)}
    steps, colors = set(), []
    for job in plan.jobs():
        command = command_of(plan, job, False, None, names, tmp_path, "cpu")
        overlays = [Path(command[index + 1]) for index, word in enumerate(command) if word == "--config"]
        tree, _, _ = merge_settings(ARGS, overlays, [word for word in command[2:] if "=" in word])
        train = tree["train"]
        assert train["minutes"] is None and train["image_size"] == tree["evaluation"]["image_size"]
        steps.add((train["steps"], train["batch_size"], train["learning_rate"], train["optimizer"]))
        colors.append(plan.rungs[job.rung].color)
    assert len(steps) == 1 and set(colors) in ({"red", "purple", "gold"}, {"red", "blue", "green"})


def test_the_time_of_the_yardstick(tmp_path: Path) -> None:
    """100 steps: 20 in 3 minutes and 40 in 4 make 15 and 10 minutes, 12.5 in the mean."""
    (tmp_path / "plan.yaml").write_text(PLAN)
    plan = read_plan(tmp_path / "plan.yaml")
    jobs, ledger = plan.jobs()[:2], Ledger(tmp_path)
    for job, steps, minutes in zip(jobs, (20, 40), (3, 4), strict=True):
        job.directory(tmp_path).mkdir(parents=True)
        (job.directory(tmp_path) / "metrics.jsonl").write_text(f'{{"step": 5}}\n{{"step": {steps}}}\n{{"st')
        ledger.add(job, 60.0 * minutes, 143)
    assert measure_yardstick(plan, jobs, tmp_path, 30) is None
    measured = measure_yardstick(plan, jobs, tmp_path, 20)
    assert measured == {"minutes": pytest.approx(12.5), "steps_measured": 20, "runs": 2}
    assert steps_done(jobs[1].directory(tmp_path)) == 40


def complete(work: Path, job: Job, rows: list[tuple[int, float, float]], last: tuple[int, float, float]) -> None:
    """Write what a completed run leaves."""
    directory = job.directory(work)
    directory.mkdir(parents=True)
    lines = ["step,val/AP,val/AP50", *(f"{step},{ap},{ap50}" for step, ap, ap50 in rows)]
    (directory / "results.csv").write_text("\n".join(lines))
    (directory / "metrics.json").write_text(json.dumps(dict(zip(("step", "AP", "AP50"), last, strict=True))))
    (directory / "report.html").write_text("")
    Ledger(work).add(job, 90.0, 0)


def test_table_and_figure(tmp_path: Path) -> None:
    """The evaluation with the highest AP counts; the last one may have no row."""
    jobs = [Job(rung, "cells", seed, "half") for rung in ("R0", "R8") for seed in (0, 1)]
    complete(tmp_path, jobs[0], [(50, 0.4, 0.8), (100, 0.5, 0.7)], (100, 0.45, 0.75))
    complete(tmp_path, jobs[1], [(50, 0.4, 0.8), (100, 0.5, 0.85)], (100, 0.6, 0.9))
    results = read_results(jobs, tmp_path)
    assert [(result.ap, result.ap50, result.steps) for result in results] == [(0.5, 0.7, 100), (0.6, 0.9, 100)]
    table = markdown_table(jobs, results).splitlines()
    assert "| cells | R0 | 2 of 2 | 0.550 (0.500 to 0.600) | 0.800 | 0.688 | 100 | 1.5 |" in table
    assert "| cells | R8 | 0 of 2 | - | - | - | - | - |" in table
    draw_set(tmp_path / "cells.png", "cells", results)
    assert (tmp_path / "cells.png").read_bytes().startswith(b"\x89PNG")


def test_curves_of_columns(tmp_path: Path) -> None:
    """The smallest loss and the largest AP50 with their steps; a step taken twice counts once; a line per rung."""
    jobs = [Job(rung, "cells", 0, "equal") for rung in ("R0", "R8")]
    for job, losses in zip(jobs, ((3.0, 1.0, 2.0), (5.0, 4.0, 6.0)), strict=True):
        complete(tmp_path, job, [(50, 0.4, 0.8)], (150, 0.3, 0.5))
        rows = [{"step": 50, "val/loss": 9.0}, {"step": 40, "train/loss": 1.0}]
        rows += [{"step": 50 * n, "val/loss": loss, "val/AP50": loss / 10} for n, loss in enumerate(losses, start=1)]
        (job.directory(tmp_path) / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    results = read_results(jobs, tmp_path)
    assert read_columns(tmp_path, results[0], ["val/loss"]) == {"val/loss": [(50, 3.0), (100, 1.0), (150, 2.0)]}
    table = draw_columns(tmp_path, ["val/loss", "val/AP50", "val/AR100"], results, {"R0": "red", "R8": None})
    assert "| cells | R0 | 1.000 (100) | 0.300 (50) | - | 150 | 1.5 |" in table
    assert "| cells | R8 | 4.000 (100) | 0.600 (150) | - | 150 | 1.5 |" in table
    for name in ("val_loss", "val_AP50", "val_AR100"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
