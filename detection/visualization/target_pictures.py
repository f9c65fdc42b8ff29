"""Show which predictions are assigned to which ground truth: a table, and pictures with one panel per level."""

from collections import Counter
from collections.abc import Sequence

import cv2
import numpy as np

from detection.contract import PADDING_LABEL, Anchors, AssignedPrediction, Batch
from detection.drawing.boxes import class_color, draw_boxes, make_grid
from detection.drawing.tags import BLACK, WHITE

PANEL_SIDE = 640  # minimum in pixels; smaller inputs are enlarged by an integer factor
GRID_SHARE = 0.3  # opacity of the white grid lines
CELL_SHARE = 0.55  # opacity of the class colour in an assigned cell


def draw_level(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    assigned: Sequence[AssignedPrediction],
    stride: int,
    title: str,
) -> np.ndarray:
    """Draw a level: grid, assigned cells in the colour of their class, anchors in black and white, ground-truth boxes.

    Without anchors a box is marked with the number of its cells on this level.

    Args:
        image: the network input, RGB uint8 (S, S, 3).
        boxes, labels: ground-truth boxes of the image, xyxy in pixels of the network input, (G, 4) and (G,).
        names: class names.
        assigned: assigned predictions of this image and level.
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
        here = [entry for entry in assigned if entry.gt == gt]
        sizes = [
            f"{entry.anchor_size[0]:g} x {entry.anchor_size[1]:g}{' overruled' if entry.overruled else ''}"
            for entry in here
            if entry.anchor_size is not None
        ]
        notes.append(f"({', '.join(sizes) or len(here)})")
    for entry in assigned:
        if entry.anchor_size is None:
            continue
        centre = (np.array([entry.column, entry.row]) + 0.5) * cell
        half = np.array(entry.anchor_size) * factor / 2
        start, end = np.rint(centre - half).astype(int).tolist(), np.rint(centre + half).astype(int).tolist()
        cv2.rectangle(picture, start, end, BLACK, 3)
        cv2.rectangle(picture, start, end, WHITE, 1)
    return draw_boxes(picture, boxes[gt_boxes] * factor, labels[gt_boxes], names, title=title, notes=notes)


def gt_boxes_of(batch: Batch, place: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return image (S, S, 3), boxes (G, 4) and labels (G,) of an element of the batch, without padding."""
    labels = batch["labels"][place].numpy()
    real = labels != PADDING_LABEL
    image = np.ascontiguousarray(batch["images"][place].permute(1, 2, 0).numpy())
    return image, batch["boxes"][place].numpy()[real], labels[real]


def draw_targets(
    batch: Batch,
    image_ids: Sequence[int],
    names: Sequence[str],
    strides: Sequence[int],
    assigned: Sequence[AssignedPrediction],
) -> np.ndarray:
    """Draw a row per image of the batch with a panel per level, see `draw_level`."""
    panels = []
    for place, number in enumerate(image_ids):
        image, boxes, labels = gt_boxes_of(batch, place)
        for level, stride in enumerate(strides):
            here = [entry for entry in assigned if (entry.image, entry.level) == (place, level)]
            gt_boxes = len({entry.gt for entry in here})
            title = (
                f"id {number}  level {level}, stride {stride}: {gt_boxes} of {(labels >= 0).sum()} ground-truth boxes"
            )
            panels.append(draw_level(image, boxes, labels, names, here, stride, title))
    return make_grid(panels, len(strides), padding=6)


def count_targets(strides: Sequence[int], anchors: Anchors | None, assigned: Sequence[AssignedPrediction]) -> list[str]:
    """Format the number of assigned predictions per level and, if there are anchors, per anchor."""
    lines = []
    for level, stride in enumerate(strides):
        here = [entry for entry in assigned if entry.level == level]
        line = f"level {level}, stride {stride}: {len(here)} assignments"
        if anchors is not None:
            counts = Counter(entry.anchor for entry in here)
            sizes = [
                f"{width:g} x {height:g}: {counts[number]}" for number, (width, height) in enumerate(anchors[level])
            ]
            line += f"; anchors {', '.join(sizes)}"
        lines.append(line)
    if overruled := sum(entry.overruled for entry in assigned):
        lines.append(f"{overruled} ground-truth boxes share a prediction with another, which gives the box")
    return lines


def _blend(pixels: np.ndarray, color: tuple[int, int, int], share: float) -> np.ndarray:
    blended: np.ndarray = np.rint(pixels * (1 - share) + np.array(color) * share).astype(np.uint8)
    return blended
