"""Values for settings that say `auto`: what fits the device, the number of images and their boxes. Imports no torch."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from detection.config.settings import DARKNET_CFG

IMAGES_SEEN = 30_000  # images of a run whose `train.steps` is auto, within EPOCHS
EPOCHS = (30, 300)  # fewer train nothing, more repeat the same few images
WARMUP_STEPS, WARMUP_SHARE = 50, 0.1  # least warm-up, and its largest share of the run
EVALUATIONS = 20  # of a run whose `evaluation.evaluate_frequency` is auto
AVERAGED_SHARE, AVERAGED_STEPS = 0.04, 10  # of the run's steps in the EMA, and the fewest

# backbone -> width of the neck per level, and the learning rate of AdamW from random or ImageNet weights
NECKS = {
    "darknet_tiny": [256, 128],
    "mobilenet_v3_small": [128, 96, 64],
    "mobilenet_v3_large": [256, 128, 96],
}
NECK, RATE = [512, 256, 128], 1.0e-3
HEADS, HEAD = {"darknet_tiny": 128, "mobilenet_v3_small": 64, "mobilenet_v3_large": 96}, 256  # width of the yolox head
# Classes that a mirror changes; single characters too.
SIDED = re.compile(r"\b(left|right|arrow|digit|letter|character|zero|one|two|three|four|five|six|seven|eight|nine)\b")
RATES = {"mobilenet_v3_small": 2.0e-3, "mobilenet_v3_large": 2.0e-3}
# Darknet-53 for a CPU and random weights: a step takes about as long as MobileNetV3-small's, and it learns more by it
# (docs/results.md). Taken for those of these settings that say auto.
NARROW: dict[str, Any] = {
    "model.width": 0.25,
    "model.depth": 0.34,
    "yolo.neck_channels": [128, 96, 64],
    "yolox.neck_channels": [128, 96, 64],
    "yolox.head_channels": 64,
    "train.learning_rate": 2.0e-3,
}


@dataclass(frozen=True)
class Facts:
    """What the values depend on.

    Attributes:
        accelerated: the device is no CPU.
        cores: of the processor, for this process.
        images: number of training images; None: not known.
        names: of the classes.
        given: paths of the settings that words and flags set.
        needs_anchors: only a detector with anchors will do.
        detector_of: name of the detector of a checkpoint file; None: it is none, or cannot be read.
        has_weights: whether the standard weights of a backbone are on this machine.
        fit_anchors: (complete settings with the published anchors) -> anchors or None, and a line about them.
    """

    accelerated: bool
    cores: int
    images: int | None
    names: tuple[str, ...]
    given: tuple[str, ...]
    needs_anchors: bool
    detector_of: Callable[[str], str | None]
    has_weights: Callable[[str], bool]
    fit_anchors: Callable[[dict[str, Any]], tuple[Any, str]]


def has_auto(tree: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether a setting that `fill_in` resolves says auto."""
    return any(_at(tree, path)[path.rpartition(".")[2]] == "auto" for path in (*RULES, "yolo.anchors"))


def fill_in(tree: dict[str, dict[str, Any]], published: Mapping[str, Mapping[str, Any]], facts: Facts) -> list[str]:
    """Replace, in place, every `auto` of `RULES`; returns a line per replaced setting that deserves one.

    The durations that depend on the length of the run (`scheduler.warmup`, `evaluation.evaluate_frequency`,
    `train.ema_decay`) and `train.batch_size` stay auto; the run resolves them.

    Args:
        tree: settings by section.
        published: those of args.yaml, for the anchors.
        facts: what the values depend on.
    """
    lines: list[str] = []
    for path, rule in RULES.items():
        branch, name = _at(tree, path), path.rpartition(".")[2]
        if branch[name] == "auto":
            branch[name], line = rule(tree, facts)
            lines += [f"{path} = {branch[name]}: {line}"] if line else []
    if tree["yolo"]["anchors"] == "auto":
        tree["yolo"]["anchors"] = published["yolo"]["anchors"]
        if tree["model"]["detector"] == "yolo" and tree["model"]["backbone"] != DARKNET_CFG:
            levels = tree["yolo"]["anchors"][-len(tree["yolo"]["neck_channels"]) :]
            fitted, line = facts.fit_anchors({**tree, "yolo": {**tree["yolo"], "anchors": levels}})
            tree["yolo"]["anchors"] = levels if fitted is None else fitted
            if fitted is not None:
                tree["yolo"]["anchor_size"] = tree["train"]["image_size"]
            lines.append(f"yolo.anchors: {line}")
    return lines


