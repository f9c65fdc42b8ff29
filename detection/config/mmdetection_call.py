"""The call of mmdetection's tools/test.py: `CONFIG CHECKPOINT --eval bbox` instead of `--weights CHECKPOINT`."""

import argparse
from pathlib import Path

from detection.errors import SettingsError, say

RECIPES = (".yaml", ".yml")


def take_positions(arguments: argparse.Namespace) -> None:
    """Turn the two words before `--eval` into `--weights` and, for a recipe, `--config`.

    A Python file of mmdetection is not read: its checkpoints are imported with network, classes and geometry.

    Raises:
        SettingsError: there is another number of such words than two, or weights are given besides.
    """
    positions = [word for word in arguments.settings if "=" not in word]
    if arguments.eval is None or not positions:
        return
    if len(positions) != 2 or arguments.weights is not None:
        raise SettingsError("--eval bbox goes with two files, as in: validation.py CONFIG CHECKPOINT --eval bbox")
    config, checkpoint = map(Path, positions)
    arguments.settings = [word for word in arguments.settings if "=" in word]
    arguments.weights = checkpoint
    if config.suffix in RECIPES:
        arguments.config = [*arguments.config, config]
    elif config.suffix == ".py":
        say(f"--eval: {config} is not read, {checkpoint} brings its network, classes and geometry")
    else:
        raise SettingsError(f"--eval bbox: {config} is neither a recipe (.yaml) nor a file of mmdetection (.py)")
