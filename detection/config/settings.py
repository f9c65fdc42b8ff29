"""Schema of the settings, one class per section of `args.yaml`. Imports no torch.

Order of precedence, lowest first: args.yaml, each `--config` overlay in turn, `key.path=value` words, flags.
"""

import itertools
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from detection.config.augmentation import AugmentationSettings
from detection.config.efficientdet_settings import EfficientDetSettings
from detection.config.fields import (
    Count,
    DetectorSection,
    Duration,
    GreyLevel,
    NotNegative,
    Positive,
    Probability,
    Section,
    amount_of,
    check_device,
    check_range,
    is_zero,
)
from detection.config.yolo_settings import DARKNET_CFG, YoloSettings
from detection.config.yolox_settings import YoloxSettings
from detection.errors import SettingsError

Placement = Literal["letterbox", "top_left", "squash"]  # copy of `ops.letterbox.Placement`, whose module imports torch
BACKBONE_NAMES = (
    *("darknet", "darknet_tiny", "mobilenet_v2", "mobilenet_v2_leaky", "mobilenet_v3_large", "mobilenet_v3_small"),
    "resnet50",
    *(f"{form}efficientnet_b{number}" for form in ("", "tf_") for number in range(8)),
    DARKNET_CFG,
)


def check_pretrained(value: Any) -> Any:
    if not isinstance(value, bool | str) or value == "":
        raise ValueError("must be false, true or a FILE")
    return value


def check_backbone(value: str) -> str:
    if value not in BACKBONE_NAMES and not re.fullmatch(r"timm/[\w.]+", value):
        raise ValueError(f"must be {', '.join(BACKBONE_NAMES)} or timm/NAME")
    return value


class RunSettings(Section):
    """Where and how the process runs, and what it logs."""

    name: Annotated[str, Field(pattern=r"^[\w.+-]+$")] | None
    logs_path: str
    device: Annotated[str, BeforeValidator(check_device)]
    lazy: bool
    compile: bool
    deterministic: bool
    precision: Literal["auto", "bf16", "fp16", "off"]
    channels_last: bool
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    preflight: bool
    stop_after: Duration | None
    timeout_minutes: Positive
    log_frequency: Count
    loggers: tuple[str, ...]

    @model_validator(mode="after")
    def check_modes(self) -> "RunSettings":
        if self.lazy and self.compile:
            raise ValueError("compile: must be false in lazy mode, which builds its own graphs")
        return self


class DataSettings(Section):
    """Datasets, their images and how they are loaded."""

    root: str
    format: Literal["auto", "coco", "yolo", "voc"]
    builtin: Literal["digits"] | None
    train_annotations: str | None
    train_images: str | None
    validation_annotations: str | None
    validation_images: str | None
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] | None
    class_names: tuple[str, ...] | None
    voc_corners: Literal["inclusive", "exclusive"]
    difficult: Literal["crowd", "keep"]
    ignore_as_crowd: bool
    skip_empty: bool
    max_train_images: Count | None
    balance: Literal["none", "repeat_factor"]
    balance_threshold: Annotated[float, Field(gt=0, le=1)]
    fake: bool
    num_workers: Annotated[int, Field(ge=0)]
    decoder: Literal["auto", "opencv", "simplejpeg"]
    cache: Literal["none", "memory", "disk"]
    cache_gib: Positive
    cache_path: str | None
    slow_sample_seconds: Positive | None
    strict: bool
    follow_links: bool
    max_unreadable_fraction: Annotated[float, Field(ge=0, lt=1)]
    augmentation: AugmentationSettings

    @model_validator(mode="after")
    def check_names(self) -> "DataSettings":
        if self.class_names is not None and len(set(self.class_names)) != len(self.class_names):
            raise ValueError("class_names: a name occurs twice")
        if self.class_names == ():
            raise ValueError("class_names: must not be empty")
        return self


