"""Checks of how well the annotated boxes suit a detector: its input size, and what the detector itself can tell."""

import numpy as np

from detection.config.settings import TrainSettings
from detection.contract import Detector, Geometry
from detection.data.annotations import Annotations
from detection.dataset_checks.findings import Findings

TINY = 2.0  # pixels of the network input


def check_fit(
    annotations: Annotations, detector: Detector, train: TrainSettings, split: str, findings: Findings
) -> tuple[dict[str, float], list[str]]:
    """Report boxes that cannot be learned well.

    Crowd regions and boxes of images of unknown size are skipped.

    Args:
        detector: detector, whose weights may be on the device "meta".
        train: settings of the input size.

    Returns:
        Numbers and lines for the summary; both empty if there are no boxes.
    """
    size = train.image_size
    smallest = train.multiscale_sizes[0] if train.resize_frequency else size
    boxes, rows, image_of_box = boxes_at_input(annotations, size, detector.geometry)
    if not len(boxes):
        return {}, []
    ids = annotations.annotation_ids[rows]
    sides = boxes[:, 2:] - boxes[:, :2]
    findings.add("tiny_box", split, ids[(sides * (smallest / size) < TINY).any(axis=1)].tolist())
    numbers: dict[str, float] = {"image_size": size, "boxes": len(boxes)}
    if detector.check_fit is None:
        return numbers, []
    report = detector.check_fit(boxes, image_of_box, size)
    for kind, items, texts in report.findings:
        boxes_named = sorted(int(ids[item]) for item in items if isinstance(item, int))
        findings.add(kind, split, [*(item for item in items if isinstance(item, str)), *boxes_named], texts)
    return numbers | report.numbers, [report.line]


def boxes_at_input(
    annotations: Annotations, size: int, geometry: Geometry
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Map the boxes to the network input, without augmentation.

    Returns:
        Boxes xyxy in pixels of the network input, (K, 4) float64; their rows in the annotations, (K,); and their image
        indices, (K,).
    """
    image_of_box = np.repeat(np.arange(len(annotations)), np.diff(annotations.first_box))
    distinct, which = np.unique(annotations.image_sizes, axis=0, return_inverse=True)
    scale_offset = np.zeros((len(distinct), 4))
    for number, (width, height) in enumerate(distinct.tolist()):
        if width and height:
            letterbox, *_ = geometry.place(width, height, size)
            scale_offset[number] = letterbox.scale_x, letterbox.scale_y, letterbox.left, letterbox.top
    of_box = scale_offset[which.reshape(-1)[image_of_box]]
    rows = np.flatnonzero((of_box[:, 0] > 0) & ~annotations.crowd)
    scale, offset = np.tile(of_box[rows, :2], 2), np.tile(of_box[rows, 2:], 2)
    return annotations.boxes[rows] * scale + offset, rows, image_of_box[rows]
