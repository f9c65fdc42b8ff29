"""A detection dataset between two formats: images and boxes in memory, what was left out, the files of images."""

import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from PIL import Image

from detection.data.annotation_file import CONTROL
from detection.data.image_file import IMAGE_SUFFIXES
from detection.errors import DataError

PIXEL_DIGITS = 9  # decimals of a pixel that are kept; YOLO's usual six decimals of a share need seven
LARGEST_NUMBER = 10**6  # pixels or shares beyond are no box
LARGEST_PIXEL = 10**12
EXAMPLES = 3  # places that are shown of each finding
ORIENTATION_TAG = 0x0112  # of EXIF; 5 to 8 swap the sides
SPLITS = ("train", "val", "test")
SPLIT_WORD = re.compile(r"(train|val|test)(?:ing|id|idation)?(?:set|data)?[0-9]*")  # names a split and nothing else

Corners = tuple[Decimal, Decimal, Decimal, Decimal]


@dataclass(frozen=True, slots=True)
class Box:
    """One object.

    Attributes:
        label: index into the names of the dataset.
        xywh: left, top, width and height in pixels of the image as it is shown.
        crowd: a region that is neither learned nor counted.
        extra: further keys of the annotation, an id among them, kept in COCO JSON.
    """

    label: int
    xywh: tuple[float, float, float, float]
    crowd: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class ImageEntry:
    """One image: its file (None: there is none, only its size is known), its name in the new dataset, its boxes.

    `extra` holds further keys of a COCO image, its id among them, which stay in COCO JSON.
    """

    file: Path | None
    name: str
    width: int
    height: int
    boxes: list[Box]
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class ConvertedDataset:
    """Names of the labels, the images of each split, and the directories that the images' names began from.

    Of a COCO file that becomes one again also the entries of its categories, by name, and what else it holds, by split.
    """

    names: tuple[str, ...]
    splits: dict[str, list[ImageEntry]]
    roots: dict[str, Path]
    categories: dict[str, dict[str, Any]] = field(default_factory=dict)
    headers: dict[str, dict[str, Any]] = field(default_factory=dict)


class Findings:
    """What was left out, and what was kept but is worth a word: every place, by reason."""

    def __init__(self) -> None:
        self.skipped: dict[str, list[str]] = {}
        self.notes: dict[str, list[str]] = {}

    def skip(self, reason: str, place: str) -> None:
        """Count something that is left out."""
        self.skipped.setdefault(reason, []).append(printable(place))

    def note(self, reason: str, place: str) -> None:
        """Count something that is kept but worth knowing."""
        self.notes.setdefault(reason, []).append(printable(place))

    def lines(self, source: Path, examples: int = EXAMPLES) -> list[str]:
        """For the terminal: counts, and the first few places, below the source where they are."""
        lines = []
        for title, found in (("left out", self.skipped), ("note", self.notes)):
            for reason, places in found.items():
                first = [place.removeprefix(f"{source}/") for place in places[:examples]]
                more = ", ..." if len(places) > examples else ""
                lines.append(f"{title}: {len(places)} {reason} ({', '.join(first)}{more})")
        return lines


def printable(text: str) -> str:
    """Control characters and bytes that are no text, as Python writes them."""
    return CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


@dataclass(frozen=True)
class ImageSize:
    """Size of an image file in pixels, as stored and as it is shown once its EXIF orientation is applied."""

    stored: tuple[int, int]
    orientation: int

    @property
    def shown(self) -> tuple[int, int]:
        """Width and height as shown."""
        width, height = self.stored
        return (height, width) if self.orientation >= 5 else (width, height)


def read_image_size(file: Path) -> ImageSize:
    """From the file's header, nothing is decoded. Our loader, like OpenCV, turns images by their EXIF orientation.

    Raises:
        DataError: missing, or not an image.
    """
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # of what is decoded; here nothing is
    try:
        with Image.open(file) as image:
            # A PNG may say it behind the pixels, which Pillow decodes to get there, so only where there is something.
            late = image.format == "PNG" and b"eXIf" in file.read_bytes()
            orientation = (image.getexif() if late else Image.Image.getexif(image)).get(ORIENTATION_TAG, 1)
            return ImageSize(image.size, orientation if orientation in range(1, 9) else 1)
    except FileNotFoundError:
        raise DataError("images whose file is missing") from None
    except (OSError, ValueError, SyntaxError):
        raise DataError("images that cannot be read") from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def image_in_pixels(
    file: Path, place: str, stated: tuple[int, int] | None, findings: Findings
) -> tuple[tuple[int, int], ImageSize | None] | None:
    """The size that boxes in pixels must fit, and the image to turn them by if they were drawn on the stored pixels.

    Args:
        place: of the annotation, for the findings.
        stated: size that the annotation states; None: it states none.

    Returns:
        ((width, height) as shown, the turn or None); None: the image is left out, which the findings say.
    """
    try:
        size = read_image_size(file)
    except DataError as error:
        findings.skip(error.line, place)
        return None
    if stated is None or stated == size.shown:
        return size.shown, None
    if stated == size.stored:
        findings.note("images whose boxes were turned by the EXIF orientation, as the image is shown", place)
        return size.shown, size
    findings.note("images of another size than the annotation states; boxes are kept, the size is the image's", place)
    return size.shown, None


