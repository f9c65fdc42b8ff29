"""End of a run: save the state and report the reason if it ends early."""

import contextlib
from collections.abc import Iterator

from detection.errors import (
    OUT_OF_MEMORY,
    DataReadError,
    NumericsError,
    OutputError,
    StoppedBySetting,
    StoppedBySignal,
    UserError,
    known_failure,
)
from detection.runtime.distributed import Ranks
from detection.training.checkpoint_writer import LAST, Saver
from detection.training.console import report_speed
from detection.training.loggers import Loggers
from detection.training.loggers.protocol import FAILED, FINISHED, STOPPED
from detection.training.replay import write_bundle
from detection.training.run import Run
from detection.training.skipped_steps import NonFiniteLoss
from detection.training.state import RunState
from detection.training.unreadable_images import TooManyUnreadable


@contextlib.contextmanager
def joint_work(ranks: Ranks) -> Iterator[None]:
    """Context of a run with several processes; destroys the process group on exit.

    Raises:
        RankError: another process failed before the first step.
    """
    try:
        yield
    except RuntimeError as error:
        failure = ranks.explain(error, 0)
        if failure is None:
            raise
        raise failure from None
    finally:
        ranks.close()


@contextlib.contextmanager
def logged_end(run: Run, state: RunState, loggers: Loggers) -> Iterator[Saver]:
    """Context of the training loop: saves and logs if the run ends early, and finishes the loggers.

    Yields:
        The saver of the run's checkpoints.

    Raises:
        UserError: the run ended early; the message says what was saved and how to resume.
    """
    saver, status = Saver(run, state, loggers), FAILED
    try:
        try:
            yield saver
            status = FINISHED
        except (UserError, RuntimeError) as error:
            failure = save_and_explain(error, run, state, saver, loggers)
            if failure is None:
                raise
            status = STOPPED if isinstance(failure, StoppedBySetting | StoppedBySignal) else FAILED
            loggers.line(failure.line, show=False)  # stderr gets it too
            raise failure from None
        finally:
            # An earlier error is the one to report.
            with contextlib.nullcontext() if status == FINISHED else contextlib.suppress(OSError):
                loggers.finish(status)
    except BrokenPipeError:  # of stdout
        raise
    except OSError as error:
        raise OutputError(f"run directory {loggers.directory} cannot be written: {error}") from None


def save_and_explain(
    error: UserError | RuntimeError, run: Run, state: RunState, saver: Saver, loggers: Loggers
) -> UserError | None:
    """Save the state if possible and return the error for the user; None: the error is a bug."""
    directory = loggers.directory
    resume = f"continue with: {run.script} --resume {directory}"
    if isinstance(error, NonFiniteLoss):
        saver.save()  # the skipped steps have changed nothing
        saver.wait()
        bundle = directory / f"non_finite_{min(error.losses):06d}"
        if run.ranks.is_first:
            images = {step: run.image_ids_of_step(step) for step in error.losses}
            write_bundle(bundle, run.checkpoint(state), run.settings.run.seed, error.losses, images)
        look = f", look into it with: {run.script} --replay {bundle}" if run.script == Run.script else ""
        return NumericsError(
            f"{error.line}; kept in {bundle}{look}; try a lower train.learning_rate or a longer scheduler.warmup"
        )
    if isinstance(error, StoppedBySetting):
        saver.save()
        saver.wait()
        return StoppedBySetting(f"{error.line}; saved, {resume} run.stop_after=null")
    if isinstance(error, StoppedBySignal | DataReadError):
        saver.save()
        saver.wait()
        # Only the first process saves; if another one fails alone, the checkpoint on the disk is older.
        saved = run.ranks.is_first or isinstance(error, StoppedBySignal | TooManyUnreadable)
        line = f"{error.line}; {f'saved after step {state.step}, ' if saved else ''}{resume}"
        if not isinstance(error, StoppedBySignal):
            return DataReadError(line)
        if run.ranks.size == 1:  # a collective could hang, since other processes may already have been killed
            report_speed(run, state, loggers)
        return StoppedBySignal(line, error.signal_number)
    if isinstance(error, UserError):
        return error
    failure = run.ranks.explain(error, state.step) or known_failure(error, OUT_OF_MEMORY)
    if failure is None:
        return None
    # The state is inconsistent in the middle of a step, so the last checkpoint on the disk is kept.
    hint = f"; continue from its {LAST} with: {run.script} --resume {directory}"
    return type(failure)(f"{failure.line}{hint if (directory / LAST).exists() else ''}")
