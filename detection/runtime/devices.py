"""Devices: selection, precision, memory format, determinism, compilation and memory, shared by all scripts.

The process group is in `distributed`. The Habana (hpu) code has not been run on hardware, see `docs/hpu.md`.
"""

import contextlib
import importlib.util
import os
import platform
import resource
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from detection.config.settings import RunSettings
from detection.contract import Detector
from detection.errors import SettingsError
from detection.runtime.allocator import free_memory
from detection.runtime.habana import LAZY_MODE

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")  # torch accepts these two


@dataclass(frozen=True)
class Machine:
    """A device and how networks run on it. Constructing one has no side effects; `open_machine` configures torch.

    Args:
        device: device of the network and its batches.
        dtype: type of autocast; None: float32 throughout.
        channels_last: whether weights are in channels-last memory format.
        lazy: whether an HPU collects operations into graphs that run at `mark_step`.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    channels_last: bool = False
    lazy: bool = False

    @property
    def precision(self) -> str:
        """Type of matrix products: "float32", "bfloat16" or "float16"."""
        return str(self.dtype or torch.float32).removeprefix("torch.")

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the autocast context for a forward pass and its loss."""
        return autocast(self.device, self.dtype)

    def build_scaler(self) -> torch.amp.GradScaler:
        """Build the gradient scaler, see `devices.build_scaler`."""
        return build_scaler(self.device, self.dtype)

    @property
    def mark_step(self) -> Callable[[], None]:
        """Function that runs the collected graph in lazy mode of an HPU; does nothing elsewhere."""
        return mark_step_of(self.device, self.lazy)

    def to_device(self, detector: Detector) -> Detector:
        """Move a detector to the device, with its weights in the configured memory format."""
        return detector.to(self.device, self.channels_last)


def machine_of(device: torch.device, run: RunSettings) -> Machine:
    """Combine a device with the settings of section `run`.

    Raises:
        SettingsError: the device does not support the precision or mode.
    """
    check_lazy(device, run.lazy)
    return Machine(device, choose_precision(device, run.precision), run.channels_last, run.lazy)


def open_machine(run: RunSettings, name: str | None = None) -> Machine:
    """Choose the device of the settings and configure torch; call once per process before anything is computed.

    Args:
        run: section `run` of the settings.
        name: replaces `run.device`, for processes with a device each.

    Raises:
        SettingsError: the device is absent, or does not support the precision or mode.
    """
    machine = machine_of(choose_device(name or run.device), run)
    if run.deterministic:
        make_deterministic(machine.device)
    return machine


def available_devices() -> list[str]:
    """List the devices of this machine, fastest kind first."""
    names = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    names += ["hpu"] if _hpu_available() else []
    names += ["mps"] if torch.backends.mps.is_available() else []
    return [*names, "cpu"]


def choose_device(name: str) -> torch.device:
    """Return the device of a setting: auto | cpu | cuda | cuda:N | mps | hpu. Never falls back silently.

    Raises:
        SettingsError: the device is absent; lists those that are available.
    """
    available = available_devices()
    name = available[0] if name == "auto" else name
    if name not in ("cuda" if other.startswith("cuda") else other for other in available) and name not in available:
        reason = f" ({_hpu_failure})" if name == "hpu" and _hpu_failure else ""
        raise SettingsError(f"device {name!r} is not available here{reason}; available: {', '.join(available)}")
    return torch.device(name)


_hpu_failure = ""  # why Habana's software is installed but unusable


def _hpu_available() -> bool:
    # Importing the package loads the driver, so that is only done if the package is installed.
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
    """Check `run.lazy` against the mode that Habana's software has read from the environment.

    Raises:
        SettingsError: they differ, or the device has no lazy mode.
    """
    if device.type != "hpu":
        if lazy:
            raise SettingsError(f"run.lazy (--lazy) is a mode of device hpu, this is {device}; set run.lazy=false")
        return
    wanted, found = str(int(lazy)), os.environ.get(LAZY_MODE)
    if found != wanted:
        raise SettingsError(
            f"run.lazy = {str(lazy).lower()} needs {LAZY_MODE}={wanted}, the environment has "
            f"{'no such variable' if found is None else found}; set it before Python starts, or change run.lazy"
        )


def mark_step_of(device: torch.device, lazy: bool) -> Callable[[], None]:
    """Return the function to call after each backward pass and optimizer step.

    In lazy mode of an HPU it runs the collected graph; elsewhere it does nothing.
    """
    if device.type != "hpu" or not lazy:
        return lambda: None
    import habana_frameworks.torch.core

    return habana_frameworks.torch.core.mark_step


