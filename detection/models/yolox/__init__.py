"""Anchor-free detectors: a decoupled head with one prediction per cell, and assignments that see the predictions.

Assigners, criteria and necks by name.
"""

from collections.abc import Callable, Sequence

from torch import nn

from detection.models.necks import NeckStage, PathAggregationNeck, TopDownNeck
from detection.models.yolox.assigners import Assigner
from detection.models.yolox.assigners.centre import centre, centre_cell
from detection.models.yolox.assigners.simota import simota
from detection.models.yolox.criterion import PointCriterion, YOLOXLoss

ASSIGNERS: dict[str, Assigner] = {"simota": simota, "centre": centre, "centre_cell": centre_cell}
CRITERIA: dict[str, Callable[..., PointCriterion]] = {"yolox": YOLOXLoss}
# Name -> (channels of the backbone's maps, stride ascending; widths, coarsest level first; layers of a level) -> neck.
NECKS: dict[str, Callable[[Sequence[int], Sequence[int], NeckStage], nn.Module]] = {
    "fpn": TopDownNeck,
    "pan": PathAggregationNeck,
}

__all__ = ["ASSIGNERS", "CRITERIA", "NECKS"]
