"""Write files atomically."""

import os
from pathlib import Path


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
