"""Box shapes at the resolution of the network input."""

from collections.abc import Sequence

import numpy as np

from detection.contract import Geometry
from detection.data.annotations import Annotations
from detection.data.augmentation.affine_and_pixels import MINIMUM_SIDE
from detection.errors import DataError

MAX_SHAPES = 1_000_000  # boxes x input sizes; above that each box is taken at one random size


def shapes_at(
    annotations: Annotations, geometry: Geometry, sizes: Sequence[int], seed: int
) -> tuple[np.ndarray, list[str]]:
    """Scale the boxes to the network input at each of several input sizes.

    Args:
        sizes: sides of the network input in pixels.
        seed: of the random choice of sizes, see `MAX_SHAPES`.

    Returns:
        (width, height) in pixels of the network input, (N, 2) float64; one line per reason for leaving boxes out.

    Raises:
        DataError: no box is left.
    """
    image_of_box = np.repeat(np.arange(len(annotations)), np.diff(annotations.first_box))
    known = np.all(annotations.image_sizes > 0, axis=1).reshape(-1)
    usable = ~annotations.crowd & known[image_of_box]
    corners = annotations.boxes[usable].astype(np.float64)
    image_sizes, kind = np.unique(annotations.image_sizes[image_of_box[usable]], axis=0, return_inverse=True)
    scales = np.array(
        [[_letterbox_scale(int(width), int(height), size, geometry) for width, height in image_sizes] for size in sizes]
    ).reshape(len(sizes), -1, 2)
    box_sizes, kind = corners[:, 2:] - corners[:, :2], kind.reshape(-1)
    if len(box_sizes) * len(sizes) <= MAX_SHAPES:
        shapes = (box_sizes * scales[:, kind]).reshape(-1, 2)
    else:
        shapes = box_sizes * scales[np.random.default_rng(seed).permutation(len(kind)) % len(sizes), kind]
    large = (shapes >= MINIMUM_SIDE).all(axis=1)
    counts = {
        "crowd regions": int(annotations.crowd.sum()),
        "boxes of images without width and height in the file": int((~annotations.crowd & ~usable).sum()),
        f"boxes narrower or lower than {MINIMUM_SIDE:g} px at the network input"
        + (f", over {len(sizes)} sizes" if len(sizes) > 1 else ""): int((~large).sum()),
    }
    left_out = [f"{count} {reason}" for reason, count in counts.items() if count]
    if not large.any():
        raise DataError(f"no box to fit anchors to ({', '.join(left_out) or 'the annotations have none'})")
    return shapes[large], left_out


def _letterbox_scale(width: int, height: int, size: int, geometry: Geometry) -> tuple[float, float]:
    box, *_ = geometry.place(width, height, size)
    return box.scale_x, box.scale_y
