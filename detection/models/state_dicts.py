"""State dicts from files: found in what a file holds, and compared with what a network expects."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detection.errors import CheckpointError
from detection.foreign_files import clean

NAMES_SHOWN = 3  # in an error about tensors that do not fit


def check_fit(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Check the names and shapes of a state.

    Raises:
        CheckpointError: tensors are missing, unknown or of another shape; names the first of each kind.
    """
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    missing = [name for name in expected if name not in state]
    foreign = [clean(name) for name in state if name not in expected]
    parts = [
        f"{len(found)} {kind}: {', '.join(found[:NAMES_SHOWN])}{', ...' if len(found) > NAMES_SHOWN else ''}"
        for kind, found in (("missing", missing), ("unknown", foreign), ("of another shape", shapes))
        if found
    ]
    if parts:
        raise CheckpointError(f"{source} does not fit this network; tensors {'; '.join(parts)}")


def find_state(content: Any) -> dict[str, Tensor] | None:
    """Return the state dict in the content of a file, possibly under "state_dict" or "model"; None: there is none."""
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        return None
    return content if all(isinstance(name, str) for name in content) else None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file; CheckpointError if that fails."""
    from safetensors import SafetensorError  # a dependency of timm
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None


def filters_of_no_class(rows: Tensor, count: int) -> Tensor:
    """Numbers of an output convolution's `count` filters that are not among the class rows (A, C)."""
    others = torch.ones(count, dtype=torch.bool)
    others[rows.flatten()] = False
    return others.nonzero()[:, 0]
