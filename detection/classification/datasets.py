"""Images with one class each: CIFAR-10, a folder per class, or the boxes cut out of a detection dataset.

To the training such a set is a detection dataset whose images have one box, the whole image. Transform, loader, order
and resume are those of detectors.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from detection.classification.cifar import is_cifar, read_cifar
from detection.config.settings import DataSettings
from detection.data.annotation_file import Columns
from detection.data.annotations import Categories, flatten_annotations
from detection.data.augmentation.mixing import Annotated
from detection.data.build import build_datasets, keep_evenly, make_builtin
from detection.data.coco import CocoDataset
from detection.data.image_cache import build_cache
from detection.data.image_file import IMAGE_SUFFIXES, choose_decoder
from detection.data.image_places import ImageFolder
from detection.data.partners import PartnerImages
from detection.data.slow_samples import SlowSamples
from detection.errors import DataError, name_list

TRAINING_FOLDERS, VALIDATION_FOLDERS = ("train", "training"), ("val", "valid", "validation", "test")
HELD_BACK = 0.1  # of the images, where there is no validation set
MARGIN = 0.15  # of the sides of a box, on each side of its crop: the detector sees what is around an object too
LARGEST_CROP_PX = 256
Pixels = Sequence[np.ndarray]  # (H, W, 3) uint8 RGB each


class ClassSet(CocoDataset):
    """Images with one class each; see `CocoDataset`, whose items these have.

    Args:
        source: what messages name.
        labels: class of each image.
        names: of the classes.
        pixels: the images in memory; None: files.
        folder: of the files.
        file_names: below the folder.
        categories, fraction: as in `CocoDataset`.

    Attributes:
        pixels_digest: of the images in memory, which no file name identifies.
    """

    def __init__(
        self,
        source: str,
        labels: np.ndarray,
        names: Sequence[str],
        pixels: Pixels | None = None,
        folder: ImageFolder | None = None,
        file_names: Sequence[str] = (),
        categories: Categories | None = None,
        fraction: tuple[float, bool] | None = None,
        data: DataSettings | None = None,
    ) -> None:
        columns = one_box_per_image(labels, names, file_names or [f"{number}" for number in range(len(labels))])
        self.annotations = flatten_annotations(columns, source, None, categories, fraction)
        self.pixels, self.folder, self.source = pixels, folder, source
        self.decoder = choose_decoder(data.decoder if data else "auto")
        self.image_root = folder.root if folder else Path(source)
        self.cache = None
        self.unlisted: list[int] = []
        self.sample_transform = None
        self.partners: PartnerImages | None = None
        self.slow_samples = SlowSamples(data.slow_sample_seconds if data else None, self.describe_image)
        self.substitutes = False
        self.share = None
        self.source_lines: list[str] = []
        self.pixels_digest = "" if pixels is None else digest_of(pixels)

    def load_image(self, index: int) -> np.ndarray:
        """Read an image: RGB uint8, (height, width, 3)."""
        if self.pixels is not None:
            return self.pixels[int(self.annotations.image_ids[index])]
        assert self.folder is not None
        self.images = self.folder
        return super().load_image(index)

    def _readable(self, index: int, partners: PartnerImages | None, unreadable: list[str]) -> tuple[int, Annotated]:
        index, own = super()._readable(index, partners, unreadable)
        height, width = own.image.shape[:2]
        return index, own._replace(boxes=np.array([[0, 0, width, height]], np.float32))


def one_box_per_image(labels: np.ndarray, names: Sequence[str], file_names: Sequence[str]) -> Columns:
    """Columns of an annotation file whose images have one box each; its size is not known before an image is read."""
    count = len(labels)
    numbers = np.arange(count, dtype=np.int64)
    return Columns(
        image_ids=numbers,
        file_names=list(file_names),
        image_sizes=np.zeros((count, 2), np.int32),
        image_of_box=numbers,
        category_of_box=np.asarray(labels, np.int64),
        coco_boxes=np.tile([0.0, 0.0, 1.0, 1.0], (count, 1)),
        annotation_ids=numbers,
        crowd=np.zeros(count, bool),
        areas=np.ones(count),
        category_ids=np.arange(len(names), dtype=np.int64),
        category_names=list(names),
        ignored=np.zeros(count, bool),
        meanings={},
    )


def digest_of(pixels: Pixels) -> str:
    """SHA-256 of images in memory."""
    digest = hashlib.sha256()
    for image in pixels:
        digest.update(f"{image.shape}".encode())
        digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


def open_class_sets(
    data: DataSettings, seed: int, max_validation_images: int | None, crops: bool
) -> tuple[ClassSet, ClassSet]:
    """Open the training and the validation set that `data.root` holds.

    Args:
        crops: `data.root` is a detection dataset, of which the boxes are cut out; so are the built-in digits.

    Raises:
        DataError: there is no such set, or it cannot be used.
    """
    root = Path(data.root)
    if data.builtin or crops:
        sets = cut_out_sets(data, seed)
    elif not root.exists():
        raise DataError(f"data.root={root} does not exist; a CIFAR-10 archive or folder, or a folder per class")
    elif is_cifar(root):
        sets = cifar_sets(data, root)
    else:
        sets = folder_sets(data, root)
    training, validation = sets
    training.substitutes = True
    keep_evenly(training, data.max_train_images)
    keep_evenly(validation, max_validation_images)
    if training.folder is not None:
        names = training.annotations.file_names
        training.cache = build_cache(data, training.decoder, training.folder.root, names, len(training))
    if len(training.annotations.categories.names) < 2:
        raise DataError(f"{root}: one class alone cannot be told from another; at least two are needed")
    return training, validation


def cifar_sets(data: DataSettings, root: Path) -> tuple[ClassSet, ClassSet]:
    """CIFAR-10: its test batch validates, or with `data.validation_fraction` a share of the training batches."""
    cifar, source = read_cifar(root), str(root)
    labels, pixels = cifar.training.labels, list(cifar.training.pixels)
    if data.validation_fraction is not None:
        share = data.validation_fraction
        training, validation = (
            ClassSet(source, labels, cifar.names, pixels, fraction=(share, inside)) for inside in (False, True)
        )
        how = f"a share of {share:g} of its training batches validates"
    else:
        training = ClassSet(source, labels, cifar.names, pixels)
        validation = ClassSet(source, cifar.test.labels, cifar.names, list(cifar.test.pixels))
        how = "its test batch validates"
    training.source_lines = [f"source      CIFAR-10 in {root}; {how}"]
    return training, validation


def folder_sets(data: DataSettings, root: Path) -> tuple[ClassSet, ClassSet]:
    """A folder per class, in `train` and `val`, or of one set that is divided by a hash of the names."""
    folders = [next((root / name for name in names if (root / name).is_dir()), None)
               for names in (TRAINING_FOLDERS, VALIDATION_FOLDERS)]  # fmt: skip
    if folders[0] is None:
        share = data.validation_fraction or HELD_BACK
        training, validation = (folder_set(data, root, fraction=(share, inside)) for inside in (False, True))
        how = f"a share of {share:g} validates"
    else:
        if folders[1] is None:
            raise DataError(f"{root} has {folders[0].name} and none of {', '.join(VALIDATION_FOLDERS)} beside it")
        training = folder_set(data, folders[0])
        validation = folder_set(data, folders[1], training.annotations.categories)
        how = f"{folders[1].name} validates"
    training.source_lines = [f"source      a folder per class in {root}; {how}"]
    return training, validation


def folder_set(
    data: DataSettings,
    root: Path,
    categories: Categories | None = None,
    fraction: tuple[float, bool] | None = None,
) -> ClassSet:
    """The images of a folder whose folders are the classes, by name."""
    folder = ImageFolder(root, data.follow_links)
    names = [name for name in folder.names() if "/" in name and not name.startswith(".")]
    classes = sorted({name.split("/")[0] for name in names})
    if not names or (categories is not None and not set(classes) <= set(categories.names)):
        other = [name for name in classes if categories and name not in categories.names]
        wanted = f"a class {name_list(other)} that is not trained" if other else "no folder with images in it"
        raise DataError(f"{root} has {wanted}; one folder per class is needed ({', '.join(sorted(IMAGE_SUFFIXES))})")
    if data.class_names is not None:
        if missing := [name for name in data.class_names if name not in classes]:
            raise DataError(f"{root}: data.class_names has {name_list(missing)}, the folders are {name_list(classes)}")
        classes = list(data.class_names)
        names = [name for name in names if name.split("/")[0] in classes]
    elif categories is not None:
        classes = list(categories.names)
    numbers = {name: label for label, name in enumerate(classes)}
    labels = np.array([numbers[name.split("/")[0]] for name in names], np.int64)
    return ClassSet(str(root), labels, classes, None, folder, names, categories, fraction, data)


def cut_out_sets(data: DataSettings, seed: int) -> tuple[ClassSet, ClassSet]:
    """The boxes of a detection dataset as images of their own."""
    make_builtin(data)
    plain = data.model_copy(update={"max_train_images": None, "cache": "none"})
    sets = []
    for number, dataset in enumerate(build_datasets(plain, seed, None)):
        assert isinstance(dataset, CocoDataset), "data.fake is refused before"
        crops, labels = cut_out(dataset)
        split = ("training", "validation")[number]
        source, names = f"{data.root} ({split}, boxes cut out)", dataset.annotations.categories.names
        if not crops:
            raise DataError(f"{source}: no box to cut out")
        sets.append(ClassSet(source, labels, names, crops))
    sets[0].source_lines = [f"source      {data.root}, boxes cut out with a margin of {MARGIN:g} of their sides"]
    return sets[0], sets[1]


def cut_out(dataset: CocoDataset) -> tuple[list[np.ndarray], np.ndarray]:
    """Cut every box out of its image, with what is around it; crowd regions are left out."""
    crops, labels, annotations = [], [], dataset.annotations
    for index in range(len(dataset)):
        rows = range(annotations.first_box[index], annotations.first_box[index + 1])
        rows = [row for row in rows if not annotations.crowd[row]]  # type: ignore[assignment]
        image = dataset.load_image(index) if len(rows) else None
        for row in rows:
            assert image is not None
            crops.append(cut_box(image, annotations.boxes[row]))
            labels.append(int(annotations.labels[row]))
    return crops, np.array(labels, np.int64)


def cut_box(image: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Cut a box (x1, y1, x2, y2) with its margin out of an image (H, W, 3), at most `LARGEST_CROP_PX` on a side."""
    margins = MARGIN * np.tile(box[2:] - box[:2], 2) * [-1, -1, 1, 1]
    height, width = image.shape[:2]
    left, top = np.floor((box + margins)[:2]).astype(int).clip(0, [width - 1, height - 1])
    right, bottom = np.ceil((box + margins)[2:]).astype(int).clip([left + 1, top + 1], [width, height])
    crop = image[top:bottom, left:right]
    scale = LARGEST_CROP_PX / max(crop.shape[:2])
    if scale >= 1:
        return crop.copy()  # not a view, which would keep the whole image
    sides = [max(round(side * scale), 1) for side in (crop.shape[1], crop.shape[0])]
    return np.asarray(cv2.resize(crop, sides, interpolation=cv2.INTER_AREA), np.uint8)
