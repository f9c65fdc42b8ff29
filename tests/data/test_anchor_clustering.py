import itertools

import numpy as np
import pytest
import torch

from detection.data import anchor_clustering as anchors_module
from detection.data.anchor_clustering import (
    best_ious,
    best_side_ratios,
    cluster_anchors,
    fit_anchors,
    mean_best_iou,
    nearest_anchors,
    refine_anchors,
)
from detection.data.annotations import load_annotations
from detection.models.levels import cell_grid, flatten_levels
from tests.support.slow_boxes import slow_iou

CPU = torch.device("cpu")
# yolov3.cfg of Darknet
COCO_ANCHORS = [(10, 13), (16, 30), (33, 23), (30, 61), (62, 45), (59, 119), (116, 90), (156, 198), (373, 326)]

# Grid and order


def test_cell_grid_holds_column_then_row() -> None:
    grid = cell_grid(2, 3, CPU)
    assert grid.dtype == torch.float32
    # two rows of three columns
    assert grid.tolist() == [[[0, 0], [1, 0], [2, 0]], [[0, 1], [1, 1], [2, 1]]]


def test_flatten_levels_against_loop() -> None:
    """Levels in the order given, then row, column, anchor; the levels may differ in size and number of anchors."""
    outputs = [
        torch.randn(2, anchors, rows, columns, 6) for anchors, rows, columns in [(3, 4, 6), (2, 2, 3), (1, 1, 2)]
    ]
    flat = flatten_levels(outputs)
    assert flat.shape == (2, 3 * 4 * 6 + 2 * 2 * 3 + 1 * 1 * 2, 6)
    for image in range(2):
        position = 0
        for output in outputs:
            _, anchors, rows, columns, _ = output.shape
            for row, column, anchor in itertools.product(range(rows), range(columns), range(anchors)):
                assert torch.equal(flat[image, position], output[image, anchor, row, column])
                position += 1


# Clusters


def test_cluster_anchors_recovers_separate_clusters() -> None:
    """Five tight groups of shapes around known medians, the medians themselves among them."""
    medians = np.array([(10.0, 14.0), (40.0, 25.0), (30.0, 120.0), (150.0, 90.0), (300.0, 320.0)])  # by area
    # tight, so that the initial choice hardly ever takes two of one group
    spread = np.array([-2e-3, -1e-3, 0.0, 1e-3, 2e-3])
    sizes = np.concatenate([median * (1 + np.stack([spread, spread[::-1]], axis=1)) for median in medians])
    np.random.default_rng(0).shuffle(sizes)
    for seed in range(5):
        np.testing.assert_allclose(cluster_anchors(sizes, 5, seed=seed), medians)


def test_cluster_anchors_uses_shape_not_size_differences() -> None:
    """Small groups that differ by a factor of 3 stay apart; a Euclidean distance would cut the large group instead."""
    small, middle = np.array([[4.0, 4.0], [4.2, 4.2], [3.8, 3.8]]), np.array([[12.0, 12.0], [12.6, 12.6], [11.4, 11.4]])
    large = np.array([[400.0, 400.0], [440.0, 440.0], [360.0, 360.0]])
    np.testing.assert_allclose(
        cluster_anchors(np.concatenate([small, middle, large]), 3), [[4, 4], [12, 12], [400, 400]]
    )


def test_cluster_anchors_sorted_by_area_and_repeatable() -> None:
    sizes = np.random.default_rng(1).uniform(5, 300, size=(200, 2))
    anchors = cluster_anchors(sizes, 9, seed=3)
    assert anchors.shape == (9, 2) and anchors.dtype == np.float64
    assert (np.diff(anchors.prod(axis=1)) >= 0).all()
    assert (anchors >= sizes.min(axis=0)).all() and (anchors <= sizes.max(axis=0)).all()
    np.testing.assert_array_equal(cluster_anchors(sizes, 9, seed=3), anchors)


def test_cluster_anchors_of_as_many_shapes_as_anchors() -> None:
    """Repeated shapes count once; each shape then is its own cluster."""
    shapes = np.array([(10.0, 10.0), (10.0, 40.0), (80.0, 30.0)])
    np.testing.assert_allclose(cluster_anchors(np.repeat(shapes, [7, 1, 2], axis=0), 3), shapes)
    np.testing.assert_allclose(cluster_anchors(shapes, 1), [[10, 30]])  # median of widths, median of heights


@pytest.mark.parametrize("sizes", [np.zeros((0, 2)), np.ones((50, 2)), np.array([[1.0, 2.0], [2.0, 1.0]] * 4)])
def test_cluster_anchors_needs_enough_shapes(sizes: np.ndarray) -> None:
    found = len(np.unique(sizes, axis=0))
    with pytest.raises(ValueError, match=f"at least 3 distinct box shapes, found {found}"):
        cluster_anchors(sizes, 3)


def test_mean_best_iou_by_hand() -> None:
    anchors = np.array([(10.0, 10.0), (40.0, 20.0)])
    sizes = np.array(
        [
            (10.0, 10.0),  # equal to the first: 1
            (20.0, 10.0),  # first: 100 / 200; second: 200 / 800
            (20.0, 40.0),  # first: 100 / 800; second: 20 x 20 shared of 800 + 800 - 400
        ]
    )
    assert mean_best_iou(sizes, anchors) == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


# Fits


def random_sizes(count: int) -> np.ndarray:
    return np.exp(np.random.default_rng(4).normal(size=(count, 2)) * 0.8 + 4)


