"""The assignment of several predictions to a box as plain loops."""

from collections import defaultdict
from collections.abc import Sequence

from tests.support.slow_boxes import slow_iou

Place = tuple[int, int, int, int]  # level, anchor, row, column
Box = Sequence[float]


def wh_iou(box: Box, anchor: Sequence[float]) -> float:
    return slow_iou((0, 0, box[2] - box[0], box[3] - box[1]), (0, 0, *anchor))


def sides_fit(box: Box, anchor: Sequence[float], limit: float) -> bool:
    sides = (box[2] - box[0], box[3] - box[1])
    return all(side / of < limit and of / side < limit for side, of in zip(sides, anchor, strict=True))


def best_anchor(box: Box, anchors: Sequence[Sequence[Sequence[float]]]) -> tuple[int, int]:
    """(level, number), the first of equals."""
    every = [(level, number) for level, some in enumerate(anchors) for number in range(len(some))]
    return max(every, key=lambda place: (wh_iou(box, anchors[place[0]][place[1]]), -every.index(place)))


def cells_of(box: Box, stride: int, columns: int, rows: int, neighbours: bool) -> list[tuple[int, int]]:
    """(row, column) of the centre, then the nearer neighbour to the left or right, then the one above or below."""
    x, y = (box[0] + box[2]) / 2 / stride, (box[1] + box[3]) / 2 / stride
    column, row = min(max(int(x), 0), columns - 1), min(max(int(y), 0), rows - 1)
    cells = [(row, column)]
    if neighbours:
        cells.append((row, column - 1 if x - column < 0.5 else column + 1))
        cells.append((row - 1 if y - row < 0.5 else row + 1, column))
    return [(row, column) for row, column in cells if 0 <= row < rows and 0 <= column < columns]


def slow_claims(
    anchors: Sequence[Sequence[Sequence[float]]],
    strides: Sequence[int],
    size: tuple[int, int],
    boxes: Sequence[Box],
    labels: Sequence[int],
    match: str,
    neighbours: bool = False,
    anchor_iou: float = 0.213,
    anchor_ratio: float = 4.0,
) -> dict[Place, int]:
    """Positive predictions of an image of (width, height) and the row of the box that each of them belongs to."""
    claims: dict[Place, list[tuple[bool, float, int]]] = defaultdict(list)
    for gt, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        if label < 0:
            continue
        best = best_anchor(box, anchors)
        for level, some in enumerate(anchors):
            for number, anchor in enumerate(some):
                iou = wh_iou(box, anchor)
                fits = (match == "iou" and iou > anchor_iou) or (
                    match == "ratio" and sides_fit(box, anchor, anchor_ratio)
                )
                if not fits and (level, number) != best:
                    continue
                grid = size[0] // strides[level], size[1] // strides[level]
                for place, (row, column) in enumerate(cells_of(box, strides[level], *grid, neighbours)):
                    first = place == 0 and (level, number) == best
                    claims[level, number, row, column].append((first, iou, gt))
    return {place: max(rivals)[2] for place, rivals in claims.items()}
