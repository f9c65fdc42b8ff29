"""Mosaic and mixup against slow placements: canvases of NumPy, and boxes whose corners are moved one by one."""

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import pytest

from detection.config.settings import Settings
from detection.contract import CROWD_LABEL, Geometry
from detection.data.augmentation.mixing import MIXUP_STREAM, MOSAIC_STREAM, Annotated, lay_mosaic
from detection.data.resize import INTERPOLATIONS, warp_tiles
from detection.data.transforms import Sample, Transform
from detection.runtime.reproducibility import sample_stream
from tests.support.detectors import transform_of
from tests.support.pictures import NO_BOXES, probabilities

Load = Callable[..., Settings]
FILL = (124, 116, 104)
SEED = 3
SHAPES = ((160, 90), (70, 200), (64, 64), (33, 190), (300, 210), (96, 96))


def smooth(width: int, height: int, seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def annotated(number: int) -> Annotated:
    """A picture with up to 12 boxes, some of them tiny or crowds; every fifth has none. The label names the picture."""
    width, height = SHAPES[number % len(SHAPES)]
    if number % 5 == 4:
        return Annotated(smooth(width, height, number), *NO_BOXES)
    generator = np.random.default_rng(number)
    corners = generator.uniform(0, (width, height), (12, 2, 2))
    corners[:3, 1] = np.minimum(corners[:3, 0] + 2, (width, height))
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1).astype(np.float32)
    labels = np.arange(12) + 100 * number
    labels[3] = CROWD_LABEL
    return Annotated(smooth(width, height, number), boxes, labels)


def partners_of(first: int) -> Callable[..., list[Annotated]]:
    """The pictures after a number, however the generator would draw them."""
    return lambda _, count: [annotated(first + place) for place in range(count)]


def affine_and_flips(transform: Transform, size: int, index: int, epoch: int) -> tuple[np.ndarray, bool]:
    """The matrix that the albumentations draw for this image, and whether there is an affine in it."""
    augmentation = transform.augmentation
    numbers, chance = augmentation.streams(epoch, index)
    augmentation.compose.set_random_state(numbers, chance)
    chance.random()
    matrix = np.eye(3)
    moved = augmentation.affine is not None and augmentation.affine.should_apply()
    if moved:
        matrix = augmentation.affine.get_params_dependent_on_data({"shape": (size, size, 3)}, {})["bbox_matrix"]
    for axis, flip in enumerate(augmentation.flips):
        if flip is not None and flip.should_apply():
            mirror = np.eye(3)
            mirror[axis, axis], mirror[axis, 2] = -1, size
            matrix = mirror @ matrix
    return matrix, moved


def slow_boxes(
    boxes: Sequence[Sequence[float]], labels: Sequence[int], matrix: np.ndarray, size: int, least: float
) -> list[tuple[list[float], int]]:
    """Move the corners of each box one by one; enclose, clip and drop what is hardly seen."""
    found = []
    for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
        corners = [matrix @ (x, y, 1) for x in (x1, x2) for y in (y1, y2)]
        columns, rows = [corner[0] for corner in corners], [corner[1] for corner in corners]
        whole = (max(columns) - min(columns)) * (max(rows) - min(rows))
        box = [min(max(value, 0), size) for value in (min(columns), min(rows), max(columns), max(rows))]
        width, height = box[2] - box[0], box[3] - box[1]
        if width >= 1 and height >= 1 and width * height >= least * whole:
            found.append((box, label))
    return found


def slow_mosaic(
    images: Sequence[Annotated], geometry: Any, centre: tuple[int, int], size: int, least: float
) -> tuple[np.ndarray, np.ndarray, list[list[float]], list[int]]:
    """The canvas of twice the side, painted pixel row by pixel row, whose each pixel is, and the boxes on it."""
    canvas = np.empty((2 * size, 2 * size, 3), np.uint8)
    canvas[:] = FILL
    owners = np.zeros(canvas.shape[:2], np.uint8)
    boxes, labels = [], []
    for number, (image, own_boxes, own_labels) in enumerate(images):
        _, width, height = geometry.place(image.shape[1], image.shape[0], size)
        resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        left = centre[0] - width if number in (0, 2) else centre[0]
        top = centre[1] - height if number in (0, 1) else centre[1]
        for row in range(height):
            first, end = max(left, 0), min(left + width, 2 * size)
            if 0 <= top + row < 2 * size and first < end:
                canvas[top + row, first:end] = resized[row, first - left : end - left]
                owners[top + row, first:end] = number + 1
        for box, label in zip(own_boxes.tolist(), own_labels.tolist(), strict=True):
            whole = [
                box[0] * width / image.shape[1] + left, box[1] * height / image.shape[0] + top,
                box[2] * width / image.shape[1] + left, box[3] * height / image.shape[0] + top,
            ]  # fmt: skip
            seen = [min(max(value, 0), 2 * size) for value in whole]
            area = (seen[2] - seen[0]) * (seen[3] - seen[1])
            if area > 0 and area >= least * (whole[2] - whole[0]) * (whole[3] - whole[1]):
                boxes.append(seen)
                labels.append(label)
    return canvas, owners, boxes, labels


