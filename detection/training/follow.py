"""Evaluate a run while it trains, in another process or on another machine: each new checkpoint once.

The run's own files are only read. Results go to a directory of their own in the run directory, which `report_page` and
`compare_runs.py` read beside the run's.
"""

import argparse
import dataclasses
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

from detection.checkpoints import save_checkpoint
from detection.config.loading import changed_settings, complete_settings
from detection.config.settings import Settings
from detection.config.yaml_files import read_settings_file
from detection.contract import Detector
from detection.data.annotations import annotations_digest
from detection.data.build import DetectionDataset, build_validation_dataset
from detection.data.loaders import build_evaluation_loader
from detection.data.transforms import Transform
from detection.errors import CheckpointError, DataError, OutputError, SettingsError, UserError, say
from detection.evaluation.evaluate import Evaluation, compute_metrics, run_inference
from detection.inference.weights import DEFAULTS, check_classes, open_command_line
from detection.runtime.devices import Machine, describe_device, open_machine
from detection.runtime.reproducibility import environment_report
from detection.runtime.run_directory import EVALUATOR, OLD_LOCKED, STATUS, lock_directory
from detection.training.checkpoint_writer import BEST, LAST
from detection.training.evaluation import keep_results, log_evaluation
from detection.training.loggers import Loggers, build_loggers
from detection.training.loggers.protocol import FAILED, FINISHED, STOPPED
from detection.training.loggers.terminal import show_line
from detection.training.new_checkpoints import Checkpoint, NewCheckpoints, end_of
from detection.training.report_page import read_rows, write_report
from detection.training.schedules import first_finishing_step
from detection.training.step import tell_progress

TRACES = (OLD_LOCKED, STATUS, "args.yaml", LAST)  # one of these is in every run directory, also of older versions
POLL_SECONDS = 5.0  # between two looks at the run directory
COMPARED = ("model", "evaluation")  # sections that make the numbers of one evaluator comparable
FREE = ("evaluation.batch_size", "evaluation.visualize_images", "evaluation.evaluate_frequency")  # of those sections


class Timing(NamedTuple):
    """How long to wait, in seconds.

    Args:
        timeout: without a new checkpoint, after which following ends; None: as long as the run may be alive.
        interval: at least from the beginning of one evaluation to the next.
    """

    timeout: float | None = None
    interval: float = 0.0


@dataclasses.dataclass(frozen=True)
class Followed:
    """A run's detector and validation set on this machine; see `evaluation.Evaluated`."""

    settings: Settings
    detector: Detector
    validation_set: DetectionDataset
    machine: Machine
    steps_per_epoch: float
    steps: int
    same_images: bool  # the validation set is that of the run

    def evaluate(self, content: dict[str, Any]) -> Evaluation:
        """Evaluate the EMA of a checkpoint, or its weights where it has none, with the losses as the run has them."""
        settings, detector = self.settings, self.detector
        try:
            detector.model.load_state_dict(content.get("average") or content["model"])
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"step {content['step']}: another network than the checkpoint before: {reason}"
            ) from None
        criterion = detector.require_criterion()
        done = max(content["step"] - 1, 0)
        finishing = (
            first_finishing_step(settings.train.clean_finish, self.steps) if settings.train.clean_finish else None
        )
        tell_progress(criterion, min(done / self.steps, 1.0), finishing is not None and done >= finishing)
        batch_size = settings.evaluation.batch_size or settings.train.micro_batch
        loader = build_evaluation_loader(
            self.validation_set, batch_size, settings.data.num_workers, self.machine.device
        )
        machine = self.machine
        result = run_inference(
            detector.model, criterion, detector.postprocess, loader, machine.device, machine.autocast
        )
        return compute_metrics([result], self.validation_set.annotations, settings.evaluation.backend)


def follow(arguments: argparse.Namespace, run: Path, timing: Timing) -> None:
    """Evaluate every checkpoint of a run once, until the run has ended.

    Args:
        arguments: command line with the options of `Parser.add_settings` and --output: where the results go, by default
            `EVALUATOR` in the run directory.
        run: run directory, or a file in it.
        timing: see there.

    Raises:
        SettingsError: there is no such run, or an earlier evaluator had other settings.
        OutputError: the results cannot be written, or another process follows the run too.
        UserError: the run ended early, or there was no new checkpoint for too long.
    """
    directory = run.parent if run.is_file() else run
    if timing.timeout is None and not any((directory / name).exists() for name in TRACES):
        raise SettingsError(f"{directory} is no run directory; with a timeout it is waited for")
    results = arguments.output or directory / EVALUATOR
    rows = read_rows(results / "metrics.jsonl") if (results / "metrics.jsonl").is_file() else []
    done = {int(row["step"]) for row in rows if row["step"] is not None and "val/AP50" in row}
    checkpoints, waiting = NewCheckpoints(directory, done), Waiting(directory, timing)
    show_line(f"following {directory}, results in {results}" + (f", {len(done)} steps are evaluated" if done else ""))
    followed, loggers, best = None, None, -math.inf
    status = FAILED
    try:
        while True:
            ended = end_of(directory)  # asked before the search, so what precedes the end is found
            found = False
            for checkpoint in checkpoints:
                found = True
                waiting.for_interval()
                if followed is None or loggers is None:
                    followed = open_followed(arguments, checkpoint)
                    loggers = open_results(followed, results)
                    metric = f"val/{followed.settings.evaluation.best_metric}"
                    best = max((value for row in rows if (value := row.get(metric)) is not None), default=best)
                best = evaluate_and_log(followed, checkpoint, loggers, best)
                waiting.restart()
            if ended and not found:
                break
            if not found:
                waiting.for_news()
        shown = ended == FINISHED and arguments.output is None
        if shown and loggers is not None and followed is not None and followed.same_images:
            renew_page(directory, followed, loggers)
        status = FINISHED
    finally:
        if loggers is not None:
            loggers.finish(status)
    if ended != FINISHED:
        raise UserError(
            f"{directory}: the run {'was' if ended == STOPPED else 'has'} {ended} before its end; what it left is "
            "evaluated; continue it with yolo-v3/main.py --resume, and follow it again"
        )
    show_line(f"the run has finished, {len(done)} of its steps are evaluated: {results}")


