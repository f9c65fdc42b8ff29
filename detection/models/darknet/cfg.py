"""Darknet network files (.cfg): text to sections and back, and the meaning of keys.

`layers` and `network` build modules from sections.

Source: the parsers of https://github.com/pjreddie/darknet and https://github.com/AlexeyAB/darknet.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from detection.errors import SettingsError

MAX_INTEGER = 2**20  # keeps a typo from allocating all memory
MAX_SECTIONS = 10_000  # the largest published network has some hundred
LAYER_NAMES = {  # name in the file -> canonical name
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
    "Gaussian_yolo": "Gaussian_yolo",
    "scale_channels": "scale_channels",
    "sam": "sam",
    "reorg": "reorg",
    "reorg3d": "reorg3d",
}
OUTPUT_LAYERS = ("yolo", "Gaussian_yolo")
USED_KEYS = {
    "net": {"width", "height", "channels"},
    "convolutional": {
        *("filters", "size", "stride", "stride_x", "stride_y", "pad", "padding", "groups", "dilation"),
        *("activation", "batch_normalize", "cbn", "share_index"),
    },
    "maxpool": {"size", "stride", "stride_x", "stride_y", "padding"},
    "avgpool": set(),
    "shortcut": {"from", "activation"},
    "route": {"layers", "groups", "group_id"},
    "upsample": {"stride", "scale"},
    "dropout": {"probability"},
    "yolo": {"mask", "anchors", "classes", "num", "scale_x_y", "new_coords"},
    "Gaussian_yolo": {"mask", "anchors", "classes", "num", "scale_x_y"},
    "scale_channels": {"from", "activation", "scale_wh"},
    "sam": {"from", "activation"},
    "reorg": {"stride"},
    "reorg3d": {"stride"},
}
# Unsupported keys that change what the network computes -> values with which they change nothing.
REFUSED_KEYS: dict[str, dict[str, tuple[str, ...]]] = {
    "net": {"time_steps": ("1",)},
    "convolutional": {
        **dict.fromkeys(("antialiasing", "binary", "xnor", "bin_output", "flipped", "coordconv", "reverse"), ("0",)),
        **dict.fromkeys(("sway", "rotate", "stretch", "stretch_sway", "dot"), ("0",)),
    },
    "maxpool": {"maxpool_depth": ("0",), "antialiasing": ("0",), "maxpool_zero_nonmax": ("0",)},
    "shortcut": {"weights_type": ("none",), "weights_normalization": ("none",), "alpha": ("1",), "beta": ("1",)},
    "yolo": {"map": ()},
    "Gaussian_yolo": {"map": (), "yolo_point": ("center",), "new_coords": ("0",)},
    "reorg": {"reverse": ("0",), "flatten": ("0",), "extra": ("0",)},
    "reorg3d": {"reverse": ("0",)},
}
REFUSED_EVERYWHERE = {"dontload": ("0",), "dontloadscales": ("0",)}  # such layers are not in the weights file
# Keys of pjreddie's and AlexeyAB's Darknet for training, preprocessing of the image or NMS.
TRAINING_KEYS = {
    "net": """batch subdivisions momentum decay angle aspect saturation exposure hue learning_rate learning_rate_min
        burn_in max_batches policy steps scales seq_scales sgdr_cycle sgdr_mult step scale gamma power cutmix mosaic
        mosaic_bound mixup blur gaussian_noise letter_box label_smooth_eps adam B1 B2 eps max_crop min_crop flip hflip
        use_cuda_graph track augment_speed sequential_subdivisions try_fix_nan loss_scale dynamic_minibatch
        optimized_memory workspace_size_limit_MB equidistant_point badlabels_rejection_percentage
        num_sigmas_reject_badlabels ema_alpha weights_reject_freq contrastive contrastive_jit_flip contrastive_color
        unsupervised inputs max_chart_loss adversarial_lr attention color center noadjust""",
    "convolutional": "stream wait_stream angle grad_centr assisted_excitation",
    "maxpool": "out_channels",
    "dropout": "dropblock dropblock_size_rel dropblock_size_abs",
    "route": "stream wait_stream",
    "yolo": """jitter resize ignore_thresh truth_thresh random iou_thresh iou_thresh_kind iou_loss iou_normalizer
        cls_normalizer obj_normalizer delta_normalizer uc_normalizer nms_kind beta_nms max max_delta counters_per_class
        label_smooth_eps objectness_smooth focal_loss show_details track_history_size sim_thresh dets_for_track
        dets_for_show track_ciou_norm embedding_layer""",
}
TRAINING_KEYS["Gaussian_yolo"] = TRAINING_KEYS["yolo"]
TRAINING_EVERYWHERE = "stopbackward learning_scale onlyforward dont_update burnin_update train_only_bn clip truth"
TYPO_RATIO = 0.8  # of difflib; an unknown key at least this similar to a used one is taken for a typo


@dataclass(frozen=True)
class CfgSection:
    """One [section] of a cfg and its options; the getters raise SettingsError for a missing or invalid value."""

    name: str  # one of the values of LAYER_NAMES
    line: int  # of the file where it begins, for messages
    options: dict[str, str] = field(default_factory=dict)

    def where(self) -> str:
        """Name and line for a message."""
        return f"[{self.name}] in line {self.line}"

    def text(self, key: str, default: str | None = None) -> str:
        """The value as it stands; without a default the key is required."""
        value = self.options.get(key, default)
        if value is None:
            raise SettingsError(f"cfg: {self.where()} has no {key!r}")
        return value

    def integer(self, key: str, default: int | None = None, minimum: int | None = None) -> int:
        """A whole number of at most MAX_INTEGER."""
        value = self._number(key, None if default is None else float(default))
        if value != int(value) or value > MAX_INTEGER or (minimum is not None and value < minimum):
            at_least = "" if minimum is None else f" of at least {minimum}"
            raise SettingsError(
                f"cfg: {self.where()}: {key} = {self.shown(key)} must be a whole number{at_least} and at most "
                f"{MAX_INTEGER}"
            )
        return int(value)

    def number(self, key: str, default: float) -> float:
        """A finite number."""
        return self._number(key, default)

    def numbers(self, key: str) -> list[float]:
        """Finite numbers separated by commas, of which files often have one at the end."""
        try:
            values = [float(part) for part in self.text(key).split(",") if part]
        except ValueError:
            values = [math.nan]
        if not all(math.isfinite(value) for value in values):
            raise SettingsError(f"cfg: {self.where()}: {key} = {self.shown(key)} must be a list of finite numbers")
        return values

    def shown(self, key: str) -> str:
        """The value, shortened for a message."""
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
    """Parse the sections of a cfg, [net] first. As in Darknet, of equal keys the first counts; # and ; begin comments.

    Raises:
        SettingsError: not a cfg, an unknown layer, a misspelt key, or an unsupported key that changes inference.
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
            if len(sections) > MAX_SECTIONS:
                raise SettingsError(f"cfg: line {number}: more than {MAX_SECTIONS} sections")
            continue
        key, separator, value = line.partition("=")
        if not separator or not sections:
            raise SettingsError(
                f"cfg: line {number}: {line[:60]!r} is neither [layer] nor key=value; is this a .cfg file?"
            )
        sections[-1].options.setdefault(key, value)
    if not sections or sections[0].name != "net" or sum(section.name == "net" for section in sections) != 1:
        raise SettingsError("cfg: must begin with one [net] section; is this a .cfg file?")
    for section in sections:
        check_spelling(section)
        for key, neutral in (REFUSED_KEYS.get(section.name, {}) | REFUSED_EVERYWHERE).items():
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
    """Whether a value equals a neutral one as a number: 0.0 or 1."""
    try:
        return any(number.isdigit() and float(value) == float(number) for number in neutral)
    except ValueError:
        return False


