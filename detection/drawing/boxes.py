"""Drawing boxes on images, and arranging images in grids.

Images are RGB uint8 (H, W, 3) NumPy arrays; boxes are xyxy in pixels of the image they are drawn on.
"""

import colorsys
import math
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from detection.contract import CROWD_LABEL, PADDING_LABEL
from detection.drawing.files import replace_file
from detection.drawing.tags import (
    WHITE,
    Color,
    draw_legend,
    draw_tag,
    draw_tags,
    is_crowded,
    letter_pixels_of,
    side_of,
    size_of_tag,
)

CROWD_COLOR: Color = (160, 160, 160)  # grey; the colours of classes have at least 60 % saturation
CROWD_DARK_COLOR: Color = (60, 60, 60)


def class_color(label: int) -> Color:
    """Return the colour of a class: the same in every image and run, and far from those of neighbouring labels.

    Steps of the golden ratio spread any number of hues evenly around the circle.
    """
    hue = (label * (math.sqrt(5) - 1) / 2) % 1
    # Distant labels may have similar hues; saturation and brightness keep them apart.
    saturation, value = ((0.95, 1.0), (0.6, 1.0), (0.9, 0.7))[label % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    scores: np.ndarray | None = None,
    title: str | None = None,
    notes: Sequence[str] | None = None,
    legend: bool = False,
) -> np.ndarray:
    """Draw boxes with the names of their classes on a copy of an image.

    A box covers the pixels from x1 up to, but not including, x2, with its border inside. Boxes are clipped to the image
    and stay visible if they are outside it. Text on tiny images is tiny too.

    Args:
        image: RGB uint8 (H, W, 3).
        boxes: (x1, y1, x2, y2) in pixels of the image, (n, 4).
        labels: index into `class_names`, -1 for padding (not drawn), -2 for a crowd region (dashed grey), (n,).
        class_names: name of each label.
        scores: printed after the names with two decimals, (n,).
        title: text in a white strip above the image.
        notes: text after each name and score, n strings.
        legend: number the boxes where they are many and their names would hide them, and list the names at the right.

    Returns:
        RGB uint8 (H, W, 3), taller by the strip if there is a title, wider by the legend if there is one.

    Raises:
        ValueError: the lengths of the arrays differ, a coordinate is NaN, or a label has no name.
    """
    _check_image(image)
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    labels = np.asarray(labels, dtype=np.int64).reshape(-1)
    if len(labels) != len(boxes) or (scores is not None and len(scores) != len(boxes)):
        counts = f"{len(boxes)} boxes, {len(labels)} labels" + ("" if scores is None else f", {len(scores)} scores")
        raise ValueError(f"cannot draw {counts}: the counts must be equal")
    for label in labels.tolist():
        if not CROWD_LABEL <= label < len(class_names):
            raise ValueError(f"label {label} has no name: there are {len(class_names)} classes")
    drawn = np.ascontiguousarray(image).copy()  # OpenCV draws only on contiguous arrays
    shown = np.flatnonzero(labels != PADDING_LABEL)
    labels, edges = labels[shown], _whole_pixels(boxes[shown], *image.shape[:2])
    line_pixels = max(1, round(0.003 * side_of(image)))

    # Crowd regions first, then by descending area, so that no small box is covered.
    areas = (edges[:, 2] - edges[:, 0]) * (edges[:, 3] - edges[:, 1])
    for index in np.lexsort((-areas, labels != CROWD_LABEL)):
        if labels[index] == CROWD_LABEL:
            _draw_dashes(drawn, edges[index], line_pixels)
        else:
            _draw_border(drawn, edges[index], class_color(int(labels[index])), line_pixels)

    # Names last, so that no border crosses them. The detection with the highest score is placed first.
    by_score = np.arange(len(shown)) if scores is None else np.argsort(-np.asarray(scores)[shown], kind="stable")
    texts, colors = [], []
    for index in by_score:
        label = int(labels[index])
        score = "" if scores is None else f" {float(scores[shown[index]]):.2f}"
        note = f" {notes[shown[index]]}" if notes is not None and notes[shown[index]] else ""
        texts.append(("crowd" if label == CROWD_LABEL else class_names[label] + score) + note)
        colors.append(CROWD_COLOR if label == CROWD_LABEL else class_color(label))
    if legend and is_crowded(image, edges[by_score], texts):
        numbers = [str(number) for number in range(1, len(texts) + 1)]
        draw_tags(drawn, edges[by_score], numbers, colors)
        drawn = draw_legend(drawn, [" ".join(pair) for pair in zip(numbers, texts, strict=True)], colors)
    else:
        draw_tags(drawn, edges[by_score], texts, colors)
    return drawn if title is None else _add_title(drawn, title)


