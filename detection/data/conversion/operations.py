"""What can be done to a dataset between two formats: join, select, rename, divide; every function says what it did."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from detection.data.annotation_file import CONTROL
from detection.data.annotations import place_of
from detection.data.conversion.dataset import SPLITS, ConvertedDataset, Findings, ImageEntry
from detection.data.image_file import UniqueNames

Part = tuple[dict[str, Any], list[ImageEntry]]  # what a COCO file holds beside its lists, and its images


def merge_datasets(datasets: Sequence[ConvertedDataset], findings: Findings) -> ConvertedDataset:
    """Join datasets: classes by their names, in the order in which they are met, images by the names of the splits.

    Several images may have the same name afterwards (`assign_names`). The datasets are used up.
    """
    if len(datasets) == 1:
        return datasets[0]
    counts = Counter(name for dataset in datasets for name in dataset.names)
    names = list(counts)
    merged = ConvertedDataset(tuple(names), {}, {})
    parts: dict[str, list[Part]] = defaultdict(list)
    for dataset in datasets:
        relabel(dataset, [names.index(name) for name in dataset.names], names)
        for split, entries in dataset.splits.items():
            merged.splits.setdefault(split, []).extend(entries)
            parts[split].append((dataset.headers.get(split, {}), entries))
        for name, category in dataset.categories.items():
            merged.categories.setdefault(name, category)
    merged.headers = {split: join_headers(found, findings) for split, found in parts.items()}
    note_shared_images(merged, findings)
    for name, count in counts.items():
        findings.note(
            "classes joined from several sources by their name" if count > 1 else "classes of one source", name
        )
    return merged


def join_headers(parts: Sequence[Part], findings: Findings) -> dict[str, Any]:
    """Join what COCO files hold beside their lists: everything of the first one but `licenses`, which are united.

    Equal licenses become one. Where two parts number them differently they count from 1 anew, and `license` of the
    images follows; one that its file does not list is removed, so that it cannot mean another file's.
    """
    joined = next((header for header, _ in parts if header), {})
    tables = [_licenses_of(header) for header, _ in parts]
    united: dict[int | str, dict[str, Any]] = {}
    if all(united.setdefault(number, row) == row for table in tables for number, row in table.items()):
        numbers = [{number: number for number in table} for table in tables]
    else:
        rows: list[dict[str, Any]] = []
        numbers = [{} for _ in tables]
        for table, new in zip(tables, numbers, strict=True):
            for number, row in table.items():
                content = {key: value for key, value in row.items() if key != "id"}
                if content not in rows:
                    rows.append(content)
                new[number] = rows.index(content) + 1
        united = {number: {"id": number, **row} for number, row in enumerate(rows, start=1)}
        findings.note("licenses numbered anew, because two files number them differently", f"1 to {len(united)}")
    several = sum(bool(entries) for _, entries in parts) > 1
    for (_, entries), new in zip(parts, numbers, strict=True):
        for entry in entries:
            known = entry.extra.get("license")
            if isinstance(known, int | str) and known in new:
                entry.extra["license"] = new[known]
            elif "license" in entry.extra and united and several:
                findings.note("images whose license their file does not list, removed", entry.name)
                del entry.extra["license"]
    return {**joined, "licenses": list(united.values())} if united else joined


def _licenses_of(header: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    rows = header.get("licenses")
    usable = [row for row in rows if isinstance(row, dict) and "id" in row] if isinstance(rows, list) else []
    return {row["id"]: row for row in usable if isinstance(row["id"], int | str)}


def note_shared_images(dataset: ConvertedDataset, findings: Findings) -> None:
    """Note images that stand in several splits: what is trained on must not validate. Equal are size and content."""
    places: dict[tuple[int, int, int, str], list[str]] = defaultdict(list)
    sizes = Counter(
        (entry.width, entry.height, entry.file.stat().st_size)
        for entries in dataset.splits.values()
        for entry in entries
        if entry.file is not None
    )
    for split, entries in dataset.splits.items():
        for entry in entries:
            if entry.file is None:
                continue
            size = (entry.width, entry.height, entry.file.stat().st_size)
            if sizes[size] > 1:  # only then the content is read
                digest = hashlib.sha256(entry.file.read_bytes()).hexdigest()
                places[*size, digest].append(f"{split}/{entry.name}")
    for found in places.values():
        if len({place.partition("/")[0] for place in found}) > 1:
            findings.note("images that stand in several splits; --split divides anew", " and ".join(found))


def rename_classes(dataset: ConvertedDataset, new_names: Mapping[str, str], findings: Findings) -> None:
    """Rename classes (old name -> new); those that get the same name become one class, at the place of the first."""
    wanted = [new_names.get(name, name) for name in dataset.names]
    names = list(dict.fromkeys(wanted))
    categories = {}
    for name in names:
        olds = [old for old, new in zip(dataset.names, wanted, strict=True) if new == name]
        if len(olds) > 1:
            findings.note("classes made one", f"{' and '.join(olds)} to {name}")
        elif olds != [name]:
            findings.note("classes renamed", f"{olds[0]} to {name}")
        known = next((old for old in sorted(olds, key=lambda old: old != name) if old in dataset.categories), None)
        if known is not None:
            categories[name] = dataset.categories[known]
    dataset.categories = categories
    relabel(dataset, [names.index(name) for name in wanted], names)


def keep_classes(dataset: ConvertedDataset, kept: Sequence[str], findings: Findings) -> None:
    """Leave out all other classes and their boxes; the images stay, also those without a box then."""
    names = [name for name in dataset.names if name in kept]
    for split, entries in dataset.splits.items():
        for entry in entries:
            for box in entry.boxes:
                if dataset.names[box.label] not in kept:
                    findings.note("boxes of classes that --keep does not name", f"{split}/{entry.name}")
    relabel(dataset, [names.index(name) if name in names else None for name in dataset.names], names)


def relabel(dataset: ConvertedDataset, new_labels: Sequence[int | None], names: Sequence[str]) -> None:
    """Give every box its new label (None: leave it out) and the dataset the names of the new labels."""
    for entries in dataset.splits.values():
        for entry in entries:
            labels = [new_labels[box.label] for box in entry.boxes]
            entry.boxes = [
                replace(box, label=label) for box, label in zip(entry.boxes, labels, strict=True) if label is not None
            ]
    dataset.names = tuple(names)
    dataset.categories = {name: dataset.categories[name] for name in names if name in dataset.categories}


def split_by_name(dataset: ConvertedDataset, shares: Sequence[float], findings: Findings) -> None:
    """Divide all images anew into train, val and test, by a hash of the file name without its folder.

    An image's split depends on its name and the shares alone: adding, removing or sorting images moves no other one.
    The splits are as large as the shares say but for chance.

    Args:
        shares: of train, val and, unless there are two, test; their sum is 1.
    """
    for split in dataset.splits if len(dataset.splits) > 1 else ():
        findings.note("splits joined and divided anew", split)
    header = join_headers([(dataset.headers.get(split, {}), rows) for split, rows in dataset.splits.items()], findings)
    entries = [entry for entries in dataset.splits.values() for entry in entries]
    roots = set(dataset.roots.values())
    names = SPLITS[: len(shares)]
    dataset.splits = {name: [] for name in names}
    for entry in entries:
        dataset.splits[names[choose_split(entry, shares)]].append(entry)
    dataset.roots = dict.fromkeys(names, roots.pop()) if len(roots) == 1 else {}
    dataset.headers = dict.fromkeys(names, header)


def choose_split(entry: ImageEntry, shares: Sequence[float]) -> int:
    """Number of the share in which the hash of an image's name lies."""
    place = place_of(entry.name)
    for number, share in enumerate(shares[:-1]):
        place -= share
        if place < 0:
            return number
    return len(shares) - 1


