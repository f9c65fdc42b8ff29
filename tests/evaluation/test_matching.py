"""Detections matched to ground-truth boxes, against pycocotools' own matching."""

import contextlib
import io
from typing import Any

import numpy as np
import pytest

from detection.data.annotations import Annotations, flatten_annotations
from detection.evaluation.detections import Detections
from detection.evaluation.matching import IN_CROWD, NO_GROUND_TRUTH, covered_share, match_detections


def annotations_of(boxes: list[tuple[int, int, list[float]]], images: int, crowd: tuple[int, ...] = ()) -> Annotations:
    """(image, category 1..3, [x, y, width, height]) in the order given: areas fall, so rows keep it."""
    content = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 1000, "height": 1000} for n in range(1, images + 1)],
        "categories": [{"id": n, "name": f"class {n}"} for n in (1, 2, 3)],
        "annotations": [
            {"id": n, "image_id": image, "category_id": category, "bbox": box, "iscrowd": int(n in crowd)}
            for n, (image, category, box) in enumerate(boxes)
        ],
    }
    return flatten_annotations(content, "test")


def detections_of(rows: list[tuple[int, int, list[float], float]]) -> Detections:
    """(image index, label, [x1, y1, x2, y2], score)."""
    image, label, boxes, scores = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Detections(
        np.array(image, dtype=np.int64),
        np.array(boxes, dtype=np.float64).reshape(-1, 4),
        np.array(scores, dtype=np.float64),
        np.array(label, dtype=np.int64),
    )


def test_the_surer_detection_gets_the_ground_truth() -> None:
    annotations = annotations_of([(1, 1, [0, 0, 100, 100]), (1, 2, [500, 500, 50, 50])], images=1)
    detections = detections_of(
        [
            (0, 0, [0, 0, 100, 90], 0.6),  # IoU 0.9, but second
            (0, 0, [0, 0, 100, 80], 0.9),  # IoU 0.8, first
            (0, 1, [0, 0, 100, 100], 0.5),  # another class
            (0, 1, [500, 500, 550, 525], 0.4),  # IoU exactly 0.5
        ]
    )
    assert match_detections(annotations, detections).tolist() == [NO_GROUND_TRUTH, 0, NO_GROUND_TRUTH, 1]
    # Any class: the ground truth is taken by the surest; the third finds nothing left.
    assert match_detections(annotations, detections, same_class=False).tolist() == [
        NO_GROUND_TRUTH,
        0,
        NO_GROUND_TRUTH,
        1,
    ]
    only = detections_of([(0, 2, [0, 0, 100, 100], 0.5)])
    assert match_detections(annotations, only).tolist() == [NO_GROUND_TRUTH]
    assert match_detections(annotations, only, same_class=False).tolist() == [0]


def test_inside_a_crowd_is_neither_right_nor_wrong() -> None:
    annotations = annotations_of([(1, 1, [0, 0, 400, 400]), (1, 1, [10, 10, 40, 40])], images=1, crowd=(0,))
    rows = [(0, 0, [10, 10, 50, 50], 0.9), (0, 0, [100, 100, 150, 150], 0.8), (0, 0, [350, 350, 550, 400], 0.7)]
    # The last one has a quarter of its own area inside.
    assert match_detections(annotations, detections_of(rows)).tolist() == [1, IN_CROWD, NO_GROUND_TRUTH]


def test_nothing_to_match() -> None:
    annotations = annotations_of([(2, 1, [0, 0, 10, 10])], images=2)
    assert match_detections(annotations, detections_of([])).tolist() == []
    assert match_detections(annotations, detections_of([(0, 0, [0, 0, 10, 10], 0.9)])).tolist() == [NO_GROUND_TRUTH]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("threshold", [0.5, 0.75])
def test_same_matches_as_pycocotools(seed: int, threshold: float) -> None:
    generator = np.random.default_rng(seed)
    boxes: list[tuple[int, int, list[float]]] = []
    rows: list[tuple[int, int, list[float], float]] = []
    for image in range(1, 9):
        for _ in range(generator.integers(0, 7)):
            category = int(generator.integers(1, 4))
            box = [*generator.integers(0, 60, 2).tolist(), *generator.integers(20, 60, 2).tolist()]
            boxes.append((image, category, box))
            for _ in range(generator.integers(0, 4)):
                x, y, w, h = (np.array(box) + generator.integers(-8, 9, 4)).tolist()
                label = category - 1 if generator.random() < 0.8 else int(generator.integers(0, 3))
                rows.append((image - 1, label, [x, y, x + w, y + h], float(generator.random())))
    crowd = tuple(np.flatnonzero(generator.random(len(boxes)) < 0.15).tolist())
    annotations, detections = annotations_of(boxes, images=8, crowd=crowd), detections_of(rows)
    found = match_detections(annotations, detections, threshold)
    expected = pycocotools_matches(annotations, detections, threshold)
    assert found.tolist() == expected
    assert {NO_GROUND_TRUTH, IN_CROWD} < set(expected), "matches, misses and crowd must occur"


def pycocotools_matches(annotations: Annotations, detections: Detections, threshold: float) -> list[int]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    image_of_box = np.repeat(annotations.image_ids, np.diff(annotations.first_box))
    gt_boxes: list[dict[str, Any]] = [
        {
            "id": row + 1,
            "image_id": int(image_of_box[row]),
            "category_id": int(annotations.labels[row]) + 1,
            "bbox": annotations.coco_boxes[row].tolist(),
            "area": float(annotations.coco_boxes[row, 2:].prod()),
            "iscrowd": int(annotations.crowd[row]),
        }
        for row in range(len(annotations.labels))
    ]
    found = [
        {
            "id": row + 1,
            "image_id": int(annotations.image_ids[detections.image_index[row]]),
            "category_id": int(detections.labels[row]) + 1,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": (x2 - x1) * (y2 - y1),
            "iscrowd": 0,
            "score": float(detections.scores[row]),
        }
        for row, (x1, y1, x2, y2) in enumerate(detections.boxes.tolist())
    ]
    base = {
        "info": {},
        "images": [{"id": int(n)} for n in annotations.image_ids],
        "categories": [{"id": n, "name": str(n)} for n in (1, 2, 3)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        gt, result = COCO(), COCO()
        gt.dataset, result.dataset = {**base, "annotations": gt_boxes}, {**base, "annotations": found}
        gt.createIndex()
        result.createIndex()
        evaluator = COCOeval(gt, result, "bbox")
        evaluator.params.iouThrs = np.array([threshold])
        evaluator.evaluate()
    matches = [NO_GROUND_TRUTH] * len(found)
    for image in evaluator.evalImgs:
        if image is None or image["aRng"] != evaluator.params.areaRng[0]:
            continue
        for detection, gt_id in zip(image["dtIds"], image["dtMatches"][0], strict=True):
            if gt_id:
                row = int(gt_id) - 1
                matches[detection - 1] = IN_CROWD if annotations.crowd[row] else row
    return matches


def test_covered_share() -> None:
    share = covered_share(np.array([[0.0, 0, 10, 10]]), np.array([[5.0, 0, 100, 100], [20, 20, 30, 30]]))
    assert share.tolist() == [[0.5, 0.0]]
