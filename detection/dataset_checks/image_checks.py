"""Checks of image files: presence, content, duplicates and leakage between the splits."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from detection.data.annotations import Annotations
from detection.data.image_file import Header, decode_image, read_file, read_header
from detection.data.image_places import ImagePlace
from detection.data.similar_names import find_similar
from detection.data.stored_image import ImageFile
from detection.dataset_checks.findings import Findings
from detection.errors import DataReadError

LOOK_SIDE = 16  # pixels of the grey thumbnail
LOOK_BITS = 4  # maximum number of differing hash bits (of 64) of similar images
LOOK_LEVELS = 3.0  # maximum mean difference of their thumbnails in grey levels
IN_FLIGHT = 8  # images per thread


@dataclass
class Split:
    """One split, the place of its images, and what is known about them; positions are those of the annotations."""

    name: str  # "training" or "validation"
    place: ImagePlace
    annotations: Annotations
    names: list[str] = field(init=False)
    unreadable: set[int] = field(default_factory=set)  # positions refused by `check_listing`
    images: dict[int, "Inspected"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = [self.annotations.file_name(index) for index in range(len(self.annotations))]


@dataclass(frozen=True)
class Inspected:
    """Result of inspecting one image file."""

    problem: str | None = None  # a kind of finding
    detail: str = ""
    header: Header | None = None
    size: tuple[int, int] = (0, 0)  # width and height after the EXIF orientation; 0: unknown
    content: bytes = b""  # digest of the file
    pixels: bytes = b""  # digest of the decoded image; empty: not decoded
    look: tuple[int, np.ndarray] | None = None  # see `describe_look`


def check_listing(splits: Sequence[Split], findings: Findings) -> None:
    """Report files that are missing, not regular, outside the image directory, or not listed."""
    unlisted: dict[Path, set[str]] = {}
    listings = [split.place.look_up(split.names) for split in splits]
    for split, listing in zip(splits, listings, strict=True):
        for kind, positions in (
            ("image_missing", listing.missing),
            ("image_not_regular", listing.not_regular),
            ("image_outside", listing.outside),
        ):
            lost = [split.names[position] for position in positions]
            similar = find_similar(split.place.root, lost) if kind == "image_missing" and lost else {}
            details = [f"there is {similar[name]}" if name in similar else "" for name in lost] if similar else []
            findings.add(kind, split.name, lost, details)
            split.unreadable.update(positions)
        for directory, present in listing.present.items():
            unlisted.setdefault(directory, set(present))
    for listing in listings:
        for directory, names in listing.listed.items():
            unlisted[directory] -= names
    known = Image.registered_extensions()
    images = [
        directory / name
        for directory, names in unlisted.items()
        for name in names
        if Path(name).suffix.lower() in known
    ]
    where = splits[0].name if len(splits) == 1 else "both"
    findings.add("unlisted_image", where, sorted(map(str, images)))


def check_shared_names(splits: Sequence[Split], findings: Findings) -> None:
    """Report equal files of the same name in both splits: leakage that shows without reading every image."""
    if len(splits) < 2:
        return
    readable = [
        {name for position, name in enumerate(split.names) if position not in split.unreadable} for split in splits
    ]
    shared = sorted(readable[0] & readable[1])
    same = [name for name in shared if same_content(*(split.place.locate(name) for split in splits))]
    findings.add("leakage", "both", same, [f"same as {name}" for name in same])


def same_content(first: ImageFile, second: ImageFile) -> bool:
    """Return whether two images have the same bytes; those of different sizes are not read."""
    if first.stat().st_size != second.stat().st_size:
        return False
    return np.array_equal(read_file(first), read_file(second))


def inspect_images(splits: Sequence[Split], decode: bool, workers: int) -> None:
    """Inspect every file that `check_listing` found, in threads: decoding and hashing release the GIL.

    Args:
        decode: whether to decode and hash the images, or only to read their headers.
        workers: number of threads.
    """
    tasks = [(split, index) for split in splits for index in range(len(split.names)) if index not in split.unreadable]
    remaining: Iterator[tuple[Split, int]] = iter(tasks)
    with (
        ThreadPoolExecutor(max(workers, 1)) as pool,
        tqdm(total=len(tasks), unit="image", desc="images", disable=None) as bar,
    ):
        # Submit a few at a time: the futures of 118,000 images would keep all results in memory.
        while batch := list(islice(remaining, max(workers, 1) * IN_FLIGHT)):
            results = pool.map(lambda task: inspect_image(task[0].place.locate(task[0].names[task[1]]), decode), batch)
            for (split, index), inspected in zip(batch, results, strict=True):
                split.images[index] = inspected
            bar.update(len(batch))


def inspect_image(path: ImageFile, decode: bool) -> Inspected:
    """Read one file as training does."""
    try:
        encoded = read_file(path)
        if not len(encoded):
            return Inspected("image_empty")
        try:
            header = read_header(encoded, path)
        except DataReadError as error:
            return Inspected("image_too_large", error.line)
        size = header.turned_size() if header else (0, 0)
        content = hashlib.blake2b(encoded.data, digest_size=16).digest()
        if not decode:
            return Inspected(None, "", header, size, content)
        image = decode_image(encoded, header, path)
    except DataReadError as error:
        return Inspected("image_damaged", error.line)
    size = (image.shape[1], image.shape[0])
    pixels = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest() + bytes(str(size), "ascii")
    return Inspected(None, "", header, size, content, pixels, describe_look(image))


def describe_look(image: np.ndarray) -> tuple[int, np.ndarray]:
    """Compute a 64-bit perceptual hash and a 16 x 16 grey thumbnail, which hardly change when an image is re-encoded.

    Bit k is set if the k-th of the lowest 8 x 8 frequencies of the 32 x 32 grey image exceeds their median.

    Source: Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010, section 3.2.1 (DCT based)
    """
    grey = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (32, 32), interpolation=cv2.INTER_AREA)
    frequencies = cv2.dct(grey.astype(np.float32))[:8, :8].reshape(-1)
    bits = np.packbits(frequencies > np.median(frequencies))
    small = cv2.resize(grey, (LOOK_SIDE, LOOK_SIDE), interpolation=cv2.INTER_AREA)
    return int.from_bytes(bits.tobytes(), "big"), small.reshape(-1)


def check_images(split: Split, findings: Findings) -> None:
    """Report the problems of one split's files."""
    by_kind: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for index, image in split.images.items():
        name = split.names[index]
        stated = tuple(split.annotations.image_sizes[index].tolist())
        if image.problem:
            by_kind[image.problem].append((name, image.detail))
        elif all(image.size) and all(stated) and image.size != stated:
            kind = "size_swapped" if image.size == stated[::-1] else "size_differs"
            text = "is {} x {}, annotated as {} x {}".format(*image.size, *stated)
            by_kind[kind].append((name, text))
        if image.header is not None:
            for kind, text in describe_header(image.header, Path(name).suffix):
                by_kind[kind].append((name, text))
    for kind, found in by_kind.items():
        findings.add(kind, split.name, [name for name, _ in found], [detail for _, detail in found])


