"""One warp and our boxes against albumentations' own pipeline after the letterbox; the fog against its fog."""

import random
import warnings
from collections.abc import Callable
from typing import Any

import albumentations as A
import cv2
import numpy as np
import pytest
from albumentations.augmentations.pixel.functional import add_fog

from detection.config.settings import Settings
from detection.data.augmentation.affine_and_pixels import Augmentation, build_augmentation
from detection.data.augmentation.fog import RandomFog, count_discs
from detection.data.resize import INTERPOLATIONS, Placed, warp_placed
from detection.data.transforms import Sample
from tests.support.detectors import geometry_of, letterbox_image, transform_of
from tests.support.pictures import probabilities

Load = Callable[..., Settings]
PIXELS = (
    "multiplicative_noise", "clahe", "posterize", "to_gray", "random_brightness_contrast", "rgb_shift", "color_jitter",
    "gauss_noise",
)  # fmt: skip
GEOMETRY = {"affine": 0.7, "horizontal_flip": 0.5, "vertical_flip": 0.5}


def settings(default_settings: Load, *words: str, **chosen: float) -> Settings:
    return default_settings(*probabilities(**chosen), *words)


FILL = (124, 116, 104)


def photograph(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Large shapes with some detail, all of it wider than two pixels."""
    generator = np.random.default_rng(seed)
    image = np.zeros((height, width, 3), np.float32)
    for cells in (5, 20, 60):
        coarse = generator.uniform(0, 1, (cells, cells, 3)).astype(np.float32)
        image += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) / cells**0.5
    return cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


def random_boxes(width: int, height: int, count: int, seed: int) -> np.ndarray:
    corners = np.random.default_rng(seed).uniform(0, (width, height), (count, 2, 2))
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1).astype(np.float32)


def in_two_steps(settings: Settings, size: int, seed: int, image: Any, boxes: Any, labels: Any, place: Any) -> Sample:
    """The letterbox, then albumentations' own `Compose` with its own boxes: what the program did before."""
    index, epoch = place
    geometry, augmentation = geometry_of(settings), settings.data.augmentation
    interpolation = INTERPOLATIONS[geometry.interpolation]
    picture, letterbox = letterbox_image(image, size, geometry.placement, geometry.fill, interpolation)
    scale = np.array([letterbox.scale_x, letterbox.scale_y] * 2, dtype=np.float32)
    boxes = boxes * scale + np.array([letterbox.left, letterbox.top] * 2, dtype=np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # boxes without a geometric transform
        compose = A.Compose(
            build_augmentation(augmentation, geometry.fill).transforms,
            bbox_params=A.BboxParams(
                format="pascal_voc",
                label_fields=["labels"],
                clip=True,
                filter_invalid_bboxes=True,
                min_visibility=augmentation.min_visibility,
                min_width=1,
                min_height=1,
            ),
        )
    compose.set_random_state(np.random.default_rng([seed, epoch, index]), random.Random(f"{seed},{epoch},{index}"))
    result = compose(image=picture, bboxes=boxes, labels=labels)
    moved = np.asarray(result["bboxes"], np.float32).reshape(-1, 4)
    return Sample(result["image"], moved, np.asarray(result["labels"], np.int64).reshape(-1), index, letterbox)


@pytest.mark.parametrize("method", ["largest_box", "ellipse"])
@pytest.mark.parametrize("words", [[], ["model.placement=squash", "data.augmentation.min_visibility=0"]])
def test_boxes_are_those_of_albumentations(default_settings: Load, method: str, words: list[str]) -> None:
    """To 0.01 px: there the boxes are float32 fractions of the size, and an ellipse has 360 points."""
    rotated = [f"data.augmentation.affine.rotate_method={method}", "data.augmentation.affine.rotate=[-30, 30]"]
    chosen_settings = settings(default_settings, *words, *rotated, **GEOMETRY)
    transform, total = transform_of(chosen_settings, 128, 3, training=True), 0
    for index in range(60):
        width, height = (160, 90) if index % 2 else (70, 200)
        image, boxes = np.zeros((height, width, 3), np.uint8), random_boxes(width, height, 20, index)
        ours = transform(image, boxes, np.arange(20), index, 1, 0)
        theirs = in_two_steps(chosen_settings, 128, 3, image, boxes, np.arange(20), (index, 1))
        assert ours.labels.tolist() == theirs.labels.tolist()
        assert np.abs(ours.boxes - theirs.boxes).max(initial=0) < 0.01
        total += len(ours.boxes)
    assert total > 400


def test_without_an_affine_every_pixel_is_that_of_albumentations(default_settings: Load) -> None:
    """Letterbox, flips and everything that changes pixels, from the same random numbers; the fog has its own test."""
    chosen_settings = settings(default_settings, **dict.fromkeys((*PIXELS, "horizontal_flip", "vertical_flip"), 0.5))
    transform = transform_of(chosen_settings, 96, 5, training=True)
    for index in range(20):
        image = photograph(130, 80, index)
        arguments = image, random_boxes(130, 80, 3, index), np.arange(3)
        theirs = in_two_steps(chosen_settings, 96, 5, *arguments, (index, 2))
        assert np.array_equal(transform(*arguments, index, 2, 0).image, theirs.image)


@pytest.mark.parametrize("interpolation", ["linear", "area", "cubic", "darknet"])
def test_the_warp_shows_what_two_steps_show(default_settings: Load, interpolation: str) -> None:
    """Where the picture has no fine detail, sampling once or twice is the same but for a second rounding."""
    chosen = {**GEOMETRY, "affine": 1.0}
    chosen_settings = settings(default_settings, f"model.interpolation={interpolation}", **chosen)
    transform = transform_of(chosen_settings, 128, 5, training=True)
    for index in range(20):
        image = cv2.GaussianBlur(photograph(300, 200, index), (0, 0), 4)
        nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
        ours = transform(image, *nothing, index, 0, 0).image.astype(int)
        theirs = in_two_steps(chosen_settings, 128, 5, image, *nothing, (index, 0)).image
        shown = np.pad((theirs != FILL).any(axis=2), 1).astype(np.uint8)  # the border may lie in the last pixel
        away_from_the_border = cv2.erode(shown, np.ones((5, 5)))[1:-1, 1:-1] > 0
        difference = np.abs(ours - theirs)[away_from_the_border]
        assert difference.mean() < 1 and difference.max() <= 10, (index, difference.mean(), difference.max())


def reference_warp(image: np.ndarray, matrix: np.ndarray, size: int, fill: tuple[int, int, int]) -> np.ndarray:
    """Every pixel of the square as the mean over 8 x 8 places in it."""
    fine = np.diag([8.0, 8.0, 1.0]) @ matrix
    fine[:2, 2] += fine[:2, :2] @ (0.5, 0.5) - 0.5
    big = cv2.warpAffine(image.astype(np.float32), fine[:2], (8 * size, 8 * size), borderValue=fill)
    return cv2.resize(big, (size, size), interpolation=cv2.INTER_AREA)


def test_one_warp_is_nearer_to_the_picture_than_two_samplings(default_settings: Load) -> None:
    """Over the default scales; the bar is the mean over fine samples. Halving keeps the small ones from aliasing."""
    chosen_settings = settings(default_settings, affine=1)
    augmentation, errors = Augmentation(chosen_settings.data.augmentation, geometry_of(chosen_settings), 0), []
    for index in range(40):
        image = photograph(320, 240, index)
        image += np.random.default_rng(index).integers(0, 20, image.shape, dtype=np.uint8).clip(0, 255 - image)
        placed = Placed(image, 0, 26, 208, 156)
        augmentation.affine.set_random_state(np.random.default_rng(index), random.Random(index))
        matrix = augmentation.affine.get_params_dependent_on_data({"shape": (208, 208, 3)}, {})["bbox_matrix"]
        gt = reference_warp(image, matrix @ placed.matrix(), 208, FILL)
        once = warp_placed(placed, matrix, 208, FILL)
        letterboxed = letterbox_image(image, 208, "letterbox", FILL, cv2.INTER_LINEAR)[0]
        still = Placed(letterboxed, 0, 0, 208, 208).matrix() @ matrix
        still[:2, 2] += still[:2, :2] @ (0.5, 0.5) - 0.5
        twice = cv2.warpAffine(letterboxed, still[:2], (208, 208), borderValue=FILL)
        errors.append([np.sqrt(((result - gt) ** 2).mean()) for result in (once, twice)])
    once_error, twice_error = np.mean(errors, axis=0)
    assert once_error < twice_error


def test_a_part_of_one_pixel_row_is_not_halved_away() -> None:
    part = np.full((1, 400, 3), 200, np.uint8)
    image = warp_placed(Placed(part, 0, 16, 32, 1), np.diag([0.5, 0.5, 1]), 32, (0, 0, 0))
    assert image.shape == (32, 32, 3) and image.max() > 50


# --- fog ---


def discs_in_a_loop(centres: np.ndarray, radii: np.ndarray, height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    count = np.zeros((height, width), int)
    for (x, y), radius in zip(centres, radii, strict=True):
        count += (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
    return count


def test_discs_are_counted_as_a_loop_counts_them() -> None:
    generator = np.random.default_rng(0)
    centres, radii = generator.integers(-5, 45, (200, 2)), generator.integers(1, 12, 200)
    assert np.array_equal(count_discs(centres, radii, 30, 40), discs_in_a_loop(centres, radii, 30, 40))
    assert not count_discs(np.zeros((0, 2), int), np.zeros(0, int), 3, 4).any()


@pytest.mark.parametrize("seed", range(4))
def test_the_same_particles_make_the_fog_of_albumentations(seed: int) -> None:
    """Blended one by one there, rounding to 8 bits each time; the edges of OpenCV's discs differ by a pixel."""
    image = photograph(160, 120, seed)
    fog = RandomFog(fog_coef_range=(0.3, 1.0), alpha_coef=0.08, p=1)
    fog.set_random_state(np.random.default_rng(seed), random.Random(seed))
    drawn = fog.get_params_dependent_on_data({"shape": image.shape}, {})
    theirs = add_fog(
        image, drawn["intensity"], 0.08, drawn["particle_positions"].tolist(), drawn["radiuses"].tolist()
    ).astype(int)
    difference = np.abs(fog.apply(image, **drawn) - theirs)
    assert difference.mean() < 1 and difference.max() <= 8
    assert theirs.mean() > image.mean() + 3  # there is fog


def test_fog_draws_particles_as_albumentations_does() -> None:
    """As many for an intensity, of the same radii, spread as widely; and the settings' limits hold."""
    for intensity in (0.3, 0.5, 1.0):
        rows = []
        for kind in (RandomFog, A.RandomFog):
            fog = kind(fog_coef_range=(intensity, intensity), alpha_coef=0.1, p=1)
            fog.set_random_state(np.random.default_rng(1), random.Random(1))
            drawn = fog.get_params_dependent_on_data({"shape": (300, 400, 3)}, {})
            places, radii = np.array(drawn["particle_positions"]), np.array(drawn["radiuses"])
            rows.append((len(places), radii.min(), radii.max(), *places.mean(axis=0), *places.std(axis=0)))
            assert drawn["intensity"] == intensity and len(radii) == len(places)
        ours, theirs = np.array(rows)
        assert ours[:3].tolist() == theirs[:3].tolist()
        assert np.abs(ours - theirs).max() < 20  # standard error of a mean of 400 places over 400 px: 5.8


def test_an_albumentation_that_moves_pixels_is_refused(default_settings: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """The boxes follow the warp alone; a transposed image would keep its old boxes."""
    monkeypatch.setattr(A, "ToGray", A.Transpose)
    augmentation = settings(default_settings, to_gray=1.0).data.augmentation
    with pytest.raises(TypeError, match="Transpose"):
        build_augmentation(augmentation, FILL)
