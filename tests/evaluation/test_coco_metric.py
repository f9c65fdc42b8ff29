"""The official numbers on the original file, all classes at once or some at a time; metrics of any group of boxes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detection.data.annotations import Annotations, flatten_annotations
from detection.evaluation import coco_metric, detections
from detection.evaluation.coco_metric import METRIC_NAMES, score, score_groups
from detection.evaluation.detections import Detections, box_areas, write_detections
from detection.evaluation.matching import NO_GROUND_TRUTH, match_detections
from tests.support.evaluation_cases import (
    annotate,
    coco_content,
    detect,
    ground_truth_as_detections,
    join,
    official_numbers,
    random_content,
    random_set,
    tied_set,
)


def assert_official(content: dict[str, Any], annotations: Annotations, predictions: Detections, backend: str) -> None:
    stats, precision = official_numbers(content, annotations, predictions)
    scores = score(annotations, predictions, backend)
    assert [scores.metrics[name] for name in METRIC_NAMES] == stats
    assert np.array_equal(scores.precision, precision)


@pytest.mark.parametrize(
    ("gt_boxes", "ap50"), [(((0, 0, 50, 100), (0, 0, 200, 100)), 1.0), (((0, 0, 200, 100), (0, 0, 50, 100)), 51 / 101)]
)
def test_the_file_order_decides_between_equal_ious(
    backend: str, gt_boxes: tuple[tuple[int, ...], ...], ap50: float
) -> None:
    """The first detection overlaps both by exactly 1/2 and takes the last of the file; the second fits the narrow one.

    AP50 is pycocotools': 1, or 51 of 101 recalls at precision 1.
    """
    content = coco_content([(1, 1, list(map(float, box))) for box in gt_boxes])
    annotations = flatten_annotations(content, "test")
    assert annotations.coco_boxes[:, 2].tolist() == [200, 50]  # the loss's order: area descending
    predictions = detect([(0, 0, [0.0, 0.0, 100.0, 100.0], 0.9), (0, 0, [0.0, 0.0, 50.0, 100.0], 0.8)])
    assert score(annotations, predictions, backend).metrics["AP50"] == pytest.approx(ap50, abs=1e-9)
    assert_official(content, annotations, predictions, backend)
    narrow, wide = (annotations.coco_boxes[:, 2].tolist().index(width) for width in (50, 200))
    matched = match_detections(annotations, predictions).tolist()
    assert matched == ([wide, narrow] if ap50 == 1 else [narrow, NO_GROUND_TRUTH])


@pytest.mark.parametrize("seed", range(8))
def test_many_ties_in_a_shuffled_file_are_official(backend: str, seed: int) -> None:
    assert_official(*tied_set(seed), backend)


@pytest.mark.parametrize("rows", [1, 100, 250, 10**6])
@pytest.mark.parametrize("seed", range(3))
def test_some_classes_at_a_time_is_all_at_once(backend: str, seed: int, rows: int, monkeypatch) -> None:
    # Crowds, classes without ground truth, images without boxes, equal scores, 150 boxes of one class in one image.
    monkeypatch.setattr(coco_metric, "ROWS_AT_A_TIME", rows)
    annotations, predictions = random_set(seed)
    handed = []
    name = f"accumulate_{backend}"
    original = getattr(coco_metric, name)

    def watch(*arguments: Any) -> Any:
        handed.append(next(len(value.scores) for value in arguments if hasattr(value, "scores")))
        return original(*arguments)

    monkeypatch.setattr(coco_metric, name, watch)
    assert_official(random_content(seed), annotations, predictions, backend)
    per_class = np.bincount(predictions.labels)
    assert max(handed) <= max(rows, per_class.max())
    if rows != 250:  # three of the five classes have a ground-truth box
        assert len(handed) == (1 if rows == 10**6 else 3)


def test_classes_in_another_order_than_their_ids(backend: str, monkeypatch) -> None:
    monkeypatch.setattr(coco_metric, "ROWS_AT_A_TIME", 4)
    content = coco_content([(1, 1, [0, 0, 50, 50]), (1, 5, [100, 0, 50, 50]), (2, 90, [0, 0, 50, 50])], images=2)
    annotations = flatten_annotations(content, "test", class_names=("name 90", "name 1", "name 5"))
    predictions = detect([(0, 1, [0, 0, 50, 50], 0.9), (0, 2, [100, 0, 50, 40], 0.8), (1, 0, [0, 0, 50, 30], 0.7)])
    assert_official(content, annotations, predictions, backend)
    # IoU 0.6 (three of ten thresholds), 1 and 0.8 (seven)
    ap = {name: values[0] for name, values in score(annotations, predictions, backend).class_ap.items()}
    assert ap == pytest.approx({"name 90": 0.3, "name 1": 1.0, "name 5": 0.7}, abs=1e-9)


# Groups


@pytest.mark.parametrize("seed", range(3))
def test_groups_by_area_are_small_medium_and_large(backend: str, seed: int) -> None:
    annotations, predictions = random_set(seed)
    metrics = score(annotations, predictions).metrics
    edges = (0, 32**2, 96**2, np.inf)
    groups = score_groups(annotations, predictions, annotations.areas, box_areas(predictions.boxes), edges, backend)
    assert [group.ap for group in groups] == pytest.approx([metrics[name] for name in ("APs", "APm", "APl")], abs=1e-9)
    recalls = [metrics[name] for name in ("ARs", "ARm", "ARl")]
    assert [group.recall for group in groups] == pytest.approx(recalls, abs=1e-9)
    assert sum(group.gt_boxes for group in groups) == np.count_nonzero(~annotations.crowd)


def test_groups_by_another_property(backend: str) -> None:
    # The values are given. Group 0: one ground-truth box, detected. Group 1: two; one detected, one missed, and a false
    # box of score 0.95 first: precision 1/2 up to recall 0.5, 51 of 101 points. Group 2: no ground truth.
    annotations = annotate([(1, 1, [0, 0, 90, 100]), (1, 1, [200, 0, 100, 80]), (1, 1, [400, 0, 100, 70])])
    predictions = detect(
        [
            (0, 0, [0, 0, 90, 100], 0.9),
            (0, 0, [200, 0, 100, 80], 0.8),
            (0, 0, [700, 700, 50, 50], 0.95),
            (0, 0, [800, 800, 50, 50], 0.99),
        ]
    )
    groups = score_groups(
        annotations, predictions, np.array([0.5, 1, 1.5]), np.array([0.1, 1.9, 1, 2]), (0, 1, 2, 3), backend
    )
    first, second, third = groups
    assert (first.gt_boxes, first.ap, first.ap50, first.recall) == (1, *[pytest.approx(1.0)] * 3)
    assert (second.gt_boxes, second.ap50, second.recall) == (2, pytest.approx(0.5 * 51 / 101), pytest.approx(0.5))
    assert (third.gt_boxes, third.ap, third.ap50, third.recall) == (0, None, None, None)


# Detections


def test_above_rounds_the_threshold_as_the_detector_does() -> None:
    # No float32 is 0.7 or 0.1: the nearest one lies below 0.7, but above 0.1. Neither is above its own threshold.
    for threshold in (0.7, 0.1):
        nearest = np.float32(threshold)
        scores = np.array([nearest, np.nextafter(nearest, np.float32(1))], dtype=np.float64)
        predictions = Detections(np.arange(2), np.zeros((2, 4)), scores, np.zeros(2, dtype=np.int64))
        assert predictions.above(threshold).image_index.tolist() == [1]
    assert float(np.float32(0.7)) < 0.7 and float(np.float32(0.1)) > 0.1


def test_files_are_written_in_pieces(tmp_path: Path, monkeypatch) -> None:
    annotations, predictions = random_set(1)
    write_detections(tmp_path / "whole.json", annotations, predictions)
    monkeypatch.setattr(detections, "WRITTEN_AT_A_TIME", 7)
    write_detections(tmp_path / "pieces.json", annotations, predictions)
    rows = json.loads((tmp_path / "pieces.json").read_text())
    assert rows == json.loads((tmp_path / "whole.json").read_text()) and len(rows) == len(predictions)
    assert [row["score"] for row in rows] == predictions.scores.tolist()


def test_a_class_detected_only_where_it_has_no_ground_truth_costs_nothing(backend: str) -> None:
    content = coco_content([(1, 1, [0, 0, 50, 50])])
    annotations = flatten_annotations(content, "test")
    predictions = join(ground_truth_as_detections(annotations), detect([(0, 2, [0, 0, 9, 9], 0.9)] * 3))
    assert_official(content, annotations, predictions, backend)
