"""Errors a user can cause, each with the exit code that `docs/contract.md` lists.

A script wraps its `main` in `exit_with_message`: such an error ends with one line on stderr, never with a traceback.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """Base of all errors that a user can cause and mend; the text is one line: what, where, what is allowed."""

    exit_code = 1


class SettingsError(UserError):
    """A setting or command-line word is unknown, of the wrong type or impossible."""

    exit_code = 2


class DataError(UserError):
    """The dataset is refused before the first step."""

    exit_code = 2


class DataReadError(UserError):
    """An image cannot be read in the middle of a run."""

    exit_code = 3


class NumericsError(UserError):
    """The loss is not a finite number."""

    exit_code = 4


class DeviceMemoryError(UserError):
    """The device (or the machine) has not enough memory for the settings."""

    exit_code = 5


class OutputError(UserError):
    """A run directory or file cannot be written."""

    exit_code = 6


class CheckpointError(UserError):
    """A checkpoint or weights file is damaged, foreign or does not fit."""

    exit_code = 7


class StoppedBySignal(UserError):
    """The run was stopped from outside after its state was saved."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def exit_with_message(main: Callable[[], None]) -> NoReturn:
    """Run `main` and leave the process with the exit code of what happened.

    A `UserError` prints its last line only: loader workers re-raise theirs with a traceback in front of it.
    """
    exit_code = 0
    try:
        main()
    except UserError as error:
        text = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        print(text.removeprefix(f"{type(error).__module__}.{type(error).__name__}: "), file=sys.stderr)
        exit_code = error.exit_code
    except KeyboardInterrupt:  # Ctrl-C while there is nothing to save yet
        print("stopped by SIGINT", file=sys.stderr)
        exit_code = 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our output (`... | head`) has gone; Python would print a traceback while flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(exit_code)
