"""Placement of an image in the network input."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from detection.ops.boxes import clip_boxes

Placement = Literal["letterbox", "top_left", "squash"]


@dataclass(frozen=True)
class Letterbox:
    """Placement of an image in the network input: scaled, then moved right and down by the padding.

    Attributes:
        scale_x, scale_y: network pixels per original pixel; equal up to rounding if the aspect ratio is kept.
        left, top: padding in network pixels.
        width, height: size of the original image in pixels.
    """

    scale_x: float
    scale_y: float
    left: int
    top: int
    width: int
    height: int

    def to_input(self, boxes_orig: Tensor) -> Tensor:
        """Map boxes (N, 4) xyxy from original pixels to network pixels."""
        return boxes_orig * self._scales(boxes_orig) + self._offsets(boxes_orig)

    def to_original(self, boxes: Tensor) -> Tensor:
        """Map boxes (N, 4) xyxy from network pixels to original pixels. Inverse of `to_input`; not clipped."""
        return (boxes - self._offsets(boxes)) / self._scales(boxes)

    def _scales(self, like: Tensor) -> Tensor:
        return like.new_tensor([self.scale_x, self.scale_y, self.scale_x, self.scale_y])

    def _offsets(self, like: Tensor) -> Tensor:
        return like.new_tensor([self.left, self.top, self.left, self.top])


def place_image(
    width: int, height: int, size: int, placement: Placement = "letterbox", rounding: str = "nearest"
) -> tuple[Letterbox, int, int]:
    """Place an image of (width, height) in a square of `size` pixels.

    Args:
        placement: "letterbox" (aspect ratio kept, centred), "top_left" (aspect ratio kept) or "squash" (each side to
            `size`).
        rounding: of the shorter side to whole pixels, "nearest" or "down" (Darknet).

    Returns:
        The letterbox and the resized width and height in pixels.

    Source: "down": letterbox_image in src/image.c of https://github.com/pjreddie/darknet
    """
    longest = max(width, height)
    if placement == "squash":
        new_width = new_height = size
    elif rounding == "down":
        new_width, new_height = max(width * size // longest, 1), max(height * size // longest, 1)
    else:
        scale = size / longest
        new_width, new_height = max(round(width * scale), 1), max(round(height * scale), 1)
    left, top = (0, 0) if placement == "top_left" else ((size - new_width) // 2, (size - new_height) // 2)
    return Letterbox(new_width / width, new_height / height, left, top, width, height), new_width, new_height


def boxes_to_original(boxes: Tensor, letterbox: Letterbox) -> Tensor:
    """Map boxes (K, 4) xyxy from network pixels to original pixels and clip them to the image."""
    return clip_boxes(letterbox.to_original(boxes), letterbox.width, letterbox.height)