def shown_by_opencv(
    picture: np.ndarray, matrix: np.ndarray, size: int, fill: Any = FILL, flags: int = cv2.INTER_LINEAR
) -> np.ndarray:
    """An affine of a picture whose pixel k spans k to k + 1."""
    shifted = matrix[:2].copy()
    shifted[:, 2] += shifted[:, :2] @ (0.5, 0.5) - 0.5
    return cv2.warpAffine(picture, shifted, (size, size), flags=flags, borderValue=fill)


def compare_boxes(sample: Sample, expected: list[tuple[list[float], int]]) -> int:
    assert len(sample.boxes) == len(expected)
    assert sample.boxes.dtype == np.float32 and sample.labels.dtype == np.int64
    left = list(expected)
    for box, label in zip(sample.boxes, sample.labels.tolist(), strict=True):
        same = [row for row in left if row[1] == label and np.abs(box - row[0]).max() < 1e-3]
        assert same, (label, box)
        left.remove(same[0])
    areas = (sample.boxes[:, 2:] - sample.boxes[:, :2]).prod(axis=1)
    assert (np.diff(areas) <= 1e-2).all()  # the order of the targets
    return len(expected)


GEOMETRIES = {
    "as it lies": ([], {}),
    "flips": ([], {"horizontal_flip": 0.5, "vertical_flip": 0.5}),
    "affine": (["rotate=[-20, 20]", "shear=[-10, 10]"], {"affine": 0.8, "horizontal_flip": 0.5}),
    "far": (["scale=[0.35, 3]", "translate_percent=[-0.6, 0.6]"], {"affine": 1.0, "vertical_flip": 0.5}),
}


@pytest.mark.parametrize(
    ("name", "placement"), [*((name, "letterbox") for name in GEOMETRIES), ("affine", "squash"), ("flips", "top_left")]
)
def test_a_mosaic_is_that_of_a_painted_canvas(default_settings: Load, name: str, placement: str) -> None:
    changes, chosen = GEOMETRIES[name]
    words = [f"data.augmentation.affine.{change}" for change in changes]
    settings = default_settings(*probabilities(mosaic=1, **chosen), *words, f"model.placement={placement}")
    least, total = settings.data.augmentation.min_visibility, 0
    errors, transform = [], transform_of(settings, 64, SEED, training=True)
    for index in range(15):
        size, epoch = (64, 96, 160)[index % 3], index // 7
        sample = transform(*annotated(index), index, epoch, size, partners_of(index + 1))
        generator = sample_stream(SEED, epoch, index, MOSAIC_STREAM)
        generator.random()
        centre = tuple(int(share * size) for share in generator.uniform(0.5, 1.5, 2))
        canvas, owners, boxes, labels = slow_mosaic(
            [annotated(index + place) for place in range(4)], transform.geometry, centre, size, least
        )
        matrix = affine_and_flips(transform, size, index, epoch)[0]
        middle = np.array([[1, 0, -size / 2], [0, 1, -size / 2], [0, 0, 1]])
        total += compare_boxes(sample, slow_boxes(boxes, labels, matrix @ middle, size, least))
        # Two pixels beside an outline, where one more or less of a tile may be seen, nothing is compared.
        wider = np.array([[1, 0, 3], [0, 1, 3], [0, 0, 1]]) @ matrix @ middle  # the outline may lie just outside
        shown = shown_by_opencv(cv2.merge([owners] * 3), wider, size + 6, (0, 0, 0), cv2.INTER_NEAREST)[..., 0]
        away = (cv2.erode(shown, np.ones((5, 5))) == cv2.dilate(shown, np.ones((5, 5))))[3:-3, 3:-3]
        expected = shown_by_opencv(canvas, matrix @ middle, size).astype(int)
        difference = np.abs(sample.image.astype(int) - expected)
        assert away.mean() > 0.3 and difference[away].max(initial=0) <= 24, (index, difference[away].max())
        errors.append(difference[away].mean())
    assert np.mean(errors) < 1.5
    assert total > (30 if name == "far" else 100)


