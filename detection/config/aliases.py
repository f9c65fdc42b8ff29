"""Flags and keys of other programs, mapped to settings, so that MMDetection commands for Habana run unchanged.

Each alias sets one or two settings and is printed together with them; `docs/hpu.md` has the table. Those of Habana's
EfficientDet are in `estimator_flags`. Imports no torch.
"""

import argparse
import functools
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from detection.config.estimator_flags import add_estimator_flags, separate_switches, translate_flags
from detection.config.loading import Flag, leaf_paths
from detection.config.setting_names import FLAT_NAMES, MOVED_NAMES, follow_move
from detection.config.yaml_files import read_settings_file, read_yaml
from detection.errors import SettingsError

HPU_FLAGS = ("--hpu", "--hpus")
TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # set by torchrun
RECIPES = {
    "yolov3_d53_320_273e_coco.py": "recipes/d53_320_273e.yaml; on HPUs recipes/d53_320_273e_1x32.yaml and its siblings",
    "yolov3_d53_mstrain-608_273e_coco.py": "recipes/d53_mstrain-608_273e.yaml",
}


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every script that computes on a device."""
    add = parser.add_argument
    add("--gpu", type=int, metavar="N", help="same as --device cuda:N")
    add("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N, mps or hpu")
    add("--hpu", choices=["1"], metavar="1", help="same as --device hpu; the value may be omitted")
    add("--hpus", choices=["1"], help=argparse.SUPPRESS)
    add("--lazy", action="store_true", help="lazy mode of device hpu")
    add("--autocast", action="store_true", help="mixed precision with bfloat16")
    add("--deterministic", action="store_true", help="use deterministic algorithms only")


def add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    """Add the evaluation flags of other programs."""
    text = "--eval-batch-size N, --cfg-options key=value ..., --eval bbox: docs/hpu.md"
    _add_evaluation_flags(parser.add_argument_group("settings under the names of other programs", text))


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Add the training flags of other programs."""
    text = (
        "--batch-size N, --eval-batch-size N, --epochs N, --log-interval N, --cfg-options key=value ..., "
        "--launcher pytorch, --eval bbox: docs/hpu.md; --train_batch_size N ...: docs/efficientdet_commands.md"
    )
    group = parser.add_argument_group("settings under the names of other programs", text)
    _add_evaluation_flags(group)
    add = functools.partial(group.add_argument, help=argparse.SUPPRESS)
    add("--batch-size", type=number_or_auto)
    add("--log-interval", type=int)
    for flag in ("--epoch", "--epochs"):
        add(flag, type=float)
    add("--launcher", choices=["pytorch"])
    add("--local-rank", "--local_rank", type=int)  # torch.distributed.launch adds it
    add_estimator_flags(group)


def _add_evaluation_flags(group: argparse._ArgumentGroup) -> None:
    add = functools.partial(group.add_argument, help=argparse.SUPPRESS)
    add("--eval-batch-size", "--eval_batch_size", type=int)
    add("--eval", choices=["bbox"])
    add("--cfg-options", nargs="+", action="extend")


def separate_values(words: Sequence[str]) -> list[str]:
    """Append the value 1 to a bare --hpu, and true to switches; argparse would consume the next word as their value."""
    pairs = itertools.pairwise([*separate_switches(words), ""])
    return [f"{word}=1" if word in HPU_FLAGS and not after.isdecimal() else word for word, after in pairs]


def settings_flags(arguments: argparse.Namespace, defaults: Path) -> list[Flag]:
    """Translate command-line flags to settings.

    Args:
        arguments: parsed command line.
        defaults: args.yaml; --cfg-options accepts its settings too.

    Raises:
        SettingsError: an unknown key, an MMDetection configuration file, or --launcher without torchrun.
    """
    given = {name: value for name, value in vars(arguments).items() if value is not None and value is not False}
    check_files(given.get("settings", ()))
    check_launcher(given)
    simple: dict[str, tuple[str, Callable[[Any], Any]]] = {
        "gpu": ("run.device", lambda number: f"cuda:{number}"),
        "device": ("run.device", str),
        "hpu": ("run.device", lambda _: "hpu"),
        "hpus": ("run.device", lambda _: "hpu"),
        "lazy": ("run.lazy", bool),
        "autocast": ("run.precision", lambda _: "bf16"),
        "deterministic": ("run.deterministic", bool),
        "score": ("yolo.score", str),
        "log_interval": ("run.log_frequency", int),
        "batch_size": ("train.batch_size", lambda value: value),
        "eval_batch_size": ("evaluation.batch_size", int),
        "epoch": ("train.steps", in_epochs),
        "epochs": ("train.steps", in_epochs),
    }
    flags = [
        Flag(f"--{name.replace('_', '-')}", path, convert(given[name]))
        for name, (path, convert) in simple.items()
        if name in given
    ]
    flags += translate_flags({name: value for name, value in vars(arguments).items() if value is not None})
    for word in given.get("cfg_options", ()):
        flags.extend(translate_option(word, defaults))
    return flags


