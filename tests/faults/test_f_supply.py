"""F: what is installed. test_export.py, test_downloads.py and test_settings.py have the rest."""

import functools
import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType

import pytest

OPTIONAL = ("tensorboard", "onnx", "onnxruntime", "timm", "habana_frameworks", "matplotlib", "sklearn")


def hide(main: ModuleType, packages: tuple[str, ...]) -> None:
    """As if the packages were not installed."""
    for name in list(sys.modules):
        if name.split(".")[0] in packages or name.startswith("torch.utils.tensorboard"):
            del sys.modules[name]
    find = importlib.machinery.PathFinder.find_spec

    def find_spec(name: str, *arguments: object) -> object:
        return None if name.split(".")[0] in packages else find(name, *arguments)

    importlib.machinery.PathFinder.find_spec = find_spec


def test_F03_training_needs_no_optional_package(train, tmp_path: Path) -> None:
    run = train("run", "train.steps=4", fault=functools.partial(hide, packages=OPTIONAL))
    run.ends_with(0)
    assert "TensorBoard is not installed: no event files" in run.out
    assert not list((tmp_path / "run").glob("events*"))


@pytest.mark.parametrize(
    ("package", "word", "message"),
    [("timm", "model.backbone=timm/resnet18", "timm"), ("habana_frameworks", "run.device=hpu", "hpu")],
)
def test_F03_what_needs_a_missing_package_says_so_before_the_first_step(
    train, package: str, word: str, message: str
) -> None:
    words = [word, "model.cfg=null"] if word.startswith("model") else [word]
    run = train("run", *words, fault=functools.partial(hide, packages=(package,)))
    run.ends_with(2, message)
    assert "from step 0" not in run.out
