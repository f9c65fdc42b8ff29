"""The report of a completed run: what its page and pictures say, and that it never ends a run."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from detection.config.settings import Settings
from detection.data.build import build_validation_dataset
from detection.evaluation import detections as detections_module
from detection.evaluation.coco_metric import score
from detection.evaluation.detections import Detections, read_detections, write_detections
from detection.evaluation.report import summary_line
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
    """A run directory whose detector finds everything but the boxes of the last image, where it finds a false one."""
    settings = default_settings(f"data.root={drawn_dataset}", "evaluation.visualize_images=2")
    dataset = build_validation_dataset(settings.data, None, None)
    annotations = dataset.annotations
    found = np.arange(annotations.first_box[-2])
    images = np.repeat(np.arange(len(annotations)), np.diff(annotations.first_box))
    rows = Detections(
        np.append(images[found], 3), np.vstack([annotations.boxes[found], [[0, 0, 9, 9]]]).astype(np.float64),
        np.append(np.full(len(found), 0.9), 0.8), np.append(annotations.labels[found], 0),
    )  # fmt: skip
    write_detections(tmp_path / "detections.json", annotations, rows)
    scores = score(annotations, rows, "arrays")
    names = ("AP", "AP50", "gt_boxes")
    class_ap = {name: dict(zip(names, values, strict=True)) for name, values in scores.class_ap.items()}
    metrics = {**scores.metrics, "class_AP": class_ap, "step": 20, "backend": "arrays"}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
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


def test_best_is_named_also_where_no_row_has_it(finished: tuple[Path, Any, Settings, Any]) -> None:
    """The weights without EMA, evaluated at the end, may be the best; metrics.jsonl has one row per step."""
    run, loggers, _ = reported(finished)
    report_run(run, SimpleNamespace(best_ap50=0.45, best_step=20), loggers)  # type: ignore[arg-type]
    assert "highest AP50 0.450 after step 20: best.pt" in (finished[0] / "report.html").read_text()


def test_the_page_has_everything_in_it(finished: tuple[Path, Any, Settings, Any]) -> None:
    directory = finished[0]
    run, loggers, _ = reported(finished)
    report_run(run, SimpleNamespace(best_ap50=0.3, best_step=10), loggers)  # type: ignore[arg-type]
    text = (directory / "report.html").read_text()
    sources = re.findall(r'src="(.{22})', text)
    assert len(sources) == 4 and all(source.startswith("data:image/") for source in sources)
    assert "http" not in text and "<script" not in text
    assert "highest AP50 0.300 after step 10: best.pt" in text and "last evaluation after step 20" in text
    # 0 + 1 + 2 + 3 boxes; image 103 has three missed ones; the highest F1 is above its false one of 0.8
    assert "4 validation images with 6 boxes of 2 classes" in text
    assert "1 of 4 have a mistake" in text and "image 103 3.png" in text and "image 102" not in text
    assert (directory / "worst_images.csv").read_text().splitlines()[1].startswith("1,103,3.png,3,0,3,0,")
    for name in ("results.png", "precision_recall.png", "confusion_matrix.png", "worst_images.jpg"):
        assert cv2.imread(str(directory / name)) is not None, name


@pytest.mark.parametrize("damage", ["metrics.json", "detections.json", "metrics.jsonl", "images"])
def test_a_report_that_fails_is_one_line(
    finished: tuple[Path, Any, Settings, Any], damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, dataset, *_ = finished
    run, loggers, lines = reported(finished)
    state: Any = SimpleNamespace(best_ap50=0.3, best_step=10)
    if damage == "images":
        monkeypatch.setattr(dataset, "load_image", lambda _: (_ for _ in ()).throw(RuntimeError("two\nlines")))
    else:
        (directory / damage).write_text("[}")
    report_run(run, state, loggers)
    (line,) = lines
    assert line.startswith("warning: no report of this run: ") and line.isprintable()
    run.ranks.is_first = False
    report_run(run, state, loggers)
    assert len(lines) == 1  # other processes write nothing
