"""Which anchors answer for which ground-truth boxes. Depends on boxes and anchors only, not on the predictions."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from detection.contract import CROWD_LABEL, PADDING_LABEL
from detection.ops.boxes import box_area, pairwise_intersection

CROWD_OVERLAP = 0.5  # share of an anchor in a crowd region from which it is no background
MAX_PAIRS = 2**24  # pairs of box and anchor compared at once: 64 MiB for each of the few intermediate arrays


class Assignment(NamedTuple):
    """What each anchor answers for; an anchor that is neither positive nor background has no loss."""

    gt: Tensor  # (B, P) int64: row of the ground-truth box of a positive; of others any row
    positive: Tensor  # (B, P) bool
    background: Tensor  # (B, P) bool


@torch.no_grad()
def assign(
    anchors: Tensor, boxes: Tensor, labels: Tensor, positive_iou: float = 0.5, background_iou: float = 0.5
) -> Assignment:
    """Assign ground-truth boxes to anchors by IoU.

    An anchor is positive for the box of the highest IoU if that is at least `positive_iou`. Then every box takes its
    best anchor, whatever the IoU. Of equal IoUs, and of several boxes with the same best anchor, the first box counts;
    of equal anchors the first. Never assigned are padding, crowd regions and boxes without an area.

    Shapes are static, and nothing is read by the host.

    Args:
        anchors: (P, 4) xyxy in pixels of the network input.
        boxes: ground truth, likewise, (B, G, 4) float32.
        labels: (B, G): class, -1 padding, -2 crowd.
        positive_iou: see above.
        background_iou: an anchor whose best IoU is below is background, unless more than half of it lies in a crowd
            region; with less than `positive_iou` there are anchors without a loss between the two.

    Source: `tf2/anchors.py` and `object_detection/argmax_matcher.py` of https://github.com/google/automl, folder
        efficientdet; Focal Loss, section 4 (0.5 and 0.4), https://arxiv.org/abs/1708.02002. Differs: padding and boxes
        without an area never take an anchor, nor do boxes that touch none; crowd regions are no background.
    """
    if not labels.shape[1]:  # reductions need at least one row
        boxes, labels = F.pad(boxes, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=PADDING_LABEL)
    (images, rows), count = labels.shape, len(anchors)
    usable = (labels >= 0) & (boxes[..., 2:] > boxes[..., :2]).all(-1)
    is_crowd = (labels == CROWD_LABEL).float()[..., None]
    anchor_area, gt_area = box_area(anchors), box_area(boxes)[..., None]
    best_iou, covered = torch.zeros(2, images, count, device=boxes.device).unbind()
    gt = torch.zeros(images, count, dtype=torch.int64, device=boxes.device)
    best_anchor = torch.zeros(images, 0, dtype=torch.int64, device=boxes.device)
    step = max(MAX_PAIRS // (images * count), 1)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        shared = pairwise_intersection(boxes[:, part], anchors)  # (B, rows of the part, P)
        covered = torch.maximum(covered, (shared * is_crowd[:, part]).amax(1))
        union = (gt_area[:, part] + anchor_area).sub_(shared).clamp_(min=torch.finfo(torch.float32).tiny)
        iou = shared.div_(union).mul_(usable[:, part, None])
        here, row = first_largest(iou, 1)
        gt = torch.where(here > best_iou, start + row, gt)  # strictly: an earlier part has the earlier boxes
        best_iou = torch.maximum(best_iou, here)
        largest, place = first_largest(iou, 2)
        # A box that overlaps no anchor gets the number after the last anchor.
        best_anchor = torch.cat([best_anchor, torch.where(largest > 0, place, count)], dim=1)

    numbers = torch.arange(rows, device=boxes.device).expand(images, rows)
    taker = torch.full((images, count + 1), rows, device=boxes.device)
    taker = taker.scatter_reduce(1, best_anchor, numbers, "amin")[:, :count]
    taken = taker < rows
    positive = taken | (best_iou >= positive_iou)
    background = ~positive & (best_iou < background_iou) & (covered <= CROWD_OVERLAP * anchor_area)
    return Assignment(torch.where(taken, taker, gt), positive, background)


def first_largest(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Largest value along a dimension and the first index that has it, int64.

    Not `max(dim)`: which of equal values it finds is not promised on every device.
    """
    largest = values.amax(dim, keepdim=True)
    shape = [1] * values.ndim
    shape[dim] = -1
    numbers = torch.arange(values.shape[dim], dtype=torch.int32, device=values.device).view(shape)
    first = torch.where(values == largest, numbers, values.shape[dim]).amin(dim)
    return largest.squeeze(dim), first.long()
