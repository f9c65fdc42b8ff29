"""Everything device-specific but the process group: choice, modes, precision, gradient scaler, compiler, memory.

Nothing of Habana's (hpu) was run on hardware by us; `docs/hpu.md`.
"""

import contextlib
import importlib.util
import os
import platform
import resource
import shutil
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from detection.config.settings import RunSettings
from detection.errors import SettingsError
from detection.runtime.allocator import disable_malloc_trim, free_memory
from detection.runtime.habana import LAZY_MODE

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")  # torch accepts these two


def available_devices() -> list[str]:
    """What can be asked for here, best first."""
    names = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    names += ["hpu"] if _hpu_available() else []
    names += ["mps"] if torch.backends.mps.is_available() else []
    return [*names, "cpu"]


def choose_device(name: str) -> torch.device:
    """The device of a setting: auto | cpu | cuda | cuda:N | mps | hpu.

    Raises:
        SettingsError: it is not there; names what is. Never falls back silently.
    """
    available = available_devices()
    name = available[0] if name == "auto" else name
    if name == "cpu":
        disable_malloc_trim()
    if name not in ("cuda" if other.startswith("cuda") else other for other in available) and name not in available:
        reason = f" ({_hpu_failure})" if name == "hpu" and _hpu_failure else ""
        raise SettingsError(f"device {name!r} is not available here{reason}; available: {', '.join(available)}")
    return torch.device(name)


def open_device(run: RunSettings, name: str | None = None) -> torch.device:
    """The device of the settings, in the mode that they ask for.

    Args:
        name: instead of `run.device`, where each process takes its own.

    Raises:
        SettingsError: it is not there, or cannot be in that mode.
    """
    device = choose_device(name or run.device)
    check_lazy(device, run.lazy)
    if run.deterministic:
        make_deterministic(device)
    return device


_hpu_failure = ""  # why Habana's software, which is installed, cannot be used


def _hpu_available() -> bool:
    # The package loads the driver when imported, so it is only touched where it is installed.
    global _hpu_failure
    if importlib.util.find_spec("habana_frameworks") is None:
        return False
    try:
        import habana_frameworks.torch  # noqa: F401

        return bool(_hpu().is_available())
    # Built for another torch, or no driver.
    except (ImportError, AssertionError, OSError, RuntimeError) as error:
        _hpu_failure = f"habana_frameworks: {' '.join(str(error).split())[:200]}"
    return False


def _hpu() -> Any:
    """`torch.hpu`, which exists once Habana's software is imported."""
    return torch.hpu  # type: ignore[attr-defined]


def check_lazy(device: torch.device, lazy: bool) -> None:
    """Raises SettingsError where the mode was not, or cannot be, that of the setting."""
    if device.type != "hpu":
        if lazy:
            raise SettingsError(f"run.lazy (--lazy) is a mode of device hpu, this is {device}; say run.lazy=false")
        return
    wanted, found = str(int(lazy)), os.environ.get(LAZY_MODE)
    if found != wanted:
        raise SettingsError(
            f"run.lazy = {str(lazy).lower()} needs {LAZY_MODE}={wanted}, the environment has "
            f"{'no such variable' if found is None else found}; set it before Python starts, or change run.lazy"
        )


def mark_step_of(device: torch.device, lazy: bool) -> Callable[[], None]:
    """What to call where a collected graph should run: after each backward pass and after the optimizer.

    Only lazy mode collects; everywhere else it does nothing.
    """
    if device.type != "hpu" or not lazy:
        return lambda: None
    import habana_frameworks.torch.core

    return habana_frameworks.torch.core.mark_step


