"""Post-processing of YOLO: raw outputs to boxes and scores."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from detection.contract import Anchors
from detection.models.levels import flatten_levels, sizes_of
from detection.models.postprocess import DensePostprocess
from detection.models.yolo.head_layout import IOU, OBJECTNESS, HeadLayout


class YOLOPostprocess(DensePostprocess):
    """Boxes, scores and labels per image; the score is objectness times class probability.

    With an IoU-aware head objectness^(1 - f) * IoU^f takes the place of objectness everywhere, f: `iou_factor`.

    Args:
        anchors: per level (width, height) in pixels of the network input, stride ascending.
        strides: pixels per cell, per level.
        confidence_threshold, iou_threshold, max_detections: see `DensePostprocess`.
        class_loss: the loss of the training; "cross_entropy" makes the class probability a softmax.
        objectness_threshold: predictions with an objectness up to this are dropped.
        scales_xy, new_coords: see `HeadLayout`.
        score: "objectness" ignores the class probability and gives each prediction its likeliest class only.
        iou_factor: f of an IoU-aware head; None: the head predicts no IoU.

    Source: YOLOv3, section 2.1 and 2.2, https://arxiv.org/abs/1804.02767; IoU: PP-YOLO, section 3.2,
        https://arxiv.org/abs/2007.12099, f = 0.4 in PaddleDetection's configs/ppyolo.
    """

    def __init__(
        self,
        anchors: Anchors,
        strides: Sequence[int],
        confidence_threshold: float = 0.001,
        iou_threshold: float = 0.45,
        max_detections: int | None = 100,
        class_loss: Literal["bce", "cross_entropy"] = "bce",
        objectness_threshold: float = 0.0,
        scales_xy: Sequence[float] | None = None,
        new_coords: bool = False,
        score: Literal["product", "objectness"] = "product",
        iou_factor: float | None = None,
    ) -> None:
        super().__init__(confidence_threshold, iou_threshold, max_detections)
        self.layout = HeadLayout(anchors, strides, scales_xy, new_coords, iou_factor is not None)
        self.iou_factor = iou_factor
        self.score = score
        self.objectness_threshold = objectness_threshold
        self.softmax = class_loss == "cross_entropy"

    def decode(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Decode the predictions of all levels.

        Args:
            outputs: raw logits per level, (B, A, H, W, 5 + C), of an IoU-aware head 6 + C.

        Returns:
            Boxes (B, P, 4) xyxy in pixels of the network input and scores (B, P, C).
        """
        raw = flatten_levels(outputs).float()
        boxes = self.layout.decode(raw, sizes_of(outputs))
        logits = raw[..., self.layout.classes]
        classes = logits.softmax(-1) if self.softmax else logits.sigmoid()
        objectness = raw[..., OBJECTNESS, None].sigmoid()
        if self.iou_factor is not None:
            objectness = objectness ** (1 - self.iou_factor) * raw[..., IOU, None].sigmoid() ** self.iou_factor
        if self.score == "objectness":
            scores = torch.zeros_like(classes).scatter(-1, classes.argmax(-1, keepdim=True), objectness)
        else:
            scores = objectness * classes
        if self.objectness_threshold:
            scores = torch.where(objectness > self.objectness_threshold, scores, 0.0)
        return boxes, scores
