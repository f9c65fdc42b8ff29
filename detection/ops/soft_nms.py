"""Soft-NMS: overlapping boxes lose score instead of being removed."""

import torch
from torch import Tensor

from detection.ops.boxes import pairwise_iou


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    sigma: float,
    min_score: float,
    max_kept: int | None = None,
    max_per_group: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the indices of the boxes to keep by falling final score, and these scores.

    Again and again the box of the highest score is kept, and the others of its group lose score: it is multiplied by
    exp(-IoU^2 / sigma). Of equal scores the first counts.

    Args:
        boxes: (N, 4) xyxy; non-finite ones neither change other scores nor lose their own.
        scores: (N,), no NaN.
        groups: (N,) int64, for example the class.
        sigma: see above.
        min_score: boxes whose final score is not above are not kept.
        max_kept: number of boxes kept; None: all.
        max_per_group: number of boxes kept per group; None: all.

    Returns:
        (K,) int64 and (K,) float32.

    Source: Soft-NMS, equation 5 and algorithm 1, https://arxiv.org/abs/1704.04503
    """
    boxes, left = boxes.float(), scores.float().clone()
    kept: list[Tensor] = []
    kept_scores: list[float] = []
    counts: dict[int, int] = {}
    while len(left) and (max_kept is None or len(kept) < max_kept):
        best = left.argmax()
        score = float(left[best])
        if score <= min_score:
            break
        kept.append(best)
        kept_scores.append(score)
        same = groups == groups[best]
        iou = pairwise_iou(boxes[best][None], boxes)[0].nan_to_num_(nan=0.0)
        left = torch.where(same, left * (-iou.square() / sigma).exp(), left)
        left[best] = -torch.inf
        if max_per_group is not None:
            group = int(groups[best])
            counts[group] = counts.get(group, 0) + 1
            if counts[group] == max_per_group:
                left[same] = -torch.inf
    indices = torch.stack(kept) if kept else torch.zeros(0, dtype=torch.int64, device=boxes.device)
    return indices, torch.tensor(kept_scores, device=boxes.device)
