"""Argument parser shared by all scripts."""

import argparse
import ast
import difflib
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from detection.config.aliases import add_device_flags, add_training_flags, separate_values, settings_flags
from detection.config.loading import Flag
from detection.errors import CheckpointError, SettingsError, escape

DEFAULTS = Path(__file__).resolve().parents[2] / "yolo-v3" / "args.yaml"


def at_least_one(text: str) -> int:
    """Parse an option's value as a whole number >= 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, is {text!r}")
    return int(text)


def at_least_zero(text: str) -> float:
    """Parse an option's value as a finite number >= 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number from 0, is {text!r}")
    return value


def weights_file(path: str | Path) -> Path:
    """Return the file of weights that a path names: of a run directory its best.pt, of an OpenVINO folder its .xml.

    Raises:
        CheckpointError: a directory with neither.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    if (best := path / "best.pt").is_file():
        return best
    if len(found := list(path.glob("*.xml"))) == 1:
        return found[0]
    hint = f"; {path / 'last.pt'} is there" if (path / "last.pt").is_file() else ""
    raise CheckpointError(f"{path} is a directory without best.pt, which a run writes at its first evaluation{hint}")


class Parser(argparse.ArgumentParser):
    """Argument parser with one-line errors and without abbreviated options."""

    def __init__(self, prog: str, description: str | None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        if (unknown := re.search(r"unrecognized arguments: .*?(--[\w-]+)", message)) is not None:
            known = [name for name in self._option_string_actions if name.startswith("--")]
            nearest = difflib.get_close_matches(unknown[1], known, n=1)
            message += f"; the nearest is {nearest[0]}" if nearest else ""
        self.exit(2, escape(f"{self.prog}: {message}; see --help") + "\n")

    def add_experiment(self, words: Sequence[str]) -> None:
        """Add --experiment, by which a script of another directory runs this one with its own defaults and its help."""
        self.add_argument(
            "--experiment",
            type=Path,
            metavar="DIR",
            help="its args.yaml below --config; of efficientdet/",
        )
        if words[:1] == ["--experiment"] and (script := Path(words[1]) / "main.py").is_file():
            self.prog = f"{script.parent.name}/main.py"
            self.description = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8")))

    def add_settings(self, device: bool = True) -> None:
        """Add key.path=value words and --config; with `device` also --device, --gpu and the other device flags."""
        add = self.add_argument
        add(
            "settings",
            nargs="*",
            metavar="key.path=value",
            help="settings to override; see yolo-v3/args.yaml",
        )
        add(
            "--config",
            action="append",
            default=[],
            type=Path,
            metavar="FILE",
            help="overlay on args.yaml; repeatable, later files win",
        )
        if device:
            add_device_flags(self)

    def add_training_flags(self) -> None:
        """Add training settings under the names of other programs."""
        add_training_flags(self)

    def parse_intermixed_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        return super().parse_intermixed_args(separate_values(sys.argv[1:] if args is None else args), namespace)

    def add_weights(self, required: bool = True) -> None:
        """Add --weights, --cfg and --names."""
        add = self.add_argument
        add(
            "--weights",
            type=weights_file,
            required=required,
            metavar="FILE",
            help="checkpoint .pt, run directory (its best.pt), Darknet .weights, or a file of export.py",
        )
        add(
            "--cfg",
            type=Path,
            metavar="FILE",
            help="Darknet .cfg of the network, for .weights (default: YOLOv3 as configured)",
        )
        add("--names", type=Path, metavar="FILE", help="class names for Darknet weights, one per line")

    def add_views(self) -> None:
        """Add --tiles, --overlap and --tta, which `inference.views.open_viewer` reads."""
        add = self.add_argument
        add(
            "--tiles",
            type=at_least_one,
            metavar="SIZE",
            help="for images much larger than the network input: also look at overlapping tiles of SIZE pixels",
        )
        add("--overlap", metavar="N", help="pixels that neighbouring tiles share, or share of SIZE (default: 0.2)")
        add("--tta", action="store_true", help="test-time augmentation: also mirrored, smaller and larger")

    def add_output(self) -> None:
        """Add --output and --show."""
        self.add_argument(
            "--output", type=Path, metavar="DIRECTORY", help="output directory (default: new, below logs/)"
        )
        self.add_argument("--show", action="store_true", help="also show the images in a window")


def device_flags(arguments: argparse.Namespace) -> list[Flag]:
    """Translate the flags of a command line (device flags, and other programs' where a script has them) to settings."""
    return settings_flags(arguments, DEFAULTS)


def read_confidences(words: Sequence[str], settings: list[str]) -> list[float]:
    """Parse the values of --confidence, and append the lowest to the settings.

    Raises:
        SettingsError: a value is not between 0 and 1 or is repeated, or the setting is given too.
    """
    values = []
    for word in words:
        try:
            values.append(float(word))
        except ValueError:
            raise SettingsError(f"--confidence {word}: is not a number") from None
        if not 0 < values[-1] < 1:
            raise SettingsError(f"--confidence {word}: must lie between 0 and 1")
        if values.count(values[-1]) > 1:
            raise SettingsError(f"--confidence {word}: occurs twice")
    if values:
        if other := [word for word in settings if word.split("=")[0].endswith("confidence_threshold")]:
            raise SettingsError(f"--confidence and {other[0]} contradict one another; give one of them")
        settings.append(f"evaluation.confidence_threshold={min(values)!r}")
    return values
