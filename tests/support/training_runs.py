"""The training script as a module, and comparison of checkpoints."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.support.paths import MAIN


def first_difference(first: Any, second: Any, where: str = "") -> str | None:
    """Path of the first value in which two checkpoints differ; tensors must be equal."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        same = first.dtype == second.dtype and first.shape == second.shape and torch.equal(first, second)
        return None if same else where
    if type(first) is not type(second):
        return f"{where}: {type(first)} and {type(second)}"
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return f"{where}: keys {first.keys() ^ second.keys()}"
        pairs: Any = ((first[key], second[key], f"{where}/{key}") for key in first)
    elif isinstance(first, list | tuple):
        if len(first) != len(second):
            return f"{where}: lengths"
        pairs = ((*pair, f"{where}/{number}") for number, pair in enumerate(zip(first, second, strict=True)))
    else:
        return None if first == second else f"{where}: {first!r} and {second!r}"
    return next((found for pair in pairs if (found := first_difference(*pair)) is not None), None)


def rows_of(directory: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what no run repeats."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    measured = ("train/images_per_second", "train/wait_fraction")
    return [{key: value for key, value in row.items() if key not in measured} for row in rows]


def load_main() -> Any:
    """Import the script, once per process."""
    name = "yolo_v3_main"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, MAIN)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
