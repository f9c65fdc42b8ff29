"""Box formulas for one pair, in plain Python."""

import math
from collections.abc import Sequence


def slow_iou(box_1: Sequence[float], box_2: Sequence[float]) -> float:
    """Of corners (x1, y1, x2, y2); the other functions take centre and size."""
    area_1, area_2 = ((box[2] - box[0]) * (box[3] - box[1]) for box in (box_1, box_2))
    shared = slow_intersection(box_1, box_2)
    return shared / (area_1 + area_2 - shared)


def slow_intersection(box_1: Sequence[float], box_2: Sequence[float]) -> float:
    width = min(box_1[2], box_2[2]) - max(box_1[0], box_2[0])
    height = min(box_1[3], box_2[3]) - max(box_1[1], box_2[1])
    return width * height if width > 0 and height > 0 else 0.0


def slow_nms(boxes: Sequence[Sequence[float]], scores: Sequence[float], threshold: float) -> list[int]:
    """Rows that stay, best first, of equal scores the first; what overlaps one of them by more than that goes."""
    kept: list[int] = []
    for row in sorted(range(len(scores)), key=lambda row: (-scores[row], row)):
        if all(slow_iou(boxes[row], boxes[better]) <= threshold for better in kept):
            kept.append(row)
    return kept


def slow_generalized_iou(box_1: list[float], box_2: list[float]) -> float:
    intersection, union, hull_width, hull_height = slow_overlap_and_hull(box_1, box_2)
    hull = hull_width * hull_height
    return intersection / union - (hull - union) / hull


def slow_complete_iou(box_1: list[float], box_2: list[float], alpha: float | None = None) -> float:
    """`alpha` given: held fixed, as in the gradient."""
    intersection, union, hull_width, hull_height = slow_overlap_and_hull(box_1, box_2)
    distance_squared = (box_1[0] - box_2[0]) ** 2 + (box_1[1] - box_2[1]) ** 2
    v = slow_v(box_1, box_2)
    alpha = v / (1 - intersection / union + v) if alpha is None else alpha
    return intersection / union - distance_squared / (hull_width**2 + hull_height**2) - alpha * v


def slow_plain_iou(box_1: list[float], box_2: list[float]) -> float:
    intersection, union, _, _ = slow_overlap_and_hull(box_1, box_2)
    return intersection / union


def slow_distance_iou(box_1: list[float], box_2: list[float]) -> float:
    intersection, union, hull_width, hull_height = slow_overlap_and_hull(box_1, box_2)
    distance_squared = (box_1[0] - box_2[0]) ** 2 + (box_1[1] - box_2[1]) ** 2
    return intersection / union - distance_squared / (hull_width**2 + hull_height**2)


def slow_efficient_iou(box_1: list[float], box_2: list[float]) -> float:
    _, _, hull_width, hull_height = slow_overlap_and_hull(box_1, box_2)
    sides = ((box_1[2] - box_2[2]) / hull_width) ** 2 + ((box_1[3] - box_2[3]) / hull_height) ** 2
    return slow_distance_iou(box_1, box_2) - sides


def slow_scylla_iou(box_1: list[float], box_2: list[float]) -> float:
    """As in the paper, with its arcsine."""
    intersection, union, hull_width, hull_height = slow_overlap_and_hull(box_1, box_2)
    dx, dy = abs(box_1[0] - box_2[0]), abs(box_1[1] - box_2[1])
    sine = min(dx, dy) / math.hypot(dx, dy) if dx or dy else 0.0
    angle = 1 - 2 * math.sin(math.asin(sine) - math.pi / 4) ** 2
    distance = sum(1 - math.exp((angle - 2) * (d / side) ** 2) for d, side in ((dx, hull_width), (dy, hull_height)))
    changes = [abs(box_1[i] - box_2[i]) / max(box_1[i], box_2[i]) for i in (2, 3)]
    return intersection / union - (distance + sum((1 - math.exp(-change)) ** 4 for change in changes)) / 2


def slow_v(box_1: list[float], box_2: list[float]) -> float:
    return 4 / math.pi**2 * (math.atan(box_2[2] / box_2[3]) - math.atan(box_1[2] / box_1[3])) ** 2


def slow_overlap_and_hull(box_1: list[float], box_2: list[float]) -> tuple[float, float, float, float]:
    left, right, top, bottom = [], [], [], []
    for x, y, width, height in (box_1, box_2):
        left.append(x - width / 2)
        right.append(x + width / 2)
        top.append(y - height / 2)
        bottom.append(y + height / 2)
    width, height = min(right) - max(left), min(bottom) - max(top)
    intersection = width * height if width > 0 and height > 0 else 0.0
    union = box_1[2] * box_1[3] + box_2[2] * box_2[3] - intersection
    return intersection, union, max(right) - min(left), max(bottom) - min(top)
