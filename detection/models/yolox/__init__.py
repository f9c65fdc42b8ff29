"""Anchor-free detectors: a decoupled head with one prediction per cell, and assignments that see the predictions.

Assigners, criteria and necks by name.
"""

from collections.abc import Callable, Sequence

from torch import nn

from detection.config.yolox_settings import YoloxSettings
from detection.models.necks import NeckStage, PathAggregationNeck, TopDownNeck
from detection.models.yolox.aligned import AlignedLoss, OneToOneLoss
from detection.models.yolox.assigners import Assigner
from detection.models.yolox.assigners.atss import assign_atss
from detection.models.yolox.assigners.centre import centre, centre_cell
from detection.models.yolox.assigners.simota import simota
from detection.models.yolox.assigners.soft_label import assign_soft_label
from detection.models.yolox.assigners.task_aligned import (
    assign_aligned_half,
    assign_one_to_one,
    assign_task_aligned,
)
from detection.models.yolox.criterion import YOLOXLoss
from detection.models.yolox.layout import OutputLayout

ASSIGNERS: dict[str, Assigner] = {
    "simota": simota,
    "centre": centre,
    "centre_cell": centre_cell,
    "soft_label": assign_soft_label,
    "task_aligned": assign_task_aligned,
    "task_aligned_half": assign_aligned_half,
    "atss": assign_atss,
}


def build_aligned(layout: OutputLayout, strides: Sequence[int], yolox: YoloxSettings) -> nn.Module:
    """Build the quality-aligned criterion, of two branches where the settings say so."""
    shared = (yolox.box_weight, yolox.class_weight, yolox.distribution_weight), yolox.class_loss, yolox.balance
    many = AlignedLoss(layout, strides, ASSIGNERS[yolox.assigner], *shared, yolox.atss_share)
    return OneToOneLoss(many, AlignedLoss(layout, strides, assign_one_to_one, *shared)) if yolox.one_to_one else many


# Name -> (layout, pixels per cell per level, settings) -> criterion.
CRITERIA: dict[str, Callable[[OutputLayout, Sequence[int], YoloxSettings], nn.Module]] = {
    "yolox": lambda layout, strides, yolox: YOLOXLoss(
        layout,
        strides,
        ASSIGNERS[yolox.assigner],
        (yolox.box_weight, yolox.objectness_weight, yolox.class_weight, yolox.l1_weight),
    ),
    "aligned": build_aligned,
}
# Name -> (channels of the backbone's maps, stride ascending; widths, coarsest level first; layers of a level) -> neck.
NECKS: dict[str, Callable[[Sequence[int], Sequence[int], NeckStage], nn.Module]] = {
    "fpn": TopDownNeck,
    "pan": PathAggregationNeck,
}

__all__ = ["ASSIGNERS", "CRITERIA", "NECKS"]
