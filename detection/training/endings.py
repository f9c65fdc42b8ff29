"""How a run ends: what is saved, and the line that its user reads, if it ends early."""

import contextlib
from collections.abc import Iterator

from detection.errors import (
    OUT_OF_MEMORY,
    DataReadError,
    NumericsError,
    OutputError,
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
    """Context of everything that the processes of a run do together; leaves their group at the end.

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
def logged_end(run: Run, state: RunState, saver: Saver, loggers: Loggers) -> Iterator[None]:
    """Context of the steps of a run: saves and logs when it ends early, and finishes the loggers.

    Raises:
        UserError: the run ends early; the line says what was saved and how to continue.
    """
    status = FAILED
    try:
        try:
            yield
            status = FINISHED
        except (UserError, RuntimeError) as error:
            failure = explain(error, run, state, saver, loggers)
            if failure is None:
                raise
            status = STOPPED if isinstance(failure, StoppedBySignal) else FAILED
            loggers.line(failure.line, show=False)  # stderr gets it too
            raise failure from None
        finally:
            # After an error, that one is to be reported.
            with contextlib.nullcontext() if status == FINISHED else contextlib.suppress(OSError):
                loggers.finish(status)
    except BrokenPipeError:  # of stdout
        raise
    except OSError as error:
        raise OutputError(f"run directory {loggers.directory} cannot be written: {error}") from None


def explain(
    error: UserError | RuntimeError, run: Run, state: RunState, saver: Saver, loggers: Loggers
) -> UserError | None:
    """Save what can be saved and return the error for the user; None: the error is a bug."""
    directory = loggers.directory
    resume = f"continue with: yolo-v3/main.py --resume {directory}"
    if isinstance(error, NonFiniteLoss):
        saver.save()  # the skipped steps have changed nothing
        saver.wait()
        bundle = directory / f"non_finite_{min(error.losses):06d}"
        if run.ranks.is_first:
            images = {step: run.image_ids_of_step(step) for step in error.losses}
            write_bundle(bundle, run.checkpoint(state), run.settings.run.seed, error.losses, images)
        return NumericsError(
            f"{error.line}; kept in {bundle}, look into it with: yolo-v3/main.py --replay {bundle}; try a lower "
            "train.learning_rate or a longer scheduler.warmup"
        )
    if isinstance(error, StoppedBySignal | DataReadError):
        saver.save()
        saver.wait()
        # Only the first process saves: if another one alone ends here, the checkpoint on the disk is older.
        saved = run.ranks.is_first or isinstance(error, StoppedBySignal | TooManyUnreadable)
        line = f"{error.line}; {f'saved after step {state.step}, ' if saved else ''}{resume}"
        if not isinstance(error, StoppedBySignal):
            return DataReadError(line)
        if run.ranks.size == 1:  # of several, some may be killed before they have exchanged anything
            report_speed(run, state, loggers)
        return StoppedBySignal(line, error.signal_number)
    if isinstance(error, UserError):
        return error
    failure = run.ranks.explain(error, state.step) or known_failure(error, OUT_OF_MEMORY)
    if failure is None:
        return None
    # In the middle of a step the state is not saved: the checkpoint on the disk counts.
    hint = f"; continue from its {LAST} with: yolo-v3/main.py --resume {directory}"
    return type(failure)(f"{failure.line}{hint if (directory / LAST).exists() else ''}")
