"""Do the boxes fit the network: its input size, its cells and its anchors? From the annotations alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from detection.config.settings import DataSettings, TrainSettings, YoloSettings
from detection.data.annotations import Annotations
from detection.dataset_checks.findings import Findings
from detection.models import anchors_of
from detection.models.yolo.grid import Anchors, anchor_table, place_in_cell
from detection.ops.boxes import pairwise_wh_iou
from detection.ops.letterbox import letterbox_geometry

TINY = 2.0  # pixels of the network input
GOOD_IOU = 0.5
SMALLEST_MEAN_IOU = 0.5  # COCO's anchors have 0.63 on COCO


@dataclass(frozen=True)
class Network:
    """What of a detector the boxes have to fit."""

    anchors: Anchors  # per level, stride ascending
    strides: Sequence[int]
    scales_xy: Sequence[float] | None
    size: int  # side of the network input, pixels
    smallest_size: int  # with multiscale training


def describe_network(model: nn.Module, yolo: YoloSettings, train: TrainSettings) -> Network:
    """Of a built model; its weights may be on the device "meta"."""
    anchors, scales_xy = anchors_of(model, yolo)
    smallest = train.multiscale_sizes[0] if train.resize_frequency else train.image_size
    return Network(anchors, cast(tuple[int, ...], model.strides), scales_xy, train.image_size, smallest)


def check_fit(
    annotations: Annotations, network: Network, data: DataSettings, split: str, findings: Findings
) -> dict[str, float]:
    """Report boxes that cannot be learned well; returns the numbers for the summary, empty without boxes.

    Boxes of images whose size is not stated are not looked at, nor are crowd boxes, which get no anchor.
    """
    size = network.size
    boxes, rows, image_of_box = letterboxed_boxes(annotations, size, data)
    if not len(boxes):
        return {}
    ids = annotations.annotation_ids[rows]
    sides = boxes[:, 2:] - boxes[:, :2]
    findings.add("tiny_box", split, ids[(sides * (network.smallest_size / size) < TINY).any(axis=1)].tolist())

    all_anchors = torch.tensor([anchor for level in network.anchors for anchor in level], dtype=torch.float64)
    best_iou, best_anchor = pairwise_wh_iou(torch.from_numpy(sides), all_anchors).max(dim=1)
    mean, recall = float(best_iou.mean()), float((best_iou >= GOOD_IOU).double().mean())
    if mean < SMALLEST_MEAN_IOU:
        text = f"mean best IoU {mean:.3f}, {recall:.1%} of the boxes at IoU {GOOD_IOU} or more, at {size} px"
        findings.add("poor_anchors", split, ["yolo.anchors"], [text])

    prediction = assigned_predictions(boxes, best_anchor, network)
    key = np.column_stack([image_of_box, prediction])
    order = np.lexsort(key.T[::-1])  # stable: of those that share one, the last in the order of the arrays keeps it
    shared = (key[order[1:]] == key[order[:-1]]).all(axis=1)
    findings.add("shared_prediction", split, sorted(ids[order[:-1][shared]].tolist()))
    return {
        "image_size": size,
        "boxes": len(boxes),
        "mean_best_iou": mean,
        "recall_at_iou_0.5": recall,
    }


def letterboxed_boxes(
    annotations: Annotations, size: int, data: DataSettings
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes as the network of this input size sees them, without augmentation.

    Returns:
        xyxy in pixels of the network input, (K, 4) float64; their rows in the annotations, and their images, (K,).
    """
    image_of_box = np.repeat(np.arange(len(annotations)), np.diff(annotations.first_box))
    distinct, which = np.unique(annotations.image_sizes, axis=0, return_inverse=True)
    layout = data.keep_aspect, data.letterbox_rounding
    scale_offset = np.zeros((len(distinct), 4))
    for number, (width, height) in enumerate(distinct.tolist()):
        if width and height:
            letterbox, *_ = letterbox_geometry(width, height, size, *layout)
            scale_offset[number] = letterbox.scale_x, letterbox.scale_y, letterbox.left, letterbox.top
    of_box = scale_offset[which.reshape(-1)[image_of_box]]
    rows = np.flatnonzero((of_box[:, 0] > 0) & ~annotations.crowd)
    scale, offset = np.tile(of_box[rows, :2], 2), np.tile(of_box[rows, 2:], 2)
    return annotations.boxes[rows] * scale + offset, rows, image_of_box[rows]


def assigned_predictions(boxes: np.ndarray, best_anchor: Tensor, network: Network) -> np.ndarray:
    """Flat index of the prediction that learns each box, (K,) int64; see `target_assignment.assign_targets`."""
    levels = [torch.tensor(level, dtype=torch.float32) for level in network.anchors]
    grids = [(network.size // stride, network.size // stride) for stride in network.strides]
    table = anchor_table(levels, network.strides, grids, network.scales_xy or [1.0] * len(levels))
    centres = torch.from_numpy((boxes[:, :2] + boxes[:, 2:]) / 2).float()
    return place_in_cell(centres, table[best_anchor])[0].numpy()
