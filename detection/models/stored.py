"""What the checkpoint of a run must hold: its digest only says that a file is whole, anybody can compute one."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detection.checkpoints import RUN_FIELDS, is_count, load_fields
from detection.config.loading import complete_settings
from detection.config.settings import Settings
from detection.errors import CheckpointError, SettingsError
from detection.foreign_files import clean


def load_run(path: Path) -> dict[str, Any]:
    """Load the checkpoint of a run that is continued; errors as `load_fields` with `RUN_FIELDS` and `check_values`."""
    return check_values(load_fields(path, RUN_FIELDS), path)


def check_values(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Check the values in a checkpoint, whose digest anybody can compute; returns it.

    What only resuming reads is checked where it is present. The settings are left to `stored_settings`.

    Raises:
        CheckpointError: names the first field that no training writes.
    """
    for name, (check, allowed) in VALUES.items():
        if name in content and not check(content[name]):
            raise CheckpointError(
                f"checkpoint {path} is refused: {name!r} must be {allowed}, is {shown(content[name])}"
            )
    return content


def shown(value: Any) -> str:
    """Show a value from a file in a few characters: a number or text as it is, of anything else the type."""
    return clean(repr(value)) if isinstance(value, int | float | str) else f"a {type(value).__name__}"


def is_finite(value: Any) -> bool:
    """Whether a value has no NaN and no infinity in it; True for anything that is no number."""
    if isinstance(value, Tensor):
        return bool(torch.isfinite(value).all())
    if isinstance(value, list | tuple):
        return all(map(is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def is_state(value: Any) -> bool:
    """Whether a value is the state of a network."""
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def are_categories(value: Any) -> bool:
    """Whether a value has the classes of a detector; published weights have no ids."""
    if not isinstance(value, dict) or not all(isinstance(value.get(key), list | tuple) for key in ("names", "ids")):
        return False
    names, ids = value["names"], value["ids"]
    typed = all(isinstance(name, str) for name in names) and all(type(id_) is int for id_ in ids)
    return bool(names) and typed and len(ids) in (0, len(names))


def are_groups(value: Any) -> bool:
    """Whether a value is the state of an optimizer with finite rates, decays and momenta."""
    groups = value.get("param_groups") if isinstance(value, dict) else None
    if not isinstance(groups, list) or not isinstance(value.get("state"), dict) or not groups:
        return False
    return all(isinstance(group, dict) and all(map(is_finite, group.values())) for group in groups)


def is_progress(value: Any) -> bool:
    """Whether a value tells of the evaluations so far."""
    if not isinstance(value, dict) or not all(
        is_count(value.get(key)) for key in ("best_step", "evaluations_without_rise", "evaluated_step")
    ):
        return False
    best = value.get("best_ap50" if "best_ap50" in value else "best_value", "")  # the older name
    return best is None or (type(best) in (int, float) and is_finite(best))


def are_extensions(value: Any) -> bool:
    """Whether a value lists [step, length before, length after] of each `--extend`."""
    return isinstance(value, list) and all(
        isinstance(row, list | tuple) and len(row) == 3 and is_count(row[0]) for row in value
    )


def stored_settings(content: dict[str, Any], path: Path, defaults: Path, notices: list[str]) -> Settings:
    """Complete and validate the settings of a checkpoint; arguments as `complete_settings`.

    Raises:
        CheckpointError: they are not settings of this program, or not of this version.
    """
    try:
        return complete_settings(content["settings"], defaults, notices)
    except (SettingsError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"checkpoint {path}: its settings cannot be used: {reason}") from None


VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (is_state, "tensors by name"),
    "average": (lambda value: value is None or is_state(value), "tensors by name, or None"),
    "categories": (are_categories, "the names of one class or more, and their ids"),
    "optimizer": (are_groups, "'state' and 'param_groups' with finite numbers"),
    "progress": (is_progress, "the finite 'best_value' or None, and numbers of steps"),
    "skipped": (
        lambda value: isinstance(value, dict) and is_count(value.get("total")),
        "a dict with a number as 'total'",
    ),
    "conditions": (lambda value: isinstance(value, dict), "a dict"),
    "extended": (are_extensions, "a list of [step, length before, length after]"),
}
