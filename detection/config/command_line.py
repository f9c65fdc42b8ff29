"""What the command lines of all scripts share."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from detection.config.aliases import add_device_flags, add_training_flags, separate_hpu, settings_flags
from detection.config.loading import Flag

DEFAULTS = Path(__file__).resolve().parents[2] / "yolo-v3" / "args.yaml"


def at_least_one(text: str) -> int:
    """A whole number from 1 as the value of an option."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, is {text!r}")
    return int(text)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other error, and takes no abbreviations."""

    def __init__(self, prog: str, description: str | None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")

    def add_settings(self, device: bool = True) -> None:
        """key.path=value words and --config; --device and --gpu where a device is used."""
        add = self.add_argument
        add(
            "settings",
            nargs="*",
            metavar="key.path=value",
            help="single settings; yolo-v3/args.yaml explains all of them",
        )
        add("--config", action="append", default=[], type=Path, metavar="FILE", help="overlay on args.yaml; repeatable")
        if device:
            add_device_flags(self)

    def add_training_flags(self) -> None:
        """Settings of training under the names that other programs give them."""
        add_training_flags(self)

    def parse_intermixed_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        return super().parse_intermixed_args(separate_hpu(sys.argv[1:] if args is None else args), namespace)

    def add_weights(self, required: bool = True) -> None:
        """--weights with --cfg and --names."""
        add = self.add_argument
        add(
            "--weights",
            type=Path,
            required=required,
            metavar="FILE",
            help="checkpoint .pt, Darknet .weights, or exported .onnx",
        )
        add(
            "--cfg",
            type=Path,
            metavar="FILE",
            help="description of the Darknet network (default: YOLOv3 of the settings)",
        )
        add("--names", type=Path, metavar="FILE", help="class names of Darknet weights, one per line")

    def add_output(self) -> None:
        """--output and --show."""
        self.add_argument(
            "--output", type=Path, metavar="DIRECTORY", help="where results go (default: new, below logs/)"
        )
        self.add_argument("--show", action="store_true", help="show the pictures in a window too")


def device_flags(arguments: argparse.Namespace) -> list[Flag]:
    """The settings that the flags of a command line stand for; of the device alone where a script has no others."""
    return settings_flags(arguments, DEFAULTS)