class Waiting:
    """The pauses of an evaluator."""

    def __init__(self, directory: Path, timing: Timing) -> None:
        self.directory, self.timing = directory, timing
        self._begun = -math.inf
        self._news = time.monotonic()

    def for_interval(self) -> None:
        """Wait for the time of the next evaluation, and note its beginning."""
        time.sleep(max(self._begun + self.timing.interval - time.monotonic(), 0.0))
        self._begun = time.monotonic()

    def restart(self) -> None:
        """Begin the timeout anew, once a checkpoint is evaluated."""
        self._news = time.monotonic()

    def for_news(self) -> None:
        """Wait a moment for a new checkpoint.

        Raises:
            UserError: there was none for longer than the timeout.
        """
        timeout, now = self.timing.timeout, time.monotonic()
        if timeout is not None and now - self._news >= timeout:
            raise UserError(f"{self.directory}: no new checkpoint for {timeout / 60:g} minutes")
        time.sleep(POLL_SECONDS)


def open_followed(arguments: argparse.Namespace, checkpoint: Checkpoint) -> Followed:
    """Build the detector of a run from one of its checkpoints, and open its validation set.

    Raises:
        SettingsError, DataError, CheckpointError: as in `open_weights` and `build_validation_dataset`.
    """
    given = vars(arguments) | {"weights": checkpoint.path, "cfg": None, "names": None}
    opened = open_command_line(argparse.Namespace(**given), arguments.settings)
    settings = opened.settings
    dataset = build_validation_dataset(settings.data, opened.names, settings.evaluation.max_images)
    dataset.sample_transform = Transform(opened.detector.geometry, settings.evaluation.image_size)
    say(*dataset.source_lines)
    check_classes(opened, dataset.annotations.categories.names)
    if dataset.annotations.crowd.all():
        raise DataError(f"no ground-truth box: none of the {len(dataset)} validation images has a usable box")
    machine = open_machine(settings.run)
    say(f"{describe_device(machine.device)}, {machine.precision}, {len(dataset)} images")
    content = checkpoint.content
    same = content.get("validation_digest") == annotations_digest(dataset.annotations)
    if not same:
        show_line("warning: these are not the validation images of the run; its page stays without these evaluations")
    length = content.get("length") or {"steps": max(checkpoint.step, 1), "steps_per_epoch": math.nan}  # older runs
    detector = machine.to_device(opened.detector)
    return Followed(settings, detector, dataset, machine, length["steps_per_epoch"], length["steps"], same)


def open_results(followed: Followed, results: Path) -> Loggers:
    """Start the loggers of the evaluator in its own directory, as a run does.

    Raises:
        OutputError: it cannot be written, or another evaluator writes to it.
        SettingsError: its earlier evaluations had other settings.
    """
    settings = followed.settings
    if (results / "args.yaml").is_file():
        before = complete_settings(read_settings_file(results / "args.yaml"), DEFAULTS)
        for key, (old, new) in changed_settings(before, settings).items():
            if key.partition(".")[0] in COMPARED and key not in FREE:
                raise SettingsError(
                    f"{results} holds evaluations with {key} = {old!r}, this would be {new!r}; "
                    "take another place with --output DIRECTORY"
                )
    loggers = Loggers(results, build_loggers(settings.run.loggers))
    environment = environment_report(describe_device(followed.machine.device), followed.machine.precision)
    try:
        loggers.start(settings, environment)
    except OSError as error:
        raise OutputError(
            f"results in {results} cannot be written: {error.strerror or error}; take --output DIRECTORY"
        ) from None
    return loggers


def evaluate_and_log(followed: Followed, checkpoint: Checkpoint, loggers: Loggers, best: float) -> float:
    """Evaluate a checkpoint and log it; the best so far stays as best.pt, with its results; returns its metric.

    The row in metrics.jsonl comes last of what a restart needs: without it the checkpoint is evaluated again.
    """
    evaluation = followed.evaluate(checkpoint.content)
    value = evaluation.metrics[followed.settings.evaluation.best_metric] or 0.0
    try:
        if value > best:
            save_checkpoint(loggers.directory / BEST, checkpoint.content)
        log_evaluation(followed, evaluation, checkpoint.step, loggers)
        if value > best:
            keep_results(loggers)
    except OSError as error:
        raise OutputError(f"results in {loggers.directory} cannot be written: {error.strerror or error}") from None
    return max(value, best)


def renew_page(directory: Path, followed: Followed, loggers: Loggers) -> None:
    """Write the page of a run that has ended again, now with these evaluations; a failure is a warning."""
    try:
        with lock_directory(directory):
            page = write_report(directory, followed.validation_set, followed.settings, followed.detector)
        loggers.line(f"report      {page}")
    except (OSError, ValueError, KeyError, OutputError) as error:
        loggers.line(f"warning: the page of the run stays as it is: {' '.join(str(error).split())[:200]}")
