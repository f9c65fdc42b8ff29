"""Letterbox and training augmentation: boxes follow pixels, randomness is a function of (seed, epoch, index)."""

import itertools
import pickle
import random
import warnings
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from pydantic import BaseModel

from detection.config.settings import Settings
from detection.data.augmentation.affine_and_pixels import build_augmentation
from detection.data.transforms import Sample, Transform
from detection.ops.letterbox import Letterbox, place_image
from tests.support.detectors import letterbox_image, transform_of
from tests.support.pictures import NAMED, NO_BOXES, bright_extent, picture, probabilities

Load = Callable[..., Settings]
# Name in args.yaml -> class in albumentations: the research repository's without Resize, and a vertical flip.
CLASSES = {
    "multiplicative_noise": "MultiplicativeNoise",
    "clahe": "CLAHE",
    "posterize": "Posterize",
    "to_gray": "ToGray",
    "random_brightness_contrast": "RandomBrightnessContrast",
    "rgb_shift": "RGBShift",
    "color_jitter": "ColorJitter",
    "gauss_noise": "GaussNoise",
    "random_fog": "RandomFog",
    "horizontal_flip": "HorizontalFlip",
    "vertical_flip": "VerticalFlip",
    "affine": "Affine",
}
LABEL = np.array([0])


def same(first: Sample, second: Sample) -> bool:
    arrays = ((getattr(first, name), getattr(second, name)) for name in ("image", "boxes", "labels"))
    return first.letterbox == second.letterbox and all(np.array_equal(*pair) for pair in arrays)


# --- letterbox ---


@pytest.mark.parametrize(
    ("width", "height", "size", "new_width", "new_height", "left", "top"),
    [
        (640, 480, 320, 320, 240, 0, 40),  # scale 1/2
        (480, 640, 320, 240, 320, 40, 0),
        (416, 416, 416, 416, 416, 0, 0),
        (100, 50, 416, 416, 208, 0, 104),  # enlarged, scale 4.16
        (333, 201, 416, 416, 251, 0, 82),  # 201 * 416 / 333 = 251.1; (416 - 251) / 2 = 82.5, the odd row below
        (1, 5000, 320, 1, 320, 159, 0),  # 0.064 px wide would be nothing: at least 1
        (5000, 1, 320, 320, 1, 0, 159),
        (1, 1, 32, 32, 32, 0, 0),
    ],
)
def test_place_image(width, height, size, new_width, new_height, left, top) -> None:
    letterbox, *new = place_image(width, height, size)
    assert new == [new_width, new_height]
    assert letterbox == Letterbox(new_width / width, new_height / height, left, top, width, height)
    letterbox, *new = place_image(width, height, size, "squash")
    assert new == [size, size] and letterbox == Letterbox(size / width, size / height, 0, 0, width, height)


@pytest.mark.parametrize("placement", ["letterbox", "squash", "top_left"])
def test_letterbox_has_an_exact_inverse(placement: str) -> None:
    generator = np.random.default_rng(0)
    for width, height, size in ((640, 480, 320), (333, 201, 416), (201, 333, 608), (1, 5000, 320), (37, 37, 32)):
        letterbox, *_ = place_image(width, height, size, placement)
        boxes = torch.from_numpy(generator.uniform(0, (width, height, width, height), (50, 4)))
        assert torch.allclose(letterbox.to_original(letterbox.to_input(boxes)), boxes, rtol=0, atol=1e-9)
        assert torch.allclose(letterbox.to_original(letterbox.to_input(boxes.float())).double(), boxes, atol=1e-2)
        # the corners of the image are the corners of the picture in the square
        corners = letterbox.to_input(torch.tensor([[0.0, 0.0, width, height]], dtype=torch.float64))[0].tolist()
        if placement == "top_left":
            assert corners[:2] == [0, 0] and max(corners[2:]) == pytest.approx(size, abs=1e-9)
        else:  # the right and bottom padding exceeds that of the other side by at most a pixel
            right, bottom = size - corners[2], size - corners[3]
            assert 0 <= right - corners[0] <= 1 + 1e-9 and 0 <= bottom - corners[1] <= 1 + 1e-9


