"""Post-processing of dense detectors: raw outputs to detections."""

from typing import Any

import torch
from torch import Tensor, nn

from detection.ops.nms import grouped_nms
from detection.runtime.devices import nms_device

MAX_UNSUPPRESSED = 300  # detections of an image without NMS
MAX_VALUES = 2**24  # raw values decoded at once: 64 MiB for each of the few intermediate arrays


class DensePostprocess(nn.Module):
    """Score threshold and class-wise NMS; a subclass implements `decode`.

    Every class of a prediction whose score exceeds the confidence threshold is a candidate (multi-label). After NMS the
    best `max_detections` per image and class are kept, which is all the COCO metric looks at.

    Args:
        confidence_threshold: scores up to this are dropped.
        iou_threshold: largest IoU of two detections of a class.
        max_detections: per image and class; None: all.
        suppress: False: no NMS, for detectors that learn one prediction per object; the best `MAX_UNSUPPRESSED` of an
            image, all classes together, are kept.
    """

    def __init__(
        self,
        confidence_threshold: float = 0.001,
        iou_threshold: float = 0.45,
        max_detections: int | None = 100,
        suppress: bool = True,
    ) -> None:
        super().__init__()
        self.suppress = suppress
        self.confidence_threshold = confidence_threshold
        self.iou_threshold = iou_threshold
        self.max_detections = max_detections

    def decode(self, outputs: Any) -> tuple[Tensor, Tensor]:
        """Decode all predictions: boxes (B, P, 4) xyxy in pixels of the network input and scores (B, P, C)."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, outputs: Any) -> list[dict[str, Tensor]]:
        """Turn raw outputs into detections.

        Args:
            outputs: a sequence of tensors whose first dimension is the image.

        Returns:
            Per image "boxes" (K, 4) xyxy in pixels of the network input, "scores" and "labels" (K,), by falling score,
            on `devices.nms_device`.
        """
        values_per_image = sum(level[0].numel() for level in outputs)
        images_at_a_time = max(MAX_VALUES // max(values_per_image, 1), 1)
        detections = []
        for images in zip(*(level.split(images_at_a_time) for level in outputs), strict=True):
            boxes, scores = (values.to(nms_device(values.device)) for values in self.decode(images))
            # On CUDA all images together cost as many synchronisations as one; on the CPU one by one saves memory.
            together = len(boxes) if boxes.is_cuda else 1
            for some in zip(boxes.split(together), scores.split(together), strict=True):
                detections += self._select(*some)
        return detections

    def _select(self, boxes: Tensor, scores: Tensor) -> list[dict[str, Tensor]]:
        """Detections of boxes (B, P, 4) and scores (B, P, C)."""
        if not self.suppress:
            return self._select_best(boxes, scores)
        # Drops NaN scores too; non-finite boxes are left to the evaluation, which counts them.
        image, prediction, label = (scores > self.confidence_threshold).nonzero(as_tuple=True)
        num_images, num_classes = len(scores), scores.shape[2]
        boxes, scores = boxes[image, prediction], scores[image, prediction, label]
        group = image * num_classes + label
        kept = grouped_nms(boxes, scores, group, self.iou_threshold, self.max_detections)
        kept = kept[scores[kept].argsort(descending=True, stable=True)]  # stable: of equal scores the lower class first
        kept = kept[image[kept].argsort(stable=True)]
        counts = image[kept].bincount(minlength=num_images).tolist()
        columns = (values[kept].split(counts) for values in (boxes, scores, label))
        return [dict(zip(("boxes", "scores", "labels"), values, strict=True)) for values in zip(*columns, strict=True)]

    def _select_best(self, boxes: Tensor, scores: Tensor) -> list[dict[str, Tensor]]:
        """`_select` without NMS."""
        num_classes = scores.shape[2]
        best, place = scores.flatten(1).topk(min(MAX_UNSUPPRESSED, scores[0].numel()), dim=1)
        detections = []
        for image, kept in enumerate(best > self.confidence_threshold):
            prediction, label = place[image, kept] // num_classes, place[image, kept] % num_classes
            detections.append({"boxes": boxes[image, prediction], "scores": best[image, kept], "labels": label})
        return detections


class DecodedPostprocess(DensePostprocess):
    """Postprocess for exported files whose graph decodes: threshold and NMS only."""

    def decode(self, outputs: Any) -> tuple[Tensor, Tensor]:
        boxes, scores = outputs
        return boxes, scores


class FinalDetections(nn.Module):
    """Postprocess for exported files whose graph includes NMS: groups the detections by image."""

    def forward(self, outputs: list[Tensor]) -> list[dict[str, Tensor]]:
        """Split boxes (K, 4), scores, labels and image_index (K,) by the image numbers (B,)."""
        boxes, scores, labels, image_index, images = outputs
        rows = [image_index == image for image in images]
        return [{"boxes": boxes[row], "scores": scores[row], "labels": labels[row]} for row in rows]
