"""Tiles: overlapping parts of an image that is much larger than the network input, and one set of boxes from theirs."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from detection.errors import SettingsError
from detection.ops.nms import grouped_nms

Region = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the image

DEFAULT_OVERLAP = "0.2"
BORDER_SHARE = 0.02  # of a tile's side: a box this near to an inner border is taken as cut off there
COVERED = 0.7  # share of a cut box inside a whole one, from which the two are one object
WEAKEST = 0.5  # score of that whole box relative to the cut one's


@dataclass(frozen=True)
class Tiling:
    """Cuts images into overlapping squares of `size` pixels; neighbours share at least `overlap` pixels."""

    size: int
    overlap: int

    def regions(self, width: int, height: int) -> list[Region]:
        """Return the whole image and its tiles, all of full size where the image allows it; one region if it fits."""
        columns, rows = self._starts(width), self._starts(height)
        whole = (0, 0, width, height)
        if len(columns) * len(rows) == 1:
            return [whole]
        tiles = [(x, y, min(x + self.size, width), min(y + self.size, height)) for y in rows for x in columns]
        return [whole, *tiles]

    def _starts(self, length: int) -> list[int]:
        """Spread the tiles of one axis evenly over it."""
        count = max(math.ceil((length - self.overlap) / (self.size - self.overlap)), 1)
        return [round(number * (length - self.size) / (count - 1)) for number in range(count)] if count > 1 else [0]

    def describe(self) -> str:
        """Format the tiling for the header of an evaluation."""
        return f"tiles of {self.size} px that share {self.overlap} px, and the whole image"


def read_tiling(size: int | None, overlap: str | None) -> Tiling | None:
    """Read --tiles SIZE and --overlap PIXELS_OR_SHARE; None without --tiles.

    Args:
        overlap: pixels as a whole number, or a share of the size as a number below 1; None: `DEFAULT_OVERLAP`.

    Raises:
        SettingsError: an impossible value, or --overlap without --tiles.
    """
    if size is None:
        if overlap is not None:
            raise SettingsError(f"--overlap {overlap}: belongs to --tiles SIZE")
        return None
    text = DEFAULT_OVERLAP if overlap is None else overlap
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    pixels = round(value * size) if 0 <= value < 1 else value
    # More than half makes tiles that others cover entirely.
    if not 0 <= pixels <= size / 2 or pixels != int(pixels):
        raise SettingsError(
            f"--overlap {text}: must be a share of the tile from 0 to 0.5, or whole pixels up to half of --tiles {size}"
        )
    return Tiling(size, int(pixels))


def merge_tiles(
    regions: list[Region],
    found: list[dict[str, Tensor]],
    image_size: tuple[int, int],
    iou_threshold: float,
    max_detections: int | None,
) -> dict[str, Tensor]:
    """Merge the detections of the regions of one image.

    A tile's border cuts objects, and the cut box overlaps the whole one too little for NMS. So before class-wise NMS
    - a box that ends at an inner border of its tile, or comes from the whole image, is dropped if another tile holds it
      clear of its own inner borders: that tile sees more of the object, or sees it larger;
    - what is left of the cut boxes is dropped if a box that no border cuts, of the class and at least half the score,
      covers most of it: the whole image sees objects that are larger than the overlap.

    Args:
        regions: of `Tiling.regions`: the whole image first.
        found: boxes (K, 4) xyxy in pixels of the image, scores and labels (K,) of each region.
        image_size: width and height.
        iou_threshold, max_detections: of the NMS; `max_detections` per class.

    Returns:
        As one entry of `found`, by falling score.
    """
    boxes, scores, labels = (torch.cat([part[name] for part in found]) for name in ("boxes", "scores", "labels"))
    origin = torch.arange(len(regions)).repeat_interleave(torch.tensor([len(part["scores"]) for part in found]))
    inner = inner_borders(regions, image_size)
    cut = ~_clear(boxes, inner[origin])
    seen_whole = _clear(boxes[:, None], inner[None, 1:])  # (K, tiles); the whole image is no tile
    dropped = (cut | (origin == 0)) & seen_whole.any(dim=1)
    piece, entire = (cut & ~dropped).nonzero()[:, 0], (~cut & ~dropped).nonzero()[:, 0]
    common = (
        torch.minimum(boxes[piece, None, 2:], boxes[entire, 2:])
        - torch.maximum(boxes[piece, None, :2], boxes[entire, :2])
    ).clamp(min=0)
    area = (boxes[piece, 2:] - boxes[piece, :2]).prod(dim=1, keepdim=True)
    covers = (
        (common.prod(dim=2) >= COVERED * area)
        & (labels[piece, None] == labels[entire])
        & (scores[entire] >= WEAKEST * scores[piece, None])
    )
    dropped[piece[covers.any(dim=1)]] = True
    left = (~dropped).nonzero()[:, 0]
    kept = left[grouped_nms(boxes[left], scores[left], labels[left], iou_threshold, max_detections)]
    kept = kept[scores[kept].argsort(descending=True, stable=True)]
    return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}


def inner_borders(regions: list[Region], image_size: tuple[int, int]) -> Tensor:
    """Borders that a box must stay clear of, (regions, 4); infinite where a region ends with the image."""
    width, height = image_size
    borders = torch.tensor(regions, dtype=torch.float32)
    margin = BORDER_SHARE * (borders[:, 2:] - borders[:, :2]).max(dim=1, keepdim=True).values
    borders[:, :2] += margin
    borders[:, 2:] -= margin
    ends = torch.tensor([[x1 == 0, y1 == 0, x2 == width, y2 == height] for x1, y1, x2, y2 in regions])
    return borders.masked_fill(ends, math.inf) * torch.where(ends & torch.tensor([True, True, False, False]), -1, 1)


def _clear(boxes: Tensor, borders: Tensor) -> Tensor:
    """Return whether boxes (..., 4) lie within the borders (..., 4)."""
    return (boxes[..., :2] > borders[..., :2]).all(dim=-1) & (boxes[..., 2:] < borders[..., 2:]).all(dim=-1)
