import os
from typing import Any

import torch
from torch._dynamo import list_backends, register_backend
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import TorchFunctionMode

from habana_frameworks import record
from habana_frameworks.torch import hpu

record(f"import habana_frameworks.torch, PT_HPU_LAZY_MODE={os.environ.get('PT_HPU_LAZY_MODE')}")
torch.hpu = hpu


class OnTheCPU(TorchFunctionMode):
    """Wherever torch is told to use device hpu, it uses the CPU."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function is torch.device:  # the name itself stays
            return function(*arguments, **(keywords or {}))
        keywords = {key: to_cpu(value) for key, value in (keywords or {}).items()}
        result = function(*map(to_cpu, arguments), **keywords)
        if function is torch.Tensor.backward:
            record("backward")
        return result


def to_cpu(value: Any) -> Any:
    is_hpu = str(value).startswith("hpu") if isinstance(value, str | torch.device) else False
    return torch.device("cpu") if is_hpu else value


class Autocast(torch.autocast):
    """Records what it is entered with; for the device hpu that of the CPU."""

    def __init__(self, device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: Any = None) -> None:
        self.event = f"autocast {device_type} {dtype}" if enabled else ""
        super().__init__("cpu" if device_type == "hpu" else device_type, dtype, enabled, cache_enabled)

    def __enter__(self) -> Any:
        if self.event:
            record(self.event)
        return super().__enter__()


def compile_graph(graph: Any, _: Any) -> Any:
    record("compiled a graph")
    return graph.forward


if "hpu_backend" not in list_backends():  # it stays when the package is removed and imported again
    register_backend(compile_graph, "hpu_backend")


def optimizer_stepped(*_: Any) -> None:
    record("optimizer")


ORIGINAL_AUTOCAST = torch.autocast
MODE = OnTheCPU()
MODE.__enter__()
torch.autocast = Autocast
HOOK = register_optimizer_step_post_hook(optimizer_stepped)


def remove() -> None:
    """For tests that go on in the same process."""
    MODE.__exit__(None, None, None)
    torch.autocast = ORIGINAL_AUTOCAST
    HOOK.remove()
    del torch.hpu
