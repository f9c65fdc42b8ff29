"""Size and time of every image file: a cheap sign that images were replaced while nobody looked."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from detection.data.coco import CocoDataset
from detection.data.image_places import ImageFolder

SHOWN = 3  # names in a line
COPIED_SHARE = 0.5  # of the files have other times: the folder was copied anew


class ImageStamps(NamedTuple):
    """Stamps of the images of a set, in the order of its annotations.

    Attributes:
        root: the folder that they lie in.
        values: bytes and time of the last change in ns, (M, 2) int64; 0 for a file that is not there.
    """

    root: str
    values: np.ndarray


def read_stamps(dataset: object) -> ImageStamps:
    """Ask the file system about all images of a set; opens none of them.

    Returns:
        No rows for images that do not lie in a folder: shards have digests of their own.
    """
    place = getattr(dataset, "images", None)  # a set of classes and drawn images have none
    if not isinstance(dataset, CocoDataset) or not isinstance(place, ImageFolder):
        return ImageStamps("", np.zeros((0, 2), np.int64))
    root = place.root
    rows = [stamp_of(root / dataset.annotations.file_name(index)) for index in range(len(dataset))]
    return ImageStamps(str(root), np.array(rows, np.int64).reshape(-1, 2))


def stamp_of(path: Path) -> tuple[int, int]:
    """Return bytes and time of the last change of a file, in ns; zeros if it is not there."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return 0, 0
    return status.st_size, status.st_mtime_ns


def changed_images(before: ImageStamps, now: ImageStamps) -> list[int]:
    """List the images whose files are not those of an earlier look.

    A copy of a folder often has times of its own: in another folder, or where the times of more than half of the files
    differ, only sizes are compared. Sets of another length have other annotations, which their digest tells.
    """
    if before.values.shape != now.values.shape:
        return []
    other_size, other_time = (before.values != now.values).T
    copied = before.root != now.root or other_time.sum() > COPIED_SHARE * len(other_time)
    return np.flatnonzero(other_size if copied else other_size | other_time).tolist()


def change_line(kind: str, dataset: object, changed: Sequence[int]) -> str:
    """Format a line about changed images of a set, "training" or "validation"."""
    assert isinstance(dataset, CocoDataset), "no other has stamps"
    shown = ", ".join(dataset.annotations.file_name(index) for index in changed[:SHOWN])
    more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
    return f"{len(changed)} {kind} image{'s have' if len(changed) > 1 else ' has'} another size or time: {shown}{more}"
