"""The report of a completed run: what its page and pictures say, and that it never ends a run."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from detection.config.settings import Settings
from detection.data.build import build_validation_dataset
from detection.drawing.files import replace_file
from detection.evaluation import detections as detections_module
from detection.evaluation.coco_metric import score
from detection.evaluation.detections import Detections, read_detections, write_detections
from detection.evaluation.report import summary_line
from detection.training.evaluation import has_results_of_best, keep_results
from detection.training.report_page import draw_results, report_run, worst_classes
from tests.support.detectors import geometry_of
from tests.support.evaluation_cases import annotate, detect

ROWS: list[dict[str, float | None]] = [
    {"step": 5, "train/loss": 40.0, "train/loss_box": 30.0, "train/learning_rate": 0.1, "train/loss_scale": 8.0},
    {"step": 10, "train/loss": None, "train/loss_box": 3.0, "train/learning_rate": 0.2},
    {"step": 10, "epoch": 2.0, "val/AP": 0.1, "val/AP50": 0.3, "val/loss": 9.0},
    {"step": 15, "train/loss": 1.0, "train/loss_box": 0.5, "train/learning_rate": 0.1},
    {"step": 20, "epoch": 4.0, "val/AP": 0.2, "val/AP50": 0.25, "val/loss": 8.0},
]


def test_curves_of_a_run() -> None:
    loss, rate, accuracy = draw_results(ROWS).axes

    def lines(axes: Any) -> dict[str, list[tuple[float, float]]]:
        return {line.get_label(): list(zip(*map(list, line.get_data()), strict=True)) for line in axes.get_lines()}

    assert lines(loss) == {
        "total": [(5, 40), (15, 1)], "box": [(5, 30), (10, 3), (15, 0.5)], "total, validation": [(10, 9), (20, 8)]
    }  # fmt: skip
    assert loss.get_yscale() == "log"  # 40 is more than twenty times 0.5
    assert lines(rate) == {"learning rate": [(5, 0.1), (10, 0.2), (15, 0.1)]}
    assert lines(accuracy) == {"AP50": [(10, 0.3), (20, 0.25)], "AP": [(10, 0.1), (20, 0.2)]}
    assert all(axes.get_xlim()[0] == 0 for axes in (loss, rate, accuracy))
    assert draw_results(ROWS[:1]).axes[0].get_yscale() == "linear"  # a run without an evaluation has curves too


@pytest.mark.parametrize("count", [0, 1, 5])
def test_detections_come_back_from_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(detections_module, "WRITTEN_AT_A_TIME", 2)
    annotations = annotate([(1, 1, [0, 0, 5, 5])], images=3)
    rows = [(2 - number % 3, number % 3, [1 / 3, number, 10.5, 7.0], 0.1 * number) for number in range(count)]
    written = detect(rows)
    write_detections(tmp_path / "d.json", annotations, written)
    read = read_detections(tmp_path / "d.json", annotations)
    for name in ("image_index", "scores", "labels"):
        assert np.array_equal(getattr(read, name), getattr(written, name)), name
        assert getattr(read, name).dtype == getattr(written, name).dtype
    np.testing.assert_allclose(read.boxes, written.boxes, rtol=1e-15)


def test_summary_names_the_five_worst_classes() -> None:
    classes: dict[str, Any] = {f"class {n}": (0.1 * n, 0.2, 3) for n in range(1, 8)} | {"a, b": (0.01, 0.1, 1)}
    line = summary_line({"AP": 0.5, "AP50": None}, classes | {"absent": (None, None, 0)})
    assert line == (
        "AP 0.500  AP50 not defined  worst classes: 'a, b 0.010', class 1 0.100, class 2 0.200, class 3 0.300, "
        "class 4 0.400"
    )
    assert summary_line({"AP": 0.5, "AP50": 0.6}, {"a": (0.5, 0.6, 1)}) == "AP 0.500  AP50 0.600  classes: a 0.500"
    order = worst_classes({"b": {"AP": None}, "c": {"AP": 0.2}, "d": {"AP": 0.0}})
    assert [name for name, _ in order] == ["d", "c", "b"]


@pytest.fixture
def finished(tmp_path: Path, drawn_dataset: Path, default_settings: Any) -> tuple[Path, Any, Settings, Any]:
    """A run directory whose best.pt finds everything but the boxes of the last image, where it finds a false one.

    Its last evaluation, of step 20, found nothing.
    """
    settings = default_settings(f"data.root={drawn_dataset}", "evaluation.visualize_images=2")
    dataset = build_validation_dataset(settings.data, None, None)
    annotations = dataset.annotations
    found = np.arange(annotations.first_box[-2])
    images = np.repeat(np.arange(len(annotations)), np.diff(annotations.first_box))
    rows = Detections(
        np.append(images[found], 3), np.vstack([annotations.boxes[found], [[0, 0, 9, 9]]]).astype(np.float64),
        np.append(np.full(len(found), 0.9), 0.8), np.append(annotations.labels[found], 0),
    )  # fmt: skip
    write_detections(tmp_path / "best_detections.json", annotations, rows)
    write_detections(tmp_path / "detections.json", annotations, detect([]))
    scores = score(annotations, rows, "arrays")
    names = ("AP", "AP50", "gt_boxes")
    class_ap = {name: dict(zip(names, values, strict=True)) for name, values in scores.class_ap.items()}
    metrics = {**scores.metrics, "class_AP": class_ap, "step": 10, "backend": "arrays", "weights": "EMA"}
    (tmp_path / "best_metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "metrics.json").write_text(json.dumps({**metrics, "AP": 0.0, "AP50": 0.0, "step": 20}))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '{"step": 2')
    detector = SimpleNamespace(score="objectness", geometry=geometry_of(settings), deviations=())
    return tmp_path, dataset, settings, detector


def reported(finished: tuple[Path, Any, Settings, Any]) -> tuple[Any, Any, list[str]]:
    """The run of that directory, its loggers and the lines that they got."""
    directory, dataset, settings, detector = finished
    lines: list[str] = []
    first = SimpleNamespace(is_first=True)
    run = SimpleNamespace(ranks=first, validation_set=dataset, settings=settings, detector=detector)
    return run, SimpleNamespace(directory=directory, line=lines.append), lines


def state_of(directory: Path) -> Any:
    """The state of the run at its end: its best evaluation is the one in the files."""
    best = json.loads((directory / "best_metrics.json").read_text())
    return SimpleNamespace(best_value=best["AP50"], best_step=best["step"])


@pytest.mark.parametrize(
    "other",
    [{"best_step": 15}, {"best_value": 0.3}, {"lost": "best_metrics.json"}, {"lost": "best_detections.json"}],
    ids=str,
)
def test_files_of_another_evaluation_are_not_taken_for_those_of_best(
    finished: tuple[Path, Any, Settings, Any], other: dict[str, Any]
) -> None:
    """As a process leaves them that was killed before best.pt was written, or a run of an older version."""
    directory, state = finished[0], state_of(finished[0])
    assert has_results_of_best(directory, state, "AP50")
    if "lost" in other:
        (directory / other["lost"]).unlink()
    assert not has_results_of_best(directory, SimpleNamespace(**{**vars(state), **other}), "AP50")  # type: ignore[arg-type]


def test_results_of_best_stay_while_the_last_ones_are_replaced(
    finished: tuple[Path, Any, Settings, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, dataset, *_ = finished
    links = [os.link, lambda *_: (_ for _ in ()).throw(PermissionError())]
    for link in links:  # and on a file system without hard links
        monkeypatch.setattr("os.link", link)
        for name in ("metrics.json", "detections.json"):
            (directory / name).write_text(f"{name} of step 25")
        announced: list[Path] = []
        keep_results(SimpleNamespace(directory=directory, artifact=announced.append))  # type: ignore[arg-type]
        replace_file(directory / "metrics.json", b"of step 30")
        write_detections(directory / "detections.json", dataset.annotations, detect([]))
        assert (directory / "best_metrics.json").read_text() == "metrics.json of step 25"
        assert (directory / "best_detections.json").read_text() == "detections.json of step 25"
        assert announced == [directory / "best_detections.json", directory / "best_metrics.json"]
    assert not list(directory.glob("*.tmp")) + list(directory.glob(".*"))


def test_the_page_has_everything_in_it(finished: tuple[Path, Any, Settings, Any]) -> None:
    directory = finished[0]
    run, loggers, _ = reported(finished)
    report_run(run, state_of(directory), loggers)
    text = (directory / "report.html").read_text()
    sources = re.findall(r'src="(.{22})', text)
    assert len(sources) == 4 and all(source.startswith("data:image/") for source in sources)
    assert "http" not in text and "<script" not in text
    best = json.loads((directory / "best_metrics.json").read_text())
    shown = f"AP {best['AP']:.3f}, AP50 {best['AP50']:.3f}"
    assert f"best.pt, the EMA after step 10: {shown}, of the highest AP50 of the run" in text
    assert "last evaluation, after step 20: AP 0.200, AP50 0.250" in text and best["AP"] > 0.4
    assert f"<td>{best['AP']:.3f}</td>" in text
    # 0 + 1 + 2 + 3 boxes; image 103 has three missed ones; the highest F1 is above its false one of 0.8
    assert "4 validation images with 6 boxes of 2 classes" in text
    assert "1 of 4 have a mistake" in text and "image 103 3.png" in text and "image 102" not in text
    assert (directory / "worst_images.csv").read_text().splitlines()[1].startswith("1,103,3.png,3,0,3,0,")
    for name in ("results.png", "precision_recall.png", "confusion_matrix.png", "worst_images.jpg"):
        assert cv2.imread(str(directory / name)) is not None, name


@pytest.mark.parametrize("damage", ["best_metrics.json", "best_detections.json", "metrics.jsonl", "images"])
def test_a_report_that_fails_is_one_line(
    finished: tuple[Path, Any, Settings, Any], damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, dataset, *_ = finished
    run, loggers, lines = reported(finished)
    state = state_of(directory)
    if damage == "images":
        monkeypatch.setattr(dataset, "load_image", lambda _: (_ for _ in ()).throw(RuntimeError("two\nlines")))
    else:
        (directory / damage).write_text("[}")
    report_run(run, state, loggers)
    *before, line = lines  # where the metrics are unreadable, best.pt is evaluated again, and is not there
    assert len(before) == (damage == "best_metrics.json")
    assert line.startswith("warning: no report of this run: ") and line.isprintable()
    run.ranks.is_first = False
    report_run(run, state, loggers)
    assert len(lines) == 1 + len(before)  # other processes write nothing