def scale_anchors(tree: dict[str, dict[str, Any]]) -> list[str]:
    """Scale, in place, anchors made for another input size (`yolo.anchor_size`) to `train.image_size`; says so."""
    made_for, size = tree["yolo"]["anchor_size"], tree["train"]["image_size"]
    if not isinstance(made_for, int) or not isinstance(size, int) or made_for in (0, size):
        return []
    tree["yolo"]["anchors"] = [
        [[round(side * size / made_for, 1) for side in anchor] for anchor in level] for level in tree["yolo"]["anchors"]
    ]
    tree["yolo"]["anchor_size"] = size
    return [f"yolo.anchors: made for {made_for} px, scaled to {size} px"]


def warmup_steps(total_steps: int, steps_per_epoch: float) -> int:
    """Resolve `scheduler.warmup: auto`: one epoch, at least 50 steps, at most a tenth of the run."""
    return min(max(round(steps_per_epoch), WARMUP_STEPS), int(WARMUP_SHARE * total_steps))


def evaluation_steps(total_steps: int, steps_per_epoch: float) -> int:
    """Resolve `evaluation.evaluate_frequency: auto`: a twentieth of the run, in whole epochs where those are longer."""
    return max(math.ceil(total_steps / EVALUATIONS), round(steps_per_epoch), 1)


def ema_decay(total_steps: int) -> float:
    """Resolve `train.ema_decay: auto`: the average covers 4 % of the run's steps, and at least 10."""
    return 1 - 1 / max(AVERAGED_STEPS, AVERAGED_SHARE * total_steps)


def scaled_channels(channels: int, width: float) -> int:
    """Multiply a number of channels by `model.width` and round it to the nearest multiple of 8, at least 8."""
    return max(8 * math.floor(width * channels / 8 + 0.5), 8)


def _at(tree: Mapping[str, Any], path: str) -> Any:
    """Return the mapping that holds the last part of a path."""
    for part in path.split(".")[:-1]:
        tree = tree[part]
    return tree


def _backbone(tree: dict[str, Any], facts: Facts) -> tuple[Any, str]:
    if facts.accelerated:
        return "darknet", "an accelerator"
    weights = tree["model"]["pretrained"]
    if weights not in ("auto", False) or (weights == "auto" and facts.has_weights("mobilenet_v3_small")):
        return "mobilenet_v3_small", "a CPU, given weights"
    for path, value in NARROW.items():
        branch, name = _at(tree, path), path.rpartition(".")[2]
        if branch[name] == "auto":
            branch[name] = value
    return "darknet", f"a CPU, random weights: model.width = {tree['model']['width']}, depth = {tree['model']['depth']}"


def _detector(tree: dict[str, Any], facts: Facts) -> tuple[Any, str]:
    backbone, weights = tree["model"]["backbone"], tree["model"]["pretrained"]
    if facts.needs_anchors:
        return "yolo", "it has anchors"
    if backbone == DARKNET_CFG or str(weights).endswith(".weights"):
        return "yolo", "a network of Darknet"
    if isinstance(weights, str) and weights != "auto" and (name := facts.detector_of(weights)) is not None:
        return name, f"that of {weights}"
    if own := [path for path in facts.given if path.startswith("yolo.")]:
        return "yolo", f"{own[0]} is its setting"
    return "yolox", "no anchors, the score of a box is its quality: docs/ladder.md"