def test_the_border_has_the_fill_colour_and_the_picture_lies_inside() -> None:
    image, fill = np.full((48, 100, 3), (10, 20, 30), np.uint8), (124, 116, 104)
    boxed, letterbox = letterbox_image(image, 64, "letterbox", fill, cv2.INTER_LINEAR)
    # 48 * 0.64 = 30.72 -> 31 rows, 16 above and 17 below
    expected = np.empty((64, 64, 3), np.uint8)
    expected[:] = fill
    expected[16:47] = (10, 20, 30)
    assert boxed.dtype == np.uint8 and np.array_equal(boxed, expected)
    assert letterbox == Letterbox(0.64, 31 / 48, 0, 16, 100, 48)


def test_an_image_of_the_right_size_is_not_resampled() -> None:
    image = picture(64, 64)
    assert np.array_equal(letterbox_image(image, 64, "letterbox", (0, 0, 0), cv2.INTER_CUBIC)[0], image)


@pytest.mark.parametrize("placement", ["letterbox", "squash"])
def test_training_and_validation_lay_images_the_same_way(default_settings: Load, placement: str) -> None:
    settings = default_settings(f"model.placement={placement}", *probabilities())
    image, boxes, labels = picture(90, 50), np.array([[9, 10, 45, 50]], np.float32), np.array([4])
    validation = transform_of(settings, 64, 0, training=False)(image, boxes, labels, 0, 0, 0)
    training = transform_of(settings, 64, 0, training=True)(image, boxes, labels, 0, 0, 0)
    assert same(training, validation)
    # by hand: 64 / 90 in x; 50 px become 35.56 -> 36 rows below 14, or all 64
    scale_y, top = (36 / 50, 14) if placement == "letterbox" else (64 / 50, 0)
    expected = [[9 * 64 / 90, 10 * scale_y + top, 45 * 64 / 90, 50 * scale_y + top]]
    assert np.allclose(validation.boxes, expected, atol=1e-4)
    upright = transform_of(settings, 64, 0, training=False)(picture(50, 90), boxes[:, [1, 0, 3, 2]], labels, 0, 0, 0)
    assert np.allclose(upright.boxes, np.array(expected)[:, [1, 0, 3, 2]], atol=1e-4)
    assert torch.allclose(validation.letterbox.to_input(torch.from_numpy(boxes)), torch.tensor(validation.boxes))


@pytest.mark.parametrize("kind", ["validation", "training", "all of other systems"])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 5000), (5000, 1), (33, 7), (3, 2), (6, 400)])
def test_extreme_shapes(default_settings: Load, kind: str, width: int, height: int) -> None:
    settings = default_settings(*(probabilities(**dict.fromkeys(NAMED, 1)) if kind == "all of other systems" else []))
    transform = transform_of(settings, 64, 0, kind != "validation")
    for epoch in range(10):
        sample = transform(picture(width, height), np.array([[0, 0, width, height]], np.float32), LABEL, 0, epoch, 0)
        assert sample.image.shape == (64, 64, 3) and sample.image.dtype == np.uint8
        assert len(sample.boxes) == len(sample.labels) <= 1
        assert np.isfinite(sample.boxes).all() and (sample.boxes >= 0).all() and (sample.boxes <= 64).all()


# --- boxes follow pixels ---

GEOMETRY = [
    "model.fill=[0, 0, 0]",
    "data.augmentation.min_visibility=0",
    *probabilities(affine=1, horizontal_flip=0.5, vertical_flip=0.5),
]
STRAIGHT = ["data.augmentation.affine.rotate=[0, 0]", "data.augmentation.affine.shear=[0, 0]"]


