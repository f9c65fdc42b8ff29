"""Schema of the section `yolo` of `args.yaml`. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from detection.config.fields import Count, DetectorSection, NotNegative, Positive, Probability

DARKNET_CFG = "darknet_cfg"  # pseudo backbone: the whole network is built from a Darknet .cfg file
BY_PREDICTION = ("darknet", "giou", "ciou", "freebies", "iou", "multi")  # losses that look at decoded predictions
# Setting -> the value that every loss has, and the losses that know others.
LOSSES_WITH: dict[str, tuple[object, tuple[str, ...]]] = {
    "new_coords": (False, ("giou", "ciou", "multi")),
    "box_loss": (None, ("iou", "multi")),
    "iou_aware": (False, BY_PREDICTION),
    "objectness_target": ("one", BY_PREDICTION),
    "objectness_balance": (None, ("multi",)),
    "anchor_match": ("best", ("multi",)),
    "neighbour_cells": (False, ("multi",)),
}


class YoloSettings(DetectorSection):
    """What is YOLO's own: neck, anchors, loss and score."""

    spp: bool
    neck_channels: tuple[Count, ...]
    anchors: tuple[tuple[tuple[Positive, Positive], ...], ...]
    anchor_size: Count | None
    loss: Literal["darknet", "giou", "ciou", "mmdetection", "freebies", "iou", "multi"]
    class_loss: Literal["bce", "cross_entropy"]
    box_weight: NotNegative
    objectness_weight: NotNegative
    class_weight: NotNegative
    ignore_threshold: Probability
    objectness_prior: Annotated[float, Field(gt=0, lt=1)]
    score: Literal["product", "objectness"]
    objectness_threshold: Annotated[float, Field(ge=0, lt=1)]
    scale_xy: Annotated[float, Field(ge=1)]
    new_coords: bool
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] | Literal["auto"]
    box_loss: Literal["iou", "iou_squared", "giou", "diou", "ciou", "eiou", "siou"] | None
    iou_aware: bool
    iou_aware_factor: Probability
    objectness_target: Literal["one", "iou"]
    objectness_balance: tuple[Positive, ...] | None
    anchor_match: Literal["best", "iou", "ratio"]
    anchor_iou: Annotated[float, Field(gt=0, lt=1)]
    anchor_ratio: Annotated[float, Field(gt=1)]
    neighbour_cells: bool
    neck: Literal["fpn", "pan"]
    head_channels: tuple[Count, ...] | None
    output_kernels: tuple[Literal[1, 3], ...] | None

    @model_validator(mode="after")
    def check_anchors(self) -> "YoloSettings":
        if not self.anchors or any(not level for level in self.anchors):
            raise ValueError("anchors: at least one level with at least one anchor each is needed")
        return self

    @model_validator(mode="after")
    def check_loss(self) -> "YoloSettings":
        for name, (off, losses) in LOSSES_WITH.items():
            if getattr(self, name) != off and self.loss not in losses:
                raise ValueError(f"{name}: needs yolo.loss {' or '.join(losses)}, not {self.loss}")
        if self.label_smoothing and self.class_loss != "bce":
            raise ValueError(f"label_smoothing: needs yolo.class_loss bce, not {self.class_loss}")
        return self

    def check_backbone(self, backbone: str) -> None:
        """Check the neck settings against the backbone; a network from a Darknet cfg brings its own neck.

        Raises:
            ValueError: the number of levels does not match, or a setting does not fit the backbone.
        """
        if backbone != DARKNET_CFG and len(self.anchors) != len(self.neck_channels):
            raise ValueError(
                f"yolo.neck_channels: has {len(self.neck_channels)} values, yolo.anchors has "
                f"{len(self.anchors)} levels; one value per level is needed"
            )
        for name in ("head_channels", "output_kernels"):
            values = getattr(self, name)
            if backbone != DARKNET_CFG and values is not None and len(values) != len(self.anchors):
                raise ValueError(
                    f"yolo.{name}: has {len(values)} values, yolo.anchors has {len(self.anchors)} levels; one value "
                    "per level is needed"
                )
        if self.spp and backbone in ("darknet_tiny", DARKNET_CFG):
            raise ValueError(f"yolo.spp: backbone {backbone} has no neck that could pool; must be false")
        brought = {"scale_xy": 1, "new_coords": False, "iou_aware": False, "neck": "fpn"}
        brought |= {"head_channels": None, "output_kernels": None}
        for name, off in brought.items():
            if backbone == DARKNET_CFG and getattr(self, name) != off:
                part = "neck" if name == "neck" else "head"
                only = "null" if off is None else str(off).lower()
                raise ValueError(f"yolo.{name}: a network from a cfg brings its own {part}; must be {only}")
