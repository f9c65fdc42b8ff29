"""The quality-aligned criterion: the class score learns how well the box fits. Formulas: docs/losses.md."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from detection.contract import AssignedPrediction
from detection.models.yolox.assigners import Assigner, Assignment
from detection.models.yolox.assigners.atss import assign_atss
from detection.models.yolox.criterion import Matched, PointCriterion
from detection.models.yolox.layout import OutputLayout
from detection.models.yolox.losses import distribution_focal_loss, quality_focal_loss, varifocal_loss
from detection.ops.boxes import generalized_iou_xyxy

CLASS_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "quality_focal": quality_focal_loss,
    "varifocal": varifocal_loss,
}


class AlignedLoss(PointCriterion):
    """Class loss against the quality of each prediction, and box losses weighted by it; no objectness.

    loss_class = sum over all predictions and classes of QFL or VFL against one-hot * quality
    loss_box = sum of quality * (1 - GIoU),  loss_distribution = sum of quality * DFL, with box sides as distributions

    All are divided by the sum of the qualities of the micro-batch (at least 1). With `balance` "objects" the box losses
    are the mean over ground-truth boxes of the mean over their predictions instead, and the class losses of positives
    get a factor that gives each box the same weight: a large object has some four times as many predictions as a small
    one, of twice the quality, so small ones would learn much later.
    A negative with more than half of its area in a crowd region has no class loss.

    Args:
        layout: without objectness; with more than four box values the sides are distributions.
        strides, assigner: see `PointCriterion`.
        weights: factors of the box, class and distribution loss.
        class_loss: a key of `CLASS_LOSSES`.
        balance: "predictions" or "objects", which count alike in the losses.
        atss_share: share of the run in which ATSS assigns instead of `assigner`.

    Source: RTMDet, section 3.3, https://arxiv.org/abs/2212.07784 (quality focal loss, GIoU, weights 1 and 2); PP-YOLOE,
        section 2.2, https://arxiv.org/abs/2203.16250 (varifocal and distribution focal loss, ATSS at first, weights
        2.5, 1 and 0.5); crowd regions: ours.
    """

    def __init__(
        self,
        layout: OutputLayout,
        strides: Sequence[int],
        assigner: Assigner,
        weights: tuple[float, float, float] = (2.0, 1.0, 0.5),
        class_loss: str = "quality_focal",
        balance: str = "predictions",
        atss_share: float = 0.0,
    ) -> None:
        super().__init__(layout, strides, assigner)
        self.weights = weights
        self.compare_scores, self.balance = CLASS_LOSSES[class_loss], balance
        self.late_assigner, self.atss_share = assigner, atss_share
        self.set_progress(0.0, False)

    def set_progress(self, share_done: float, finishing: bool) -> None:
        """See `PointCriterion.set_progress`."""
        super().set_progress(share_done, finishing)
        self.assigner = assign_atss if share_done < self.atss_share else self.late_assigner

    def compute_losses(self, matched: Matched) -> dict[str, Tensor]:
        """See `PointCriterion.compute_losses`."""
        raw, points = matched.raw, matched.points
        positive, quality = matched.assignment.positive, matched.assignment.quality
        normaliser = quality.sum().clamp(min=1)
        share, factor = quality / normaliser, torch.ones_like(quality)
        if self.balance == "objects":
            factor = factors_of_objects(matched.assignment, matched.labels.shape[1])
            share = factor * positive / positive.sum().clamp(min=1)
        wanted = matched.wanted()
        giou = generalized_iou_xyxy(matched.predicted, wanted)
        counted = positive | ~matched.in_crowds()
        loss_class = self.compare_scores(raw.classes, matched.class_targets()).sum(-1) * (factor * counted / normaliser)

        losses = {"loss_box": ((1 - giou) * share).sum(), "loss_class": loss_class.sum()}
        bins = raw.boxes.shape[-1] // 4
        if bins > 1:
            sides = torch.cat([points.centres - wanted[..., :2], wanted[..., 2:] - points.centres], dim=-1)
            distance = distribution_focal_loss(raw.boxes.unflatten(-1, (4, bins)), sides / points.strides[:, None])
            losses["loss_distribution"] = (distance * share).sum()
        return {name: loss * weight for (name, loss), weight in zip(losses.items(), self.weights, strict=False)}


def factors_of_objects(assignment: Assignment, rows: int) -> Tensor:
    """Factors of predictions with which all ground-truth boxes that have predictions count alike.

    Args:
        assignment: of B images and P predictions.
        rows: of ground truth, G.

    Returns:
        Mean number of predictions per box of the micro-batch / number of the prediction's box; 1 where not positive;
        (B, P) float32.
    """
    positive = assignment.positive.float()
    count = positive.new_zeros(len(positive), rows).scatter_add_(1, assignment.gt, positive)
    mean = positive.sum() / (count > 0).sum().clamp(min=1)
    return torch.where(assignment.positive, mean / count.gather(1, assignment.gt).clamp(min=1), 1.0)


class OneToOneLoss(nn.Module):
    """`AlignedLoss` of the heads, plus that of the one-to-one heads, whose assigner chooses one prediction per box.

    Both measure alignment alike, so that the one is the best of the many. In evaluation, where the model has the
    one-to-one outputs only, it is their loss alone.

    Args:
        many, one: criterion of the heads, and of the one-to-one heads.

    Source: YOLOv10, section 3.1, https://arxiv.org/abs/2405.14458
    """

    def __init__(self, many: AlignedLoss, one: AlignedLoss) -> None:
        super().__init__()
        self.many, self.one = many, one
        self.levels = len(one.decoding.strides)

    def set_progress(self, share_done: float, finishing: bool) -> None:
        """See `PointCriterion.set_progress`."""
        self.many.set_progress(share_done, finishing)

    def forward(self, outputs: Sequence[Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `PointCriterion.forward`."""
        losses: dict[str, Tensor] = self.one(outputs[-self.levels :], targets)
        if len(outputs) > self.levels:
            many = self.many(outputs[: self.levels], targets)
            losses = {name: loss + losses[name] for name, loss in many.items()}
        return losses

    def assigned_by_outputs(self, outputs: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> list[AssignedPrediction]:
        """See `PointCriterion.assigned_by_outputs`; of the one-to-one heads."""
        return self.one.assigned_by_outputs(outputs[-self.levels :], boxes, labels)