def assign_names(dataset: ConvertedDataset, findings: Findings, target_format: str) -> None:
    """Names that no two images share, as a format needs them.

    YOLO has one .txt per name without its suffix and VOC one .xml, all in one folder without folders inside; in COCO's
    format the names of a split must differ.
    """
    taken: dict[tuple[str, ...], UniqueNames] = defaultdict(UniqueNames)
    for split, entries in dataset.splits.items():
        for entry in entries:
            wanted = Path(entry.name.replace("/", "_").strip() if target_format == "voc" else entry.name)
            scope = {"coco": (split, wanted.suffix.lower()), "yolo": (split,), "voc": ()}[target_format]
            name = taken[scope].take(wanted.with_suffix("").as_posix()) + wanted.suffix
            if name != entry.name:
                flat = "VOC has no folders, or " if target_format == "voc" else ""
                reason = f"images renamed, because {flat}another one has their name"
                findings.note(reason, f"{split}/{entry.name} to {name}")
                entry.name = name


def drop_bad_names(dataset: ConvertedDataset, findings: Findings) -> None:
    """Leave out what no loader takes as a file name: control characters and bytes that are no text."""
    for split, entries in dataset.splits.items():
        for entry in entries:
            if CONTROL.search(entry.name):
                findings.skip("images whose file name holds control characters", f"{split}/{entry.name}")
        dataset.splits[split] = [entry for entry in entries if not CONTROL.search(entry.name)]


def drop_crowd(dataset: ConvertedDataset, findings: Findings) -> None:
    """Leave out crowd regions, for YOLO."""
    for split, entries in dataset.splits.items():
        for entry in entries:
            for box in entry.boxes:
                if box.crowd:
                    findings.skip("crowd regions, which YOLO txt cannot hold", f"{split}/{entry.name}")
            entry.boxes = [box for box in entry.boxes if not box.crowd]


def drop_empty_splits(dataset: ConvertedDataset, findings: Findings) -> None:
    """Leave out splits without an image."""
    for split in [split for split, entries in dataset.splits.items() if not entries]:
        findings.note("splits of which no image is left", split)
        del dataset.splits[split]
