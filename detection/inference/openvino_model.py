"""OpenVINO files as models: a .xml with its .bin beside it, or their folder."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detection.errors import CheckpointError, SettingsError
from detection.inference.exported_model import ExportedModel

NEEDED = "pip install 'openvino>=2026.0'"
SECTION = ["detection", "metadata"]  # of the file's runtime information


def require_openvino(path: Path) -> Any:
    """Import OpenVINO.

    Raises:
        SettingsError: it is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise SettingsError(f"{path}: {error}: OpenVINO files need: {NEEDED}") from None
    return openvino


class OpenVinoModel(ExportedModel):
    """Runs an OpenVINO file on the CPU.

    Raises:
        CheckpointError: missing, damaged, or without our metadata.
        SettingsError: openvino is not installed.
    """

    runtime = "OpenVINO"

    def __init__(self, path: Path) -> None:
        openvino = require_openvino(path)
        if not path.is_file():
            raise CheckpointError(f"OpenVINO file {path} {'is no file' if path.exists() else 'does not exist'}")
        if not path.with_suffix(".bin").is_file():
            raise CheckpointError(f"{path}: its weights {path.with_suffix('.bin').name} are not beside it")
        core = openvino.Core()
        try:
            model = core.read_model(path)
            metadata = json.loads(model.get_rt_info(SECTION).value) if model.has_rt_info(SECTION) else {}
            # Left to itself it computes in bfloat16 where the processor has it.
            hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
            compiled = core.compile_model(model, "CPU", {**hints, "PERFORMANCE_HINT": "LATENCY"})
        except Exception as error:  # noqa: BLE001  (its own classes, and those of its readers)
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{path} is not a usable OpenVINO file: {reason}") from None
        super().__init__(path, metadata, read_weights(model))
        self.compiled = compiled

    def compute(self, images: Tensor) -> list[Tensor]:
        results = self.compiled([images.numpy()])
        return [torch.from_numpy(results[output].copy()) for output in self.compiled.outputs]


def read_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield name and values of the real constants; a lone infinity is the open end of a range, as in Clamp."""
    for node in model.get_ops():
        if node.get_type_name() == "Constant" and node.get_element_type().is_real():
            values = torch.from_numpy(node.get_data().copy())
            if values.numel() > 1 or not values.isinf().any():
                yield node.get_friendly_name(), values


def save_openvino(onnx_file: Path, path: Path, metadata: dict[str, str], half: bool) -> None:
    """Convert an ONNX file with OpenVINO's own converter and write .xml and .bin.

    Args:
        half: store the weights in float16; they are computed with in float32.
    """
    openvino = require_openvino(path)
    model = openvino.Core().read_model(onnx_file)  # as `convert_model`, which also sends telemetry and waits for it
    model.set_rt_info(json.dumps(metadata), SECTION)
    openvino.save_model(model, path, compress_to_fp16=half)
