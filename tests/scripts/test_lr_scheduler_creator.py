"""lr_scheduler_creator.py end to end: figure, CSV and TensorBoard events."""

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lr_scheduler_creator
from tests.support.paths import REPOSITORY

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(run_script) -> Run:
    return lambda *arguments: run_script(lr_scheduler_creator.main, *arguments)


def rows_of(path: Path) -> list[dict[str, float]]:
    with open(path, encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_every_turn_is_in_the_files(run: Run, tmp_path: Path) -> None:
    """10 steps per epoch; burn-in of 4 steps to the power of 4, drops at 50 and 80 of 100 steps."""
    code, out, err = run(
        "--images", 640, "train.batch_size=64", "train.steps=10ep", "train.learning_rate=1.0", "scheduler.warmup=4",
        "scheduler.index=[50, 80]", "scheduler.scale=[1.0, 0.1, 0.01]", "--output", tmp_path / "out",
    )  # fmt: skip
    assert code == 0 and err == ""
    assert "100 steps = 10.0 epochs of 10.0 steps" in out and "0.1 at 50, 0.01 at 80" in out
    rows = {row["step"]: row for row in rows_of(tmp_path / "out" / "LambdaLR.csv")}
    assert len(rows) == 100  # so few steps are all drawn
    by_hand = {0: 1 / 256, 1: 1 / 16, 2: 81 / 256, 3: 1, 49: 1, 50: 0.1, 79: 0.1, 80: 0.01, 99: 0.01}
    assert {step: rows[step]["learning_rate"] for step in by_hand} == pytest.approx(by_hand)
    assert rows[25]["epoch"] == 2.5
    events = EventAccumulator(str(tmp_path / "out" / "LambdaLR"), size_guidance={"scalars": 0}).Reload()
    logged = {event.step: event.value for event in events.Scalars("learning_rate")}
    assert logged == pytest.approx({step: row["learning_rate"] for step, row in rows.items()})
    picture = cv2.imread(str(tmp_path / "out" / "schedule.png"))
    assert picture is not None and picture.std() > 0


def test_several_overlays_in_one_figure(run: Run, tmp_path: Path) -> None:
    recipes = REPOSITORY / "recipes"
    code, out, _ = run(
        "--compare", recipes / "240224_LambdaLR.yaml", "--compare", recipes / "240308_CosineAnnealing_T1.yaml",
        "--compare", recipes / "240224_LambdaLR.yaml", "--output", tmp_path / "out",
    )  # fmt: skip
    assert code == 0 and "150000 steps = 81.2 epochs" in out
    names = sorted(path.stem for path in (tmp_path / "out").glob("*.csv"))
    assert names == ["240224_LambdaLR", "240224_LambdaLR 3", "240308_CosineAnnealing_T1"]
    cosine = {row["step"]: row["learning_rate"] for row in rows_of(tmp_path / "out" / "240308_CosineAnnealing_T1.csv")}
    restarts = range(1000, 150_000, 10_000)
    # all 15 restarts: the full rate there, nearly eta_min one step before
    assert [cosine[step] for step in restarts] == pytest.approx([1e-4] * 15)
    assert [cosine[step - 1] for step in restarts[1:]] == pytest.approx([1e-6] * 14, rel=1e-3)


def test_biases_have_their_own_curve(run: Run, tmp_path: Path) -> None:
    code, _, _ = run("--config", REPOSITORY / "recipes" / "pedl_spp_adam.yaml", "--output", tmp_path / "out")
    first, *_, last = rows_of(tmp_path / "out" / "pedl_spp_adam.csv")
    assert code == 0 and (first["learning_rate"], first["learning_rate_biases"]) == (5.79e-4, 0.1)
    assert last["learning_rate"] == last["learning_rate_biases"] == pytest.approx(5.79e-6)


def test_no_network_and_no_dataset(tmp_path: Path) -> None:
    """Imports no torch, and plots half a million steps without data."""
    code = (
        "import sys, lr_scheduler_creator; sys.argv = ['x', 'train.steps=500000', '--output', sys.argv[1]]; "
        "lr_scheduler_creator.main(); sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, tmp_path / "out"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    rows = rows_of(tmp_path / "out" / "LambdaLR.csv")
    assert rows[-1]["step"] == 499_999 and len(rows) < 3000


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["--images", "0"], 2, "--images 0"),
        (["--images", "many"], 2, "many"),
        (["scheduler.warmup=fast"], 2, "scheduler.warmup"),
        (["--config", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["scheduler.index=['5ep', 100]", "scheduler.scale=[1.0, 0.5, 0.1]"], 2, "ascending"),
        (["--output", "/proc/none"], 6, "/proc/none"),
    ],
)
def test_bad_input_is_one_line(run: Run, arguments: list[str], code: int, part: str) -> None:
    found, _, err = run(*arguments)
    assert found == code and part in err and len(err.strip().splitlines()) == 1


def test_warm_up_and_turns_are_marked(default_settings) -> None:
    words = ("scheduler.strategy=CosineAnnealingWarmRestartsWithWarmup", "scheduler.T_0=100", "train.steps=500")
    cosine = lr_scheduler_creator.build_curve("cosine", default_settings(*words, "scheduler.warmup=20"), 640)
    steps = default_settings("train.steps=500", "scheduler.warmup=0", "scheduler.index=[200, 300, 400]")
    figure = lr_scheduler_creator.draw([cosine, lr_scheduler_creator.build_curve("steps", steps, 640)])
    marks = {line.get_marker(): list(line.get_xdata()) for line in figure.axes[0].get_lines() if len(line.get_xdata())}
    assert marks["^"] == [20] and marks["o"] == [120, 220, 320, 420] and marks["s"] == [200, 300, 400]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["cosine", "steps", "end of the warm-up", "restart", "milestone"]


def test_restarts_too_close_to_be_drawn_are_said_so(run: Run, tmp_path: Path) -> None:
    code, out, _ = run(
        "scheduler.strategy=CosineAnnealingWarmRestartsWithWarmup", "scheduler.T_0=2", "scheduler.warmup=0",
        "train.steps=500000", "--output", tmp_path / "out",
    )  # fmt: skip
    assert code == 0 and "(249992 more, closer than they can be drawn)" in out
    assert len(rows_of(tmp_path / "out" / "CosineAnnealingWarmRestartsWithWarmup.csv")) < 2100
