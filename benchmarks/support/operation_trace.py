"""Which operations run, and which of them make the host wait for the device: for tests and benchmarks."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that need a value, or a count of values, from the device.
READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique", "unique")
# These copy to the host without any operation that could be seen below.
METHODS = {getattr(Tensor, name) for name in ("cpu", "numpy", "tolist", "__array__")}


class OperationTrace(TorchDispatchMode):
    """`with OperationTrace() as trace:` names every operation inside, views and the backward pass too.

    It sees on the CPU what would make the host wait for an accelerator, but for host copies by `.to`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.host_reads: list[str] = []
        self._methods = _MethodTrace(self.host_reads)

    def __enter__(self) -> "OperationTrace":
        self._methods.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._methods.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.operations.append(str(func))
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if by_mask or name.startswith(READS):
            self.host_reads.append(str(func))
        return func(*args, **(kwargs or {}))


class _MethodTrace(TorchFunctionMode):
    def __init__(self, host_reads: list[str]) -> None:
        super().__init__()
        self.host_reads = host_reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in METHODS:
            self.host_reads.append(func.__name__)
        return func(*args, **(kwargs or {}))
