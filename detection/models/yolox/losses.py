"""Losses of quality-aligned classification and of box sides as distributions. All are element-wise, not reduced."""

import torch
import torch.nn.functional as F
from torch import Tensor


def quality_focal_loss(logits: Tensor, quality: Tensor, beta: float = 2.0) -> Tensor:
    """|y - p|^beta * BCE(z, y), p = sigmoid(z); any shape, the quality y in 0..1 of the same.

    Source: Generalized Focal Loss, equation 5, https://arxiv.org/abs/2006.04388
    """
    distance = (quality - logits.sigmoid()).abs()
    return distance.pow(beta) * F.binary_cross_entropy_with_logits(logits, quality, reduction="none")


def varifocal_loss(logits: Tensor, quality: Tensor, alpha: float = 0.75, gamma: float = 2.0) -> Tensor:
    """w * BCE(z, q), w = q where the quality q is above 0, else alpha * p^gamma; w carries no gradient.

    The paper leaves the gradient of p^gamma in; without it as in PP-YOLOE.

    Source: VarifocalNet, equation 2, https://arxiv.org/abs/2008.13367
    """
    weight = torch.where(quality > 0, quality, alpha * logits.detach().sigmoid().pow(gamma))
    return weight * F.binary_cross_entropy_with_logits(logits, quality, reduction="none")


def distribution_focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """-(l + 1 - y) * log S_l - (y - l) * log S_(l+1), l = floor(y), S: softmax over the bins; mean over the sides.

    Args:
        logits: (..., sides, bins).
        target: wanted value of each side in bins, (..., sides); clamped to 0 .. bins - 1.01.

    Returns:
        (...).

    Source: Generalized Focal Loss, equation 6, https://arxiv.org/abs/2006.04388
    """
    target = target.clamp(0, logits.shape[-1] - 1.01)
    lower = target.long()
    above = target - lower
    logarithms = logits.log_softmax(-1)
    log_lower = logarithms.gather(-1, lower[..., None]).squeeze(-1)
    log_upper = logarithms.gather(-1, lower[..., None] + 1).squeeze(-1)
    return -torch.lerp(log_lower, log_upper, above).mean(-1)