def make_deterministic(device: torch.device) -> None:
    """Refuse or avoid every kernel whose result varies from run to run. Before the device computes anything.

    Raises:
        SettingsError: the environment chooses a workspace of cuBLAS whose results vary.
    """
    if device.type == "cuda":
        workspace = os.environ.setdefault(CUBLAS_WORKSPACE, DETERMINISTIC_WORKSPACES[0])  # read at the first product
        if workspace not in DETERMINISTIC_WORKSPACES:
            raise SettingsError(
                f"run.deterministic: {CUBLAS_WORKSPACE}={workspace} in the environment is not deterministic; "
                f"unset it, or say {' or '.join(DETERMINISTIC_WORKSPACES)}"
            )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    if device.type == "hpu" and hasattr(_hpu(), "setDeterministic"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # later versions call it deprecated and follow torch's switch
            _hpu().setDeterministic(True)


GRAPHS_PER_SIZE = 2  # with the backbone frozen, and without
CUDA_GRAPHS = "reduce-overhead"  # the compiler's mode that records them


def compile_forward(model: nn.Module, device: torch.device, sizes: int = 1, mode: str | None = None) -> nn.Module:
    """The model with a compiled forward pass, one graph per input size; weights and buffers are the same tensors.

    Not one graph for all sizes: Inductor's backward pass of a convolution is made for one size even where all are
    called dynamic. Where the compiler would give up and run the rest without a graph, it raises an error instead.

    Args:
        sizes: how many input sizes there will be.
        mode: of torch.compile.

    Raises:
        SettingsError: the compiler needs a program that is not here.
    """
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise SettingsError(f"run.compile: on the CPU it needs a C++ compiler, and there is no {compiler} (CXX=...)")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise SettingsError("run.compile: on CUDA it needs the package triton, which is not installed")
    backend = "hpu_backend" if device.type == "hpu" else "inductor"
    options = torch._dynamo.config
    options.recompile_limit = max(options.recompile_limit, GRAPHS_PER_SIZE * sizes)
    options.fail_on_recompile_limit_hit = True
    return cast(nn.Module, torch.compile(model, backend=backend, dynamic=False, mode=mode))


def prepare_distributed(device_type: str) -> str:
    """Name of the backend for `init_process_group`; Habana's is registered by an import."""
    if device_type == "hpu":
        import habana_frameworks.torch.distributed.hccl  # noqa: F401

        return "hccl"
    return "nccl" if device_type == "cuda" else "gloo"


def pinning(device: torch.device) -> dict[str, Any]:
    """Arguments of a DataLoader: page-locked memory where copies to the device then need not be waited for."""
    if device.type == "hpu":
        return {"pin_memory": True, "pin_memory_device": "hpu"}
    return {"pin_memory": device.type == "cuda"}


def nms_device(device: torch.device) -> torch.device:
    """Where detections are picked: lists of changing length recompile graphs on HPU, and MPS lacks some operations."""
    return torch.device("cpu") if device.type in ("hpu", "mps") else device


def choose_precision(device: torch.device, name: str) -> torch.dtype | None:
    """Autocast type of a setting: auto | bf16 | fp16 | off; None means float32 throughout.

    Raises:
        SettingsError: fp16 on a device without a gradient scaler.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        if device.type == "cpu":
            return torch.bfloat16 if _cpu_has_bf16() else None
        return torch.bfloat16 if device.type == "hpu" else None
    if name == "fp16" and device.type != "cuda":
        raise SettingsError(
            f"run.precision = 'fp16' needs a CUDA device, this is {device.type}; allowed here: auto, bf16, off"
        )
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[name]


def _cpu_has_bf16() -> bool:
    """Whether matrix products in bfloat16 are a processor instruction; emulated ones are slower than float32."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") or capabilities.get("bf16"))


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told; nothing to wait for on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    elif device.type == "hpu":
        getattr(torch, "hpu").synchronize()  # noqa: B009  (the device's package adds it)


def max_chunk_elements(device: torch.device) -> int:
    """Values of an intermediate tensor above which it pays to compute it in pieces.

    On the CPU the C library takes larger blocks than 32 MiB anew from the system each time, which costs more than the
    computation (2^22 float32: 16 MiB); elsewhere it bounds the memory (2^27: 512 MiB).
    """
    return 2**22 if device.type == "cpu" else 2**27


def build_scaler(device: torch.device, dtype: torch.dtype | None) -> torch.amp.GradScaler:
    """Loss scaling for fp16, a disabled scaler otherwise: bfloat16 has the range of float32."""
    return torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory in use so far: the device's for CUDA and HPU; in use now for MPS; else the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "hpu":
        return _hpu().max_memory_allocated() / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    unit = 1 if platform.system() == "Darwin" else 1024  # bytes or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def available_memory(device: torch.device) -> int | None:
    """Bytes free on the device (for CPU and MPS: `host_memory.free_memory`)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "hpu":
        statistics = _hpu().memory_stats()
        return statistics["Limit"] - statistics["InUse"]
    return free_memory()


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "hpu":
        mode = "lazy" if os.environ.get(LAZY_MODE) == "1" else "eager"
        return f"{device} ({_hpu().get_device_name()}, {mode})"
    return f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)