def check_files(words: Sequence[str]) -> None:
    """Refuse configuration files of MMDetection; names the recipe to take instead."""
    for word in words:
        if word.endswith(".py") and "=" not in word:
            recipe = RECIPES.get(Path(word).name, "a file of recipes/")
            raise SettingsError(f"{word}: configuration files of MMDetection are not read; take --config {recipe}")


def check_launcher(given: dict[str, Any]) -> None:
    """Refuse --launcher without torchrun's environment, and a --local-rank other than torchrun's."""
    missing = [name for name in TORCHRUN_VARIABLES if name not in os.environ]
    if "launcher" in given and missing:
        raise SettingsError(
            f"--launcher pytorch: the environment has no {', '.join(missing)}; start with "
            "torchrun --nproc_per_node=8 yolo-v3/main.py ..."
        )
    if "local_rank" in given and str(given["local_rank"]) != os.environ.get("LOCAL_RANK"):
        raise SettingsError(f"--local-rank {given['local_rank']}: torchrun's LOCAL_RANK decides; leave the flag out")


def number_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def in_epochs(number: Any) -> str:
    """Format a number of epochs as a duration."""
    return f"{number:g}ep" if isinstance(number, int | float) else f"{number}ep"


def step_epochs(value: Any) -> dict[str, Any]:
    """Translate `lr_config.step`: a list, a comma-separated text or one number of epochs."""
    values = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    return {"scheduler.milestones": [in_epochs(epoch) for epoch in values], "scheduler.strategy": "WarmupMultiStepLR"}


def step_policy(path: str) -> Callable[[Any], dict[str, Any]]:
    """Build the translation of a key of the step policy, which also selects the strategy."""
    return lambda value: {path: value, "scheduler.strategy": "WarmupMultiStepLR"}


def same(path: str) -> Callable[[Any], dict[str, Any]]:
    """Build the translation of a key that only has another name here."""
    return lambda value: {path: value}


def epochs(path: str) -> Callable[[Any], dict[str, Any]]:
    """Build the translation of a key that counts epochs."""
    return lambda value: {path: in_epochs(value)}


# MMDetection 2 key -> settings. Its learning rate drops in steps, so keys of that policy also select the strategy.
MMDETECTION_KEYS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "data_root": same("data.root"),
    "data.samples_per_gpu": same("train.batch_size"),
    "data.workers_per_gpu": same("data.num_workers"),
    "optimizer.type": lambda value: {"train.optimizer": str(value).lower()},
    "optimizer.lr": same("train.learning_rate"),
    "optimizer.momentum": same("train.momentum"),
    "optimizer.weight_decay": same("train.weight_decay"),
    "optimizer_config.grad_clip.max_norm": same("train.clip_norm"),
    "lr_config.warmup_iters": same("scheduler.warmup"),
    "lr_config.warmup_ratio": step_policy("scheduler.warmup_start_factor"),
    "lr_config.step": step_epochs,
    "lr_config.gamma": step_policy("scheduler.gamma"),
    "runner.max_epochs": epochs("train.steps"),
    "checkpoint_config.interval": epochs("train.save_frequency"),
    "checkpoint_config.max_keep_ckpts": same("train.keep_checkpoints"),
    "evaluation.interval": epochs("evaluation.evaluate_frequency"),
    "log_config.interval": same("run.log_frequency"),
    "model.bbox_head.num_classes": same("model.num_classes"),
    "load_from": same("model.pretrained"),
    "seed": same("run.seed"),
}


def translate_option(word: str, defaults: Path) -> list[Flag]:
    """Translate one key=value of --cfg-options to settings."""
    key, separator, text = word.partition("=")
    if not separator:
        raise SettingsError(f"--cfg-options {word!r}: expected key=value")
    value = read_yaml(text, f"--cfg-options {word}")
    if key in MMDETECTION_KEYS:
        settings = MMDETECTION_KEYS[key](value)
    elif key in leaf_paths(read_settings_file(defaults)):
        settings = {key: value}
    elif key in FLAT_NAMES:
        settings = {FLAT_NAMES[key]: value}
    elif key in MOVED_NAMES:
        settings = dict([follow_move(key, value)])
    else:
        raise SettingsError(
            f"--cfg-options: unknown key {key!r}; of MMDetection's these are known: {', '.join(MMDETECTION_KEYS)}; "
            "and every setting of yolo-v3/args.yaml"
        )
    return [Flag(f"--cfg-options {key}", path, setting) for path, setting in settings.items()]
