"""COCO annotation files of a folder, recognised by their content, and the directories that really hold their images."""

import codecs
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from detection.data.annotations import read_annotations
from detection.data.conversion.dataset import SPLIT_WORD
from detection.data.json_file import INCOMPLETE, describe_error, read_json
from detection.data.packed.index import index_of
from detection.data.similar_names import find_similar
from detection.errors import DataError

ROBOFLOW = "_annotations.coco.json"
USUAL = ("annotations/instances_*.json", f"*/{ROBOFLOW}", ROBOFLOW)
ANY = ("*.json", "*/*.json", "*/*/*.json")
OTHER_TASKS = ("person_keypoints", "captions", "image_info", "stuff_", "panoptic")  # COCO's own files beside the boxes
LISTS = [re.compile(rb'"%s"\s*:\s*\[' % name) for name in (b"images", b"annotations", b"categories")]
MARKS_AND_SPACE = b"\xef\xbb\xbf\xff\xfe \r\n\t"  # byte order marks of UTF-8 and UTF-16
SAMPLE = 40  # listed images that are looked for in each candidate
MAX_FOLDERS = 2000  # looked at below a dataset


def split_in(path: Path) -> str | None:
    """train, val or test where the words of a file's name, or else of its folders, mean one; None: no split."""
    for part in reversed(path.with_suffix("").parts):
        for word in re.split(r"[^a-z0-9]+", part.lower()):
            if found := SPLIT_WORD.fullmatch(word):
                return found[1]
    return None


def find_coco_files(root: Path) -> dict[str | None, Path]:
    """COCO files with boxes by split: those of the usual names, else any JSON file with COCO's three lists.

    Raises:
        DataError: several files that could be the training or the validation set; names them.
    """
    found = _by_split(root, [file for pattern in USUAL for file in sorted(root.glob(pattern))])
    if not {"train", "val"} <= found.keys():
        files = [file for pattern in ANY for file in sorted(root.glob(pattern))]
        files = [file for file in files if not file.name.startswith(OTHER_TASKS) and is_coco_file(file)]
        found = _by_split(root, files) | found
    if "train" in found:
        found.pop(None, None)
    for split, files in found.items():
        newest = [file for file in files if file.stem.endswith("2017")]  # COCO's folder holds several years
        found[split] = files = newest if len(newest) == 1 else files
        if len(files) > 1 and split != "test":
            names = ", ".join(str(file.relative_to(root)) for file in files[:5])
            what = {"train": "for training", "val": "for validation"}.get(split or "", "of no split")
            raise DataError(
                f"{root}: several COCO files {what}: {names}; name the one to take as data.root, or with "
                "data.train_annotations and data.validation_annotations"
            )
    return {split: files[0] for split, files in found.items()}


def _by_split(root: Path, files: Sequence[Path]) -> dict[str | None, list[Path]]:
    found: dict[str | None, list[Path]] = {}
    for file in dict.fromkeys(files):
        found.setdefault(split_in(file.relative_to(root)), []).append(file)
    return found


def is_coco_file(file: Path) -> bool:
    """Return whether a file holds the three lists of a COCO file, valid or not; of a file that ends too early, one."""
    try:
        with file.open("rb") as opened:
            if not opened.read(200).replace(b"\0", b"").lstrip(MARKS_AND_SPACE).startswith(b"{"):
                return False
        content = file.read_bytes()
    except OSError:
        return False
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # refused where it is read, with the reason
        content = content.replace(b"\0", b"")
    found = [bool(pattern.search(content)) for pattern in LISTS]
    return all(found) or (any(found) and _ends_early(content))


def _ends_early(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError) as error:
        return describe_error(error).startswith(INCOMPLETE)
    return False


def listed_names(file: Path) -> list[str]:
    """File names of the images of an annotation file, as far as it can be read."""
    try:
        return read_annotations(file).file_names
    except DataError:
        pass
    try:
        images = read_json(file)[0]["images"]
        return [entry["file_name"] for entry in images if isinstance(entry["file_name"], str)]
    except (DataError, KeyError, TypeError):
        return []


def find_image_directory(file: Path, root: Path) -> tuple[Path | None, list[Path]]:
    """Find the directory that the names in an annotation file begin from: where the listed images are.

    Returns:
        The directory that holds all images of a sample, else the one with most of them; the index where the images are
        packed; None: none holds any. And the candidates.

    Raises:
        DataError: the index of packed shards is missing.
    """
    if index := index_of(file):
        return index, [index]
    names = listed_names(file)
    usual = list(dict.fromkeys(usual_directories(file, root)))
    if not names:
        return next((path for path in usual if path.is_dir()), None), usual
    sample = [names[number * len(names) // SAMPLE] for number in range(min(SAMPLE, len(names)))]
    if len(names) < SAMPLE:
        sample = names
    best, most = None, 0
    for candidates in (usual, other_directories(file, root)):
        for path in candidates:
            count = sum(os.path.exists(path / name) for name in sample) if path.is_dir() else 0
            if count == len(sample):
                return path, usual
            if count > most:
                best, most = path, count
        if most:
            break
    return best, usual


def usual_directories(file: Path, root: Path) -> Iterator[Path]:
    """Candidates in the order of their likelihood: by the name of the file, of its split, beside it, all images."""
    stem = file.stem.removeprefix("instances_")
    split = split_in(file.relative_to(root) if file.is_relative_to(root) else Path(file.name))
    words = {"train": ("train2017", "train"), "val": ("val2017", "val", "valid", "validation")}.get(
        split or "", (split,) if split else ()
    )
    bases = [root, file.parent] if file.parent.name != "annotations" else [root, file.parent.parent]
    if file.name == ROBOFLOW:
        yield file.parent
    for base in dict.fromkeys(bases):
        for name in dict.fromkeys((stem, *words)):
            yield from (base / name, base / "images" / name, base / name / "images", base / name / "data")
    for base in dict.fromkeys((*reversed(bases), file.parent)):
        yield from (base / "images", base / "data", base / "Images", base / "JPEGImages", base)


def other_directories(file: Path, root: Path) -> list[Path]:
    """All folders below the dataset but those of another split, whose images may have the same names."""
    split = split_in(file.relative_to(root) if file.is_relative_to(root) else Path(file.name))
    folders = []
    for directory, below, _ in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        folders.append(Path(directory))
        if len(folders) >= MAX_FOLDERS:
            break
    return [path for path in folders if split is None or split_in(path.relative_to(root) / "_") in (None, split)]


def describe_missing(file: Path, root: Path, tried: Sequence[Path]) -> str:
    """The message for an annotation file whose images are nowhere: where they were looked for, what is there."""
    names = listed_names(file)
    present = [str(path) for path in tried if path.is_dir()]
    similar = find_similar(root, names[:SAMPLE])
    hint = next((f"; there is {root / path} instead of {name!r}" for name, path in similar.items()), "")
    example = f" such as {names[0]!r}" if names else ""
    return f"none of the images{example} that {file} lists was found in {', '.join(present) or root}{hint}"
