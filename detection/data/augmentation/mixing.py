"""Mosaic and mixup: an image is put together with other images of its neighbourhood in the epoch's order.

What is drawn here are places, not pixels: a layer says where images lie in a frame, and `Augmentation` samples every
image once, through its place, the affine and the flips together.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from detection.config.augmentation import AugmentationSettings
from detection.contract import Geometry
from detection.data.augmentation.crop_and_scale import RandomPlacement, Rectangle, place_view
from detection.data.resize import Placed
from detection.runtime.reproducibility import sample_stream

# Random streams of an image; unlike 0 and those in crop_and_scale.py, color.py and transforms.py.
MOSAIC_STREAM, MIXUP_STREAM = 6, 7
TILES = 4  # images of a mosaic


class Annotated(NamedTuple):
    """A decoded image with its boxes."""

    image: np.ndarray  # (H, W, 3) uint8 RGB
    boxes: np.ndarray  # (G, 4) float32 xyxy, pixels of the image
    labels: np.ndarray  # (G,) int64: class, or -2 crowd


Partners = Callable[[np.random.Generator, int], Sequence[Annotated]]  # so many other images, drawn by the generator


class Layer(NamedTuple):
    """Images in a frame, whose coordinates are those of the network input before the affine and the flips."""

    tiles: Sequence[Placed]
    boxes: np.ndarray  # (G, 4) float32 xyxy in the frame
    labels: np.ndarray  # (G,)
    bounds: tuple[int, int] | None = None  # first and last coordinate of the frame, on both axes; None: the square
    share: float = 1.0  # of the pixels
    matrix: np.ndarray | None = None  # affine from the frame to the square, (3, 3), instead of the random one


def has_mixing(augmentation: AugmentationSettings) -> bool:
    """Whether `Mixing` has anything to do."""
    return max(augmentation.mosaic.p, augmentation.mixup.p) > 0


class Mixing:
    """Draws mosaics and mixup.

    Args:
        settings: settings of all transforms.
        geometry: geometry of the detector.
        seed: seed of the run.
        placement: places an image that is no mosaic; None: the letterbox.
    """

    def __init__(
        self, settings: AugmentationSettings, geometry: Geometry, seed: int, placement: RandomPlacement | None
    ) -> None:
        self.settings, self.geometry, self.seed, self.placement = settings, geometry, seed, placement

    def __call__(self, own: Annotated, index: int, epoch: int, size: int, partners: Partners) -> list[Layer] | None:
        """Draw what an image is put together with.

        Returns:
            One layer, two with mixup; None: the image stays alone.
        """
        mosaic, mixup = self.settings.mosaic, self.settings.mixup
        base: Layer | None = None
        if mosaic.p and (generator := sample_stream(self.seed, epoch, index, MOSAIC_STREAM)).random() < mosaic.p:
            centre = (generator.uniform(*mosaic.centre, 2) * size).astype(int).tolist()
            images = [own, *partners(generator, TILES - 1)]
            base = lay_mosaic(images, centre, self.geometry, size, self.settings.min_visibility)
        if not mixup.p or (generator := sample_stream(self.seed, epoch, index, MIXUP_STREAM)).random() >= mixup.p:
            return None if base is None else [base]
        (other,) = partners(generator, 1)
        if mixup.beta is None:
            scale, mirrored = generator.uniform(*mixup.scale), generator.random() < 0.5
            top = lay_jittered(other, self.geometry, size, scale, mirrored, generator.random(2))
            base = base or self.lay_alone([own], size, epoch, index)[0]
            return [base._replace(share=0.5), top]
        share = generator.beta(mixup.beta, mixup.beta)
        if base is None:
            base, top = self.lay_alone([own, other], size, epoch, index)
        else:
            (top,) = self.lay_alone([other], size, epoch, index, plain=True)
        return [base._replace(share=share), top._replace(share=1 - share)]

    def lay_alone(
        self, images: Sequence[Annotated], size: int, epoch: int, index: int, plain: bool = False
    ) -> list[Layer]:
        """Place images whose upper left corners lie on one another, a layer each, as a single image is placed.

        Args:
            plain: in the letterbox, whatever the settings of the placement.
        """
        height, width = np.max([image.shape[:2] for image, _, _ in images], axis=0).tolist()
        boxes, labels = (np.concatenate([image[part] for image in images]) for part in (1, 2))
        if self.placement is None or plain:
            letterbox, inner_width, inner_height = self.geometry.place(width, height, size)
            view, inside = Rectangle(0, 0, width, height), np.ones(len(boxes), bool)
            target = Rectangle(letterbox.left, letterbox.top, inner_width, inner_height)
            least = 0.0
        else:
            view, inside = self.placement.draw_view(width, height, boxes, labels, epoch, index)
            view, target = self.placement.draw_target(view, size, epoch, index)
            least = self.settings.min_visibility
        layers = []
        for number, (image, boxes, labels) in enumerate(images):
            kept = inside[sum(len(earlier.labels) for earlier in images[:number]) :][: len(labels)]
            if view.left >= image.shape[1] or view.top >= image.shape[0]:  # a crop of the larger image alone
                layers.append(Layer((), np.zeros((0, 4), np.float32), labels[:0]))
                continue
            placed, visible, moved = place_view(image, boxes, view, target, size)
            kept = kept & (visible > 0) & (visible >= least)
            layers.append(Layer((placed,), moved[kept], labels[kept]))
        return layers


def lay_mosaic(
    images: Sequence[Annotated], centre: Sequence[int], geometry: Geometry, size: int, min_visibility: float
) -> Layer:
    """Lay four images around a point: each as large as in the letterbox, with one corner there.

    The frame is a canvas of twice the side, whose middle is the network input; what lies beyond it is cut off.

    Args:
        images: upper left, upper right, lower left, lower right.
        centre: x, y of the point in whole pixels of the canvas.
        min_visibility: share of a box's area that must lie inside the canvas.

    Source: MosaicDetection of https://github.com/Megvii-BaseDetection/YOLOX (Apache-2.0). Differs: there the network
    input is the upper left quarter of the canvas unless the affine moves it.
    """
    bounds = -(size // 2), 2 * size - size // 2
    tiles, moves, limits = [], [], []
    for number, (image, _, _) in enumerate(images):
        letterbox, width, height = geometry.place(image.shape[1], image.shape[0], size)
        left = bounds[0] + centre[0] - (width if number % 2 == 0 else 0)
        top = bounds[0] + centre[1] - (height if number < TILES / 2 else 0)
        tiles.append(Placed(image, left, top, width, height))
        moves.append([[letterbox.scale_x, letterbox.scale_y] * 2, [left, top] * 2])
        inside = np.clip([left, top, left + width, top + height], *bounds).tolist()
        limits.append([inside[:2] * 2, inside[2:] * 2])
    rows = np.repeat(np.arange(TILES), [len(labels) for _, _, labels in images])  # the tile of each box
    scale, offset = np.array(moves, np.float64).transpose(1, 0, 2)[:, rows]
    first, end = np.array(limits).transpose(1, 0, 2)[:, rows]
    placed = np.concatenate([boxes for _, boxes, _ in images]) * scale + offset
    seen = np.clip(placed, first, end)
    area, seen_area = ((sides[:, 2:] - sides[:, :2]).prod(axis=1) for sides in (placed, seen))
    kept = (seen_area > 0) & (seen_area >= min_visibility * area)
    labels = np.concatenate([labels for _, _, labels in images])[kept]
    return Layer(tiles, seen[kept].astype(np.float32), labels, bounds)


def lay_jittered(
    other: Annotated, geometry: Geometry, size: int, scale: float, mirrored: bool, place: np.ndarray
) -> Layer:
    """Lay YOLOX's second image of a mixup: its letterbox, scaled, perhaps mirrored, at a random place; half the pixels.

    Args:
        scale: of the letterboxed square.
        place: x, y: share of the free or excess length that lies before the square.

    Source: MosaicDetection.mixup of https://github.com/Megvii-BaseDetection/YOLOX (Apache-2.0). Differs: a smaller
    square lies anywhere, not at the upper left, and the rest is the fill, not black.
    """
    letterbox, width, height = geometry.place(other.image.shape[1], other.image.shape[0], size)
    boxes = other.boxes * ([letterbox.scale_x, letterbox.scale_y] * 2) + ([letterbox.left, letterbox.top] * 2)
    left, top = place * (size - scale * size)
    matrix = np.array([[scale, 0, left], [0, scale, top], [0, 0, 1]])
    if mirrored:
        matrix[0] = -scale, 0, left + scale * size
    tile = Placed(other.image, letterbox.left, letterbox.top, width, height)
    return Layer((tile,), boxes.astype(np.float32), other.labels, share=0.5, matrix=matrix)
