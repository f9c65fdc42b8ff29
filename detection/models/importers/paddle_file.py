"""Read PaddlePaddle's .pdparams files, a pickle of arrays by name, without running anything that the file names."""

import math
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detection.errors import CheckpointError
from detection.foreign_files import clean

NAME_TABLE = "StructuredToParameterName@@"  # a dict of names that Paddle may add to the arrays
KINDS = {
    f"{kind}{size}" for kind, sizes in {"f": (2, 4, 8), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8)}.items() for size in sizes
}
ARRAY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")


class _Type:
    """What a pickle says of an array's type: kind with size, and byte order."""

    def __init__(self, kind: Any, *flags: Any) -> None:
        if kind not in KINDS:
            raise pickle.UnpicklingError(f"array of the type {clean(str(kind))}")
        self.kind, self.order = kind, "<"

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("malformed array type")
        self.order = state[1]


class _Array:
    """What a pickle says of an array; becomes one only after its size was compared with its bytes."""

    def __init__(self, *arguments: Any) -> None:
        self.values: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("malformed array")
        _, shape, kind, columns_first, data = state
        data = data.encode("latin-1") if isinstance(data, str) else data  # Python 2
        whole = isinstance(shape, tuple) and all(type(side) is int and side >= 0 for side in shape)
        if not whole or not isinstance(kind, _Type) or not isinstance(data, bytes):
            raise pickle.UnpicklingError("malformed array")
        if math.prod(shape) * int(kind.kind[1:]) != len(data):
            raise pickle.UnpicklingError(f"array of {shape} in {len(data)} bytes")
        flat = np.frombuffer(data, dtype=kind.order.replace("|", "=") + kind.kind)
        self.values = flat.reshape(shape, order="F" if columns_first else "C")


def _bytes_of(text: Any, encoding: Any = None) -> bytes:
    """`_codecs.encode(text, "latin1")`, as which protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("malformed bytes")
    return text.encode("latin-1")


def _no_bytes() -> bytes:
    """`bytes()`, as which protocol 2 writes empty ones."""
    return b""


class _Unpickler(pickle.Unpickler):
    """Knows stand-ins for the few names that a pickle of arrays needs; every other name is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ARRAY_MODULES and name == "_reconstruct":
            return _Array
        # the array class is only an argument of `_reconstruct`
        known = {"numpy.ndarray": _Array, "numpy.dtype": _Type, "_codecs.encode": _bytes_of}
        known |= {"builtins.bytes": _no_bytes, "__builtin__.bytes": _no_bytes}
        known |= {"collections.OrderedDict": OrderedDict, "builtins.tuple": tuple, "__builtin__.tuple": tuple}
        if (found := known.get(f"{module}.{name}")) is not None:
            return found
        raise pickle.UnpicklingError(f"names {clean(f'{module}.{name}')}, which no array needs")


def read_pdparams(path: Path) -> dict[str, Tensor]:
    """Read the arrays of a file by name; Paddle's table of other names is left out.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or holds anything but arrays.
    """
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file).load()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # noqa: BLE001  (damaged pickles raise at least ten types)
        raise CheckpointError(
            f"{path} is no .pdparams file of arrays: {clean(str(error)) or type(error).__name__}"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no .pdparams file of arrays: it holds a {type(content).__name__}")
    state: dict[str, Tensor] = {}
    for name, value in content.items():
        if name == NAME_TABLE:
            continue
        if isinstance(value, tuple) and len(value) == 2:  # as Paddle writes single tensors: (name, array)
            value = value[1]
        if not isinstance(name, str) or not isinstance(value, _Array) or value.values is None:
            raise CheckpointError(f"{path} is no .pdparams file of arrays: {clean(str(name))} is none")
        state[name] = torch.from_numpy(value.values.astype(value.values.dtype.newbyteorder("=")))
    return state
