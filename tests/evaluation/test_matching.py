"""Detections matched to ground-truth boxes, against pycocotools' own matching."""

import contextlib

import numpy as np
import pytest

from detection.evaluation.matching import IN_CROWD, NO_GROUND_TRUTH, covered_share, match_detections
from tests.support.evaluation_cases import annotate, detect, official_evaluator, tied_set


def test_the_detection_of_higher_score_gets_the_ground_truth() -> None:
    annotations = annotate([(1, 1, [0, 0, 100, 100]), (1, 5, [500, 500, 50, 50])])
    detections = detect(
        [
            (0, 0, [0, 0, 100, 90], 0.6),  # IoU 0.9, but second
            (0, 0, [0, 0, 100, 80], 0.9),  # IoU 0.8, first
            (0, 1, [0, 0, 100, 100], 0.5),  # another class
            (0, 1, [500, 500, 50, 25], 0.4),  # IoU exactly 0.5
        ]
    )
    expected = [NO_GROUND_TRUTH, 0, NO_GROUND_TRUTH, 1]
    assert match_detections(annotations, detections).tolist() == expected
    # Any class: the best detection takes the ground truth, nothing is left for the third.
    assert match_detections(annotations, detections, same_class=False).tolist() == expected
    only = detect([(0, 2, [0, 0, 100, 100], 0.5)])
    assert match_detections(annotations, only).tolist() == [NO_GROUND_TRUTH]
    assert match_detections(annotations, only, same_class=False).tolist() == [0]


def test_inside_a_crowd_is_neither_right_nor_wrong() -> None:
    annotations = annotate([(1, 1, [0, 0, 400, 400]), (1, 1, [10, 10, 40, 40])], crowd=(0,))
    rows = [(0, 0, [10, 10, 40, 40], 0.9), (0, 0, [100, 100, 50, 50], 0.8), (0, 0, [350, 350, 200, 50], 0.7)]
    # The last one has a quarter of its own area inside.
    assert match_detections(annotations, detect(rows)).tolist() == [1, IN_CROWD, NO_GROUND_TRUTH]


def test_of_equal_ious_the_last_in_the_file_is_taken() -> None:
    annotations = annotate([(1, 1, [0, 0, 50, 100]), (1, 1, [0, 0, 200, 100])])  # rows: by falling area
    # IoU 0.5 with both boxes; the smaller one is left for the second
    detections = detect([(0, 0, [0, 0, 100, 100], 0.9), (0, 0, [0, 0, 50, 100], 0.8)])
    assert match_detections(annotations, detections).tolist() == [0, 1]


def test_nothing_to_match() -> None:
    annotations = annotate([(2, 1, [0, 0, 10, 10])], images=2)
    assert match_detections(annotations, detect([])).tolist() == []
    assert match_detections(annotations, detect([(0, 0, [0, 0, 10, 10], 0.9)])).tolist() == [NO_GROUND_TRUTH]


@pytest.mark.parametrize("threshold", [0.5, 0.75])
@pytest.mark.parametrize("seed", range(4))
def test_same_matches_as_pycocotools(seed: int, threshold: float) -> None:
    content, annotations, detections = tied_set(seed)
    evaluator = official_evaluator(content, annotations, detections)
    evaluator.params.iouThrs, evaluator.params.maxDets = np.array([threshold]), [10**6]
    with contextlib.redirect_stdout(None):
        evaluator.evaluate()
    row_of_id = {number: row for row, number in enumerate(annotations.annotation_ids.tolist())}
    expected = [NO_GROUND_TRUTH] * len(detections)
    for image in evaluator.evalImgs:
        if image is None or image["aRng"] != evaluator.params.areaRng[0]:
            continue
        for detection, gt_id in zip(image["dtIds"], image["dtMatches"][0], strict=True):
            if gt_id:
                row = row_of_id[int(gt_id)]
                expected[detection - 1] = IN_CROWD if annotations.crowd[row] else row
    assert match_detections(annotations, detections, threshold).tolist() == expected
    assert {NO_GROUND_TRUTH, IN_CROWD} < set(expected), "matches, misses and crowd must occur"


def test_covered_share() -> None:
    share = covered_share(np.array([[0.0, 0, 10, 10]]), np.array([[5.0, 0, 100, 100], [20, 20, 30, 30]]))
    assert share.tolist() == [[0.5, 0.0]]
