"""Locating annotation files and image directories: set explicitly, or in COCO's or Roboflow's directory layout."""

from collections.abc import Sequence
from pathlib import Path

from detection.config.settings import DataSettings
from detection.errors import DataError

Layouts = list[tuple[str, tuple[str, ...]]]
# (annotation file, image directories) below data.root: COCO's own layout, then Roboflow's
TRAIN_LAYOUTS: Layouts = [
    ("annotations/instances_train2017.json", ("train2017", "images/train2017", "train", "images/train", "images")),
    ("annotations/instances_train.json", ("train", "images/train", "train2017", "images/train2017", "images")),
    ("train/_annotations.coco.json", ("train",)),
]
VALIDATION_LAYOUTS: Layouts = [
    ("annotations/instances_val2017.json", ("val2017", "images/val2017", "val", "images/val", "images")),
    ("annotations/instances_val.json", ("val", "images/val", "val2017", "images/val2017", "images")),
    ("valid/_annotations.coco.json", ("valid",)),
]


def find_dataset(data: DataSettings) -> tuple[tuple[Path, Path], tuple[Path, Path]]:
    """Find (annotation file, image directory) of training and validation; equal if a fraction splits one file.

    Raises:
        DataError: nothing found; lists the paths tried and how to get data.
    """
    train = find_training_set(data)
    if data.validation_fraction is not None:
        if data.validation_annotations is not None:
            raise DataError("data.validation_fraction and data.validation_annotations are both set; choose one")
        return train, train
    root = existing_root(data, data.train_annotations)
    return train, _locate(root, VALIDATION_LAYOUTS, data.validation_annotations, data.validation_images, "validation")


def find_training_set(data: DataSettings) -> tuple[Path, Path]:
    """Find (annotation file, image directory) of the training set; needs no validation annotations.

    Raises:
        DataError: as in `find_dataset`.
    """
    root = existing_root(data, data.train_annotations)
    return _locate(root, TRAIN_LAYOUTS, data.train_annotations, data.train_images, "train")


def find_validation_set(data: DataSettings) -> tuple[Path, Path]:
    """Find (annotation file, image directory) of the validation set; needs no training annotations.

    Raises:
        DataError: as in `find_dataset`.
    """
    if data.validation_fraction is not None:
        return find_dataset(data)[1]
    root = existing_root(data, data.validation_annotations)
    return _locate(root, VALIDATION_LAYOUTS, data.validation_annotations, data.validation_images, "validation")


def find_split(data: DataSettings, split: str) -> tuple[Path, Path | None]:
    """Find (annotation file, image directory) of one split; the directory is None if there are no images.

    Args:
        split: "train" or "val".

    Raises:
        DataError: no annotation file found; lists the paths tried and how to get data.
    """
    if split == "train" or data.validation_fraction is not None:
        layouts, name, annotations, images = TRAIN_LAYOUTS, "train", data.train_annotations, data.train_images
    else:
        layouts, name = VALIDATION_LAYOUTS, "validation"
        annotations, images = data.validation_annotations, data.validation_images
    root = existing_root(data, annotations)
    file, directories = locate_annotations(root, layouts, annotations, name)
    return file, locate_images(root, file, directories, annotations, images)


def existing_root(data: DataSettings, annotations: str | None) -> Path:
    """Return `data.root`; DataError if it is needed and does not exist."""
    root = Path(data.root)
    if not root.is_dir() and annotations is None:
        raise DataError(
            f"data.root = {data.root!r} does not exist: fetch COCO with data/download_coco.sh, name your own dataset "
            "with data.root=DIRECTORY, or train on the built-in one with --config recipes/quickstart.yaml"
        )
    return root


def _locate(root: Path, layouts: Layouts, annotations: str | None, images: str | None, split: str) -> tuple[Path, Path]:
    file, directories = locate_annotations(root, layouts, annotations, split)
    if (found := locate_images(root, file, directories, annotations, images)) is None:
        looked = ", ".join(str(root / directory) for directory in directories)
        raise DataError(f"no images for {file}: looked for {looked}; set data.{split}_images")
    return file, found


def locate_annotations(
    root: Path, layouts: Layouts, annotations: str | None, split: str
) -> tuple[Path, tuple[str, ...]]:
    """Find the annotation file of a split, and the directories below root that may hold its images.

    Raises:
        DataError: nothing found; lists the paths tried and how to get data.
    """
    if annotations is not None:
        names = next((names for file, names in layouts if annotations.endswith(file)), layouts[1][1])
        return _below(root, annotations), names
    for file, names in layouts:
        if (root / file).is_file():
            return root / file, names
    looked = ", ".join(file for file, _ in layouts)
    hint = " (with one annotation file only, set data.validation_fraction=0.1)" if split == "validation" else ""
    raise DataError(
        f"no {split} annotations in {root}: looked for {looked}; fetch COCO with data/download_coco.sh, or set "
        f"data.{split}_annotations, or use --config recipes/quickstart.yaml{hint}"
    )


def locate_images(
    root: Path, file: Path, directories: Sequence[str], annotations: str | None, images: str | None
) -> Path | None:
    """Find the image directory of an annotation file; None if there is none."""
    if images is not None:
        return _below(root, images)
    for directory in directories:
        if (root / directory).is_dir():
            return root / directory
    return None if annotations is None else file.parent


def _below(root: Path, path: str) -> Path:
    """Resolve an explicit path: absolute, relative to the working directory, or relative to root."""
    return Path(path) if Path(path).exists() else root / path
