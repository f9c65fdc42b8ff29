"""Exact greedy NMS within groups of boxes (a class of an image), faster than a call of torchvision's `nms` per group.

Every path compares the float32 IoU, intersection / (area_1 + area_2 - intersection), that torchvision's `nms` computes
for a single group. torchvision's `batched_nms` shifts the groups apart by the largest coordinate instead, which changes
the rounding: one huge box leaves the others no significant digits.

Three paths, chosen by measurement (`benchmarks.nms`): on the CPU all pairs of small groups at once and a call of `nms`
for each large group; on CUDA all groups together. A call per group takes 5 to 13 times as long for the hundreds of
boxes of one image.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import nms

SMALL_GROUP = 64  # boxes; up to this size all pairs at once are faster on the CPU than a call of `nms`
FIRST_SHARE, GROWTH = 4, 4  # of a large group the best 4 * max_per_group boxes are tried first, then 4 times as many
BLOCK = 256  # boxes per group that an accelerator compares at once
PAIRS_AT_A_TIME_CPU, PAIRS_AT_A_TIME = 2**17, 2**23  # about 100 bytes each


def grouped_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, max_per_group: int | None = None
) -> Tensor:
    """Return the indices of the boxes to keep, by ascending group and falling score; equal scores by ascending index.

    A box is removed if a kept box of its group with a higher score overlaps it by more than the threshold. Boxes of
    lower score cannot change that, so a group is searched only until `max_per_group` boxes are kept.

    Args:
        boxes: (N, 4) xyxy; non-finite ones neither remove others nor are removed.
        scores: (N,), no NaN.
        groups: (N,) int64, 0 or more.
        iou_threshold: largest IoU of two kept boxes.
        max_per_group: number of boxes kept per group; None: all.

    Returns:
        (K,) int64.
    """
    boxes = boxes.float()
    if boxes.is_cuda:
        order = scores.argsort(descending=True, stable=True)
        order = order[groups[order].argsort(stable=True)]
        return order[_nms_on_device(boxes[order], groups[order].bincount(), iou_threshold, max_per_group)]
    order_array = np.argsort(-scores.numpy(), kind="stable")
    sorted_groups = groups.numpy()[order_array]
    by_group = np.argsort(sorted_groups.astype(np.min_scalar_type(sorted_groups.max(initial=0))), kind="stable")
    order = torch.from_numpy(order_array[by_group])
    kept = _nms_on_cpu(boxes[order], np.bincount(sorted_groups), iou_threshold, max_per_group)
    return order[torch.from_numpy(kept)]


def _nms_on_cpu(boxes: Tensor, sizes: np.ndarray, iou_threshold: float, max_per_group: int | None) -> np.ndarray:
    """Return the rows to keep of boxes sorted by group and falling score; `sizes`: boxes per group, (groups,)."""
    ends = np.cumsum(sizes)
    keep = np.zeros(len(boxes), dtype=bool)
    array = boxes.numpy()
    small = (sizes > 0) & (sizes <= SMALL_GROUP)
    piece = np.cumsum(sizes * sizes * small) // (2 * PAIRS_AT_A_TIME_CPU)  # of the group
    for number in range(int(piece[-1]) + 1 if len(piece) else 0):
        part = np.flatnonzero(small & (piece == number))
        rows = _ranges(ends[part] - sizes[part], sizes[part])
        keep[rows] = _keep_by_pairs(array[rows], sizes[part], iou_threshold)
    scores = torch.arange(sizes.max(initial=0), 0, -1, dtype=torch.float32)  # any falling values: the boxes are sorted
    for group in np.flatnonzero(sizes > SMALL_GROUP).tolist():
        start, size = int(ends[group] - sizes[group]), int(sizes[group])
        keep[start + _best_of_group(boxes[start:][:size], scores[-size:], iou_threshold, max_per_group).numpy()] = True
    kept = np.flatnonzero(keep)
    if max_per_group is None or sizes.max(initial=0) <= max_per_group:
        return kept
    group_of_kept = np.searchsorted(ends, kept, side="right")
    first = np.searchsorted(group_of_kept, group_of_kept)
    return kept[np.arange(len(kept)) - first < max_per_group]


def _best_of_group(boxes: Tensor, scores: Tensor, iou_threshold: float, max_per_group: int | None) -> Tensor:
    """Return the kept rows of one sorted group, searching only as far as needed for `max_per_group`."""
    length = len(boxes) if max_per_group is None else FIRST_SHARE * max_per_group
    while True:
        kept = nms(boxes[:length], scores[:length], iou_threshold)
        if length >= len(boxes) or len(kept) >= (max_per_group or 0):
            return kept[:max_per_group]
        length *= GROWTH


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Concatenate the ranges start..start + size - 1."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + sizes, sizes)


def _keep_by_pairs(boxes: np.ndarray, sizes: np.ndarray, iou_threshold: float) -> np.ndarray:
    """Return whether each box is kept, (N,), for non-empty consecutive groups, each sorted by falling score.

    Compares the best box of every group with the others first, then all pairs of the remaining boxes.
    """
    number = np.arange(len(boxes))
    best = np.repeat(np.cumsum(sizes) - sizes, sizes)
    group = np.repeat(np.arange(len(sizes)), sizes)
    points = boxes.view(np.complex128)[:, 0]  # gathers a box as one item of 16 bytes
    keep = ~_overlaps(points[best], points, iou_threshold) | (number == best)
    left = np.flatnonzero(keep & (number != best))
    left_ends = np.searchsorted(group[left], group[left], side="right")
    later = left_ends - np.arange(1, len(left) + 1)
    first, second = np.repeat(np.arange(len(left)), later), _ranges(np.arange(1, len(left) + 1), later)
    overlapping = np.flatnonzero(_overlaps(points[left][first], points[left][second], iou_threshold))
    first, second = first[overlapping], second[overlapping]
    # Each pass settles at least one more box of every group, so the fixed point is the result of greedy NMS.
    stays = np.ones(len(left), dtype=bool)
    while True:
        now = np.ones(len(left), dtype=bool)
        now[second[stays[first]]] = False
        if np.array_equal(now, stays):
            break
        stays = now
    keep[left] = stays
    return keep


def _overlaps(first: np.ndarray, second: np.ndarray, iou_threshold: float) -> np.ndarray:
    """Return whether the IoU of pairs of boxes, float32 viewed as (N,) complex128, exceeds the threshold, (N,)."""
    (x1, y1, x2, y2), (u1, v1, u2, v2) = (points.view(np.float32).reshape(-1, 4).T for points in (first, second))
    with np.errstate(all="ignore"):
        width, height = np.minimum(x2, u2) - np.maximum(x1, u1), np.minimum(y2, v2) - np.maximum(y1, v1)
        common = np.maximum(width, 0) * np.maximum(height, 0)
        union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - common
        overlaps: np.ndarray = common / union > np.float64(iou_threshold)
    return overlaps


def _nms_on_device(boxes: Tensor, sizes: Tensor, iou_threshold: float, max_per_group: int | None) -> Tensor:
    """Do the work of `_nms_on_cpu` for all groups together; the host waits for a few counts only.

    Compares the next BLOCK boxes of every unfinished group with one another and with those kept so far.
    """
    device, num_boxes = boxes.device, len(boxes)
    starts = sizes.cumsum(0) - sizes
    group = torch.arange(len(sizes), device=device).repeat_interleave(sizes, output_size=num_boxes)
    rank = torch.arange(num_boxes, device=device) - starts[group]
    keep = torch.zeros(num_boxes, dtype=torch.bool, device=device)
    unfinished = torch.ones_like(sizes, dtype=torch.bool)
    for done in range(0, int(sizes.max()) if num_boxes else 0, BLOCK):
        new = (rank >= done) & (rank < done + BLOCK)
        rows = ((keep | new) & unfinished[group]).nonzero()[:, 0]
        if not len(rows):
            break
        counts = torch.zeros_like(sizes).index_add_(0, group[rows], torch.ones_like(rows))
        place = torch.arange(len(rows), device=device) - (counts.cumsum(0) - counts)[group[rows]]
        earlier = torch.where(new[rows], place, 0)  # number of boxes that may remove it
        pairs = torch.zeros_like(sizes).index_add_(0, group[rows], earlier)
        for part, num_pairs in _parts(counts, pairs):
            keep[rows[part]] = _stay(boxes[rows[part]], earlier[part], num_pairs, iou_threshold)
        unfinished = sizes > done + BLOCK
        if max_per_group is not None:
            unfinished &= torch.zeros_like(sizes).index_add_(0, group, keep.long()) < max_per_group
    kept = keep.nonzero()[:, 0]
    if max_per_group is None:
        return kept
    return kept[torch.arange(len(kept), device=device) - torch.searchsorted(group[kept], group[kept]) < max_per_group]


def _parts(counts: Tensor, pairs: Tensor) -> Iterator[tuple[slice, int]]:
    """Yield slices of rows that hold whole groups of about PAIRS_AT_A_TIME pairs, and their number of pairs.

    Args:
        counts, pairs: rows and pairs of each group, (groups,).
    """
    row_ends, pair_ends = torch.stack([counts, pairs]).cumsum(1).cpu().numpy()
    cuts = np.searchsorted(pair_ends, np.arange(PAIRS_AT_A_TIME, pair_ends[-1], PAIRS_AT_A_TIME)) + 1
    borders = np.unique([0, *cuts, len(counts)])
    rows, num_pairs = np.append(0, row_ends)[borders].tolist(), np.append(0, pair_ends)[borders].tolist()
    for start, end, before, after in zip(rows, rows[1:], num_pairs, num_pairs[1:], strict=False):
        yield slice(start, end), after - before


def _stay(boxes: Tensor, earlier: Tensor, num_pairs: int, iou_threshold: float) -> Tensor:
    """Return whether each box is kept, (N,).

    Args:
        boxes: of consecutive groups, each sorted by falling score, (N, 4).
        earlier: number of boxes directly before each one that may remove it, (N,); 0: it is kept.
        num_pairs: sum of `earlier`.
    """
    device, count = boxes.device, len(boxes)
    second = torch.arange(count, device=device).repeat_interleave(earlier, output_size=num_pairs)
    pair_starts = (earlier.cumsum(0) - earlier).repeat_interleave(earlier, output_size=num_pairs)
    first = second - 1 - torch.arange(num_pairs, device=device) + pair_starts
    one, other = boxes[first], boxes[second]
    common = (torch.minimum(one[:, 2:], other[:, 2:]) - torch.maximum(one[:, :2], other[:, :2])).clamp(min=0)
    shared = common[:, 0] * common[:, 1]
    sides = boxes[:, 2:] - boxes[:, :2]
    area = sides[:, 0] * sides[:, 1]
    overlapping = ((shared / (area[first] + area[second] - shared)).double() > iou_threshold).nonzero()[:, 0]
    first, second = first[overlapping], second[overlapping]
    stays = torch.ones(count, dtype=torch.bool, device=device)
    while True:  # as in `_keep_by_pairs`
        now = torch.zeros(count, dtype=torch.int32, device=device).index_add_(0, second, stays[first].int()) == 0
        if torch.equal(now, stays):
            return stays
        stays = now
