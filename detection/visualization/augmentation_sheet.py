"""Examples of one augmentation: each of its settings at several strengths, then random draws as in training."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import ValidationError
from torchvision.transforms import v2

from detection.config.augmentation import HSV, AugmentationSettings
from detection.config.fields import Section
from detection.contract import Geometry
from detection.data.augmentation.color import distort_hsv, shift_hsv
from detection.data.augmentation.crop_and_scale import build_iou_crop
from detection.data.augmentation.mixing import Partners
from detection.data.transforms import Sample, Transform

STRENGTHS = (0.5, 1.0, 2.0)  # relative to the limits in the settings
NEUTRAL = "off"
CROP_ATTEMPTS = 20  # times the 40 of torchvision
CHANNEL_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))

NOT_VARIED = frozenset(
    {"p", "per_channel", "elementwise", "tile_grid_size", "alpha_coef", "rotate_method", "centre", "beta"}
)
DRAWN_ONLY = frozenset({"mosaic", "random_interpolation"})  # nothing to vary, but more than on and off
# A factor changes nothing at 1, other settings at 0. Twice the strength of a factor is its square.
FACTORS = frozenset({"multiplier", "clip_limit", "brightness", "contrast", "saturation", "exposure", "scale", "ratio"})
AMOUNTS = {"jitter": 1, "min_crop_size": -1}  # exponent of the strength; a smaller crop is a stronger augmentation


class Tile(NamedTuple):
    """Image after the augmentation."""

    setting: str  # name of the varied setting; "draw": a random draw as in training
    value: str  # label of its value
    sample: Sample


def augmentation_names() -> list[str]:
    """List the sections of `data.augmentation`."""
    return [name for name in AugmentationSettings.model_fields if name != "min_visibility"]


def varied_settings(section: Section) -> list[str]:
    """List the settings of an augmentation that have a strength; a flip has none."""
    return [name for name in type(section).model_fields if name not in NOT_VARIED]


def only(augmentation: AugmentationSettings, name: str, **settings: Any) -> AugmentationSettings:
    """Return settings with one augmentation applied to every image and all others off.

    Args:
        name: name of the augmentation; "" turns off all.
        settings: changes of its section, not validated.
    """
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
    partners: Callable[[int], Partners] | None = None,
) -> Iterator[list[Tile]]:
    """Yield rows of tiles: one per setting with the others neutral, then random draws with all of them.

    Args:
        augmentation, geometry, size, seed: as in training, see `Transform`.
        name: name of the augmentation.
        image, boxes, labels, index: as in `Transform.__call__`.
        draws: number of draws in the last row, of epochs 0, 1, ...
        partners: gives mosaic and mixup their other images, for an epoch.
    """

    def apply(transform: Transform, epoch: int = 0) -> Sample:
        others = partners(epoch) if partners is not None and transform.mixing is not None else None
        return transform(image, boxes, labels, index, epoch, size, others)

    plain = apply(Transform(geometry, size))
    section = getattr(augmentation, name)
    for setting in varied_settings(section):
        tiles = []
        for value, label in values_of(section, setting):
            if label == NEUTRAL:
                sample = plain
            elif name in ("darknet_hsv", "photometric_distortion", "hsv"):
                sample = recolored(plain, recolor(plain.image, name, setting, value))
            else:
                sample = apply(transform_at(augmentation, geometry, name, setting, value, size, seed))
                if name == "iou_crop" and np.array_equal(sample.image, plain.image):
                    label += ": no such crop"
            tiles.append(Tile(setting, label, sample))
        if len(tiles) > 1:
            yield tiles
    if name == "photometric_distortion":
        yield [
            Tile("channels", "".join("RGB"[channel] for channel in order), recolored(plain, plain.image[..., order]))
            for order in CHANNEL_ORDERS
        ]
    transform = _training(only(augmentation, name), geometry, size, seed)
    if varied_settings(section) or name in DRAWN_ONLY:
        off = [Tile("draw", NEUTRAL, plain)] if name in DRAWN_ONLY else []
        yield off + [Tile("draw", f"epoch {epoch}", apply(transform, epoch)) for epoch in range(draws)]
    else:
        yield [Tile("draw", NEUTRAL, plain), Tile("draw", "on", apply(transform))]


def is_factor(section: Section, name: str) -> bool:
    """Whether a setting multiplies; that of `hsv` adds grey levels."""
    return name in FACTORS and not isinstance(section, HSV)


def values_of(section: Section, name: str) -> list[tuple[Any, str]]:
    """List values of a setting with their labels: the neutral one, and those within, at and beyond its limits.

    Values that the settings refuse are left out.
    """
    off, setting = (None, NEUTRAL), getattr(section, name)
    if name == "num_bits":
        lowest, highest = setting
        bits_of = range(min(7, highest + 1), max(1, lowest - 2) - 1, -1)
        return [off, *((bits, f"{bits} bits{' = limit' if bits in setting else ''}") for bits in bits_of)]
    if name == "min_ious":
        return [off, *((choice, f"{choice:g}") for choice in sorted({0.0, *setting}))]
    if name in AMOUNTS:
        return [
            off,
            *_labelled(section, name, [(setting * strength ** AMOUNTS[name], strength) for strength in STRENGTHS]),
        ]
    factor = is_factor(section, name)
    neutral = 1.0 if factor else 0.0
    if isinstance(setting, tuple):
        low, high = setting
    else:
        low, high = (1 / setting, setting) if factor else (-setting, setting)
    below, above = (
        [(limit**strength if factor else limit * strength, strength) for strength in STRENGTHS if limit != neutral]
        for limit in (low, high)
    )
    if (low - neutral) * (high - neutral) > 0:  # the whole range is on one side of neutral
        return [off, *_labelled(section, name, sorted(below + above))]
    return [*_labelled(section, name, below)[::-1], off, *_labelled(section, name, above)]


def _labelled(section: Section, name: str, scaled: list[tuple[float, float]]) -> list[tuple[Any, str]]:
    """Label distinct values, given with their strengths, and drop those that the settings refuse."""
    labels: dict[float, str] = {}
    for value, strength in scaled:
        if _is_valid(section, name, value):
            labels.setdefault(value, f"{value:.4g}{' = limit' if strength == 1 else ''}")
    return list(labels.items())


def _is_valid(section: Section, name: str, value: float) -> bool:
    current = getattr(section, name)
    if isinstance(current, tuple):
        setting: Any = (value, value)
    else:  # a single number stands for both directions, and is validated strictly as an int or a float
        setting = type(current)(max(value, 1 / value) if is_factor(section, name) else abs(value))
    try:
        type(section).model_validate(section.model_dump() | {name: setting})
    except ValidationError:
        return False
    return True


def transform_at(
    augmentation: AugmentationSettings, geometry: Geometry, name: str, setting: str, value: Any, size: int, seed: int
) -> Transform:
    """Build the training transform with one setting at exactly this value and the others neutral."""
    if name == "iou_crop":
        return _crop_at(augmentation, geometry, setting, value, size, seed)
    section = getattr(augmentation, name)
    neutral = {other: (float(other in FACTORS),) * 2 for other in varied_settings(section) if other not in AMOUNTS}
    exact = value if setting in AMOUNTS else (value, value)
    return _training(only(augmentation, name, **{**neutral, setting: exact}), geometry, size, seed)


def _crop_at(
    augmentation: AugmentationSettings, geometry: Geometry, setting: str, value: float, size: int, seed: int
) -> Transform:
    section = augmentation.iou_crop
    if setting == "min_crop_size":
        section = section.model_copy(update={"min_crop_size": value})
    transform = _training(only(augmentation, "iou_crop"), geometry, size, seed)
    assert transform.placement is not None, "iou_crop is on"
    crop = build_iou_crop(section)
    # Without the option to keep the image, torchvision would never stop where no crop overlaps a small object enough.
    options = [value] if setting == "min_ious" else [option for option in crop.options if option < 1]
    crop.options = [*options * CROP_ATTEMPTS, 1.0]
    transform.placement.iou_crop = crop
    return transform


def recolor(image: np.ndarray, name: str, setting: str, value: float) -> np.ndarray:
    """Apply one setting of a colour distortion at exactly this value to (H, W, 3) uint8."""
    if name == "darknet_hsv":
        return distort_hsv(image, **{"hue": 0.0, "saturation": 1.0, "exposure": 1.0, setting: value})
    if name == "hsv":
        return shift_hsv(image, **{"hue": 0, "saturation": 0, "value": 0, setting: int(value)})
    adjust = getattr(v2.functional, f"adjust_{setting}")  # what torchvision's RandomPhotometricDistort calls
    return adjust(torch.from_numpy(image).permute(2, 0, 1), value).permute(1, 2, 0).numpy()


def recolored(sample: Sample, image: np.ndarray) -> Sample:
    return dataclasses.replace(sample, image=np.ascontiguousarray(image))


def _training(augmentation: AugmentationSettings, geometry: Geometry, size: int, seed: int) -> Transform:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Pydantic serializer")  # pairs replace single numbers in `only`
        return Transform(geometry, size, seed, augmentation)
