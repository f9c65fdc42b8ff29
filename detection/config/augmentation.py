"""Settings of the training augmentation, one section per transform."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, FiniteFloat, model_validator

from detection.config.fields import (
    Count,
    Factor,
    GreyLevel,
    HueRange,
    NotNegativeRange,
    Positive,
    Probability,
    Range,
    Section,
    check_range,
)


class MultiplicativeNoise(Section):
    p: Probability
    multiplier: NotNegativeRange
    per_channel: bool
    elementwise: bool


class CLAHE(Section):
    p: Probability
    clip_limit: Annotated[
        tuple[Annotated[FiniteFloat, Field(ge=1)], Annotated[FiniteFloat, Field(ge=1)]], AfterValidator(check_range)
    ]
    tile_grid_size: tuple[Count, Count]


class Posterize(Section):
    p: Probability
    num_bits: Annotated[
        tuple[Annotated[int, Field(ge=1, le=7)], Annotated[int, Field(ge=1, le=7)]], AfterValidator(check_range)
    ]


class ToGray(Section):
    p: Probability


class RandomBrightnessContrast(Section):
    p: Probability
    brightness_limit: Probability
    contrast_limit: Probability


class RGBShift(Section):
    p: Probability
    r_shift_limit: GreyLevel
    g_shift_limit: GreyLevel
    b_shift_limit: GreyLevel


class ColorJitter(Section):
    p: Probability
    brightness: NotNegativeRange
    contrast: NotNegativeRange
    saturation: NotNegativeRange
    hue: HueRange


class GaussNoise(Section):
    p: Probability
    std_range: Annotated[tuple[Probability, Probability], AfterValidator(check_range)]


class RandomFog(Section):
    p: Probability
    fog_coef_range: Annotated[tuple[Probability, Probability], AfterValidator(check_range)]
    alpha_coef: Probability


class Flip(Section):
    p: Probability


class Affine(Section):
    p: Probability
    scale: Annotated[tuple[Positive, Positive], AfterValidator(check_range)]
    translate_percent: Range
    rotate: Range
    shear: Range
    rotate_method: Literal["largest_box", "ellipse"]


class ScaleJitter(Section):
    p: Probability
    scale: Annotated[tuple[Positive, Positive], AfterValidator(check_range)]


class DarknetJitter(Section):
    p: Probability
    jitter: Annotated[float, Field(ge=0, lt=1)]


class DarknetHSV(Section):
    p: Probability
    hue: Annotated[float, Field(ge=0, le=0.5)]
    saturation: Factor
    exposure: Factor


class Expand(Section):
    p: Probability
    ratio: Annotated[tuple[Factor, Factor], AfterValidator(check_range)]


class IoUCrop(Section):
    p: Probability
    min_ious: tuple[Probability, ...]
    min_crop_size: Annotated[float, Field(gt=0, le=1)]


class PhotometricDistortion(Section):
    p: Probability
    brightness: NotNegativeRange
    contrast: NotNegativeRange
    saturation: NotNegativeRange
    hue: HueRange


class Mosaic(Section):
    p: Probability
    centre: Annotated[
        tuple[Annotated[float, Field(ge=0, le=2)], Annotated[float, Field(ge=0, le=2)]], AfterValidator(check_range)
    ]


class Mixup(Section):
    p: Probability
    beta: Positive | None
    scale: Annotated[tuple[Positive, Positive], AfterValidator(check_range)]


class HSV(Section):
    p: Probability
    hue: Annotated[int, Field(ge=0, le=90)]
    saturation: GreyLevel
    value: GreyLevel


class RandomInterpolation(Section):
    p: Probability


class AugmentationSettings(Section):
    """Training augmentation, in the order in which docs/augmentation.md lists it."""

    multiplicative_noise: MultiplicativeNoise
    clahe: CLAHE
    posterize: Posterize
    to_gray: ToGray
    random_brightness_contrast: RandomBrightnessContrast
    rgb_shift: RGBShift
    color_jitter: ColorJitter
    gauss_noise: GaussNoise
    random_fog: RandomFog
    horizontal_flip: Flip
    vertical_flip: Flip
    affine: Affine
    expand: Expand
    iou_crop: IoUCrop
    scale_jitter: ScaleJitter
    darknet_jitter: DarknetJitter
    darknet_hsv: DarknetHSV
    photometric_distortion: PhotometricDistortion
    mosaic: Mosaic
    mixup: Mixup
    hsv: HSV
    random_interpolation: RandomInterpolation
    min_visibility: Probability

    @model_validator(mode="after")
    def check_crops(self) -> "AugmentationSettings":
        if self.expand.p and self.scale_jitter.p:
            raise ValueError("scale_jitter.p: must be 0 with expand, whose empty canvas it could crop to")
        return self
