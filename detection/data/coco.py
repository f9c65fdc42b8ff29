"""Dataset of images with COCO annotations. Only this package and the evaluation know category ids.

The annotation file is read once into flat arrays. Without a Python object per annotation, reference counts do not make
forked loader workers copy the memory.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from detection.contract import CROWD_LABEL
from detection.data.annotation_file import Columns
from detection.data.annotations import Categories, flatten_annotations, read_annotations
from detection.data.image_cache import ImageCache
from detection.data.image_file import read_image
from detection.data.slow_samples import SlowSamples
from detection.data.transforms import Sample, Transform
from detection.errors import DataError, DataReadError

MAX_UNREADABLE_IN_A_ROW = 8  # beyond this the disk has failed, not single images


class CocoDataset(Dataset):
    """Map-style dataset of images with COCO annotations, contiguous labels and strict image decoding.

    Indexed by an int or by the batch sampler's (index, epoch, size); see `__getitem__`.

    Args:
        images: directory the file names are relative to.
        annotations: annotation file.
        transform: maps image and boxes to the network input; None: set `sample_transform` before loading samples.
        class_names: use only these categories, in this order; None: all of the file, by ascending id.
        categories: classes of the training set, whose labels this validation set takes over by name.
        fraction: (fraction, inside); keep the images whose hash lies inside (validation) or outside (training) it.
        strict: raise on degenerate boxes and boxes outside their image instead of dropping them.
        follow_links: whether image files may be symbolic links that lead out of the image directory.
        decoder: decoder of JPEG files, a key of `JPEG_DECODERS`.
        slow_seconds: print the name of an image that takes longer than this; None: never.
        columns: content of `annotations`, which then only names it in messages; None: it is a COCO file to be read.
        ground_truth: False: the columns hold no boxes, and a class that they lack is no error.

    Attributes:
        cache: cache of decoded images, or None.
        unlisted: labels of classes that the file has no category for; known without `ground_truth` only.
        substitutes: whether an unreadable image is replaced by the next readable one, which the sample records. For
            training only: an evaluation that skips images would be of another dataset.
        share: the share of the file's images that belongs to this set, where a file is divided; None: all.
        source_lines: where the data comes from, for the plan; of `detection.data.build`.

    Raises:
        DataError: the file is not a COCO annotation file or has no usable images; one line with file and entry.
    """

    def __init__(
        self,
        images: Path,
        annotations: Path,
        transform: Transform | None = None,
        class_names: Sequence[str] | None = None,
        categories: Categories | None = None,
        fraction: tuple[float, bool] | None = None,
        strict: bool = False,
        follow_links: bool = False,
        decoder: str = "opencv",
        slow_seconds: float | None = None,
        columns: Columns | None = None,
        ground_truth: bool = True,
    ) -> None:
        if columns is None:
            columns = read_annotations(annotations)
        if not images.is_dir():
            raise DataError(f"image directory {images} does not exist")
        self.annotations = flatten_annotations(columns, str(annotations), class_names, categories, fraction, strict)
        # A class that the file lacks has an invented category id, which no result file may contain.
        ids = self.annotations.categories.ids
        self.unlisted = [] if ground_truth else np.flatnonzero(~np.isin(ids, columns.category_ids)).tolist()
        self.sample_transform: Callable[..., Any] | None = transform
        self.image_root = images.resolve()
        self.follow_links = follow_links
        self.decoder = decoder
        self.cache: ImageCache | None = None
        self.slow_samples = SlowSamples(slow_seconds, self.describe_image)
        self.substitutes = False
        self.share = None if fraction is None else fraction[0] if fraction[1] else 1 - fraction[0]
        self.source_lines: list[str] = []

    def __len__(self) -> int:
        return len(self.annotations)

    def describe_image(self, index: int) -> str:
        return f"image id {self.annotations.image_ids[index]} ({self.annotations.file_name(index)})"

    def __getitems__(self, positions: list[int | tuple[int, int, int]]) -> list[Sample]:
        """Load the samples of a batch, timing each. `DataLoader` prefers this method to single items."""
        return [self.slow_samples.load_timed(self.__getitem__, position) for position in positions]

    def __getitem__(self, position: int | tuple[int, int, int]) -> Sample:
        """Load and transform one image.

        Args:
            position: image index, or (index, epoch, size). Augmentation is a pure function of seed, epoch and index;
                size is the side of the network input in pixels, 0 for the transform's default.

        Raises:
            DataReadError: the image is missing, damaged, outside the image directory, or its size differs from the
                annotated one.
        """
        index, epoch, size = (position, 0, 0) if isinstance(position, int) else position
        unreadable: list[str] = []
        while True:
            try:
                sample: Sample = dataclasses.replace(self._sample(index, epoch, size), unreadable=tuple(unreadable))
                return sample
            except DataReadError as error:
                unreadable.append(error.line)
                if not self.substitutes or len(unreadable) == min(MAX_UNREADABLE_IN_A_ROW, len(self)):
                    raise
            index = (index + 1) % len(self)

    def _sample(self, index: int, epoch: int, size: int) -> Sample:
        rows = slice(self.annotations.first_box[index], self.annotations.first_box[index + 1])
        labels = np.where(self.annotations.crowd[rows], CROWD_LABEL, self.annotations.labels[rows])
        image, boxes = self.load_image(index), self.annotations.boxes[rows]
        assert self.sample_transform is not None, "set before images are asked for"
        try:
            return self.sample_transform(image, boxes, labels, index, epoch, size)
        except Exception as error:
            place = f"of epoch {epoch} at {size or 'its own'} px"
            error.add_note(f"while transforming {self.describe_image(index)} {place}")
            raise

    def load_image(self, index: int) -> np.ndarray:
        """Read an image from the cache or its file: RGB uint8, (height, width, 3)."""
        path = self.image_root / self.annotations.file_name(index)
        if not self.follow_links and not path.resolve().is_relative_to(self.image_root):
            raise DataReadError(f"{path}: is a link out of the image directory (data.follow_links: true allows it)")
        image = read_image(path, self.decoder) if self.cache is None else self.cache.read(index, path)
        width, height = self.annotations.image_sizes[index]
        if width and (image.shape[1], image.shape[0]) != (width, height):
            swapped = (image.shape[0], image.shape[1]) == (width, height)
            hint = ": swapped, perhaps annotated without the EXIF orientation; correct the file" if swapped else ""
            raise DataReadError(
                f"{path}: is {image.shape[1]} x {image.shape[0]} pixels, the annotations say {width} x {height}{hint}"
            )
        return image
