"""compare_runs.py on run directories written by the logger of training."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import compare_runs
from tests.support.run_logging import logging_to

Run = Callable[..., Any]
AP50 = {"A": [0.2, 0.5, 0.4], "B": [0.1, 0.3, 0.6]}


@pytest.fixture
def run(run_script: Run) -> Run:
    return lambda *arguments: run_script(compare_runs.main, *arguments)


@pytest.fixture
def two_runs(tmp_path: Path) -> list[Path]:
    """30 steps of 8 and of 16 images; an evaluation every 10 steps; A trains at 4, 8 and 16 images/s."""
    return [write_run(tmp_path / f"24022{k}-101112_{name}", name, 8 * k) for k, name in enumerate(AP50, start=1)]


def write_run(directory: Path, name: str, images_per_step: int) -> Path:
    with logging_to(directory) as logger:
        logger.line(f"batch       1 x 1 subdivisions x 1 process = {images_per_step} images per step", show=False)
        for number, ap50 in enumerate(AP50[name], start=1):
            step = 10 * number
            logger.log(
                step,
                {
                    "train/loss": 100.0 / number,
                    "train/images_per_second": 2.0 ** (number + 1),
                    "train/learning_rate": 0.1 * number,
                },
            )
            row = {"val/AP": ap50 / 2, "val/AP50": ap50, "val/AR100": ap50 + 0.1, "val/loss": 50 / number}
            logger.evaluation(step, row | {"val/APl": None, "epoch": number / 2})
    return directory


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_table_files_and_figure(run: Run, two_runs: list[Path], tmp_path: Path) -> None:
    result = run(*two_runs, "--output", tmp_path / "out")
    assert result.returncode == 0 and result.stderr == ""
    header, first, second, _ = result.stdout.splitlines()
    assert header.split()[:2] == ["run", "steps"]
    # A: 10 steps of 8 images each at 4, 8 and 16 images/s are 20 + 10 + 5 s
    assert first.split() == ["A", "30", "1.5", "0.6", "min", "0.500", "20", "0.400", "0.250", "0.600"]
    assert second.split() == ["B", "30", "1.5", "1.2", "min", "0.600", "30", "0.600", "0.300", "0.700"]
    row = rows_of(tmp_path / "out" / "compare.csv")[0]
    assert (row["best AP50"], row["best AP50 step"], row["last AP50"]) == ("0.5", "20", "0.4")
    assert (row["best loss"], row["best loss step"]) == (repr(50 / 3), "30")  # of a loss the lowest is the best
    assert float(row["images"]) == 240 and float(row["training hours"]) == pytest.approx(35 / 3600)
    curves = json.loads((tmp_path / "out" / "compare.json").read_text())["runs"][1]["curves"]
    assert curves["val/AP50"] == [[10, 0.1], [20, 0.3], [30, 0.6]]
    assert curves["train/learning_rate"] == [[10, 0.1], [20, 0.2], [30, pytest.approx(0.3)]]
    picture = cv2.imread(str(tmp_path / "out" / "compare.png"))
    assert picture is not None and picture.std() > 10


@pytest.mark.parametrize(
    ("axis", "unit", "of_a", "of_b"),
    [
        ("step", "optimizer step", [10, 20, 30], [10, 20, 30]),
        ("epoch", "epoch", [0.5, 1, 1.5], [0.5, 1, 1.5]),
        ("images", "images seen", [80, 160, 240], [160, 320, 480]),
        ("time", "minutes of training", [20 / 60, 30 / 60, 35 / 60], [40 / 60, 1, 70 / 60]),
    ],
)
def test_curves_over_every_axis(two_runs: list[Path], axis: str, unit: str, of_a: list, of_b: list) -> None:
    runs = [compare_runs.read_run(directory, directory.name[-1]) for directory in two_runs]
    figure = compare_runs.draw(runs, axis, smooth=1)
    assert [axes.get_title() for axes in figure.axes] == [
        *("learning rate", "training loss", "validation loss", "AP50", "AP", "recall (AR100)")
    ]
    panel = figure.axes[3]
    a, b, *stars = panel.get_lines()
    assert panel.get_xlabel() == unit
    assert a.get_xdata() == pytest.approx(of_a) and b.get_xdata() == pytest.approx(of_b)
    assert list(a.get_ydata()) == AP50["A"] and list(b.get_ydata()) == AP50["B"]
    assert [(star.get_xdata()[0], star.get_ydata()[0]) for star in stars] == [
        (pytest.approx(of_a[1]), 0.5),
        (pytest.approx(of_b[2]), 0.6),
    ]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["A", "B"]


def test_smoothing_is_centred_and_shows_the_true_values() -> None:
    values = np.random.default_rng(0).normal(size=20)
    by_loop = [np.mean([values[j] for j in range(20) if abs(j - k) <= 2]) for k in range(20)]
    assert compare_runs.centred_mean(values, 5) == pytest.approx(by_loop)
    assert compare_runs.centred_mean(values, 1) == pytest.approx(values)


def test_only_the_training_loss_is_smoothed(two_runs: list[Path]) -> None:
    figure = compare_runs.draw([compare_runs.read_run(two_runs[0], "A")], "step", smooth=3)
    loss, true = figure.axes[1].get_lines()
    assert list(loss.get_ydata()) == pytest.approx([75, (100 + 50 + 100 / 3) / 3, (50 + 100 / 3) / 2])
    assert list(true.get_ydata()) == pytest.approx([100, 50, 100 / 3])
    assert figure.axes[1].get_title() == "training loss, mean of 3 logged values"
    assert list(figure.axes[3].get_lines()[0].get_ydata()) == AP50["A"]


def test_cut_lines_and_runs_that_have_not_been_evaluated(run: Run, two_runs: list[Path], tmp_path: Path) -> None:
    """A is killed in the middle of a row of each file; B has no evaluation yet."""
    a, b = two_runs
    for name, cut in (("results.csv", "40,0.9,0.9"), ("metrics.jsonl", '{"step": 40, "train/loss": 9')):
        with open(a / name, "a", encoding="utf-8") as file:
            file.write(cut)
    (b / "results.csv").write_text("")
    kept = [line for line in (b / "metrics.jsonl").read_text().splitlines() if "train/loss" in line]
    (b / "metrics.jsonl").write_text("\n".join(kept) + "\nno JSON\n")
    result = run(a, b, "--output", tmp_path / "out")
    assert result.returncode == 0 and result.stderr == ""
    assert "A: results.csv: left out line 5 (still being written, or cut)" in result.stdout
    assert "A: metrics.jsonl: left out line 7 (still being written, or cut)" in result.stdout
    assert "B: metrics.jsonl: left out line 4" in result.stdout
    assert "B: has no validation loss, AP50, AP, recall (AR100) (yet)" in result.stdout
    first, second = rows_of(tmp_path / "out" / "compare.csv")
    assert (first["steps"], first["best AP50"]) == ("30", "0.5")
    assert (second["steps"], second["best AP50"], second["epochs"]) == ("30", "", "")
    # over epochs only A can be drawn; B alone cannot be at all
    result = run(a, b, "--x", "epoch", "--output", tmp_path / "epochs")
    assert result.returncode == 0 and "B: has no epoch, not drawn" in result.stdout
    result = run(b, "--x", "epoch", "--output", tmp_path / "none")
    assert result.returncode == 2 and result.stderr.startswith("--x epoch: no run has epoch")


def test_run_of_other_columns(run: Run, tmp_path: Path) -> None:
    """A results.csv alone, of an older version or another program, is drawn as far as possible."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "results.csv").write_text("step,val/AP50\n5,0.25\n10,\n15,0.5\n")
    result = run(tmp_path / "old", "--output", tmp_path / "out")
    assert result.returncode == 0
    assert "old: no metrics.jsonl" in result.stdout
    assert "has no learning rate, training loss, validation loss, AP, recall (AR100)" in result.stdout
    (row,) = rows_of(tmp_path / "out" / "compare.csv")
    assert (row["best AP50"], row["best AP50 step"], row["best AP"]) == ("0.5", "15", "")


