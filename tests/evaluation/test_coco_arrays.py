"""The evaluator on arrays gives pycocotools' arrays, every bit of them."""

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


def assert_equal_arrays(
    annotations: Annotations, predictions: Detections, ranges: list[list[float]] | None = None
) -> None:
    if ranges is None:
        values = annotations.areas, box_areas(predictions.boxes)
    else:
        values = annotations.coco_boxes[:, 2], predictions.boxes[:, 2] - predictions.boxes[:, 0]
    expected, arrays = (
        coco_metric._accumulate(annotations, predictions, name, *values, ranges) for name in ("pycocotools", "arrays")
    )
    for reference, ours in zip(expected, arrays, strict=True):
        assert ours.dtype == reference.dtype and np.array_equal(ours, reference)


@pytest.mark.parametrize("ranges", [None, RANGES], ids=["official", "widths"])
@pytest.mark.parametrize("kind", ["random", "tied"])
@pytest.mark.parametrize("seed", range(6))
def test_arrays_of_the_reference(kind: str, seed: int, ranges: list[list[float]] | None) -> None:
    assert_equal_arrays(*make_set(kind, seed), ranges)


def test_tied_set_is_hard() -> None:
    annotations, predictions = make_set("tied", 0)
    per_image_and_class = np.bincount(predictions.image_index * 4 + predictions.labels)
    assert per_image_and_class.max() > 100 and annotations.crowd.mean() > 0.3
    assert np.unique(predictions.scores).size == 8 and annotations.image_ids[0] > annotations.image_ids[-1]
    class_ap = score(annotations, predictions).class_ap
    assert class_ap["name 5"][2] == 0 < class_ap["name 7"][0]


@pytest.mark.parametrize("size", [1, 7, 50])
def test_pieces_change_nothing(size: int, monkeypatch) -> None:
    monkeypatch.setattr(coco_arrays, "PAIRS_AT_A_TIME", size)
    monkeypatch.setattr(coco_arrays, "CHOICES_AT_A_TIME", size)
    assert_equal_arrays(*make_set("tied", 3))


def test_no_detections_and_boxes_without_area() -> None:
    annotations, _ = random_set(0)
    assert_equal_arrays(annotations, detect([]))
    # without width; without both; a perfect one; outside everything
    predictions = detect([(0, 0, [5.0, 5, 0, 9], 0.5), (0, 0, [5.0, 5, 0, 0], 0.5), (3, 1, [900.0, 900, 5, 5], 0.9)])
    assert_equal_arrays(annotations, join(predictions, ground_truth_as_detections(annotations)))


def test_groups_of_the_reference() -> None:
    annotations, predictions = make_set("tied", 1)
    arguments = (annotations.areas, box_areas(predictions.boxes), (0, 16**2, 32**2, 64**2, 96**2, np.inf))
    arrays, reference = (score_groups(annotations, predictions, *arguments, name) for name in ("arrays", "pycocotools"))
    assert arrays == reference


def test_real_ground_truth_with_noisy_detections(shared_data) -> None:
    """A hundred images of COCO with their crowds; four noisy boxes per ground truth and some that match nothing."""
    annotations = load_annotations(shared_data("coco_eval_fixture") / "annotations" / "instances_val.json")
    generator = np.random.default_rng(0)
    gt = ground_truth_as_detections(annotations)
    rows = np.sort(generator.integers(0, len(gt), 4 * len(gt)))
    predictions = gt.take(rows)
    sides = predictions.boxes[:, 2:] - predictions.boxes[:, :2]
    corners = predictions.boxes[:, :2] + generator.normal(0, 0.15, (len(rows), 2)) * sides
    sides = sides * np.exp(generator.normal(0, 0.2, sides.shape))
    wrong = generator.random(len(rows)) < 0.2
    predictions = Detections(
        predictions.image_index,
        np.concatenate([corners, corners + sides], axis=1),
        generator.random(len(rows)).round(2),
        np.where(wrong, generator.integers(0, 80, len(rows)), predictions.labels),
    )
    assert annotations.crowd.any()
    assert_equal_arrays(annotations, predictions)
