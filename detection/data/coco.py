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
from detection.data.augmentation.mixing import Annotated, Partners
from detection.data.image_cache import ImageCache
from detection.data.image_file import read_image
from detection.data.image_places import open_images
from detection.data.partners import PartnerImages
from detection.data.sampler import Position
from detection.data.slow_samples import SlowSamples
from detection.data.transforms import Sample, Transform
from detection.errors import DataReadError

MAX_UNREADABLE_IN_A_ROW = 8  # beyond this the disk has failed, not single images


class CocoDataset(Dataset):
    """Map-style dataset of images with COCO annotations, contiguous labels and strict image decoding.

    Indexed by an int or by the batch sampler's `Position`; see `__getitem__`.

    Args:
        images: directory the file names are relative to, or the index of packed shards; see `open_images`.
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
        images: where the images are.
        cache: cache of decoded images, or None.
        partners: gives images their partners for mosaic and mixup; None: a transform without these.
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
        self.images = open_images(images, follow_links)
        self.images.check_complete(columns.file_names, str(annotations))
        self.annotations = flatten_annotations(columns, str(annotations), class_names, categories, fraction, strict)
        # A class that the file lacks has an invented category id, which no result file may contain.
        ids = self.annotations.categories.ids
        self.unlisted = [] if ground_truth else np.flatnonzero(~np.isin(ids, columns.category_ids)).tolist()
        self.sample_transform: Callable[..., Any] | None = transform
        self.image_root = self.images.root
        self.decoder = decoder
        self.cache: ImageCache | None = None
        self.partners: PartnerImages | None = None
        self.slow_samples = SlowSamples(slow_seconds, self.describe_image)
        self.substitutes = False
        self.share = None if fraction is None else fraction[0] if fraction[1] else 1 - fraction[0]
        self.source_lines: list[str] = []

    def __len__(self) -> int:
        return len(self.annotations)

    def describe_image(self, index: int) -> str:
        return f"image id {self.annotations.image_ids[index]} ({self.annotations.file_name(index)})"

    def __getitems__(self, positions: list[int | Position]) -> list[Sample]:
        """Load the samples of a batch, timing each. `DataLoader` prefers this method to single items."""
        return [self.slow_samples.load_timed(self.__getitem__, position) for position in positions]

    def __getitem__(self, position: int | Position) -> Sample:
        """Load and transform one image, with its partners if there is mosaic or mixup.

        Args:
            position: image index, or `Position`. Augmentation is a pure function of seed, epoch and index.

        Raises:
            DataReadError: the image is missing, damaged, outside the image directory, or its size differs from the
                annotated one.
        """
        index, epoch, size, clean = Position(position) if isinstance(position, int) else Position(*position)
        unreadable: list[str] = []
        mixed = self.partners is not None and not clean
        index, own = self._readable(index, self.partners if mixed else None, unreadable)
        assert self.sample_transform is not None, "set before images are asked for"
        options = {"partners": self.partners_of(index, epoch, unreadable)} if mixed else {}
        try:
            sample: Sample = self.sample_transform(*own, index, epoch, size, **options)
        except Exception as error:
            if not isinstance(error, DataReadError):  # of a partner
                place = f"of epoch {epoch} at {size or 'its own'} px"
                error.add_note(f"while transforming {self.describe_image(index)} {place}")
            raise
        return dataclasses.replace(sample, unreadable=tuple(dict.fromkeys(unreadable)))

    def partners_of(self, index: int, epoch: int, unreadable: list[str]) -> Partners:
        """Return what gives an image its partners in an epoch; `unreadable` gets the errors of those replaced."""
        kept = self.partners
        assert kept is not None, "set with the transform"

        def load(generator: np.random.Generator, count: int) -> list[Annotated]:
            drawn = kept.draw(index, epoch, count, generator)
            return [self._readable(partner, kept, unreadable)[1] for partner in drawn]

        return load

    def _readable(self, index: int, partners: PartnerImages | None, unreadable: list[str]) -> tuple[int, Annotated]:
        """Load an image or, with `substitutes`, the next that can be read; returns its index too.

        Args:
            partners: keeps the image, which must not be written to, for others; None: nothing keeps it.
            unreadable: gets the errors of the images that another one replaces.
        """
        failed = 0
        while True:
            try:
                image = self.load_image(index) if partners is None else partners.load(index, self.load_image)
                break
            except DataReadError as error:
                unreadable.append(error.line)
                failed += 1
                if not self.substitutes or failed == min(MAX_UNREADABLE_IN_A_ROW, len(self)):
                    raise
            index = (index + 1) % len(self)
        rows = slice(self.annotations.first_box[index], self.annotations.first_box[index + 1])
        labels = np.where(self.annotations.crowd[rows], CROWD_LABEL, self.annotations.labels[rows])
        return index, Annotated(image, self.annotations.boxes[rows], labels)

    def load_image(self, index: int) -> np.ndarray:
        """Read an image from the cache or its file: RGB uint8, (height, width, 3)."""
        path = self.images.locate(self.annotations.file_name(index))
        image = read_image(path, self.decoder) if self.cache is None else self.cache.read(index, path)
        width, height = self.annotations.image_sizes[index]
        if width and (image.shape[1], image.shape[0]) != (width, height):
            swapped = (image.shape[0], image.shape[1]) == (width, height)
            hint = ": swapped, perhaps annotated without the EXIF orientation; correct the file" if swapped else ""
            raise DataReadError(
                f"{path}: is {image.shape[1]} x {image.shape[0]} pixels, the annotations say {width} x {height}{hint}"
            )
        return image
