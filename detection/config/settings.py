"""Settings of a run: `args.yaml` + overlays + `key=value` words, validated into frozen sections. Imports no torch.

Order of precedence, lowest first: args.yaml, each `--config` overlay in turn, `key.path=value` words, flags.
"""

import difflib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
)

from detection.errors import SettingsError

SIZE_MULTIPLE = 32  # pixels; the coarsest stride of the detectors
# Settings by which a run of today would differ from one that was trained before there was a choice.
BEFORE_IT_EXISTED: dict[str, Any] = {"data.decoder": "opencv"}
DARKNET_CFG = "darknet_cfg"  # the encoder name that stands for a whole network described by a Darknet .cfg file
ENCODER_NAMES = ("darknet", "darknet_tiny", "mobilenet_v3_large", "mobilenet_v3_small", DARKNET_CFG)


def whole_number(value: Any) -> Any:
    """1e3 is a natural way to write 1000 steps."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|hpu|cuda(:\d+)?", value):
        raise ValueError("must be auto, cpu, cuda, cuda:N, mps or hpu")
    return value


def check_duration(value: int | str) -> int | str:
    """A duration is a number of optimizer steps (5000) or of epochs ("12ep"); `schedules.resolve_steps` counts it."""
    if value >= 0 if isinstance(value, int) else re.fullmatch(r"\d+(\.\d+)?ep", value):
        return value
    raise ValueError('must be a number of steps (5000) or of epochs ("12ep")')


def check_pretrained(value: Any) -> Any:
    if not isinstance(value, bool | str) or value == "":
        raise ValueError("must be false, true or a FILE")
    return value


def check_encoder(value: str) -> str:
    if value not in ENCODER_NAMES and not re.fullmatch(r"timm/[\w.]+", value):
        raise ValueError(f"must be {', '.join(ENCODER_NAMES)} or timm/NAME")
    return value


def check_range(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError("must be [smallest, largest]")
    return value


def is_zero(duration: int | str) -> bool:
    return float(str(duration).removesuffix("ep")) == 0


Duration = Annotated[int | str, BeforeValidator(whole_number), AfterValidator(check_duration)]
Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Range = Annotated[tuple[FiniteFloat, FiniteFloat], AfterValidator(check_range)]
NotNegativeRange = Annotated[tuple[NotNegative, NotNegative], AfterValidator(check_range)]
HueRange = Annotated[
    tuple[Annotated[float, Field(ge=-0.5)], Annotated[float, Field(le=0.5)]], AfterValidator(check_range)
]
Factor = Annotated[float, Field(ge=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
GreyLevel = Annotated[int, Field(ge=0, le=255)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RunSettings(Section):
    name: Annotated[str, Field(pattern=r"^[\w.+-]+$")] | None
    logs_path: str
    device: Annotated[str, AfterValidator(check_device)]
    lazy: bool
    compile: bool
    deterministic: bool
    precision: Literal["auto", "bf16", "fp16", "off"]
    channels_last: bool
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    preflight: bool
    timeout_minutes: Positive
    log_frequency: Count

    @model_validator(mode="after")
    def check_modes(self) -> "RunSettings":
        if self.lazy and self.compile:
            raise ValueError("compile: must be false in lazy mode, which builds its own graphs")
        return self


class MultiplicativeNoise(Section):
    p: Probability
    multiplier: NotNegativeRange
    per_channel: bool
    elementwise: bool


class CLAHE(Section):
    p: Probability
    clip_limit: Annotated[
        tuple[Annotated[FiniteFloat, Field(ge=1)], Annotated[FiniteFloat, Field(ge=1)]], AfterValidator(check_range)
    ]
    tile_grid_size: tuple[Count, Count]


class Posterize(Section):
    p: Probability
    num_bits: Annotated[
        tuple[Annotated[int, Field(ge=1, le=7)], Annotated[int, Field(ge=1, le=7)]], AfterValidator(check_range)
    ]


class ToGray(Section):
    p: Probability


class RandomBrightnessContrast(Section):
    p: Probability
    brightness_limit: Probability
    contrast_limit: Probability


class RGBShift(Section):
    p: Probability
    r_shift_limit: GreyLevel
    g_shift_limit: GreyLevel
    b_shift_limit: GreyLevel


class ColorJitter(Section):
    p: Probability
    brightness: NotNegativeRange
    contrast: NotNegativeRange
    saturation: NotNegativeRange
    hue: HueRange


class GaussNoise(Section):
    p: Probability
    std_range: Annotated[tuple[Probability, Probability], AfterValidator(check_range)]


class RandomFog(Section):
    p: Probability
    fog_coef_range: Annotated[tuple[Probability, Probability], AfterValidator(check_range)]
    alpha_coef: Probability


class Flip(Section):
    p: Probability


class Affine(Section):
    p: Probability
    scale: Annotated[tuple[Positive, Positive], AfterValidator(check_range)]
    translate_percent: Range
    rotate: Range
    shear: Range
    rotate_method: Literal["largest_box", "ellipse"]


class DarknetJitter(Section):
    p: Probability
    jitter: Annotated[float, Field(ge=0, lt=1)]


class DarknetHSV(Section):
    p: Probability
    hue: Annotated[float, Field(ge=0, le=0.5)]
    saturation: Factor
    exposure: Factor


class Expand(Section):
    p: Probability
    ratio: Annotated[tuple[Factor, Factor], AfterValidator(check_range)]


class IoUCrop(Section):
    p: Probability
    min_ious: tuple[Probability, ...]
    min_crop_size: Annotated[float, Field(gt=0, le=1)]


class PhotometricDistortion(Section):
    p: Probability
    brightness: NotNegativeRange
    contrast: NotNegativeRange
    saturation: NotNegativeRange
    hue: HueRange


class AugmentationSettings(Section):
    multiplicative_noise: MultiplicativeNoise
    clahe: CLAHE
    posterize: Posterize
    to_gray: ToGray
    random_brightness_contrast: RandomBrightnessContrast
    rgb_shift: RGBShift
    color_jitter: ColorJitter
    gauss_noise: GaussNoise
    random_fog: RandomFog
    horizontal_flip: Flip
    vertical_flip: Flip
    affine: Affine
    expand: Expand
    iou_crop: IoUCrop
    darknet_jitter: DarknetJitter
    darknet_hsv: DarknetHSV
    photometric_distortion: PhotometricDistortion
    min_visibility: Probability


class DataSettings(Section):
    root: str
    builtin: Literal["digits"] | None
    train_annotations: str | None
    train_images: str | None
    validation_annotations: str | None
    validation_images: str | None
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] | None
    class_names: tuple[str, ...] | None
    balance: Literal["none", "repeat_factor"]
    balance_threshold: Annotated[float, Field(gt=0, le=1)]
    fake: bool
    num_workers: Annotated[int, Field(ge=0)]
    decoder: Literal["auto", "opencv", "simplejpeg"]
    cache: Literal["none", "memory", "disk"]
    cache_gib: Positive
    cache_path: str | None
    slow_sample_seconds: Positive | None
    keep_aspect: bool
    interpolation: Literal["linear", "area", "cubic", "darknet"]
    letterbox_rounding: Literal["nearest", "down"]
    fill: tuple[GreyLevel, GreyLevel, GreyLevel]
    strict: bool
    follow_links: bool
    most_unreadable: Annotated[float, Field(ge=0, lt=1)]
    augmentation: AugmentationSettings

    @model_validator(mode="after")
    def check_names(self) -> "DataSettings":
        if self.class_names is not None and len(set(self.class_names)) != len(self.class_names):
            raise ValueError("class_names: a name occurs twice")
        if self.class_names == ():
            raise ValueError("class_names: must not be empty")
        return self


class YoloSettings(Section):
    encoder: Annotated[str, AfterValidator(check_encoder)]
    cfg: str | None
    pretrained: Annotated[bool | str, BeforeValidator(check_pretrained)]
    spp: bool
    neck_channels: tuple[Count, ...]
    num_classes: Count | None
    anchors: tuple[tuple[tuple[Positive, Positive], ...], ...]
    loss: Literal["darknet", "giou", "ciou", "mmdetection"]
    class_loss: Literal["bce", "cross_entropy"]
    box_weight: NotNegative
    objectness_weight: NotNegative
    class_weight: NotNegative
    ignore_threshold: Probability
    objectness_prior: Annotated[float, Field(gt=0, lt=1)]
    batch_norm: Literal["standard", "darknet"]
    batch_norm_momentum: Annotated[float, Field(gt=0, le=1)]

    @model_validator(mode="after")
    def check_anchors(self) -> "YoloSettings":
        if not self.anchors or any(not level for level in self.anchors):
            raise ValueError("anchors: at least one level with at least one anchor each is needed")
        if self.encoder != DARKNET_CFG and len(self.anchors) != len(self.neck_channels):
            raise ValueError(
                f"neck_channels: has {len(self.neck_channels)} values, anchors has {len(self.anchors)} levels; "
                "one value per level is needed"
            )
        return self

    @model_validator(mode="after")
    def check_spp(self) -> "YoloSettings":
        if self.spp and self.encoder in ("darknet_tiny", DARKNET_CFG):
            raise ValueError(f"spp: encoder {self.encoder} has no neck that could pool; must be false")
        return self

    @model_validator(mode="after")
    def check_cfg(self) -> "YoloSettings":
        if (self.encoder == DARKNET_CFG) != (self.cfg is not None):
            raise ValueError(f"cfg: a file exactly where encoder is {DARKNET_CFG}")
        return self


class TrainSettings(Section):
    batch_size: Count | Literal["auto"]
    subdivisions: Count
    steps: Duration
    image_size: int
    resize_frequency: Annotated[int, Field(ge=0)]
    multiscale_sizes: Annotated[tuple[int, int], AfterValidator(check_range)]
    optimizer: Literal["adam", "adamw", "sgd"]
    learning_rate: NotNegative
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: NotNegative
    clip_norm: Positive | None
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None
    ema_ramp: Duration
    unfreeze_step: Duration
    encoder_learning_rate_factor: NotNegative
    encoder_batch_norm: Literal["train", "frozen"]
    save_frequency: Duration
    save_minutes: Positive | None
    keep_checkpoints: Annotated[int, Field(ge=0)]
    most_skipped_steps: Count
    sync_batch_norm: bool
    activation_checkpointing: bool
    patience: Count | None

    @property
    def largest_size(self) -> int:
        """Side of the largest network input of training, pixels."""
        return self.multiscale_sizes[1] if self.resize_frequency else self.image_size

    @property
    def micro_batch(self) -> int:
        """`batch_size`, where it is a number.

        Raises:
            SettingsError: it is "auto", for which only training finds a number.
        """
        if self.batch_size == "auto":
            raise SettingsError(
                "train.batch_size=auto: yolo-v3/main.py finds the number and writes it into its args.yaml; say one here"
            )
        return self.batch_size


class SchedulerSettings(Section):
    strategy: Literal["LambdaLR", "CosineAnnealingWarmRestartsWithWarmup", "WarmupMultiStepLR", "constant"]
    warmup: Duration
    index: tuple[Duration, ...]
    scale: tuple[NotNegative, ...]
    T_0: Duration | None
    T_mult: Annotated[int, Field(ge=1, le=2)]
    eta_min: NotNegative
    milestones: tuple[Duration, ...]
    gamma: NotNegative
    warmup_start_factor: Probability
    warmup_bias_lr: NotNegative | None

    @model_validator(mode="after")
    def check_lengths(self) -> "SchedulerSettings":
        if self.strategy == "LambdaLR" and len(self.scale) != len(self.index) + 1:
            raise ValueError(f"scale: needs one value more than index ({len(self.index) + 1}), has {len(self.scale)}")
        for name in ("index", "milestones"):
            check_ascending(name, getattr(self, name))
        return self


class EvaluationSettings(Section):
    evaluate_frequency: Duration
    image_size: int
    batch_size: Count | None
    max_images: Count | None
    score: Literal["product", "objectness"]
    confidence_threshold: Annotated[float, Field(ge=0, lt=1)]
    objectness_threshold: Annotated[float, Field(ge=0, lt=1)]
    iou_threshold: Probability
    max_detections: Count | None
    backend: Literal["auto", "arrays", "pycocotools", "faster_coco_eval"]
    visualization_threshold: Probability
    visualize_images: Annotated[int, Field(ge=0)]


class Settings(Section):
    run: RunSettings
    data: DataSettings
    yolo: YoloSettings
    train: TrainSettings
    scheduler: SchedulerSettings
    evaluation: EvaluationSettings

    @model_validator(mode="after")
    def check_together(self) -> "Settings":
        if self.train.activation_checkpointing and (self.run.compile or self.train.sync_batch_norm):
            other = "run.compile" if self.run.compile else "train.sync_batch_norm"
            raise ValueError(f"train.activation_checkpointing: must be false with {other}")
        names, count = self.data.class_names, self.yolo.num_classes
        if names is not None and count is not None and len(names) != count:
            raise ValueError(f"data.class_names: has {len(names)} names, but yolo.num_classes is {count}")
        if self.data.fake and self.data.class_names is None and self.yolo.num_classes is None:
            raise ValueError("data.fake: synthetic data needs yolo.num_classes or data.class_names")
        for name in ("steps", "save_frequency"):
            if is_zero(getattr(self.train, name)):
                raise ValueError(f"train.{name}: must be greater than 0")
        if is_zero(self.evaluation.evaluate_frequency):
            raise ValueError("evaluation.evaluate_frequency: must be greater than 0")
        # A description has its own strides, known when it is built.
        multiple = 1 if self.yolo.encoder == DARKNET_CFG else SIZE_MULTIPLE
        sizes = {
            "train.image_size": [self.train.image_size],
            "train.multiscale_sizes": self.train.multiscale_sizes,
            "evaluation.image_size": [self.evaluation.image_size],
        }
        for name, values in sizes.items():
            if wrong := [value for value in values if value < 1 or value % multiple]:
                raise ValueError(f"{name} = {wrong[0]}: must be a positive multiple of {multiple}")
        return self


def check_ascending(name: str, durations: Sequence[int | str]) -> None:
    """Refuse durations that do not rise; steps and epochs cannot be compared before the dataset is known."""
    for unit in (int, str):
        values = [float(str(value).removesuffix("ep")) for value in durations if isinstance(value, unit)]
        if any(later <= earlier for earlier, later in itertools.pairwise(values)):
            raise ValueError(f"{name}: must be ascending, is {list(durations)}")


# Flat names of seed 002's args.yaml -> where the setting lives here.
FLAT_NAMES = {
    "name": "run.name",
    "logs_path": "run.logs_path",
    "device": "run.device",
    "seed": "run.seed",
    "data_path": "data.root",
    "num_workers": "data.num_workers",
    "classes": "data.class_names",
    "encoder": "yolo.encoder",
    "num_classes": "yolo.num_classes",
    "anchors": "yolo.anchors",
    "ignore_threshold": "yolo.ignore_threshold",
    "batch_size": "train.batch_size",
    "subdivisions": "train.subdivisions",
    "steps": "train.steps",
    "train_img_size": "train.image_size",
    "resize_frequency": "train.resize_frequency",
    "learning_rate": "train.learning_rate",
    "weight_decay": "train.weight_decay",
    "unfreeze_step": "train.unfreeze_step",
    "evaluate_frequency": "evaluation.evaluate_frequency",
    "val_img_size": "evaluation.image_size",
    "confidence_threshold": "evaluation.confidence_threshold",
    "iou_threshold": "evaluation.iou_threshold",
    "visualization_threshold": "evaluation.visualization_threshold",
}
# Settings of seed 002 that have another form here.
REPLACED_NAMES = {
    "continue_training": "use --resume DIRECTORY",
    "checkpoint": "use --resume DIRECTORY",
    "epoch_num": "use --resume DIRECTORY",
    "epochs": 'use train.steps, e.g. train.steps="12ep"',
    "output_path": "use run.logs_path",
    "train_ratio": "use data.validation_fraction",
    "val_ratio": "the whole validation set is evaluated",
    "metric_ratio": "use evaluation.max_images",
    "visualize_ratio": "use evaluation.visualize_images",
}


class _YamlLoader(yaml.SafeLoader):
    """Safe loading by the YAML 1.2 rules users expect: `1e-3` is a number, `off` is a word, a key occurs once."""

    yaml_implicit_resolvers = {
        first: [
            (tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":int", ":timestamp"))
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(
                    f"key {key!r} occurs twice in the section that begins in line {node.start_mark.line + 1}"
                )
        return super().construct_mapping(node, deep)

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        """PyYAML's own reads 010 as octal."""
        return int(self.construct_scalar(node))