def check_spelling(section: CfgSection) -> None:
    """Raise SettingsError for an unknown key similar to one that matters: `filtres=8` would build a single filter."""
    matters = USED_KEYS[section.name] | REFUSED_KEYS.get(section.name, {}).keys()
    for key in section.options.keys() - matters - training_keys(section.name) - REFUSED_EVERYWHERE.keys():
        if nearest := difflib.get_close_matches(key, sorted(matters), n=1, cutoff=TYPO_RATIO):
            raise SettingsError(f"cfg: {section.where()}: unknown key {key[:60]!r}; is {nearest[0]!r} meant?")


def training_keys(name: str) -> set[str]:
    """Keys of a layer that Darknet uses but inference here does not."""
    return {*TRAINING_KEYS.get(name, "").split(), *TRAINING_EVERYWHERE.split()}


def unused_keys(sections: Sequence[CfgSection]) -> tuple[list[str], list[str]]:
    """List the keys that do not affect inference, each once, as "[layer] key".

    Returns:
        Those that Darknet uses in training and detection, for which our settings apply; and unknown ones.
    """
    known: dict[str, None] = {}
    unknown: dict[str, None] = {}
    for section in sections:
        refused = REFUSED_KEYS.get(section.name, {}).keys() | REFUSED_EVERYWHERE.keys()
        for key in section.options:
            if key not in USED_KEYS[section.name] and key not in refused:
                found = known if key in training_keys(section.name) else unknown
                found[f"[{section.name}] {key[:60]}"] = None
    return list(known), list(unknown)


