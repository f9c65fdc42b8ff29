"""Open a new or resumed run, and check what may change when a run is resumed."""

import argparse
import contextlib
import json
from pathlib import Path
from typing import IO, Any

from detection.config.command_line import DEFAULTS
from detection.config.fields import amount_of
from detection.config.loading import Flag, changed_settings, complete_settings, leaf_items, load_settings
from detection.config.relations import follows_length
from detection.config.settings import Settings
from detection.config.yaml_files import read_settings_file
from detection.errors import CheckpointError, DataError, OutputError, SettingsError, name_list
from detection.foreign_files import clean
from detection.models.own_classifier import CLASSIFIER
from detection.models.stored import load_run, stored_settings
from detection.runtime.distributed import Ranks, read_environment
from detection.runtime.run_directory import is_locked, lock_directory
from detection.training.automatic import load_run_settings
from detection.training.checkpoint_writer import BEST, LAST
from detection.training.loggers import check_loggers
from detection.training.run import Run

AUTO = "auto"  # of --resume
SHOWN_ERROR = 200  # characters
ACCEPT = "--accept-changes continues all the same"
# Settings that may change on resume: where and how long the run goes and how often it saves, not what it learns.
RESUMABLE = (
    "run.device",
    "run.lazy",
    "run.compile",
    "run.deterministic",
    "run.log_frequency",
    "run.loggers",
    "run.logs_path",
    "data.root",
    "data.max_unreadable_fraction",
    "data.num_workers",
    "data.decoder",  # check_continued compares the decoder in use
    "data.cache",
    "data.cache_gib",
    "data.cache_path",
    "data.slow_sample_seconds",
    "train.steps",
    "train.save_frequency",
    "train.save_minutes",
    "train.keep_checkpoints",
    "train.max_skipped_steps",
    "train.activation_checkpointing",
    "train.patience",
    "run.preflight",
    "run.stop_after",
    "run.timeout_minutes",
)


def start_or_continue(arguments: argparse.Namespace) -> None:
    """Turn `--resume auto` into a new run in --output, or into `--resume` of the run that is there.

    The same command line does both, so a scheduler can repeat it. What the run began with is not read again: files of
    --config, and words that its first command line had too. A beginning that never saved is renamed, and begun anew.

    Raises:
        SettingsError: there is no --output, or --extend is given.
        OutputError: a beginning that never saved is in use, or cannot be renamed.
    """
    if arguments.resume != AUTO:
        return
    if arguments.extend:
        raise SettingsError("--extend lengthens a run once; give it with --resume DIRECTORY, then go on with auto")
    arguments.resume = None
    directory = arguments.output
    if directory is None:
        if arguments.model_dir is None:
            raise SettingsError("--resume auto: needs --output DIRECTORY, the run to start or continue")
        return  # --model_dir does the same
    if any(directory.glob("*.pt")):
        began_with = first_words(directory)
        dropped = [*map(str, arguments.config), *(word for word in arguments.settings if word in began_with)]
        named = f"; not read again: {', '.join(dropped)}" if dropped else ""
        arguments.notices = [f"--resume auto: {directory} holds a run, which is continued{named}"]
        arguments.settings = [word for word in arguments.settings if word not in began_with]
        arguments.resume, arguments.output, arguments.config = str(directory), None, []
    elif (directory / "train.log").exists() and (directory / "args.yaml").exists() and read_environment()[0] == 0:
        set_aside(directory)


