"""YOLO txt: one file of lines "class centre-x centre-y width height" per image, in shares of the image's sides."""

from collections.abc import Collection, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

from detection.data.conversion.dataset import (
    EXAMPLES,
    Box,
    ConvertedDataset,
    Corners,
    Findings,
    ImageEntry,
    as_decimal,
    check_names,
    common_root,
    finish_box,
    note_duplicates,
    parse_number,
    read_image_size,
    relative_name,
)
from detection.data.conversion.yolo_labels import LabelFiles, check_labels
from detection.data.conversion.yolo_layout import (
    describe,
    describe_missing_image,
    find_unused,
    list_images,
    names_of_files,
)
from detection.errors import DataError

SHARE_DIGITS = 14  # decimals that are written: 1e-10 pixel on an image of 20,000, less than what reading rounds to


def read_yolo(
    source: Path,
    names: Sequence[str] | None,
    split: str,
    findings: Findings,
    progress: Any,
    wanted: Collection[str] | None = None,
) -> ConvertedDataset:
    """Read a dataset: data.yaml, Darknet's .data, or folders alone.

    Args:
        source: folder, or the .yaml or .data file.
        names: of the classes; None: of the description or classes.txt.
        split: name for images if the dataset has no splits.
        progress: wraps the list of images, tqdm for example.
        wanted: splits to read; None: all.

    Raises:
        DataError: no images, a description that cannot be understood, or a split without labels.
    """
    description = describe(source, split, findings)
    known = dict(enumerate(names)) if names else description.names or names_of_files(description.root)
    files = {name: list_images(places, description, findings) for name, places in description.places.items()}
    if not any(files.values()):
        raise DataError(f"{source}: no images found")
    for name in [name for name, found in files.items() if not found]:
        findings.note("splits without images", name)
        del files[name]
    splits: dict[str, list[ImageEntry]] = {}
    roots = {name: common_root(found) for name, found in files.items()}
    label_files = LabelFiles(description.root)
    counts = {}
    for name, found in files.items():
        labels = {file: label_files.find(file) for file in found}
        if wanted is None or name in wanted:
            counts[name] = len(found), sum(label is not None for label in labels.values()), found[0]
    counts.pop("test", None)  # may well have no labels
    check_labels(label_files, description, counts, findings)
    for name in [name for name in files if wanted is None or name in wanted]:
        splits[name] = []
        for file in progress(files[name]):
            entry = read_entry(file, label_files.find(file), roots[name], known, findings)
            if entry is not None:
                splits[name].append(entry)
    find_unused(description, [file for found in files.values() for file in found], findings)
    if known is None:
        most = max((box.label for entries in splits.values() for entry in entries for box in entry.boxes), default=0)
        known = {label: f"class_{label}" for label in range(most + 1)}
        reason = "class names are not in the dataset; classes.txt in it, or convert_dataset.py --names FILE, gives them"
        findings.note(reason, f"class_0 to class_{most}")
        for entries in splits.values():
            folders = {entry.file.parent for entry in entries if entry.file}
            for folder in sorted(folders) if len(folders) > 1 else ():
                findings.note("folders joined, whose class numbers are taken to mean the same", str(folder))
    # A number that data.yaml leaves out keeps its place: the labels stay what they are.
    every = [known.get(label, f"class_{label}") for label in range(max(known) + 1)]
    return ConvertedDataset(check_names(every, str(source)), splits, roots)


def read_entry(
    file: Path, labels: Path | None, root: Path, names: dict[int, str] | None, findings: Findings
) -> ImageEntry | None:
    """One image and its boxes; None: it is left out, which the findings say."""
    try:
        width, height = read_image_size(file).shown
    except DataError as error:
        described = len(findings.skipped.get(error.line, [])) < EXAMPLES  # it looks through the whole folder
        findings.skip(error.line, describe_missing_image(file, root) if described else str(file))
        return None
    boxes: list[Box] = []
    lines: list[str] = []
    try:
        if labels is not None:
            lines = labels.read_text(encoding="utf-8-sig").splitlines()
        else:
            findings.note("images without a label file, kept as images without boxes", str(file))
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
