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

Color = tuple[int, int, int]  # RGB, 0..255
CROWD_COLOR: Color = (160, 160, 160)  # grey; the colours of classes have at least 60 % saturation
CROWD_DARK_COLOR: Color = (60, 60, 60)
BLACK: Color = (0, 0, 0)
WHITE: Color = (255, 255, 255)

FONT = cv2.FONT_HERSHEY_SIMPLEX
SMALLEST_LETTER_PIXELS = 10  # height of a capital; OpenCV's smaller letters are illegible
LARGEST_LETTER_PIXELS = 40


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

    Returns:
        RGB uint8 (H, W, 3), taller by the strip if there is a title.

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
    line_pixels = max(1, round(0.003 * _side(image)))

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
    _draw_tags(drawn, edges[by_score], texts, colors)
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
    gt = draw_boxes(image, gt_boxes, gt_labels, class_names, title="ground truth")
    detections = draw_boxes(image, boxes, labels, class_names, scores, title="detections")
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


def _side(image: np.ndarray) -> float:
    """Return the side of the square with the image's area, to which lines and letters are proportional."""
    return math.sqrt(image.shape[0] * image.shape[1])


def _letter_pixels(image: np.ndarray) -> float:
    return min(max(SMALLEST_LETTER_PIXELS, 0.014 * _side(image)), LARGEST_LETTER_PIXELS)


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


def _text_style(text: str, letter_pixels: float, image_width: int) -> tuple[float, int, int]:
    """Return font scale, stroke thickness and margin in pixels, reduced where the text would not fit the image."""
    (unit_width, unit_height), _ = cv2.getTextSize(text, FONT, 1.0, 1)  # the fonts of OpenCV 4 and 5 differ
    margin = max(2, round(letter_pixels / 4))
    scale = letter_pixels / max(unit_height, 1)
    fitting_scale = 0.97 * (image_width - 2 * margin) / max(unit_width, 1)  # 3 % for letters rounded up to pixels
    return max(min(scale, fitting_scale), 0.1), max(1, round(letter_pixels / 12)), margin


def _tag_size(text: str, letter_pixels: float, image_width: int) -> tuple[int, int]:
    """Return the width and height in pixels of a text with its margins."""
    scale, thickness, margin = _text_style(text, letter_pixels, image_width)
    (text_width, text_height), below_baseline = cv2.getTextSize(text, FONT, scale, thickness)
    return text_width + 2 * margin, text_height + below_baseline + 2 * margin


def _draw_tags(image: np.ndarray, edges: np.ndarray, texts: list[str], colors: list[Color]) -> None:
    """Draw the names of boxes, (n, 4) in whole pixels. The first are placed first and drawn last, on top."""
    letter_pixels = _letter_pixels(image)
    places = np.zeros((0, 4), dtype=np.int64)
    for box, text in zip(edges, texts, strict=True):
        place = _place_tag(box, _tag_size(text, letter_pixels, image.shape[1]), image, places)
        places = np.vstack((places, place))
    for index in reversed(range(len(texts))):
        _draw_tag(image, texts[index], places[index], letter_pixels, colors[index])


def _place_tag(edges: np.ndarray, tag_size: tuple[int, int], image: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Choose the corner of a box, inside the image, where its name covers least.

    Args:
        edges: box in whole pixels, (4,).
        tag_size: width and height of the tag in pixels.
        image: only its size is used.
        taken: tags placed before, xyxy, (n, 4).

    Returns:
        Place of the tag, xyxy, (4,).
    """
    x1, y1, x2, y2 = edges
    width, height = min(tag_size[0], image.shape[1]), min(tag_size[1], image.shape[0])
    # In order of preference: above the box, inside its top, below, inside its bottom; at the left, then at the right.
    corners = np.array([(x, y) for x in (x1, x2 - width) for y in (y1 - height, y1, y2, y2 - height)])
    corners = np.clip(corners, 0, (image.shape[1] - width, image.shape[0] - height))
    candidates: np.ndarray = np.hstack((corners, corners + np.array((width, height))))  # (8, 4)
    covered = _overlap_areas(candidates, taken).sum(axis=1)  # pixels of other names, (8,)
    hidden = _overlap_areas(candidates, edges[None])[:, 0]  # pixels of the box itself, (8,)
    covered += np.where(hidden > (x2 - x1) * (y2 - y1) / 4, hidden, 0)  # up to a quarter of the box may be hidden
    best: np.ndarray = candidates[covered.argmin()]
    return best


def _overlap_areas(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Compute the intersection areas of boxes (n, 4) and others (m, 4) in pixels, (n, m)."""
    starts = np.maximum(boxes[:, None, :2], others[:, :2])
    ends = np.minimum(boxes[:, None, 2:], others[:, 2:])
    areas: np.ndarray = (ends - starts).clip(min=0).prod(axis=2)
    return areas


def _draw_tag(image: np.ndarray, text: str, place: np.ndarray, letter_pixels: float, color: Color) -> None:
    """Fill a tag with a colour and write on it in black or white, whichever has more contrast."""
    x1, y1, x2, y2 = (int(edge) for edge in place)
    image[y1:y2, x1:x2] = color
    # Luma weights of red, green and blue: ITU-R BT.601, section 2.5.1.
    luminance = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    scale, thickness, margin = _text_style(text, letter_pixels, image.shape[1])
    _, below_baseline = cv2.getTextSize(text, FONT, scale, thickness)
    baseline = (x1 + margin, y2 - margin - below_baseline)
    cv2.putText(image, text, baseline, FONT, scale, BLACK if luminance > 127 else WHITE, thickness, cv2.LINE_AA)


def _add_title(image: np.ndarray, title: str) -> np.ndarray:
    letter_pixels = 1.2 * _letter_pixels(image)
    width, _ = _tag_size(title, letter_pixels, image.shape[1])
    _, height = _tag_size("gl", letter_pixels, image.shape[1])  # equal for all titles, so that panels line up
    strip = np.full((height, image.shape[1], 3), WHITE, dtype=np.uint8)
    _draw_tag(strip, title, np.array([0, 0, min(width, image.shape[1]), height]), letter_pixels, WHITE)
    return np.vstack((strip, image))
