"""What the command lines of all scripts share."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

DEFAULTS = Path(__file__).resolve().parent.parent / "yolo-v3" / "args.yaml"


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
            group = self.add_mutually_exclusive_group()
            group.add_argument("--gpu", type=int, metavar="N", help="CUDA device N")
            group.add_argument("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N, mps or hpu")

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


def device_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """--device and --gpu as a setting; nothing for a script without them."""
    gpu, device = getattr(arguments, "gpu", None), getattr(arguments, "device", None)
    if gpu is not None:
        return {"run.device": f"cuda:{gpu}"}
    return {} if device is None else {"run.device": device}
