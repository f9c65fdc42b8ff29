"""Post-processing of EfficientDet and RetinaNet: raw outputs to boxes and scores."""

from collections.abc import Sequence

from torch import Tensor

from detection.models.efficientdet.anchors import AnchorGrid
from detection.models.efficientdet.coder import decode
from detection.models.levels import flatten_levels, sizes_of
from detection.models.postprocess import EVERYTHING, DensePostprocess, Selection


class AnchorPostprocess(DensePostprocess):
    """Boxes, scores and labels per image; the score is the class probability, and an anchor may give several classes.

    Args:
        grid: the anchors.
        confidence_threshold, iou_threshold, max_detections, selection: see `DensePostprocess`.

    Source: `tf2/postprocess.py` of https://github.com/google/automl, folder efficientdet, as its evaluation uses it
    """

    def __init__(
        self,
        grid: AnchorGrid,
        confidence_threshold: float = 0.001,
        iou_threshold: float = 0.5,
        max_detections: int | None = 100,
        selection: Selection = EVERYTHING,
    ) -> None:
        super().__init__(confidence_threshold, iou_threshold, max_detections, selection=selection)
        self.grid = grid

    def decode(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Decode the predictions of all levels.

        Args:
            outputs: raw values per level, (B, A, H, W, 4 + C).

        Returns:
            Boxes (B, P, 4) xyxy in pixels of the network input and scores (B, P, C).
        """
        anchors = self.grid.anchors(sizes_of(outputs), outputs[0].device)
        raw = flatten_levels(outputs).float()
        return decode(raw[..., :4], anchors.cxcywh), raw[..., 4:].sigmoid()