@pytest.mark.parametrize("words", [[], STRAIGHT, ["model.placement=squash"]], ids=["default", "straight", "squashed"])
def test_a_drawn_rectangle_stays_inside_its_box(default_settings: Load, words: list[str]) -> None:
    transform = transform_of(default_settings(*GEOMETRY, *words), 128, 7, training=True)
    generator = np.random.default_rng(0)
    seen = 0
    for epoch in range(150):
        x1, y1 = generator.integers(0, 120), generator.integers(0, 70)
        x2, y2 = x1 + generator.integers(20, 160 - x1 + 1), y1 + generator.integers(20, 96 - y1 + 1)
        image = np.zeros((96, 160, 3), np.uint8)
        image[y1:y2, x1:x2] = 255
        sample = transform(image, np.array([[x1, y1, x2, y2]], np.float32), np.array([3]), 0, epoch, 0)
        extent = bright_extent(sample.image)
        if len(sample.boxes) == 0:
            assert extent is None or min(extent[2] - extent[0], extent[3] - extent[1]) <= 2
            continue
        box = sample.boxes[0]
        assert (box >= 0).all() and (box <= 128).all() and (box[2:] > box[:2]).all()
        assert sample.labels.tolist() == [3]
        if extent is None:
            assert min(box[2] - box[0], box[3] - box[1]) <= 2
            continue
        seen += 1
        assert extent[0] >= box[0] - 2 and extent[1] >= box[1] - 2
        assert extent[2] <= box[2] + 2 and extent[3] <= box[3] + 2
        if words == STRAIGHT:  # nothing is turned, so the box is also no larger than the rectangle
            assert np.abs(box - extent).max() <= 2
    assert seen > 100


@pytest.mark.parametrize("words", [GEOMETRY[2:], probabilities(expand=0.7, iou_crop=0.7, darknet_jitter=0.7)])
def test_labels_stay_with_their_boxes(default_settings: Load, words: list[str]) -> None:
    """Three rectangles, each in its colour; the last one is a crowd region."""
    transform = transform_of(default_settings(*GEOMETRY[:2], *words), 96, 3, training=True)
    image = np.zeros((80, 120, 3), np.uint8)
    drawn = {0: (10, 12, 44, 40), 79: (70, 8, 110, 40), -2: (20, 48, 100, 78)}
    for channel, (x1, y1, x2, y2) in enumerate(drawn.values()):
        image[y1:y2, x1:x2, channel] = 255
    boxes, labels = np.array(list(drawn.values()), np.float32), np.array(list(drawn))
    seen = dict.fromkeys(drawn, 0)
    for index in range(100):
        sample = transform(image, boxes, labels, index, 0, 0)
        for box, label in zip(sample.boxes, sample.labels.tolist(), strict=True):
            if min(box[2] - box[0], box[3] - box[1]) > 12:
                x, y = ((box[:2] + box[2:]) / 2).astype(int)
                assert sample.image[y, x].argmax() == list(drawn).index(label)
                seen[label] += 1
    assert min(seen.values()) > 20


def test_mirrored_boxes(default_settings: Load) -> None:
    image, boxes = picture(64, 64), np.array([[4, 10, 20, 40]], np.float32)
    for name, axis, expected in (
        ("horizontal_flip", 1, [64 - 20, 10, 64 - 4, 40]),
        ("vertical_flip", 0, [4, 64 - 40, 20, 64 - 10]),
    ):
        transform = transform_of(default_settings(*probabilities(**{name: 1})), 64, 0, training=True)
        sample = transform(image, boxes, np.array([0]), 0, 0, 0)
        assert np.array_equal(sample.image, np.flip(image, axis))
        assert np.allclose(sample.boxes, [expected], atol=1e-3)


def test_boxes_of_which_little_is_left_are_removed(default_settings: Load) -> None:
    """The picture moves right by a quarter: 64 px of 256. min_visibility 0.3 of a box 40 px wide is 12 px."""
    words = [
        *probabilities(affine=1),
        "data.augmentation.affine={scale: [1, 1], translate_percent: [0.25, 0.25], rotate: [0, 0], shear: [0, 0]}",
        "data.augmentation.min_visibility=0.3",
    ]
    transform = transform_of(default_settings(*words), 256, 0, training=True)
    # after the move x is 176..216, 226..266 (30 of 40 inside), 246..286 (10 of 40), 260..300 (none)
    boxes = np.array([[x, 20, x + 40, 60] for x in (112, 162, 182, 196)], np.float32)
    sample = transform(picture(256, 256), boxes, np.arange(4), 0, 0, 0)
    assert sample.labels.tolist() == [0, 1]
    assert np.allclose(sample.boxes, [[176, 84, 216, 124], [226, 84, 256, 124]], atol=0.6)


