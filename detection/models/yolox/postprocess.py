"""Post-processing of anchor-free detectors: raw outputs to boxes and scores."""

from collections.abc import Sequence

from torch import Tensor

from detection.models.postprocess import DensePostprocess
from detection.models.yolox.layout import Decoding, OutputLayout


class PointPostprocess(DensePostprocess):
    """Boxes, scores and labels per image; the score is class probability, times objectness where the head has it.

    Args:
        layout: of the raw values.
        strides: pixels per cell, per level, ascending.
        confidence_threshold, iou_threshold, max_detections: see `DensePostprocess`.

    Source: YOLOX, https://arxiv.org/abs/2107.08430
    """

    def __init__(
        self,
        layout: OutputLayout,
        strides: Sequence[int],
        confidence_threshold: float = 0.001,
        iou_threshold: float = 0.45,
        max_detections: int | None = 100,
    ) -> None:
        super().__init__(confidence_threshold, iou_threshold, max_detections)
        self.decoding = Decoding(layout, strides)

    def decode(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Decode the predictions of all levels.

        Args:
            outputs: raw values per level, (B, 1, H, W, X).

        Returns:
            Boxes (B, P, 4) xyxy in pixels of the network input and scores (B, P, C).
        """
        raw, points = self.decoding.read(outputs)
        scores = raw.classes.sigmoid()
        if raw.objectness is not None:
            scores = scores * raw.objectness[..., None].sigmoid()
        return self.decoding.boxes(raw.boxes, points), scores
