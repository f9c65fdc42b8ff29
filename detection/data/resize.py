"""Resizing and warping an image into the square of the network input."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

CORNER_ALIGNED = -1  # implemented in `resize_image`: OpenCV's methods align pixel edges, not corner pixel centres
INTERPOLATIONS = {
    "linear": cv2.INTER_LINEAR,
    "area": cv2.INTER_AREA,
    "cubic": cv2.INTER_CUBIC,
    "darknet": CORNER_ALIGNED,
    "nearest": cv2.INTER_NEAREST,
    "lanczos": cv2.INTER_LANCZOS4,
}
WARPS = (cv2.INTER_NEAREST, cv2.INTER_CUBIC, cv2.INTER_LANCZOS4)  # of these, what a warp can do itself

HALVED_BELOW = 0.6  # scale below which bilinear sampling misses pixels; lowest error among 0.5, 0.6, 0.67, ...
MASK_BITS = 4  # binary places of the corners of a tile's outline
MASK_UNIT = 2**MASK_BITS


class Placed(NamedTuple):
    """A part of an image and the rectangle of the network input that it fills, before any resampling."""

    part: np.ndarray  # (height, width, 3) uint8
    left: int  # rectangle in whole pixels of the square
    top: int
    width: int
    height: int

    def matrix(self) -> np.ndarray:
        """Affine matrix from coordinates of the part to the square, (3, 3) float64; pixel k spans k to k + 1."""
        return rectangle_matrix(self.part, *self[1:])


def rectangle_matrix(part: np.ndarray, left: float, top: float, width: float, height: float) -> np.ndarray:
    """Affine matrix that maps an image onto a rectangle, (3, 3) float64; pixel k spans k to k + 1."""
    return np.array([[width / part.shape[1], 0, left], [0, height / part.shape[0], top], [0, 0, 1]], dtype=np.float64)


def resize_placed(placed: Placed, size: int, fill: tuple[int, int, int], interpolation: int) -> np.ndarray:
    """Resize the part onto its rectangle and fill the rest of the square, (size, size, 3) uint8."""
    part, left, top, width, height = placed
    image = resize_image(part, width, height, interpolation)
    if (width, height) == (size, size):
        return image
    right, bottom = size - width - left, size - height - top
    return cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_CONSTANT, value=fill)


def warp_placed(placed: Placed, matrix: np.ndarray, size: int, fill: tuple[int, int, int]) -> np.ndarray:
    """Apply `resize_placed` and an affine matrix with a single bilinear resampling, (size, size, 3) uint8.

    A part that shrinks much is first halved by area averaging as often as needed, to avoid aliasing.

    Args:
        matrix: affine from square to square, (3, 3); pixel k spans k to k + 1.
    """
    part = placed.part
    while min(part.shape[:2]) > 1:
        to_square = matrix @ placed._replace(part=part).matrix()
        if abs(np.linalg.det(to_square[:2, :2])) >= HALVED_BELOW**2:
            break
        part = cv2.resize(part, (part.shape[1] // 2, part.shape[0] // 2), interpolation=cv2.INTER_AREA)
    return cv2.warpAffine(
        part,
        _opencv_matrix(matrix @ placed._replace(part=part).matrix()),
        (size, size),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=fill,
    )


def warp_tiles(
    tiles: Sequence[Placed],
    bounds: tuple[int, int],
    matrix: np.ndarray,
    size: int,
    fill: tuple[int, int, int],
    interpolation: int = cv2.INTER_LINEAR,
) -> np.ndarray:
    """Show several images side by side through an affine matrix, each sampled once, (size, size, 3) uint8.

    A tile ends within a pixel of its exact outline.

    Args:
        tiles: their rectangles may exceed the square.
        bounds: first and last coordinate, of both axes, that is shown; whatever of a tile lies beyond is cut off.
        matrix: affine from the coordinates of the tiles to the square, (3, 3).
        interpolation: one of `WARPS`; all others are bilinear, with halving as in `warp_placed`.
    """
    image = np.empty((size, size, 3), np.uint8)
    image.reshape(size, -1)[:] = np.tile(np.array(fill, np.uint8), size)
    flags = interpolation if interpolation in WARPS else cv2.INTER_LINEAR
    inverse = np.linalg.inv(matrix)
    for part, left, top, width, height in tiles:
        # Of the tile inside the bounds, the rectangle of the square that encloses it.
        inside = max(left, bounds[0]), max(top, bounds[0]), min(left + width, bounds[1]), min(top + height, bounds[1])
        outline = _corners(inside, matrix)
        x1, y1, x2, y2 = _whole(_enclosing(outline), size, size)
        # And of the image only as much as that shows.
        shown = _enclosing(_corners((x1, y1, x2, y2), inverse))
        seen = max(inside[0], shown[0]), max(inside[1], shown[1]), min(inside[2], shown[2]), min(inside[3], shown[3])
        if x1 >= x2 or y1 >= y2 or seen[0] >= seen[2] or seen[1] >= seen[3]:
            continue
        scale_x, scale_y = part.shape[1] / width, part.shape[0] / height  # pixels of the image per pixel of the tile
        factor = 2 ** _halvings(matrix, scale_x * scale_y) if flags == cv2.INTER_LINEAR else 1
        margin_x, margin_y = 2 * max(scale_x, factor), 2 * max(scale_y, factor)
        source = (
            (seen[0] - left) * scale_x - margin_x,
            (seen[1] - top) * scale_y - margin_y,
            (seen[2] - left) * scale_x + margin_x,
            (seen[3] - top) * scale_y + margin_y,
        )
        # Whole multiples of the factor: OpenCV averages others an order of magnitude slower.
        u1, v1, u2, v2 = (place * factor for place in _whole(source, part.shape[1], part.shape[0], factor))
        if u1 < u2 and v1 < v2:
            part = part[v1:v2, u1:u2]
        else:  # thinner than the factor
            u1, v1, v2, u2, factor = 0, 0, *part.shape[:2], 1
        rectangle = left + u1 / scale_x, top + v1 / scale_y, (u2 - u1) / scale_x, (v2 - v1) / scale_y
        if factor > 1:
            part = cv2.resize(part, ((u2 - u1) // factor, (v2 - v1) // factor), interpolation=cv2.INTER_AREA)
        to_square = _opencv_matrix(matrix @ rectangle_matrix(part, *rectangle))
        to_square[:, 2] -= x1, y1
        warped = cv2.warpAffine(part, to_square, (x2 - x1, y2 - y1), flags=flags, borderMode=cv2.BORDER_REPLICATE)
        mask = np.zeros(warped.shape[:2], np.uint8)
        places = [[round((x - x1 - 0.5) * MASK_UNIT), round((y - y1 - 0.5) * MASK_UNIT)] for x, y in outline]
        cv2.fillConvexPoly(mask, np.array(places, np.int32), 255, shift=MASK_BITS)
        cv2.copyTo(warped, mask, image[y1:y2, x1:x2])
    return image


def _corners(rectangle: Sequence[float], matrix: np.ndarray) -> list[tuple[float, float]]:
    """The four corners of a rectangle (x1, y1, x2, y2) after an affine (3, 3), going round."""
    x1, y1, x2, y2 = rectangle
    (a, b, c), (d, e, f) = matrix[:2].tolist()
    return [(a * x + b * y + c, d * x + e * y + f) for x, y in ((x1, y1), (x2, y1), (x2, y2), (x1, y2))]


def _enclosing(corners: Sequence[tuple[float, float]]) -> tuple[float, float, float, float]:
    columns, rows = zip(*corners, strict=True)
    return min(columns), min(rows), max(columns), max(rows)


def _whole(rectangle: Sequence[float], width: int, height: int, unit: int = 1) -> tuple[int, int, int, int]:
    """Extend a rectangle to whole units of `unit` pixels inside (width, height)."""
    x1, y1, x2, y2 = rectangle
    first = max(math.floor(x1 / unit), 0), max(math.floor(y1 / unit), 0)
    return *first, min(math.ceil(x2 / unit), width // unit), min(math.ceil(y2 / unit), height // unit)


def _halvings(matrix: np.ndarray, pixels: float) -> int:
    """How often to halve an image of so many pixels per unit of area before an affine matrix shows it."""
    area = abs(matrix[0, 0] * matrix[1, 1] - matrix[0, 1] * matrix[1, 0]) / pixels
    return max(math.ceil(math.log(HALVED_BELOW**2 / area, 4)), 0)


def _opencv_matrix(matrix: np.ndarray) -> np.ndarray:
    """OpenCV's (2, 3) of an affine matrix (3, 3): its origin is the centre of the first pixel."""
    matrix[:2, 2] += matrix[:2, :2] @ (0.5, 0.5) - 0.5
    return matrix[:2]


