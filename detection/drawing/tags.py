"""Names on boxes: coloured tags placed where they hide least, or numbers with a legend beside the image."""

import math

import cv2
import numpy as np

Color = tuple[int, int, int]  # RGB, 0..255
BLACK: Color = (0, 0, 0)
WHITE: Color = (255, 255, 255)

FONT = cv2.FONT_HERSHEY_SIMPLEX
SMALLEST_LETTER_PIXELS = 10  # height of a capital; OpenCV's smaller letters are illegible
LARGEST_LETTER_PIXELS = 40

CROWD_FROM = 10  # boxes; names of fewer find a place beside them
NARROWEST_LEGEND = 320  # pixels; a legend is at most as wide as this or the image
GAP = 4  # pixels between image, columns and rows of a legend


def is_crowded(image: np.ndarray, edges: np.ndarray, texts: list[str]) -> bool:
    """Whether the boxes (n, 4) are many and most are smaller than twice the tag with their name."""
    if len(texts) < CROWD_FROM:
        return False
    letter_pixels = letter_pixels_of(image)
    tags = np.array([size_of_tag(text, letter_pixels, image.shape[1]) for text in texts]).prod(axis=1)
    boxes = (edges[:, 2:] - edges[:, :2]).prod(axis=1)
    return bool((boxes < 2 * tags).mean() > 0.5)


def draw_legend(image: np.ndarray, texts: list[str], colors: list[Color]) -> np.ndarray:
    """Return the image with its texts as rows in columns at its right; the last row counts those without room."""
    letter_pixels = letter_pixels_of(image)
    limit = max(image.shape[1], NARROWEST_LEGEND)
    width, height = np.array([size_of_tag(text, letter_pixels, limit) for text in texts]).max(axis=0).tolist()
    rows = max(1, image.shape[0] // (height + GAP))
    columns = min(math.ceil(len(texts) / rows), max(1, limit // (width + GAP)))
    if len(texts) > rows * columns:
        left_out = len(texts) - rows * columns + 1
        texts, colors = [*texts[:-left_out], f"{left_out} more"], [*colors[:-left_out], WHITE]
    panel = np.full((image.shape[0], GAP + columns * (width + GAP), 3), WHITE, np.uint8)
    for number, (text, color) in enumerate(zip(texts, colors, strict=True)):
        column, row = divmod(number, rows)
        x, y = GAP + column * (width + GAP), row * (height + GAP)
        draw_tag(panel, text, np.array([x, y, x + width, min(y + height, len(panel))]), letter_pixels, color)
    return np.hstack((image, panel))


def side_of(image: np.ndarray) -> float:
    """Return the side of the square with the image's area, to which lines and letters are proportional."""
    return math.sqrt(image.shape[0] * image.shape[1])


def letter_pixels_of(image: np.ndarray) -> float:
    """Height of letters in pixels that suits an image (H, W, 3)."""
    return min(max(SMALLEST_LETTER_PIXELS, 0.014 * side_of(image)), LARGEST_LETTER_PIXELS)


def _text_style(text: str, letter_pixels: float, image_width: int) -> tuple[float, int, int]:
    """Return font scale, stroke thickness and margin in pixels, reduced where the text would not fit the image."""
    (unit_width, unit_height), _ = cv2.getTextSize(text, FONT, 1.0, 1)  # the fonts of OpenCV 4 and 5 differ
    margin = max(2, round(letter_pixels / 4))
    scale = letter_pixels / max(unit_height, 1)
    fitting_scale = 0.97 * (image_width - 2 * margin) / max(unit_width, 1)  # 3 % for letters rounded up to pixels
    return max(min(scale, fitting_scale), 0.1), max(1, round(letter_pixels / 12)), margin


def size_of_tag(text: str, letter_pixels: float, image_width: int) -> tuple[int, int]:
    """Return the width and height in pixels of a text with its margins."""
    scale, thickness, margin = _text_style(text, letter_pixels, image_width)
    (text_width, text_height), below_baseline = cv2.getTextSize(text, FONT, scale, thickness)
    return text_width + 2 * margin, text_height + below_baseline + 2 * margin


def draw_tags(image: np.ndarray, edges: np.ndarray, texts: list[str], colors: list[Color]) -> None:
    """Draw the names of boxes, (n, 4) in whole pixels. The first are placed first and drawn last, on top."""
    letter_pixels = letter_pixels_of(image)
    places = np.zeros((0, 4), dtype=np.int64)
    for box, text in zip(edges, texts, strict=True):
        place = _place_tag(box, size_of_tag(text, letter_pixels, image.shape[1]), image, places)
        places = np.vstack((places, place))
    for index in reversed(range(len(texts))):
        draw_tag(image, texts[index], places[index], letter_pixels, colors[index])


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


def draw_tag(image: np.ndarray, text: str, place: np.ndarray, letter_pixels: float, color: Color) -> None:
    """Fill a tag with a colour and write on it in black or white, whichever has more contrast."""
    x1, y1, x2, y2 = (int(edge) for edge in place)
    image[y1:y2, x1:x2] = color
    # Luma weights of red, green and blue: ITU-R BT.601, section 2.5.1.
    luminance = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    scale, thickness, margin = _text_style(text, letter_pixels, image.shape[1])
    _, below_baseline = cv2.getTextSize(text, FONT, scale, thickness)
    baseline = (x1 + margin, y2 - margin - below_baseline)
    cv2.putText(image, text, baseline, FONT, scale, BLACK if luminance > 127 else WHITE, thickness, cv2.LINE_AA)
