"""Where a YOLO dataset keeps its images, labels and class names: data.yaml, Darknet's .data, or folders alone."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from detection.data.conversion.dataset import Findings, images_below, images_inside, split_of
from detection.errors import DataError

NO_LABELS = {"classes.txt", "labels.txt", "names.txt", "train.txt", "val.txt", "valid.txt", "test.txt"}
SPLIT_KEYS = ("train", "val", "valid", "validation", "test")
DESCRIPTIONS = {".yaml", ".yml", ".data"}


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
    found = sorted(file for file in source.iterdir() if file.suffix in DESCRIPTIONS and file.is_file())
    usable = [file for file in found if file.suffix == ".data" or set(SPLIT_KEYS) & set(load_yaml(file))]
    if len(usable) > 1:
        raise DataError(f"{source}: has {', '.join(file.name for file in usable)}; name the one to take as SOURCE")
    return read_cfg(usable[0], findings) if usable else describe_folders(source, split)


def load_yaml(file: Path) -> dict[Any, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    return content if isinstance(content, dict) else {}


def read_cfg(file: Path, findings: Findings) -> Description:
    """data.yaml (path, train, val, test, names), or Darknet's .data (train, valid, names: files)."""
    if file.suffix == ".data":
        pairs = [line.split("=", 1) for line in file.read_text(encoding="utf-8-sig").splitlines() if "=" in line]
        content: dict[Any, Any] = {key.strip(): value.strip() for key, value in pairs}
        root = file.parent
        names_file = find_place(str(content.pop("names", "")), root, root)
        names = None if names_file is None or names_file.is_dir() else read_names_file(names_file)
    else:
        content = load_yaml(file)
        root = file.parent
        stated = content.get("path")
        if "kpt_shape" in content:
            raise DataError(f"{file}: has kpt_shape; lines with key points cannot be converted")
        if isinstance(stated, str) and (root / stated).is_dir():  # else that of the machine it was made on
            root = root / stated
        names = names_of_yaml(content.get("names"), file)
    places: dict[str, list[Path]] = {}
    for key, value in content.items():
        split = split_of(key) if key in SPLIT_KEYS else None
        if split is not None and value:
            for entry in value if isinstance(value, list) else [value]:
                place = find_place(str(entry), root, file.parent)
                if place is None:
                    findings.skip(f"entries of {file.name} that do not exist", f"{key}: {entry}")
                else:
                    places.setdefault(split, []).append(place)
    if not places:
        raise DataError(f"{file}: names no images of train, val or test that exist below {root}")
    return Description(root, places, names, complete=False)


def find_place(entry: str, root: Path, beside: Path) -> Path | None:
    """A path of a description; Roboflow writes ../train/images for what lies beside the file."""
    tries = [root / entry, beside / entry, beside / entry.removeprefix("../"), Path(entry)]
    return next((path for path in tries if path.exists()), None)


def names_of_yaml(value: Any, file: Path) -> dict[int, str] | None:
    if value is None:
        return None
    if isinstance(value, list):
        return dict(enumerate(map(str, value)))
    if isinstance(value, dict) and all(isinstance(key, int) and 0 <= key < 100_000 for key in value):
        return {key: str(name) for key, name in value.items()}
    raise DataError(f"{file}: names must be a list, or a table of numbers from 0 and names")


def read_names_file(file: Path) -> dict[int, str]:
    try:
        return dict(enumerate(file.read_text(encoding="utf-8-sig").rstrip().splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None


def names_of_files(root: Path) -> dict[int, str] | None:
    """classes.txt, as labelImg and our detect.py write it, or Darknet's *.names."""
    tries = [root / "classes.txt", *sorted(root.glob("*.names")), *sorted(root.glob("labels/**/classes.txt"))]
    file = next((file for file in tries if file.is_file()), None)
    return None if file is None else read_names_file(file)


def describe_folders(root: Path, fallback: str) -> Description:
    """images/train/, train/images/ or train/ for every split; else images/ or the folder itself as one split."""
    for base, below in ((root / "images", ""), (root, "images"), (root, "")):
        folders = sorted(path for path in base.iterdir() if path.is_dir()) if base.is_dir() else []
        places: dict[str, list[Path]] = {}
        for folder in folders:
            split = split_of(folder.name)
            if split is not None and (folder / below).is_dir() and images_below(folder / below):
                places.setdefault(split, []).append(folder / below)
        if places:
            return Description(root, places)
    return Description(root, {fallback: [root / "images" if (root / "images").is_dir() else root]})


def list_images(places: Iterable[Path], description: Description, findings: Findings) -> list[Path]:
    """Images of a split; the paths in a list may be relative to the list, to the dataset, or to where we are."""
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            found.extend(images_below(place))
        elif place.suffix.lower() == ".txt":
            description.lists.add(place.resolve())
            for line in place.read_text(encoding="utf-8-sig").splitlines():
                if line.strip():
                    tries = [base / line.strip() for base in (place.parent, description.root, Path())]
                    found.append(next((path for path in tries if path.exists()), tries[0]))
        else:
            found.append(place)
    for file, count in Counter(found).items():
        if count > 1:
            findings.note("images that a split names more than once, taken once", str(file))
    return list(dict.fromkeys(found))


def label_file(image: Path) -> Path:
    """Where the lines of an image are: labels/ instead of the last images/ of its path, or beside it."""
    parts = list(image.parts)
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            there = Path(*parts[:position], "labels", *parts[position + 1 :]).with_suffix(".txt")
            beside = image.with_suffix(".txt")
            return beside if not there.exists() and beside.exists() else there
    return image.with_suffix(".txt")


def find_unused(description: Description, used: Sequence[Path], labels_read: set[Path], findings: Findings) -> None:
    """Images of no split, and label files without an image."""
    images = {file.resolve() for file in used}
    folders = sorted({file.parent for file in used})
    candidates = images_below(description.root) if description.complete else [*chain(*map(images_inside, folders))]
    for file in candidates:
        if file.resolve() not in images:
            findings.skip("images of no split", str(file))
    known = labels_read | description.lists
    for folder in sorted({label_file(file).parent for file in used}):
        for file in sorted(folder.glob("*.txt")):
            other = file.name in NO_LABELS or file.name.lower().startswith("readme")
            if not other and file.resolve() not in known:
                findings.skip("label files without an image", str(file))
