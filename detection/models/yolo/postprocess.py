"""Raw outputs -> detections: scores, class-wise NMS, back to the original image."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from detection.models.yolo.box_coder import decode_boxes
from detection.models.yolo.grid import Anchors, flatten_levels
from detection.ops.nms import grouped_nms
from detection.runtime.devices import nms_device

SCORES_AT_A_TIME = 2**24  # of predictions times classes: 64 MiB for each of the few arrays that decoding makes


class YOLOPostprocess(nn.Module):
    """Boxes, scores and labels of each image from the raw outputs of all levels.

    Every class of a prediction whose score, objectness * class probability, exceeds the confidence threshold is a
    candidate (multi-label); NMS runs per class; then the best `max_detections` per class are kept,
    which is all the COCO metric looks at.

    Args:
        anchors: per level (width, height) in pixels of the network input, stride ascending.
        strides: pixels per cell, per level.
        confidence_threshold: of the score.
        iou_threshold: of the NMS.
        max_detections: per image and class; None: all.
        class_loss: "cross_entropy" makes the class probability a softmax.
        objectness_threshold: predictions with no more objectness than this are no candidates.
        score: "objectness" leaves the class probability out and gives a prediction its likeliest class alone.
        scales_xy, new_coords: of the levels, see `box_coder.decode_boxes`.

    Source: YOLOv3, section 2.1 and 2.2, https://arxiv.org/abs/1804.02767
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
    ) -> None:
        super().__init__()
        self.score = score
        self.strides = list(strides)
        self.scales_xy = [1.0] * len(self.strides) if scales_xy is None else list(scales_xy)
        self.new_coords = new_coords
        self.confidence_threshold = confidence_threshold
        self.objectness_threshold = objectness_threshold
        self.iou_threshold = iou_threshold
        self.max_detections = max_detections
        self.softmax = class_loss == "cross_entropy"  # the class probability must be the one the loss trains
        for level, level_anchors in enumerate(anchors):
            self.register_buffer(f"anchors_{level}", torch.tensor(level_anchors, dtype=torch.float32), persistent=False)

    @torch.no_grad()
    def forward(self, outputs: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Args:
            outputs: raw logits per level, (B, A, H, W, 5 + C).

        Returns:
            Per image "boxes" (K, 4) xyxy in pixels of the network input, "scores" and "labels" (K,); best score first;
            on `devices.nms_device`.
        """
        scores_per_image = sum(level[0, ..., 5:].numel() for level in outputs)
        images_at_a_time = max(SCORES_AT_A_TIME // max(scores_per_image, 1), 1)
        found = []
        for images in zip(*(level.split(images_at_a_time) for level in outputs), strict=True):
            boxes, scores = (values.to(nms_device(values.device)) for values in self.decode(images))
            # The host waits for a device as often for many images as for one; on the CPU one by one needs less memory.
            together = len(boxes) if boxes.is_cuda else 1
            for some in zip(boxes.split(together), scores.split(together), strict=True):
                found += self._find(*some)
        return found

    def decode(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Every prediction of all levels: boxes (B, P, 4) xyxy in pixels of the network input and scores (B, P, C)."""
        anchors = [self.get_buffer(f"anchors_{level}") for level in range(len(self.strides))]
        levels = zip(outputs, anchors, self.strides, self.scales_xy, strict=True)
        boxes = flatten_levels([decode_boxes(*level, self.new_coords) for level in levels])
        raw = flatten_levels(outputs).float()
        classes = raw[..., 5:].softmax(-1) if self.softmax else raw[..., 5:].sigmoid()
        objectness = raw[..., 4:5].sigmoid()
        if self.score == "objectness":
            scores = torch.zeros_like(classes).scatter(-1, classes.argmax(-1, keepdim=True), objectness)
        else:
            scores = objectness * classes
        if self.objectness_threshold:
            scores = torch.where(objectness > self.objectness_threshold, scores, 0.0)
        return boxes, scores

    def _find(self, boxes: Tensor, scores: Tensor) -> list[dict[str, Tensor]]:
        """What `forward` gives for the images of (B, P, 4) and (B, P, C)."""
        # NaN compares false and is left out here; infinite boxes are left to the evaluation, which counts them.
        image, prediction, label = (scores > self.confidence_threshold).nonzero(as_tuple=True)
        num_images, num_classes = len(scores), scores.shape[2]
        boxes, scores = boxes[image, prediction], scores[image, prediction, label]
        group = image * num_classes + label
        kept = grouped_nms(boxes, scores, group, self.iou_threshold, self.max_detections)
        kept = kept[scores[kept].argsort(descending=True, stable=True)]  # of equals the lower class first
        kept = kept[image[kept].argsort(stable=True)]
        counts = image[kept].bincount(minlength=num_images).tolist()
        columns = (values[kept].split(counts) for values in (boxes, scores, label))
        return [dict(zip(("boxes", "scores", "labels"), values, strict=True)) for values in zip(*columns, strict=True)]