def mean_best_iou_by_loop(sizes: np.ndarray, anchors: np.ndarray) -> float:
    best = [max(slow_iou((0, 0, *size), (0, 0, *anchor)) for anchor in anchors.tolist()) for size in sizes.tolist()]
    return sum(best) / len(best)


def test_tables_of_many_boxes_against_loop(monkeypatch) -> None:
    """Boxes and anchors in chunks that do not divide the count."""
    monkeypatch.setattr(anchors_module, "CHUNK", 7)
    sizes, anchors = random_sizes(50), np.array([(20.0, 60.0), (60.0, 20.0), (150.0, 150.0)])
    assert mean_best_iou(sizes, anchors) == pytest.approx(mean_best_iou_by_loop(sizes, anchors))
    each = [[mean_best_iou_by_loop(size[None], anchor[None]) for anchor in anchors] for size in sizes]
    assert nearest_anchors(sizes, anchors).tolist() == np.argmax(each, axis=1).tolist()
    assert best_ious(sizes, anchors) == pytest.approx(np.max(each, axis=1))


def test_best_side_ratios_by_hand() -> None:
    anchors = np.array([(10.0, 10.0), (40.0, 20.0)])
    sizes = np.array([(10.0, 10.0), (20.0, 50.0), (5.0, 10.0), (80.0, 10.0)])
    # (20, 50): 5 times as high as the first; half as wide and 2.5 times as high as the second
    assert best_side_ratios(sizes, anchors) == pytest.approx([1, 2.5, 2, 2])


def test_refined_anchor_is_the_best_of_a_grid() -> None:
    """One anchor: no width and height of a fine grid has a higher mean IoU; the mean of the boxes is far worse."""
    sizes = random_sizes(300)
    refined = refine_anchors(sizes, np.median(sizes, axis=0)[None])
    steps = np.geomspace(0.7, 1.4, 40)
    grid = [mean_best_iou(sizes, refined * (x, y)) for x in steps for y in steps]
    assert max(grid) <= mean_best_iou(sizes, refined) + 1e-4
    assert mean_best_iou(sizes, refined) > mean_best_iou(sizes, sizes.mean(axis=0)[None]) + 0.03


def test_refining_never_loses() -> None:
    sizes = random_sizes(400)
    for seed in range(5):
        start = sizes[np.random.default_rng(seed).choice(400, 4, replace=False)]
        refined = refine_anchors(sizes, start)
        assert mean_best_iou(sizes, refined) >= mean_best_iou(sizes, start)
        assert (np.diff(refined.prod(axis=1)) >= 0).all()
    np.testing.assert_array_equal(refine_anchors(sizes, sizes), sizes[np.argsort(sizes.prod(axis=1))])  # all have IoU 1


def test_fit_is_not_below_the_anchors_in_use() -> None:
    """Five shapes, one of them in nearly all boxes: a single clustering can miss some of the others."""
    shapes = np.array([(10.0, 10.0), (10.0, 90.0), (90.0, 10.0), (90.0, 90.0), (900.0, 900.0)])
    sizes = np.concatenate([np.repeat(shapes[:4], 3, axis=0), shapes[4:] * np.linspace(0.98, 1.02, 300)[:, None]])
    alone = [mean_best_iou(sizes, fit_anchors(sizes, 5, seed, restarts=1)) for seed in range(20)]
    assert min(alone) < mean_best_iou(sizes, shapes)  # else this test says nothing
    worst = int(np.argmin(alone))
    helped = fit_anchors(sizes, 5, worst, restarts=1, known=shapes)
    assert mean_best_iou(sizes, helped) >= mean_best_iou(sizes, shapes)


def test_fit_finds_clusters_through_a_sample(monkeypatch) -> None:
    """Six shapes, each many times: a sample that holds all of them is enough to find them exactly."""
    shapes = np.array([(10.0, 12.0), (40.0, 25.0), (30.0, 120.0), (150.0, 40.0), (150.0, 160.0), (300.0, 320.0)])
    monkeypatch.setattr(anchors_module, "SAMPLE", 100)
    sizes = np.repeat(shapes, 200, axis=0)
    np.testing.assert_allclose(fit_anchors(sizes, 6), shapes)
    with pytest.raises(ValueError, match="7 anchors need at least 7 distinct box shapes, found 6"):
        fit_anchors(sizes, 7)


@pytest.mark.parametrize("seed", range(2))
def test_anchors_of_half_of_val2017_are_not_below_the_published_on_the_other(shared_data, seed: int) -> None:
    annotations = load_annotations(shared_data("coco_val2017_boxes") / "annotations" / "instances_val.json")
    image_of_box = np.repeat(np.arange(len(annotations)), np.diff(annotations.first_box))
    scale = 416 / annotations.image_sizes.max(axis=1)[image_of_box]
    sizes = (annotations.boxes[:, 2:] - annotations.boxes[:, :2]) * scale[:, None]
    usable = (sizes >= 1).all(axis=1)
    half = np.random.default_rng(seed).permutation(len(annotations))[: len(annotations) // 2]
    inside = np.isin(image_of_box, half)
    fitted = fit_anchors(sizes[inside & usable], 9, seed, restarts=3)
    other = sizes[~inside & usable]
    assert mean_best_iou(other, fitted) > mean_best_iou(other, np.array(COCO_ANCHORS)) + 0.005
