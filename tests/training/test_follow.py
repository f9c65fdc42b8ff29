"""An evaluator that follows a run: every checkpoint once, also while they are replaced, until the run ends."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import compare_runs
import validation
from detection.checkpoints import load_checkpoint, save_checkpoint
from detection.errors import CheckpointError
from detection.runtime.run_directory import is_locked, write_status
from detection.training import console
from detection.training import follow as follow_module
from detection.training.checkpoint_writer import LAST
from detection.training.follow import Timing, Waiting
from detection.training.loggers.protocol import FINISHED, RUNNING, STOPPED
from detection.training.new_checkpoints import DIED, NewCheckpoints, end_of
from detection.training.report_page import report_run, rows_of_run
from tests.support.paths import REPOSITORY
from tests.support.training_runs import load_main

TINY = (
    "run.device=cpu", "run.precision=off", "run.preflight=false", "data.num_workers=0", "train.image_size=64",
    "model.backbone=darknet", "model.width=0.05", "model.depth=0.1", "yolo.neck_channels=[8,8,8]",
    "train.batch_size=2", "train.steps=3",
    "train.learning_rate=0.01", "scheduler.strategy=constant", "scheduler.warmup=0", "train.ema_decay=0.5",
    "train.ema_ramp=0", "train.save_frequency=1", "train.keep_checkpoints=9", "evaluation.image_size=64",
    "evaluation.visualize_images=1", "evaluation.evaluate_frequency=null",
)  # fmt: skip


def rows_of(directory: Path) -> dict[int, dict[str, Any]]:
    """The evaluations of a directory by step."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if "val/AP50" in row}


@pytest.fixture
def checkpoint_of() -> Callable[[int], dict[str, Any]]:
    return lambda step: {"step": step, "settings": {}, "categories": {}, "model": {"weight": torch.full((999,), step)}}


def test_every_checkpoint_of_a_run_is_evaluated_once(
    tmp_path: Path, drawn_dataset: Path, run_script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "report_run", report_run)  # which `run_script` leaves out
    run = tmp_path / "run"
    trained = run_script(load_main().main, "--output", run, f"data.root={drawn_dataset}", *TINY)
    assert trained.returncode == 0, trained.stderr
    assert "4 validation images" not in trained.stderr and list(rows_of(run)) == [3]  # null: at the end only
    before = (run / "results.csv").read_bytes(), (run / "metrics.jsonl").read_bytes(), (run / "train.log").read_bytes()
    picture = (run / "results.png").read_bytes()

    followed = run_script(validation.main, "--follow", run)
    assert followed.returncode == 0, followed.stderr
    assert "the run has finished, 3 of its steps are evaluated" in followed.stdout
    mine, own = rows_of(run / "evaluator"), rows_of(run)
    assert list(mine) == [1, 2, 3]
    # The training's own evaluation of the same weights is the reference, its losses and the epoch too.
    assert mine[3] == own[3]
    assert len({json.dumps(row["val/loss"]) for row in mine.values()}) == 3
    assert [line.split(",")[0] for line in (run / "evaluator" / "results.csv").read_text().splitlines()] == [
        "step", "1", "2", "3",
    ]  # fmt: skip
    # One writer per file: the run's own ones are untouched, the page alone is renewed, with three points in its curve.
    assert before == (
        (run / "results.csv").read_bytes(), (run / "metrics.jsonl").read_bytes(), (run / "train.log").read_bytes()
    )  # fmt: skip
    assert (run / "results.png").read_bytes() != picture
    assert [row["step"] for row in rows_of_run(run) if "val/AP50" in row] == [1, 2, 3]
    assert compare_runs.read_run(run, "run").points("val/loss")[:, 0].tolist() == [1, 2, 3]
    best = max(mine.values(), key=lambda row: (row["val/AP50"] or 0, -row["step"]))["step"]  # the first of equals
    assert load_checkpoint(run / "evaluator" / "best.pt")["step"] == best

    again = run_script(validation.main, "--follow", run / LAST)  # a file of the run names it too
    assert again.returncode == 0 and "3 steps are evaluated" in again.stdout and rows_of(run / "evaluator") == mine
    (run / "evaluator" / "metrics.jsonl").write_text(json.dumps(mine[1]) + "\n" + json.dumps(mine[3]) + "\n")
    other = run_script(validation.main, "--follow", run, "evaluation.confidence_threshold=0.1")
    assert other.returncode == 2 and "holds evaluations with evaluation.confidence_threshold = 0.001" in other.stderr
    write_status(run, STOPPED)
    stopped = run_script(validation.main, "--follow", run)
    assert stopped.returncode == 1 and "the run was stopped before its end" in stopped.stderr
    assert rows_of(run / "evaluator") == {1: mine[1], 3: mine[3], 2: mine[2]}  # the one that was lost
    (tmp_path / "file").touch()
    refused = run_script(validation.main, "--follow", run, "--output", tmp_path / "file" / "below")
    assert refused.returncode == 6 and "take --output DIRECTORY" in refused.stderr


