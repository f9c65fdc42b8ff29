"""Merge args.yaml, overlays, `key=value` words and flags into one validated `Settings`."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from detection.config.setting_names import (
    CONVERTED,
    FLAT_NAMES,
    MOVED_NAMES,
    PEER_NAMES,
    REPLACED_NAMES,
    REPLACED_VALUES,
    follow_move,
    nearest_name,
)
from detection.config.settings import Settings
from detection.config.yaml_files import read_settings_file, read_yaml, write_yaml
from detection.errors import SettingsError
from detection.foreign_files import read_bounded

# Values for settings missing from old checkpoints, where today's default would change the results.
DEFAULTS_FOR_OLD_CHECKPOINTS: dict[str, Any] = {"data.decoder": "opencv"}

# Paths that may begin with ~, which a shell leaves in key=value words.
PATHS = (
    *("data.root", "data.train_annotations", "data.train_images", "data.validation_annotations"),
    *("data.validation_images", "data.cache_path", "run.logs_path", "model.pretrained", "model.cfg"),
)
# Read by every script, or given to every script together.
INPUT_SIZES = ("train.image_size", "train.resize_frequency", "train.multiscale_sizes", "evaluation.image_size")


class Flag(NamedTuple):
    """Command-line flag that sets a setting."""

    spelling: str  # as typed, e.g. "--batch-size"
    path: str
    value: Any


class Values(NamedTuple):
    """Settings that stand in no file, in the place of an overlay."""

    origin: str  # for messages
    values: dict[str, Any]  # by path


def load_settings(
    defaults: Path | Settings,
    overlays: Sequence[Path] = (),
    words: Sequence[str] = (),
    flags: Sequence[Flag] = (),
    unused: Sequence[str] = (),
) -> tuple[Settings, list[str]]:
    """Merge and validate all sources.

    Args:
        defaults: the complete `args.yaml`, or the settings of a resumed run.
        overlays: files with some of its keys; later ones win.
        words: `key.path=value`, value in YAML syntax.
        flags: command-line flags; they win over everything else.
        unused: sections that the script does not read; see `unused_notice`.

    Returns:
        The frozen settings, and one notice per flag, flat name or old name with the setting it was read as.

    Raises:
        SettingsError: a key is unknown (the message suggests the nearest one), a value has the wrong type or range, or
            the command line sets one setting under two names to different values.
    """
    tree, notices, given = merge_settings(defaults, overlays, words, flags)
    return validate(tree), notices + unused_notice(given, unused)


def merge_settings(
    defaults: Path | Settings,
    overlays: Sequence[Path | Values] = (),
    words: Sequence[str] = (),
    flags: Sequence[Flag] = (),
) -> tuple[dict[str, dict[str, Any]], list[str], list[str]]:
    """Merge all sources without validating values; arguments and errors as in `load_settings`.

    Returns:
        The settings by section, the notices, and the paths that words and flags set.
    """
    tree = defaults.model_dump(mode="json") if isinstance(defaults, Settings) else read_settings_file(defaults)
    known = leaf_paths(tree)
    notices: list[str] = []
    given: dict[str, Flag] = {}
    for overlay in overlays:
        if isinstance(overlay, Values):
            origin, items = overlay.origin, list(overlay.values.items())
        else:
            origin, items = str(overlay), leaf_items(read_settings_file(overlay))
        for key, value in items:
            set_leaf(tree, known, key, value, origin, notices)
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
    for path in PATHS:
        section, _, name = path.partition(".")
        if isinstance(value := tree[section][name], str):
            tree[section][name] = os.path.expanduser(value)
    tree["model"]["cfg"] = read_cfg(tree["model"]["cfg"])
    return tree, notices, list(given)


def unused_notice(given: Sequence[str], sections: Sequence[str]) -> list[str]:
    """Return a notice that names settings of the command line which the script does not read, or none.

    Args:
        given: paths that words and flags set.
        sections: sections that the script does not read, apart from `INPUT_SIZES`.
    """
    unused = [path for path in given if path.partition(".")[0] in sections and path not in INPUT_SIZES]
    verb = "is" if len(unused) == 1 else "are"
    return [f"warning: {', '.join(unused)} {verb} not used by this script"] if unused else []


def read_cfg(cfg: Any) -> Any:
    """Replace the file name of a Darknet cfg by its text, so that a run and its checkpoint do not need the file."""
    if not isinstance(cfg, str) or "\n" in cfg:
        return cfg
    try:
        content = read_bounded(Path(cfg))
    except (OSError, ValueError) as error:
        raise SettingsError(f"model.cfg: {cfg} cannot be read: {error}") from None
    return decode_cfg(content).replace("\r\n", "\n").rstrip() + "\n"


def decode_cfg(content: bytes) -> str:
    """The text of a Darknet cfg, which is ASCII but for comments: UTF-8, Chinese (GBK) or Western (cp1252)."""
    for encoding in ("utf-8", "gbk"):
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            pass
    return content.decode("cp1252", errors="replace")  # latin-1 would make a byte of 0x85 the end of a line


def complete_settings(tree: dict[str, Any], defaults: Path, notices: list[str] | None = None) -> Settings:
    """Complete and validate the settings of a checkpoint.

    Settings that did not exist when it was written get `DEFAULTS_FOR_OLD_CHECKPOINTS` or the value in `defaults`.

    Args:
        tree: settings in the checkpoint, nested by section.
        defaults: args.yaml.
        notices: gets one line about the settings that had another name, if there are any.

    Raises:
        SettingsError: as in `load_settings`.
    """
    complete = read_settings_file(defaults)
    known = leaf_paths(complete)
    moved: list[str] = []
    for key, value in (*DEFAULTS_FOR_OLD_CHECKPOINTS.items(), *leaf_items(tree)):
        set_leaf(complete, known, key, value, "checkpoint", moved)
    if moved and notices is not None:
        notices.append(f"stored settings: {'; '.join(line.removeprefix('checkpoint: ') for line in moved)}")
    return validate(complete)


def validate(tree: dict[str, Any]) -> Settings:
    """Build `Settings` from a complete nested mapping; all errors are reported in one line."""
    try:
        return Settings.model_validate(tuples_of(tree))
    except ValidationError as error:
        lines: list[str] = []
        for item in error.errors():
            path = ".".join(
                str(part) for part in item["loc"] if not str(part).startswith(("function-", "constrained-"))
            )
            path = re.sub(r"\.(int|str|literal\[.*\])$", "", path)
            message = item["msg"].removeprefix("Value error, ").replace("Input should", "should")
            if item["type"] == "string_type" and item["input"] is not None:
                message += ", in quotes: YAML reads this as another type"
            if not path:
                line = message
            elif isinstance(item["input"], dict | BaseModel):
                # Messages of our own section validators begin with the name of the setting.
                line = f"{path}.{message}" if item["type"] == "value_error" else f"{path}: {message}"
            else:
                line = f"{path} = {_lists(item['input'])!r}: {message}"
            if path not in {earlier.split(" = ")[0] for earlier in lines}:
                lines.append(line)
            elif item["type"] == "literal_error":  # another branch of a union, e.g. a number or "auto"
                lines[-1] += f", or {item['ctx']['expected']}"
        raise SettingsError("; ".join(lines)) from None


def dump_settings(settings: Settings) -> str:
    """Format settings as YAML that `load_settings` reads back to the same value."""
    return write_yaml(settings.model_dump(mode="json"))


def leaf_items(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """List (dotted path, value) of every leaf of nested mappings."""
    items: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            items.extend(leaf_items(value, f"{prefix}{key}."))
        else:
            items.append((f"{prefix}{key}", value))
    return items


def leaf_paths(tree: dict[str, Any]) -> list[str]:
    """List the dotted path of every leaf of nested mappings."""
    return [path for path, _ in leaf_items(tree)]


def changed_settings(old: Settings, new: Settings) -> dict[str, tuple[Any, Any]]:
    """Map the path of every setting that differs to (old value, new value)."""
    before, after = dict(leaf_items(old.model_dump(mode="json"))), dict(leaf_items(new.model_dump(mode="json")))
    return {key: (before.get(key), after.get(key)) for key in before | after if before.get(key) != after.get(key)}


def claim(given: dict[str, Flag], flag: Flag) -> None:
    """Record a command-line setting; the last of equal spellings wins, two spellings must have the same value."""
    earlier = given.setdefault(flag.path, flag)
    if earlier.spelling != flag.spelling and earlier.value != flag.value:
        raise SettingsError(
            f"{earlier.spelling} and {flag.spelling} contradict each other: "
            f"{flag.path} = {earlier.value!r} or {flag.value!r}"
        )
    given[flag.path] = flag


def set_leaf(tree: dict, known: list[str], key: str, value: Any, where: str, notices: list[str]) -> str:
    """Set a value in the tree, following flat and earlier names; returns the full path of the setting."""
    if key not in known and key in FLAT_NAMES:
        notices.append(f"{where}: {key} means {FLAT_NAMES[key]}")
        key = FLAT_NAMES[key]
    if key not in known and key in MOVED_NAMES:
        old, (key, value) = key, follow_move(key, value)
        notices.append(f"{where}: {old} is now {key}{f' = {value}' if old in CONVERTED else ''}")
    if key not in known:
        if key in REPLACED_NAMES:
            raise SettingsError(f"{where}: {key} has another form here: {REPLACED_NAMES[key]}")
        if peer := PEER_NAMES.get(key) or PEER_NAMES.get(key.rpartition(".")[2]):  # train.lr0 too
            raise SettingsError(f"{where}: {key} has another name here: use {peer}")
        if any(path.startswith(f"{key}.") for path in known):
            raise SettingsError(f"{where}: {key} is a section, not a value")
        nearest = nearest_name(key, known)
        hint = f"the nearest valid name is {nearest!r}" if nearest else "yolo-v3/args.yaml lists all"
        raise SettingsError(f"{where}: unknown setting {key!r}; {hint}")
    if isinstance(value, str) and (key, value) in REPLACED_VALUES:
        notices.append(f"{where}: {key}={value} no longer exists and is read as {REPLACED_VALUES[key, value]}")
        value = REPLACED_VALUES[key, value]
    *sections, last = key.split(".")
    branch = tree
    for section in sections:
        branch = branch[section]
    branch[last] = value
    return key


def tuples_of(value: Any) -> Any:
    """Convert lists to tuples at any depth: frozen settings hold no lists."""
    if isinstance(value, dict):
        return {key: tuples_of(inner) for key, inner in value.items()}
    return tuple(tuples_of(inner) for inner in value) if isinstance(value, list) else value


def _lists(value: Any) -> Any:
    """Convert tuples back to lists, so that messages show values as the user wrote them."""
    return [_lists(inner) for inner in value] if isinstance(value, tuple) else value
