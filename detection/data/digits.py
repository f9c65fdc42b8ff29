"""Generator of the built-in dataset: handwritten digits on photographs, written once as ordinary COCO files.

No download is needed: scikit-learn's 1797 handwritten digits are painted on photographs that scikit-learn,
scikit-image and matplotlib ship in their wheels (`docs/data_sources.md`). The splits share neither glyphs nor
photographs, so the validation score does not measure memorisation.

    ROOT/annotations/instances_train.json   ROOT/train/digits_train_0000.jpg ...
    ROOT/annotations/instances_val.json     ROOT/val/digits_val_0000.jpg ...

Besides the COCO keys, annotations have `glyph` (row of `load_digits`) and images have `photograph`.
"""

import contextlib
import json
import math
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

GENERATOR = "detection/data/digits.py"
GENERATOR_VERSION = 3  # increment whenever images or files change, so that existing directories are rebuilt
SEED = 20240224
IMAGE_COUNTS: Mapping[str, int] = MappingProxyType({"train": 1000, "val": 200})
IMAGE_SIZE_PX = 320
DIGITS_PER_IMAGE = (5, 14)
DIGIT_HEIGHT_PX = (28, 76)
MAX_ROTATION_DEGREES = 12.0
TRAIN_GLYPH_FRACTION = 0.8
BOX_ALPHA = 0.5  # minimum opacity of the pixels that a box encloses
MIN_CONTRAST = 72  # grey levels by which the ink is lighter than the background ...
MIN_CONTRAST_FRACTION = 0.92  # ... on at least this fraction of the digit's area
BRIGHTNESS = (0.35, 0.75)  # factor for photographs; light ink is readable almost everywhere on dark ones
DARKEST_INK = 140  # of 255, per channel
JPEG_QUALITY = 90

SOURCE_GLYPH_PX = 8  # scikit-learn's digits are 8 x 8
FIELD_PADDING_PX = 2  # in source pixels, so that interpolation fades to zero before the border
FIELD_SCALE = 16  # pixels of the ink field per source pixel
INK_RAMP = (0.35, 0.85)  # ink densities that are fully transparent and fully opaque
MIN_CROP_PX = 160  # smaller crops would be enlarged by more than a factor of two
LUMINANCE_RGB = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601

# name: (package, path inside it). Files are read directly, because `skimage.data` would download a missing one.
TRAIN_PHOTOGRAPHS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "china": ("sklearn", "datasets/images/china.jpg"),
        "astronaut": ("skimage", "data/astronaut.png"),
        "coffee": ("skimage", "data/coffee.png"),
        "rocket": ("skimage", "data/rocket.jpg"),
        # The two views of a stereo pair are nearly equal, so they stay in one split.
        "motorcycle_left": ("skimage", "data/motorcycle_left.png"),
        "motorcycle_right": ("skimage", "data/motorcycle_right.png"),
        "hubble_deep_field": ("skimage", "data/hubble_deep_field.jpg"),
        "retina": ("skimage", "data/retina.jpg"),
        "immunohistochemistry": ("skimage", "data/ihc.png"),
        "camera": ("skimage", "data/camera.png"),
        "brick": ("skimage", "data/brick.png"),
        "gravel": ("skimage", "data/gravel.png"),
    }
)
VALIDATION_PHOTOGRAPHS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "flower": ("sklearn", "datasets/images/flower.jpg"),
        "chelsea": ("skimage", "data/chelsea.png"),
        "coins": ("skimage", "data/coins.png"),
        "grass": ("skimage", "data/grass.png"),
        "grace_hopper": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    }
)
PHOTOGRAPHS = MappingProxyType({"train": TRAIN_PHOTOGRAPHS, "val": VALIDATION_PHOTOGRAPHS})

DISTRIBUTIONS = {"sklearn": "scikit-learn", "skimage": "scikit-image", "matplotlib": "matplotlib"}
OWN_FILES = re.compile(r"annotations(/instances_(train|val)\.json)?|(train|val)(/digits_(train|val)_\d{4,}\.jpg)?")
STALE_SECONDS = 3600  # generation takes less; older temporary directories belong to killed processes

UInt8Array = NDArray[np.uint8]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Sources:
    """Material of the images: photographs by split and name, glyphs with labels, glyph indices by split."""

    photographs: Mapping[str, Mapping[str, UInt8Array]]  # RGB (H, W, 3)
    glyphs: FloatArray  # ink density 0..1, (1797, 8, 8)
    labels: NDArray[np.int64]  # 0..9, (1797,)
    glyph_split: Mapping[str, NDArray[np.int64]]


