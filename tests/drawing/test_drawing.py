import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from detection.drawing.boxes import (
    CROWD_COLOR,
    CROWD_DARK_COLOR,
    class_color,
    draw_boxes,
    ground_truth_beside_detections,
    make_grid,
    save_png,
)

NAMES = [f"class {label}" for label in range(80)]
NO_BOXES = np.zeros((0, 4)), np.zeros(0, dtype=int)


def blank(height: int = 200, width: int = 300, grey: int = 0) -> np.ndarray:
    return np.full((height, width, 3), grey, dtype=np.uint8)


def has_color(pixels: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    same: np.ndarray = (pixels == color).all(axis=-1)
    return same


def read_rgb(path: Path) -> np.ndarray:
    return cv2.imread(str(path))[:, :, ::-1]


BOX, LABEL = np.array([[100, 90, 180, 150]]), np.array([3])


def test_class_colors_are_stable_and_distinct() -> None:
    assert class_color(0) == (255, 13, 13)  # hue 0, saturation 0.95, value 1: green = blue = 255 * 0.05 = 12.75
    colors = np.array([class_color(label) for label in range(80)])
    distance = np.abs(colors[:, None] - colors).sum(axis=2) + 1000 * np.eye(80, dtype=int)
    assert distance.min() > 10 and np.abs(np.diff(colors, axis=0)).sum(axis=1).min() > 150  # of neighbours
    assert np.ptp(colors, axis=1).min() > 100  # none is grey


def test_border_lies_inside_the_box() -> None:
    # sqrt(200 * 300) * 0.003 = 0.73: lines of one pixel.
    drawn = draw_boxes(blank(), BOX, LABEL, NAMES)
    color = class_color(3)
    for side in (drawn[90, 100:180], drawn[149, 100:180], drawn[90:150, 100], drawn[90:150, 179]):
        assert has_color(side, color).all()
    assert not drawn[91:149, 101:179].any()  # inside
    assert not drawn[150:].any() and not drawn[:, 180:].any() and not drawn[:, :100].any()  # outside; the name is above


def test_lines_grow_with_the_image() -> None:
    # sqrt(1000 * 1000) * 0.003 = 3 pixels.
    drawn = draw_boxes(blank(1000, 1000), np.array([[200, 200, 800, 800]]), np.array([3]), NAMES)
    assert has_color(drawn[500], class_color(3)).nonzero()[0].tolist() == [200, 201, 202, 797, 798, 799]


def test_coordinates_are_rounded() -> None:
    drawn = draw_boxes(blank(), np.array([[99.6, 90.4, 179.7, 150.2]]), LABEL, NAMES)
    assert np.array_equal(drawn, draw_boxes(blank(), BOX, LABEL, NAMES))


def test_box_that_exceeds_the_image_has_its_border_at_the_edge() -> None:
    drawn = draw_boxes(blank(), np.array([[-50, -np.inf, 400, 1e30]]), np.array([3]), NAMES)
    color = class_color(3)
    assert has_color(drawn[199, 150:], color).all() and has_color(drawn[100:150, 0], color).all()
    assert has_color(drawn[100:150, 299], color).all()


def test_smallest_box_on_the_last_pixel_is_drawn() -> None:
    drawn = draw_boxes(blank(), np.array([[300, 200, 300, 200]]), np.array([3]), NAMES)
    assert has_color(drawn[199, 299], class_color(3))


@pytest.mark.parametrize("title", [None, "nothing here"])
def test_no_boxes(title: str | None) -> None:
    image = blank(grey=77)
    drawn = draw_boxes(image, *NO_BOXES, NAMES, scores=np.zeros(0), title=title)
    assert np.array_equal(drawn[-200:], image)
    assert (drawn.shape[0] == 200) == (title is None)


def test_padding_is_skipped_and_the_input_unchanged() -> None:
    image = blank(grey=50)
    boxes = np.array([[0, 0, 0, 0], [10, 80, 90, 150], [20, 20, 80, 80]])
    with_padding = draw_boxes(image, boxes, np.array([-1, 3, -1]), NAMES, scores=np.array([0.9, 0.8, 0.7]))
    alone = draw_boxes(image, boxes[1:2], np.array([3]), NAMES, scores=np.array([0.8]))
    assert np.array_equal(with_padding, alone)
    assert (image == 50).all()


def test_crowd_is_dashed_grey_and_below_objects() -> None:
    boxes = np.array([[100, 90, 180, 150], [100, 120, 180, 150]])  # they share their bottom side
    drawn = draw_boxes(blank(grey=255), boxes, np.array([3, -2]), NAMES)
    assert has_color(drawn[149, 100:180], class_color(3)).all()
    alone = draw_boxes(blank(grey=255), boxes[1:], np.array([-2]), NAMES)
    # Lines of one pixel, dashes of 3 + 3 * 1 = 6 pixels: light, dark, light, ...
    assert has_color(alone[149, 100:106], CROWD_COLOR).all() and has_color(alone[149, 112:118], CROWD_COLOR).all()
    assert has_color(alone[149, 106:112], CROWD_DARK_COLOR).all()
    assert has_color(alone[126:132, 179], CROWD_DARK_COLOR).all()


def test_small_box_is_drawn_over_a_large_one() -> None:
    boxes = np.array([[100, 90, 140, 150], [100, 90, 280, 150]])
    for order in ([0, 1], [1, 0]):
        drawn = draw_boxes(blank(), boxes[order], np.array([3, 7])[order], NAMES)
        assert has_color(drawn[149, 100:140], class_color(3)).all()
        assert has_color(drawn[149, 140:280], class_color(7)).all()


def test_image_need_not_be_contiguous() -> None:
    image = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    view = image[:, ::-1, ::-1]
    assert np.array_equal(draw_boxes(view, BOX, LABEL, NAMES), draw_boxes(view.copy(), BOX, LABEL, NAMES))


@pytest.mark.parametrize(
    ("boxes", "labels", "scores", "message"),
    [
        ([[0, 0, 9, 9]], [80], None, "label 80"),
        ([[0, 0, 9, 9]], [-3], None, "label -3"),
        ([[0, 0, 9, 9]], [1, 2], None, "1 boxes, 2 labels"),
        ([[0, 0, 9, 9]], [1], np.array([0.5, 0.6]), "2 scores"),
        ([[0, 0, 9, 9], [0, 0, np.nan, 9]], [1, 1], None, "0.0, nan, 9.0"),
    ],
)
def test_boxes_that_do_not_fit_are_refused(boxes: list, labels: list, scores: np.ndarray | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_boxes(blank(), np.array(boxes), np.array(labels), NAMES, scores)


@pytest.mark.parametrize("image", [blank()[:, :, 0], blank().astype(np.float32), np.zeros((0, 5, 3), dtype=np.uint8)])
def test_other_images_are_refused(image: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="RGB uint8"):
        draw_boxes(image, *NO_BOXES, NAMES)
    with pytest.raises(ValueError, match="RGB uint8"):
        make_grid([image], columns=1)
    with pytest.raises(ValueError, match="RGB uint8"):
        save_png(tmp_path / "image.png", image)


def changed_size(drawn: np.ndarray, image: np.ndarray) -> tuple[int, int]:
    rows, columns = (drawn != image).any(axis=2).nonzero()
    return int(rows.max() - rows.min() + 1), int(columns.max() - columns.min() + 1)


def test_name_stays_inside_the_image_and_beside_a_small_box() -> None:
    image = blank(grey=128)
    # In the middle nothing is cut: the name, and the box of 4 pixels below it.
    whole = changed_size(draw_boxes(image, np.array([[150, 100, 154, 104]]), np.array([6]), NAMES), image)
    for x1, y1 in [(0, 0), (296, 0), (0, 196), (296, 196), (280, 5)]:
        box = np.array([[x1, y1, x1 + 4, y1 + 4]])
        drawn = draw_boxes(image, box, np.array([6]), NAMES)
        assert changed_size(drawn, image) == whole
        assert has_color(drawn[y1 + 3, x1 : x1 + 4], class_color(6)).all()  # not hidden by its own name


def test_long_name_is_made_to_fit() -> None:
    def draw_tag(name: str) -> np.ndarray:
        drawn = draw_boxes(blank(100, 150, grey=128), np.array([[0, 50, 20, 90]]), np.array([0]), [name])
        rows = drawn[:50]  # above the box
        tag: np.ndarray = rows[(rows != 128).any(axis=(1, 2))]
        return tag

    tag = draw_tag("a name much longer than the image is wide")
    assert 0 < len(tag) < len(draw_tag("short"))
    # The text ends before the image does: the last column is the margin.
    assert has_color(tag[:, -1], class_color(0)).all() or (tag[:, -1] == 128).all()


def test_names_of_equal_boxes_do_not_cover_each_other() -> None:
    image, box, labels = blank(), [100, 90, 180, 150], np.array([3, 6, 4])
    drawn = draw_boxes(image, np.array([box] * 3), labels, NAMES)
    for label in labels:
        alone = draw_boxes(image, np.array([box]), np.array([label]), NAMES)
        name = has_color(alone[:90], class_color(label)).sum()  # above the box there is only the name
        assert has_color(drawn, class_color(label)).sum() >= name


def test_score_has_two_digits() -> None:
    def draw(score: float) -> np.ndarray:
        return draw_boxes(blank(), BOX, LABEL, NAMES, scores=np.array([score]))

    assert np.array_equal(draw(0.8749), draw(0.8651))  # both 0.87
    assert not np.array_equal(draw(0.87), draw(0.88))
    assert not np.array_equal(draw(0.87), draw_boxes(blank(), BOX, LABEL, NAMES))


@pytest.mark.parametrize(("label", "white"), [(0, True), (10, False)])  # red and yellow
def test_letters_stand_out(label: int, white: bool) -> None:
    drawn = draw_boxes(blank(1000, 1000, grey=128), np.array([[300, 300, 800, 800]]), np.array([label]), NAMES)
    # Neither the grey image nor a class colour comes near black or white; smoothed letters need not reach them.
    assert (drawn.min(axis=2) > 200).any() == white
    assert (drawn.max(axis=2) < 55).any() != white


def test_title_is_a_strip_above_the_image() -> None:
    plain = draw_boxes(blank(), BOX, LABEL, NAMES)
    titled = draw_boxes(blank(), BOX, LABEL, NAMES, title="a title")
    strip = titled[:-200]
    assert np.array_equal(titled[-200:], plain)
    assert 12 <= len(strip) <= 30  # letters of 1.2 * 10 pixels with their margins
    assert has_color(strip[0], (255, 255, 255)).all() and strip.min() < 100


def test_grid_of_different_sizes() -> None:
    images = [blank(10, 20, grey=1), blank(6, 8, grey=2), blank(10, 20, grey=3)]
    grid = make_grid(images, columns=2, padding=4, background=(9, 8, 7))
    # Cells of 10 x 20: 2 rows -> 2 * (10 + 4) + 4, 2 columns -> 2 * (20 + 4) + 4.
    expected = np.full((32, 52, 3), (9, 8, 7), dtype=np.uint8)
    expected[4:14, 4:24] = 1
    expected[6:12, 34:42] = 2  # the cell begins at row 4, column 28; centred (10 - 6) / 2 and (20 - 8) / 2 further on
    expected[18:28, 4:24] = 3
    assert np.array_equal(grid, expected)
    assert make_grid([blank(10, 20)] * 2, columns=5, padding=0).shape == (10, 40, 3)  # no empty columns
    for count, columns in ((0, 2), (2, 0)):
        with pytest.raises(ValueError, match=f"{count} images in {columns} columns"):
            make_grid([blank()] * count, columns)


def test_ground_truth_beside_detections() -> None:
    gt = np.array([[100, 90, 180, 150]]), np.array([3])
    found = np.array([[110, 95, 190, 155]]), np.array([7]), np.array([0.5])
    both = ground_truth_beside_detections(blank(), *gt, *found, NAMES)
    strip = both.shape[0] - 200 - 2 * 4  # the header; 4 pixels around each panel
    assert 12 <= strip <= 30 and both.shape[1] == 4 + 300 + 4 + 300 + 4
    left, right = both[4 + strip : -4, 4:304], both[4 + strip : -4, 308:608]
    assert np.array_equal(left, draw_boxes(blank(), *gt, NAMES))
    assert np.array_equal(right, draw_boxes(blank(), found[0], found[1], NAMES, found[2]))
    both = ground_truth_beside_detections(blank(), *NO_BOXES, *NO_BOXES, np.zeros(0), NAMES)
    assert not both[-204:-4, 4:304].any()


def test_saved_png_is_the_same_image(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 255, (7, 5, 3), dtype=np.uint8)
    save_png(tmp_path / "new folder" / "image.png", image[:, ::-1])
    assert np.array_equal(read_rgb(tmp_path / "new folder" / "image.png"), image[:, ::-1])


def test_failed_save_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(source: Path, target: Path) -> None:
        raise PermissionError(target)

    save_png(tmp_path / "image.png", blank(grey=1))
    with pytest.raises(OSError):
        save_png(tmp_path / "image.png" / "below.png", blank())  # no directory
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(PermissionError):
        save_png(tmp_path / "image.png", blank(grey=2))
    monkeypatch.setattr(cv2, "imencode", lambda *_: (False, None))
    with pytest.raises(OSError, match="cannot encode"):
        save_png(tmp_path / "image.png", blank(grey=2))
    assert [path.name for path in tmp_path.iterdir()] == ["image.png"]
    assert (read_rgb(tmp_path / "image.png") == 1).all()