class ModelSettings(Section):
    """Settings of every detector: backbone, classes, initial weights, and how an image becomes the network input."""

    detector: Annotated[str, Field(pattern=r"^\w+$")]
    backbone: Annotated[str, AfterValidator(check_backbone)]
    cfg: str | None
    pretrained: Annotated[bool | str, BeforeValidator(check_pretrained)]
    num_classes: Count | None
    batch_norm: Literal["standard", "darknet"]
    batch_norm_momentum: Annotated[float, Field(gt=0, le=1)]
    placement: Placement | None
    rounding: Literal["nearest", "down"]
    interpolation: Literal["linear", "area", "cubic", "darknet"]
    fill: tuple[GreyLevel, GreyLevel, GreyLevel] | None
    width: Annotated[float, Field(gt=0, le=4)]
    depth: Annotated[float, Field(gt=0, le=4)]
    leaky_slope: Annotated[float, Field(ge=0, lt=1)]
    pixel_scaling: Literal["backbone", "imagenet"]

    @model_validator(mode="after")
    def check_cfg(self) -> "ModelSettings":
        for name, usual in (("width", 1), ("depth", 1), ("leaky_slope", 0.1)):
            if getattr(self, name) != usual and self.backbone != "darknet":
                raise ValueError(f"{name}: only of backbone darknet; must be {usual} with {self.backbone}")
        if self.backbone == DARKNET_CFG and self.pixel_scaling != "backbone":
            raise ValueError("pixel_scaling: a network from a cfg takes pixels from 0 to 1; must be backbone")
        if (self.backbone == DARKNET_CFG) != (self.cfg is not None):
            raise ValueError(f"cfg: a file exactly where backbone is {DARKNET_CFG}")
        return self


class TrainSettings(Section):
    """Batches, steps, optimizer, EMA and checkpoints."""

    batch_size: Count | Literal["auto"]
    subdivisions: Count
    steps: Duration
    minutes: Positive | None
    image_size: int
    resize_frequency: Annotated[int, Field(ge=0)]
    multiscale_sizes: Annotated[tuple[int, int], AfterValidator(check_range)]
    optimizer: Literal["adam", "adamw", "sgd"]
    learning_rate: NotNegative
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: NotNegative
    clip_norm: Positive | None
    clip_tensor_norm: Positive | None
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | Literal["auto"] | None
    ema_ramp: Duration | None
    unfreeze_step: Duration
    backbone_learning_rate_factor: NotNegative
    backbone_batch_norm: Literal["train", "frozen"]
    save_frequency: Duration
    save_minutes: Positive | None
    keep_checkpoints: Annotated[int, Field(ge=0)]
    max_skipped_steps: Count
    sync_batch_norm: bool
    activation_checkpointing: bool
    patience: Count | None
    learning_rate_batch: Count | None
    nesterov: bool
    backbone_layer_decay: Annotated[float, Field(gt=0, le=1)]
    clean_finish: Probability
    swa_cycles: Annotated[int, Field(ge=0)]
    swa_cycle: Duration

    @model_validator(mode="after")
    def check_optimizer(self) -> "TrainSettings":
        if self.swa_cycles and (self.minutes is not None or is_zero(self.swa_cycle)):
            raise ValueError("swa_cycles: needs train.steps instead of train.minutes, and a swa_cycle above 0")
        if self.nesterov and not (self.optimizer == "sgd" and self.momentum):
            raise ValueError("nesterov: needs train.optimizer=sgd and a train.momentum above 0")
        return self

    @property
    def largest_size(self) -> int:
        """Side of the largest network input in training, in pixels."""
        return self.multiscale_sizes[1] if self.resize_frequency else self.image_size

    @property
    def micro_batch(self) -> int:
        """`batch_size` as a number.

        Raises:
            SettingsError: it is "auto", which only training resolves.
        """
        if self.batch_size == "auto":
            raise SettingsError(
                "train.batch_size=auto: only yolo-v3/main.py resolves it (and writes it to its args.yaml); set a number"
            )
        return self.batch_size


