"""Layout of the raw values of a YOLO head, and their decoding."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detection.contract import Anchors
from detection.models.yolo.box_coder import decode_predictions
from detection.models.yolo.grid import anchor_table, prediction_table

# Of a prediction's raw values; the classes follow, see `HeadLayout.classes`. IOU exists in IoU-aware heads only.
BOX, OBJECTNESS, IOU = slice(0, 4), 4, 5


def num_values(num_classes: int, iou_aware: bool = False) -> int:
    """Number of raw values per prediction: box, objectness, with `iou_aware` the predicted IoU, classes."""
    return 5 + int(iou_aware) + num_classes


def class_rows(num_anchors: int, num_classes: int, values_before: int = num_values(0)) -> Tensor:
    """Filters of an output convolution that give the class scores, (A, C) int64.

    Args:
        values_before: of each anchor, before its classes.
    """
    return torch.arange(num_anchors * (values_before + num_classes)).view(num_anchors, -1)[:, values_before:]


class Tables(NamedTuple):
    """Constants of assignment and decoding for one input size."""

    anchors: Tensor  # see `grid.anchor_table`
    predictions: Tensor  # see `grid.prediction_table`


class HeadLayout(nn.Module):
    """Anchors, strides and scales of all levels, with the decoding of raw values.

    Args:
        anchors: per level (width, height) in pixels of the network input, stride ascending.
        strides: pixels per cell, per level; two levels may have the same.
        scales_xy: per level, see `box_coder.decode_cxcywh`; None: 1 everywhere.
        new_coords: see `box_coder.decode_cxcywh`.
        iou_aware: see `num_values`.

    Raises:
        ValueError: the numbers of levels differ.
    """

    def __init__(
        self,
        anchors: Anchors,
        strides: Sequence[int],
        scales_xy: Sequence[float] | None = None,
        new_coords: bool = False,
        iou_aware: bool = False,
    ) -> None:
        super().__init__()
        self.strides = list(strides)
        self.scales_xy = [1.0] * len(self.strides) if scales_xy is None else list(scales_xy)
        self.new_coords = new_coords
        self.iou_aware = iou_aware
        self.classes = slice(num_values(0, iou_aware), None)  # of a prediction's raw values
        if not len(anchors) == len(self.strides) == len(self.scales_xy):
            raise ValueError(
                f"{len(anchors)} levels of anchors, {len(self.strides)} strides and {len(self.scales_xy)} scales_xy; "
                "their numbers must be equal"
            )
        self._tables: dict[tuple, Tables] = {}
        for level, level_anchors in enumerate(anchors):
            self.register_buffer(f"anchors_{level}", torch.tensor(level_anchors, dtype=torch.float32), persistent=False)

    @property
    def anchors(self) -> list[Tensor]:
        """Anchors (A, 2) of each level, width and height in pixels."""
        return [self.get_buffer(f"anchors_{level}") for level in range(len(self.strides))]

    def tables(self, sizes: Sequence[tuple[int, int]]) -> Tables:
        """Tables of an input size, cached: building them synchronises with the device.

        Args:
            sizes: (rows, columns) per level.
        """
        if torch.compiler.is_exporting():  # the sizes may be symbolic
            return self._build_tables(sizes)
        key = (self.anchors[0].device, tuple(sizes))
        if key not in self._tables:
            self._tables[key] = self._build_tables(sizes)
        return self._tables[key]

    def _build_tables(self, sizes: Sequence[tuple[int, int]]) -> Tables:
        return Tables(
            anchor_table(self.anchors, self.strides, sizes, self.scales_xy),
            prediction_table(self.anchors, self.strides, sizes, self.scales_xy),
        )

    def decode(self, raw: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Decode raw values to boxes, in float32.

        Args:
            raw: (..., P, 4 or more) in the order of `grid.flatten_levels`; only the box values are read.
            sizes: (rows, columns) per level.

        Returns:
            Boxes (x1, y1, x2, y2) in pixels of the network input, (..., P, 4); may exceed the image.
        """
        return decode_predictions(raw[..., BOX].float(), self.tables(sizes).predictions, self.new_coords)
