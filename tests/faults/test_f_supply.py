"""F: what is installed. tests/test_detect_and_export.py, test_downloads.py and test_settings.py have the rest."""

import functools
import importlib.machinery
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.fault_runs import Run


def hide(main: ModuleType, package: str) -> None:
    """As if the package were not installed."""
    for name in list(sys.modules):
        if name.split(".")[0] == package or name.startswith("torch.utils.tensorboard"):
            del sys.modules[name]
    find = importlib.machinery.PathFinder.find_spec

    def find_spec(name: str, *arguments: object) -> object:
        return None if name.split(".")[0] == package else find(name, *arguments)

    importlib.machinery.PathFinder.find_spec = find_spec


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("tensorboard", "TensorBoard is not installed: no event files"),
        ("onnx", ""),
        ("onnxruntime", ""),
        ("timm", ""),
        ("habana_frameworks", ""),
        ("matplotlib", ""),
        ("sklearn", ""),
    ],
)
def test_F03_training_needs_no_optional_package(
    train: Callable[..., Run], tmp_path: Path, package: str, line: str
) -> None:
    run = train("run", "train.steps=4", fault=functools.partial(hide, package=package))
    run.ends_with(0)
    assert line in run.out
    assert bool(list((tmp_path / "run").glob("events*"))) == (package != "tensorboard")


@pytest.mark.parametrize(
    ("package", "word", "message"),
    [
        ("timm", "model.backbone=timm/resnet18", "timm"),
        ("habana_frameworks", "run.device=hpu", "hpu"),
    ],
)
def test_F03_what_needs_a_missing_package_says_so_before_the_first_step(
    train: Callable[..., Run], package: str, word: str, message: str
) -> None:
    words = [word, "model.cfg=null"] if word.startswith("yolo") else [word]
    run = train("run", *words, fault=functools.partial(hide, package=package))
    run.ends_with(2, message)
    assert "from step 0" not in run.out
