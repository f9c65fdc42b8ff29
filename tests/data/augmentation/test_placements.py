"""Expand, IoU crop and Darknet's jitter: exact geometry for given draws, and boxes that follow the pixels."""

import itertools
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from detection.config.settings import Settings
from detection.data.augmentation import crop_and_scale as placements
from detection.data.augmentation.crop_and_scale import (
    RandomPlacement,
    Rectangle,
    build_iou_crop,
    cropped,
    expanded,
    jittered,
    place_view,
    rescaled,
)
from detection.data.resize import resize_placed
from detection.data.transforms import Transform
from detection.errors import SettingsError
from detection.ops.letterbox import place_image
from tests.support.detectors import geometry_of, transform_of
from tests.support.pictures import NAMED, NO_BOXES, Scripted, bright_extent, picture, probabilities

Load = Callable[..., Settings]
GEOMETRIC = NAMED[:3]
KEEP_EVERYTHING = "data.augmentation.min_visibility=0"


def build(default_settings: Load, *words: str, size: int = 64, seed: int = 0, **chosen: float) -> Transform:
    return transform_of(default_settings(*probabilities(**chosen), *words), size, seed, True)


def array(*boxes: tuple[float, ...]) -> np.ndarray:
    return np.array(boxes, np.float32).reshape(-1, 4)


