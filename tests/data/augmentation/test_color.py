"""Darknet's HSV distortion against Python's colorsys, and torchvision's photometric one as we call it."""

import colorsys
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from detection.config.settings import Settings
from detection.data.augmentation import color
from detection.data.augmentation.color import ColorDistortion, distort_hsv, draw_scale, shift_hsv
from tests.support.pictures import Scripted

Load = Callable[..., Settings]


def pixel(*rgb: int) -> np.ndarray:
    return np.full((2, 3, 3), rgb, np.uint8)


def build(default_settings: Load, *words: str, seed: int = 0) -> ColorDistortion:
    words = tuple(f"data.augmentation.{word}" for word in words)
    return ColorDistortion(default_settings(*words).data.augmentation, seed)


# --- HSV ---


def slow_distortion(rgb: tuple[int, ...], hue: float, saturation: float, exposure: float) -> list[float]:
    h, s, v = colorsys.rgb_to_hsv(*(value / 255 for value in rgb))
    return [min(value * 255, 255) for value in colorsys.hsv_to_rgb((h + hue) % 1, min(s * saturation, 1), v * exposure)]


@pytest.mark.parametrize(
    ("hue", "saturation", "exposure"),
    [
        (0, 1, 1),
        (0.1, 1, 1),
        (-0.1, 1, 1),
        (0.5, 1, 1),
        (-0.5, 1, 1),
        (0, 1.5, 1),
        (0, 1 / 1.5, 1),
        (0, 1, 1.5),
        (0, 1, 1 / 1.5),
        (0.07, 1.3, 0.8),
    ],
)
def test_hsv_follows_the_formula(hue: float, saturation: float, exposure: float) -> None:
    """A step of the hue is 1/256 of the circle, 6 * 255 / 256 = 6 grey levels of one channel; half of it twice, there
    and back, and the saturation's rounding, half a level twice and the factor, then times the exposure."""
    colours = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    distorted = distort_hsv(colours, hue, saturation, exposure)
    assert distorted.dtype == np.uint8 and distorted.shape == colours.shape
    expected = [[slow_distortion(tuple(map(int, rgb)), hue, saturation, exposure) for rgb in row] for row in colours]
    difference = np.abs(distorted - np.array(expected))
    assert difference.max() <= 7.75 * max(exposure, 1) and difference.mean() < 1.5


def test_hsv_by_hand() -> None:
    """A third of the circle turns red to green and to blue; grey has neither hue nor saturation."""
    for hue, expected in ((1 / 3, (0, 255, 0)), (-1 / 3, (0, 0, 255)), (0.0, (255, 0, 0))):
        assert np.abs(distort_hsv(pixel(255, 0, 0), hue, 1, 1).astype(int) - expected).max() <= 3  # half a step
    assert np.array_equal(distort_hsv(pixel(100, 100, 100), 0.1, 1.5, 1.5), pixel(150, 150, 150))
    assert np.array_equal(distort_hsv(pixel(200, 200, 200), 0.1, 1.5, 1.5), pixel(255, 255, 255))
    # value 200, saturation 1/2: 200 * (1 - 0.75) = 50 and 200 * (1 - 0.25) = 150
    assert np.abs(distort_hsv(pixel(200, 100, 100), 0, 1.5, 1).astype(int) - (200, 50, 50)).max() <= 1
    assert np.abs(distort_hsv(pixel(200, 100, 100), 0, 0.5, 1).astype(int) - (200, 150, 150)).max() <= 1
    # the value is not cut before the colour is built: (250, 125, 125) * 1.5 keeps its weak channels
    assert np.abs(distort_hsv(pixel(250, 125, 125), 0, 1, 1.5).astype(int) - (255, 187.5, 187.5)).max() <= 1.5


def test_a_factor_or_its_inverse() -> None:
    assert draw_scale(1.5, Scripted(1.25, 0.4)) == 1.25
    assert draw_scale(1.5, Scripted(1.25, 0.6)) == 0.8
    generator = np.random.default_rng(0)
    factors = np.array([draw_scale(1.5, generator) for _ in range(2000)])
    assert 1 / 1.5 <= factors.min() < 0.68 and 1.48 < factors.max() <= 1.5
    assert (factors > 1).mean() == pytest.approx(0.5, abs=0.05)  # standard error 0.011


