"""How an image is laid into the network input, and back; exact inverses."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from detection.ops.boxes import clip_boxes

Placement = Literal["letterbox", "top_left", "squash"]


@dataclass(frozen=True)
class Letterbox:
    """How an image was laid into the network input: scaled, then moved right and down by the padding.

    Attributes:
        scale_x, scale_y: network pixels per original pixel; equal but for rounding to whole pixels when aspect is kept.
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
        """Boxes (N, 4) xyxy from original pixels to network pixels."""
        return boxes_orig * self._scales(boxes_orig) + self._offsets(boxes_orig)

    def to_original(self, boxes: Tensor) -> Tensor:
        """Boxes (N, 4) xyxy from network pixels to original pixels, exact inverse of `to_input`; not clipped."""
        return (boxes - self._offsets(boxes)) / self._scales(boxes)

    def _scales(self, like: Tensor) -> Tensor:
        return like.new_tensor([self.scale_x, self.scale_y, self.scale_x, self.scale_y])

    def _offsets(self, like: Tensor) -> Tensor:
        return like.new_tensor([self.left, self.top, self.left, self.top])


def place_image(
    width: int, height: int, size: int, placement: Placement = "letterbox", rounding: str = "nearest"
) -> tuple[Letterbox, int, int]:
    """Where an image of (width, height) lies in a square of `size`, and its new width and height.

    Args:
        placement: "letterbox" (aspect kept, centred), "top_left" (aspect kept) or "squash" (each side to `size`).
        rounding: of the shorter side to whole pixels, "nearest" or "down", as Darknet does it.

    Source: letterbox_image in src/image.c of https://github.com/pjreddie/darknet for "down"
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
    """Detections from network pixels to original pixels, cut to the image; (K, 4) to (K, 4)."""
    return clip_boxes(letterbox.to_original(boxes), letterbox.width, letterbox.height)
