"""Post-processing of dense detectors: raw outputs to detections."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from detection.ops.nms import grouped_nms
from detection.ops.soft_nms import soft_nms
from detection.runtime.devices import nms_device

MAX_UNSUPPRESSED = 300  # detections of an image without NMS
MAX_VALUES = 2**24  # raw values decoded at once: 64 MiB for each of the few intermediate arrays


@dataclass(frozen=True)
class Selection:
    """What a detector's own protocol adds to thresholds and NMS; part of an exported file's metadata.

    Attributes:
        max_candidates: so many best pairs of a prediction and a class reach the NMS, per image; None: all. Of equal
            scores the first prediction counts, then the first class.
        max_per_image: so many best detections of an image, all classes together, are kept; None: all.
        soft_sigma: soft-NMS (`ops.soft_nms`) with this sigma instead of hard NMS; None: hard.
    """

    max_candidates: int | None = None
    max_per_image: int | None = None
    soft_sigma: float | None = None

    def metadata(self) -> dict[str, Any]:
        """Plain values, of which `Selection(**values)` is an equal selection."""
        return asdict(self)

    def deviations(self) -> tuple[str, ...]:
        """How the detections depart from the evaluation protocol of docs/contract.md."""
        parts = {
            f"the best {self.max_candidates or 0:,} candidates of an image": self.max_candidates,
            f"{self.max_per_image} detections per image": self.max_per_image,
            f"soft-NMS (sigma {self.soft_sigma or 0:g})": self.soft_sigma,
        }
        return tuple(text for text, value in parts.items() if value is not None)


EVERYTHING = Selection()


class DensePostprocess(nn.Module):
    """Score threshold and class-wise NMS; a subclass implements `decode`.

    Every class of a prediction whose score exceeds the confidence threshold is a candidate (multi-label). After NMS the
    best `max_detections` per image and class are kept, which is all the COCO metric looks at.

    Args:
        confidence_threshold: scores up to this are dropped.
        iou_threshold: largest IoU of two detections of a class; without effect with soft-NMS.
        max_detections: per image and class; None: all.
        suppress: False: no NMS, for detectors that learn one prediction per object; the best `MAX_UNSUPPRESSED` of an
            image, all classes together, are kept.
        selection: further limits, and soft-NMS.
    """

    def __init__(
        self,
        confidence_threshold: float = 0.001,
        iou_threshold: float = 0.45,
        max_detections: int | None = 100,
        suppress: bool = True,
        selection: Selection = EVERYTHING,
    ) -> None:
        super().__init__()
        self.suppress = suppress
        self.selection = selection
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
        num_images, num_classes = len(scores), scores.shape[2]
        image, prediction, label = self._candidates(scores).nonzero(as_tuple=True)
        scores = scores[image, prediction, label]
        if self.selection.max_candidates is not None:  # `_candidates` keeps all of the last one's score
            best = best_of_each(scores, image, self.selection.max_candidates).sort().values
            image, prediction, label, scores = image[best], prediction[best], label[best], scores[best]
        boxes = boxes[image, prediction]
        if self.selection.soft_sigma is not None:
            return self._select_softly(boxes, scores, label, image.bincount(minlength=num_images).tolist())
        group = image * num_classes + label
        kept = grouped_nms(boxes, scores, group, self.iou_threshold, self.max_detections)
        # Of equal scores the lower class first: `grouped_nms` sorts by class.
        kept = kept[best_of_each(scores[kept], image[kept], self.selection.max_per_image)]
        counts = image[kept].bincount(minlength=num_images).tolist()
        columns = (values[kept].split(counts) for values in (boxes, scores, label))
        return [dict(zip(("boxes", "scores", "labels"), values, strict=True)) for values in zip(*columns, strict=True)]

    def _candidates(self, scores: Tensor) -> Tensor:
        """Whether each of the scores (B, P, C) reaches the NMS; NaN never does.

        Non-finite boxes are left to the evaluation, which counts them.
        """
        candidates = scores > self.confidence_threshold
        limit = self.selection.max_candidates
        if limit is None or scores[0].numel() <= limit:
            return candidates
        flat = torch.where(candidates, scores, -1.0).flatten(1)
        return candidates & (scores >= flat.topk(limit, dim=1).values[:, -1, None, None])

    def _select_softly(
        self, boxes: Tensor, scores: Tensor, labels: Tensor, counts: list[int]
    ) -> list[dict[str, Tensor]]:
        """Detections by soft-NMS of the candidates of all images, (N, 4), (N,) and (N,); `counts`: of each image."""
        sigma, limit = self.selection.soft_sigma, self.selection.max_per_image
        assert sigma is not None
        detections = []
        for own_boxes, own_scores, own_labels in zip(*(v.split(counts) for v in (boxes, scores, labels)), strict=True):
            kept, decayed = soft_nms(
                own_boxes, own_scores, own_labels, sigma, self.confidence_threshold, limit, self.max_detections
            )
            detections.append({"boxes": own_boxes[kept], "scores": decayed, "labels": own_labels[kept]})
        return detections

    def _select_best(self, boxes: Tensor, scores: Tensor) -> list[dict[str, Tensor]]:
        """`_select` without NMS."""
        num_classes = scores.shape[2]
        best, place = scores.flatten(1).topk(min(MAX_UNSUPPRESSED, scores[0].numel()), dim=1)
        detections = []
        for image, kept in enumerate(best > self.confidence_threshold):
            prediction, label = place[image, kept] // num_classes, place[image, kept] % num_classes
            detections.append({"boxes": boxes[image, prediction], "scores": best[image, kept], "labels": label})
        return detections


def best_of_each(scores: Tensor, images: Tensor, limit: int | None) -> Tensor:
    """Indices of the `limit` best scores of each image (None: all), by image and falling score; the first of equals.

    Args:
        scores: (N,).
        images: (N,) int64.
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[images[order].argsort(stable=True)]
    if limit is None:
        return order
    image = images[order]
    return order[torch.arange(len(order), device=order.device) - torch.searchsorted(image, image) < limit]


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
