"""Host memory: how much this process may still allocate, and how the C library keeps freed memory."""

import ctypes
import os
import platform
from collections.abc import Iterator
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
OWN_GROUPS, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Files of a control group, version 2 and 1: limit, usage, and the field of memory.stat that can be reclaimed at once.
GROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # from malloc.h of the GNU C library
MEMORY_AHEAD = 2**26  # bytes


def disable_malloc_trim() -> None:
    """Let this process reuse freed memory instead of returning it to the system.

    By default the GNU C library maps fresh, zeroed pages for each large tensor, which takes a fifth of a training step
    on the CPU (Darknet-53, batches of 8). In return, memory is never given back, and inputs of many sizes fragment it
    (a fifth more in multiscale training). Does nothing with another C library, or if the environment configures the
    allocator (MALLOC_..., GLIBC_TUNABLES).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.system() == "Linux" else None
    if mallopt is None or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(M_TOP_PAD, MEMORY_AHEAD)


def free_memory() -> int | None:
    """Return the bytes that this process may still allocate within the limits of its cgroups; None: unknown."""
    free: int | None
    try:
        fields = dict(line.split(":") for line in MEMINFO.read_text(encoding="ascii").splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
    if free is None:
        return None
    return min([free, *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    """Yield the bytes left in each control group of this process that has a limit, including outer groups."""
    for directory in _own_groups():
        for limit, use, inactive in GROUP_FILES:
            try:
                maximum, used = int((directory / limit).read_text()), int((directory / use).read_text())
                statistics = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
                yield max(maximum - used + int(statistics.get(inactive, 0)), 0)
            except (OSError, ValueError):  # no such file, or the limit is "max"
                continue


def _own_groups() -> Iterator[Path]:
    try:
        lines = OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = GROUPS / controllers
        inner = root / path.lstrip("/")
        # Inside a container the path may be that of the host, of which only the last part, `root`, is visible.
        for directory in (inner, *inner.parents):
            if directory.is_relative_to(root):
                yield directory
