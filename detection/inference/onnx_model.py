"""ONNX files as models, run by ONNX Runtime."""

from pathlib import Path

import torch
from torch import Tensor

from detection.errors import CheckpointError, SettingsError
from detection.inference.exported_model import ExportedModel

NEEDED = "pip install onnx onnxscript onnxruntime"


class OnnxModel(ExportedModel):
    """Runs an ONNX file.

    Raises:
        CheckpointError: missing, damaged, or without our metadata.
        SettingsError: onnxruntime is not installed.
    """

    runtime = "ONNX Runtime"

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise SettingsError(f"{path}: {error}: ONNX files need: {NEEDED}") from None
        if not path.is_file():
            raise CheckpointError(f"ONNX file {path} {'is no file' if path.exists() else 'does not exist'}")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what it would print is in the exception
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001  (a class of its own for each of its status codes)
            raise CheckpointError(f"{path} is not a usable ONNX file: {' '.join(str(error).split())[:200]}") from None
        super().__init__(path, session.get_modelmeta().custom_metadata_map)
        self.session = session

    def use_device(self, name: str) -> str:
        """Select the device of a `run.device` setting; returns the one in use (`auto` is the CPU).

        Raises:
            SettingsError: ONNX Runtime has no such device here.
        """
        if name in ("auto", "cpu"):
            return "cpu"
        provider = "CUDAExecutionProvider"
        if name.startswith("cuda"):
            import onnxruntime

            if provider in onnxruntime.get_available_providers():
                self.session.set_providers([(provider, {"device_id": int(name.partition(":")[2] or 0)})])
            if provider in self.session.get_providers():  # without its libraries it is left out silently
                return name
        raise SettingsError(
            f"device {name!r}: ONNX Runtime runs {self.path} on cpu, and on cuda where the package onnxruntime-gpu and "
            "its CUDA libraries are installed"
        )

    def compute(self, images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(output) for output in self.session.run(None, {"images": images.numpy()})]
