"""Files of export.py by their suffix."""

from collections.abc import Callable
from pathlib import Path

from detection.inference.exported_model import ExportedModel
from detection.inference.onnx_model import OnnxModel
from detection.inference.openvino_model import OpenVinoModel
from detection.inference.torch_programs import ExportedProgramModel, TorchScriptModel

EXPORTED: dict[str, Callable[[Path], ExportedModel]] = {
    ".onnx": OnnxModel,
    ".torchscript": TorchScriptModel,
    ".pt2": ExportedProgramModel,
    ".xml": OpenVinoModel,
}


def open_exported(path: Path) -> ExportedModel:
    """Open a file of export.py; its errors are those of the class for its suffix, which must be one of `EXPORTED`."""
    return EXPORTED[path.suffix.lower()](path)
