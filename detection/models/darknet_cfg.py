"""Darknet network descriptions (.cfg): text <-> sections, and which keys mean what.

From sections to modules: `darknet_layers.py`, `darknet_network.py`.

Source: the parsers of https://github.com/pjreddie/darknet and https://github.com/AlexeyAB/darknet.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from detection.errors import SettingsError

LARGEST = 2**20  # of any whole number in a description; keeps a slip from allocating the machine's memory
LAYER_NAMES = {  # as written -> what it is called here
    "net": "net",
    "network": "net",
    "conv": "convolutional",
    "convolutional": "convolutional",
    "max": "maxpool",
    "maxpool": "maxpool",
    "avg": "avgpool",
    "avgpool": "avgpool",
    "shortcut": "shortcut",
    "route": "route",
    "upsample": "upsample",
    "dropout": "dropout",
    "yolo": "yolo",
}
USED_KEYS = {
    "net": {"width", "height", "channels"},
    "convolutional": {
        *("filters", "size", "stride", "stride_x", "stride_y", "pad", "padding", "groups", "dilation"),
        *("activation", "batch_normalize", "cbn"),
    },
    "maxpool": {"size", "stride", "stride_x", "stride_y", "padding"},
    "avgpool": set(),
    "shortcut": {"from", "activation"},
    "route": {"layers", "groups", "group_id"},
    "upsample": {"stride", "scale"},
    "dropout": {"probability"},
    "yolo": {"mask", "anchors", "classes", "num", "scale_x_y", "new_coords"},
}
# Keys that change what the network computes and that we do not build -> the values with which they change nothing.
REFUSED_KEYS: dict[str, dict[str, tuple[str, ...]]] = {
    "net": {"time_steps": ("1",)},
    "convolutional": {
        **dict.fromkeys(("antialiasing", "binary", "xnor", "bin_output", "flipped", "coordconv", "reverse"), ("0",)),
        **dict.fromkeys(("sway", "rotate", "stretch", "stretch_sway", "dot"), ("0",)),
        "share_index": (),
    },
    "maxpool": {"maxpool_depth": ("0",), "antialiasing": ("0",), "maxpool_zero_nonmax": ("0",)},
    "shortcut": {"weights_type": ("none",), "weights_normalization": ("none",), "alpha": ("1",), "beta": ("1",)},
    "yolo": {"map": (), "nms_kind": ("default", "greedynms")},
}


@dataclass(frozen=True)
class CfgSection:
    """One [section] of a description; `line` is where it begins, for messages."""

    name: str  # one of the values of LAYER_NAMES
    line: int
    options: dict[str, str] = field(default_factory=dict)

    def where(self) -> str:
        return f"[{self.name}] in line {self.line}"

    def text(self, key: str, default: str | None = None) -> str:
        value = self.options.get(key, default)
        if value is None:
            raise SettingsError(f"cfg: {self.where()} has no {key!r}")
        return value

    def integer(self, key: str, default: int | None = None, least: int | None = None) -> int:
        value = self._number(key, None if default is None else float(default))
        if value != int(value) or value > LARGEST or (least is not None and value < least):
            at_least = "" if least is None else f" of at least {least}"
            raise SettingsError(
                f"cfg: {self.where()}: {key} = {self.shown(key)} must be a whole number{at_least} and at most {LARGEST}"
            )
        return int(value)

    def number(self, key: str, default: float) -> float:
        return self._number(key, default)

    def numbers(self, key: str) -> list[float]:
        """Comma-separated numbers; a comma at the end is usual."""
        try:
            values = [float(part) for part in self.text(key).split(",") if part]
        except ValueError:
            values = [math.nan]
        if not all(math.isfinite(value) for value in values):
            raise SettingsError(f"cfg: {self.where()}: {key} = {self.shown(key)} must be a list of finite numbers")
        return values

    def shown(self, key: str) -> str:
        """The value for a message."""
        return self.options[key][:60]

    def _number(self, key: str, default: float | None) -> float:
        try:
            value = float(self.text(key, None if default is None else str(default)))
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise SettingsError(f"cfg: {self.where()}: {key} = {self.shown(key)} must be a finite number")
        return value


def parse_cfg(text: str) -> list[CfgSection]:
    """Sections of a description, [net] first. As in Darknet the first of two equal keys counts; # and ; begin comments.

    Raises:
        SettingsError: not a description, an unknown layer, or a key that changes inference in a way we do not build.
    """
    sections: list[CfgSection] = []
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), start=1):
        line = "".join(line.split("#")[0].split())
        if not line or line[0] == ";":
            continue
        if line[0] == "[":
            name = line.strip("[]")
            if name not in LAYER_NAMES:
                known = ", ".join(sorted(set(LAYER_NAMES.values()) - {"net"}))
                raise SettingsError(f"cfg: line {number}: layer [{name[:60]}] is not supported; known layers: {known}")
            sections.append(CfgSection(LAYER_NAMES[name], number))
            continue
        key, separator, value = line.partition("=")
        if not separator or not sections:
            raise SettingsError(
                f"cfg: line {number}: {line[:60]!r} is neither [layer] nor key=value; is this a .cfg file?"
            )
        sections[-1].options.setdefault(key, value)
    if not sections or sections[0].name != "net" or sum(section.name == "net" for section in sections) != 1:
        raise SettingsError("cfg: must begin with one [net] section; is this a Darknet description?")
    for section in sections:
        for key, neutral in REFUSED_KEYS.get(section.name, {}).items():
            if key not in section.options:
                continue
            value = section.options[key]
            if value not in neutral and not _equals_number(value, neutral):
                allowed = f"; allowed: {' or '.join(neutral)}" if neutral else ""
                raise SettingsError(
                    f"cfg: {section.where()}: {key} = {section.shown(key)} changes inference and is not supported"
                    f"{allowed}"
                )
    return sections


def _equals_number(value: str, neutral: Sequence[str]) -> bool:
    """Whether another spelling of a neutral number, 0.0 or 1., is meant."""
    try:
        return any(number.isdigit() and float(value) == float(number) for number in neutral)
    except ValueError:
        return False


def unused_keys(sections: Sequence[CfgSection]) -> list[str]:
    """Keys that play no part in inference (training is decided by our settings), each once, as "[layer] key"."""
    found: dict[str, None] = {}
    for section in sections:
        for key in section.options:
            if key not in USED_KEYS[section.name]:
                found[f"[{section.name}] {key}"] = None
    return list(found)


def format_cfg(sections: Sequence[CfgSection]) -> str:
    """The text of a description; inverse of `parse_cfg` but for comments and line numbers."""
    blocks = (
        "\n".join([f"[{section.name}]", *(f"{key}={value}" for key, value in section.options.items())])
        for section in sections
    )
    return "\n\n".join(blocks) + "\n"


def input_size(sections: Sequence[CfgSection]) -> int:
    """Side in pixels of the square input; of a rectangular one the longer side."""
    net = sections[0]
    return max(net.integer("width", 416, least=1), net.integer("height", 416, least=1))


def with_classes(sections: Sequence[CfgSection], num_classes: int) -> list[CfgSection]:
    """The same description for another number of classes: [yolo] classes and the filters in front of them."""
    result = list(sections)
    for index, section in enumerate(result):
        if section.name == "yolo":
            num_anchors = len(section.numbers("mask")) if "mask" in section.options else section.integer("num", 1)
            result[index] = CfgSection("yolo", section.line, {**section.options, "classes": str(num_classes)})
            before = result[index - 1]
            filters = {"filters": str(num_anchors * (5 + num_classes))}
            result[index - 1] = CfgSection(before.name, before.line, {**before.options, **filters})
    return result