def make_deterministic(device: torch.device) -> None:
    """Make torch use deterministic algorithms only; call before the device computes anything.

    Raises:
        SettingsError: the environment selects a cuBLAS workspace that is not deterministic.
    """
    if device.type == "cuda":
        workspace = os.environ.setdefault(CUBLAS_WORKSPACE, DETERMINISTIC_WORKSPACES[0])  # read at the first product
        if workspace not in DETERMINISTIC_WORKSPACES:
            raise SettingsError(
                f"run.deterministic: {CUBLAS_WORKSPACE}={workspace} in the environment is not deterministic; "
                f"unset it, or set it to {' or '.join(DETERMINISTIC_WORKSPACES)}"
            )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    if device.type == "hpu" and hasattr(_hpu(), "setDeterministic"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # later versions call it deprecated and follow torch's switch
            _hpu().setDeterministic(True)


GRAPHS_PER_SIZE = 2  # with the backbone frozen and unfrozen
CUDA_GRAPHS = "reduce-overhead"  # mode of `torch.compile` with CUDA graphs


def compile_forward(model: nn.Module, device: torch.device, sizes: int = 1, mode: str | None = None) -> nn.Module:
    """Compile the forward pass, one graph per input size; weights and buffers stay the same tensors.

    One graph for all sizes is not possible: Inductor specialises the backward pass of a convolution on its size even
    with dynamic shapes. If the compiler exceeds its recompilation limit, it raises instead of falling back to eager.

    Args:
        model: network whose inputs are images (B, 3, H, W).
        device: device of the model.
        sizes: number of input sizes that will occur.
        mode: mode of `torch.compile`.

    Raises:
        SettingsError: a C++ compiler (CPU) or triton (CUDA) is missing.
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
    """Return the backend for `init_process_group`, registered with torch.

    Raises:
        SettingsError: Habana's software lacks hccl.
    """
    if device_type == "hpu":
        reason = "it is not registered with torch"
        try:
            import habana_frameworks.torch.distributed.hccl  # noqa: F401  (registers the backend)
        except (ImportError, AssertionError, OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
        if not torch.distributed.is_backend_available("hccl"):
            raise SettingsError(f"several processes on device hpu need Habana's hccl, which is missing: {reason}")
        return "hccl"
    return "nccl" if device_type == "cuda" else "gloo"


def pins_memory(device: torch.device) -> bool:
    """Whether a DataLoader should pin its batches: copies from page-locked memory run beside the computation."""
    return device.type == "cuda" or (device.type == "hpu" and torch.accelerator.is_available())


def nms_device(device: torch.device) -> torch.device:
    """Return the device for NMS: the CPU for HPU, where varying lengths recompile graphs, and MPS, which lacks ops."""
    return torch.device("cpu") if device.type in ("hpu", "mps") else device


def choose_precision(device: torch.device, name: str) -> torch.dtype | None:
    """Return the autocast type of a setting: auto | bf16 | fp16 | off; None means float32 throughout.

    Raises:
        SettingsError: fp16 on a device without a gradient scaler.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        if device.type == "cpu":
            return None if emulates_bfloat16(device) else torch.bfloat16
        return torch.bfloat16 if device.type == "hpu" else None
    if name == "fp16" and device.type != "cuda":
        raise SettingsError(
            f"run.precision = 'fp16' needs a CUDA device, this is {device.type}; allowed here: auto, bf16, off"
        )
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[name]


def emulates_bfloat16(device: torch.device) -> bool:
    """Whether the device computes bfloat16 slower than float32: a processor without the instructions."""
    return device.type == "cpu" and not _cpu_has_bf16()


def _cpu_has_bf16() -> bool:
    """Whether the processor multiplies matrices in bfloat16; emulation is slower than float32."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") or capabilities.get("bf16"))


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Return the autocast context of a device; None: no autocast."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work; the CPU queues none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    elif device.type == "hpu":
        _hpu().synchronize()


def max_chunk_elements(device: torch.device) -> int:
    """Return the size, in elements, above which intermediate tensors are computed in chunks.

    On the CPU, blocks above 32 MiB are requested from the system each time, which costs more than the computation
    (2^22 float32: 16 MiB); elsewhere the limit bounds the memory (2^27: 512 MiB).
    """
    return 2**22 if device.type == "cpu" else 2**27


def build_scaler(device: torch.device, dtype: torch.dtype | None) -> torch.amp.GradScaler:
    """Build a gradient scaler, enabled for float16 only: bfloat16 has the range of float32."""
    return torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory in GiB: of CUDA or HPU, what the driver currently holds on MPS, the peak RSS on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "hpu":
        return _hpu().max_memory_allocated() / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    unit = 1 if platform.system() == "Darwin" else 1024  # bytes or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def available_memory(device: torch.device) -> int | None:
    """Return the free bytes of a device (CPU and MPS: `allocator.free_memory`); None: unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "hpu":
        statistics = _hpu().memory_stats()
        return statistics["Limit"] - statistics["InUse"]
    return free_memory()


def describe_device(device: torch.device) -> str:
    """Format a device for the log, with the model of the card, the HPU mode, or the number of threads."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "hpu":
        mode = "lazy" if os.environ.get(LAZY_MODE) == "1" else "eager"
        return f"{device} ({_hpu().get_device_name()}, {mode})"
    return f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)
