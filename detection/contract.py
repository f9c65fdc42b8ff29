"""Interfaces between data, detectors, training and evaluation; see docs/contract.md."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, NotRequired, Protocol, TypedDict, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from detection.errors import SettingsError
from detection.ops.letterbox import Letterbox, Placement, place_image

PADDING_LABEL = -1  # rows of the targets without a box
CROWD_LABEL = -2  # a crowd region: never assigned, and predictions inside carry no negative loss

# Per level and anchor (width, height) in pixels of the network input.
Anchors = Sequence[Sequence[tuple[float, float]]]


class Batch(TypedDict):
    """A collated micro-batch."""

    images: Tensor  # (B, 3, S, S) uint8 RGB
    boxes: Tensor  # (B, G, 4) float32 xyxy in pixels of the network input, padded
    labels: Tensor  # (B, G) int64: class, PADDING_LABEL or CROWD_LABEL
    indices: Tensor  # (B,) int64: indices of the images in the dataset
    weights: NotRequired[Tensor]  # (B, G) float32: a box's share in a weighted mixup, 0 for padding; absent: all 1
    letterboxes: NotRequired[list[Letterbox]]
    unreadable: NotRequired[list[str]]  # a line per image that could not be read and was replaced


@dataclass(frozen=True)
class Geometry:
    """How an image becomes the network input.

    A property of the detector or its weights: training, validation, detection, export and pictures all read it from
    the detector.

    Attributes:
        size_multiple: pixels that the sides of the input must be a multiple of.
        placement: "letterbox" (aspect ratio kept, centred), "top_left" (aspect ratio kept) or "squash".
        rounding: of the resized sides to whole pixels.
        interpolation: of the resize, a key of `data.resize.INTERPOLATIONS`.
        fill: RGB of the empty region, 0..255.
        pixel_range: value of a pixel of 255 before mean and deviation.
        channel_order: of the network input; images are RGB everywhere else.
        pixel_mean, pixel_std: per channel, in `pixel_range`.
    """

    size_multiple: int
    placement: Placement = "letterbox"
    rounding: Literal["nearest", "down"] = "nearest"
    interpolation: str = "linear"
    fill: tuple[int, int, int] = (124, 116, 104)
    pixel_range: float = 1.0
    channel_order: Literal["rgb", "bgr"] = "rgb"
    pixel_mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    pixel_std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def place(self, width: int, height: int, size: int) -> tuple[Letterbox, int, int]:
        """Letterbox of an image of (width, height) in a square of `size`, and the resized width and height."""
        return place_image(width, height, size, self.placement, self.rounding)

    def check_size(self, name: str, size: int) -> None:
        """Check that a side of the input is a multiple of `size_multiple`.

        Args:
            name: path of the setting that holds it, for the error.
            size: pixels.

        Raises:
            SettingsError: it is not.
        """
        if size < 1 or size % self.size_multiple:
            raise SettingsError(f"{name} = {size}: must be a multiple of {self.size_multiple} for this detector")

    def describe(self) -> str:
        """One line for the plan of a run."""
        kind = {"letterbox": "letterbox", "top_left": "letterbox at the top left", "squash": "squashed"}[self.placement]
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (self.pixel_mean, self.pixel_std))
        fill = "" if self.placement == "squash" else f" fill {' '.join(map(str, self.fill))},"
        return (
            f"{kind} ({self.interpolation}),{fill} {self.channel_order.upper()} 0..{self.pixel_range:g}, mean {mean}, "
            f"deviation {std}"
        )


@runtime_checkable
class DetectorModel(Protocol):
    """Protocol of a detector's `nn.Module`, which maps (B, 3, H, W) images to raw outputs per level."""

    backbone: nn.Module  # freezing and learning-rate factors act on it
    strides: tuple[int, ...]  # pixels per cell of each output, ascending
    num_classes: int

    def __call__(self, images: Tensor) -> Any: ...

    def output_convolutions(self) -> list[nn.Conv2d]:
        """Convolutions that make the predictions; re-initialised when the classes change."""
        ...


