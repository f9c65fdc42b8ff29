"""The space of a search: settings by dotted name with the values that each may take, as YAML."""

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from detection.config.command_line import DEFAULTS
from detection.config.loading import leaf_items, leaf_paths, load_settings
from detection.config.settings import Settings
from detection.config.yaml_files import read_settings_file
from detection.errors import SettingsError

# The study decides about these: what a rung is, how long and where a trial runs, and by what it is judged.
RESERVED = ("run.", "train.steps", "train.minutes", "evaluation.", "data.root")
RESERVED_BUT = ("run.seed",)


class Dimension(BaseModel):
    """The values of one setting.

    Attributes:
        type: `float` | `int` | `log` (a float whose logarithm is uniform) | `choice`.
        low, high: ends, both included.
        choices: of a choice: any values that YAML has, lists too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["float", "int", "log", "choice"]
    low: float | int | None = None
    high: float | int | None = None
    choices: tuple[Any, ...] | None = None

    @model_validator(mode="after")
    def check_values(self) -> "Dimension":
        if self.type == "choice":
            if self.low is not None or self.high is not None or not self.choices or len(self.choices) < 2:
                raise ValueError("a choice needs choices, two or more, and nothing else")
            if len({json.dumps(choice) for choice in self.choices}) < len(self.choices):
                raise ValueError("a choice occurs twice")
            return self
        if self.choices is not None or self.low is None or self.high is None:
            raise ValueError(f"{self.type} needs low and high, and nothing else")
        if self.type == "int" and not (isinstance(self.low, int) and isinstance(self.high, int)):
            raise ValueError("low and high of an int must be whole numbers")
        if not self.low < self.high:
            raise ValueError(f"low = {self.low} must be below high = {self.high}")
        if self.type == "log" and not self.low > 0:
            raise ValueError(f"low = {self.low} of a log must be above 0")
        return self

    def extremes(self) -> tuple[Any, ...]:
        """Return the values that must be possible: all choices, or both ends."""
        if self.type == "choice":
            assert self.choices is not None
            return self.choices
        number = int if self.type == "int" else float
        assert self.low is not None and self.high is not None
        return number(self.low), number(self.high)

    def matching(self, value: Any) -> list[Any]:
        """Return the value as it stands in this dimension, in a list; empty: it is not one of its values."""
        if self.type == "choice":
            assert self.choices is not None
            return [choice for choice in self.choices if choice == value]
        low, high = self.extremes()
        return [value] if isinstance(value, (int, float)) and low <= value <= high else []

    def distribution(self) -> Any:
        """Build Optuna's distribution; a choice is the JSON text of its value, because Optuna takes no lists."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.type == "choice":
            return CategoricalDistribution([json.dumps(choice) for choice in self.extremes()])
        low, high = self.extremes()
        return (
            IntDistribution(low, high) if self.type == "int" else FloatDistribution(low, high, log=self.type == "log")
        )


Space = dict[str, Dimension]


def read_space(content: Mapping[str, Any], origin: str) -> Space:
    """Build the space from the content of its file.

    Raises:
        SettingsError: a name is unknown or reserved, or its values are no dimension.
    """
    known, space = leaf_paths(read_settings_file(DEFAULTS)), Space()
    if not content:
        raise SettingsError(f"{origin}: names no setting")
    for name, dimension in content.items():
        if name.startswith(RESERVED) and name not in RESERVED_BUT:
            raise SettingsError(
                f"{origin}: {name} is fixed in a study, it decides how long, where or how a trial is measured"
            )
        if name not in known:
            load_settings(DEFAULTS, [], [f"{name}=0"])  # names the nearest one
            raise SettingsError(f"{origin}: {name} is an old name; yolo-v3/args.yaml has the new one")
        if not isinstance(dimension, dict):
            raise SettingsError(f"{origin}: {name}: must be a mapping such as {{type: log, low: 1.0e-4, high: 1.0e-2}}")
        try:
            space[name] = Dimension.model_validate(dimension)
        except ValidationError as error:
            item = error.errors()[0]
            path = ".".join(map(str, (name, *item["loc"])))
            message = item["msg"].removeprefix("Value error, ").replace("Input should", "should")
            raise SettingsError(f"{origin}: {path}: {message}") from None
    return space


def check_space(space: Space, base: Settings, origin: str) -> None:
    """Check both ends or all choices of every dimension, one at a time, above the other settings of a study.

    Raises:
        SettingsError: a value is impossible.
    """
    for name, dimension in space.items():
        for value in dimension.extremes():
            try:
                load_settings(base, [], [word_of(name, value)])
            except SettingsError as error:
                raise SettingsError(f"{origin}: {name}: {json.dumps(value)} is impossible: {error}") from None


def start_values(space: Space, settings: Settings) -> dict[str, Any]:
    """Return the values that the searched settings have before the search, of those that lie in the space."""
    before = dict(leaf_items(settings.model_dump(mode="json")))
    found = {name: dimension.matching(before.get(name)) for name, dimension in space.items()}
    return {name: values[0] for name, values in found.items() if values}


def word_of(name: str, value: Any) -> str:
    """Return the word of a command line that sets a setting; JSON is YAML."""
    return f"{name}={json.dumps(value)}"


def values_of(space: Space, params: Mapping[str, Any]) -> dict[str, Any]:
    """Turn Optuna's parameters into values of settings."""
    return {
        name: json.loads(value) if name in space and space[name].type == "choice" else value
        for name, value in params.items()
    }


def params_of(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn values of settings into Optuna's parameters. Inverse of `values_of`."""
    return {name: json.dumps(value) if space[name].type == "choice" else value for name, value in values.items()}
