"""Where the training and the validation set are, from `DataSettings`: any usual format and layout, read in place."""

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from detection.config.settings import DataSettings
from detection.data.annotations import forget_annotations, in_fraction
from detection.data.converted import ALL, read_converted
from detection.data.dataset_formats import Source, coco_source, recognise
from detection.errors import DataError

Look = Callable[[], dict[str, Source]]
FRACTION = 0.1  # of the images validates where there is one set only and `data.validation_fraction` is null


def look_once(data: DataSettings) -> Look:
    """Return a look at `data.root` that several calls of `find_source` share: it may hold 100,000 files."""

    @functools.cache
    def look() -> dict[str, Source]:
        """The sets of the folder: train, val and test, or `ALL`; none: not recognised and not needed."""
        try:
            return recognise(Path(data.root), data)
        except DataError:
            if data.train_annotations is None:
                raise
            return {}

    return look


def find_source(data: DataSettings, split: str, look: Look | None = None) -> Source:
    """Find one split.

    Args:
        split: "training" or "validation".
        look: of `look_once`; None: a look of its own.

    Raises:
        DataError: nothing found, or it is ambiguous; says what was looked for, what is there, and how to say it.
    """
    if data.validation_fraction is not None and data.validation_annotations is not None:
        raise DataError("data.validation_fraction and data.validation_annotations are both set; choose one")
    explicit = {"training": data.train_annotations, "validation": data.validation_annotations}
    if explicit[split] is not None and (split == "validation" or data.validation_annotations is not None):
        return _explicit(data, split)
    found = (look or look_once(data))()
    train = _explicit(data, "training") if explicit["training"] else None
    validation = found.get("val")
    if validation is not None and train is not None and validation.file == train.file:
        validation = None
    share = data.validation_fraction
    if share is not None and validation is not None and train is None:
        raise DataError(
            f"data.validation_fraction = {share:g}, but there is a validation set: {validation.file}; leave the "
            "fraction out, or name the file to divide with data.train_annotations"
        )
    if share is None and split == "validation" and validation is not None:
        return _with_images(replace(validation, split=split), data, "validation_images")
    train = train or found.get("train") or found.get(ALL)
    if train is None:
        only = f"only the validation set {validation.file}" if validation else "only a test set"
        raise DataError(f"{data.root}: no training annotations, {only}; set data.train_annotations")
    if explicit["training"] is None:
        train = _with_images(replace(train, split="training"), data, "train_images")
    if data.validation_annotations is not None or (share is None and validation is not None):
        return train
    given, share = share is not None, share or _automatic_fraction(train)
    if share is None and split == "training":
        return train
    if share is None:
        raise DataError(
            f"{train.file}: has too few images (of different names) to be divided into training and validation set; "
            "set data.validation_annotations"
        )
    return replace(train, split=split, fraction=(share, split == "validation"), automatic=not given)


def every_source(data: DataSettings) -> dict[str, Source]:
    """Find all splits undivided, by their names in file names: train, val, test, or `ALL` where there is one set only.

    Raises:
        DataError: as in `find_source`.
    """
    found = dict(look_once(data)())
    if data.train_annotations is not None:
        found.pop(ALL, None)
        found["train"] = _explicit(data, "training")
    elif train := found.get("train") or found.get(ALL):
        found["train" if "train" in found else ALL] = _with_images(train, data, "train_images")
    if data.validation_annotations is not None:
        found["val"] = _explicit(data, "validation")
    elif "val" in found:
        found["val"] = _with_images(found["val"], data, "validation_images")
    return {split: replace(source, split=split) for split, source in found.items()}


def _automatic_fraction(source: Source) -> float | None:
    """`FRACTION`, or as much more as leaves an image of a small set for both parts; None: nothing does."""
    try:
        columns = source.columns()
    except DataError:  # reported by who uses the file
        return FRACTION
    shares = [FRACTION, 0.2, 0.3, 0.5, 0.7, 0.9]
    total = len(columns.image_ids)
    return next((share for share in shares if 0 < in_fraction(columns, (share, True)).sum() < total), None)


def forget() -> None:
    """Release what was read."""
    forget_annotations()
    read_converted.cache_clear()


def folder_of(data: DataSettings) -> Path:
    """The one folder that relative paths of the settings begin from: `data.root`, or the folder of that file."""
    root = Path(data.root)
    return root.parent if root.is_file() else root


def _explicit(data: DataSettings, split: str) -> Source:
    name = "train" if split == "training" else "validation"
    file = _below(data, f"{name}_annotations")
    base = folder_of(data)
    if getattr(data, f"{name}_images") is not None:
        return Source(
            split, "COCO JSON", file, base, _below(data, f"{name}_images"), (), ignore_as_crowd=data.ignore_as_crowd
        )
    return coco_source(file, base if file.is_relative_to(base) else file.parent, split, data)


def _below(data: DataSettings, setting: str) -> Path:
    """An explicit path: absolute, or below `data.root`.

    Raises:
        DataError: it does not exist.
    """
    text, base = getattr(data, setting), folder_of(data)
    path = base / text
    if not path.exists():
        here = f"; there is {Path(text).absolute()}: write it in full, or data.root=." if Path(text).exists() else ""
        raise DataError(f"data.{setting}: {path.absolute()} does not exist (relative paths begin at data.root){here}")
    return path


def _with_images(source: Source, data: DataSettings, setting: str) -> Source:
    if getattr(data, setting) is None:
        return source
    if source.conversion is not None:
        raise DataError(
            f"data.{setting}: is for COCO JSON; a dataset of {source.kind} says itself where its images are"
        )
    return replace(source, images=_below(data, setting))


def source_lines(*sources: Source, boxes: bool = True) -> list[str]:
    """Format what was recognised, the files used with absolute paths, and what reading left out.

    Args:
        boxes: the files hold annotations, of which something may be left out.
    """
    first = sources[0]
    if all(source.conversion == first.conversion and first.conversion for source in sources):
        places = ", ".join(f"{source.split} {_absolute(source.images)}" for source in sources)
        lines = [f"{first.kind}: {_absolute(first.file)}; {places}"]
    else:
        each = (f"{source.split} {_absolute(source.file)}, images {_absolute(source.images)}" for source in sources)
        kinds = " and ".join(dict.fromkeys(source.kind for source in sources))
        lines = [f"{kinds}: {'; '.join(each)}"]
    if first.fraction is not None:
        what = "ids" if first.conversion is None else "file names"
        share = f"{first.fraction[0]:g} of the images, chosen by a hash of their {what}, validate"
        lines.append(f"one set only: {share}; data.validation_fraction changes it" if first.automatic else share)
    notes = dict.fromkeys(note for source in sources for note in source.notes()) if boxes else {}
    return [f"data        {line}" for line in [*lines, *notes]]


def _absolute(path: Path | None) -> str:
    return "not found" if path is None else os.path.abspath(path)