def test_boxes_on_the_edge_never_raise(default_settings: Load) -> None:
    """10,000 boxes through everything at once; their edges lie on the image's, or a float32 step inside or outside."""
    everything = [*probabilities(**dict.fromkeys(CLASSES, 0.5)), "data.augmentation.random_fog.p=0"]
    transform = transform_of(default_settings(*everything), 64, 0, training=True)
    generator = np.random.default_rng(0)
    width, height, total = 97, 61, 0
    limit = np.array([width, height] * 2, np.float32)
    for index in range(100):
        corners = generator.uniform(0, limit, (100, 4)).astype(np.float32)
        choice = generator.integers(0, 6, (100, 4))
        for number, edge in enumerate((0, limit, np.nextafter(limit, 0), np.nextafter(limit, 2 * limit), -1e-7)):
            corners = np.where(choice == number, edge, corners)
        boxes = np.concatenate(
            [np.minimum(corners[:, :2], corners[:, 2:]), np.maximum(corners[:, :2], corners[:, 2:])], 1
        )
        sample = transform(picture(width, height), boxes.astype(np.float32), np.arange(100), index, 0, 0)
        total += len(boxes)
        assert len(sample.boxes) == len(sample.labels) > 0
        assert np.isfinite(sample.boxes).all() and (sample.boxes >= 0).all() and (sample.boxes <= 64).all()
        assert (sample.boxes[:, 2:] > sample.boxes[:, :2]).all()
    assert total == 10_000


@pytest.mark.parametrize("kind", ["validation", "training", *NAMED])
def test_no_boxes_keep_their_shape_and_type(default_settings: Load, kind: str) -> None:
    settings = default_settings(*(probabilities(**{kind: 1}) if kind in NAMED else []))
    transform = transform_of(settings, 64, 0, kind != "validation")
    for index in range(5):
        sample = transform(picture(90, 50), *NO_BOXES, index, 0, 96)
        assert sample.boxes.shape == (0, 4) and sample.boxes.dtype == np.float32
        assert sample.labels.shape == (0,) and sample.labels.dtype == np.int64
        assert sample.image.shape == (96, 96, 3) and sample.index == index


# --- the twelve transforms ---


@pytest.mark.parametrize("name", CLASSES)
def test_each_transform_is_built_when_its_probability_says_so(default_settings: Load, name: str) -> None:
    def built(probability: float) -> Transform:
        return transform_of(default_settings(*probabilities(**{name: probability})), 64, 0, training=True)

    assert built(0).augmentation.compose.transforms == []
    transform = built(1)
    assert [type(step).__name__ for step in transform.augmentation.compose.transforms] == [CLASSES[name]]
    assert transform.augmentation.compose.transforms[0].p == 1
    image = picture()
    changed = [
        not np.array_equal(transform(image, *NO_BOXES, index, 0, 0).image, image)
        for index in range(4)  # a random strength may be next to nothing once, not four times
    ]
    assert sum(changed) >= 3
    assert np.array_equal(image, picture())  # the caller's image is left alone


def test_the_file_names_these_transforms_and_no_others(default_settings: Load) -> None:
    assert set(type(default_settings().data.augmentation).model_fields) == {
        *CLASSES,
        *NAMED,
        "scale_jitter",
        "min_visibility",
    }


