"""What the assigners share: geometry of boxes and points, choosing k predictions per box, and settling conflicts.

Shapes are static and nothing is read by the host: a choice is a mask over all pairs of boxes and points, (B, G, P).
"""

import torch
from torch import Tensor

from detection.models.yolox.assigners import Assignment
from detection.models.yolox.points import Points
from detection.ops.boxes import pairwise_iou


def overlaps(boxes: Tensor, predicted: Tensor, candidate: Tensor) -> Tensor:
    """IoU of every ground-truth box and predicted box, 0 where they are no candidates.

    Args:
        boxes: xyxy in pixels, (B, G, 4).
        predicted: likewise, finite, (B, P, 4).
        candidate: (B, G, P) bool.

    Returns:
        (B, G, P) float32.
    """
    return pairwise_iou(boxes, predicted).mul_(candidate)


def offsets(boxes: Tensor, points: Points) -> tuple[Tensor, Tensor]:
    """Distance of every point from every box's centre along x and y, in pixels; (B, G, 4) to twice (B, G, P)."""
    x, y = points.centres.unbind(-1)
    centre_x, centre_y = (boxes[..., :2] + boxes[..., 2:]).mul_(0.5)[..., None].unbind(-2)  # each (B, G, 1)
    return (x - centre_x).abs_(), (y - centre_y).abs_()


def centre_distances(boxes: Tensor, points: Points) -> Tensor:
    """Larger of the two `offsets`; (B, G, 4) to (B, G, P)."""
    return torch.maximum(*offsets(boxes, points))


def points_inside(boxes: Tensor, offset: tuple[Tensor, Tensor]) -> Tensor:
    """Return which points lie strictly inside which boxes, (B, G, 4) and `offsets` to (B, G, P) bool."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).mul_(0.5)[..., None].unbind(-2)
    return (offset[0] < width).logical_and_(offset[1] < height)


def points_near(offset: tuple[Tensor, Tensor], points: Points, radius: float = 0.5) -> Tensor:
    """Return which points are within `radius` strides of a box's centre along both axes, `offsets` to (B, G, P) bool.

    With half a stride these are the cells that hold the centre, one per level for a centre inside the image.
    """
    return torch.maximum(*offset) <= points.strides * radius


def of_own_class(values: Tensor, labels: Tensor) -> Tensor:
    """Pick for every box the values of its class; (B, P, C) and (B, G) to (B, G, P)."""
    images = torch.arange(len(labels), device=labels.device)[:, None]
    return values.transpose(1, 2).contiguous()[images, labels.clamp(min=0)]


def counted_overlaps(iou: Tensor, most: int) -> Tensor:
    """Return how many predictions a box gets: the sum of its largest IoUs, rounded down, at least 1; (B, G) int64.

    Source: dynamic k of OTA, https://arxiv.org/abs/2103.14259, section 3.3, as in YOLOX.
    """
    largest = iou.topk(min(most, iou.shape[2]), dim=2).values
    return largest.sum(2).long().clamp_(min=1)


def choose(key: Tensor, most: int, count: Tensor | None = None) -> Tensor:
    """Choose for every box the predictions of the lowest key, of equal ones those that come first.

    Args:
        key: (B, G, P); infinite and undefined ones are never chosen.
        most: largest number per box.
        count: number per box, at most `most`, (B, G) int64; None: `most`.

    Returns:
        (B, G, P) bool.
    """
    most = min(most, key.shape[2])
    count = torch.full_like(key[..., 0], most, dtype=torch.int64) if count is None else count.clamp(max=most)
    return take_cheapest(key, count, most).logical_and_(key < torch.inf)


def take_cheapest(cost: Tensor, count: Tensor, most: int) -> Tensor:
    """Mark the `count` smallest values of each row, of equal values those that come first.

    Args:
        cost: (..., P).
        count: 1 to `most`, (...) int64.
        most: at most P.

    Returns:
        (..., P) bool; `count` are true in each row.
    """
    # Not the indices of topk: which of equal values it finds depends on the device.
    smallest = cost.topk(most, dim=-1, largest=False).values
    last = smallest.gather(-1, count[..., None] - 1)
    equal = cost == last
    room = count[..., None] - (smallest < last).sum(dim=-1, keepdim=True)
    return (equal.cumsum(dim=-1, dtype=torch.int32) <= room).logical_and_(equal).logical_or_(cost < last)


def settle(chosen: Tensor, key: Tensor, quality: Tensor) -> Assignment:
    """Give every prediction that several boxes chose to the one of the lowest key, of equals to the first.

    Args:
        chosen: (B, G, P) bool.
        key: (B, G, P); only boxes that chose the prediction compete.
        quality: of every pair, (B, G, P).
    """
    gt = key.masked_fill(~chosen, torch.inf).min(dim=1).indices  # of equals the first, as `argmin`, which is slower
    positive = chosen.any(dim=1)
    return take_quality(positive, gt, quality)


def take_quality(positive: Tensor, gt: Tensor, quality: Tensor) -> Assignment:
    """Make an assignment.

    Args:
        positive: (B, P) bool.
        gt: row of the assigned box, any where not positive, (B, P) int64.
        quality: of every pair of box and prediction, finite, (B, G, P).
    """
    gt = gt * positive
    return Assignment(positive, gt, quality.gather(1, gt[:, None]).squeeze(1) * positive)
