"""Training images as network inputs, to measure the ranges of a network's activations."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from detection.config.settings import Settings
from detection.contract import Geometry
from detection.data.build import make_builtin
from detection.data.image_file import read_image
from detection.data.image_places import open_images
from detection.data.loaders import collate_samples
from detection.data.sources import find_source
from detection.data.transforms import Transform
from detection.errors import DataError, DataReadError


def calibration_images(settings: Settings, geometry: Geometry, count: int) -> Iterator[Tensor]:
    """Read training images spread evenly over their names, without augmentation; damaged ones are left out.

    Args:
        geometry: of the detector: how an image becomes the network input.
        count: number of images.

    Yields:
        One image at a time, uint8 (1, 3, S, S), S: `evaluation.image_size`.

    Raises:
        DataError: there are no training images, or none can be read.
    """
    data = settings.data
    make_builtin(data)
    directory = find_source(data, "training").image_directory()
    images = open_images(directory, data.follow_links)
    names = sorted(images.names())
    transform = Transform(geometry, settings.evaluation.image_size)
    nothing, read = (np.zeros((0, 4), np.float32), np.zeros(0, np.int64)), 0
    for index in np.unique(np.linspace(0, len(names) - 1, min(count, len(names))).round().astype(int)):
        try:
            pixels = read_image(images.locate(names[index]))
        except DataReadError:
            continue
        read += 1
        yield collate_samples([transform(pixels, *nothing, int(index), 0, settings.evaluation.image_size)])[
            "images"
        ].contiguous(memory_format=torch.contiguous_format)
    if not read:
        raise DataError(f"--int8 measures ranges on training images: none in {directory} can be read")