_RESOLVERS = (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    (
        "float",
        r"^[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
)


class _YamlDumper(yaml.SafeDumper):
    """Quotes whatever the rules of `_YamlLoader` (or YAML 1.1) would read as something else than a string."""


for _name, _pattern, _first in _RESOLVERS:
    for _rules in (_YamlLoader, _YamlDumper):
        _rules.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), list(_first))
_YamlLoader.add_constructor("tag:yaml.org,2002:int", _YamlLoader.construct_decimal)


def read_yaml(text: str, where: str) -> Any:
    """Parse YAML text; a mistake is one line naming `where`."""
    try:
        return yaml.load(text, Loader=_YamlLoader)  # noqa: S506  (a SafeLoader subclass)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SettingsError(f"{' '.join(where.split())}: not valid YAML: {' '.join(str(error).split())}") from None


def read_settings_file(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"settings file {path} cannot be read: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: must be a mapping of sections, is a {type(content).__name__}")
    return content


class Flag(NamedTuple):
    """A flag of the command line that stands for a setting."""

    spelling: str  # as it was typed: "--batch-size"
    path: str
    value: Any


def load_settings(
    defaults: Path | Settings,
    overlays: Sequence[Path] = (),
    words: Sequence[str] = (),
    flags: Sequence[Flag] = (),
) -> tuple[Settings, list[str]]:
    """Merge and validate all sources.

    Args:
        defaults: the complete `args.yaml`, or the settings of a run that is continued.
        overlays: files with some of its keys, later ones win.
        words: `key.path=value`, value in YAML syntax.
        flags: of the command line.

    Returns:
        The frozen settings, and one notice per flat name or flag with the setting it means.

    Raises:
        SettingsError: unknown key (with the nearest valid one), wrong type or impossible value; or two spellings of one
            setting, both on the command line, with different values.
    """
    tree = defaults.model_dump(mode="json") if isinstance(defaults, Settings) else read_settings_file(defaults)
    known = leaf_paths(tree)
    notices: list[str] = []
    given: dict[str, Flag] = {}
    for file in overlays:
        for key, value in leaf_items(read_settings_file(file)):
            set_leaf(tree, known, key, value, str(file), notices)
    for word in words:
        key, separator, text = word.partition("=")
        if not separator or not key:
            raise SettingsError(f"{word!r}: expected a setting as key.path=value, e.g. train.batch_size=32")
        value = read_yaml(text, word)
        items = (
            [(f"{key}.{inner}", leaf) for inner, leaf in leaf_items(value)]
            if isinstance(value, dict)
            else [(key, value)]
        )
        for inner, leaf in items:
            path = set_leaf(tree, known, inner, leaf, "command line", notices)
            claim(given, Flag(inner, path, leaf))
    for flag in flags:
        claim(given, flag)
        notices.append(f"command line: {flag.spelling} means {flag.path} = {flag.value!r}")
        set_leaf(tree, known, flag.path, flag.value, "command line", notices)
    tree["yolo"]["cfg"] = read_description(tree["yolo"]["cfg"])
    return validate(tree), notices


