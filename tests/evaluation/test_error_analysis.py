"""Curves against confidence, confusion of classes, metrics by size and aspect, and the files that hold them."""

import csv
from pathlib import Path

import numpy as np
import pytest

from detection.evaluation.error_analysis import (
    CONFIDENCES,
    confidence_curves,
    confusion_matrix,
    mean_defined,
    score_by_aspect,
    score_by_size,
    write_csv,
)
from detection.evaluation.matching import IN_CROWD, match_detections
from tests.support.evaluation_cases import annotate, detect, random_set


def test_curves_by_hand() -> None:
    annotations = annotate([(1, 1, [0, 0, 100, 100]), (1, 1, [200, 0, 100, 100]), (1, 5, [400, 0, 100, 100])])
    found = detect(
        [
            (0, 0, [0, 0, 100, 100], 0.9),
            (0, 0, [600, 0, 100, 100], 0.6),  # false
            (0, 0, [200, 0, 100, 100], 0.3),
            (0, 1, [400, 0, 100, 100], 0.5),
            (0, 2, [700, 0, 100, 100], 0.99),  # a class without ground truth
        ]
    )
    curves = confidence_curves(annotations, found, 0.001)
    assert curves.confidence.tolist() == CONFIDENCES[1:].tolist()

    def at(confidence: float) -> int:
        return int(np.flatnonzero(curves.confidence == confidence)[0])

    # class 0 at 0.3 (inclusive): 2 of 3 boxes right, 2 of 2 ground-truth boxes; F1 = 2 * 2 / (3 + 2)
    assert curves.precision[0, at(0.3)] == pytest.approx(2 / 3)
    assert curves.recall[0, at(0.3)] == 1 and curves.f1[0, at(0.3)] == pytest.approx(0.8)
    assert (curves.precision[0, at(0.301)], curves.recall[0, at(0.301)]) == (0.5, 0.5)
    assert (curves.precision[0, at(0.9)], curves.recall[0, at(0.9)]) == (1, 0.5)
    assert np.isnan(curves.precision[0, at(0.901)]) and curves.f1[0, at(0.901)] == 0
    assert np.isnan(curves.f1[2]).all() and np.isnan(curves.precision[2]).all()
    # Mean F1 over the two classes with ground truth: (0.8 + 1) / 2 up to 0.3, the lowest of equals wins.
    precision, recall, f1 = curves.mean
    assert f1[curves.best] == pytest.approx(0.9) and curves.confidence[curves.best] == 0.001
    assert recall[at(0.6)] == pytest.approx((0.5 + 0) / 2)
    assert precision[at(0.6)] == pytest.approx(0.5)  # the other class has no box: not defined, not 0


@pytest.mark.parametrize("seed", range(2))
def test_curves_equal_a_slow_count(seed: int) -> None:
    annotations, found = random_set(seed)
    curves = confidence_curves(annotations, found, 0.25)
    assert curves.confidence[0] == 0.25
    for position in range(0, len(curves.confidence), 97):
        kept = found.take(found.scores >= curves.confidence[position])
        matched = match_detections(annotations, kept)  # from the start, with these alone
        for label in range(5):
            gt_boxes = int(((annotations.labels == label) & ~annotations.crowd).sum())
            boxes = int(((kept.labels == label) & (matched != IN_CROWD)).sum())
            right = int(((kept.labels == label) & (matched >= 0)).sum())
            if not gt_boxes:
                assert np.isnan(curves.recall[label, position])
                continue
            assert curves.recall[label, position] == right / gt_boxes
            assert curves.f1[label, position] == pytest.approx(2 * right / (boxes + gt_boxes))
            if boxes:
                assert curves.precision[label, position] == right / boxes


def test_confusion_by_hand() -> None:
    boxes = [
        (1, 1, [0, 0, 100, 100]),
        (1, 5, [200, 0, 100, 100]),
        (1, 5, [400, 0, 100, 100]),
        (2, 90, [0, 0, 400, 400]),
    ]
    annotations = annotate(boxes, images=2, crowd=(3,))
    found = detect(
        [
            (0, 0, [0, 0, 100, 100], 0.9),
            (0, 1, [0, 0, 100, 100], 0.8),  # a second box there: its ground truth is taken
            (0, 0, [200, 0, 100, 100], 0.7),  # another class
            (0, 1, [400, 0, 100, 100], 0.4),  # below the confidence
            (0, 2, [700, 0, 100, 100], 0.5),  # nothing there
            (1, 0, [10, 10, 50, 50], 0.9),  # inside the crowd
        ]
    )
    assert confusion_matrix(annotations, found, 0.5).tolist() == [
        [1, 0, 0, 0],
        [1, 0, 0, 1],
        [0, 0, 0, 0],
        [0, 1, 1, 0],
    ]
    assert confusion_matrix(annotations, found, 0.4)[1].tolist() == [1, 1, 0, 0]
    assert confusion_matrix(annotations, detect([]), 0.5)[:, 3].tolist() == [1, 2, 0, 0]


def test_confusion_counts_every_ground_truth_once() -> None:
    annotations, found = random_set(2)
    matrix = confusion_matrix(annotations, found, 0.3)
    gt_boxes = np.bincount(annotations.labels[~annotations.crowd], minlength=5)
    assert matrix[:-1].sum(axis=1).tolist() == gt_boxes.tolist()


def test_sizes_and_aspects() -> None:
    # sizes 40 (root of 1600) and 10; aspects 4 (flat) and 1
    annotations = annotate([(1, 1, [0, 0, 80, 20]), (1, 1, [200, 0, 10, 10])])
    found = detect([(0, 0, [0, 0, 80, 20], 0.9)])
    sizes = score_by_size(annotations, found, "pycocotools")
    assert {name: group.gt_boxes for name, group in sizes.items() if group.gt_boxes} == {"0-16": 1, "32-64": 1}
    assert sizes["0-16"].ap50 == 0 and sizes["32-64"].ap50 == pytest.approx(1)
    aspects = score_by_aspect(annotations, found, "pycocotools")
    assert {name: group.recall for name, group in aspects.items() if group.gt_boxes} == {
        "3:4-4:3": 0,
        "above 3:1": pytest.approx(1),
    }


def test_mean_defined() -> None:
    values = np.array([[1.0, np.nan, np.nan], [3.0, 5.0, np.nan]])
    assert mean_defined(values)[:2].tolist() == [2.0, 5.0] and np.isnan(mean_defined(values)[2])


def test_csv_leaves_the_undefined_empty(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", ["name", "x", "y"], [["cat, big", None, np.float64(0.125)], ["dog", float("nan"), 3]])
    with open(tmp_path / "a.csv", newline="") as file:
        assert list(csv.reader(file)) == [["name", "x", "y"], ["cat, big", "", "0.125"], ["dog", "", "3"]]
