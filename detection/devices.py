"""Everything device-specific: choice, precision, gradient scaler, memory."""

import contextlib
import importlib.util
import platform
import resource
import time

import torch

from detection.errors import SettingsError


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
    if name == "auto":
        return torch.device(available[0])
    if name not in ("cuda" if other.startswith("cuda") else other for other in available) and name not in available:
        raise SettingsError(f"device {name!r} is not available here; available: {', '.join(available)}")
    return torch.device(name)


def _hpu_available() -> bool:
    # The package loads the driver when imported, so it is only touched where it is installed. Not run on hardware.
    if importlib.util.find_spec("habana_frameworks") is None:
        return False
    with contextlib.suppress(ImportError, AssertionError, OSError):
        import habana_frameworks.torch  # noqa: F401

        return bool(getattr(torch, "hpu").is_available())  # noqa: B009  (the import above adds it)
    return False


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


def build_scaler(device: torch.device, dtype: torch.dtype | None) -> torch.amp.GradScaler:
    """Loss scaling for fp16, a disabled scaler otherwise: bfloat16 has the range of float32."""
    return torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory in use so far: the device's for CUDA, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if platform.system() == "Darwin" else 1024  # bytes or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def matmul_rates(size: int, dtype: torch.dtype, device: torch.device, repeats: int) -> list[float]:
    """Floating point operations per second of square matrix products, the ceiling of a training step.

    Args:
        size: rows and columns.
        repeats: measured products, after one warm-up.
    """
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    rates = []
    for repeat in range(repeats + 1):
        started = time.perf_counter()
        (left @ right)[0, 0].item()  # reading a value waits for the device
        if repeat:
            rates.append(2 * size**3 / (time.perf_counter() - started))
    return rates