@pytest.fixture
def torch_draws(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`torch_draws(rand=[...], randint=[...])`: the next numbers that torch draws, one list per call of several."""

    def script(rand: list[Any], randint: list[int] | None = None) -> None:
        numbers, choices = iter(rand), iter(randint or [])
        monkeypatch.setattr(torch, "rand", lambda *size: torch.tensor(next(numbers)))
        monkeypatch.setattr(torch, "randint", lambda **keywords: torch.tensor([next(choices)]))

    return script


# --- Darknet's jitter ---


def placement_of(settings: Settings) -> RandomPlacement:
    return RandomPlacement(settings.data.augmentation, geometry_of(settings), 0)


def test_jitter_by_hand() -> None:
    # (640 + 64) / (480 - 80) = 1.76: 416 wide, 416 / 1.76 = 236.36 high; 179.64 rows are free
    draws = Scripted(64, -80, 0, 100.7)
    assert jittered(640, 480, 416, 0.3, draws) == Rectangle(0, 100, 416, 236)
    assert np.allclose(draws.asked, [(-192, 192), (-144, 144), (0, 0), (0, 416 - 416 / 1.76)])
    # (300 - 90) / (600 + 0) = 0.35: 416 high, 145.6 wide
    draws = Scripted(-90, 0, 270.3, 0)
    assert jittered(300, 600, 416, 0.3, draws) == Rectangle(270, 0, 145, 416)
    assert np.allclose(draws.asked, [(-90, 90), (-180, 180), (0, 270.4), (0, 0)])
    # a square that stays one fills everything
    assert jittered(50, 50, 64, 0.5, Scripted(5, 5, 0, 0)) == Rectangle(0, 0, 64, 64)


@pytest.mark.parametrize(("width", "height"), [(1, 5000), (5000, 1), (1, 1), (640, 480)])
def test_jitter_stays_inside_the_square(width: int, height: int) -> None:
    generator = np.random.default_rng(0)
    for size in (32, 416):
        for _ in range(200):
            left, top, new_width, new_height = jittered(width, height, size, 0.3, generator)
            assert left >= 0 and top >= 0 and min(new_width, new_height) >= 1
            assert left + new_width <= size and top + new_height <= size and max(new_width, new_height) == size


def test_jittered_boxes_by_hand(default_settings: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """640 x 480 at (0, 100), 416 x 236: x * 0.65, y * 236 / 480 + 100."""
    monkeypatch.setattr(placements, "jittered", lambda *arguments: Rectangle(0, 100, 416, 236))
    transform = build(default_settings, "model.fill=[1, 2, 3]", size=416, darknet_jitter=1)
    sample = transform(np.full((480, 640, 3), 200, np.uint8), array((100, 120, 300, 240)), np.array([79]), 0, 0, 0)
    assert np.allclose(sample.boxes, [[65, 100 + 59, 195, 100 + 118]], atol=1e-3) and sample.labels.tolist() == [79]
    expected = np.empty((416, 416, 3), np.uint8)
    expected[:] = (1, 2, 3)
    expected[100:336] = 200
    assert np.array_equal(sample.image, expected)


# --- the letterbox's scale ---


def test_rescaled_by_hand(default_settings: Load) -> None:
    """640 x 480 in a square of 320: the letterbox is 320 x 240, and every factor multiplies it."""
    whole, top_left = Rectangle(0, 0, 640, 480), geometry_of(default_settings("model.placement=top_left"))
    middle = np.array([0.5, 0.5])
    assert rescaled(whole, 320, 0.5, top_left, middle) == (whole, Rectangle(0, 0, 160, 120))
    letterbox = geometry_of(default_settings())
    assert rescaled(whole, 320, 0.5, letterbox, middle) == (whole, Rectangle(80, 100, 160, 120))
    # 2: 640 x 480, half of the columns and two thirds of the rows are seen; 320 columns and 160 rows are cut off
    crop, target = rescaled(whole, 320, 2.0, top_left, np.array([0.25, 0.999]))
    assert (crop, target) == (Rectangle(80, 160, 320, 320), Rectangle(0, 0, 320, 320))
    # 1.25: 400 x 300: columns are cropped, all rows are seen
    crop, target = rescaled(whole, 320, 1.25, top_left, np.array([0.0, 0.5]))
    assert (crop, target) == (Rectangle(0, 0, 512, 480), Rectangle(0, 0, 320, 300))
    assert rescaled(Rectangle(0, 0, 1, 3), 320, 0.001, top_left, middle)[1] == Rectangle(0, 0, 1, 1)


def test_scale_jitter_keeps_boxes_exact(default_settings: Load) -> None:
    """Boxes are drawn white on black; one that is left by the crop lies where the pixels are."""
    words = ["model.placement=top_left", "model.fill=[0, 0, 0]", KEEP_EVERYTHING]
    transform = build(default_settings, *words, size=128, seed=3, scale_jitter=1)
    seen = []
    for index in range(80):
        image = np.zeros((90, 120, 3), np.uint8)
        image[20:70, 30:80] = 255
        sample = transform(image, array((30, 20, 80, 70)), np.array([0]), index, 0, 0)
        extent = bright_extent(sample.image)
        assert (extent is None) == (len(sample.boxes) == 0) or min(sample.boxes[0, 2:] - sample.boxes[0, :2]) < 2
        if extent is not None and len(sample.boxes):
            assert np.abs(sample.boxes[0] - extent).max() <= 2
            seen.append(sample.boxes[0, 2] - sample.boxes[0, 0])
    sides = np.array(seen) / (50 * 128 / 120)  # in sides of the letterboxed box; the largest are cut by the square
    assert len(seen) > 60 and sides.min() < 0.3 and sides.max() > 1.6


def test_scale_jitter_and_expand_exclude_each_other(default_settings: Load) -> None:
    with pytest.raises(SettingsError, match=r"scale_jitter\.p: must be 0 with expand"):
        default_settings(*probabilities(scale_jitter=0.5, expand=0.5))


# --- expand ---


def test_expand_by_hand(torch_draws: Callable[..., None]) -> None:
    # 1 + 0.5 * (2 - 1) = 1.5 times 100 x 60 is 150 x 90: 50 columns and 30 rows are free
    torch_draws(rand=[[0.5], [0.25, 0.5]])
    view = expanded(Rectangle(0, 0, 100, 60), v2.RandomZoomOut(side_range=(1, 2)))
    assert view == Rectangle(-12, -15, 150, 90)


def test_expanded_boxes_by_hand() -> None:
    """The canvas of 150 x 90 in a square of 75: half, 15 rows above; the image from (6, 22.5) to (56, 52.5)."""
    view, target = Rectangle(-12, -15, 150, 90), Rectangle(0, 15, 75, 45)
    boxes = array((0, 0, 100, 60), (20, 10, 60, 40))
    part, share, placed = place_view(np.full((60, 100, 3), 200, np.uint8), boxes, view, target, 75)
    image = resize_placed(part, 75, (1, 2, 3), cv2.INTER_LINEAR)
    expected = np.empty((75, 75, 3), np.uint8)
    expected[:] = (1, 2, 3)
    expected[22:52, 6:56] = 200  # both halves to the even number
    assert np.array_equal(image, expected) and share.tolist() == [1, 1]
    assert np.allclose(placed, [[6, 22, 56, 52], [16, 27, 36, 42]])


def test_expand_without_growth_is_the_letterbox(default_settings: Load) -> None:
    labels = np.array([1])
    for words in ([], ["model.placement=squash"], ["model.interpolation=darknet", "model.rounding=down"]):
        plain = build(default_settings, *words)
        still = build(default_settings, *words, "data.augmentation.expand.ratio=[1, 1]", expand=1)
        for width, height in ((50, 31), (31, 50), (64, 64), (1, 9)):
            boxes = array((0, 1, 0.7 * width, 0.9 * height))
            first, second = (each(picture(width, height), boxes, labels, 0, 0, 0) for each in (plain, still))
            assert np.array_equal(first.image, second.image) and first.letterbox == second.letterbox
            assert np.allclose(first.boxes, second.boxes, atol=1e-4) and len(first.boxes) == 1


# --- IoU crop ---

SETTINGS = ["data.augmentation.iou_crop={p: 1, min_ious: [0.4, 0.9], min_crop_size: 0.5}"]


@pytest.fixture
def iou_crop(default_settings: Load) -> v2.RandomIoUCrop:
    return build_iou_crop(default_settings(*SETTINGS).data.augmentation.iou_crop)


def test_crop_by_hand(torch_draws: Callable[..., None], iou_crop: v2.RandomIoUCrop) -> None:
    """Choices 1, 0.4, 0.9, 0; sides 0.5 + 0.5 * draw; the view of 100 x 60 begins at (-10, 20)."""
    assert iou_crop.options == [1.0, 0.4, 0.9, 0.0]
    view = Rectangle(-10, 20, 100, 60)
    boxes = array((10, 30, 30, 50), (60, 30, 80, 50), (0, 40, 40, 60))
    # 50 x 30 at (0.25 * 50, 0.5 * 30) = (12, 15) of the view, that is (2, 35)..(52, 65) of the image
    torch_draws(randint=[3], rand=[[0.0, 0.0], [0.25, 0.5]])
    crop, inside = cropped(view, boxes, iou_crop)
    assert crop == Rectangle(2, 35, 50, 30)
    assert inside.tolist() == [True, False, True]  # centres (20, 40), (70, 40), (20, 50)
    # at least 0.4: the third box, 40 x 20, has 38 * 20 = 760 inside of 800 + 1500 - 760 = 1540: 0.49
    torch_draws(randint=[1], rand=[[0.0, 0.0], [0.25, 0.5]])
    assert cropped(view, boxes, iou_crop)[0] == crop
    # at least 0.9: refused forty times, then the image is kept
    torch_draws(randint=[2, 0], rand=[[0.0, 0.0], [0.25, 0.5]] * 40)
    kept, inside = cropped(view, boxes, iou_crop)
    assert kept == view and inside.all()


def test_a_crop_always_shows_an_object(default_settings: Load) -> None:
    placement = placement_of(default_settings(*SETTINGS))
    boxes, labels = array((5, 5, 20, 20), (70, 50, 95, 75)), np.array([0, 79])
    cropped_once = 0
    for index in range(60):
        view, counts = placement.draw_view(100, 80, boxes, labels, 0, index)
        assert view.left >= 0 and view.top >= 0 and view.left + view.width <= 100 and view.top + view.height <= 80
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        corner, end = np.array([view.left, view.top]), np.array([view.left + view.width, view.top + view.height])
        assert counts.tolist() == ((centres > corner) & (centres < end)).all(axis=1).tolist() and counts.any()
        cropped_once += view != Rectangle(0, 0, 100, 80)
        assert view.width >= 50 and view.height >= 40
    assert cropped_once > 20


def test_crowd_is_no_reason_to_crop_and_is_not_judged_by_its_centre(default_settings: Load) -> None:
    placement = placement_of(default_settings(*SETTINGS))
    crowd, small = (0, 0, 50, 80), (60, 50, 95, 78)
    for index in range(30):
        assert placement.draw_view(100, 80, array(crowd), np.array([-2]), 0, index)[0] == Rectangle(0, 0, 100, 80)
    moved = 0
    for index in range(50):
        view, counts = placement.draw_view(100, 80, array(crowd, small), np.array([-2, 5]), 0, index)
        alone, _ = placement.draw_view(100, 80, array(small), np.array([5]), 0, index)
        assert view == alone and counts.tolist() == [True, True]
        moved += view.left >= 25  # beyond the centre of the crowd
    assert moved > 0
    # a box that lies outside an image whose size the file does not say is no object either
    for index in range(30):
        outside = array((100, 10, 150, 40), (-20, 10, 0, 40))
        assert placement.draw_view(100, 80, outside, np.array([0, 1]), 0, index)[0] == Rectangle(0, 0, 100, 80)


# --- what is left of the boxes ---


def view_of(monkeypatch: pytest.MonkeyPatch, view: Rectangle, counts: list[bool]) -> None:
    monkeypatch.setattr(RandomPlacement, "draw_view", lambda *arguments: (view, np.array(counts)))


def test_little_visible_boxes_are_removed_and_the_others_cut(
    default_settings: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The right half of 100 x 50 in a square of 50: x - 50, y as it is. Crowd is treated alike."""
    view_of(monkeypatch, Rectangle(50, 0, 50, 50), [True] * 7 + [False])
    boxes = array(
        (43, 10, 53, 20),  # 30 %
        (42, 10, 53, 20),  # 27 %
        (43, 10, 53, 20),  # 30 %, crowd
        (42, 10, 53, 20),  # 27 %, crowd
        (60, 0, 100, 50),  # all
        (10, 10, 50, 20),  # none: ends where the view begins
        (10, 10, 40, 20),  # none
        (60, 0, 100, 50),  # all, but the crop does not count it
    )
    labels = np.array([0, 1, -2, -2, 79, 4, 5, 6])
    for words, kept in (
        (["data.augmentation.min_visibility=0.3"], [0, -2, 79]),
        ([KEEP_EVERYTHING], [0, 1, -2, -2, 79]),
        (["data.augmentation.min_visibility=0.99"], [79]),
    ):
        transform = build(default_settings, *words, size=50, iou_crop=1)
        sample = transform(picture(100, 50), boxes, labels, 0, 0, 0)
        assert sample.labels.tolist() == kept
        assert sample.boxes.dtype == np.float32 and sample.labels.dtype == np.int64
        whole = {0: (0, 10, 3, 20), 1: (0, 10, 3, 20), -2: (0, 10, 3, 20), 79: (10, 0, 50, 50)}
        assert np.allclose(sample.boxes, [whole[label] for label in kept], atol=1e-3)
        assert np.array_equal(sample.image, picture(100, 50)[:, 50:])


def test_boxes_smaller_than_a_pixel_are_removed(default_settings: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after every other augmentation: 100 px become 50, a box of 3 px is 1.5, one of 1.8 is 0.9."""
    view_of(monkeypatch, Rectangle(0, 0, 100, 100), [True, True])
    boxes = array((10, 10, 13, 50), (20, 10, 21.8, 50))
    sample = build(default_settings, size=50, expand=1)(picture(100, 100), boxes, np.array([3, 4]), 0, 0, 0)
    assert sample.labels.tolist() == [3] and np.allclose(sample.boxes, [[5, 5, 6.5, 25]], atol=1e-3)


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"expand": 1}, []),
        ({"iou_crop": 1}, []),
        ({"darknet_jitter": 1}, []),
        ({"expand": 1, "iou_crop": 1}, ["model.placement=squash"]),
        (dict.fromkeys(GEOMETRIC, 1), ["model.interpolation=darknet", "model.rounding=down"]),
        ({**dict.fromkeys(GEOMETRIC, 0.5), "horizontal_flip": 0.5}, ["model.interpolation=area"]),
    ],
)
def test_a_drawn_rectangle_is_what_its_box_says(default_settings: Load, chosen, words: list[str]) -> None:
    """Within a pixel, or where the image is enlarged n times within n / 2 and a half: an edge is n pixels wide."""
    words = ["model.fill=[0, 0, 0]", KEEP_EVERYTHING, *words]
    transform = build(default_settings, *words, size=128, seed=7, **chosen)
    generator = np.random.default_rng(0)
    places = set()
    for index in range(60):
        width, height = ((160, 96), (90, 150), (128, 128))[index % 3]
        x1, y1 = generator.integers(0, width - 40), generator.integers(0, height - 40)
        x2, y2 = x1 + generator.integers(20, width - x1 + 1), y1 + generator.integers(20, height - y1 + 1)
        image = np.zeros((height, width, 3), np.uint8)
        image[y1:y2, x1:x2] = 255
        sample = transform(image, array((x1, y1, x2, y2)), np.array([0]), index, 0, 0)
        assert sample.image.shape == (128, 128, 3) and len(sample.boxes) == 1
        box, extent = sample.boxes[0], bright_extent(sample.image)
        enlarged = max((box[2:] - box[:2]) / (x2 - x1, y2 - y1))
        assert extent is not None and np.abs(box - extent).max() <= max(1, enlarged / 2 + 0.5)
        assert (box >= 0).all() and (box <= 128).all()
        places.add(tuple(box.tolist()))
    assert len(places) > 50


def test_what_is_off_is_not_built(default_settings: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    off = build(default_settings)
    assert off.placement is None and off.color is None
    assert default_settings().data.augmentation.model_dump().keys() >= set(NAMED)
    assert all(getattr(default_settings().data.augmentation, name).p == 0 for name in NAMED)
    for name in NAMED:
        built = build(default_settings, **{name: 0.1})
        assert (built.placement is not None) == (name in GEOMETRIC)
        assert (built.color is not None) == (name in ("darknet_hsv", "photometric_distortion", "hsv"))
        assert (built.mixing is not None) == (name in ("mosaic", "mixup"))
    validation = transform_of(default_settings(*(f"data.augmentation.{name}.p=1" for name in NAMED)), 64, 0, False)
    assert validation.placement is None and validation.color is None
    # the jitter needs nothing of torch's
    monkeypatch.setattr(torch.random, "fork_rng", lambda **keywords: pytest.fail("forked for nothing"))
    build(default_settings, darknet_jitter=1)(picture(), *NO_BOXES, 0, 0, 0)


def test_the_letterbox_of_a_sample_is_the_images(default_settings: Load) -> None:
    sample = build(default_settings, **dict.fromkeys(GEOMETRIC, 1))(picture(90, 50), *NO_BOXES, 0, 0, 0)
    assert sample.letterbox == place_image(90, 50, 64, "letterbox")[0]


# --- randomness ---


def test_the_draws_do_not_depend_on_one_another(default_settings: Load) -> None:
    """At 0.5 each, all pairs are drawn together for a quarter of the images; 400, standard error 0.022."""
    placement = placement_of(default_settings(*probabilities(**dict.fromkeys(GEOMETRIC, 0.5))))
    alone = {name: placement_of(default_settings(*probabilities(**{name: 1}))) for name in ("expand", "darknet_jitter")}
    whole, letterbox = Rectangle(0, 0, 100, 80), Rectangle(0, 6, 64, 51)
    rows = []
    for index in range(400):
        grown, _ = placement.draw_view(100, 80, *NO_BOXES, 0, index)  # without objects nothing is cropped
        _, target = placement.draw_target(whole, 64, 0, index)
        crop = placements.sample_stream(0, 0, index, placements.IOU_CROP_STREAM).random() < 0.5
        rows.append([grown != whole, target != letterbox, crop])
        # what is drawn is the same whether or not the others are on
        if grown != whole:
            assert grown == alone["expand"].draw_view(100, 80, *NO_BOXES, 0, index)[0]
        if target != letterbox:
            assert (whole, target) == alone["darknet_jitter"].draw_target(whole, 64, 0, index)
    table = np.array(rows)
    assert np.abs(table.mean(axis=0) - 0.5).max() < 0.1
    for first, second in itertools.combinations(range(3), 2):
        assert abs((table[:, first] & table[:, second]).mean() - 0.25) < 0.09
