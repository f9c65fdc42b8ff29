"""Box shapes at the network input agree with those of the training transform."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from detection.data import box_shapes
from detection.data.annotations import Annotations, load_annotations
from detection.data.box_shapes import shapes_at
from detection.data.coco import CocoDataset
from detection.errors import DataError
from tests.support.detectors import geometry_of, transform_of


@pytest.fixture
def annotations(drawn_dataset: Path) -> Annotations:
    return load_annotations(drawn_dataset / "annotations" / "instances_train.json")


@pytest.mark.parametrize("words", [(), ("model.placement=squash",), ("model.rounding=down",)])
def test_shapes_are_those_of_the_transform(
    drawn_dataset: Path, annotations: Annotations, default_settings: Callable, words: tuple[str, ...]
) -> None:
    settings = default_settings(*words)
    expected = []
    for size in (96, 224):
        dataset = CocoDataset(
            drawn_dataset / "train",
            drawn_dataset / "annotations" / "instances_train.json",
            transform_of(settings, size),
        )
        boxes = np.concatenate([dataset[index].boxes for index in range(len(dataset))])
        expected.append(boxes[:, 2:] - boxes[:, :2])
    shapes, left_out = shapes_at(annotations, geometry_of(settings), [96, 224], seed=0)
    np.testing.assert_allclose(shapes, np.concatenate(expected), rtol=1e-4)
    assert left_out == []


def test_many_boxes_are_taken_at_one_size_each(
    annotations: Annotations, default_settings: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    geometry = geometry_of(default_settings())
    (small, _), (large, _) = (shapes_at(annotations, geometry, [size], 0) for size in (64, 128))
    monkeypatch.setattr(box_shapes, "MAX_SHAPES", len(small))
    shapes, _ = shapes_at(annotations, geometry, [64, 128], 0)
    at_small = np.isclose(shapes, small, rtol=0.02).all(axis=1)
    at_large = np.isclose(shapes, large, rtol=0.02).all(axis=1)
    assert len(shapes) == len(small) and (at_small ^ at_large).all()
    assert abs(int(at_small.sum()) - int(at_large.sum())) <= 1  # the sizes are equally frequent


def test_everything_left_out_is_counted(annotations: Annotations, default_settings: Callable) -> None:
    geometry = geometry_of(default_settings())
    total = len(annotations.labels)
    crowd = np.zeros(total, bool)
    crowd[:2] = True
    sizes = annotations.image_sizes.copy()
    sizes[-1] = 0  # image 8 of 0..8 has no box; 7 has three
    sizes[7] = 0
    changed = dataclasses.replace(annotations, crowd=crowd, image_sizes=sizes)
    shapes, left_out = shapes_at(changed, geometry, [96], 0)
    assert len(shapes) == total - 2 - 3
    assert left_out == ["2 crowd regions", "3 boxes of images without width and height in the file"]
    # at 4 px every box (8 to 20 of at least 92 px) is below 1 px
    with pytest.raises(DataError, match=f"no box to fit anchors to .*{total} boxes narrower or lower than 1 px"):
        shapes_at(annotations, geometry, [4], 0)
    with pytest.raises(DataError, match="no box to fit anchors to"):
        shapes_at(dataclasses.replace(annotations, crowd=np.ones(total, bool)), geometry, [96], 0)
