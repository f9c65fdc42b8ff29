"""What an image is read from: a file of its own, or a part of a larger one."""

from pathlib import Path
from typing import Protocol

import numpy as np


class StoredImage(Protocol):
    """An image that is a part of a larger file; `str` names it in messages."""

    @property
    def suffix(self) -> str: ...

    def stat(self) -> "StoredStatus": ...

    def read(self) -> np.ndarray:
        """Return the bytes, uint8; raises DataReadError as `read_file` does."""
        ...


class StoredStatus(Protocol):
    """What a cache needs of `os.stat`."""

    @property
    def st_size(self) -> int: ...

    @property
    def st_mtime_ns(self) -> int: ...

    @property
    def st_ino(self) -> int: ...


ImageFile = Path | StoredImage  # what is read
