"""Test-time augmentation: each image mirrored and at several input sizes, and one set of boxes from all of them."""

import itertools

import torch
from torch import Tensor

from detection.ops.boxes import pairwise_iou
from detection.ops.nms import grouped_nms

SCALES = (0.8, 1.0, 1.25)  # input sizes relative to the usual one

Variant = tuple[int, bool]  # side of the network input in pixels, mirrored or not


def variants(size: int, multiple: int, other_sizes: bool) -> list[Variant]:
    """Return the variants: mirrored or not, at each size.

    Args:
        size: usual side of the network input in pixels.
        multiple: that sides must be a multiple of.
        other_sizes: whether the network takes other sizes than the usual one.
    """
    scaled = {max(round(size * scale / multiple), 1) * multiple for scale in SCALES} if other_sizes else set()
    return list(itertools.product(sorted({size, *scaled}), (False, True)))


def mirror(boxes: Tensor, width: int) -> Tensor:
    """Mirror boxes (K, 4) xyxy left to right in an image of `width` pixels."""
    return torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)


def fuse(found: list[dict[str, Tensor]], iou_threshold: float, max_detections: int | None) -> dict[str, Tensor]:
    """Merge the detections of the same image in several variants by weighted fusion.

    Class-wise NMS chooses one box per object; each box that it removes belongs to the chosen one that it overlaps most.
    Such a group becomes one box: the mean of its boxes weighted by their scores, with the sum of the scores over the
    number of variants, at most 1. A box that one variant alone finds keeps its place and loses score.

    Args:
        found: boxes (K, 4) xyxy, scores and labels (K,) of each variant, all in pixels of the same image.
        iou_threshold, max_detections: of the NMS; `max_detections` per class.

    Returns:
        As one entry of `found`, by falling score.

    Source: weighted boxes fusion, section 2 of https://arxiv.org/abs/1910.13302; groups are formed by NMS here.
    """
    boxes, scores, labels = (torch.cat([part[name] for part in found]) for name in ("boxes", "scores", "labels"))
    finite = boxes.isfinite().all(dim=1).nonzero()[:, 0]  # a mean with NaN is NaN
    boxes, scores, labels = boxes[finite], scores[finite], labels[finite]
    kept = grouped_nms(boxes, scores, labels, iou_threshold, max_detections)
    overlap = pairwise_iou(boxes, boxes[kept]) * (labels[:, None] == labels[kept])
    overlap[kept, torch.arange(len(kept))] = 2.0  # a chosen box belongs to itself
    best, group = overlap.max(dim=1) if len(kept) else (scores, labels)
    member = (best > iou_threshold).nonzero()[:, 0]  # those beyond `max_detections` belong to none
    total = torch.zeros(len(kept)).index_add_(0, group[member], scores[member])
    weighted = torch.zeros(len(kept), 4).index_add_(0, group[member], boxes[member] * scores[member, None])
    fused = (total / len(found)).clamp(max=1)
    order = fused.argsort(descending=True, stable=True)
    return {"boxes": (weighted / total[:, None])[order], "scores": fused[order], "labels": labels[kept][order]}