def test_hsv_draws_hue_saturation_and_exposure(default_settings: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = Scripted(0.0, 0.25, 1.5, 0.0, 1.25, 0.9)  # applied; hue; saturation 1.5; exposure 1 / 1.25
    streams = iter([scripted, Scripted(0.99)])
    monkeypatch.setattr(color, "sample_stream", lambda *place: next(streams))
    words = ("darknet_hsv={p: 0.5, hue: 0.3, saturation: 1.6, exposure: 1.7}", "photometric_distortion.p=0.5")
    image = build(default_settings, *words)(pixel(200, 100, 100), 0, 0)
    assert scripted.asked == [(-0.3, 0.3), (1, 1.6), (1, 1.7)] and not scripted.values
    # value 200, saturation 0.75: strong 200, weak 50; red a quarter further is half-way from yellow to green; times 0.8
    assert np.abs(image.astype(int) - (0.8 * 125, 0.8 * 200, 0.8 * 50)).max() <= 4


# --- photometric distortion ---


def test_brightness_contrast_saturation_and_hue_are_each_applied_to_half_of_the_images(default_settings: Load) -> None:
    """Each alone, on a colour where its effect is known; 150 images, standard error 0.041."""
    still: dict[str, Any] = {"brightness": [1, 1], "contrast": [1, 1], "saturation": [1, 1], "hue": [0, 0]}
    half = np.repeat(np.array([[[60] * 3, [140] * 3]], np.uint8), 2, axis=0)  # grey 60 beside grey 140, mean 100
    for name, strength, image, expected in (
        ("brightness", [1.2, 1.2], pixel(100, 100, 100), pixel(120, 120, 120)),
        ("contrast", [0.5, 0.5], half, np.repeat(np.array([[[80] * 3, [120] * 3]], np.uint8), 2, axis=0)),
        ("saturation", [0, 0], pixel(200, 200, 0), None),
        ("hue", [0.5, 0.5], pixel(0, 200, 200), None),
    ):
        section = {"p": 1, **still, name: strength}
        distortion = build(default_settings, f"photometric_distortion={section}".replace("'", ""))
        results = [distortion(image, 0, index) for index in range(150)]
        assert all(result.dtype == np.uint8 and result.shape == image.shape for result in results)
        assert all(result.flags["C_CONTIGUOUS"] for result in results)
        if expected is not None:  # grey, so that the order of the channels does not matter
            changed = [np.abs(result.astype(int) - expected).max() <= 1 for result in results]
            assert all(
                hit or np.abs(result.astype(int) - image).max() <= 1
                for hit, result in zip(changed, results, strict=True)
            )
        elif name == "saturation":  # luma 0.299 * 200 + 0.587 * 200 = 177
            changed = [np.ptp(result[0, 0]) <= 1 for result in results]
            assert all(
                abs(int(result[0, 0, 0]) - 177) <= 2 for result, hit in zip(results, changed, strict=True) if hit
            )
        else:  # cyan has one weak channel, its opposite red has two
            changed = [(result[0, 0] < 100).sum() == 2 for result in results]
        assert np.mean(changed) == pytest.approx(0.5, abs=0.16), name


def test_channels_are_permuted_on_half_of_the_images(default_settings: Load) -> None:
    """One permutation of six leaves them: 1/2 + 1/12 of the images look the same; standard error 0.035."""
    section = "photometric_distortion={p: 1, brightness: [1, 1], contrast: [1, 1], saturation: [1, 1], hue: [0, 0]}"
    distortion = build(default_settings, section)
    seen = [tuple(distortion(pixel(10, 90, 200), 0, index)[0, 0].tolist()) for index in range(200)]
    assert len(set(seen)) == 6 and {tuple(sorted(colour)) for colour in seen} == {(10, 90, 200)}
    assert seen.count((10, 90, 200)) / 200 == pytest.approx(7 / 12, abs=0.14)


# --- randomness ---


def test_probability_streams_and_the_global_state(default_settings: Load) -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    words = ("darknet_hsv.p=0.5", "photometric_distortion.p=0.5")
    both, hsv, photometric = (build(default_settings, *chosen) for chosen in (words, words[:1], words[1:]))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    rows = []
    for index in range(300):
        results = [distortion(image, 2, index) for distortion in (both, hsv, photometric)]
        changed = [not np.array_equal(result, image) for result in results]
        rows.append(changed[1:])
        # one does not change what the other draws
        if not changed[2]:
            assert np.array_equal(results[0], results[1])
        if not changed[1]:
            assert np.array_equal(results[0], results[2])
        assert np.array_equal(both(image, 2, index), results[0])
        torch.rand(1)  # of another user
    table = np.array(rows)
    # standard errors 0.029 and 0.025; a photometric distortion may also leave the image as it is but seldom
    assert np.abs(table.mean(axis=0) - 0.5).max() < 0.12
    assert abs((table[:, 0] & table[:, 1]).mean() - 0.25) < 0.1
    torch.set_rng_state(before)
    both(image, 2, 1), both(image, 2, 2), both(image, 2, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_image_is_left_alone_and_another_epoch_looks_different(default_settings: Load) -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    copy = image.copy()
    distortion = build(default_settings, "darknet_hsv.p=1", "photometric_distortion.p=1")
    places = [(epoch, index) for epoch in range(3) for index in range(3)]
    looks = {distortion(image, *place).tobytes() for place in places}
    assert len(looks) == 9 and np.array_equal(image, copy)
    other = build(default_settings, "darknet_hsv.p=1", "photometric_distortion.p=1", seed=1)
    assert not looks & {other(image, *place).tobytes() for place in places}
    assert distortion(pixel(1, 2, 3)[:1, :1], 0, 0).shape == (1, 1, 3)


# --- HSV of YOLOX ---


def test_levels_are_added_to_hue_saturation_and_value() -> None:
    """Against YOLOX's formula in 16 bits on OpenCV's HSV; hue around the circle of 180, the others clipped."""
    colours = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    for shifts in ((0, 0, 0), (5, 30, 30), (-5, -30, -30), (179, 255, 0), (0, 0, -255)):
        hsv = cv2.cvtColor(colours, cv2.COLOR_RGB2HSV).astype(np.int16) + np.array(shifts, np.int16)
        hsv[..., 0] %= 180
        expected = cv2.cvtColor(hsv.clip(0, 255).astype(np.uint8), cv2.COLOR_HSV2RGB)
        assert np.array_equal(shift_hsv(colours, *shifts), expected)
    assert shift_hsv(pixel(200, 100, 100), 0, 0, 30)[0, 0].tolist() == [230, 115, 115]
    assert shift_hsv(pixel(100, 100, 100), 50, 0, -30)[0, 0].tolist() == [70, 70, 70]


def test_each_part_is_shifted_on_half_of_the_images(default_settings: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """400 images: a standard error of 0.025 for the halves, and U(-1, 1) * limit cut to whole levels."""
    shifts: list[tuple[int, ...]] = []
    monkeypatch.setattr(color, "shift_hsv", lambda image, *drawn: shifts.append(drawn) or image)
    distortion = build(default_settings, "hsv={p: 0.5, hue: 7, saturation: 40, value: 60}")
    for index in range(800):
        distortion(pixel(1, 2, 3), 0, index)
    assert len(shifts) == pytest.approx(400, abs=60)
    drawn = np.array(shifts)
    for column, limit in enumerate((7, 40, 60)):
        part = drawn[:, column]
        assert np.abs(part).max() < limit and part.min() < -0.8 * limit and part.max() > 0.8 * limit - 1
        off = 0.5 + 0.5 / limit  # what is cut to 0 counts as off
        assert (part == 0).mean() == pytest.approx(off, abs=0.1)
