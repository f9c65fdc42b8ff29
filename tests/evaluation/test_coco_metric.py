"""Scoring some classes at a time gives the numbers of all at once, exactly; metrics of any group of boxes."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detection.data.annotations import Annotations, flatten_annotations, load_annotations
from detection.evaluation import coco_metric, detections
from detection.evaluation.coco_metric import METRIC_NAMES, score, score_groups
from detection.evaluation.detections import Detections, box_areas, write_detections
from tests.support.evaluation_cases import (
    BACKENDS,
    annotate,
    coco_content,
    detect,
    ground_truth_as_detections,
    join,
    random_set,
)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param != "arrays":
        pytest.importorskip(request.param)
    return request.param


def all_at_once(annotations: Annotations, found: Detections, backend: str) -> tuple[list[float], np.ndarray]:
    """The official program as its own example uses it: every image and every class; stats and precision."""
    if backend == "faster_coco_eval":
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

    image_of_box = np.repeat(np.arange(len(annotations)), np.diff(annotations.first_box))
    ids = annotations.categories.ids
    rows: list[dict[str, Any]] = [
        {
            "id": number + 1,
            "image_id": int(annotations.image_ids[image]),
            "category_id": ids[annotations.labels[number]],
            "bbox": annotations.coco_boxes[number].tolist(),
            "area": float(annotations.areas[number]),
            "iscrowd": int(annotations.crowd[number]),
        }
        for number, image in enumerate(image_of_box)
    ]
    gt = COCO()
    gt.dataset = {
        "info": {},
        "images": [{"id": int(number), "width": 1000, "height": 1000} for number in annotations.image_ids],
        "categories": [{"id": number, "name": str(number)} for number in ids],
        "annotations": rows,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        gt.createIndex()
        results = [
            {
                "image_id": int(annotations.image_ids[image]),
                "category_id": ids[label],
                "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                "score": float(confidence),
            }
            for image, box, confidence, label in zip(
                found.image_index, found.boxes.tolist(), found.scores, found.labels, strict=True
            )
        ]
        evaluator = COCOeval(gt, gt.loadRes(results), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    order = [sorted(ids).index(number) for number in ids]
    return [float(value) for value in evaluator.stats[:12]], np.asarray(evaluator.eval["precision"])[:, :, order, 0, -1]


def assert_the_same(annotations: Annotations, found: Detections, backend: str) -> None:
    stats, precision = all_at_once(annotations, found, backend)
    scores = score(annotations, found, backend)
    assert [-1.0 if scores.metrics[name] is None else scores.metrics[name] for name in METRIC_NAMES] == stats
    assert np.array_equal(scores.precision, precision)


@pytest.mark.parametrize("rows", [1, 100, 250, 10**6])
@pytest.mark.parametrize("seed", range(3))
def test_some_classes_at_a_time_is_all_at_once(
    backend: str, seed: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Crowd regions, classes without ground truth, images without boxes, equal scores, 150 boxes of one class in one image.
    monkeypatch.setattr(coco_metric, "ROWS_AT_A_TIME", rows)
    annotations, found = random_set(seed)
    handed = []
    name = "accumulate_arrays" if backend == "arrays" else "accumulate_rows"
    original = getattr(coco_metric, name)

    def watch(*arguments: Any) -> Any:
        handed.append(next(len(value.scores) for value in arguments if hasattr(value, "scores")))
        return original(*arguments)

    monkeypatch.setattr(coco_metric, name, watch)
    assert_the_same(annotations, found, backend)
    per_class = np.bincount(found.labels)
    assert max(handed) <= max(rows, per_class.max())
    assert len(handed) == {1: 3, 100: 3, 10**6: 1}.get(
        rows, len(handed)
    )  # three of the five classes have a ground-truth box


def test_classes_in_another_order_than_their_ids(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco_metric, "ROWS_AT_A_TIME", 4)
    content = coco_content([(1, 1, [0, 0, 50, 50]), (1, 5, [100, 0, 50, 50]), (2, 90, [0, 0, 50, 50])], images=2)
    annotations = flatten_annotations(content, "test", class_names=("name 90", "name 1", "name 5"))
    found = detect([(0, 1, [0, 0, 50, 50], 0.9), (0, 2, [100, 0, 50, 40], 0.8), (1, 0, [0, 0, 50, 30], 0.7)])
    assert_the_same(annotations, found, backend)
    # IoU 0.6 (three of ten thresholds), 1 and 0.8 (seven)
    ap = {name: values[0] for name, values in score(annotations, found, backend).class_ap.items()}
    assert ap == pytest.approx({"name 90": 0.3, "name 1": 1.0, "name 5": 0.7}, abs=1e-9)


def test_published_results_in_pieces(shared_data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = shared_data("coco_eval_fixture")
    annotations = load_annotations(directory / "annotations" / "instances_val.json")
    expected = json.loads((directory / "expected.json").read_text())
    image_index = {number: index for index, number in enumerate(annotations.image_ids.tolist())}
    label = {number: label for label, number in enumerate(annotations.categories.ids)}
    results = json.loads((directory / "fakebbox100_results.json").read_text())
    found = detect(
        [(image_index[row["image_id"]], label[row["category_id"]], row["bbox"], row["score"]) for row in results]
    )
    monkeypatch.setattr(coco_metric, "ROWS_AT_A_TIME", 50)
    metrics = score(annotations, found).metrics
    assert {name: round(value, 3) for name, value in metrics.items() if value is not None} == expected


# Groups


@pytest.mark.parametrize("seed", range(3))
def test_groups_by_area_are_small_medium_and_large(backend: str, seed: int) -> None:
    annotations, found = random_set(seed)
    metrics = score(annotations, found).metrics
    edges = (0, 32**2, 96**2, np.inf)
    groups = score_groups(annotations, found, annotations.areas, box_areas(found.boxes), edges, backend)
    assert [group.ap for group in groups] == pytest.approx([metrics[name] for name in ("APs", "APm", "APl")], abs=1e-9)
    recalls = [metrics[name] for name in ("ARs", "ARm", "ARl")]
    assert [group.recall for group in groups] == pytest.approx(recalls, abs=1e-9)
    assert sum(group.gt_boxes for group in groups) == np.count_nonzero(~annotations.crowd)


def test_groups_by_another_property(backend: str) -> None:
    # The value of a box is told here, not measured. Group 0: one ground-truth box, found. Group 1: two ground-truth boxes; one found, the
    # other missed, and a false box of score 0.95 before it: precision 1/2 up to recall 0.5, so 51 of 101 points.
    # Group 2: nothing; the false box of value 2 meets no ground-truth box there.
    annotations = annotate([(1, 1, [0, 0, 90, 100]), (1, 1, [200, 0, 100, 80]), (1, 1, [400, 0, 100, 70])])
    found = detect(
        [
            (0, 0, [0, 0, 90, 100], 0.9),
            (0, 0, [200, 0, 100, 80], 0.8),
            (0, 0, [700, 700, 50, 50], 0.95),
            (0, 0, [800, 800, 50, 50], 0.99),
        ]
    )
    groups = score_groups(
        annotations, found, np.array([0.5, 1, 1.5]), np.array([0.1, 1.9, 1, 2]), (0, 1, 2, 3), backend
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
        found = Detections(np.arange(2), np.zeros((2, 4)), scores, np.zeros(2, dtype=np.int64))
        assert found.above(threshold).image_index.tolist() == [1]
    assert float(np.float32(0.7)) < 0.7 and float(np.float32(0.1)) > 0.1


def test_files_are_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    annotations, found = random_set(1)
    write_detections(tmp_path / "whole.json", annotations, found)
    monkeypatch.setattr(detections, "WRITTEN_AT_A_TIME", 7)
    write_detections(tmp_path / "pieces.json", annotations, found)
    rows = json.loads((tmp_path / "pieces.json").read_text())
    assert rows == json.loads((tmp_path / "whole.json").read_text()) and len(rows) == len(found)
    assert [row["score"] for row in rows] == found.scores.tolist()


def test_a_class_found_only_where_it_has_no_ground_truth_costs_nothing(backend: str) -> None:
    annotations = annotate([(1, 1, [0, 0, 50, 50])])
    found = join(ground_truth_as_detections(annotations), detect([(0, 2, [0, 0, 9, 9], 0.9)] * 3))
    assert_the_same(annotations, found, backend)
