"""Building the training and validation datasets of a run from its settings."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from detection.config.settings import DataSettings
from detection.data.annotations import Categories, select_images
from detection.data.coco import CocoDataset
from detection.data.digits import ensure_digits
from detection.data.fake import FakeDataset
from detection.data.image_cache import build_cache
from detection.data.image_file import choose_decoder
from detection.data.layouts import find_dataset, find_training_set, find_validation_set
from detection.errors import DataError, OutputError, name_list

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
    if not data.fake:
        find_dataset(data)  # report a missing split before spending time on reading the other
    training_set = build_training_dataset(data, seed, num_classes)
    validation_set: DetectionDataset
    if isinstance(training_set, FakeDataset):
        names = training_set.annotations.categories.names
        validation_set = FakeDataset(FAKE_IMAGES[1], names, seed + 1)
    else:
        file, images = find_dataset(data)[1]
        validation_set = CocoDataset(
            images,
            file,
            class_names=data.class_names,
            categories=training_set.annotations.categories,
            fraction=None if data.validation_fraction is None else (data.validation_fraction, True),
            strict=data.strict,
            follow_links=data.follow_links,
            decoder=choose_decoder(data.decoder),
            slow_seconds=data.slow_sample_seconds,
        )
    keep_evenly(validation_set, max_validation_images)
    return training_set, validation_set


def build_training_dataset(data: DataSettings, seed: int, num_classes: int | None) -> DetectionDataset:
    """Build the training set alone; arguments and errors as in `build_datasets`."""
    if data.fake:
        names = data.class_names or tuple(f"class_{label}" for label in range(num_classes or 0))
        return FakeDataset(FAKE_IMAGES[0], names, seed)
    make_builtin(data)
    file, images = find_training_set(data)
    dataset = CocoDataset(
        images,
        file,
        class_names=data.class_names,
        fraction=None if data.validation_fraction is None else (data.validation_fraction, False),
        strict=data.strict,
        follow_links=data.follow_links,
        decoder=choose_decoder(data.decoder),
        slow_seconds=data.slow_sample_seconds,
    )
    names = dataset.annotations.categories.names
    if num_classes not in (None, len(names)):
        raise DataError(
            f"model.num_classes is {num_classes}, but {file} has {len(names)} categories: {name_list(names)}"
        )
    if not len(dataset.annotations.labels):
        raise DataError(f"{file}: no usable box in any training image")
    annotations = dataset.annotations
    dataset.cache = build_cache(data, dataset.decoder, dataset.image_root, annotations.file_names, len(annotations))
    return dataset


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
    file, images = find_validation_set(data)
    dataset = CocoDataset(
        images,
        file,
        class_names=data.class_names,
        categories=None if names is None else Categories(tuple(names), tuple(range(len(names)))),
        fraction=None if data.validation_fraction is None else (data.validation_fraction, True),
        strict=data.strict,
        follow_links=data.follow_links,
        ground_truth=ground_truth,
    )
    keep_evenly(dataset, max_images)
    return dataset


def keep_evenly(dataset: DetectionDataset, count: int | None) -> None:
    """Reduce a dataset in place to `count` images spread evenly over its order; None keeps all.

    Not the first `count`: the beginning of a file may come from a single camera or day.
    """
    total = len(dataset.annotations)
    if count is not None and count < total:
        dataset.annotations = select_images(dataset.annotations, np.arange(count) * total // count)


def make_builtin(data: DataSettings) -> None:
    """Generate the built-in dataset if the settings ask for it and it does not exist yet."""
    if data.builtin != "digits" or data.fake:
        return
    try:
        if ensure_digits(Path(data.root)):
            print(f"built-in dataset of handwritten digits made in {data.root}", flush=True)
    except ValueError as error:
        raise DataError(str(error)) from None
    except OSError as error:
        raise OutputError(f"built-in dataset cannot be written to {data.root}: {error.strerror}") from None
