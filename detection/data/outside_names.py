"""File names that lead out of the dataset, as Label Studio writes them, settled by the image files that are there.

Examples: /data/upload/1/a.jpg, ../../label-studio/data/media/upload/1/3f2a9c1b-a.jpg, /data/local-files/?d=set/a.jpg,
https://host/a.jpg?key=1, C:\\images\\a.jpg.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from detection.data.image_file import IMAGE_SUFFIXES
from detection.data.similar_names import MAX_FILES

OUTSIDE = re.compile(r"^[/\\]|^[A-Za-z]:[/\\]|://|(^|[/\\])\.\.([/\\]|$)")
UPLOAD_PREFIX = re.compile("[0-9a-f]{8}-")  # of Label Studio, before the name that the file had
SAMPLE = 40  # other names that are looked for
STATED = "stated_file_name"  # key of an image: its file name as the file says it


def settle_names(content: Any, file: Path) -> None:
    """Replace, in place, file names that lead out of the dataset by the only image file of that name in it.

    The new names begin where the file's other names begin, if it has any, else from the deepest folder that holds all
    of these images; the old ones stay under `STATED`. A name for which there is no file, or several, stays as it is and
    is refused later (`outside_hint` says what is there).

    Args:
        content: of a COCO file, valid or not.
        file: this file; its dataset is its folder, or the one above annotations/.
    """
    images = content.get("images") if isinstance(content, dict) else None
    images = images if isinstance(images, list) else []
    entries = [entry for entry in images if _leads_outside(entry)]
    if not entries:
        return
    folder = dataset_folder(file)
    there = _images_called({last for entry in entries for last in last_parts(entry["file_name"])}, folder)
    found = {}
    for number, entry in enumerate(entries):
        paths = _first_found(entry["file_name"], there)
        if len(paths) == 1:
            found[number] = paths[0]
    shared = Counter(found.values())
    found = {number: path for number, path in found.items() if shared[path] == 1}
    root = _first_folder(images, folder, [os.path.dirname(path) for path in found.values()]) if found else None
    if root is None:
        return
    for number, path in found.items():
        entries[number][STATED] = entries[number]["file_name"]
        entries[number]["file_name"] = Path(path).relative_to(root).as_posix()


def moved_names(images: list[dict[str, Any]]) -> dict[str, list[int]]:
    """A note about the names that `settle_names` replaced -> ids of the images; empty if there are none."""
    moved = [entry for entry in images if STATED in entry]
    if not moved:
        return {}
    example = f"{moved[0][STATED]!r} is {moved[0]['file_name']!r}"
    note = f"file names that lead out of the dataset, read as the only file of that name in it: {example}"
    return {note: [entry["id"] for entry in moved]}


def outside_hint(name: str, folder: Path) -> str:
    """Say of a name that `settle_names` left what was looked for in the dataset, and what is there."""
    paths = _first_found(name, _images_called(set(last_parts(name)), folder))
    if not paths:
        return f"; no image file called {next(last_parts(name))!r} is in {folder}"
    verb = "is" if len(paths) == 1 else "are"
    return f"; there {verb} {' and '.join(paths[:3])}{' ...' if len(paths) > 3 else ''}"


def dataset_folder(file: Path) -> Path:
    """The folder in which the images of an annotation file are expected."""
    return file.parent.parent if file.parent.name.lower() == "annotations" else file.parent


def last_parts(name: str) -> Iterator[str]:
    """Names that the file may have in the dataset, the likeliest first."""
    address = unquote(name.partition("?d=")[2] or name.partition("?")[0])
    for text in (name, address):
        last = text.replace("\\", "/").rpartition("/")[2]
        yield last
        if UPLOAD_PREFIX.match(last):
            yield UPLOAD_PREFIX.sub("", last, count=1)


def _leads_outside(entry: Any) -> bool:
    return _has_name(entry) and OUTSIDE.search(entry["file_name"]) is not None


def _first_folder(images: list[Any], folder: Path, folders: list[str]) -> Path | None:
    """The folder from which names begin; None: the other names begin elsewhere."""
    root = Path(os.path.commonpath(folders))
    plain = [entry["file_name"] for entry in images if _has_name(entry) and not _leads_outside(entry)][:SAMPLE]
    above = [path for path in (root, *root.parents) if path.is_relative_to(folder)]
    return next((path for path in above if any(os.path.exists(path / name) for name in plain)), None) if plain else root


def _has_name(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("file_name"), str)


def _first_found(name: str, there: dict[str, list[str]]) -> list[str]:
    return next((there[last] for last in last_parts(name) if last in there), [])


def _images_called(names: set[str], folder: Path) -> dict[str, list[str]]:
    """Image files below a folder by their name, those of the given names alone; hidden folders are left out."""
    there: dict[str, list[str]] = {}
    count = 0
    for directory, below, files in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in names.intersection(files):
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                there.setdefault(name, []).append(os.path.join(directory, name))
        count += len(files)
        if count > MAX_FILES:
            break
    return there
