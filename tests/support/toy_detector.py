"""A second detector in a few lines: one backbone, one dense head without objectness, two losses."""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection.config.settings import EvaluationSettings, ModelSettings, Settings
from detection.contract import Detector, Geometry
from detection.models.postprocess import DensePostprocess
from detection.ops.pixels import NormalizePixels

STRIDE = 16
PRIOR = 24.0  # pixels: the side of a box at raw 0


class ToyModel(nn.Module):
    """(B, 3, H, W) to one level of raw values, (B, 4 + C, H / 16, W / 16)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes, self.strides = num_classes, (STRIDE,)
        self.normalize = NormalizePixels((100.0, 110.0, 120.0), (60.0, 60.0, 60.0), 255.0, "bgr")
        widths = (3, 16, 32, 32, 32)
        blocks = [
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in itertools.pairwise(widths)
        ]
        self.backbone = nn.Sequential(*blocks)
        self.head = nn.Conv2d(32, 4 + num_classes, 1)
        nn.init.constant_(self.head.bias, -2.0)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.head(self.backbone(self.normalize(images)))]

    def output_convolutions(self) -> list[nn.Conv2d]:
        return [self.head]


def cells_of(level: Tensor) -> Tensor:
    """Centre of each cell in pixels, (H * W, 2)."""
    rows, columns = torch.meshgrid(torch.arange(level.shape[2]), torch.arange(level.shape[3]), indexing="ij")
    return (torch.stack([columns, rows], -1).reshape(-1, 2).to(level.device) + 0.5) * STRIDE


def split(level: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes (B, P, 4) xyxy in pixels and class logits (B, P, C)."""
    raw = level.float().flatten(2).transpose(1, 2)
    centre, size = cells_of(level) + raw[..., :2] * STRIDE, PRIOR * raw[..., 2:4].clamp(max=5).exp()
    return torch.cat([centre - size / 2, centre + size / 2], -1), raw[..., 4:]


class ToyCriterion(nn.Module):
    """The cell at a box's centre is its positive, all others are background."""

    def forward(self, outputs: list[Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        (level,) = outputs
        boxes, logits = split(level)
        target = torch.zeros_like(logits)
        gt, labels = targets["boxes"], targets["labels"]
        column, row = ((gt[..., :2] + gt[..., 2:]) / 2 / STRIDE).long().unbind(-1)
        cell = row.clamp(0, level.shape[2] - 1) * level.shape[3] + column.clamp(0, level.shape[3] - 1)
        image, place = (labels >= 0).nonzero(as_tuple=True)
        target[image, cell[image, place], labels[image, place]] = 1.0
        predicted = boxes[image, cell[image, place]]
        return {
            "loss_regression": F.smooth_l1_loss(predicted, gt[image, place], reduction="sum") / len(labels) / PRIOR,
            "loss_classification": F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / len(labels),
        }


class ToyPostprocess(DensePostprocess):
    """Scores are class probabilities."""

    def decode(self, outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        boxes, logits = split(outputs[0])
        return boxes, logits.sigmoid()


def build_toy(model_settings: ModelSettings, own: Any, evaluation: EvaluationSettings, num_classes: int) -> Detector:
    assert own is None, "the toy has no section in the settings"
    model = ToyModel(num_classes)
    geometry = Geometry(
        STRIDE,
        model_settings.placement or "top_left",
        "down",
        "area",
        fill=model_settings.fill or (100, 110, 120),
        pixel_range=255.0,
        channel_order="bgr",
        pixel_mean=(100.0, 110.0, 120.0),
        pixel_std=(60.0, 60.0, 60.0),
    )
    postprocess = ToyPostprocess(evaluation.confidence_threshold, evaluation.iou_threshold, evaluation.max_detections)
    plan = ("model       toy",)
    return Detector(model, ToyCriterion(), postprocess, geometry, plan, "toy", score="class probability")


def toy_postprocess(metadata: Mapping[str, Any], settings: Settings) -> nn.Module:
    evaluation = settings.evaluation
    return ToyPostprocess(evaluation.confidence_threshold, evaluation.iou_threshold, evaluation.max_detections)