def test_a_mosaic_hides_no_seam_and_is_filled_outside_only() -> None:
    """Four grey pictures of one colour that meet inside the square: no other colour is seen but the fill outside."""
    geometry = geometry_of_letterbox()
    grey = Annotated(np.full((50, 70, 3), 200, np.uint8), *NO_BOXES)
    for number in range(40):
        generator = np.random.default_rng(number)
        centre = generator.integers(32, 96, 2).tolist()
        layer = lay_mosaic([grey] * 4, centre, geometry, 64, 0)
        angle, scale = generator.uniform(-0.5, 0.5), generator.uniform(0.4, 1.6)
        matrix = np.eye(3)
        matrix[:2, :2] = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        matrix[:2, 2] = 32 - matrix[:2, :2] @ np.array(centre) + 32 * matrix[:2, :2].sum(axis=1)  # the centre stays
        image = warp_tiles(layer.tiles, layer.bounds, matrix, 64, (1, 2, 3))
        filled = (image == (1, 2, 3)).all(axis=2)
        assert ((image == 200).all(axis=2) | filled).all()
        assert not filled[30:34, 30:34].any()  # where the four meet


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (3, 2)])
@pytest.mark.parametrize("method", ["linear", "nearest", "cubic", "lanczos", "area"])
def test_thin_pictures_and_other_interpolations(shape: tuple[int, int], method: str) -> None:
    own = Annotated(np.full((*shape, 3), 90, np.uint8), *NO_BOXES)
    for scale in (0.05, 0.3, 1.0, 4.0):
        matrix = np.array([[scale, 0, 16 * (1 - scale)], [0, scale, 16 * (1 - scale)], [0, 0, 1]])
        layer = lay_mosaic([own] * 4, (32, 32), geometry_of_letterbox(), 32, 0)
        image = warp_tiles(layer.tiles, layer.bounds, matrix, 32, (5, 5, 5), INTERPOLATIONS[method])
        assert set(np.unique(image)) <= {5, 90} and (image == 90).any()


def test_a_mosaic_takes_the_drawn_interpolation(default_settings: Load) -> None:
    """Enlarged, nearest has the colours of the picture only; bilinear has others."""
    board = np.kron(np.indices((8, 8)).sum(axis=0) % 2, np.ones((1, 1))).astype(np.uint8)[..., None].repeat(3, 2) * 255
    own = Annotated(board, *NO_BOXES)
    kinds = set()
    words = ["data.augmentation.affine={p: 1, scale: [2, 2], rotate: [10, 10]}"]
    for p in (0, 1):
        settings = default_settings(*probabilities(mosaic=1, random_interpolation=p), *words)
        transform = transform_of(settings, 64, SEED, training=True)
        for index in range(20):
            image = transform(*own, index, 0, 0, lambda _, count: [own] * count).image
            kinds.add((p, bool(np.isin(image, (0, 255, *FILL)).all())))
    assert kinds == {(0, False), (1, False), (1, True)}


# --- mixup ---


def mixed(default_settings: Load, *words: str, **chosen: float) -> Transform:
    return transform_of(default_settings(*probabilities(mixup=1, **chosen), *words), 64, SEED, training=True)


@pytest.mark.parametrize("chosen", [{}, {"affine": 0.7, "horizontal_flip": 0.5}, {"mosaic": 0.5}, {"expand": 1}])
def test_half_of_a_second_picture_is_scaled_mirrored_and_moved(default_settings: Load, chosen: dict) -> None:
    """The picture alone, with the same draws, and the second one in a slow placement of its own, averaged."""
    transform, alone = (
        mixed(default_settings, **chosen),
        mixed(default_settings, "data.augmentation.mixup.p=0", **chosen),
    )
    total = 0
    for index in range(20):
        first = alone(*annotated(index), index, 1, 64, partners_of(index + 1))
        sample = transform(*annotated(index), index, 1, 64, partners_of(index + 1))
        generator = sample_stream(SEED, 1, index, MIXUP_STREAM)
        generator.random()
        scale, mirrored, place = generator.uniform(0.5, 1.5), generator.random() < 0.5, generator.random(2)
        other = annotated(index + 1)
        letterbox, width, height = transform.geometry.place(*other.image.shape[1::-1], 64)
        matrix = np.diag([scale * width / other.image.shape[1], scale * height / other.image.shape[0], 1.0])
        matrix[:2, 2] = scale * letterbox.left, scale * letterbox.top
        if mirrored:
            matrix[0] = -matrix[0] + (0, 0, scale * 64)
        matrix[:2, 2] += place * (64 - scale * 64)
        expected = (first.image.astype(float) + shown_by_opencv(other.image, matrix, 64)) / 2
        difference = np.abs(sample.image - expected)
        # Two samplings of the smooth picture differ a little, its outline by a pixel of half its contrast.
        assert np.median(difference) <= 1 and (difference > 6).mean() < 0.06, index
        second = slow_boxes(other.boxes.tolist(), other.labels.tolist(), matrix, 64, 0.3)
        both = [(box, label) for box, label in zip(first.boxes.tolist(), first.labels.tolist(), strict=True)] + second
        total += compare_boxes(sample, both)
        assert sample.weights is None and sample.letterbox == first.letterbox
    assert total > 100


