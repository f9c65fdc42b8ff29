"""Resizing and warping an image into the square of the network input."""

from typing import NamedTuple

import cv2
import numpy as np

CORNER_ALIGNED = -1  # implemented in `resize_image`: OpenCV's methods align pixel edges, not corner pixel centres
INTERPOLATIONS = {
    "linear": cv2.INTER_LINEAR,
    "area": cv2.INTER_AREA,
    "cubic": cv2.INTER_CUBIC,
    "darknet": CORNER_ALIGNED,
}

HALVED_BELOW = 0.6  # scale below which bilinear sampling misses pixels; lowest error among 0.5, 0.6, 0.67, ...


class Placed(NamedTuple):
    """A part of an image and the rectangle of the network input that it fills, before any resampling."""

    part: np.ndarray  # (height, width, 3) uint8
    left: int  # rectangle in whole pixels of the square
    top: int
    width: int
    height: int

    def matrix(self) -> np.ndarray:
        """Affine matrix from coordinates of the part to the square, (3, 3) float64; pixel k spans k to k + 1."""
        scale_x, scale_y = self.width / self.part.shape[1], self.height / self.part.shape[0]
        return np.array([[scale_x, 0, self.left], [0, scale_y, self.top], [0, 0, 1]], dtype=np.float64)


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
    to_square = matrix @ placed._replace(part=part).matrix()
    to_square[:2, 2] += to_square[:2, :2] @ (0.5, 0.5) - 0.5  # OpenCV's origin is the centre of the first pixel
    return cv2.warpAffine(
        part,
        to_square[:2],
        (size, size),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=fill,
    )


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