def _horizontal_flip(tree: dict[str, Any], facts: Facts) -> tuple[Any, str]:
    sided = [name for name in facts.names if re.fullmatch("[A-Za-z0-9]", name) or SIDED.search(name.lower())]
    return (0.0, f"{sided[0]!r} is another thing in a mirror") if sided else (0.5, "")


def _with_multi(value: Any, otherwise: Any) -> "Rule":
    """Return the rule of a setting that has one value with `yolo.loss` multi, another with any other loss."""
    return lambda tree, facts: (value if tree["yolo"]["loss"] == "multi" else otherwise, "")


def _neck_channels(tree: dict[str, Any], facts: Facts) -> tuple[Any, str]:
    width = tree["model"]["width"]
    widths = NECKS.get(tree["model"]["backbone"], NECK)
    if width == 1 or not isinstance(width, int | float):  # `validate` reports what is no number
        return list(widths), ""
    return [scaled_channels(channels, width) for channels in widths], ""


def _head_channels(tree: dict[str, Any], facts: Facts) -> tuple[Any, str]:
    width = tree["model"]["width"]
    channels = HEADS.get(tree["model"]["backbone"], HEAD)
    return scaled_channels(channels, width) if isinstance(width, int | float) else channels, ""


def _epochs(tree: dict[str, Any], facts: Facts) -> tuple[Any, str]:
    fewest, most = EPOCHS
    if facts.images is None:
        return f"{fewest}ep", "the number of images is not known"
    epochs = min(max(round(IMAGES_SEEN / facts.images), fewest), most)
    if tree["train"]["minutes"] is not None:
        return f"{epochs}ep", ""  # `train.minutes` replaces it
    return f"{epochs}ep", f"{facts.images} training images; train.minutes=M fits the run to your time"


def _pretrained(tree: dict[str, Any], facts: Facts) -> tuple[Any, str]:
    backbone = tree["model"]["backbone"]
    if (tree["model"]["width"], tree["model"]["depth"]) != (1, 1):
        chosen = {"model.backbone", "model.width", "model.depth"}.isdisjoint(facts.given)
        other = "model.pretrained=true takes MobileNetV3 small with ImageNet's, best with few images"
        return False, f"random weights; {other if chosen else 'none were published for other widths and depths'}"
    if facts.has_weights(backbone):
        return True, f"the weights of {backbone} are on this machine"
    if backbone in NECKS or backbone.startswith("timm/"):
        return False, "random weights; model.pretrained=true fetches ImageNet's, which help most with few images"
    return False, "random weights; docs/train_on_my_data.md says how to start from published ones"


Rule = Callable[[dict[str, Any], Facts], tuple[Any, str]]
# Path -> rule of its value and of a line about it, in an order in which each finds what it needs resolved.
RULES: dict[str, Rule] = {
    "model.backbone": _backbone,
    "model.width": lambda tree, facts: (1.0, ""),
    "model.depth": lambda tree, facts: (1.0, ""),
    "model.detector": _detector,
    "yolo.loss": lambda tree, facts: ("multi" if tree["model"]["detector"] == "yolo" else "darknet", ""),
    "yolo.box_weight": _with_multi(5.0, 1.0),
    "yolo.anchor_match": _with_multi("iou", "best"),
    "yolo.anchor_iou": _with_multi(0.4, 0.213),
    "yolo.objectness_target": _with_multi("iou", "one"),
    "yolo.neck_channels": _neck_channels,
    "yolox.neck_channels": _neck_channels,
    "yolox.head_channels": _head_channels,
    "model.pretrained": _pretrained,
    "train.image_size": lambda tree, facts: (416 if facts.accelerated else 320, ""),
    "evaluation.image_size": lambda tree, facts: (tree["train"]["image_size"], ""),
    "train.learning_rate": lambda tree, facts: (RATES.get(tree["model"]["backbone"], RATE), ""),
    "train.steps": _epochs,
    "data.augmentation.horizontal_flip.p": _horizontal_flip,
    "data.num_workers": lambda tree, facts: (min(facts.cores, 8 if facts.accelerated else 2), ""),
}