def describe_header(header: Header, suffix: str) -> Iterator[tuple[str, str]]:
    """Yield (kind, detail) of remarkable properties of a valid image."""
    if header.orientation != 1:
        yield "exif_orientation", str(header.orientation)
    if header.mode != "RGB" or header.bits != 8 or header.transparent:
        alpha = " with transparency" if header.transparent else ""
        yield "unusual_mode", f"{header.mode}, {header.bits} bit{alpha}"
    expected = Image.registered_extensions().get(suffix.lower())
    if expected is not None and {expected, header.format} not in ({header.format}, {"JPEG", "MPO"}):
        yield "wrong_extension", f"is {header.format}"


def check_same_images(splits: Sequence[Split], findings: Findings) -> None:
    """Report equal files or equal pixels within and between the splits, and similar images between them."""
    groups: dict[bytes, list[tuple[Split, int]]] = defaultdict(list)
    for split in splits:
        for index, image in split.images.items():
            if image.content:
                groups[image.pixels or image.content].append((split, index))
    repeated: dict[str, list[tuple[str, str]]] = defaultdict(list)
    leaked: dict[str, str] = {}
    for group in groups.values():
        for split in splits:
            # a file listed twice is reported by `check_annotations`
            own = list(dict.fromkeys(other.names[index] for other, index in group if other is split))
            repeated[split.name] += [(name, f"same as {own[0]}") for name in own[1:]]
        first, last = splits[0], splits[-1]
        ours = [first.names[index] for split, index in group if split is first]
        theirs = [last.names[index] for split, index in group if split is last and last is not first]
        leaked |= {name: f"same as {ours[0]}" for name in theirs if ours}
    for name, found in repeated.items():
        findings.add("duplicate_image", name, [item for item, _ in found], [detail for _, detail in found])
    findings.add("leakage", "both", list(leaked), list(leaked.values()))
    if len(splits) > 1:
        pairs = alike_images(splits[0], splits[1], leaked)
        findings.add("leakage_by_look", "both", list(pairs), [f"looks like {name}" for name in pairs.values()])


def alike_images(training: Split, validation: Split, leave_out: dict[str, str]) -> dict[str, str]:
    """Map each validation image to the most similar training image, if any is similar enough."""
    ours = [(training.names[index], image.look) for index, image in training.images.items() if image.look]
    if not ours:
        return {}
    hashes = np.array([look[0] for _, look in ours], dtype=np.uint64)
    pictures = np.stack([look[1] for _, look in ours])
    found = {}
    for index, image in validation.images.items():
        if image.look is None or validation.names[index] in leave_out:
            continue
        bits, picture = image.look
        near = np.flatnonzero(np.bitwise_count(hashes ^ np.uint64(bits)) <= LOOK_BITS)
        difference = np.abs(pictures[near].astype(np.float32) - picture).mean(axis=1)
        if len(near) and difference.min() < LOOK_LEVELS:
            found[validation.names[index]] = ours[near[difference.argmin()]][0]
    return found