def read_description(cfg: Any) -> Any:
    """The text of a Darknet description in place of its file name, so that a run and its checkpoint need no file."""
    if not isinstance(cfg, str) or "\n" in cfg:
        return cfg
    try:
        return Path(cfg).read_text(encoding="utf-8").replace("\r\n", "\n").rstrip() + "\n"
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"yolo.cfg: {cfg} cannot be read as text: {error}") from None


def complete_settings(tree: dict[str, Any], defaults: Path) -> Settings:
    """Validated settings of a checkpoint; those that did not exist when it was written get their defaults, or what
    stands in BEFORE_IT_EXISTED."""
    complete = read_settings_file(defaults)
    known = leaf_paths(complete)
    for key, value in (*BEFORE_IT_EXISTED.items(), *leaf_items(tree)):
        set_leaf(complete, known, key, value, "checkpoint", [])
    return validate(complete)


def validate(tree: dict[str, Any]) -> Settings:
    """Turn a complete nested mapping (a resolved file, a checkpoint's copy) into `Settings`; one line on error."""
    try:
        return Settings.model_validate(_tuples(tree))
    except ValidationError as error:
        lines: list[str] = []
        for item in error.errors():
            path = ".".join(
                str(part) for part in item["loc"] if not str(part).startswith(("function-", "constrained-"))
            )
            path = re.sub(r"\.(int|str|literal\[.*\])$", "", path)
            message = item["msg"].removeprefix("Value error, ").replace("Input should", "should")
            if not path:
                line = message
            elif isinstance(item["input"], dict | BaseModel):
                # Our own checks of a section begin with the name of the setting.
                line = f"{path}.{message}" if item["type"] == "value_error" else f"{path}: {message}"
            else:
                line = f"{path} = {_lists(item['input'])!r}: {message}"
            if path not in {earlier.split(" = ")[0] for earlier in lines}:
                lines.append(line)
            elif item["type"] == "literal_error":  # a number or a word
                lines[-1] += f", or {item['ctx']['expected']}"
        raise SettingsError("; ".join(lines)) from None