def cfg_notices(sections: Sequence[CfgSection], sizes: Mapping[str, int]) -> list[str]:
    """Lines about what of a cfg is replaced by our settings or ignored.

    Args:
        sizes: name of a setting -> side of the square input in pixels.
    """
    lines = []
    net = sections[0]
    width, height = net.integer("width", 416), net.integer("height", 416)
    others = [f"{name} = {size}" for name, size in sizes.items() if (size, size) != (width, height)]
    if others:
        lines.append(f"made for {width} x {height} px, used with {', '.join(others)} (square)")
    for section in sections:
        if section.name in OUTPUT_LAYERS and len(section.numbers("anchors")) > 2 * section.integer("num", 1):
            lines.append(
                f"{section.where()} lists more anchors than num = {section.shown('num')}; the listed ones count"
            )
    known, unknown = unused_keys(sections)
    if known:
        lines.append(f"not used, the settings decide: {', '.join(known)}")
    if unknown:
        lines.append(f"unknown keys, ignored: {', '.join(unknown)}")
    return lines


def format_cfg(sections: Sequence[CfgSection]) -> str:
    """Format sections as the text of a cfg. Inverse of `parse_cfg` except for comments and line numbers."""
    blocks = (
        "\n".join([f"[{section.name}]", *(f"{key}={value}" for key, value in section.options.items())])
        for section in sections
    )
    return "\n\n".join(blocks) + "\n"


def input_size(sections: Sequence[CfgSection]) -> int:
    """Longer side of the input in pixels."""
    net = sections[0]
    return max(net.integer("width", 416, minimum=1), net.integer("height", 416, minimum=1))


def values_per_anchor(section: CfgSection, num_classes: int) -> int:
    """Values per anchor before a [yolo], box, objectness and classes; a [Gaussian_yolo] has four uncertainties more."""
    return (9 if section.name == "Gaussian_yolo" else 5) + num_classes


def with_classes(sections: Sequence[CfgSection], num_classes: int) -> list[CfgSection]:
    """Return the sections for other classes: changes `classes` of each [yolo] and `filters` of the layer before it."""
    result = list(sections)
    for index, section in enumerate(result):
        if section.name in OUTPUT_LAYERS:
            num_anchors = len(section.numbers("mask")) if "mask" in section.options else section.integer("num", 1)
            result[index] = CfgSection(section.name, section.line, {**section.options, "classes": str(num_classes)})
            before = result[index - 1]
            filters = {"filters": str(num_anchors * values_per_anchor(section, num_classes))}
            result[index - 1] = CfgSection(before.name, before.line, {**before.options, **filters})
    return result


def with_anchors(
    sections: Sequence[CfgSection], anchors_of_layer: Mapping[int, Sequence[tuple[float, float]]]
) -> list[CfgSection]:
    """Return the sections with other anchors.

    Args:
        anchors_of_layer: number of each [yolo] layer -> its anchors, as many as before, (width, height) in pixels.
    """
    levels = sorted(anchors_of_layer.values(), key=lambda level: level[0][0] * level[0][1])
    anchors = [anchor for level in levels for anchor in level]
    shared = {"anchors": ", ".join(f"{w:g},{h:g}" for w, h in anchors), "num": str(len(anchors))}
    result = list(sections)
    for number, level in anchors_of_layer.items():
        section = result[number + 1]  # [net] has no number
        mask = ",".join(str(anchors.index(anchor)) for anchor in level)
        result[number + 1] = CfgSection(section.name, section.line, {**section.options, "mask": mask, **shared})
    return result
