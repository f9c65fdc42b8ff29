"""Files that are there under a nearly equal name: other case, suffix, Unicode form, slashes or folders."""

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from detection.data.image_file import IMAGE_SUFFIXES

MAX_FILES = 500_000  # looked at below a folder


def find_similar(root: Path, names: Sequence[str]) -> dict[str, str]:
    """Map names of missing images to the most similar image file below `root`, as a path relative to it.

    Compares the last part without suffix, case and Unicode form; of several files the one in the likest folders.
    """
    wanted = {_key(name) for name in names}
    found: dict[str, list[str]] = {}
    count = 0
    for directory, folders, files in os.walk(root):
        folders.sort()
        for file in files:
            if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES and (key := _key(file)) in wanted:
                found.setdefault(key, []).append(os.path.relpath(os.path.join(directory, file), root))
        count += len(files)
        if count > MAX_FILES:
            break
    return {
        name: max(found[_key(name)], key=lambda path: _likeness(name, path)) for name in names if _key(name) in found
    }


def _key(name: str) -> str:
    return os.path.splitext(_parts(name)[-1])[0]


def _parts(name: str) -> list[str]:
    return unicodedata.normalize("NFC", name).casefold().replace("\\", "/").split("/")


def _likeness(name: str, path: str) -> tuple[bool, int, int]:
    """Equal suffix, number of common folders, few others."""
    ours, theirs = _parts(name), _parts(path)
    return ours[-1] == theirs[-1], len(set(ours[:-1]) & set(theirs[:-1])), -len(theirs)
