"""What a file or folder holds: COCO, YOLO or VOC in any usual layout, recognised by its content."""

from dataclasses import dataclass, replace
from pathlib import Path

from detection.config.settings import DataSettings
from detection.data.annotation_file import Columns
from detection.data.annotations import read_annotations
from detection.data.box_meanings import IGNORE
from detection.data.coco_files import describe_missing, find_coco_files, find_image_directory, split_in
from detection.data.conversion.dataset import images_inside
from detection.data.conversion.voc import has_annotations
from detection.data.conversion.yolo_labels import has_labels
from detection.data.conversion.yolo_layout import (
    DESCRIPTIONS,
    describe_folders,
    find_descriptions,
    names_of_files,
    subfolders,
)
from detection.data.converted import ALL, Conversion, folder_stamp, read_converted
from detection.errors import DataError

DEFAULT_ROOT = "data/coco"
SPLITS = {"training": "train", "validation": "val"}
LOOKED_FOR = (
    "COCO JSON (annotations/instances_*.json, or any file with the lists images, annotations and categories), "
    "a YOLO data.yaml or Darknet .data, YOLO .txt beside images or in labels/, VOC .xml"
)


@dataclass(frozen=True)
class Source:
    """One split.

    Attributes:
        split: "training" or "validation".
        kind: what was recognised, for the plan.
        file: annotation file; of a converted dataset its description or folder.
        root: folder of the dataset.
        images: directory that the file names begin from, or the index of packed shards (`open_images` takes both);
            None: the listed images were not found.
        tried: directories that were looked at for them.
        fraction: as in `CocoDataset`.
        automatic: the fraction is `FRACTION` because there is one set only.
        conversion: key of `read_converted`; None: the file is COCO JSON.
        part: the split's name in the converted dataset.
        ignore_as_crowd: as in `DataSettings`.
    """

    split: str
    kind: str
    file: Path
    root: Path
    images: Path | None
    tried: tuple[Path, ...] = ()
    fraction: tuple[float, bool] | None = None
    automatic: bool = False
    conversion: Conversion | None = None
    part: str = ""
    ignore_as_crowd: bool = False

    def columns(self) -> Columns:
        """Read the annotations; kept until `forget`.

        Raises:
            DataError: they are invalid.
        """
        if self.conversion is not None:
            return read_converted(self.conversion).parts[self.part][0]
        columns = read_annotations(self.file)
        if self.ignore_as_crowd:
            meanings = {key: ids for key, ids in columns.meanings.items() if key != IGNORE}
            return columns._replace(crowd=columns.crowd | columns.ignored, meanings=meanings)
        return columns

    def image_directory(self) -> Path:
        """The directory of the images, or the index of packed shards.

        Raises:
            DataError: the listed images are not there; names the directories tried and the likest file.
        """
        if self.images is None:
            setting = f"data.{SPLITS[self.split].replace('val', 'validation')}_images"
            raise DataError(f"{describe_missing(self.file, self.root, self.tried)}; set {setting}")
        return self.images

    def with_images(self, images: Path) -> "Source":
        """The same with another directory (or index) of the images."""
        return replace(self, images=images)

    def notes(self) -> list[str]:
        """What was left out or changed in reading, and keys whose meaning is lost."""
        if self.conversion is not None:
            return read_converted(self.conversion).findings.lines(self.root)
        meanings = self.columns().meanings
        return [
            f"note: {len(ids)} {key} (ids {ids[:5]}{' ...' if len(ids) > 5 else ''})" for key, ids in meanings.items()
        ]


def recognise(root: Path, data: DataSettings) -> dict[str, Source]:
    """Recognise what a file or folder holds, by its content.

    Raises:
        DataError: nothing, or several formats.
    """
    try:
        if root.is_file():
            return _recognise_file(root, data)
        if not root.is_dir():
            raise DataError(
                f"data.root = {data.root!r} does not exist"
                + (
                    ": fetch COCO with data/download_coco.sh, name your own dataset with data.root=FOLDER, or train on "
                    "the built-in one with --config recipes/quickstart.yaml"
                    if data.root == DEFAULT_ROOT
                    else f" ({root.absolute()}); it names a folder, or its data.yaml, .data or JSON file"
                )
            )
        if found := _recognise_folder(root, data) or (_has_own_images(root) and _loose(root, data)):
            return found
        below, refusals = _nested(root, data)
        if not below and refusals:
            raise refusals[0]
        loose = [] if below else _loose_sets(root)
        if len(loose) == 1 and (found := _loose(loose[0], data)):
            return found
    except OSError as error:
        raise DataError(f"{error.filename or root} cannot be read: {error.strerror}") from None
    if len(below) == 1:
        return next(iter(below.values()))
    if several := [*below] or (loose if len(loose) > 1 and data.format in ("auto", "yolo") else []):
        raise DataError(
            f"{root}: holds several datasets: {', '.join(map(str, several))}; name one as data.root, or join them with "
            "convert_dataset.py"
        )
    raise DataError(
        f"no dataset recognised in {root.absolute()}"
        + (f" (data.format: {data.format})" if data.format != "auto" else "")
        + f": looked for {LOOKED_FOR}; there is {describe_folder(root)}; name the file with data.root=FILE, or "
        "data.train_annotations and data.train_images"
    )