def resize_image(image: np.ndarray, width: int, height: int, interpolation: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 to (height, width, 3); `interpolation` is a value of INTERPOLATIONS."""
    if (width, height) == (image.shape[1], image.shape[0]):
        return image
    if interpolation != CORNER_ALIGNED:
        return cv2.resize(image, (width, height), interpolation=interpolation)
    columns = cv2.transpose(_blend_rows(image, height))
    return cv2.transpose(np.rint(_blend_rows(columns, width)).astype(np.uint8))


def _blend_rows(image: np.ndarray, count: int) -> np.ndarray:
    """Interpolate (H, W, 3) linearly to `count` rows from the first to the last, float32.

    source = row * (H - 1) / (count - 1); a single row is the last one.

    cv2.warpAffine takes a third of the time, but its sample positions are rounded to 1/32 of a pixel before OpenCV 5.

    Source: resize_image in src/image.c of https://github.com/pjreddie/darknet; differs: a single row is undefined
    there (a division by zero), a single column is the last one.
    """
    last = len(image) - 1
    source = np.arange(count) * (last / (count - 1)) if count > 1 else np.full(1, float(last))
    above = np.minimum(source.astype(np.int64), last)
    share = (source - above).astype(np.float32)[:, None, None]
    blended = np.take(image, above, axis=0).astype(np.float32)
    blended += (np.take(image, np.minimum(above + 1, last), axis=0) - blended) * share
    return blended
