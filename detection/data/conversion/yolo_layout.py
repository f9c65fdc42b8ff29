"""Where a YOLO dataset keeps its images and class names: data.yaml, Darknet's .data, or folders alone."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from detection.config.yaml_files import read_yaml
from detection.data.conversion.dataset import (
    SPLIT_WORD,
    Findings,
    images_below,
    images_inside,
    is_image,
    read_text,
    split_of,
)
from detection.data.image_file import IMAGE_SUFFIXES
from detection.data.similar_names import find_similar
from detection.errors import DataError, SettingsError

SPLIT_KEYS = ("train", "val", "valid", "validation", "test")
DESCRIPTIONS = {".yaml", ".yml", ".data"}
USUAL = ("data.yaml", "dataset.yaml", "data.yml", "dataset.yml")  # refused if broken; others may be anything
IMAGE_FOLDERS = ("images", "jpegimages")  # in any case


@dataclass
class Description:
    """Where the images of each split are, and what the classes are called.

    Attributes:
        places: folders, images and lists (.txt) of each split.
        complete: images elsewhere below the source belong to no split.
    """

    root: Path
    places: dict[str, list[Path]]
    names: dict[int, str] | None = None
    complete: bool = True
    lists: set[Path] = field(default_factory=set)


def describe(source: Path, split: str, findings: Findings) -> Description:
    """The source's own description, or one made from its folders."""
    if source.is_file():
        return read_cfg(source, findings)
    usable = find_descriptions(source)
    if len(usable) > 1:
        raise DataError(f"{source}: has {', '.join(file.name for file in usable)}; name the one to take")
    return read_cfg(usable[0], findings) if usable else describe_folders(source, split)


def find_descriptions(source: Path) -> list[Path]:
    """Files of a folder that name the images of splits."""
    found = sorted(file for file in source.iterdir() if file.suffix.lower() in DESCRIPTIONS and file.is_file())
    return [file for file in found if file.suffix.lower() == ".data" or _names_images(file)]


def _names_images(file: Path) -> bool:
    try:
        content = load_yaml(file)
    except DataError:
        return file.name.lower() in USUAL
    return any(isinstance(content.get(key), str | list) for key in SPLIT_KEYS)