def make_grid(images: list[np.ndarray], columns: int, padding: int = 4, background: Color = WHITE) -> np.ndarray:
    """Arrange images in a grid, row by row.

    Args:
        images: RGB uint8 (H, W, 3) each. Sizes may differ; images are centred in cells of the largest height and width.
        columns: images per row, reduced to the number of images.
        padding: pixels between cells and around the grid.
        background: colour of the padding.

    Returns:
        RGB uint8, (rows * (height + padding) + padding, columns * (width + padding) + padding, 3).

    Raises:
        ValueError: there are no images or no columns.
    """
    if not images or columns < 1 or padding < 0:
        raise ValueError(f"cannot lay out {len(images)} images in {columns} columns with padding {padding}")
    for image in images:
        _check_image(image)
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    cell_height = max(image.shape[0] for image in images)
    cell_width = max(image.shape[1] for image in images)
    grid_size = (rows * (cell_height + padding) + padding, columns * (cell_width + padding) + padding)
    grid = np.full((*grid_size, 3), background, dtype=np.uint8)
    for index, image in enumerate(images):
        height, width = image.shape[:2]
        row, column = divmod(index, columns)
        top = padding + row * (cell_height + padding) + (cell_height - height) // 2
        left = padding + column * (cell_width + padding) + (cell_width - width) // 2
        grid[top : top + height, left : left + width] = image
    return grid


def ground_truth_beside_detections(
    image: np.ndarray,
    gt_boxes: np.ndarray,
    gt_labels: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray,
    class_names: Sequence[str],
) -> np.ndarray:
    """Draw an image twice, with its ground truth on the left and with detections on the right; see `draw_boxes`."""
    gt = draw_boxes(image, gt_boxes, gt_labels, class_names, title="ground truth", legend=True)
    detections = draw_boxes(image, boxes, labels, class_names, scores, title="detections", legend=True)
    return make_grid([gt, detections], columns=2)


def save_png(path: Path, image: np.ndarray) -> None:
    """Write an RGB uint8 image (H, W, 3) atomically as PNG.

    Raises:
        OSError: the file cannot be written.
    """
    replace_file(path, _encode(image, ".png", []))


def save_jpeg(path: Path, image: np.ndarray) -> None:
    """Write an image as `save_png` does, but as JPEG: a tenth of the size for a photograph, without visible loss."""
    replace_file(path, encode_jpeg(image))


def encode_jpeg(image: np.ndarray) -> bytes:
    """Encode an RGB uint8 image (H, W, 3) as JPEG."""
    return _encode(image, ".jpg", [cv2.IMWRITE_JPEG_QUALITY, 95])


def _encode(image: np.ndarray, kind: str, options: list[int]) -> bytes:
    _check_image(image)
    # In memory, because `cv2.imwrite` returns False on failure without a reason.
    encoded, content = cv2.imencode(kind, np.ascontiguousarray(image[:, :, ::-1]), options)  # OpenCV's order is BGR
    if not encoded:
        raise OSError(f"OpenCV cannot encode an image of shape {image.shape} as {kind[1:].upper()}")
    return content.tobytes()


def _check_image(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"an image must be RGB uint8 (H, W, 3), this is {image.dtype} {image.shape}")


def _whole_pixels(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Round boxes to whole pixels inside the image, at least one pixel wide and high, (n, 4)."""
    if np.isnan(boxes).any():
        raise ValueError(f"box {boxes[np.isnan(boxes).any(axis=1)][0].tolist()} has a NaN coordinate")
    limits = np.array([width, height, width, height])
    edges: np.ndarray = np.rint(np.clip(boxes, 0, limits)).astype(np.int64)
    edges[:, :2] = np.minimum(edges[:, :2], limits[:2] - 1)
    edges[:, 2:] = np.maximum(edges[:, 2:], edges[:, :2] + 1)
    return edges


def _draw_border(image: np.ndarray, edges: np.ndarray, color: Color, line_pixels: int) -> None:
    """Draw the border of a box of whole pixels into the image, inside the box."""
    x1, y1, x2, y2 = edges
    box = image[y1:y2, x1:x2]
    box[:line_pixels] = box[-line_pixels:] = color
    box[:, :line_pixels] = box[:, -line_pixels:] = color


def _draw_dashes(image: np.ndarray, edges: np.ndarray, line_pixels: int) -> None:
    """Draw a border of half the usual width in light and dark grey dashes, one of which contrasts with any image."""
    dash_pixels = 3 + 3 * line_pixels
    x1, y1, x2, y2 = edges
    _draw_border(image, edges, CROWD_COLOR, thin := max(1, line_pixels // 2))
    box = image[y1:y2, x1:x2]
    for side in (box, box.swapaxes(0, 1)):  # both are views: the horizontal sides, then the vertical ones
        dark = np.arange(side.shape[1]) // dash_pixels % 2 == 1
        side[:thin, dark] = CROWD_DARK_COLOR
        side[-thin:, dark] = CROWD_DARK_COLOR


def _add_title(image: np.ndarray, title: str) -> np.ndarray:
    letter_pixels = 1.2 * letter_pixels_of(image)
    width, _ = size_of_tag(title, letter_pixels, image.shape[1])
    _, height = size_of_tag("gl", letter_pixels, image.shape[1])  # equal for all titles, so that panels line up
    strip = np.full((height, image.shape[1], 3), WHITE, dtype=np.uint8)
    draw_tag(strip, title, np.array([0, 0, min(width, image.shape[1]), height]), letter_pixels, WHITE)
    return np.vstack((strip, image))