def test_checkpoints_are_whole_while_they_are_replaced(tmp_path: Path, checkpoint_of: Any) -> None:
    count, seen = 25, list[int]()
    writer = threading.Thread(
        target=lambda: [save_checkpoint(tmp_path / LAST, checkpoint_of(step)) for step in range(1, count + 1)]
    )
    checkpoints = NewCheckpoints(tmp_path, {3})
    writer.start()
    alive = True
    while alive:
        alive = writer.is_alive()
        for checkpoint in checkpoints:
            assert (checkpoint.content["model"]["weight"] == checkpoint.step).all()
            seen.append(checkpoint.step)
    assert seen == sorted(set(seen)) and seen[-1] == count and 3 not in seen
    assert list(checkpoints) == []


def test_numbered_checkpoints_come_first_and_a_damaged_one_is_left_out(
    tmp_path: Path, checkpoint_of: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (20, 3, 100):
        save_checkpoint(tmp_path / f"step_{step:09d}.pt", checkpoint_of(step))
    save_checkpoint(tmp_path / LAST, checkpoint_of(100), ["best.pt"])
    (tmp_path / "step_000000050.pt").write_bytes(b"torn")
    checkpoints = NewCheckpoints(tmp_path, {20})
    assert [checkpoint.step for checkpoint in checkpoints] == [3, 100]
    assert capsys.readouterr().out == ""  # a remote file may be whole at the next look
    for _ in range(4):
        assert list(checkpoints) == []
    assert capsys.readouterr().out.count("step_000000050.pt") == 1
    save_checkpoint(tmp_path / "step_000000050.pt", checkpoint_of(50))
    assert [checkpoint.step for checkpoint in checkpoints] == [50]


def test_the_end_of_a_run_is_seen_by_its_status_and_its_lock(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from detection.runtime.run_directory import lock_directory, write_status\n"
        "d = Path(sys.argv[1]); f = lock_directory(d); write_status(d, 'running')\n"
        "print(flush=True); input()"
    )
    assert end_of(tmp_path) is None and is_locked(tmp_path) is None  # nothing is there yet
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        assert is_locked(tmp_path) is True and end_of(tmp_path) is None
        process.kill()
    assert is_locked(tmp_path) is False and end_of(tmp_path) == DIED
    status = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(json.dumps(status | {"host": "another machine"}))
    assert end_of(tmp_path) is None  # its lock may not reach this one
    for word in (FINISHED, STOPPED):
        write_status(tmp_path, word)
        assert end_of(tmp_path) == word
    write_status(tmp_path, RUNNING)
    assert end_of(tmp_path) == DIED


def test_without_news_following_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_script: Any) -> None:
    monkeypatch.setattr(follow_module, "POLL_SECONDS", 0.01)
    waited = run_script(validation.main, "--follow", tmp_path / "soon", "--follow-timeout", "0.001")
    assert (waited.returncode, waited.stderr) == (1, f"{tmp_path / 'soon'}: no new checkpoint for 0.001 minutes\n")
    (tmp_path / "images").mkdir()
    for other in ("tpyo", "images"):  # missing; a directory of something else, which would be waited for without end
        typed = run_script(validation.main, "--follow", tmp_path / other)
        message = f"{other} is no run directory; with a timeout it is waited for"
        assert typed.returncode == 2 and message in typed.stderr
    for words in (["--follow", tmp_path, "--tta"], ["--follow-timeout", "3", "--weights", tmp_path / "best.pt"]):
        assert run_script(validation.main, *words).returncode == 2


