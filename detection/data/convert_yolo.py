"""YOLO txt: one file of lines "class centre-x centre-y width height" per image, in shares of the image's sides."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

from detection.data.conversion import (
    Box,
    ConvertedDataset,
    Corners,
    Findings,
    ImageEntry,
    as_decimal,
    check_names,
    common_root,
    finish_box,
    images_below,
    note_duplicates,
    parse_number,
    read_image_size,
    relative_name,
    split_of,
)
from detection.errors import DataError

SHARE_DIGITS = 14  # decimals that are written: 1e-10 pixel on an image of 20,000, less than what reading rounds to
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


def read_yolo(
    source: Path, names: Sequence[str] | None, split: str, findings: Findings, progress: Any
) -> ConvertedDataset:
    """Read a dataset: data.yaml, Darknet's .data, or folders alone.

    Args:
        source: folder, or the .yaml or .data file.
        names: of the classes; None: of the description or classes.txt.
        split: name for images where nothing tells of splits.
        progress: wraps the list of images, tqdm for example.

    Raises:
        DataError: no images, or a description that cannot be understood.
    """
    description = describe(source, split, findings)
    known = dict(enumerate(names)) if names else description.names or names_of_files(description.root)
    files = {name: list_images(places, description) for name, places in description.places.items()}
    if not any(files.values()):
        raise DataError(f"{source}: no images found")
    for name in [name for name, found in files.items() if not found]:
        findings.note("splits without images", name)
        del files[name]
    splits: dict[str, list[ImageEntry]] = {}
    roots = {name: common_root(found) for name, found in files.items()}
    labels_read: set[Path] = set()
    for name, found in files.items():
        splits[name] = []
        for file in progress(found):
            entry = read_entry(file, roots[name], known, findings, labels_read)
            if entry is not None:
                splits[name].append(entry)
    find_unused(description, [file for found in files.values() for file in found], labels_read, findings)
    if known is None:
        most = max((box.label for entries in splits.values() for entry in entries for box in entry.boxes), default=0)
        known = {label: f"class_{label}" for label in range(most + 1)}
        findings.note("class names, which the dataset does not tell; --names FILE does", f"class_0 to class_{most}")
    # A number that data.yaml leaves out keeps its place: the labels stay what they are.
    every = [known.get(label, f"class_{label}") for label in range(max(known) + 1)]
    return ConvertedDataset(check_names(every, str(source)), splits, roots)


def describe(source: Path, split: str, findings: Findings) -> Description:
    """The source's own description, or what its folders tell."""
    if source.is_file():
        return read_description(source, findings)
    found = sorted(file for file in source.iterdir() if file.suffix in DESCRIPTIONS and file.is_file())
    usable = [file for file in found if file.suffix == ".data" or set(SPLIT_KEYS) & set(load_yaml(file))]
    if len(usable) > 1:
        raise DataError(f"{source}: has {', '.join(file.name for file in usable)}; name the one to take as SOURCE")
    return read_description(usable[0], findings) if usable else describe_folders(source, split)


def load_yaml(file: Path) -> dict[Any, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    return content if isinstance(content, dict) else {}


def read_description(file: Path, findings: Findings) -> Description:
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


def list_images(places: Iterable[Path], description: Description) -> list[Path]:
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


def read_entry(
    file: Path, root: Path, names: dict[int, str] | None, findings: Findings, labels_read: set[Path]
) -> ImageEntry | None:
    """One image and its boxes; None: it is left out, which the findings say."""
    labels = label_file(file)
    labels_read.add(labels.resolve())
    try:
        width, height = read_image_size(file).shown
    except DataError as error:
        findings.skip(error.line, str(file))
        return None
    boxes: list[Box] = []
    try:
        lines = labels.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        findings.note("images without a label file, kept as images without boxes", str(file))
        lines = []
    except (OSError, UnicodeDecodeError):
        findings.skip("images whose label file cannot be read as text", str(labels))
        return None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            box = read_line(line, (width, height), names, f"{labels}:{number}", findings)
            if box is not None:
                boxes.append(box)
    note_duplicates(boxes, str(labels), findings)
    return ImageEntry(file, relative_name(file, root), width, height, boxes)


def read_line(
    line: str, size: tuple[int, int], names: dict[int, str] | None, place: str, findings: Findings
) -> Box | None:
    """One line: class and 4 shares, a fifth one being a score; or class and the corners of a polygon."""
    words = line.split()
    values = [parse_number(word) for word in words]
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(words):
        findings.skip("lines with a word that is no usable number", place)
        return None
    if len(words) < 5 or (len(words) > 6 and len(words) % 2 == 0):
        findings.skip("lines of neither 5 numbers nor a polygon", place)
        return None
    label, *shares = numbers
    if label != int(label) or label < 0 or (names is not None and int(label) not in names):
        findings.skip("lines whose class does not exist", place)
        return None
    if len(words) == 6:
        findings.note("lines whose sixth number, a score, has no place in the new format", place)
    elif len(words) > 6:
        findings.note("polygons, of which the box around is kept", place)
    corners = corners_of_box(shares) if len(words) <= 6 else corners_of_polygon(shares)
    width, height = size
    x1, y1, x2, y2 = corners
    return finish_box(int(label), (x1 * width, y1 * height, x2 * width, y2 * height), size, place, findings)


def corners_of_box(shares: Sequence[Decimal]) -> Corners:
    x, y, width, height = shares[:4]
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def corners_of_polygon(shares: Sequence[Decimal]) -> Corners:
    return min(shares[::2]), min(shares[1::2]), max(shares[::2]), max(shares[1::2])


def find_unused(description: Description, used: Sequence[Path], labels_read: set[Path], findings: Findings) -> None:
    """Images of no split, and label files without an image."""
    folders = {file.parent for file in used}
    images = {file.resolve() for file in used}
    if description.complete:
        candidates = images_below(description.root)
    else:
        candidates = [file for folder in sorted(folders) for file in images_below(folder) if file.parent == folder]
    for file in candidates:
        if file.resolve() not in images:
            findings.skip("images of no split", str(file))
    for folder in sorted({label_file(file).parent for file in used}):
        for file in sorted(folder.glob("*.txt")):
            listed = file.resolve() in labels_read | description.lists
            if not listed and file.name not in NO_LABELS and not file.name.lower().startswith("readme"):
                findings.skip("label files without an image", str(file))


def yolo_label(entry: ImageEntry) -> str:
    """The lines of an image."""
    lines = []
    for box in entry.boxes:
        x, y, width, height = (as_decimal(value) for value in box.xywh)
        pixels = (x + width / 2, y + height / 2, width, height)
        sides = (entry.width, entry.height) * 2
        lines.append(f"{box.label} {' '.join(format_share(*pair) for pair in zip(pixels, sides, strict=True))}\n")
    return "".join(lines)


def format_share(pixels: Decimal, side: int) -> str:
    """With 14 decimals, or fewer where the rest are zeros."""
    text = f"{pixels / side:.{SHARE_DIGITS}f}".rstrip("0").rstrip(".")
    return "0" if text in ("", "-0") else text


def data_yaml(dataset: ConvertedDataset) -> str:
    """The description that YOLO programs read; paths are relative to the file, wherever it is moved."""
    content: dict[str, Any] = {name: f"images/{name}" for name in dataset.splits}
    content["names"] = dict(enumerate(dataset.names))
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
