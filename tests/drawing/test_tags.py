"""Names on crowded images: numbers on the boxes, names in a legend at the right."""

import numpy as np
import pytest

from detection.drawing.boxes import class_color, draw_boxes
from detection.drawing.tags import GAP

NAMES = ["pedestrian in the street", "bicycle"]


def grid_of_boxes(count: int, side: float) -> np.ndarray:
    """Boxes of one side, 40 pixels apart, 10 in a row, (count, 4)."""
    corners = np.array([(10 + 40 * (n % 10), 20 + 40 * (n // 10)) for n in range(count)], dtype=np.float64)
    return np.hstack([corners, corners + side])


def draw(count: int, side: float, legend: bool = True, height: int = 300) -> np.ndarray:
    image = np.full((height, 420, 3), 7, np.uint8)
    scores = np.linspace(0.9, 0.3, count)
    return draw_boxes(image, grid_of_boxes(count, side), np.arange(count) % 2, NAMES, scores, legend=legend)


@pytest.mark.parametrize(("count", "side", "legend"), [(9, 12, True), (40, 12, False), (20, 150, True)])
def test_without_a_crowd_names_stay_on_the_boxes(count: int, side: float, legend: bool) -> None:
    """Few boxes, no legend wanted (a video keeps its size), or large ones."""
    assert draw(count, side, legend).shape == (300, 420, 3)


def test_numbers_leave_the_objects_visible() -> None:
    """Of the pixels inside the borders more than four fifths are those of the image; with names, few are."""

    def visible(drawn: np.ndarray) -> float:
        boxes = grid_of_boxes(40, 12).astype(int)
        return float(np.mean([(drawn[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1] == 7).all() for x1, y1, x2, y2 in boxes]))

    named, numbered = draw(40, 12, legend=False), draw(40, 12)
    assert numbered.shape[0] == 300 and numbered.shape[1] > 420
    assert visible(numbered) > 0.8 > 0.5 > visible(named)


@pytest.mark.parametrize("height", [300, 120])
def test_the_legend_has_a_row_per_box_in_the_colour_of_its_class(height: int) -> None:
    """Read from the left edge of each column, where no letter is; of those without room, a white row has the count."""
    legend = draw(20, 12, height=height)[:, 420:]
    found: list[tuple[int, ...]] = []
    column = GAP
    colors = {class_color(0), class_color(1)}
    while column < legend.shape[1]:
        pixels = [tuple(pixel) for pixel in legend[:, column].tolist()]
        starts = [pixel for before, pixel in zip([(255, 255, 255), *pixels], pixels, strict=False) if pixel != before]
        found += [pixel for pixel in starts if pixel in colors]
        width = next((x for x in range(column, legend.shape[1]) if (legend[:, x] == 255).all()), legend.shape[1])
        column = width + GAP
    assert found == [class_color(number % 2) for number in range(len(found))]
    assert len(found) == 20 if height == 300 else 3 <= len(found) < 20