def _nested(root: Path, data: DataSettings, levels: int = 2) -> tuple[dict[Path, dict[str, Source]], list[DataError]]:
    """Datasets in the folders of a folder, as archives are unpacked: VOCdevkit/VOC2007; and why others are none."""
    datasets, refusals = {}, []
    for path in _folders(root):
        try:
            found = _recognise_folder(path, data)
            if not found and names_of_files(path) is not None:
                found = _loose(path, data)
        except DataError as error:
            refusals.append(error)
            continue
        if found:
            datasets[path] = found
        elif levels > 1:
            deeper = _nested(path, data, levels - 1)
            datasets |= deeper[0]
            refusals += deeper[1]
    return datasets, refusals


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _has_own_images(root: Path) -> bool:
    """Whether a folder is a dataset of its own rather than one that holds datasets: class names, images or splits.

    A picture alone does not make one, beside a readme for example: labels lie beside it or in labels/.
    """
    labels = any(file.suffix.lower() == ".txt" for file in root.iterdir()) or subfolders(root, "labels")
    return (
        names_of_files(root) is not None
        or bool(labels and images_inside(root))
        or describe_folders(root, ALL).places != {ALL: [root]}
    )


def _loose_sets(root: Path) -> list[Path]:
    """Folders without class names that are a dataset each: this one, or those in it that have images/ and labels/.

    Class 0 of two such datasets may mean two things. Folders with the labels beside the images are one dataset.
    """
    while not _has_own_images(root):
        labelled = [folder for folder in _folders(root) if has_labels(folder)]
        if len(labelled) > 1 and any(describe_folders(path, ALL).places != {ALL: [path]} for path in labelled):
            return labelled
        if len(labelled) != 1:
            break
        root = labelled[0]
    return [root]


def _recognise_file(file: Path, data: DataSettings) -> dict[str, Source]:
    suffix = file.suffix.lower()
    if suffix == ".json":
        parent = file.parent
        root = parent.parent if parent.name == "annotations" else parent
        name = {"val": "val", "test": "val"}.get(split_in(Path(file.name)) or "", ALL)
        return {name: coco_source(file, root, "", data)}
    if suffix in DESCRIPTIONS:
        return _convert(file, "yolo", data)
    raise DataError(f"data.root = {data.root!r}: a file must be .json, .yaml or .data; or name the folder")


def _recognise_folder(root: Path, data: DataSettings) -> dict[str, Source]:
    """The sets of a folder by its signs; none: not recognised."""
    asked = data.format
    coco = find_coco_files(root) if asked in ("auto", "coco") else {}
    descriptions = find_descriptions(root) if asked in ("auto", "yolo") else []
    voc = asked in ("auto", "voc") and has_annotations(root)
    signs = {
        "coco": ", ".join(str(file.relative_to(root)) for file in coco.values()),
        "yolo": ", ".join(file.name for file in descriptions),
        "voc": "VOC .xml files" if voc else "",
    }
    formats = [name for name, sign in signs.items() if sign]
    if len(formats) > 1:
        parts = "; ".join(f"{name}: {signs[name]}" for name in formats)
        raise DataError(f"{root}: holds several formats ({parts}); say which with data.format={'|'.join(formats)}")
    if coco:
        return {split or ALL: coco_source(file, root, "", data) for split, file in coco.items()}
    if voc:
        return _convert(root, "voc", data)
    return _convert(root, "yolo", data) if descriptions else {}


def _loose(root: Path, data: DataSettings) -> dict[str, Source]:
    """The sets of a folder of images and label files without a description, which count where nothing else is."""
    return _convert(root, "yolo", data) if data.format in ("auto", "yolo") and has_labels(root) else {}


def _convert(source: Path, kind: str, data: DataSettings) -> dict[str, Source]:
    if kind == "yolo" and source.is_dir() and len(found := find_descriptions(source)) == 1:
        source = found[0]
    folder = source.parent if source.is_file() else source
    given = data.validation_fraction is not None or data.validation_annotations is not None
    key = Conversion(
        source.absolute(), kind, data.voc_corners == "inclusive", data.difficult, given, folder_stamp(folder)
    )
    converted = read_converted(key)
    name = {"voc": "Pascal VOC XML"}.get(kind) or (
        f"{'Darknet' if source.suffix == '.data' else 'YOLO'} {source.name}" if source.is_file() else "YOLO folders"
    )
    return {
        split: Source("", name, source, folder, images, conversion=key, part=split)
        for split, (_, images) in converted.parts.items()
    }


def coco_source(file: Path, root: Path, split: str, data: DataSettings) -> Source:
    images, tried = find_image_directory(file, root)
    kind = "COCO JSON" if images is None or images.is_dir() else "packed shards"
    return Source(split, kind, file, root, images, tuple(tried), ignore_as_crowd=data.ignore_as_crowd)


def describe_folder(root: Path, most: int = 12) -> str:
    """What a folder holds, for a message."""
    names = sorted(path.name + "/" * path.is_dir() for path in root.iterdir() if not path.name.startswith("."))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "nothing"
