"""Settings of the anchor-free detectors."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from detection.config.fields import Count, DetectorSection, NotNegative, Positive, Probability

READ_BY_ONE_LOSS = {
    "yolox": ("objectness_weight", "l1_weight"),
    "aligned": ("class_loss", "atss_share", "balance", "distribution_weight"),
}


class YoloxSettings(DetectorSection):
    """What is the anchor-free detectors' own: neck, head, loss and assignment."""

    neck: Literal["fpn", "pan"]
    spp: bool
    neck_channels: Annotated[tuple[Count, ...], Field(min_length=1)]
    head_channels: Count
    head_depthwise: bool
    pixels: Literal["backbone", "bgr255"]
    batch_norm_epsilon: Positive | None
    prior: Annotated[float, Field(gt=0, lt=1)]
    loss: Literal["yolox", "aligned"]
    assigner: Literal["simota", "centre", "centre_cell", "soft_label", "task_aligned", "task_aligned_half", "atss"]
    box_weight: NotNegative
    objectness_weight: NotNegative
    class_weight: NotNegative
    l1_weight: NotNegative
    distribution_weight: NotNegative
    class_loss: Literal["quality_focal", "varifocal"]
    bins: Annotated[int, Field(ge=2)] | None
    atss_share: Probability
    one_to_one: bool
    size_prior: Annotated[float, Field(ge=0.01, le=100)]  # far within what raw values can say
    balance: Literal["predictions", "objects"]

    @model_validator(mode="after")
    def check_loss(self) -> "YoloxSettings":
        for name in ("bins", "one_to_one"):
            if self.loss == "yolox" and getattr(self, name):
                raise ValueError(f"{name}: needs yolox.loss aligned, not yolox")
        return self

    def without_effect(self) -> dict[str, str]:
        return {
            f"yolox.{name}": f"yolox.loss = {self.loss}"
            for loss, names in READ_BY_ONE_LOSS.items()
            for name in names
            if loss != self.loss
        }

    def bound_to_length(self) -> list[str]:
        return ["yolox.atss_share"] * (self.atss_share > 0)
