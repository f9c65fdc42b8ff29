"""Continuing a run: what its checkpoint and the command line say together, and what it may not be continued on."""

import argparse
import contextlib
from pathlib import Path
from typing import Any

from detection.checkpoints import RUN_FIELDS, load_checkpoint, load_fields
from detection.config.command_line import DEFAULTS
from detection.config.loading import Flag, changed_settings, complete_settings, load_settings
from detection.config.settings import Settings
from detection.errors import CheckpointError, DataError, SettingsError
from detection.training.run import Run

ACCEPT = "--accept-changes continues all the same"
# May differ between a run and its continuation: where it runs, how long, how often it saves; not what it learns from.
RESUMABLE = (
    "run.device",
    "run.lazy",
    "run.compile",
    "run.deterministic",
    "run.log_frequency",
    "run.logs_path",
    "data.root",
    "data.most_unreadable",
    "data.num_workers",
    "data.decoder",  # what decoded is a condition of the checkpoint, see check_continued
    "data.cache",
    "data.cache_gib",
    "data.cache_path",
    "data.slow_sample_seconds",
    "train.steps",
    "train.save_frequency",
    "train.save_minutes",
    "train.keep_checkpoints",
    "train.most_skipped_steps",
    "train.activation_checkpointing",
    "train.patience",
    "run.preflight",
    "run.timeout_minutes",
)


def open_resumed_run(
    arguments: argparse.Namespace, flags: list[Flag]
) -> tuple[dict[str, Any], Path, Settings, list[str]]:
    """Checkpoint, directory, settings and notices of a run to continue; the command line may change little of it."""
    for name in ("config", "output"):
        if getattr(arguments, name):
            raise SettingsError(f"--{name} and --resume are both given; a continued run keeps its own")
    if arguments.resume:
        directory = Path(arguments.resume)
    else:
        logs = Path(load_settings(DEFAULTS, [], arguments.settings)[0].run.logs_path)
        found = sorted(logs.glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise SettingsError(f"--resume without a directory: there is no {logs}/*/last.pt here")
        directory = found[-1].parent
    checkpoint = load_last(directory)
    old = complete_settings(checkpoint["settings"], DEFAULTS)
    settings, notices = load_settings(old, [], arguments.settings, flags)
    to_the_end = old.scheduler.strategy == "CosineAnnealingWarmRestartsWithWarmup" and old.scheduler.T_0 is None
    allowed = [key for key in RESUMABLE if not (key == "train.steps" and to_the_end)]
    changes = changed_settings(old, settings)
    refused = {key: values for key, values in changes.items() if key not in allowed}
    if refused and not arguments.accept_changes:
        named = ", ".join(f"{key} was {old!r} and cannot become {new!r}" for key, (old, new) in refused.items())
        raise SettingsError(
            f"--resume: {named}, it would be another run ({ACCEPT}); these may change: {', '.join(allowed)}"
        )
    notices += [f"continued with {key} = {after!r} (was {before!r})" for key, (before, after) in changes.items()]
    return checkpoint, directory, settings, notices


def load_last(directory: Path) -> dict[str, Any]:
    """The newest checkpoint of a run; where it is damaged, the error names others that are whole."""
    try:
        return load_fields(directory / "last.pt", RUN_FIELDS)
    except CheckpointError as error:
        whole = []
        for path in sorted(directory.glob("*.pt")):
            with contextlib.suppress(CheckpointError, KeyError):
                whole.append(f"{path.name} (step {load_checkpoint(path)['step']})")
        if not whole:
            raise
        raise CheckpointError(f"{error}; whole, to be copied to last.pt: {', '.join(whole)}") from None


def check_continued(run: Run, checkpoint: dict[str, Any], directory: Path, accept: bool) -> list[str]:
    """Refuse to continue on other classes than those of the checkpoint, and on other data or under other conditions.

    Args:
        accept: only name what differs, but for the classes.

    Returns:
        What differs, a line each.
    """
    if list(run.categories.names) != checkpoint["categories"]["names"]:
        raise CheckpointError(
            f"{directory}: trained on the classes {', '.join(checkpoint['categories']['names'])}, "
            f"the data has {', '.join(run.categories.names)}"
        )
    differences = []
    for name, digest in (("training", run.data_digest), ("validation", run.validation_digest)):
        key = "data_digest" if name == "training" else "validation_digest"
        if digest == checkpoint.get(key, digest):  # older checkpoints have none of validation
            continue
        line = f"the {name} annotations are not those of {directory}: images, boxes or classes differ"
        if not accept:
            raise DataError(f"{line} ({ACCEPT})")
        differences.append(line)
    for name, before in checkpoint.get("conditions", {}).items():  # older checkpoints have none
        if before != (now := run.conditions()[name]):
            line = f"{directory} was trained with {name} {before}, this is {now}"
            if not accept:
                raise SettingsError(f"{line}: the numbers would be others ({ACCEPT})")
            differences.append(line)
    return [f"warning     {line}" for line in differences]