def load_yaml(file: Path) -> dict[Any, Any]:
    """All values are text: `no` and `010` are names of classes."""
    try:
        content = read_yaml(read_text(file), str(file), plain=True)
    except (OSError, SettingsError) as error:
        raise DataError(f"{file}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    return content if isinstance(content, dict) else {}


def read_cfg(file: Path, findings: Findings) -> Description:
    """data.yaml (path, train, val, test, names), or Darknet's .data (train, valid, names: files)."""
    root = file.parent
    if file.suffix.lower() == ".data":
        pairs = [line.split("=", 1) for line in read_text(file).splitlines() if "=" in line]
        content: dict[Any, Any] = {key.strip(): value.strip() for key, value in pairs}
        names_file = find_place(str(content.pop("names", "")), (root, root.parent))
        names = None if names_file is None or names_file.is_dir() else read_names_file(names_file)
    else:
        content = load_yaml(file)
        stated = content.get("path")
        if "kpt_shape" in content:
            raise DataError(f"{file}: has kpt_shape; lines with key points cannot be converted")
        if isinstance(stated, str) and (root / plain_path(stated)).is_dir():  # else that of another machine
            root = root / plain_path(stated)
        names = names_of_yaml(content.get("names"), file)
    found = Description(root, {}, names, complete=False)
    missing = []
    for key, value in content.items():
        split = split_of(key) if key in SPLIT_KEYS else None
        if split is not None and value not in ("", "null", "~", []):
            for entry in value if isinstance(value, list) else [value]:
                place = find_place(str(entry), (root, file.parent, file.parent.parent))
                if place is None:
                    findings.skip(f"entries of {file.name} that do not exist", f"{key}: {entry}")
                    missing.append(f"{key}: {entry}")
                else:
                    found.places.setdefault(split, []).append(place)
    if not found.places:
        named = f" ({', '.join(missing)})" if missing else ""
        raise DataError(f"{file}: names no images of train, val or test that exist below {root}{named}")
    return found


def plain_path(text: str) -> str:
    """A path as this system writes it: Windows' slashes and drive are gone."""
    return re.sub(r"^[A-Za-z]:", "", text.strip()).replace("\\", "/")


def find_place(entry: str, bases: Sequence[Path]) -> Path | None:
    """A path of a description, as it is or as `find_below` finds it."""
    exact = (base / entry.strip() for base in bases)
    found = next((path for path in exact if entry.strip() and os.path.exists(path)), None)
    return found or (find_below(entry, bases) or (None,))[0]


def find_below(entry: str, bases: Sequence[Path], dropped: int | None = None) -> tuple[Path, int] | None:
    """A path below one of the bases once leading folders are left out that exist elsewhere only.

    The description may be of another machine (/home/me/data/train), of Windows (..\\train\\images), of Roboflow
    (../train/images for what lies beside it) or of CVAT (data/train.txt likewise). A folder that names a split is
    never left out: images/ is not test/images/.

    Args:
        dropped: number of leading folders to leave out; None: the fewest with which something is found.

    Returns:
        The path and the number of folders left out, or None.
    """
    parts = [part for part in plain_path(entry).split("/") if part not in ("", ".", "..")]
    for first in range(len(parts)) if dropped is None else [dropped]:
        if any(SPLIT_WORD.fullmatch(part.lower()) for part in parts[:first]):
            break
        for path in (base.joinpath(*parts[first:]) for base in bases):
            if os.path.exists(path):
                return path, first
    return None


def names_of_yaml(value: Any, file: Path) -> dict[int, str] | None:
    if value is None:
        return None
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return dict(enumerate(value))
    if isinstance(value, dict) and all(re.fullmatch(r"[0-9]{1,5}", key) for key in value):
        return {int(key): str(name) for key, name in value.items()}
    raise DataError(f"{file}: names must be a list, or a table of numbers from 0 and names")


def read_names_file(file: Path) -> dict[int, str]:
    try:
        return dict(enumerate(read_text(file).rstrip().splitlines()))
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None


def names_of_files(root: Path) -> dict[int, str] | None:
    """classes.txt, as labelImg and our detect.py write it, or Darknet's *.names."""
    tries = [root / "classes.txt", *sorted(root.glob("*.names")), *sorted(root.glob("[Ll]abels/**/classes.txt"))]
    file = next((file for file in tries if file.is_file()), None)
    return None if file is None else read_names_file(file)


def subfolders(root: Path, *names: str) -> list[Path]:
    """Folders inside `root` of one of these names in any case, or all."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if (not names or path.name.lower() in names) and path.is_dir())


def describe_folders(root: Path, fallback: str) -> Description:
    """train.txt, images/train/, train/images/ or train/ for every split; else images/ or the folder as one split."""
    lists = {split: file for file in sorted(root.glob("*.txt")) if (split := _split_of_list(file))}
    if "train" in lists:
        return Description(root, {split: [file] for split, file in lists.items()}, complete=False)
    images = subfolders(root, *IMAGE_FOLDERS)
    for folders, below in ((chain(*map(subfolders, images)), IMAGE_FOLDERS[:0]), (subfolders(root), IMAGE_FOLDERS)):
        places: dict[str, list[Path]] = {}
        for folder in folders:
            split = split_of(folder.name)
            inside = subfolders(folder, *below)[:1] if below else []
            if split is not None and images_below(*(inside or [folder])):
                places.setdefault(split, []).extend(inside or [folder])
        if places:
            return Description(root, places)
    return Description(root, {fallback: images[:1] or [root]})


def _split_of_list(file: Path) -> str | None:
    """The split of a list of images, train.txt for example; None: it is none."""
    if file.stem.lower() not in SPLIT_KEYS:
        return None
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        first = next(lines, "").strip()
    return split_of(file.stem) if Path(first).suffix.lower() in IMAGE_SUFFIXES else None


def list_images(places: Iterable[Path], description: Description, findings: Findings) -> list[Path]:
    """Images of a split; the paths in a list may be relative to the list or to the dataset."""
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            found.extend(images_below(place))
        elif place.suffix.lower() == ".txt":
            description.lists.add(place.resolve())
            found.extend(read_list(place, description.root))
        else:
            found.append(place)
    for file, count in Counter(found).items():
        if count > 1:
            findings.note("images that a split names more than once, taken once", str(file))
    return list(dict.fromkeys(found))


def read_list(file: Path, root: Path) -> list[Path]:
    """Images of a list; all of them leave out as many leading folders as the first one that `find_below` finds."""
    bases = (file.parent, root, root.parent)
    dropped: int | None = None
    found = []
    for line in filter(None, map(str.strip, read_text(file).splitlines())):
        path = next((path for base in bases if os.path.exists(path := base / line)), None)
        if path is None and (below := find_below(line, bases, dropped)):
            path, dropped = below
        found.append(path or bases[0] / line)
    return found


def describe_missing_image(file: Path, root: Path) -> str:
    """Name an image that cannot be read, and if it is missing a file that is nearly called so."""
    similar = None if file.exists() else find_similar(root, [file.name]).get(file.name)
    return f"{file}" + (f"; there is {root / similar}" if similar else "")


def find_unused(description: Description, used: Sequence[Path], findings: Findings) -> None:
    """Images of no split."""
    images = {file.resolve() for file in used}
    folders = sorted({file.parent for file in used})
    candidates = images_below(description.root) if description.complete else [*chain(*map(images_inside, folders))]
    for file in candidates:
        if file.resolve() not in images and is_image(file):
            findings.skip("images of no split", str(file))
