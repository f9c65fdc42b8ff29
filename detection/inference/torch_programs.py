"""TorchScript and torch.export files as models, run by PyTorch without this program's network code."""

import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detection.errors import CheckpointError
from detection.inference.exported_model import ExportedModel

METADATA = "detection.json"  # its entries in a file inside the archive


def read_program(path: Path, kind: str, load: Callable[[dict[str, str]], Any]) -> tuple[Any, dict[str, str]]:
    """Load an archive of torch and the metadata in it.

    Args:
        kind: for messages.
        load: gets a dict whose values are to be filled with the files of its keys.

    Raises:
        CheckpointError: the file is missing or damaged, or has no metadata of export.py.
    """
    if not path.is_file():
        raise CheckpointError(f"{kind} file {path} {'is no file' if path.exists() else 'does not exist'}")
    refuse_foreign(path, kind)
    extra = {METADATA: ""}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit calls itself deprecated; the format is what a user asked for
            program = load(extra)
        metadata = json.loads(extra[METADATA])
    except Exception as error:  # noqa: BLE001  (torch's readers raise whatever their parts raise)
        raise CheckpointError(f"{path} is not a usable {kind} file: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: its metadata is damaged: no JSON object in {METADATA}")
    return program, metadata


def refuse_foreign(path: Path, kind: str) -> None:
    """Look for the metadata before anything else of a file is loaded.

    Raises:
        CheckpointError: the file is no archive, or another program wrote it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is not a usable {kind} file: {error}") from None
    if not any(name.rpartition("/")[2] == METADATA for name in names):
        raise CheckpointError(f"{path} has no metadata of export.py: only files that it wrote can be read here")


class _ProgramModel(ExportedModel):
    """Runs a loaded program, which is kept out of the modules of this one: its tensors are no parameters here."""

    run: Callable[[Tensor], Any]

    def __init__(self, path: Path, kind: str, load: Callable[[dict[str, str]], Any]) -> None:
        program, metadata = read_program(path, kind, load)
        super().__init__(path, metadata, program.state_dict().items())
        object.__setattr__(self, "run", program)

    @torch.no_grad()
    def compute(self, images: Tensor) -> list[Tensor]:
        return list(self.run(images))


class TorchScriptModel(_ProgramModel):
    """Runs a TorchScript file; see `read_program` for its errors."""

    runtime = "TorchScript"

    def __init__(self, path: Path) -> None:
        super().__init__(path, self.runtime, lambda extra: torch.jit.load(str(path), "cpu", _extra_files=extra))


class ExportedProgramModel(_ProgramModel):
    """Runs a torch.export file (.pt2); see `read_program` for its errors."""

    runtime = "torch.export"

    def __init__(self, path: Path) -> None:
        super().__init__(path, self.runtime, lambda extra: torch.export.load(path, extra_files=extra).module())


def save_torchscript(module: torch.nn.Module, images: Tensor, path: Path, metadata: dict[str, str]) -> None:
    """Trace a module with images and write it with its metadata."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of each Python number that a trace keeps; the comparison judges the result
        traced = torch.jit.trace(module, (images,), check_trace=False)
        torch.jit.save(traced, str(path), _extra_files={METADATA: json.dumps(metadata)})


def save_exported_program(
    module: torch.nn.Module, images: Tensor, sizes: dict[int, Any], path: Path, metadata: dict[str, str]
) -> None:
    """Export a module with torch.export and write it with its metadata.

    Args:
        sizes: dynamic dimensions of the images.
    """
    with torch.no_grad():
        program = torch.export.export(module, (images,), dynamic_shapes={"images": sizes})
    torch.export.save(program, path, extra_files={METADATA: json.dumps(metadata)})
