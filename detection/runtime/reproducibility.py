"""Seeds, random streams and a report of the environment."""

import hashlib
import importlib.metadata
import platform
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPORTED_PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "albumentations",
    "opencv-python-headless",
    "pycocotools",
)


def seed_everything(seed: int) -> None:
    """Seed the global generators, used for weights and dropout-like layers; data and sizes do not depend on them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def sample_stream(seed: int, epoch: int, index: int, stream: int) -> np.random.Generator:
    """Build the generator of a stream (1, 2, ...) for one image in one epoch.

    Stream 0 would be equal to the generator without a stream, because seed sequences ignore trailing zeros.
    """
    return np.random.default_rng([seed, epoch, index, stream])


@contextmanager
def torch_stream(generator: np.random.Generator) -> Iterator[None]:
    """Context in which torch's global CPU generator is seeded from the given generator; restores it at the end.

    Not with `torch.manual_seed`, which would also change the accelerator's generator.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(generator.integers(2**63)))
        yield


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators, from which dropout-like layers draw, for one optimizer step of one process.

    The state depends on the arguments alone: a resumed run needs no stored state, and ranks never share a stream.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1))


def environment_report(device: str, precision: str) -> dict[str, Any]:
    """Collect what is needed to repeat or compare a run: command, hardware, versions and commit."""
    versions: dict[str, str | None] = {}
    for package in REPORTED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "command": sys.argv,
        "device": device,
        "precision": precision,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor_name(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "packages": versions,
        "commit": _commit(),
    }


def code_digest() -> str:
    """SHA-256 of the source of this package, which tells versions apart where there is no git."""
    package, digest = Path(__file__).resolve().parent.parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str | None:
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None