def first_words(directory: Path) -> list[str]:
    """Return the command line that a run began with; empty where it is not known."""
    try:
        command = json.loads((directory / "environment.json").read_text(encoding="utf-8"))["command"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [str(word) for word in command[1:]] if isinstance(command, list) else []


def set_aside(directory: Path) -> None:
    """Rename a run directory without a checkpoint to `<name>_unsaved_<n>`.

    Raises:
        OutputError: it is in use, or cannot be renamed.
    """
    if is_locked(directory):
        raise OutputError(f"another process writes to {directory}; wait for its end, or choose another")
    number = 1
    while (target := directory.with_name(f"{directory.name}_unsaved_{number}")).exists():
        number += 1
    try:
        directory.rename(target)
    except OSError as error:  # such as a mount point
        raise OutputError(
            f"{directory} holds the beginning of a run that saved nothing, and cannot be renamed ({error.strerror}); "
            "empty it"
        ) from None


def check_same_start(ranks: Ranks, checkpoint: dict[str, Any] | None) -> None:
    """Check that all processes have read the same checkpoint, or none: a shared disk may show an older one to some.

    Raises:
        SettingsError: this process has read another one than the first process.
    """
    own = None if checkpoint is None else checkpoint["step"]
    first = ranks.broadcast(own)
    if own != first:
        here = "sees no last.pt" if own is None else f"continues from step {own}"
        there = "starts a new run" if first is None else f"continues from step {first}"
        raise SettingsError(f"rank {ranks.rank} {here}, the first process {there}: do all see the same run directory?")


def open_run(
    arguments: argparse.Namespace, flags: list[Flag]
) -> tuple[dict[str, Any] | None, Path | None, Settings, list[str], IO[Any] | None]:
    """Read the settings of a new run, or of one that `--resume` continues.

    Returns:
        The checkpoint to continue from, or None; the run directory, or None for a new one below `run.logs_path`; the
        settings; notices for the plan; the lock of the directory, to be kept as long as the run lasts.

    Raises:
        SettingsError: settings are invalid, or must not change on resume.
        CheckpointError: there is no usable checkpoint.
        OutputError: another process writes to the directory.
    """
    if arguments.resume is None:
        settings, notices = load_run_settings(arguments.config, arguments.settings, flags)
        check_loggers(settings.run.loggers)
        return None, arguments.output, settings, notices, None
    checkpoint, directory, settings, notices, lock = open_resumed_run(arguments, flags)
    check_loggers(settings.run.loggers)
    return checkpoint, directory, settings, [*getattr(arguments, "notices", []), *notices], lock


def open_resumed_run(
    arguments: argparse.Namespace, flags: list[Flag]
) -> tuple[dict[str, Any], Path, Settings, list[str], IO[Any] | None]:
    """Read checkpoint, directory, settings and notices of a run to resume, after locking it; see `open_run`."""
    for name in ("config", "output"):
        if getattr(arguments, name):
            raise SettingsError(f"--{name} and --resume are both given; a continued run keeps its own")
    if arguments.resume:
        directory = Path(arguments.resume)
        if directory.is_file():
            if directory.name != "last.pt":
                raise SettingsError(f"--resume {directory}: a run is continued from its last.pt")
            directory = directory.parent
    else:
        logs = Path(load_settings(DEFAULTS, [], arguments.settings)[0].run.logs_path)
        found = sorted(logs.glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise SettingsError(f"--resume without a directory: there is no {logs}/*/last.pt here")
        directory = found[-1].parent
    lock = None if getattr(arguments, "dry_run", False) else lock_before_reading(directory)
    checkpoint = load_last(directory)
    script = "classify.py" if CLASSIFIER in checkpoint else Run.script
    if script != getattr(arguments, "script", Run.script):
        raise SettingsError(f"--resume {directory}: is a run of {script}, which continues it")
    moved: list[str] = []
    old = stored_settings(checkpoint, directory / LAST, DEFAULTS, moved)
    settings, notices = load_settings(old, [], arguments.settings, flags)
    notices = [*moved, *edited_settings(directory, old, settings), *forget_lost_best(directory, checkpoint), *notices]
    changes = changed_settings(old, settings)
    follows = follows_length(old)
    if arguments.extend:
        notices.append(extend(checkpoint, old, settings))
    elif "train.steps" in changes and follows and not arguments.accept_changes:
        raise SettingsError(
            f"--resume: train.steps was {old.train.steps!r} and cannot become {settings.train.steps!r}: "
            f"{' and '.join(follows)} follow the length of the run, so the steps so far would have been others; "
            "--extend goes on from here with the schedule of the longer run"
        )
    refused = {key: values for key, values in changes.items() if key not in RESUMABLE}
    allowed = [key for key in RESUMABLE if not (key == "train.steps" and follows)]
    if refused and not arguments.accept_changes:
        named = ", ".join(f"{key} was {old!r} and cannot become {new!r}" for key, (old, new) in refused.items())
        raise SettingsError(
            f"--resume: {named}, it would be another run ({ACCEPT}); these may change: {', '.join(allowed)}"
        )
    notices += [f"continued with {key} = {after!r} (was {before!r})" for key, (before, after) in changes.items()]
    return checkpoint, directory, settings, notices, lock


def lock_before_reading(directory: Path) -> IO[Any] | None:
    """Lock a run directory in the first process of a run; None: another rank, or there is no directory.

    What another process saved after this one had read last.pt would be lost.

    Raises:
        OutputError: another process writes to the directory, or it cannot be written.
    """
    if read_environment()[0] != 0 or not directory.is_dir():
        return None
    try:
        return lock_directory(directory)
    except OSError as error:
        raise OutputError(f"run directory {directory} cannot be written: {error.strerror or error}") from None


def edited_settings(directory: Path, old: Settings, new: Settings) -> list[str]:
    """Name what the args.yaml of a run says and the run does not do: it follows last.pt and the command line.

    Args:
        old: settings in last.pt.
        new: with those of the command line.
    """
    path = directory / "args.yaml"
    if not path.exists():
        return []
    try:
        written = complete_settings(read_settings_file(path), DEFAULTS)
    except SettingsError as error:
        return [f"warning     args.yaml is written anew, from last.pt: {str(error)[:SHOWN_ERROR]}"]
    followed = dict(leaf_items(new.model_dump(mode="json")))
    edited = {key: values for key, values in changed_settings(old, written).items() if values[1] != followed[key]}
    return [
        f"warning     {path}: {key} = {clean(str(after))} is not followed, last.pt has {clean(str(before))}; "
        "settings of a continued run change on the command line"
        for key, (before, after) in edited.items()
    ]


def forget_lost_best(directory: Path, checkpoint: dict[str, Any]) -> list[str]:
    """Let the next evaluation write best.pt if it is gone, whatever the metric was; returns a line about it."""
    progress = checkpoint["progress"]
    name = "best_ap50" if "best_ap50" in progress else "best_value"  # the older name
    if progress.get(name) is None or (directory / BEST).exists():
        return []
    line = f"warning     {BEST}, of step {progress['best_step']}, is gone; the next evaluation writes a new one"
    progress.update({name: None, "best_step": 0})
    return [line]


def extend(checkpoint: dict[str, Any], old: Settings, new: Settings) -> str:
    """Record in a checkpoint that the run goes on as a longer one (`--extend`); returns a line for the plan.

    Raises:
        SettingsError: `train.steps` is not given, or not larger.
    """
    before, after = old.train.steps, new.train.steps
    comparable = isinstance(before, int) == isinstance(after, int)
    if before == after or (comparable and amount_of(after) < amount_of(before)):
        raise SettingsError(f"--extend: train.steps = {after} must be more than the {before} of the run to continue")
    checkpoint["extended"] = [*checkpoint.get("extended", []), [checkpoint["step"], str(before), str(after)]]
    return f"extended from step {checkpoint['step']} on: the schedule is that of {after} steps, it was that of {before}"


def load_last(directory: Path) -> dict[str, Any]:
    """Read the newest checkpoint of a run; if it is damaged, the error names intact older ones."""
    try:
        return load_run(directory / LAST)
    except CheckpointError as error:
        whole = []
        for path in sorted(directory.glob("*.pt")):
            with contextlib.suppress(CheckpointError):
                whole.append(f"{path.name} (step {load_run(path)['step']})")
        if not whole:
            raise
        raise CheckpointError(f"{error}; intact, to be copied to last.pt: {', '.join(whole)}") from None


def check_continued(run: Run, checkpoint: dict[str, Any], directory: Path | None, accept: bool) -> list[str]:
    """Compare the data and conditions of a resumed run with those of its checkpoint.

    Args:
        accept: return differences as warnings instead of raising; different classes are never accepted.

    Returns:
        One line per difference.

    Raises:
        CheckpointError: the classes differ.
        DataError: the annotations or the image files differ.
        SettingsError: the number of processes, the precision or the image decoder differs, or a run that is extended in
            epochs is not longer in steps.
    """
    if (extended := checkpoint.get("extended")) and run.steps <= extended[-1][0]:
        raise SettingsError(
            f"--extend: train.steps = {extended[-1][2]} are {run.steps} steps, not more than the {extended[-1][0]} "
            "that are done"
        )
    trained = checkpoint["categories"].get("names")
    if list(run.categories.names) != trained:
        raise CheckpointError(
            f"{directory}: trained on the classes {name_list(map(str, trained or []))}, "
            f"the data has {name_list(run.categories.names)}"
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
    for line in run.images.differences(directory) if directory is not None else []:
        if not accept:
            raise DataError(f"{line}, since {directory} began ({ACCEPT})")
        differences.append(line)
    for name, before in checkpoint.get("conditions", {}).items():  # older checkpoints have none
        if before != (now := run.conditions().get(name)):
            line = f"{directory} was trained with {name} {before}, this is {now}"
            if not accept:
                raise SettingsError(f"{line}: the numbers would be others ({ACCEPT})")
            differences.append(line)
    return [f"warning     {line}" for line in differences]
