"""Where the images of a set lie: a folder of files, or shards written by pack.py. Everything else is the same."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from detection.data.image_file import IMAGE_SUFFIXES, Listing, list_images
from detection.data.packed.images import PackedImages
from detection.data.packed.index import SUFFIX
from detection.data.stored_image import ImageFile
from detection.errors import DataError, DataReadError


class ImagePlace(Protocol):
    """The images of a set by the names that its annotations have.

    Attributes:
        root: folder, or index of the shards; messages begin with it, and so do the names of caches.
    """

    root: Path

    def locate(self, name: str) -> ImageFile:
        """Return what `read_image` reads, without opening it.

        Raises:
            DataReadError: the image must not be read.
        """
        ...

    def holds(self, name: str) -> bool: ...

    def look_up(self, names: Sequence[str]) -> Listing: ...

    def names(self) -> list[str]:
        """List all images, sorted."""
        ...

    def check_complete(self, names: Sequence[str], annotations: str) -> None:
        """Compare with the names that an annotation file lists, as far as that costs nothing.

        Raises:
            DataError: they differ.
        """
        ...


class ImageFolder:
    """Image files in a folder and below it.

    Args:
        root: the folder.
        follow_links: whether an image may be a symbolic link that leads out of the folder.

    Raises:
        DataError: there is no such folder.
    """

    def __init__(self, root: Path, follow_links: bool) -> None:
        if not root.is_dir():
            raise DataError(f"image directory {root} does not exist")
        self.root, self.follow_links = root.resolve(), follow_links

    def locate(self, name: str) -> ImageFile:
        path = self.root / name
        if not self.follow_links and not path.resolve().is_relative_to(self.root):
            raise DataReadError(f"{path}: is a link out of the image directory (data.follow_links: true allows it)")
        return path

    def holds(self, name: str) -> bool:
        return (self.root / name).is_file()

    def look_up(self, names: Sequence[str]) -> Listing:
        return list_images(self.root, names, self.follow_links)

    def names(self) -> list[str]:
        files = (file for file in self.root.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        return sorted(file.relative_to(self.root).as_posix() for file in files)

    def check_complete(self, names: Sequence[str], annotations: str) -> None:
        """Nothing: a look at every file is what the dataset doctor and the checks before training are for."""


def open_images(root: Path, follow_links: bool = False) -> ImagePlace:
    """Open the images of a set.

    Args:
        root: a folder of image files, or the index of packed shards (SHARDS/train.index).
        follow_links: whether files may be symbolic links that lead out of their folder.

    Raises:
        DataError: it does not exist; the index is damaged; a shard is missing or has another size.
    """
    return PackedImages(root, follow_links) if is_packed(root) else ImageFolder(root, follow_links)


def is_packed(root: Path) -> bool:
    """Return whether a path is an index of packed shards by its name."""
    return root.suffix == SUFFIX and root.is_file()
