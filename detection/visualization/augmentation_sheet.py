"""One augmentation alone, at several strengths: what each of its settings does, and what training draws from it."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torchvision.transforms import v2

from detection.config.augmentation import AugmentationSettings
from detection.contract import Geometry
from detection.data.augmentation.color import distort_hsv
from detection.data.augmentation.crop_and_scale import build_iou_crop
from detection.data.transforms import Sample, Transform

STRENGTHS = (0.5, 1.0, 2.0)  # 1: the limit of the settings
NEUTRAL = "off"
CROP_ATTEMPTS = 20  # times 40 of torchvision

Kind = Literal["factor", "shift", "bits", "limit", "choices", "amount"]


class Varied(NamedTuple):
    """How a setting of an augmentation is varied: a value at which it does nothing, and values that are possible."""

    name: str
    kind: Kind  # factor: 1 is off, powers of the limit; shift: 0 is off, multiples; the others: see `values_of`
    smallest: float = -np.inf
    largest: float = np.inf


# What has no entry here has no strength: a flip is on or off.
VARIED: dict[str, tuple[Varied, ...]] = {
    "multiplicative_noise": (Varied("multiplier", "factor"),),
    "clahe": (Varied("clip_limit", "factor", smallest=1),),
    "posterize": (Varied("num_bits", "bits"),),
    "random_brightness_contrast": (
        Varied("brightness_limit", "limit", -1, 1),
        Varied("contrast_limit", "limit", -1, 1),
    ),
    "rgb_shift": tuple(Varied(f"{channel}_shift_limit", "limit", -255, 255) for channel in "rgb"),
    "color_jitter": (
        Varied("brightness", "factor"),
        Varied("contrast", "factor"),
        Varied("saturation", "factor"),
        Varied("hue", "shift", -0.5, 0.5),
    ),
    "gauss_noise": (Varied("std_range", "shift", 0, 1),),
    "random_fog": (Varied("fog_coef_range", "shift", 0, 1),),
    "affine": (
        Varied("scale", "factor"),
        Varied("translate_percent", "shift"),
        Varied("rotate", "shift"),
        Varied("shear", "shift"),
    ),
    "expand": (Varied("ratio", "factor", smallest=1),),
    "iou_crop": (Varied("min_ious", "choices"), Varied("min_crop_size", "amount", 0.05, 1)),
    "darknet_jitter": (Varied("jitter", "amount", 0, 0.99),),
    "darknet_hsv": (Varied("hue", "limit", -0.5, 0.5), Varied("saturation", "factor"), Varied("exposure", "factor")),
    "photometric_distortion": (
        Varied("brightness", "factor"),
        Varied("contrast", "factor"),
        Varied("saturation", "factor"),
        Varied("hue", "shift", -0.5, 0.5),
    ),
}


@dataclass(frozen=True)
class Tile:
    """One image after the augmentation."""

    setting: str  # that was varied; "draw": a random draw as in training
    value: str  # as a person reads it
    sample: Sample


def augmentation_names() -> list[str]:
    return [name for name in AugmentationSettings.model_fields if name != "min_visibility"]


def only(augmentation: AugmentationSettings, name: str, **settings: Any) -> AugmentationSettings:
    """The settings with one augmentation on every image, changed if asked, and all others off; not validated again."""
    sections: dict[str, Any] = {
        other: getattr(augmentation, other).model_copy(update={"p": 0.0}) for other in augmentation_names()
    }
    if name:
        sections[name] = sections[name].model_copy(update={"p": 1.0, **settings})
    return augmentation.model_copy(update=sections)


def strength_rows(
    augmentation: AugmentationSettings,
    geometry: Geometry,
    name: str,
    size: int,
    seed: int,
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    index: int,
    draws: int,
) -> Iterator[list[Tile]]:
    """Rows of tiles: one per setting of the augmentation, the others of it off; at last draws with all of them.

    Args:
        augmentation, geometry, size, seed: of the training, see `Transform`.
        name: of the augmentation.
        image, boxes, labels, index: as `Transform` takes them.
        draws: of epochs 0, 1, ... in the last row.
    """

    def through(transform: Transform, epoch: int = 0) -> Sample:
        return transform(image, boxes, labels, index, epoch, size)

    plain = through(Transform(geometry, size))
    section = getattr(augmentation, name)
    for varied in VARIED.get(name, ()):
        tiles = []
        for value, label in values_of(varied, getattr(section, varied.name)):
            sample = (
                plain
                if label == NEUTRAL
                else _apply(augmentation, geometry, name, varied, value, size, seed, plain, through)
            )
            if name == "iou_crop" and sample is not plain and np.array_equal(sample.image, plain.image):
                label += ": no such crop"
            tiles.append(Tile(varied.name, label, sample))
        if len(tiles) > 1:
            yield tiles
    if name == "photometric_distortion":
        orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
        yield [
            Tile("channels", "".join("RGB"[channel] for channel in order), _recolored(plain, plain.image[..., order]))
            for order in orders
        ]
    transform = _training(only(augmentation, name), geometry, size, seed)
    if VARIED.get(name):
        yield [Tile("draw", f"epoch {epoch}", through(transform, epoch)) for epoch in range(draws)]
    else:
        yield [Tile("draw", NEUTRAL, plain), Tile("draw", "on", through(transform))]


def values_of(varied: Varied, setting: Any) -> list[tuple[Any, str]]:
    """Values of a setting in rising order with their names; the limits of the settings and what lies within, beyond."""
    if varied.kind == "bits":
        lowest, highest = setting
        return [(None, NEUTRAL)] + [
            (bits, f"{bits} bits{' = limit' if bits in (lowest, highest) else ''}")
            for bits in range(min(7, highest + 1), max(1, lowest - 2) - 1, -1)
        ]
    if varied.kind == "choices":
        return [(None, NEUTRAL)] + [(choice, f"{choice:g}") for choice in sorted({0.0, *setting})]
    if varied.kind == "amount":
        # a smaller part of the image is the stronger crop
        power = -1 if varied.name == "min_crop_size" else 1
        scaled = [(setting * strength**power, strength) for strength in STRENGTHS]
        return [(None, NEUTRAL), *_named(varied, scaled)]
    low, high = setting if isinstance(setting, tuple) else (-setting, setting)
    if varied.kind == "factor" and not isinstance(setting, tuple):  # up to a factor, or its inverse
        low, high = 1 / setting, setting
    neutral = 1.0 if varied.kind == "factor" else 0.0
    below: list[tuple[float, float]] = []
    above: list[tuple[float, float]] = []
    for limit, side in ((low, below), (high, above)):
        if limit != neutral:
            for strength in STRENGTHS:
                value = limit**strength if varied.kind == "factor" else limit * strength
                side.append((value, strength))
    if low != neutral and high != neutral and (low < neutral) == (high < neutral):  # a range on one side of neutral
        return [(None, NEUTRAL), *_named(varied, sorted(below + above))]
    return [*_named(varied, below)[::-1], (None, NEUTRAL), *_named(varied, above)]


def _named(varied: Varied, scaled: Sequence[tuple[float, float]]) -> list[tuple[Any, str]]:
    """Values that are possible and differ; which is the limit of the settings."""
    named: dict[float, str] = {}
    for value, strength in scaled:
        if varied.smallest <= value <= varied.largest:
            named.setdefault(value, f"{value:.4g}{' = limit' if strength == 1 else ''}")
    return list(named.items())


def _apply(
    augmentation: AugmentationSettings,
    geometry: Geometry,
    name: str,
    varied: Varied,
    value: Any,
    size: int,
    seed: int,
    plain: Sample,
    through: Callable[[Transform], Sample],
) -> Sample:
    """The image with one setting of the augmentation at exactly this value, and all others off."""
    if name == "darknet_hsv":
        arguments = {"hue": 0.0, "saturation": 1.0, "exposure": 1.0, varied.name: value}
        return _recolored(plain, distort_hsv(plain.image, **arguments))
    if name == "photometric_distortion":
        adjust = getattr(v2.functional, f"adjust_{varied.name}")  # what torchvision's RandomPhotometricDistort calls
        planes = adjust(torch.from_numpy(plain.image).permute(2, 0, 1), value)
        return _recolored(plain, planes.permute(1, 2, 0).numpy())
    neutral = {
        other.name: (1.0, 1.0) if other.kind == "factor" else (0.0, 0.0)
        for other in VARIED[name]
        if other.kind in ("factor", "shift", "limit")
    }
    exact = value if varied.kind in ("amount", "choices") else (value, value)
    if name == "iou_crop":
        return _crop(augmentation, geometry, varied, value, size, seed, through)
    changed = only(augmentation, name, **{**neutral, varied.name: exact})
    return through(_training(changed, geometry, size, seed))


def _crop(
    augmentation: AugmentationSettings,
    geometry: Geometry,
    varied: Varied,
    value: float,
    size: int,
    seed: int,
    through: Callable[[Transform], Sample],
) -> Sample:
    settings = augmentation.iou_crop
    if varied.name == "min_crop_size":
        settings = settings.model_copy(update={"min_crop_size": value})
    transform = _training(only(augmentation, "iou_crop"), geometry, size, seed)
    assert transform.placement is not None, "iou_crop is on"
    crop = build_iou_crop(settings)
    # Without the choice to keep the image; but no crop overlaps a small object much, and torchvision never gives up.
    wanted = [value] if varied.name == "min_ious" else [option for option in crop.options if option < 1]
    crop.options = [*wanted * CROP_ATTEMPTS, 1.0]
    transform.placement.iou_crop = crop
    return through(transform)


def _training(augmentation: AugmentationSettings, geometry: Geometry, size: int, seed: int) -> Transform:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Pydantic serializer")  # a pair stands where a number was
        return Transform(geometry, size, seed, augmentation)


def _recolored(sample: Sample, image: np.ndarray) -> Sample:
    return Sample(np.ascontiguousarray(image), sample.boxes, sample.labels, sample.index, sample.letterbox)
