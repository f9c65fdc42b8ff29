"""Creation of run directories, and writing to them."""

import contextlib
import datetime
from collections.abc import Iterator
from pathlib import Path

from detection.errors import OutputError


def new_run_directory(logs: Path, name: str, wanted: Path | None) -> Path:
    """Create `<logs>/<YYMMDD-HHMMSS>_<name>`, or the directory `wanted`, which must be empty or absent.

    Raises:
        OutputError: the directory cannot be created, or is not empty.
    """
    try:
        if wanted is not None:
            wanted.mkdir(parents=True, exist_ok=True)
            if any(wanted.iterdir()):
                hint = f"; to continue that run use --resume {wanted}" if (wanted / "last.pt").exists() else ""
                raise OutputError(f"--output {wanted} is not empty{hint}")
            return wanted
        name = f"{datetime.datetime.now():%y%m%d-%H%M%S}_{name}"
        logs.mkdir(parents=True, exist_ok=True)
        # Two runs that start in the same second get different directories.
        for suffix in ("", *(f"-{number}" for number in range(2, 100))):
            directory = logs / (name + suffix)
            if not directory.exists():
                directory.mkdir()
                return directory
        raise OutputError(f"{logs / name} and 98 more of that name exist")
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
