"""Training and use of YOLO-family detectors. `from detection import load_detector` is all that using one needs."""

from typing import Any

__all__ = ["load_detector"]


def __getattr__(name: str) -> Any:
    # On demand: importing the package or its settings must not import torch.
    if name == "load_detector":
        from detection.inference.detector import load_detector

        return load_detector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
