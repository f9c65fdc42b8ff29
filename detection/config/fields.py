"""Types of single settings with their validation."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat


def whole_number(value: Any) -> Any:
    """Convert integral floats to int, so that 1e3 can be written for 1000 steps."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_device(value: Any) -> Any:
    """Check the name of a device; whether this machine has it is checked by `choose_device`."""
    if not re.fullmatch(r"auto|cpu|mps|hpu|cuda(:\d+)?", str(value)):  # 0 is ultralytics' cuda:0
        raise ValueError("must be auto, cpu, cuda, cuda:N, mps or hpu")
    return value


def check_duration(value: int | str) -> int | str:
    """Check a duration: optimizer steps (5000) or epochs ("12ep"); see `schedules.resolve_steps`."""
    if value >= 0 if isinstance(value, int) else re.fullmatch(r"\d+(\.\d+)?ep", value):
        return value
    raise ValueError('must be a number of steps (5000) or of epochs ("12ep")')


def check_range(value: tuple[float, float]) -> tuple[float, float]:
    """Check that a range is [smallest, largest]."""
    if value[0] > value[1]:
        raise ValueError("must be [smallest, largest]")
    return value


def amount_of(duration: int | str) -> float:
    """Return the number of a duration, in its own unit: of steps or of epochs."""
    return float(str(duration).removesuffix("ep"))


def is_zero(duration: int | str) -> bool:
    """Whether a duration is 0, in steps or epochs."""
    return amount_of(duration) == 0


Duration = Annotated[int | str, BeforeValidator(whole_number), AfterValidator(check_duration)]

Probability = Annotated[float, Field(ge=0, le=1)]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

Range = Annotated[tuple[FiniteFloat, FiniteFloat], AfterValidator(check_range)]

NotNegativeRange = Annotated[tuple[NotNegative, NotNegative], AfterValidator(check_range)]

HueRange = Annotated[
    tuple[Annotated[float, Field(ge=-0.5)], Annotated[float, Field(le=0.5)]], AfterValidator(check_range)
]


Factor = Annotated[float, Field(ge=1, allow_inf_nan=False)]

Count = Annotated[int, Field(ge=1)]

GreyLevel = Annotated[int, Field(ge=0, le=255)]


class Section(BaseModel):
    """Base of the sections: frozen, without conversion of types, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DetectorSection(Section):
    """Base of a detector's own section, named as the detector: the general settings ask it, and name no detector."""

    def check_backbone(self, backbone: str) -> None:
        """Check the section against `model.backbone`; raises ValueError with the path of the setting."""

    def without_effect(self) -> dict[str, str]:
        """Map paths of settings, of any section, that its detector does not read now to the setting that decides."""
        return {}

    def bound_to_length(self) -> list[str]:
        """Name its settings whose effect in every step depends on the number of steps of the whole run."""
        return []