@pytest.mark.parametrize("chosen", [{}, {"affine": 0.8, "horizontal_flip": 0.5}])
def test_shares_of_two_pictures_on_one_canvas(default_settings: Load, chosen: dict[str, float]) -> None:
    """GluonCV and Paddle: both at the upper left of the larger canvas, then as a single picture of that size."""
    transform = mixed(default_settings, "data.augmentation.mixup.beta=1.5", **chosen)
    alone = mixed(default_settings, "data.augmentation.mixup.p=0", **chosen)
    for index in range(20):
        pictures = annotated(index), annotated(index + 1)
        sample = transform(*pictures[0], index, 2, 64, partners_of(index + 1))
        generator = sample_stream(SEED, 2, index, MIXUP_STREAM)
        generator.random()
        share = generator.beta(1.5, 1.5)
        height, width = np.max([picture.image.shape[:2] for picture in pictures], axis=0)
        canvas, boxes, labels, weights = np.zeros((height, width, 3)), [], [], []
        for picture, part in zip(pictures, (share, 1 - share), strict=True):
            own = np.full((height, width, 3), FILL, float)
            own[: picture.image.shape[0], : picture.image.shape[1]] = picture.image
            canvas += part * own
            boxes += picture.boxes.tolist()
            labels += picture.labels.tolist()
            weights += [part] * len(picture.labels)
        whole = np.array(boxes, np.float32).reshape(-1, 4), np.arange(len(labels))
        expected = alone(np.rint(canvas).astype(np.uint8), *whole, index, 2, 64)
        rows = sorted(zip(sample.boxes.tolist(), sample.labels.tolist(), sample.weights.tolist(), strict=True))
        slow = [
            (box, labels[row], np.float32(weights[row]))
            for box, row in zip(expected.boxes.tolist(), expected.labels.tolist(), strict=True)
        ]
        # The rectangles of both pictures are rounded to pixels of the network input, each on its own.
        assert len(rows) == len(slow)
        for row in rows:
            near = [r for r in slow if r[1:] == row[1:] and np.abs(np.subtract(r[0], row[0])).max() < 1.5]
            assert near, row
        difference = np.abs(sample.image.astype(int) - expected.image)
        assert np.median(difference) <= 2 and (difference > 12).mean() < 0.08, index


def test_shares_stay_with_their_boxes_through_crops(default_settings: Load) -> None:
    words = ["data.augmentation.mixup.beta=1.5"]
    transform = mixed(default_settings, *words, iou_crop=1, expand=0.5, affine=0.5, mosaic=0.2)
    total = 0
    for index in range(60):
        sample = transform(*annotated(index), index, 0, 64, partners_of(index + 1))
        generator = sample_stream(SEED, 0, index, MIXUP_STREAM)
        generator.random()
        share = generator.beta(1.5, 1.5)
        # the labels of the second picture, and of a mosaic the three beside the own one
        objects = sample.labels >= 0
        shares, pictures = sample.weights[objects], sample.labels[objects] // 100
        assert np.isin(shares, np.array([share, 1 - share], np.float32)).all()
        assert np.allclose(shares[pictures == index], share)
        assert len(sample.weights) == len(sample.boxes) == len(sample.labels)
        assert (
            (sample.boxes >= 0).all()
            and (sample.boxes <= 64).all()
            and (sample.boxes[:, 2:] > sample.boxes[:, :2]).all()
        )
        total += len(shares)
    assert total > 200
    plain = transform(*annotated(0), 0, 0, 64)  # without partners, as in the last part of a run
    assert (plain.weights == 1).all() and len(plain.weights) == len(plain.labels)


def test_what_is_off_changes_nothing(default_settings: Load) -> None:
    """Without partners a transform with mosaic and mixup is that without; with them, an unmixed picture is too."""
    chosen = {"affine": 0.5, "horizontal_flip": 0.5, "gauss_noise": 0.5}
    both = transform_of(default_settings(*probabilities(mosaic=0.5, mixup=0.5, **chosen)), 64, SEED, training=True)
    plain = transform_of(default_settings(*probabilities(**chosen)), 64, SEED, training=True)
    assert plain.mixing is None
    unmixed = 0
    for index in range(30):
        expected = plain(*annotated(index), index, 0, 64)
        for partners in (None, partners_of(index + 1)):
            sample = both(*annotated(index), index, 0, 64, partners)
            same = np.array_equal(sample.image, expected.image) and np.array_equal(sample.boxes, expected.boxes)
            assert same or partners is not None
            unmixed += same and partners is not None
    assert 2 <= unmixed <= 16  # a quarter of 30


def geometry_of_letterbox() -> Any:
    return Geometry(32, fill=FILL)
