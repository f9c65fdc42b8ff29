"""Which predictions learn which ground truth, as a table and as pictures: one panel per level of the network."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from detection.contract import Batch
from detection.drawing.boxes import BLACK, PADDING_LABEL, WHITE, class_color, draw_boxes, make_grid
from detection.models.yolo.criterion import Criterion
from detection.models.yolo.darknet_loss import assign_targets
from detection.models.yolo.mmdetection_loss import MMDetectionLoss, assign_by_grid

PANEL_SIDE = 640  # pixels, at least; smaller inputs are enlarged by a whole factor
GRID_SHARE = 0.3  # of white in the lines of the grid
CELL_SHARE = 0.55  # of the class colour in a cell that learns


@dataclass(frozen=True)
class AssignedPrediction:
    """One prediction of one image and the ground truth that it learns."""

    image: int  # row of the batch
    gt: int  # row of the image's ground-truth boxes
    level: int
    stride: int  # pixels per cell
    anchor: int  # number within the level
    anchor_size: tuple[float, float]  # width, height in pixels of the network input
    column: int
    row: int
    overruled: bool  # a later ground truth of the same prediction gives the box; this one only adds its class


def assigned_predictions(criterion: Criterion, boxes: Tensor, labels: Tensor, size: int) -> list[AssignedPrediction]:
    """What the criterion would teach on these ground-truth boxes, image by image, ground truth by ground truth.

    Args:
        criterion: its anchors, strides and rule of assignment.
        boxes: (x1, y1, x2, y2) in pixels of the network input, (B, G, 4) float32.
        labels: class, -1 padding, -2 crowd, (B, G).
        size: side of the network input in pixels.
    """
    table = criterion.tables([(size // stride, size // stride) for stride in criterion.strides]).anchors
    if isinstance(criterion, MMDetectionLoss):  # several anchors may learn one ground-truth box
        grid = assign_by_grid(boxes, labels, table, criterion.ignore_threshold)
        positive, index, gt = grid.positive, grid.index, grid.gt
        overruled = torch.zeros_like(positive)
    else:
        assignment = assign_targets(boxes, labels, table)
        positive, index, overruled = assignment.valid, assignment.index, ~assignment.last
        gt = torch.arange(labels.shape[1]).expand_as(labels)
    counts = [
        len(anchors) * (size // stride) ** 2
        for anchors, stride in zip(criterion.anchors, criterion.strides, strict=True)
    ]
    starts = np.cumsum([0, *counts])
    found = []
    for image, place in positive.nonzero().tolist():
        flat = int(index[image, place])
        level = int(np.searchsorted(starts, flat, side="right")) - 1
        anchors, stride = criterion.anchors[level], criterion.strides[level]
        cell, anchor = divmod(flat - int(starts[level]), len(anchors))  # the anchor varies fastest
        row, column = divmod(cell, size // stride)
        width, height = anchors[anchor].tolist()
        found.append(
            AssignedPrediction(
                image,
                int(gt[image, place]),
                level,
                stride,
                anchor,
                (width, height),
                column,
                row,
                bool(overruled[image, place]),
            )
        )
    return sorted(found, key=lambda entry: (entry.image, entry.gt, entry.level, entry.anchor))


def draw_level(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    assigned: Sequence[AssignedPrediction],
    stride: int,
    title: str,
) -> np.ndarray:
    """One level: its grid, the cells that learn in the colour of the class, anchors in black and white, ground-truth boxes.

    Args:
        image: the network input, RGB uint8 (S, S, 3).
        boxes, labels: ground-truth boxes of the image, xyxy in pixels of the network input, (G, 4) and (G,).
        names: of the classes.
        assigned: the predictions of this image and level.
        stride: pixels per cell.
        title: text above the panel.
    """
    factor = max(1, -(-PANEL_SIDE // image.shape[0]))
    picture = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR)
    cell = stride * factor
    picture[::cell] = _blend(picture[::cell], WHITE, GRID_SHARE)
    picture[:, ::cell] = _blend(picture[:, ::cell], WHITE, GRID_SHARE)
    for entry in assigned:
        place = np.s_[entry.row * cell : (entry.row + 1) * cell, entry.column * cell : (entry.column + 1) * cell]
        picture[place] = _blend(picture[place], class_color(int(labels[entry.gt])), CELL_SHARE)
    gt_boxes = sorted({entry.gt for entry in assigned})
    notes = []
    for gt in gt_boxes:
        sizes = [
            f"{entry.anchor_size[0]:g} x {entry.anchor_size[1]:g}{' overruled' if entry.overruled else ''}"
            for entry in assigned
            if entry.gt == gt
        ]
        notes.append(f"({', '.join(sizes)})")
    for entry in assigned:
        centre = (np.array([entry.column, entry.row]) + 0.5) * cell
        half = np.array(entry.anchor_size) * factor / 2
        start, end = np.rint(centre - half).astype(int).tolist(), np.rint(centre + half).astype(int).tolist()
        cv2.rectangle(picture, start, end, BLACK, 3)
        cv2.rectangle(picture, start, end, WHITE, 1)
    return draw_boxes(picture, boxes[gt_boxes] * factor, labels[gt_boxes], names, title=title, notes=notes)


def gt_boxes_of(batch: Batch, place: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image (S, S, 3), boxes (G, 4) and labels (G,) of one row of the batch, without padding."""
    labels = batch["labels"][place].numpy()
    real = labels != PADDING_LABEL
    image = np.ascontiguousarray(batch["images"][place].permute(1, 2, 0).numpy())
    return image, batch["boxes"][place].numpy()[real], labels[real]


def draw_targets(
    batch: Batch,
    image_ids: Sequence[int],
    names: Sequence[str],
    criterion: Criterion,
    assigned: Sequence[AssignedPrediction],
) -> np.ndarray:
    """A row per image of the batch, a panel per level; arguments as of the other functions here."""
    panels = []
    for place, number in enumerate(image_ids):
        image, boxes, labels = gt_boxes_of(batch, place)
        for level, stride in enumerate(criterion.strides):
            here = [entry for entry in assigned if (entry.image, entry.level) == (place, level)]
            gt_boxes = len({entry.gt for entry in here})
            title = (
                f"id {number}  level {level}, stride {stride}: {gt_boxes} of {(labels >= 0).sum()} ground-truth boxes"
            )
            panels.append(draw_level(image, boxes, labels, names, here, stride, title))
    return make_grid(panels, len(criterion.strides), padding=6)


def count_targets(criterion: Criterion, assigned: Sequence[AssignedPrediction]) -> list[str]:
    """How many predictions of each level and anchor learn, as lines."""
    lines = []
    for level, (stride, anchors) in enumerate(zip(criterion.strides, criterion.anchors, strict=True)):
        counts = [0] * len(anchors)
        for entry in assigned:
            counts[entry.anchor] += entry.level == level
        sizes = [f"{width:g} x {height:g}" for width, height in anchors.tolist()]
        shown = ", ".join(f"{size}: {count}" for size, count in zip(sizes, counts, strict=True))
        lines.append(f"level {level}, stride {stride}: {sum(counts)} assignments; anchors {shown}")
    if overruled := sum(entry.overruled for entry in assigned):
        lines.append(f"{overruled} ground-truth boxes share a prediction with another, which gives the box")
    return lines


def _blend(pixels: np.ndarray, color: tuple[int, int, int], share: float) -> np.ndarray:
    blended: np.ndarray = np.rint(pixels * (1 - share) + np.array(color) * share).astype(np.uint8)
    return blended
