"""Write files atomically, under names that every file system takes."""

import os
import re
from pathlib import Path

UNSAFE = re.compile(r"[^\w .+-]")  # letters and digits of any script stay
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # by Windows
LONGEST_NAME = 80  # characters; a file system takes 255 bytes


def safe_name(name: str) -> str:
    """Turn any text, such as a class name or part of an address, into the name of a file or folder; may repeat."""
    safe = UNSAFE.sub("_", name)[:LONGEST_NAME].strip(" .")
    return f"_{safe}" if not safe or RESERVED.fullmatch(safe) else safe


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically, under a temporary name first, so that neither a full disk nor a reader sees a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
