"""Errors a user can cause, each with the exit code that `docs/contract.md` lists.

A script wraps its `main` in `exit_with_message`: such an error ends with one line on stderr, never with a traceback.
"""

import contextlib
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

# What a terminal obeys or what ends a line: control characters but the tab, separators of lines, marks that reverse the
# direction of writing, and halves of characters, which cannot be encoded.
UNPRINTABLE = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
TRACEBACK = "Traceback (most recent call last)"


def escape(text: str) -> str:
    """Escape, in a line to be printed or logged, what a class name, file name or file may have smuggled into it."""
    return UNPRINTABLE.sub(lambda match: repr(match[0])[1:-1], text)


def say(*lines: str, error: bool = False, end: str = "\n") -> None:
    """Print lines, each escaped, to stdout or stderr at once. Scripts print with it alone, beside a progress bar with
    `tqdm.write(escape(...))`."""
    for line in lines:
        print(escape(line), end=end, file=sys.stderr if error else sys.stdout, flush=True)


class UserError(Exception):
    """Base of all errors that a user can cause and fix; the text is one line: what, where, what is allowed."""

    exit_code = 1

    @property
    def line(self) -> str:
        """The message alone: a loader worker's error arrives with its traceback in front of it."""
        text = str(self).strip() or type(self).__name__
        if TRACEBACK in text:
            text = text.splitlines()[-1]
        return escape(text.removeprefix(f"{type(self).__module__}.{type(self).__name__}: "))


class SettingsError(UserError):
    """A setting or command-line argument is unknown, of the wrong type or impossible."""

    exit_code = 2


class DataError(UserError):
    """The dataset is refused before the first step."""

    exit_code = 2


class DataReadError(UserError):
    """An image cannot be read in the middle of a run."""

    exit_code = 3


class NumericsError(UserError):
    """The loss is non-finite."""

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
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number


class StoppedBySetting(UserError):
    """The run has come as far as `run.stop_after` asks, and was saved."""

    exit_code = 0


MEMORY_HINT = "out of memory: lower evaluation.batch_size or take a smaller evaluation.image_size"
OUT_OF_MEMORY = "out of memory: lower train.batch_size and raise train.subdivisions, or take a smaller train.image_size"


def exit_with_message(main: Callable[[], None], memory_hint: str = MEMORY_HINT) -> NoReturn:
    """Run `main` and exit with the code of its outcome.

    A `UserError`, and a failure of torch that amounts to one, prints one line; anything else is a bug and keeps its
    traceback.

    Args:
        memory_hint: what to do when memory runs out.
    """
    exit_code = 0
    protect_streams()
    try:
        main()
    except UserError as error:
        exit_code = report(error)
    except (RuntimeError, MemoryError) as error:
        known = known_failure(error, memory_hint)
        if known is None:
            raise
        exit_code = report(known)
    except KeyboardInterrupt:  # no `StopRequest` yet, so nothing to save
        print("stopped by SIGINT", file=sys.stderr)
        exit_code = 128 + signal.SIGINT
    except BrokenPipeError:
        pass
    except OSError as error:
        if error.errno != errno.ENOSPC:  # of stdout; errors of a script's own files name the file
            raise
        exit_code = report(OutputError("the output cannot be written: no space left on device"))
    try:
        sys.stdout.flush()
    except OSError as error:
        # The reader of stdout (`... | head`) is gone, or its disk is full. Python would flush again at exit, print a
        # traceback and change the exit code.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            exit_code = exit_code or OutputError.exit_code
    sys.exit(exit_code)


def protect_streams() -> None:
    """Make stdout and stderr escape what their encoding lacks: a class name may have any character, a terminal not.

    Standard streams that whoever started the program has closed are opened on nothing: else the next file would get
    their number, and what a library prints would go into it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115  (stays open)
            os.set_inheritable(stream.fileno(), True)  # as the streams of programs that this one starts
            setattr(sys, name, stream)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def closed_streams() -> list[str]:
    """Names of the streams for output that were closed when the program started, see `protect_streams`."""
    return [name for name in ("stdout", "stderr") if getattr(getattr(sys, name), "name", None) == os.devnull]


def name_list(names: Iterable[str]) -> str:
    """Join class names with commas; a name with a comma or outer spaces is quoted, so that they can be counted."""
    return ", ".join(repr(name) if "," in name or name != name.strip() else escape(name) for name in names)


def report(error: UserError) -> int:
    """Print the error's line to stderr and return its exit code."""
    with contextlib.suppress(OSError):  # stderr may be a file on the full disk
        print(error.line, file=sys.stderr)
    return error.exit_code


def known_failure(error: RuntimeError | MemoryError, memory_hint: str) -> UserError | None:
    """Translate an exception of torch that a user can fix; None: it may be a bug of ours."""
    text = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in text:
        return DeviceMemoryError(f"{memory_hint} ({text[-100:]})")
    if "does not have a deterministic implementation" in text:
        return SettingsError(f"run.deterministic: {text.split(',')[0]}; set run.deterministic=false")
    if "DataLoader worker" in text:
        return DataReadError(f"a loader worker died, perhaps for want of memory (data.num_workers): {text}")
    return None
