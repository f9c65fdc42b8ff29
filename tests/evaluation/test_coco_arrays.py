"""The evaluator on arrays gives pycocotools' arrays, every bit of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from detection.data.annotations import Annotations, load_annotations
from detection.evaluation import coco_arrays, coco_metric
from detection.evaluation.coco_metric import score, score_groups
from detection.evaluation.detections import Detections, box_areas
from tests.support.evaluation_cases import detect, ground_truth_as_detections, join, random_set, tied_set

RANGES = [[0, 30.0], [30.0, 90.0], [np.nextafter(90.0, 91), 1e9]]  # of another property


def make_set(kind: str, seed: int) -> tuple[Annotations, Detections]:
    return random_set(seed) if kind == "random" else tied_set(seed)[1:]


def assert_equal_arrays(annotations: Annotations, found: Detections, ranges: list[list[float]] | None = None) -> None:
    if ranges is None:
        values = annotations.areas, box_areas(found.boxes)
    else:
        values = annotations.coco_boxes[:, 2], found.boxes[:, 2] - found.boxes[:, 0]
    expected, arrays = (
        coco_metric._accumulate(annotations, found, name, *values, ranges) for name in ("pycocotools", "arrays")
    )
    for reference, ours in zip(expected, arrays, strict=True):
        assert ours.dtype == reference.dtype and np.array_equal(ours, reference)


@pytest.mark.parametrize("ranges", [None, RANGES], ids=["official", "widths"])
@pytest.mark.parametrize("kind", ["random", "tied"])
@pytest.mark.parametrize("seed", range(6))
def test_arrays_of_the_reference(kind: str, seed: int, ranges: list[list[float]] | None) -> None:
    assert_equal_arrays(*make_set(kind, seed), ranges)


def test_tied_set_is_hard() -> None:
    annotations, found = make_set("tied", 0)
    per_image_and_class = np.bincount(found.image_index * 4 + found.labels)
    assert per_image_and_class.max() > 100 and annotations.crowd.mean() > 0.3
    assert np.unique(found.scores).size == 8 and annotations.image_ids[0] > annotations.image_ids[-1]
    assert score(annotations, found).class_ap["name 5"][2] == 0 < score(annotations, found).class_ap["name 7"][0]


@pytest.mark.parametrize("size", [1, 7, 50])
def test_pieces_change_nothing(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco_arrays, "PAIRS_AT_A_TIME", size)
    monkeypatch.setattr(coco_arrays, "CHOICES_AT_A_TIME", size)
    assert_equal_arrays(*make_set("tied", 3))


def test_nothing_found_and_boxes_without_area() -> None:
    annotations, _ = random_set(0)
    assert_equal_arrays(annotations, detect([]))
    # without width; without both; a perfect one; outside everything
    found = detect([(0, 0, [5.0, 5, 0, 9], 0.5), (0, 0, [5.0, 5, 0, 0], 0.5), (3, 1, [900.0, 900, 5, 5], 0.9)])
    assert_equal_arrays(annotations, join(found, ground_truth_as_detections(annotations)))


def test_groups_of_the_reference() -> None:
    annotations, found = make_set("tied", 1)
    arguments = (annotations.areas, box_areas(found.boxes), (0, 16**2, 32**2, 64**2, 96**2, np.inf))
    assert score_groups(annotations, found, *arguments, "arrays") == score_groups(
        annotations, found, *arguments, "pycocotools"
    )


def test_real_ground_truth_with_noisy_detections(shared_data: Callable[[str], Path]) -> None:
    """A hundred images of COCO with their crowds; four noisy boxes per ground truth and some that match nothing."""
    annotations = load_annotations(shared_data("coco_eval_fixture") / "annotations" / "instances_val.json")
    generator = np.random.default_rng(0)
    gt = ground_truth_as_detections(annotations)
    rows = np.sort(generator.integers(0, len(gt), 4 * len(gt)))
    found = gt.take(rows)
    sides = found.boxes[:, 2:] - found.boxes[:, :2]
    corners = found.boxes[:, :2] + generator.normal(0, 0.15, (len(rows), 2)) * sides
    sides = sides * np.exp(generator.normal(0, 0.2, sides.shape))
    wrong = generator.random(len(rows)) < 0.2
    found = Detections(
        found.image_index,
        np.concatenate([corners, corners + sides], axis=1),
        generator.random(len(rows)).round(2),
        np.where(wrong, generator.integers(0, 80, len(rows)), found.labels),
    )
    assert annotations.crowd.any()
    assert_equal_arrays(annotations, found)
