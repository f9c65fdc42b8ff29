"""Building the training and validation datasets of a run from its settings."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from detection.config.settings import DataSettings, Settings
from detection.contract import Geometry
from detection.data.annotation_file import read_without_boxes
from detection.data.annotations import Annotations, Categories, flatten_annotations, select_images
from detection.data.coco import CocoDataset
from detection.data.dataset_formats import Source
from detection.data.digits import ensure_digits
from detection.data.fake import FakeDataset
from detection.data.image_cache import build_cache
from detection.data.image_file import choose_decoder
from detection.data.partners import PartnerImages
from detection.data.sampler import ImageOrder
from detection.data.sources import find_source, forget, look_once, source_lines
from detection.data.transforms import Transform
from detection.errors import DataError, OutputError, name_list, say

FAKE_IMAGES = (1024, 64)  # training and validation images of data.fake

DetectionDataset = CocoDataset | FakeDataset


def build_datasets(
    data: DataSettings, seed: int, num_classes: int | None, max_validation_images: int | None = None
) -> tuple[DetectionDataset, DetectionDataset]:
    """Build the training set and the validation set, which uses the training set's labels.

    Both lack a `sample_transform`, which depends on the detector, which in turn depends on the number of classes.

    Args:
        seed: seed of the run.
        num_classes: required number of classes; None: as many as the annotations have.
        max_validation_images: see `keep_evenly`.

    Raises:
        DataError: no dataset found, unusable annotations, or another number of classes.
    """
    make_builtin(data)
    if data.fake:
        training_set = build_training_dataset(data, seed, num_classes)
        names = training_set.annotations.categories.names
        validation_set: DetectionDataset = FakeDataset(FAKE_IMAGES[1], names, seed + 1)
        keep_evenly(validation_set, max_validation_images)
        return training_set, validation_set
    sources, look = [], look_once(data)
    for split in ("training", "validation"):  # a missing one is reported before time is spent on the other
        sources.append(find_source(data, split, look))
        sources[-1].image_directory()
    training_set = build_training_dataset(data, seed, num_classes, sources[0])
    validation_set = _open(sources[1], data, training_set.annotations.categories)
    training_set.source_lines = source_lines(*sources)
    keep_evenly(validation_set, max_validation_images)
    forget()
    return training_set, validation_set


def build_training_dataset(
    data: DataSettings, seed: int, num_classes: int | None, source: Source | None = None
) -> DetectionDataset:
    """Build the training set alone; arguments and errors as in `build_datasets`.

    Args:
        source: of the training set; None: it is looked for.
    """
    if data.fake:
        names = data.class_names or tuple(f"class_{label}" for label in range(num_classes or 0))
        return FakeDataset(FAKE_IMAGES[0], names, seed)
    make_builtin(data)
    source = source or find_source(data, "training")
    dataset = _open(source, data)
    names = dataset.annotations.categories.names
    if num_classes not in (None, len(names)):
        raise DataError(
            f"model.num_classes is {num_classes}, but {source.file} has {len(names)} categories: {name_list(names)}"
        )
    dataset.annotations = annotations = choose_training_images(dataset.annotations, data)
    if not len(annotations.labels):
        why = [*source.notes(), *(f"left out: {line}" for line in annotations.counts.lines())]
        raise DataError("; ".join([f"{source.file}: no usable box in any training image", *why]))
    dataset.cache = build_cache(data, dataset.decoder, dataset.image_root, annotations.file_names, len(annotations))
    return dataset


def read_training_annotations(data: DataSettings) -> Annotations:
    """Read what training would train on, without looking for the images; errors as in `build_datasets`."""
    make_builtin(data)
    source = find_source(data, "training")
    annotations = flatten_annotations(
        source.columns(), str(source.file), data.class_names, None, source.fraction, data.strict
    )
    return choose_training_images(annotations, data)


def choose_training_images(annotations: Annotations, data: DataSettings) -> Annotations:
    """Apply `data.skip_empty`, then `data.max_train_images`."""
    if data.skip_empty and len(annotations.labels):  # none at all is reported by who uses them
        annotations = select_images(annotations, np.flatnonzero(np.diff(annotations.first_box)))
    return evenly(annotations, data.max_train_images)


def build_validation_dataset(
    data: DataSettings, names: Sequence[str] | None, max_images: int | None = None, ground_truth: bool = True
) -> CocoDataset:
    """Build the validation set alone, with the labels of a trained detector.

    Args:
        names: class names of the detector in label order; None: all categories of the file, by ascending id.
        max_images: see `keep_evenly`.
        ground_truth: see `CocoDataset`.

    Raises:
        DataError: no dataset found, unusable annotations, or categories that the detector was not trained on.
    """
    make_builtin(data)
    categories = None if names is None else Categories(tuple(names), tuple(range(len(names))))
    dataset = _open(find_source(data, "validation"), data, categories, ground_truth)
    keep_evenly(dataset, max_images)
    forget()
    return dataset


def _open(
    source: Source, data: DataSettings, categories: Categories | None = None, ground_truth: bool = True
) -> CocoDataset:
    dataset = CocoDataset(
        source.image_directory(),
        source.file,
        class_names=data.class_names,
        categories=categories,
        fraction=source.fraction,
        strict=data.strict,
        follow_links=data.follow_links,
        decoder=choose_decoder(data.decoder),
        slow_seconds=data.slow_sample_seconds,
        columns=source.columns() if ground_truth else read_without_boxes(source.file),
        ground_truth=ground_truth,
    )
    dataset.source_lines = source_lines(source, boxes=ground_truth)
    return dataset


def keep_evenly(dataset: DetectionDataset, count: int | None) -> None:
    """Reduce a dataset in place to `count` images spread evenly over its order; None keeps all.

    Not the first `count`: the beginning of a file may come from a single camera or day.
    """
    dataset.annotations = evenly(dataset.annotations, count)


def evenly(annotations: Annotations, count: int | None) -> Annotations:
    """The annotations of `count` images as `keep_evenly` chooses them."""
    total = len(annotations)
    if count is None or count >= total:
        return annotations
    return select_images(annotations, np.arange(count) * total // count)


def prepare_for_training(
    dataset: DetectionDataset, geometry: Geometry, settings: Settings, repeat_factors: np.ndarray | None = None
) -> None:
    """Give the training set its transform and, for mosaic and mixup, the order from which images get their partners.

    Args:
        geometry: geometry of the detector.
        repeat_factors: how often each image is seen per epoch; None: once.
    """
    seed, size = settings.run.seed, settings.train.image_size
    transform = Transform(geometry, size, seed, settings.data.augmentation)
    dataset.sample_transform, dataset.partners = transform, None
    if transform.mixing is not None:
        dataset.partners = PartnerImages(ImageOrder(len(dataset), seed, repeat_factors))


def make_builtin(data: DataSettings) -> None:
    """Generate the built-in dataset if the settings ask for it and it does not exist yet."""
    if data.builtin != "digits" or data.fake:
        return
    try:
        if ensure_digits(Path(data.root)):
            say(f"built-in dataset of handwritten digits made in {data.root}")
    except ValueError as error:
        raise DataError(str(error)) from None
    except OSError as error:
        raise OutputError(f"built-in dataset cannot be written to {data.root}: {error.strerror}") from None