@dataclass(frozen=True)
class PaintedDigit:
    """One digit of a scene; the first row and column of its opacity `alpha` are at (top, left) of the image."""

    glyph: int
    label: int
    left: int
    top: int
    alpha: FloatArray
    ink_rgb: FloatArray

    @property
    def box_xywh(self) -> tuple[int, int, int, int]:
        """COCO box (left, top, width, height) in pixels, tight around all pixels of opacity `BOX_ALPHA` or more."""
        rows, columns = np.nonzero(self.alpha >= BOX_ALPHA)
        left, top = int(columns.min()), int(rows.min())
        width, height = int(columns.max()) + 1 - left, int(rows.max()) + 1 - top
        return self.left + left, self.top + top, width, height


@dataclass(frozen=True)
class Scene:
    """Specification of one image: background and digits."""

    photograph: str
    background: UInt8Array  # RGB (320, 320, 3)
    digits: tuple[PaintedDigit, ...]


def ensure_digits(root: Path, counts: Mapping[str, int] = IMAGE_COUNTS) -> bool:
    """Generate the dataset in `root` unless it exists, complete and of this `GENERATOR_VERSION`.

    The dataset is built beside `root` and renamed, so a killed process leaves no partial dataset. Several processes may
    start at once; the first to finish wins. An outdated or damaged dataset is replaced.

    Args:
        counts: images per split ("train" and "val").

    Returns:
        True if it was generated, False if it already existed.

    Raises:
        ValueError: `root` has files that this generator did not write, or an installed package lacks a photograph.
        OSError: the directory beside `root` cannot be written.
    """
    root = Path(root).resolve()
    if is_complete(root, counts):
        return False
    refuse_foreign(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{root.name}.building-"
    remove_left_overs(root.parent, prefix)
    staging = Path(tempfile.mkdtemp(prefix=prefix, dir=root.parent))
    try:
        write_dataset(staging / "new", counts)
        if is_complete(root, counts):
            return False  # another process finished first
        if root.exists():
            root.rename(staging / "old")
        (staging / "new").rename(root)
    except OSError:
        # Another process may rename at the same time; its dataset is identical.
        if not is_complete(root, counts):
            raise
        return False
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return True


def remove_left_overs(folder: Path, prefix: str) -> None:
    """Delete temporary directories of killed processes, but none that may be in use."""
    for path in folder.iterdir():
        if path.name.startswith(prefix):
            with contextlib.suppress(FileNotFoundError):  # another process may delete it, too
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)


def is_complete(root: Path, counts: Mapping[str, int] = IMAGE_COUNTS) -> bool:
    """Return whether `root` has all files of this generator version, none of them empty."""
    for split, count in counts.items():
        annotations = read_annotations(root, split)
        if not is_own(annotations) or annotations["info"].get("generator_version") != GENERATOR_VERSION:
            return False
        expected = {image["file_name"] for image in annotations["images"]}
        found = {file.name for file in (root / split).glob("*.jpg") if file.stat().st_size}
        if len(expected) != count or not expected <= found:
            return False
    return True


def read_annotations(root: Path, split: str) -> dict[str, Any]:
    """Read the COCO dictionary of one split; empty if the file is missing or damaged."""
    try:
        content = json.loads((root / "annotations" / f"instances_{split}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def is_own(annotations: dict[str, Any]) -> bool:
    info = annotations.get("info")
    return isinstance(info, dict) and info.get("generator") == GENERATOR


def refuse_foreign(root: Path) -> None:
    """Raise ValueError unless everything in `root` was written by this generator and may be deleted."""
    advice = "move it away or choose another data.root"
    if not root.exists():
        return
    if not root.is_dir():
        raise ValueError(f"{root} is not a directory: {advice}")
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))
    for name in names:
        if not OWN_FILES.fullmatch(name):
            raise ValueError(f"{root} holds {name}, which the digits generator did not write: {advice}")
    # The names of annotation files are COCO's, so only their content identifies the generator.
    for split in PHOTOGRAPHS:
        # A damaged file counts as our own if images with our names are beside it.
        annotations = read_annotations(root, split)
        own = is_own(annotations) if annotations else any(name.endswith(".jpg") for name in names)
        if f"annotations/instances_{split}.json" in names and not own:
            raise ValueError(f"{root} holds annotations that the digits generator did not write: {advice}")


def write_dataset(root: Path, counts: Mapping[str, int]) -> None:
    """Write images and annotations of all splits into the new directory `root`."""
    sources = load_sources()
    (root / "annotations").mkdir(parents=True)
    for split, count in counts.items():
        (root / split).mkdir()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(count):
            scene = compose_scene(sources, split, index)
            file_name = f"digits_{split}_{index:04d}.jpg"
            write_jpeg(root / split / file_name, paint_scene(scene))
            images.append(
                {
                    "id": index + 1,
                    "file_name": file_name,
                    "width": IMAGE_SIZE_PX,
                    "height": IMAGE_SIZE_PX,
                    "photograph": scene.photograph,
                }
            )
            for digit in scene.digits:
                box = digit.box_xywh
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index + 1,
                        "category_id": digit.label + 1,  # COCO ids start at 1: the digit 0 has id 1
                        "bbox": list(box),
                        "area": box[2] * box[3],
                        "iscrowd": 0,
                        "segmentation": [],
                        "glyph": digit.glyph,
                    }
                )
        content = {
            "info": describe_dataset(split),
            "licenses": [],
            "categories": [{"id": digit + 1, "name": str(digit), "supercategory": "digit"} for digit in range(10)],
            "images": images,
            "annotations": annotations,
        }
        path = root / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")


