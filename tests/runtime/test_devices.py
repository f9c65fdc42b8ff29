"""Devices and precision, with the capabilities of other machines patched in."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from detection.errors import SettingsError, known_failure
from detection.runtime import devices
from detection.runtime.devices import (
    CUBLAS_WORKSPACE,
    autocast,
    available_devices,
    build_scaler,
    choose_device,
    choose_precision,
    describe_device,
    open_machine,
    peak_memory_gib,
)

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch) -> Callable[..., None]:
    """Pretend to be a machine with these accelerators."""

    def pretend(cuda: int = 0, hpu: bool = False, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(devices, "_hpu_available", lambda: hpu)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


# Choice


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "hpu", "mps"])
def test_absent_device_is_refused_with_what_there_is(machine, name: str) -> None:
    machine()
    with pytest.raises(SettingsError, match=rf"'{name}' is not available here; available: cpu$") as raised:
        choose_device(name)
    assert raised.value.exit_code == 2


def test_wrong_number_is_refused_with_what_there_is(machine) -> None:
    machine(cuda=2)
    assert choose_device("cuda").type == "cuda"  # any of them
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    for name in ("cuda:2", "cuda:10"):
        with pytest.raises(SettingsError, match=rf"'{name}' .*available: cuda:0, cuda:1, cpu$"):
            choose_device(name)


@pytest.mark.parametrize(
    ("accelerators", "expected"),
    [({}, "cpu"), ({"mps": True}, "mps"), ({"hpu": True, "mps": True}, "hpu"), ({"cuda": 3, "mps": True}, "cuda:0")],
)
def test_auto_takes_the_first_accelerator(machine, accelerators: dict[str, int], expected: str) -> None:
    machine(**accelerators)
    assert choose_device("auto") == torch.device(expected)
    assert available_devices()[-1] == "cpu" and choose_device("cpu") == CPU  # the CPU is always there


# Precision


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"amx_bf16": True, "avx2": True}, torch.bfloat16),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"bf16": True}, torch.bfloat16),  # ARM
        ({"avx2": True, "avx512_f": True, "amx_bf16": False, "avx512_bf16": False}, None),  # would be emulated
        ({}, None),
        (None, None),  # unknown: an older torch
    ],
)
def test_auto_on_a_cpu_is_bf16_only_where_the_processor_has_it(
    monkeypatch, capabilities: dict[str, bool] | None, expected: torch.dtype | None
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    if capabilities is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert choose_precision(CPU, "auto") is expected
    assert choose_precision(CPU, "bf16") is torch.bfloat16  # asked for: done, however slow
    assert choose_precision(CPU, "off") is None


@pytest.mark.parametrize(("supported", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_on_cuda_is_fp16_where_bf16_would_be_emulated(monkeypatch, supported: bool, expected: torch.dtype) -> None:
    # torch says True for every CUDA device unless emulation is excluded
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or supported
    )
    assert choose_precision(torch.device("cuda"), "auto") is expected
    assert choose_precision(torch.device("cuda"), "fp16") is torch.float16
    assert choose_precision(torch.device("cuda"), "off") is None


@pytest.mark.parametrize(("device", "expected"), [("hpu", torch.bfloat16), ("mps", None)])
def test_auto_elsewhere(device: str, expected: torch.dtype | None) -> None:
    assert choose_precision(torch.device(device), "auto") is expected


@pytest.mark.parametrize("device", ["cpu", "mps", "hpu"])
def test_fp16_is_refused_where_there_is_no_scaler(device: str) -> None:
    with pytest.raises(SettingsError, match=rf"'fp16' needs a CUDA device, this is {device}; allowed here: ") as raised:
        choose_precision(torch.device(device), "fp16")
    assert raised.value.exit_code == 2


# What the choice does


def test_autocast_computes_in_the_chosen_type() -> None:
    weight, x = torch.rand(3, 3), torch.rand(2, 3)
    with autocast(CPU, torch.bfloat16):
        assert (x @ weight).dtype is torch.bfloat16
    with autocast(CPU, None):
        result = x @ weight
    assert result.dtype is torch.float32
    # 1 + 2^-10 needs ten bits after the point; bfloat16 has seven, float32 has 23.
    fine = torch.tensor([[1 + 2.0**-10]])
    with autocast(CPU, torch.bfloat16):
        assert (fine @ torch.ones(1, 1)).item() == 1.0
    with autocast(CPU, None):
        assert (fine @ torch.ones(1, 1)).item() == 1 + 2.0**-10


def test_off_also_switches_an_outer_autocast_off() -> None:
    with autocast(CPU, torch.bfloat16), autocast(CPU, None):
        assert (torch.rand(2, 2) @ torch.rand(2, 2)).dtype is torch.float32


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_scaler_is_off_without_fp16(dtype: torch.dtype | None) -> None:
    assert build_scaler(CPU, torch.float16).is_enabled()
    scaler = build_scaler(CPU, dtype)
    assert not scaler.is_enabled()
    assert scaler.scale(torch.tensor(3.0)).item() == 3.0
    assert scaler.state_dict() == {}  # nothing that a checkpoint would have to keep


def test_peak_memory_is_what_the_system_says() -> None:
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("no /proc here")
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    assert peak is not None
    expected = int(peak[1]) / 2**20  # KiB to GiB
    assert peak_memory_gib(CPU) == pytest.approx(expected, rel=0.02)


def test_description_names_the_device(monkeypatch) -> None:
    assert describe_device(CPU) == f"cpu ({torch.get_num_threads()} threads)"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Name of the card")
    assert describe_device(torch.device("cuda", 1)) == "cuda:1 (Name of the card)"


# Deterministic algorithms


@pytest.fixture
def restored_switches() -> Iterator[None]:
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


def test_deterministic_is_a_switch_of_the_settings(restored_switches, default_settings) -> None:
    assert open_machine(default_settings("run.device=cpu").run).device == CPU
    assert not torch.are_deterministic_algorithms_enabled()
    assert open_machine(default_settings("run.device=cpu", "run.deterministic=true").run).device == CPU
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark


def test_cublas_gets_a_workspace_that_repeats(restored_switches, machine, monkeypatch, default_settings) -> None:
    machine(cuda=2)
    run = default_settings("run.device=auto", "run.deterministic=true", "run.precision=off").run
    monkeypatch.setenv(CUBLAS_WORKSPACE, ":0:0")
    with pytest.raises(SettingsError, match=r"^run.deterministic: CUBLAS_WORKSPACE_CONFIG=:0:0 .* or :16:8$"):
        open_machine(run)
    monkeypatch.delenv(CUBLAS_WORKSPACE)
    assert open_machine(run, "cuda:1").device == torch.device("cuda", 1)
    assert os.environ[CUBLAS_WORKSPACE] == ":4096:8"


def test_a_kernel_without_a_deterministic_form_is_one_line() -> None:
    error = known_failure(
        RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you set ..."), ""
    )
    assert isinstance(error, SettingsError)
    assert error.line.startswith("run.deterministic: cumsum_cuda_kernel does not have a deterministic implementation; ")