@runtime_checkable
class HasClassRows(Protocol):
    """A model that can say which filters of its output convolutions belong to which class (optional)."""

    def class_rows(self, num_classes: int) -> list[Tensor]:
        """For each output convolution the filters of the class scores, if there were so many classes, (A, C) int64.

        A is 0 for a convolution without class scores.
        """
        ...


@dataclass(frozen=True)
class AssignedPrediction:
    """A prediction of an image and a ground-truth box assigned to it."""

    image: int  # row of the batch
    gt: int  # row of the image's ground-truth boxes
    level: int
    stride: int  # pixels per cell
    anchor: int  # number within the level; 0 without anchors
    anchor_size: tuple[float, float] | None  # width, height in pixels of the network input; None without anchors
    column: int
    row: int
    overruled: bool  # a later ground-truth box of this prediction gives the box target; this one adds its class only


class FitReport(NamedTuple):
    """How well a dataset's boxes suit a detector."""

    findings: list[tuple[str, list[int] | list[str], list[str]]]  # kind, indices of boxes or names of settings, texts
    numbers: dict[str, float]
    line: str  # for the summary


@dataclass(frozen=True)
class AnchorLayout:
    """The anchors of an anchor-based detector, for tools that fit them to a dataset."""

    levels: Anchors
    strides: tuple[int, ...]
    setting: str  # path of the setting that holds them
    with_anchors: Callable[[Anchors], str] | None = None  # text of the cfg with other anchors, if from a cfg


@dataclass(frozen=True)
class Detector:
    """A model with its criterion, its postprocess and what the scripts need to know about them.

    outputs = model(images); losses = criterion(outputs, targets); detections = postprocess(outputs)

    Attributes:
        model: a `DetectorModel`; images to raw outputs.
        criterion: raw outputs and targets to a dict of weighted float32 scalars; None: detection only.
        postprocess: raw outputs to boxes, scores and labels per image; its `decode` gives all boxes and scores.
        geometry: how an image becomes the network input.
        plan: lines for the plan of a run.
        name: of the network, for messages.
        untrainable: why there is no criterion.
        notices: (name of a setting -> side of the square input in pixels) -> further lines about these sizes.
        score: how the score of a detection is computed, for the header of an evaluation.
        deviations: how its detections depart from the evaluation protocol of docs/contract.md.
        metadata: plain values stored in a raw exported file, from which its outputs can be decoded.
        held_settings: paths of the settings that an exported graph fixes, for its "network" and its "decoding".
        anchors: of anchor-based detectors.
        check_fit: (boxes xyxy (K, 4) in pixels of the network input, image of each box (K,), input size) -> report.
    """

    model: nn.Module
    criterion: nn.Module | None
    postprocess: nn.Module
    geometry: Geometry
    plan: tuple[str, ...] = ()
    name: str = "detector"
    untrainable: str = "this network can detect but not be trained here"
    notices: Callable[[Mapping[str, int]], list[str]] = lambda sizes: []
    score: str = "score"
    deviations: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    held_settings: Mapping[str, list[str]] = field(default_factory=lambda: {"network": [], "decoding": []})
    anchors: AnchorLayout | None = None
    check_fit: Callable[[np.ndarray, np.ndarray, int], FitReport] | None = None

    def require_criterion(self) -> nn.Module:
        """Return the criterion.

        Raises:
            SettingsError: there is none; says why.
        """
        if self.criterion is None:
            raise SettingsError(self.untrainable)
        return self.criterion

    def to(self, device: torch.device, channels_last: bool) -> "Detector":
        """Move model, criterion and postprocess to the device, the model in the channels-last format if asked for."""
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model.to(memory_format=layout)
        return dataclasses.replace(
            self,
            model=self.model.to(device),
            criterion=None if self.criterion is None else self.criterion.to(device),
            postprocess=self.postprocess.to(device),
        )

    def replace(self, **parts: Any) -> "Detector":
        """Return a copy with some attributes replaced."""
        return dataclasses.replace(self, **parts)