def describe_dataset(split: str) -> dict[str, Any]:
    """Build the `info` block, without a date so that the file is reproducible."""
    import sklearn

    return {
        "description": f"Handwritten digits on photographs, {split} split, generated from installed packages",
        "generator": GENERATOR,
        "generator_version": GENERATOR_VERSION,
        "seed": SEED,
        "packages": {"numpy": np.__version__, "opencv": cv2.__version__, "scikit-learn": sklearn.__version__},
        "sources": {
            "digits": "scikit-learn load_digits: UCI Optical Recognition of Handwritten Digits, E. Alpaydin, C. Kaynak",
            "photographs": {
                name: f"{DISTRIBUTIONS[package]}: {path}" for name, (package, path) in PHOTOGRAPHS[split].items()
            },
            "licences": "docs/data_sources.md",
        },
    }


def load_sources() -> Sources:
    """Read all photographs and glyphs from the installed packages.

    Raises:
        ValueError: if a package or one of its photographs is missing.
    """
    photographs = {
        split: {name: load_photograph(package, path) for name, (package, path) in photographs_of_split.items()}
        for split, photographs_of_split in PHOTOGRAPHS.items()
    }
    from sklearn.datasets import load_digits  # slow to import, and needed only when the dataset is generated

    digits = load_digits()
    labels = digits.target.astype(np.int64)
    return Sources(photographs, (digits.images / 16).astype(np.float32), labels, split_glyphs(labels))


def load_photograph(package: str, path: str) -> UInt8Array:
    """Read a photograph from an installed package as RGB (H, W, 3); a grey one has three equal channels."""
    specification = find_spec(package)  # finds the directory without importing the package
    folders = specification.submodule_search_locations if specification else None
    image = cv2.imread(str(Path(folders[0]) / path), cv2.IMREAD_COLOR) if folders else None
    if image is None:
        name = DISTRIBUTIONS[package]
        raise ValueError(f"the digits dataset needs {path} of {name}: install {name} as requirements.txt names it")
    return np.asarray(image[:, :, ::-1], np.uint8)