def test_no_argument_is_ignored_or_warned_about(default_settings: Load) -> None:
    """albumentations 2.0.8 answers an unknown argument with a warning and goes on without it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for words in ([], probabilities(**dict.fromkeys(CLASSES, 1.0))):
            transform = transform_of(default_settings(*words), 64, 0, training=True)
            transform(picture(), *NO_BOXES, 0, 0, 0)
            transform(picture(), np.array([[0, 0, 64, 64]], np.float32), np.array([1]), 0, 0, 0)


def test_an_unknown_argument_raises(default_settings: Load) -> None:
    class Misspelt(BaseModel):
        p: float = 1.0
        multiplyer: tuple[float, float] = (0.5, 0.5)

    augmentation = default_settings().data.augmentation.model_copy(update={"multiplicative_noise": Misspelt()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="multiplyer"):
            build_augmentation(augmentation, (0, 0, 0))


def one(default_settings: Load, name: str, image: np.ndarray, **strength: Any) -> np.ndarray:
    words = [f"data.augmentation.{name}.{key}={value}" for key, value in strength.items()]
    transform = transform_of(default_settings(*probabilities(**{name: 1}), *words), image.shape[0], 0, training=True)
    return transform(image, *NO_BOXES, 0, 0, 0).image


def test_strengths_reach_the_pixels(default_settings: Load) -> None:
    """Each strength is set to a value whose effect can be said in advance."""
    image = picture(96, 96)
    grey = np.full((96, 96, 3), 100, np.uint8)
    halved = one(default_settings, "multiplicative_noise", image, multiplier=[0.5, 0.5]).astype(int)
    assert np.abs(halved - image / 2).max() <= 1
    assert (one(default_settings, "posterize", image, num_bits=[3, 3]) % 32 == 0).all()  # 8 - 3 = 5 bits are cleared
    assert np.ptp(one(default_settings, "to_gray", image), axis=2).max() == 0
    shifted = one(default_settings, "rgb_shift", grey, r_shift_limit=0, g_shift_limit=50, b_shift_limit=0).astype(int)
    assert (shifted[..., [0, 2]] == 100).all() and 0 < np.abs(shifted[..., 1] - 100).max() <= 50
    jitter = {"brightness": [0.5, 0.5], "contrast": [1, 1], "saturation": [1, 1], "hue": [0, 0]}
    assert np.abs(one(default_settings, "color_jitter", grey, **jitter).astype(int) - 50).max() <= 1
    # no saturation leaves the luma of ITU-R BT.601: 0.299 * 200 + 0.587 * 100 + 0.114 * 50 = 124.2
    coloured = np.full((96, 96, 3), (200, 100, 50), np.uint8)
    jitter = {"brightness": [1, 1], "contrast": [1, 1], "saturation": [0, 0], "hue": [0, 0]}
    assert np.abs(one(default_settings, "color_jitter", coloured, **jitter).astype(int) - 124.2).max() <= 1.5
    # 0.1 of full scale is a standard deviation of 25.5; 27,648 samples measure it within 0.5 %
    noise = one(default_settings, "gauss_noise", grey, std_range=[0.1, 0.1]).astype(float)
    assert noise.std() == pytest.approx(25.5, rel=0.03) and noise.mean() == pytest.approx(100, abs=1)
    limits = {"brightness_limit": 0.2, "contrast_limit": 0.0}
    difference = one(default_settings, "random_brightness_contrast", grey, **limits).astype(int) - 100
    assert np.ptp(difference) == 0 and 0 < abs(difference[0, 0, 0]) <= 51  # 0.2 * 255
    dark = np.full((96, 96, 3), 30, np.uint8)
    foggy = one(default_settings, "random_fog", dark, fog_coef_range=[0.5, 0.5], alpha_coef=0.1)
    assert foggy.mean() > 31  # fog is white
    low = (100 + np.arange(96) % 8).astype(np.uint8)[None, :, None].repeat(96, 0).repeat(3, 2)
    assert one(default_settings, "clahe", low, clip_limit=[4, 4]).std() > 2 * low.std()


def test_affine_scales_moves_and_fills(default_settings: Load) -> None:
    """A white picture at half size leaves a square in the middle; at full size moved by 1/4 it leaves a strip."""
    white = np.full((128, 128, 3), 255, np.uint8)
    still = {"translate_percent": [0, 0], "rotate": [0, 0], "shear": [0, 0]}
    small = one(default_settings, "affine", white, **{**still, "scale": [0.5, 0.5]})
    moved = one(default_settings, "affine", white, **{**still, "scale": [1, 1], "translate_percent": [0.25, 0.25]})
    assert (small[:30] == (124, 116, 104)).all() and (small[34:94, 34:94] == 255).all()
    assert (small[:, :30] == (124, 116, 104)).all() and (small[98:] == (124, 116, 104)).all()
    assert (moved[:30] == (124, 116, 104)).all() and (moved[34:, 34:] == 255).all()


# --- randomness ---


def test_a_sample_is_a_function_of_seed_epoch_and_index(default_settings: Load) -> None:
    chosen = {**dict.fromkeys((*CLASSES, *NAMED), 0.5), "random_fog": 0.05}
    settings = default_settings(*probabilities(**chosen))
    image, boxes, labels = picture(80, 60), np.array([[10, 10, 60, 50]], np.float32), np.array([2])
    transform = transform_of(settings, 64, 5, training=True)
    expected = {place: transform(image, boxes, labels, *place, 0) for place in itertools.product(range(4), range(3))}

    copy: Transform = pickle.loads(pickle.dumps(transform))  # as a loader worker gets it
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    for place in reversed(expected):  # another order, other random states, calls of other kinds between
        copy(picture(33, 44, seed=1), *NO_BOXES, 99, 99, 32)
        assert same(copy(image, boxes, labels, *place, 0), expected[place])
        assert same(transform_of(settings, 64, 5, training=True)(image, boxes, labels, *place, 0), expected[place])

    # every (index, epoch) looks different, and so does every seed
    for (first, sample), (second, other) in itertools.combinations(expected.items(), 2):
        assert not np.array_equal(sample.image, other.image), (first, second)
    other_seed = transform_of(settings, 64, 6, training=True)
    assert all(not same(other_seed(image, boxes, labels, *place, 0), sample) for place, sample in expected.items())


def test_augmentation_leaves_the_global_random_states_alone(
    default_settings: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    # it would also seed the accelerators, whose states are not put back
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("seeds every device"))
    words = probabilities(**dict.fromkeys((*CLASSES, *NAMED), 1.0))
    transform = transform_of(default_settings(*words), 64, 0, training=True)
    for index in range(5):
        transform(picture(), np.array([[0, 0, 64, 64]], np.float32), np.array([1]), index, 0, 0)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_no_two_transforms_are_applied_together_more_often_than_chance(default_settings: Load) -> None:
    """All twelve at p = 0.5: each pair fires together on a quarter of the images, not on a half."""
    transform = transform_of(default_settings(*probabilities(**dict.fromkeys(CLASSES, 0.5))), 32, 0, training=True)
    fired: dict[str, bool] = {}

    def record(step: Any) -> None:
        should_apply = step.should_apply

        def recorded(**keywords: Any) -> bool:
            fired[type(step).__name__] = should_apply(**keywords)
            return fired[type(step).__name__]

        step.should_apply = recorded

    for step in transform.augmentation.compose.transforms:
        record(step)
    rows = []
    for index in range(300):
        fired.clear()
        transform(picture(32, 32), *NO_BOXES, index, 0, 0)
        rows.append([fired.get(name, False) for name in CLASSES.values()])
    table = np.array(rows)
    # standard errors 0.029 and 0.025; 66 pairs, so four of them
    assert np.abs(table.mean(axis=0) - 0.5).max() < 0.12
    for first, second in itertools.combinations(range(12), 2):
        assert abs((table[:, first] & table[:, second]).mean() - 0.25) < 0.1


def test_the_interpolation_is_drawn_for_training_alone(default_settings: Load) -> None:
    """Each of five methods for a fifth of the images; the pixels are those of OpenCV's resize with that method."""
    settings = default_settings(*probabilities(random_interpolation=1), "model.placement=squash")
    transform, image = transform_of(settings, 64, 0, training=True), picture(150, 90, 3)
    methods = (cv2.INTER_NEAREST, cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_AREA, cv2.INTER_LANCZOS4)
    resized = [cv2.resize(image, (64, 64), interpolation=method) for method in methods]
    counts = np.zeros(5, int)
    for index in range(300):
        sample = transform(image, *NO_BOXES, index, 0, 0)
        same = [np.array_equal(sample.image, one) for one in resized]
        assert sum(same) == 1
        counts[same.index(True)] += 1
    assert (np.abs(counts - 60) < 30).all()  # standard deviation 7
    validation = transform_of(settings, 64, 0)(image, *NO_BOXES, 0, 0, 0)
    assert np.array_equal(validation.image, resized[1])
