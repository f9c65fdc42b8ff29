"""Darknet's resize, and both roundings of the sides; see test_transforms.py for the rest of the letterbox."""

import math
from collections.abc import Callable

import cv2
import numpy as np
import pytest

from detection.config.settings import Settings
from detection.data.resize import INTERPOLATIONS, resize_image
from detection.ops.letterbox import place_image
from tests.support.detectors import letterbox_image, transform_of

Load = Callable[..., Settings]
DARKNET = INTERPOLATIONS["darknet"]


def slow_resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Every pixel by the formula, in Python's floats; a single row or column is the last."""

    def neighbours(number: int, count: int, length: int) -> tuple[int, int, float]:
        source = number * (length - 1) / (count - 1) if count > 1 else float(length - 1)
        first = math.floor(source)
        return first, min(first + 1, length - 1), source - first

    resized = np.zeros((height, width, 3))
    for row in range(height):
        y1, y2, v = neighbours(row, height, image.shape[0])
        for column in range(width):
            x1, x2, u = neighbours(column, width, image.shape[1])
            for channel in range(3):
                a, b, c, d = (float(image[y, x, channel]) for y in (y1, y2) for x in (x1, x2))
                resized[row, column, channel] = (1 - v) * ((1 - u) * a + u * b) + v * ((1 - u) * c + u * d)
    return resized


@pytest.mark.parametrize(
    ("width", "height", "new_width", "new_height"),
    [
        (37, 23, 16, 10),
        (37, 23, 60, 41),
        (23, 37, 23, 12),  # one side stays
        (40, 30, 20, 15),
        (5, 7, 1, 3),
        (5, 7, 3, 1),
        (1, 9, 4, 4),
        (9, 1, 4, 4),
        (1, 1, 6, 3),
        (2, 2, 1, 1),
    ],
)
def test_the_resize_of_darknet_is_bilinear_between_corners(width, height, new_width, new_height) -> None:
    image = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)  # noise: the worst case
    resized = resize_image(image, new_width, new_height, DARKNET)
    assert resized.shape == (new_height, new_width, 3) and resized.dtype == np.uint8
    assert np.abs(resized - slow_resize(image, new_width, new_height)).max() <= 0.51
    if min(new_width, new_height) > 1:
        corners = (0, 0, -1, -1), (0, -1, 0, -1)
        assert np.array_equal(resized[corners], image[corners])


def test_the_resize_of_darknet_by_hand() -> None:
    """0, 90, 180 on 5 pixels: half steps; OpenCV's own linear, by the outer edges, gives 0, 36, 90, 144, 180."""
    image = np.array([0, 90, 180], np.uint8)[None, :, None].repeat(2, 0).repeat(3, 2)
    assert resize_image(image, 5, 2, DARKNET)[0, :, 0].tolist() == [0, 45, 90, 135, 180]
    assert resize_image(image, 5, 2, cv2.INTER_LINEAR)[0, :, 0].tolist() == [0, 36, 90, 144, 180]
    # a view into a larger image, as a crop gives it
    assert resize_image(np.pad(image, ((3, 3), (3, 3), (0, 0)))[3:5, 3:6], 5, 2, DARKNET)[1, :, 0].tolist()[1] == 45


@pytest.mark.parametrize(
    ("width", "height", "size", "down", "nearest"),
    [
        (333, 201, 416, (416, 251), (416, 251)),  # 201 * 416 / 333 = 251.1
        (640, 427, 416, (416, 277), (416, 278)),  # 277.55
        (427, 640, 416, (277, 416), (278, 416)),
        (640, 480, 416, (416, 312), (416, 312)),
        (500, 500, 608, (608, 608), (608, 608)),
        (5000, 1, 320, (320, 1), (320, 1)),  # Darknet would have no row at all
        (3, 2, 32, (32, 21), (32, 21)),  # 21.33
    ],
)
def test_sides_are_rounded_as_said(width, height, size, down, nearest) -> None:
    for rounding, expected in (("down", down), ("nearest", nearest)):
        letterbox, *new = place_image(width, height, size, "letterbox", rounding)
        assert tuple(new) == expected
        assert (letterbox.left, letterbox.top) == ((size - new[0]) // 2, (size - new[1]) // 2)
        assert (letterbox.scale_x, letterbox.scale_y) == (new[0] / width, new[1] / height)
        image, same = letterbox_image(
            np.zeros((height, width, 3), np.uint8), size, "letterbox", (9, 9, 9), cv2.INTER_LINEAR, rounding
        )
        assert same == letterbox
        assert (image[..., 0] == 0).any(axis=0).sum() == new[0] and (image[..., 0] == 0).any(axis=1).sum() == new[1]
    assert place_image(width, height, size, "squash", "down")[1:] == (size, size)


@pytest.mark.parametrize("training", [True, False])
def test_both_settings_reach_the_pixels(default_settings: Load, training: bool) -> None:
    """64 x 43 to 32: 21.5 rows. A ramp of 4 grey levels a column, 63 * 4 = 252 at the right corner."""
    names = type(default_settings().data.augmentation).model_fields.keys() - {"min_visibility"}
    off = [f"data.augmentation.{name}.p=0" for name in sorted(names)]
    ramp = (np.arange(64) * 4).astype(np.uint8)[None, :, None].repeat(43, 0).repeat(3, 2)
    boxes = np.array([[0, 0, 64, 43]], np.float32)
    words = ["model.interpolation=darknet", "model.rounding=down", "model.fill=[1, 2, 3]"]
    sample = transform_of(default_settings(*off, *words), 32, 0, training)(ramp, boxes, np.array([0]), 0, 0, 0)
    rows = np.flatnonzero((sample.image != (1, 2, 3)).any(axis=(1, 2)))
    assert (rows[0], len(rows)) == (5, 21)
    expected = [round(column * 63 / 31 * 4) for column in range(32)]
    assert np.abs(sample.image[10, :, 0].astype(int) - expected).max() <= 1
    assert sample.image[10, [0, -1], 0].tolist() == [0, 252]
    assert np.allclose(sample.boxes, [[0, 5, 32, 26]])
    other = transform_of(default_settings(*off, words[2]), 32, 0, training)(ramp, boxes, np.array([0]), 0, 0, 0)
    assert np.allclose(other.boxes, [[0, 5, 32, 27]])  # 21.5 to the nearest even number
    assert other.image[10, 0, 0] == 2  # half-way between the first two columns
