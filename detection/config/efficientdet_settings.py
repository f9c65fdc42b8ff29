"""Settings of EfficientDet and RetinaNet."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from detection.config.fields import Count, DetectorSection, NotNegative, Positive

# Copy of the keys of `models.efficientdet.variants.VARIANTS`, whose package imports torch.
VariantName = Literal["d0", "d1", "d2", "d3", "d4", "d5", "d6", "d7", "d7x", "retinanet"]
Aspect = tuple[Positive, Positive]


class EfficientDetSettings(DetectorSection):
    """What is EfficientDet's own: size of pyramid and heads, anchors, loss and selection of detections."""

    variant: VariantName
    anchor_scale: Positive | None
    aspects: tuple[Aspect, Aspect, Aspect] | tuple[Positive, Positive, Positive]
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
