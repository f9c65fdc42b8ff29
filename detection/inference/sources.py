"""Inputs of detect.py: image files, folders, patterns, lists of paths, videos, cameras and addresses."""

import glob
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from detection.data.image_file import IMAGE_SUFFIXES, UniqueNames, read_image
from detection.data.image_places import is_packed, open_images
from detection.data.packed.index import find_indexes
from detection.data.stored_image import ImageFile
from detection.drawing.files import safe_name
from detection.errors import DataError
from detection.inference.web import is_picture, is_url, read_picture, result_name, without_password

VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv"}
BATCH_PIXELS = 50_000_000  # of all images of a batch together: 150 MB decoded

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Source:
    """One image, video, stream or camera.

    Attributes:
        file: path, image in a shard, or the number of a camera; str: address of a picture, video or stream.
        name: path of its result files without suffix, relative to the output directory; unique.
    """

    kind: Literal["image", "video", "camera"]
    file: ImageFile | str
    name: str

    @property
    def label(self) -> str:
        """Return what is printed and stored: no password of an address."""
        if isinstance(self.file, str):
            return without_password(self.file)
        return f"camera {self.file}" if self.kind == "camera" else str(self.file)

    def read(self) -> np.ndarray:
        """Read an image: RGB uint8, (H, W, 3).

        Raises:
            DataReadError: it cannot be read.
        """
        return read_picture(self.file) if isinstance(self.file, str) else read_image(self.file)


def find_sources(words: Sequence[str], recursive: bool = False) -> list[Source]:
    """List the images, videos and cameras that the words name, in that order; sorted within a folder or pattern.

    A word is a file, a folder, a pattern with * ? or [ ], a folder of packed shards or its index, a text file with one
    path or address per line, a camera's number, or an address (http, https, rtsp, rtsps, rtmp; where its suffix says
    nothing, the server is asked what it is). An existing file or folder of that name takes precedence over a pattern or
    number. Results keep the structure below a given folder; of several results with the same name, the later ones are
    numbered.

    Args:
        words: arguments of the command line.
        recursive: include all subfolders of folders.

    Raises:
        DataError: there are no words, or a word names nothing that exists or no image or video.
    """
    found: list[Source] = []
    names = UniqueNames()
    for word in words:
        if word.isascii() and word.isdigit() and not os.path.lexists(word):
            found.append(Source("camera", Path(word), names.take(f"camera_{word}")))
            continue
        try:
            for file, name in _files_of(word, recursive):
                found.append(Source("video" if is_video(file) else "image", file, names.take(name)))
        except ValueError as error:  # urllib's, for a malformed address
            raise DataError(f"{word}: {error}") from None
        except OSError as error:
            raise DataError(f"{word}: cannot be read: {error.strerror}") from None
    if not found:
        raise DataError("nothing to look at: give images, folders, videos or a camera's number")
    return found


def _files_of(word: str, recursive: bool) -> Iterator[tuple[ImageFile | str, str]]:
    """Yield the files that a word names, each with the preferred name of its results."""
    path = Path(word)
    if is_url(word):
        yield word, safe_name(result_name(word))
    elif is_packed(path):
        images = open_images(path)
        yield from ((images.locate(name), Path(name).with_suffix("").as_posix()) for name in images.names())
    elif path.is_dir() and (indexes := find_indexes(path)):
        for index in indexes.values():
            yield from _files_of(str(index), recursive)
    elif path.is_dir():
        inside = media_files(path, recursive)
        if not inside:
            deeper = "" if recursive or not media_files(path, True) else ", but below it: --recursive"
            raise DataError(f"{path}: no image or video in this folder{deeper}")
        yield from ((file, file.relative_to(path).with_suffix("").as_posix()) for file in inside)
    elif path.suffix.lower() == ".txt" and path.is_file():
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as a list of paths: {error}") from None
        listed = [line.strip() for line in lines if line.strip()]
        if not listed:
            raise DataError(f"{path}: an empty list of paths")
        for line in listed:
            yield (line, safe_name(result_name(line))) if is_url(line) else (Path(line), Path(line).stem)
    elif os.path.lexists(path):
        yield path, path.stem
    elif glob.has_magic(word):
        matches = [Path(match) for match in sorted(glob.glob(word, recursive=True))]
        matches = [match for match in matches if is_media(match)]
        if not matches:
            raise DataError(f"{word}: no image or video matches this pattern")
        yield from ((match, match.stem) for match in matches)
    else:
        raise DataError(f"{word}: does not exist")


def media_files(directory: Path, recursive: bool) -> list[Path]:
    """List the images and videos in a folder, sorted, without hidden files."""
    return sorted(file for file in (directory.rglob("*") if recursive else directory.iterdir()) if is_media(file))


def is_video(file: ImageFile | str) -> bool:
    """Tell a video or stream from a picture; an address without a usual suffix is asked, see `is_picture`."""
    if isinstance(file, str):
        return not is_picture(file)
    return isinstance(file, Path) and file.suffix.lower() in VIDEO_SUFFIXES


def is_media(file: Path) -> bool:
    """Return whether a file is an image or video by its suffix, and neither hidden nor a folder."""
    known = file.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES
    return known and not file.name.startswith(".") and not file.is_dir()


def read_ahead(
    pool: Executor, work: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[tuple[Item, Result]]:
    """Apply `work` to the items in a pool, up to `ahead` items in advance; yields (item, result) in order."""
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(work, item)))
        if len(waiting) > ahead:
            first, future = waiting.popleft()
            yield first, future.result()
    while waiting:
        first, future = waiting.popleft()
        yield first, future.result()


def batches(items: Iterable[Item], size: int, pixels: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Group items into lists of at most `size`, fewer when their images reach `BATCH_PIXELS` together.

    Args:
        pixels: returns the number of pixels of an item's decoded image.
    """
    batch: list[Item] = []
    total = 0
    for item in items:
        batch.append(item)
        total += pixels(item)
        if len(batch) == size or total >= BATCH_PIXELS:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