def test_evaluations_keep_their_distance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept = [100.0], list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(follow_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(follow_module.time, "sleep", sleep)
    waiting = Waiting(tmp_path, Timing(interval=30))
    for passed in (7.0, 50.0, 0.0):  # seconds that an evaluation takes
        waiting.for_interval()
        now[0] += passed
    assert slept == [0.0, 23.0, 0.0]


def test_another_network_is_one_line() -> None:
    followed: Any = follow_module.Followed(*[None] * 7)  # type: ignore[arg-type]
    network = torch.nn.Linear(2, 3)
    object.__setattr__(followed, "detector", type("Detector", (), {"model": network}))
    with pytest.raises(CheckpointError, match=r"^step 5: another network than the checkpoint before: "):
        followed.evaluate({"step": 5, "model": torch.nn.Linear(2, 4).state_dict()})


@pytest.mark.slow
def test_killed_and_continued_on_both_sides_each_checkpoint_is_evaluated_once(
    tmp_path: Path, drawn_dataset: Path, request: pytest.FixtureRequest
) -> None:
    """The follower is killed twice and the run once, by SIGKILL while they work; both are started again."""
    run, names = tmp_path / "run", ["yolo-v3/main.py", "validation.py"]
    main, follower = ([sys.executable, str(REPOSITORY / name)] for name in names)
    words = [word for word in TINY if not word.startswith(("train.steps", "train.keep"))]
    words += ["train.steps=24", "train.keep_checkpoints=99", "evaluation.evaluate_frequency=1"]

    def start(name: str, *command: str | Path) -> subprocess.Popen[bytes]:
        with open(tmp_path / name, "wb") as log:
            process = subprocess.Popen([*map(str, command)], stdout=log, stderr=log, cwd=tmp_path)
        request.addfinalizer(process.kill)
        return process

    def signal_at(process: subprocess.Popen[bytes], log: str, count: int, where: Path, number: int) -> None:
        """Send a signal once that many rows are there."""
        deadline = time.monotonic() + 120
        while not where.is_file() or len(evaluated(where)) < count:
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / log).read_text()
            time.sleep(0.01)
        process.send_signal(number)
        assert number != signal.SIGKILL or process.wait() == -number

    own, mine = run / "metrics.jsonl", run / "evaluator" / "metrics.jsonl"
    trained = start("train", *main, "--output", run, f"data.root={drawn_dataset}", *words)
    signal_at(trained, "train", 6, own, signal.SIGSTOP)  # or it would end while the follower imports torch
    followed = start("follow", *follower, "--follow", run)
    signal_at(followed, "follow", 2, mine, signal.SIGKILL)
    of_dead = start("of_dead", *follower, "--follow", run)
    trained.send_signal(signal.SIGCONT)
    signal_at(trained, "train", len(evaluated(own)) + 2, own, signal.SIGKILL)
    assert of_dead.wait(120) == 1  # what a dead run left is evaluated
    assert end_of(run) == DIED and "the run has died before its end" in (tmp_path / "of_dead").read_text()
    kept = {load_checkpoint(path)["step"] for path in run.glob("step_*.pt")}
    assert sorted(evaluated(mine)) == sorted(kept) and len(kept) < 24

    trained = start("resume", *main, "--resume", run)
    followed = start("again", *follower, "--follow", run)
    signal_at(followed, "again", len(kept) + 2, mine, signal.SIGKILL)
    followed = start("last", *follower, "--follow", run)
    assert trained.wait(120) == 0, (tmp_path / "resume").read_text()
    assert followed.wait(120) == 0, (tmp_path / "last").read_text()
    assert sorted(evaluated(mine)) == list(range(1, 25))  # each once
    assert [int(line.split(",")[0]) for line in (mine.parent / "results.csv").read_text().splitlines()[1:]] == sorted(
        evaluated(mine)
    )
    rows, of_run = rows_of(run / "evaluator"), rows_of(run)
    assert all(rows[step] == of_run[step] for step in rows)  # the run's own evaluation of the same weights


def evaluated(path: Path) -> list[int]:
    """Steps of the evaluations in a file that may be in the middle of a write."""
    rows = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [row["step"] for row in rows if "val/AP50" in row]