def dump_settings(settings: Settings) -> str:
    """The resolved settings as YAML text that `load_settings` reads back to the same value."""
    content = settings.model_dump(mode="json")
    return yaml.dump(content, Dumper=_YamlDumper, sort_keys=False, default_flow_style=None, width=120)


def leaf_items(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            items.extend(leaf_items(value, f"{prefix}{key}."))
        else:
            items.append((f"{prefix}{key}", value))
    return items


def leaf_paths(tree: dict[str, Any]) -> list[str]:
    return [path for path, _ in leaf_items(tree)]


def changed_settings(old: Settings, new: Settings) -> dict[str, tuple[Any, Any]]:
    """Full path -> (old value, new value) of every setting in which the two differ."""
    before, after = dict(leaf_items(old.model_dump(mode="json"))), dict(leaf_items(new.model_dump(mode="json")))
    return {key: (before.get(key), after.get(key)) for key in before | after if before.get(key) != after.get(key)}


def claim(given: dict[str, Flag], flag: Flag) -> None:
    """Note what the command line says; the same spelling twice is a correction, another one a contradiction."""
    earlier = given.setdefault(flag.path, flag)
    if earlier.spelling != flag.spelling and earlier.value != flag.value:
        raise SettingsError(
            f"{earlier.spelling} and {flag.spelling} contradict each other: "
            f"{flag.path} = {earlier.value!r} or {flag.value!r}"
        )
    given[flag.path] = flag


def set_leaf(tree: dict, known: list[str], key: str, value: Any, where: str, notices: list[str]) -> str:
    """Put a value into the tree; returns the full path of its setting."""
    if key not in known and key in FLAT_NAMES:
        notices.append(f"{where}: {key} means {FLAT_NAMES[key]}")
        key = FLAT_NAMES[key]
    if key not in known:
        if key in REPLACED_NAMES:
            raise SettingsError(f"{where}: {key} has another form here: {REPLACED_NAMES[key]}")
        if any(path.startswith(f"{key}.") for path in known):
            raise SettingsError(f"{where}: {key} is a section, not a value")
        candidates = difflib.get_close_matches(key, [*known, *FLAT_NAMES], n=1, cutoff=0.0)
        by_last_part = difflib.get_close_matches(
            key.rpartition(".")[2], [path.rpartition(".")[2] for path in known], n=1, cutoff=0.75
        )
        nearest = next((path for path in known if by_last_part and path.endswith("." + by_last_part[0])), candidates[0])
        raise SettingsError(f"{where}: unknown setting {key!r}; the nearest valid name is {nearest!r}")
    *sections, last = key.split(".")
    branch = tree
    for section in sections:
        branch = branch[section]
    branch[last] = value
    return key


def _tuples(value: Any) -> Any:
    """Lists to tuples at any depth: frozen settings hold no lists."""
    if isinstance(value, dict):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(_tuples(inner) for inner in value) if isinstance(value, list) else value


def _lists(value: Any) -> Any:
    """Tuples back to lists: a message shows the value as the user wrote it."""
    return [_lists(inner) for inner in value] if isinstance(value, tuple) else value