class SchedulerSettings(Section):
    """Learning rate over the steps; which fields count depends on `strategy`."""

    strategy: Literal[
        "LambdaLR",
        "CosineAnnealingWarmRestartsWithWarmup",
        "WarmupMultiStepLR",
        "StepLR",
        "FlatCosine",
        "UnshiftedCosine",
        "constant",
    ]
    warmup: Duration | Literal["auto"]
    index: tuple[Duration, ...]
    scale: tuple[NotNegative, ...]
    T_0: Duration | None
    T_mult: Annotated[int, Field(ge=1, le=2)]
    eta_min: NotNegative
    milestones: tuple[Duration, ...]
    step_size: Duration | None
    gamma: NotNegative
    warmup_start_factor: Probability
    warmup_bias_lr: NotNegative | None
    warmup_power: Positive | None
    eta_min_factor: Probability | None
    flat: Probability
    constant_finish: bool

    @model_validator(mode="after")
    def check_lengths(self) -> "SchedulerSettings":
        if self.strategy == "LambdaLR" and len(self.scale) != len(self.index) + 1:
            raise ValueError(f"scale: needs one value more than index ({len(self.index) + 1}), has {len(self.scale)}")
        if (self.strategy == "StepLR") != (self.step_size is not None) or (
            self.step_size is not None and is_zero(self.step_size)
        ):
            raise ValueError("strategy: StepLR, and it alone, needs a step_size above 0")
        for name in ("index", "milestones"):
            check_ascending(name, getattr(self, name))
        return self


class EvaluationSettings(Section):
    """Validation: images, thresholds and what is drawn."""

    evaluate_frequency: Duration | Literal["auto"] | None
    image_size: int
    batch_size: Count | None
    max_images: Count | None
    confidence_threshold: Annotated[float, Field(ge=0, lt=1)]
    iou_threshold: Probability
    max_detections: Count | None
    backend: Literal["auto", "arrays", "pycocotools"]
    visualization_threshold: Probability
    visualize_images: Annotated[int, Field(ge=0)]
    best_metric: Literal["AP", "AP50"]


class Settings(Section):
    """All settings, checked together."""

    run: RunSettings
    data: DataSettings
    model: ModelSettings
    yolo: YoloSettings
    yolox: YoloxSettings
    efficientdet: EfficientDetSettings
    train: TrainSettings
    scheduler: SchedulerSettings
    evaluation: EvaluationSettings

    @model_validator(mode="after")
    def check_together(self) -> "Settings":
        if self.train.activation_checkpointing and (self.run.compile or self.train.sync_batch_norm):
            other = "run.compile" if self.run.compile else "train.sync_batch_norm"
            raise ValueError(f"train.activation_checkpointing: must be false with {other}")
        names, count = self.data.class_names, self.model.num_classes
        if names is not None and count is not None and len(names) != count:
            raise ValueError(f"data.class_names: has {len(names)} names, but model.num_classes is {count}")
        if self.data.fake and self.data.class_names is None and self.model.num_classes is None:
            raise ValueError("data.fake: synthetic data needs model.num_classes or data.class_names")
        for name in ("steps", "save_frequency"):
            if is_zero(getattr(self.train, name)):
                raise ValueError(f"train.{name}: must be greater than 0")
        frequency = self.evaluation.evaluate_frequency
        if frequency not in ("auto", None) and is_zero(frequency):
            raise ValueError("evaluation.evaluate_frequency: must be greater than 0, or null: at the end only")
        sizes = {
            "train.image_size": [self.train.image_size],
            "train.multiscale_sizes": self.train.multiscale_sizes,
            "evaluation.image_size": [self.evaluation.image_size],
        }
        for name, values in sizes.items():
            if wrong := [value for value in values if value < 1]:  # `Geometry.check_size` checks the multiple
                raise ValueError(f"{name} = {wrong[0]}: must be positive")
        if self.scheduler.strategy == "FlatCosine" and self.scheduler.constant_finish and not self.train.clean_finish:
            raise ValueError("scheduler.constant_finish: must be false where train.clean_finish is 0")
        if (own := self.detector_sections().get(self.model.detector)) is not None:
            own.check_backbone(self.model.backbone)
        return self

    def detector_sections(self) -> dict[str, DetectorSection]:
        """The sections that belong to one detector each, by its name; a detector may have none."""
        sections = ((name, getattr(self, name)) for name in type(self).model_fields)
        return {name: section for name, section in sections if isinstance(section, DetectorSection)}


def check_ascending(name: str, durations: Sequence[int | str]) -> None:
    """Check that durations ascend, steps and epochs separately: comparing the two needs the size of the dataset."""
    for unit in (int, str):
        values = [amount_of(value) for value in durations if isinstance(value, unit)]
        if any(later <= earlier for earlier, later in itertools.pairwise(values)):
            raise ValueError(f"{name}: must be ascending, is {list(durations)}")
