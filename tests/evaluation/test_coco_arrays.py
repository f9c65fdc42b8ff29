"""The evaluator on arrays gives pycocotools' arrays, every bit of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from detection.data.annotations import Annotations, flatten_annotations, load_annotations
from detection.evaluation import coco_arrays, coco_metric
from detection.evaluation.coco_metric import score, score_groups
from detection.evaluation.detections import Detections, box_areas
from tests.support.evaluation_cases import annotate, coco_content, detect, ground_truth_as_detections, join, random_set

RANGES = [[0, 30.0], [30.0, 90.0], [np.nextafter(90.0, 91), 1e9]]  # of another property


def hard_set(seed: int) -> tuple[Annotations, Detections]:
    """Boxes on a coarse grid: overlaps and scores are equal everywhere, thresholds are met exactly, crowds pile up.

    Image ids descend, category ids are mixed; one class has ground truth in crowds only, one image (the last by id too) none.
    """
    generator = np.random.default_rng(seed)
    categories = (7, 2, 90, 5)

    def boxes(count: int) -> np.ndarray:
        corners, sides = generator.integers(0, 8, (count, 2)) * 10, generator.integers(1, 12, (count, 2)) * 10
        return np.concatenate([corners, sides], axis=1).astype(np.float64)

    gt_boxes = [
        (image, int(category), box.tolist())
        for image in range(1, 9)
        for category, box in zip(generator.choice(categories, 12), boxes(12), strict=True)
        if image not in (1, 4)
    ]
    crowd = [number for number, (_, category, _) in enumerate(gt_boxes) if category == 5 or generator.random() < 0.3]
    content = coco_content(gt_boxes, images=9, categories=categories, crowd=tuple(crowd))
    for row in content["annotations"]:
        row["area"] = float(generator.choice([0, 32**2, 96**2, row["area"]]))  # on the borders of the size classes
        row["image_id"] = 100 - row["image_id"]
    for image in content["images"]:
        image["id"] = 100 - image["id"]
    annotations = flatten_annotations(content, "test")
    count = 2500  # 70 per image and class, sometimes over 100 where one is favoured
    rows = zip(
        np.sort(generator.integers(0, 8, count)).tolist(),
        generator.choice(4, count, p=[0.6, 0.2, 0.1, 0.1]).tolist(),
        boxes(count).tolist(),
        (generator.integers(0, 8, count) / 8).tolist(),
        strict=True,
    )
    return annotations, detect(list(rows))


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
@pytest.mark.parametrize("make", [random_set, hard_set])
@pytest.mark.parametrize("seed", range(6))
def test_arrays_of_the_reference(
    make: Callable[[int], tuple[Annotations, Detections]], seed: int, ranges: list[list[float]] | None
) -> None:
    annotations, found = make(seed)
    assert_equal_arrays(annotations, found, ranges)


def test_hard_set_is_hard() -> None:
    annotations, found = hard_set(0)
    per_image_and_class = np.bincount(found.image_index * 4 + found.labels)
    assert per_image_and_class.max() > 100 and annotations.crowd.mean() > 0.3
    assert np.unique(found.scores).size == 8 and annotations.image_ids[0] > annotations.image_ids[-1]
    assert score(annotations, found).class_ap["name 5"][2] == 0 < score(annotations, found).class_ap["name 7"][0]


@pytest.mark.parametrize("size", [1, 7, 50])
def test_pieces_change_nothing(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco_arrays, "PAIRS_AT_A_TIME", size)
    monkeypatch.setattr(coco_arrays, "CHOICES_AT_A_TIME", size)
    assert_equal_arrays(*hard_set(3))


def test_nothing_found_and_boxes_without_area() -> None:
    annotations, _ = random_set(0)
    assert_equal_arrays(annotations, detect([]))
    # without width; without both; a perfect one; outside everything
    found = detect([(0, 0, [5.0, 5, 0, 9], 0.5), (0, 0, [5.0, 5, 0, 0], 0.5), (3, 1, [900.0, 900, 5, 5], 0.9)])
    assert_equal_arrays(annotations, join(found, ground_truth_as_detections(annotations)))


@pytest.mark.parametrize(("second", "recall"), [(4, 0.5), (-2, 1.0)])
def test_the_last_of_equal_gt_boxes_is_taken(second: int, recall: float) -> None:
    """The first detection overlaps both ground-truth boxes by 9 / 11 and takes the last: only the other one is left."""
    annotations = annotate([(1, 1, [0, 0, 10, 10]), (1, 1, [2, 0, 10, 10])])
    # 8 / 12 with the nearer ground truth, 6 / 14 or 4 / 16 with the farther one
    found = detect([(0, 0, [1.0, 0, 10, 10], 0.9), (0, 0, [second, 0, 10, 10], 0.8)])
    _, recalls = coco_metric._accumulate(annotations, found, "arrays", annotations.areas, box_areas(found.boxes))
    assert recalls[0, 0, 0, -1] == recall
    assert_equal_arrays(annotations, found)


def test_groups_of_the_reference() -> None:
    annotations, found = hard_set(1)
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
