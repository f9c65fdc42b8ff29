"""Sigmoid focal loss over all predictions and classes, with little memory: no one-hot targets, nothing kept but logits.

For a logit x with p = sigmoid(x) and the target y, 0 or 1:

    y = 1:  alpha * (1 - p)^gamma * CE(x, 1 - s / 2)
    y = 0:  (1 - alpha) * p^gamma * CE(x, s / 2)

CE(x, z) = softplus(x) - z * x is the cross entropy with the target z, s the label smoothing. Its gradient is computed
in closed form, because autograd would keep about six arrays of the size of the logits (15 MiB each for an image of 512
pixels with 80 classes).

Source: Focal Loss, equation 5, https://arxiv.org/abs/1708.02002; weights from the targets without smoothing as in
`tf2/train_lib.py` of https://github.com/google/automl, folder efficientdet
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BACKGROUND, IGNORED = -1, -2  # in place of a class


def focal_loss_sum(logits: Tensor, classes: Tensor, alpha: float, gamma: float, smoothing: float = 0.0) -> Tensor:
    """Sum of the focal losses of all predictions and classes, a float32 scalar; differentiable once.

    Args:
        logits: (B, P, C), any float type; the loss is computed in float32 (float64 for float64).
        classes: (B, P) int64: the class of a positive, `BACKGROUND`, or `IGNORED`, whose logits have no loss.
        alpha: weight of positive targets; that of the others is 1 - alpha.
        gamma: 0 or more: how much less easy predictions count.
        smoothing: of the targets, 0 or more and below 1.
    """
    return _FocalLossSum.apply(logits, classes, alpha, gamma, smoothing)


class _FocalLossSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, classes: Tensor, alpha: float, gamma: float, smoothing: float) -> Tensor:
        ctx.save_for_backward(logits, classes)
        ctx.options = alpha, gamma, smoothing
        x = logits if logits.dtype == torch.float64 else logits.float()
        cross_entropy = F.softplus(x)
        if smoothing:
            cross_entropy = cross_entropy.sub_(x, alpha=smoothing / 2)
        negative = torch.sigmoid(x).pow_(gamma).mul_(cross_entropy)
        positive, place = _of_class(x, classes)
        # Positives enter the sum over all logits as negatives, and leave it here.
        as_negative = negative.gather(2, place)[..., 0] * (1 - alpha)
        cross_entropy = F.softplus(-positive) + smoothing / 2 * positive
        as_positive = alpha * torch.sigmoid(-positive).pow_(gamma).mul_(cross_entropy)
        of_rows = negative.sum(2) * (1 - alpha)
        of_rows = of_rows + torch.where(classes >= 0, as_positive - as_negative, 0.0)
        return torch.where(classes != IGNORED, of_rows, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, classes = ctx.saved_tensors
        alpha, gamma, smoothing = ctx.options
        x = logits if logits.dtype == torch.float64 else logits.float()
        # d/dx p^g CE = p^g * (g * (1 - p) * CE + p - z)
        p = torch.sigmoid(x)
        gradient = F.softplus(x)
        if smoothing:
            gradient = gradient.sub_(x, alpha=smoothing / 2)
        gradient = gradient.mul_(1 - p).mul_(gamma).add_(p).sub_(smoothing / 2).mul_(p.pow_(gamma))
        row = torch.where(classes != IGNORED, grad, 0.0).to(x.dtype)
        gradient = gradient.mul_((row * (1 - alpha))[..., None])

        positive, place = _of_class(x, classes)
        p = torch.sigmoid(positive)
        cross_entropy = F.softplus(-positive) + smoothing / 2 * positive
        of_positives = row * alpha * (1 - p) ** gamma * (p - 1 + smoothing / 2 - gamma * p * cross_entropy)
        kept = gradient.gather(2, place)[..., 0]
        gradient.scatter_(2, place, torch.where(classes >= 0, of_positives, kept)[..., None])
        return gradient.to(logits.dtype), None, None, None, None


def _of_class(x: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """The logit of each prediction's class (B, P), and where it stands, (B, P, 1); of class 0 where there is none."""
    place = classes.clamp(min=0)[..., None]
    return x.gather(2, place)[..., 0], place
