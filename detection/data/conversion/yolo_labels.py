"""Label files of YOLO images: where they are, and which of them nobody reads."""

import unicodedata
from collections.abc import Iterator
from pathlib import Path

from detection.data.conversion.dataset import Findings, images_below
from detection.data.conversion.yolo_layout import IMAGE_FOLDERS, Description, subfolders
from detection.errors import DataError

NO_LABELS = {"classes.txt", "labels.txt", "names.txt", "train.txt", "val.txt", "valid.txt", "test.txt"}
FEW = 0.1  # share of images with labels below which a split is wrong if label files are elsewhere


class LabelFiles:
    """Finds the label files of a dataset by listing each folder once.

    Attributes:
        taken: label files that belong to an image.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.taken: set[Path] = set()
        self._listings: dict[Path, dict[str, Path]] = {}
        self._folders: dict[Path, list[Path]] = {}

    def find(self, image: Path) -> Path | None:
        """The .txt file, in any case, of an image: in the folder that belongs to the image's, or beside it."""
        stem = unicodedata.normalize("NFC", image.stem)
        for folder in self.folders(image.parent):
            if file := self._listing(folder).get(stem):
                self.taken.add(file.resolve())
                return file
        return None

    def folders(self, images: Path) -> list[Path]:
        """Folders that may hold the labels of the images in a folder, the likeliest first."""
        if images not in self._folders:
            self._folders[images] = list(dict.fromkeys(self._candidates(images)))
        return self._folders[images]

    def _candidates(self, images: Path) -> Iterator[Path]:
        parts = images.parts
        for position in range(len(parts) - 1, 0, -1):
            if parts[position].lower() in IMAGE_FOLDERS:
                for labels in subfolders(Path(*parts[:position]), "labels"):
                    yield labels.joinpath(*parts[position + 1 :])
        yield images
        yield from subfolders(images.parent, "labels")
        for labels in subfolders(self.root, "labels"):
            yield labels / images.name
            yield labels

    def _listing(self, folder: Path) -> dict[str, Path]:
        if folder not in self._listings:
            files = sorted(file for file in folder.glob("*") if file.suffix.lower() == ".txt")
            self._listings[folder] = {unicodedata.normalize("NFC", file.stem): file for file in files}
        return self._listings[folder]

    def unread(self, description: Description) -> list[Path]:
        """Label files of the dataset that belong to no image."""
        found = {
            path for folders in self._folders.values() for folder in folders for path in self._listing(folder).values()
        }
        found |= {file for file in description.root.rglob("*") if file.suffix.lower() == ".txt"}
        rest = sorted(file for file in found if file.resolve() not in self.taken | description.lists)
        return [file for file in rest if _is_label(file)]


def _is_label(file: Path) -> bool:
    """Return whether a text file is empty or begins with at least five numbers."""
    if file.name.lower() in NO_LABELS or file.name.lower().startswith("readme"):
        return False
    try:
        with file.open(encoding="utf-8-sig") as lines:
            words = next((line for line in lines if line.strip()), "0 0 0 0 0").split()
        return len(words) >= 5 and all(float(word) is not None for word in words[:5])
    except (OSError, ValueError):
        return False


def has_labels(root: Path) -> bool:
    """Return whether a folder without a description is a YOLO dataset: a label file that belongs to an image."""
    stems = {unicodedata.normalize("NFC", image.stem) for image in images_below(root)}
    files = (file for file in root.rglob("*") if file.suffix.lower() == ".txt")
    return any(unicodedata.normalize("NFC", file.stem) in stems and _is_label(file) for file in files)


def check_labels(
    labels: LabelFiles, description: Description, counts: dict[str, tuple[int, int, Path]], findings: Findings
) -> None:
    """Report label files that nobody read; what is absent is not empty.

    Args:
        counts: images, images with a label file, and an image, of each split.

    Raises:
        DataError: no image of a split has a label file, or few have one while there are more that nobody read.
    """
    unread = labels.unread(description)
    for file in unread:
        findings.skip("label files without an image", str(file))
    for split, (images, labelled, example) in counts.items():
        if images and (labelled == 0 or (labelled < FEW * images and len(unread) > labelled)):
            looked = ", ".join(str(folder) for folder in labels.folders(example.parent) if folder.is_dir())
            there = f"; label files that belong to no image: {', '.join(map(str, unread[:3]))}" if unread else ""
            raise DataError(
                f"{labels.root}: {labelled or 'none'} of the {images} images of {split!r} have a label file; looked "
                f"for {example.stem}.txt in {looked}{there} (an image without objects has an empty label file)"
            )