def split_glyphs(labels: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Divide the glyph indices between the splits, class by class, so that both have the same class distribution."""
    generator = np.random.default_rng(SEED)
    train, validation = [], []
    for label in range(10):
        shuffled = generator.permutation(np.flatnonzero(labels == label))
        train_count = round(len(shuffled) * TRAIN_GLYPH_FRACTION)
        train.append(shuffled[:train_count])
        validation.append(shuffled[train_count:])
    return {"train": np.sort(np.concatenate(train)), "val": np.sort(np.concatenate(validation))}


def compose_scene(sources: Sources, split: str, index: int) -> Scene:
    """Choose background, digits, positions and colours of one image, a pure function of split and index."""
    generator = np.random.default_rng([SEED, list(PHOTOGRAPHS).index(split), index])
    photographs = sources.photographs[split]
    photograph = list(photographs)[index % len(photographs)]  # in turn, so that each is used equally often
    fewest, most = DIGITS_PER_IMAGE
    while True:
        background = crop_photograph(photographs[photograph], generator)
        digits = place_digits(sources, split, background, int(generator.integers(fewest, most + 1)), generator)
        # Some crops, such as a flower's petals, have too few places with enough contrast.
        if len(digits) >= fewest:
            return Scene(photograph, background, digits)


def crop_photograph(photograph: UInt8Array, generator: np.random.Generator) -> UInt8Array:
    """Crop a random square, flip it at random and change its brightness, RGB (320, 320, 3)."""
    height, width = photograph.shape[:2]
    longest = min(height, width)
    side = int(generator.integers(max(MIN_CROP_PX, longest * 2 // 5), longest + 1))
    top = int(generator.integers(height - side + 1))
    left = int(generator.integers(width - side + 1))
    crop = photograph[top : top + side, left : left + side]
    if generator.random() < 0.5:
        crop = crop[:, ::-1]
    interpolation = cv2.INTER_AREA if side > IMAGE_SIZE_PX else cv2.INTER_CUBIC
    resized = cv2.resize(np.ascontiguousarray(crop), (IMAGE_SIZE_PX, IMAGE_SIZE_PX), interpolation=interpolation)
    brightness = generator.uniform(*BRIGHTNESS)
    return np.rint(np.clip(resized * brightness, 0, 255)).astype(np.uint8)


def place_digits(
    sources: Sources, split: str, background: UInt8Array, wanted: int, generator: np.random.Generator
) -> tuple[PaintedDigit, ...]:
    """Place up to `wanted` digits that contrast with the background and touch neither each other nor the border."""
    luminance = background.astype(np.float32) @ LUMINANCE_RGB  # (320, 320)
    free = np.ones(luminance.shape, bool)
    shortest, tallest = DIGIT_HEIGHT_PX
    digits: list[PaintedDigit] = []
    for _ in range(wanted * 2):
        if len(digits) == wanted:
            break
        label = int(generator.integers(10))
        candidates = sources.glyph_split[split]
        glyph = int(generator.choice(candidates[sources.labels[candidates] == label]))
        alpha = render_glyph(
            sources.glyphs[glyph],
            height=generator.uniform(shortest + 1, tallest - 1),  # whole pixels may differ by one
            degrees=generator.uniform(-MAX_ROTATION_DEGREES, MAX_ROTATION_DEGREES),
        )
        for _ in range(12):
            top = int(generator.integers(IMAGE_SIZE_PX - alpha.shape[0] + 1))
            left = int(generator.integers(IMAGE_SIZE_PX - alpha.shape[1] + 1))
            covered = slice(top, top + alpha.shape[0]), slice(left, left + alpha.shape[1])
            ink_rgb = choose_ink(luminance[covered], generator) if free[covered].all() else None
            if ink_rgb is not None:
                free[covered] = False
                digits.append(PaintedDigit(glyph, label, left, top, alpha, ink_rgb))
                break
    return tuple(digits)


def render_glyph(glyph: FloatArray, height: float, degrees: float) -> FloatArray:
    """Enlarge and rotate a glyph.

    Args:
        glyph: ink density 0..1, (8, 8).
        height: target height of the tight box in pixels.
        degrees: counter-clockwise rotation.

    Returns:
        Opacity 0..1, cropped to its non-zero part, which exceeds the tight box by a few pixels of soft edge.
    """
    density = np.pad(glyph, FIELD_PADDING_PX)
    # The 8 x 8 source is a box average; sharpening reopens the holes of 6, 8 and 9.
    density = 2 * density - np.asarray(cv2.GaussianBlur(density, (0, 0), 1.0), np.float32)
    field = cv2.resize(density, None, fx=FIELD_SCALE, fy=FIELD_SCALE, interpolation=cv2.INTER_LANCZOS4)

    centre = (field.shape[0] - 1) / 2
    rows, columns = np.nonzero(field >= sum(INK_RAMP) / 2)
    angle = math.radians(degrees)
    turned_rows = (rows - centre) * math.cos(angle) - (columns - centre) * math.sin(angle)
    scale = (height - 1) / float(np.ptp(turned_rows))

    size = math.ceil(field.shape[0] * scale * math.sqrt(2))
    matrix = cv2.getRotationMatrix2D((centre, centre), degrees, scale)
    matrix[:, 2] += (size - 1) / 2 - centre
    turned = cv2.warpAffine(field, matrix, (size, size), flags=cv2.INTER_LINEAR)
    alpha = np.clip((turned - INK_RAMP[0]) / (INK_RAMP[1] - INK_RAMP[0]), 0, 1).astype(np.float32)
    rows, columns = np.nonzero(alpha)
    return alpha[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def choose_ink(luminance: FloatArray, generator: np.random.Generator) -> FloatArray | None:
    """Draw a light colour that contrasts with a background of this luminance; None after 24 failed attempts.

    Always lighter than the background: with both polarities a detector needs far longer than a few minutes on a CPU to
    begin to separate the classes.
    """
    for _ in range(24):
        ink_rgb = generator.uniform(DARKEST_INK, 255, size=3).astype(np.float32)
        contrast = ink_rgb @ LUMINANCE_RGB - luminance
        if (contrast >= MIN_CONTRAST).mean() >= MIN_CONTRAST_FRACTION:
            return ink_rgb
    return None


def paint_scene(scene: Scene) -> UInt8Array:
    """Render a scene, RGB (320, 320, 3)."""
    image = scene.background.astype(np.float32)
    for digit in scene.digits:
        height, width = digit.alpha.shape
        patch = image[digit.top : digit.top + height, digit.left : digit.left + width]
        patch += digit.alpha[:, :, None] * (digit.ink_rgb - patch)
    return np.rint(image).astype(np.uint8)


def write_jpeg(path: Path, image_rgb: UInt8Array) -> None:
    # Encode in memory: cv2.imwrite cannot open every path on every system and does not raise.
    encoded, data = cv2.imencode(".jpg", image_rgb[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    assert encoded
    path.write_bytes(data.tobytes())
