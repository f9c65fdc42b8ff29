"""Criteria: raw outputs and padded targets -> dict of weighted float32 scalars. Formulas: docs/losses.md."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection.anchors import Anchors, flatten_levels
from detection.box_coder import decode_boxes, encode_boxes
from detection.boxes import xyxy_to_cxcywh
from detection.target_assignment import anchor_table, assign_targets, ignored_predictions


class DarknetLoss(nn.Module):
    """The loss whose gradients the Darknet program computes for YOLOv3, summed per image, averaged over the batch.

    s * BCE(xy) + s/2 * (t_wh - raw_wh)^2 + BCE(objectness) + BCE(class), s = 2 - w*h with w, h relative to the input

    Truths that share an anchor and cell: the last one gives the box, the classes unite. The order of the truths is
    the dataset's (area descending, then annotation id), so it does not depend on the order in the annotation file.

    Args:
        anchors: per level (width, height) in pixels of the network input, stride ascending.
        strides: pixels per cell, per level.
        ignore_threshold: predictions whose decoded box overlaps a truth by more carry no objectness loss.
        class_loss: "bce" (multi-label) or "cross_entropy" (softmax over the classes; the last of shared truths counts).

    Source: YOLOv3, section 2.1 and 2.2, https://arxiv.org/abs/1804.02767; gradients of Darknet's yolo layer.
    """

    def __init__(
        self,
        anchors: Anchors,
        strides: Sequence[int],
        ignore_threshold: float,
        class_loss: Literal["bce", "cross_entropy"] = "bce",
    ) -> None:
        super().__init__()
        self.strides = list(strides)
        self.ignore_threshold = ignore_threshold
        self.class_loss = class_loss
        self._tables: dict[tuple, Tensor] = {}
        for level, level_anchors in enumerate(anchors):
            self.register_buffer(f"anchors_{level}", torch.tensor(level_anchors, dtype=torch.float32), persistent=False)

    @property
    def anchors(self) -> list[Tensor]:
        return [self.get_buffer(f"anchors_{level}") for level in range(len(self.strides))]

    def _anchor_table(self, sizes: list[tuple[int, int]]) -> Tensor:
        """Kept per input size: building it anew would make the host wait for the device in every step."""
        key = (self.anchors[0].device, tuple(sizes))
        if key not in self._tables:
            self._tables[key] = anchor_table(self.anchors, self.strides, sizes)
        return self._tables[key]

    def forward(self, outputs: Sequence[Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """Args:
            outputs: raw logits per level, (B, A, H, W, 5 + C), any float type.
            targets: "boxes" (B, G, 4) xyxy in pixels of the network input, "labels" (B, G): class, -1 padding,
                -2 crowd.

        Returns:
            "loss_box", "loss_objectness", "loss_class": float32 scalars.
        """
        with torch.autocast(device_type=outputs[0].device.type, enabled=False):
            return self._forward_float32(
                [output.float() for output in outputs], targets["boxes"].float(), targets["labels"]
            )

    def _forward_float32(self, outputs: list[Tensor], boxes: Tensor, labels: Tensor) -> dict[str, Tensor]:
        sizes = [(output.shape[2], output.shape[3]) for output in outputs]
        input_area = sizes[0][0] * sizes[0][1] * self.strides[0] ** 2  # pixels
        raw = flatten_levels(outputs)  # (B, P, 5 + C)
        batch_size, predictions, values = raw.shape

        truth = assign_targets(boxes, labels, self._anchor_table(sizes))
        positive_raw = raw.gather(1, truth.index[..., None].expand(-1, -1, values))  # (B, G, 5 + C)

        boxes_cxcywh = xyxy_to_cxcywh(boxes)
        # Padding has no size; 1 keeps the logarithm finite there.
        boxes_cxcywh = torch.where(truth.valid[..., None], boxes_cxcywh, 1.0)
        target_xy, target_wh = encode_boxes(boxes_cxcywh, truth.anchor, truth.cell, truth.stride)
        scale = 2 - boxes_cxcywh[..., 2:].prod(-1) / input_area  # (B, G)
        loss_xy = F.binary_cross_entropy_with_logits(positive_raw[..., :2], target_xy, reduction="none").sum(-1)
        loss_wh = (target_wh - positive_raw[..., 2:4]).square().sum(-1) / 2
        loss_box = (scale * (loss_xy + loss_wh) * truth.last).sum()

        objectness = raw[..., 4]  # (B, P)
        decoded = flatten_levels(
            [
                decode_boxes(output.detach(), anchors, stride)
                for output, anchors, stride in zip(outputs, self.anchors, self.strides, strict=True)
            ]
        )
        # Padding and crowd write into one extra slot behind the predictions.
        slot = torch.where(truth.valid, truth.index, predictions)
        positive = torch.zeros(batch_size, predictions + 1, device=raw.device).scatter_(1, slot, 1.0)[:, :-1]
        ignored = ignored_predictions(decoded, boxes, labels, self.ignore_threshold)
        counted = torch.maximum(positive, (~ignored).float())
        loss_objectness = (F.binary_cross_entropy_with_logits(objectness, positive, reduction="none") * counted).sum()

        class_logits = positive_raw[..., 5:]  # (B, G, C)
        if self.class_loss == "bce":
            # Not F.one_hot: to check the labels it makes the host wait for them, except on CUDA.
            one_hot = torch.zeros_like(class_logits).scatter_(2, labels.clamp(min=0)[..., None], 1.0)
            united = torch.bmm(truth.same.float(), one_hot).clamp_(max=1)  # classes of all truths of that prediction
            loss_class = F.binary_cross_entropy_with_logits(class_logits, united, reduction="none").sum(-1)
        else:
            loss_class = F.cross_entropy(class_logits.transpose(1, 2), labels.clamp(min=0), reduction="none")
        loss_class = (loss_class * truth.last).sum()

        return {
            "loss_box": loss_box / batch_size,
            "loss_objectness": loss_objectness / batch_size,
            "loss_class": loss_class / batch_size,
        }


CRITERIA = {"darknet": DarknetLoss}
