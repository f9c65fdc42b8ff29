"""Settings of EfficientDet and RetinaNet."""

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from detection.config.fields import Count, DetectorSection, NotNegative, Positive

# Copy of the keys of `models.efficientdet.variants.VARIANTS`, whose package imports torch.
VariantName = Literal["d0", "d1", "d2", "d3", "d4", "d5", "d6", "d7", "d7x", "retinanet"]
Aspect = tuple[Positive, Positive]


def check_aspects(value: Any) -> Any:
    """Check that aspects are three ratios or three pairs: of a union pydantic's message has a line per branch.

    Raises:
        ValueError: they are not.
    """

    def positive(number: Any) -> bool:
        return isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < math.inf

    rows = value if isinstance(value, list | tuple) else ()
    pairs = [row for row in rows if isinstance(row, list | tuple) and len(row) == 2 and all(map(positive, row))]
    if len(rows) != 3 or not (len(pairs) == 3 or all(map(positive, rows))):
        raise ValueError("must be three ratios of width to height, such as [1.0, 2.0, 0.5], or three [width, height]")
    return value


class EfficientDetSettings(DetectorSection):
    """What is EfficientDet's own: size of pyramid and heads, anchors, loss and selection of detections."""

    variant: VariantName
    anchor_scale: Positive | None
    aspects: Annotated[
        tuple[Aspect, Aspect, Aspect] | tuple[Positive, Positive, Positive], BeforeValidator(check_aspects)
    ]
    redundant_bias: bool | None
    prior: Annotated[float, Field(gt=0, lt=1)]
    positive_iou: Annotated[float, Field(gt=0, le=1)]
    background_iou: Annotated[float, Field(gt=0, le=1)]
    alpha: Annotated[float, Field(gt=0, lt=1)]
    gamma: NotNegative
    delta: Positive
    box_weight: NotNegative
    class_weight: NotNegative
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    nms: Literal["hard", "soft"]
    soft_sigma: Positive
    max_candidates: Count | None
    max_per_image: Count | None

    @model_validator(mode="after")
    def check_thresholds(self) -> "EfficientDetSettings":
        if self.background_iou > self.positive_iou:
            raise ValueError(
                f"background_iou: must not be above efficientdet.positive_iou, {self.positive_iou:g}: "
                "an anchor would be both"
            )
        return self

    def without_effect(self) -> dict[str, str]:
        unread = "efficientdet.soft_sigma" if self.nms == "hard" else "evaluation.iou_threshold"
        return {unread: f"efficientdet.nms = {self.nms}"}
