"""Translate `--hparams "name=value,..."` of the TensorFlow EfficientDet to settings. Imports no torch.

Source: `hparams_config.py` of github google/automl and of Habana's example, for the names
"""

import difflib
import re
from collections.abc import Callable
from typing import Any

from detection.config.efficientdet_settings import check_aspects
from detection.config.yaml_files import read_yaml
from detection.errors import SettingsError

Translation = Callable[[Any], dict[str, Any]]
SPLIT = re.compile(r",(?=\s*[A-Za-z_][\w.]*\s*=)")  # the commas of a list do not precede a name
COCO_SLOTS = (90, 91)  # numbers of classes that count COCO's unused ids, and its background


def same(path: str) -> Translation:
    return lambda value: {path: value}


def in_epochs(path: str) -> Translation:
    return lambda value: {path: f"{number(value):g}ep"}


def number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number")
    return float(value)


def image_size(value: Any) -> dict[str, Any]:
    """A side, or HEIGHTxWIDTH of a square."""
    sides = [int(side) for side in re.findall(r"\d+", str(value))]
    if not sides or len(set(sides)) != 1 or not re.fullmatch(r"\d+(x\d+)?", str(value)):
        raise ValueError("must be one side or two equal ones, such as 512 or 512x512: the input is square")
    return {"train.image_size": sides[0], "evaluation.image_size": sides[0]}


def classes(value: Any) -> dict[str, Any]:
    """COCO's 90 or 91 count ids without a category; here classes are dense and come from the annotations."""
    if value not in COCO_SLOTS:
        raise ValueError(
            "is 90 or 91 for COCO; else classes come from the annotations, and model.num_classes=N checks their number"
        )
    return {"model.num_classes": None}


def aspects(value: Any) -> dict[str, Any]:
    return {"efficientdet.aspects": check_aspects(value)}


def ema_decay(value: Any) -> dict[str, Any]:
    return {"train.ema_decay": number(value) or None}


def clip_norm(value: Any) -> dict[str, Any]:
    limit = number(value) or None  # of each tensor, then of all together
    return {"train.clip_tensor_norm": limit, "train.clip_norm": limit}


def mixed_precision(value: Any) -> dict[str, Any]:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return {"run.precision": "bf16" if value else "off"}


def flip(value: Any) -> dict[str, Any]:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return {"data.augmentation.horizontal_flip.p": 0.5 if value else 0.0}


def only(wanted: Any, answer: str) -> Translation:
    """Translate a name whose one value is what happens here anyway."""

    def check(value: Any) -> dict[str, Any]:
        if value != wanted:
            raise ValueError(answer)
        return {}

    return check


JITTER = "is data.augmentation.scale_jitter.scale=[MIN,MAX]"
FROM_VARIANT = "follows from the variant (--model_name): another network would not fit its published weights"
NAMES: dict[str, Translation | str] = {
    # optimization
    "learning_rate": same("train.learning_rate"),
    "momentum": same("train.momentum"),
    "weight_decay": same("train.weight_decay"),
    "optimizer": lambda value: {"train.optimizer": str(value).lower()},
    "clip_gradients_norm": clip_norm,
    "moving_average_decay": ema_decay,
    "num_epochs": in_epochs("train.steps"),
    "lr_warmup_epoch": in_epochs("scheduler.warmup"),
    "lr_warmup_init": "is scheduler.warmup_start_factor, as a share of train.learning_rate",
    "lr_decay_method": "is scheduler.strategy: docs/optimization.md",
    "first_lr_drop_epoch": "is scheduler.milestones, with scheduler.strategy=WarmupMultiStepLR",
    "second_lr_drop_epoch": "is scheduler.milestones, with scheduler.strategy=WarmupMultiStepLR",
    "use_bfloat16": mixed_precision,
    "mixed_precision": mixed_precision,
    "grad_checkpoint": same("train.activation_checkpointing"),
    "map_freq": in_epochs("evaluation.evaluate_frequency"),
    # data
    "image_size": image_size,
    "num_classes": classes,
    "input_rand_hflip": flip,
    "jitter_min": JITTER,
    "jitter_max": JITTER,
    "skip_crowd_during_training": only(True, "crowd regions are never learned here"),
    "max_instances_per_image": "there is no limit here: all boxes of an image count",
    # loss and anchors
    "alpha": same("efficientdet.alpha"),
    "gamma": same("efficientdet.gamma"),
    "delta": same("efficientdet.delta"),
    "box_loss_weight": same("efficientdet.box_weight"),
    "label_smoothing": same("efficientdet.label_smoothing"),
    "anchor_scale": same("efficientdet.anchor_scale"),
    "aspect_ratios": aspects,
    "positives_momentum": "losses are divided by the positives of each process's own batch, as without it",
    "iou_loss_type": only(
        None, "there is no IoU term in this loss; yolox.loss and yolo.loss have some: docs/losses.md"
    ),
    "nms_configs": "is evaluation.iou_threshold, efficientdet.nms, efficientdet.soft_sigma and max_per_image",
    "survival_prob": only(None, "layers of the heads are never dropped"),
    # what names the network
    "name": FROM_VARIANT,
    "backbone_name": FROM_VARIANT,
    "fpn_num_filters": FROM_VARIANT,
    "fpn_cell_repeats": FROM_VARIANT,
    "box_class_repeats": FROM_VARIANT,
    "fpn_weight_method": FROM_VARIANT,
    "min_level": FROM_VARIANT,
    "max_level": FROM_VARIANT,
    "num_scales": FROM_VARIANT,
    "separable_conv": FROM_VARIANT,
}


def translate_hparams(text: str) -> list[tuple[str, str, Any]]:
    """Translate names and values.

    Returns:
        (name, path of the setting, value) for each setting.

    Raises:
        SettingsError: a name is unknown (the message suggests the nearest one) or has no counterpart, or a value has
            the wrong type.
    """
    settings = []
    for pair in SPLIT.split(text):
        name, separator, value_text = (part.strip() for part in pair.partition("="))
        where = f"--hparams {pair.strip()}"
        if not separator or not name:
            raise SettingsError(f"--hparams {text!r}: expected name=value,name=value")
        if name not in NAMES:
            nearest = difflib.get_close_matches(name, NAMES, n=1)
            hint = f"the nearest is {nearest[0]}" if nearest else "docs/efficientdet_commands.md lists them"
            raise SettingsError(
                f"--hparams: unknown name {name!r}; {hint}; settings of args.yaml are given as key=value"
            )
        translation = NAMES[name]
        if isinstance(translation, str):
            raise SettingsError(f"{where}: {translation}")
        try:
            settings += [(name, path, value) for path, value in translation(read_yaml(value_text, where)).items()]
        except ValueError as error:
            raise SettingsError(f"{where}: {error}") from None
    return settings
