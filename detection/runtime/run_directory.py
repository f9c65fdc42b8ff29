"""Creation of run directories, writing to them, and what other processes can know of a run."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from detection.drawing.files import replace_file
from detection.errors import OutputError

EVALUATOR = "evaluator"  # directory in a run directory, of the process that follows the run
LOCKED = "run.lock"  # locked by the process that writes to a run directory; nothing renames or replaces it
OLD_LOCKED = "train.log"  # of older versions
STATUS = "status.json"


def new_run_directory(logs: Path, name: str, wanted: Path | None) -> Path:
    """Create `<logs>/<YYMMDD-HHMMSS>_<name>`, or the directory `wanted`, which must be absent, or empty but for a lock.

    Raises:
        OutputError: the directory cannot be created, or is not empty.
    """
    try:
        if wanted is not None:
            wanted.mkdir(parents=True, exist_ok=True)
            if any(path.name != LOCKED for path in wanted.iterdir()):
                hint = f"; to continue that run use --resume {wanted}" if (wanted / "last.pt").exists() else ""
                raise OutputError(f"--output {wanted} is not empty{hint}")
            return wanted
        name = f"{datetime.datetime.now():%y%m%d-%H%M%S}_{name}"
        logs.mkdir(parents=True, exist_ok=True)
        # Runs that start in the same second get different directories: only one process can make one.
        for suffix in ("", *(f"-{number}" for number in range(2, 10_000))):
            with contextlib.suppress(FileExistsError):
                (logs / (name + suffix)).mkdir()
                return logs / (name + suffix)
        raise OutputError(f"{logs / name} and 9998 more of that name exist")
    except OSError as error:
        raise OutputError(f"directory {error.filename} cannot be made: {error.strerror}") from None


@contextlib.contextmanager
def writing_results(directory: Path) -> Iterator[None]:
    """Context in which a script writes its results.

    Raises:
        OutputError: a file cannot be written.
    """
    try:
        yield
    except BrokenPipeError:  # of stdout
        raise
    except OSError as error:
        raise OutputError(f"results in {directory} cannot be written: {error.strerror or error}") from None


def lock_directory(directory: Path) -> IO[Any]:
    """Lock a run directory until this process closes the returned file; loader workers do not inherit the lock.

    A process may lock it several times; it is free again when the first of these files is closed.

    Raises:
        OutputError: another process holds it.
        OSError: its file cannot be made.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW  # a link would lock, and make, a file of somebody else
    file = os.fdopen(os.open(directory / LOCKED, flags, 0o644), "rb+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise OutputError(f"another process writes to {directory}; wait for its end, or choose another") from None
        # Other errors: the file system has no locks.
    return file


def is_locked(directory: Path) -> bool | None:
    """Return whether another process writes to a run directory, without disturbing it; None: it cannot be known."""
    if not sys.platform.startswith("linux"):  # elsewhere the structure has another layout
        return None
    # Asks who would be in the way of a lock, where taking one for a moment could stop a run that is just starting.
    question = struct.pack("hhqqi", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
    try:
        with open(directory / (LOCKED if (directory / LOCKED).exists() else OLD_LOCKED), "rb") as file:
            answer = fcntl.fcntl(file, fcntl.F_GETLK, question)
    except OSError:
        return None
    return bool(struct.unpack("hhqqi", answer)[0] != fcntl.F_UNLCK)


def write_status(directory: Path, status: str) -> None:
    """Record how a run is going, and on which machine; see `read_status`."""
    content = {"status": status, "host": socket.gethostname(), "pid": os.getpid()}
    replace_file(directory / STATUS, (json.dumps(content) + "\n").encode())


def read_status(directory: Path) -> dict[str, Any]:
    """Read what `write_status` recorded; empty where there is nothing, as in runs of older versions."""
    try:
        content = json.loads((directory / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
