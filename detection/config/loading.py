"""From args.yaml, overlays, `key=value` words and flags to one validated `Settings`."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import (
    BaseModel,
    ValidationError,
)

from detection.config.settings import Settings
from detection.config.yaml_files import read_settings_file, read_yaml, write_yaml
from detection.errors import SettingsError

# Settings by which a run of today would differ from one that was trained before there was a choice.
DEFAULTS_FOR_OLD_CHECKPOINTS: dict[str, Any] = {"data.decoder": "opencv"}


# Flat names, as in the args.yaml of the research repository -> where the setting lives here.
FLAT_NAMES = {
    "name": "run.name",
    "logs_path": "run.logs_path",
    "device": "run.device",
    "seed": "run.seed",
    "data_path": "data.root",
    "num_workers": "data.num_workers",
    "classes": "data.class_names",
    "encoder": "model.backbone",
    "backbone": "model.backbone",
    "num_classes": "model.num_classes",
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


# Settings of the research repository that have another form here.
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


# Values that no longer exist -> the value that stands for them.
REPLACED_VALUES = {("evaluation.backend", "faster_coco_eval"): "arrays"}
# Earlier paths of settings -> where they live now. Overlays, command lines and checkpoints of any age keep working.
MOVED_NAMES = {
    **{
        f"yolo.{name}": f"model.{name}"
        for name in ("cfg", "pretrained", "num_classes", "batch_norm", "batch_norm_momentum")
    },
    "yolo.encoder": "model.backbone",
    "data.keep_aspect": "model.placement",
    "data.letterbox_rounding": "model.rounding",
    "data.interpolation": "model.interpolation",
    "data.fill": "model.fill",
    "data.most_unreadable": "data.max_unreadable_fraction",
    "train.encoder_learning_rate_factor": "train.backbone_learning_rate_factor",
    "train.encoder_batch_norm": "train.backbone_batch_norm",
    "train.most_skipped_steps": "train.max_skipped_steps",
    "evaluation.score": "yolo.score",
    "evaluation.objectness_threshold": "yolo.objectness_threshold",
}
MOVED_VALUES = {("data.keep_aspect", True): "letterbox", ("data.keep_aspect", False): "squash"}
CONVERTED = {key for key, _ in MOVED_VALUES}


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
    tree["model"]["cfg"] = read_cfg(tree["model"]["cfg"])
    return validate(tree), notices


def read_cfg(cfg: Any) -> Any:
    """The text of a Darknet cfg in place of its file name, so that a run and its checkpoint need no file."""
    if not isinstance(cfg, str) or "\n" in cfg:
        return cfg
    try:
        return Path(cfg).read_text(encoding="utf-8").replace("\r\n", "\n").rstrip() + "\n"
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"model.cfg: {cfg} cannot be read as text: {error}") from None


def complete_settings(tree: dict[str, Any], defaults: Path) -> Settings:
    """Validated settings of a checkpoint; those that did not exist when it was written get their defaults, or what
    stands in DEFAULTS_FOR_OLD_CHECKPOINTS."""
    complete = read_settings_file(defaults)
    known = leaf_paths(complete)
    for key, value in (*DEFAULTS_FOR_OLD_CHECKPOINTS.items(), *leaf_items(tree)):
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
    return write_yaml(settings.model_dump(mode="json"))


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


def follow_move(key: str, value: Any) -> tuple[str, Any]:
    """Path and value today of a setting under an earlier path."""
    return MOVED_NAMES[key], MOVED_VALUES.get((key, value), value) if isinstance(value, bool) else value


def set_leaf(tree: dict, known: list[str], key: str, value: Any, where: str, notices: list[str]) -> str:
    """Put a value into the tree; returns the full path of its setting."""
    if key not in known and key in FLAT_NAMES:
        notices.append(f"{where}: {key} means {FLAT_NAMES[key]}")
        key = FLAT_NAMES[key]
    if key not in known and key in MOVED_NAMES:
        old, (key, value) = key, follow_move(key, value)
        notices.append(f"{where}: {old} is now {key}{f' = {value}' if old in CONVERTED else ''}")
    if key not in known:
        if key in REPLACED_NAMES:
            raise SettingsError(f"{where}: {key} has another form here: {REPLACED_NAMES[key]}")
        if any(path.startswith(f"{key}.") for path in known):
            raise SettingsError(f"{where}: {key} is a section, not a value")
        spellings = [*known, *MOVED_NAMES]
        candidates = difflib.get_close_matches(key, [*known, *FLAT_NAMES, *MOVED_NAMES], n=1, cutoff=0.0)
        by_last_part = difflib.get_close_matches(
            key.rpartition(".")[2], [path.rpartition(".")[2] for path in spellings], n=1, cutoff=0.75
        )
        nearest = next(
            (path for path in spellings if by_last_part and path.endswith("." + by_last_part[0])),
            candidates[0],
        )
        nearest = MOVED_NAMES.get(nearest, nearest)
        raise SettingsError(f"{where}: unknown setting {key!r}; the nearest valid name is {nearest!r}")
    if isinstance(value, str) and (key, value) in REPLACED_VALUES:
        notices.append(f"{where}: {key}={value} no longer exists and is read as {REPLACED_VALUES[key, value]}")
        value = REPLACED_VALUES[key, value]
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
