"""Host memory: limits of control groups, and reuse of freed memory."""

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from detection.data import workers
from detection.runtime import allocator as host_memory
from detection.runtime.allocator import disable_malloc_trim, free_memory
from detection.runtime.devices import available_memory

MIB = 2**20

# Freed memory

FAULTS = """
import resource, torch
from detection.runtime.allocator import disable_malloc_trim
disable_malloc_trim()
def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def like_a_step():
    tensors = [torch.ones(2**20 * mib // 4) for mib in (12, 36, 20, 80)]
for _ in range(8):  # until the gaps that early steps leave are large enough
    like_a_step()
before = page_faults()
for _ in range(5):
    like_a_step()
print(page_faults() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not GNU's")
def test_freed_memory_is_used_again_unless_the_environment_says_otherwise() -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}

    def faults(**more: str) -> int:
        words = [sys.executable, "-c", FAULTS]
        return int(subprocess.run(words, env={**plain, **more}, capture_output=True, text=True, check=True).stdout)

    # 148 MiB in pages of 4 KiB, five times; the library's own rules keep a little of it. In one address layout of four,
    # which the kernel draws anew for each process, 48 MiB find no gap.
    limit = faults(MALLOC_ARENA_MAX="8") / 4
    assert any(faults() < limit for _ in range(6))


def test_what_the_c_library_is_told(monkeypatch) -> None:
    calls: list[tuple[int, int]] = []

    class Library:
        def __init__(self, _: Any) -> None:
            self.mallopt = lambda name, value: calls.append((name, value))

    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(ctypes, "CDLL", Library)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    disable_malloc_trim()
    # M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD of malloc.h
    assert calls == [(-4, 0), (-1, 2**31 - 1), (-2, 64 * MIB)]
    calls.clear()
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    disable_malloc_trim()
    monkeypatch.delenv("GLIBC_TUNABLES")
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    disable_malloc_trim()
    assert not calls


def test_loaders_and_their_workers_do_it_too(monkeypatch) -> None:
    calls: list[None] = []
    monkeypatch.setattr(workers, "disable_malloc_trim", lambda: calls.append(None))
    monkeypatch.setattr(workers.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    workers.prepare_worker(0)
    workers.prepare_process()
    assert len(calls) == 2


# Free memory


@pytest.fixture
def machine(tmp_path: Path, monkeypatch) -> Path:
    """Machine with 1,000 MiB free and no control groups; tests create these below the returned directory."""
    (tmp_path / "meminfo").write_text("MemTotal: 2048000 kB\nMemAvailable: 1024000 kB\n")
    monkeypatch.setattr(host_memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(host_memory, "GROUPS", tmp_path / "groups")
    return tmp_path


def group(directory: Path, names: tuple[str, str, str], limit: int | str, used: int, inactive: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used), strict=False):
        (directory / name).write_text(f"{value}\n")
    (directory / "memory.stat").write_text(f"anon 5\n{names[2]} {inactive}\nslab 7\n")


VERSION_2 = ("memory.max", "memory.current", "inactive_file")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def test_without_limits_the_machine_counts(machine: Path) -> None:
    assert free_memory() == 1000 * MIB == available_memory(torch.device("cpu"))
    (machine / "own").write_text("0::/\n")
    group(machine / "groups", VERSION_2, "max", 700 * MIB, 0)
    assert free_memory() == 1000 * MIB


def test_the_narrowest_group_counts(machine: Path) -> None:
    (machine / "own").write_text("0::/slurm/job_7/step_0\n")
    group(machine / "groups/slurm/job_7/step_0", VERSION_2, "max", 1, 0)
    group(machine / "groups/slurm/job_7", VERSION_2, 500 * MIB, 300 * MIB, 100 * MIB)
    group(machine / "groups/slurm", VERSION_2, 5000 * MIB, 300 * MIB, 0)
    assert free_memory() == 300 * MIB  # 500 - 300 + 100 that can be taken back
    group(machine / "groups/slurm/job_7", VERSION_2, 200 * MIB, 300 * MIB, 0)
    assert free_memory() == 0


def test_a_container_sees_its_group_as_the_root(machine: Path) -> None:
    (machine / "own").write_text("0::/docker/8f1b\n")  # the path is the host's
    group(machine / "groups", VERSION_2, 400 * MIB, 100 * MIB, 0)
    assert free_memory() == 300 * MIB


def test_groups_of_version_1(machine: Path) -> None:
    (machine / "own").write_text("5:cpu,cpuacct:/job\n4:memory:/job\n0::/elsewhere\n")
    group(machine / "groups/memory/job", VERSION_1, 400 * MIB, 150 * MIB, 50 * MIB)
    group(machine / "groups/job", VERSION_1, 1 * MIB, 0, 0)  # no group of the memory
    assert free_memory() == 300 * MIB