def test_images_of_a_step_come_from_the_settings_where_the_log_is_silent(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", "A", 8)
    (directory / "train.log").unlink()
    (directory / "args.yaml").unlink()
    assert compare_runs.read_run(directory, "run").images_per_step is None
    (directory / "args.yaml").write_text("train: {batch_size: 4, subdivisions: 3}")
    assert compare_runs.read_run(directory, "run").images_per_step == 12


def test_short_names_are_unique() -> None:
    paths = ["/logs/240101-000000_a", "/logs/240102-000000_a", "/logs/240103-000000_b", "/x/c", "/y/c"]
    assert compare_runs.short_names([Path(path) for path in paths]) == [
        *("240101-000000_a", "240102-000000_a", "b", "x/c", "y/c")
    ]
    assert compare_runs.short_names([Path("/logs/240101-000000_a")]) == ["a"]


def test_a_directory_named_twice_counts_once(run: Run, two_runs: list[Path], tmp_path: Path) -> None:
    result = run(two_runs[0], str(two_runs[0]) + "/", "--output", tmp_path / "out")
    assert result.returncode == 0 and "1 directories were given twice" in result.stdout
    assert len(rows_of(tmp_path / "out" / "compare.csv")) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        ([], 2, "RUN_DIRECTORY"),
        (["nowhere"], 2, "nowhere: is no directory"),
        (["."], 2, "has neither results.csv nor metrics.jsonl"),
        (["RUN", "."], 2, "has neither results.csv nor metrics.jsonl"),
        (["RUN", "--x", "years"], 2, "years"),
        (["RUN", "--smooth", "0"], 2, "--smooth 0"),
        (["RUN", "--output", "/proc/none"], 6, "/proc/none"),
        (["RUN", "--output", "RUN"], 6, "is not empty"),
    ],
)
def test_bad_input_is_one_line(run: Run, two_runs: list[Path], arguments: list[str], code: int, part: str) -> None:
    result = run(*[str(two_runs[0]) if word == "RUN" else word for word in arguments])
    assert result.returncode == code and part in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_runs_without_a_readable_row_are_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("metrics.jsonl", "results.csv", "train.log", "args.yaml"):
        (tmp_path / "run" / name).write_text("garbage\n")
    result = run(tmp_path / "run", "--output", tmp_path / "out")
    assert result.returncode == 2 and "no run has a readable row" in result.stderr and not (tmp_path / "out").exists()
