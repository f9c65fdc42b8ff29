"""Write files atomically, under names that every file system takes."""

import contextlib
import csv
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

UNSAFE = re.compile(r"[^\w .+-]")  # letters and digits of any script stay
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # by Windows
LONGEST_NAME = 80  # characters; a file system takes 255 bytes


def safe_name(name: str) -> str:
    """Turn any text, such as a class name or part of an address, into the name of a file or folder; may repeat."""
    safe = UNSAFE.sub("_", name)[:LONGEST_NAME].strip(" .")
    return f"_{safe}" if not safe or RESERVED.fullmatch(safe) else safe


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write to; without an error the file then takes the place of `path`, in one step.

    So no reader sees a part, and another name of the old file (a hard link) keeps the old content.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes) -> None:
    """Write a whole file as `replacing` does, in a folder that is made if absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def replace_csv(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV file, the first row its header, as `replacing` does; half characters of file names are escaped."""
    with (
        replacing(path) as temporary,
        open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        csv.writer(file).writerows(rows)
