import numpy as np
import pytest
import torch
from torch import nn

from detection.anchors import cell_grid, cluster_anchors, flatten_levels, mean_best_iou

CPU = torch.device("cpu")

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
            for row in range(rows):
                for column in range(columns):
                    for anchor in range(anchors):
                        assert torch.equal(flat[image, position], output[image, anchor, row, column])
                        position += 1


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_flatten_levels_of_a_convolution(memory_format: torch.memory_format) -> None:
    """Channel anchor * (5 + C) + value of a cell comes out as that anchor's value, whatever the memory layout."""
    anchors, values, rows, columns = 3, 7, 4, 5
    convolution = nn.Conv2d(8, anchors * values, 1).to(memory_format=memory_format)
    features = torch.randn(2, 8, rows, columns).to(memory_format=memory_format)
    with torch.no_grad():
        raw = convolution(features)  # (B, A * (5 + C), H, W)
        output = raw.view(2, anchors, values, rows, columns).permute(0, 1, 3, 4, 2)
        flat = flatten_levels([output])
    for row in range(rows):
        for column in range(columns):
            for anchor in range(anchors):
                position = (row * columns + column) * anchors + anchor
                expected = raw[:, anchor * values : (anchor + 1) * values, row, column]
                assert torch.equal(flat[:, position], expected)


def test_flatten_levels_is_the_order_of_channels_last_memory() -> None:
    """The order is chosen so that flattening one level of a channels_last output needs no copy."""
    in_memory = torch.arange(2.0 * 4 * 5 * 21).view(2, 4, 5, 21)  # (B, H, W, A * 7) as the values lie in memory
    raw = in_memory.permute(0, 3, 1, 2)
    assert raw.is_contiguous(memory_format=torch.channels_last)
    output = raw.view(2, 3, 7, 4, 5).permute(0, 1, 3, 4, 2)
    assert torch.equal(flatten_levels([output]).flatten(), in_memory.flatten())


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


def test_cluster_anchors_beats_a_random_choice() -> None:
    generator = np.random.default_rng(2)
    sizes = np.exp(generator.normal(size=(400, 2)) * 0.8 + 4)  # log-normal, as box sizes of photographs are
    clustered = mean_best_iou(sizes, cluster_anchors(sizes, 9))
    chosen = [mean_best_iou(sizes, sizes[generator.choice(400, 9, replace=False)]) for _ in range(20)]
    assert clustered > max(chosen) + 0.02


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
