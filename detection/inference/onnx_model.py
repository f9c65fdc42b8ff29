"""ONNX files as models, run by ONNX Runtime."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detection.errors import CheckpointError, SettingsError
from detection.inference.exported_model import ExportedModel

NEEDED = "pip install onnx onnxscript onnxruntime"

# Numbers of fields in onnx.proto, and its codes of floating types.
GRAPH, INITIALIZER = 7, 5
DATA_TYPE, FLOAT_DATA, NAME, RAW_DATA = 2, 4, 8, 9
VARINT, LENGTH_DELIMITED, FIXED = 0, 2, {1: 8, 5: 4}  # kinds of values in protobuf; bytes of the fixed ones
FLOATS = {1: torch.float32, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16}


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
        super().__init__(path, session.get_modelmeta().custom_metadata_map, read_weights(path))
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


def read_weights(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield name and values, flat, of the floating-point initializers of an ONNX file that ONNX Runtime can read.

    ONNX Runtime does not hand them out, and the package onnx is only needed to export. A lone infinity is left out: it
    is the open end of a range, as in Clip.

    Raises:
        CheckpointError: a field has no encoding of today's protobuf.

    Source: https://protobuf.dev/programming-guides/encoding/ and onnx/onnx.proto
    """
    try:
        yield from _weights_of(memoryview(path.read_bytes()))
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a usable ONNX file: its weights cannot be read: {error!r}") from None


def _weights_of(model: memoryview) -> Iterator[tuple[str, Tensor]]:
    graphs = [value for number, value in read_fields(model) if number == GRAPH]  # several are parts of one
    for number, value in (field for graph in graphs for field in read_fields(graph)):
        if number != INITIALIZER:
            continue
        fields = dict(read_fields(value))
        data = bytearray(fields.get(RAW_DATA) or fields.get(FLOAT_DATA) or b"")
        if data and fields[DATA_TYPE] in FLOATS:
            values = torch.frombuffer(data, dtype=FLOATS[fields[DATA_TYPE]])
            if len(values) > 1 or not values.isinf():
                yield bytes(fields[NAME]).decode(errors="replace"), values


def read_fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """Yield number and value of the fields of a protobuf message: an integer, or the bytes."""
    position = 0

    def read_integer() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(message):
        number, kind = divmod(read_integer(), 8)
        if kind == VARINT:
            yield number, read_integer()
            continue
        length = read_integer() if kind == LENGTH_DELIMITED else FIXED[kind]
        yield number, message[position : position + length]
        position += length