def turn_box(corners: Corners, size: ImageSize) -> Corners:
    """A box (x1, y1, x2, y2) on the stored pixels, on the image as it is shown; orientations 5 to 8.

    Source: Exif 2.32 (CIPA DC-008), tag Orientation: which sides of the image the stored first row and column are.
    """
    width, height = size.stored
    x1, y1, x2, y2 = corners
    left, right = (y1, y2) if size.orientation in (5, 8) else (height - y2, height - y1)
    top, bottom = (x1, x2) if size.orientation in (5, 6) else (width - x2, width - x1)
    return left, top, right, bottom


def parse_number(text: str) -> Decimal | None:
    """The exact number; None: there is none, it is non-finite, or far from any box."""
    try:
        value = Decimal(text) if "_" not in text and text.isascii() else None
    except InvalidOperation:
        return None
    return value if value is not None and value.is_finite() and abs(value) <= LARGEST_NUMBER else None


def finish_box(
    label: int,
    corners: Corners,
    size: tuple[int, int],
    place: str,
    findings: Findings,
    crowd: bool = False,
    extra: dict[str, Any] | None = None,
) -> Box | None:
    """A box from exact corners (x1, y1, x2, y2) in pixels, rounded to 1e-9 pixel; outside the image it stays as it is.

    The rounding undoes that of the last digit in shares of an image: 1/3 of 3 pixels is 1.

    Returns:
        None: the box has no width or height or is no box at all, which the findings say.
    """
    if max(map(abs, corners)) > LARGEST_PIXEL:
        findings.skip("boxes far away from any image", place)
        return None
    x, y, width, height = (
        float(round(value, PIXEL_DIGITS)) + 0.0
        for value in (corners[0], corners[1], corners[2] - corners[0], corners[3] - corners[1])
    )
    if width <= 0 or height <= 0:
        findings.skip("boxes without width or height", place)
        return None
    if x < -1e-6 or y < -1e-6 or x + width > size[0] + 1e-6 or y + height > size[1] + 1e-6:
        findings.note("boxes that reach outside their image, kept as they are", place)
    return Box(label, (x, y, width, height), crowd, extra or {})


def note_duplicates(boxes: Sequence[Box], place: str, findings: Findings) -> None:
    """Note an image that has the same box of the same class twice."""
    twice = len(boxes) - len({(box.label, box.xywh) for box in boxes})
    if twice:
        findings.note("images with the same box of the same class more than once, kept", place)


def images_below(directory: Path) -> list[Path]:
    """Image files in a folder and everything below, sorted; hidden files are none of them."""
    return sorted(filter(is_image, directory.rglob("*")))


def images_inside(directory: Path) -> list[Path]:
    """The same of the folder alone; none where there is no such folder."""
    return sorted(filter(is_image, directory.glob("*")))


def is_image(file: Path) -> bool:
    """Whether a file has an image suffix and is not hidden."""
    return file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()


def read_text(file: Path) -> str:
    """Text of a list or description, in UTF-8 with or without a byte order mark.

    Raises:
        DataError: it is of another encoding; names the line.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise DataError(f"{file}: line {line} is not UTF-8 text (byte 0x{byte:02x}); save it as UTF-8") from None


def common_root(files: Sequence[Path]) -> Path:
    """The deepest directory that holds all files."""
    return Path(os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files]))


def relative_name(file: Path, root: Path) -> str:
    """Name of a file below the directory that `common_root` gave; without any way out of it."""
    return Path(os.path.abspath(file)).relative_to(root).as_posix()


def split_of(name: str) -> str | None:
    """train, val or test for the name of a folder or file that means it (train2017, valid, ...); None: means none."""
    name = name.lower()
    if name.startswith("trainval"):
        return None
    return next((split for split in SPLITS if name.startswith(split)), None)


def link_image(source: Path, target: Path, link: bool) -> bool:
    """Put an image at its new place; True if it was copied: asked for, or the file system cannot link.

    A hard link is a second name of the same file: it takes no space, and stays when either folder is moved or removed.

    Raises:
        OSError: cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        try:
            os.link(source.resolve(), target)
            return False
        except OSError:  # another disk, or somebody else's file
            pass
    shutil.copyfile(source, target)
    return True


def check_names(names: Iterable[str], where: str) -> tuple[str, ...]:
    """Class names that datasets can have.

    Raises:
        DataError: none, an empty one, or one twice.
    """
    found = tuple(str(name).strip() for name in names)
    if not found:
        raise DataError(f"{where}: no class names")
    if "" in found:
        raise DataError(f"{where}: class {found.index('')} has no name")
    name, count = Counter(found).most_common(1)[0]
    if count > 1:
        raise DataError(f"{where}: the class name {name!r} occurs twice")
    return found


def as_decimal(value: float) -> Decimal:
    """The shortest decimal that means this float: what the file said."""
    return Decimal(repr(value)) if math.isfinite(value) else Decimal(0)
