"""Checkpoints of tensors and plain values: written atomically with a digest, read with weights_only=True."""

import contextlib
import hashlib
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detection.errors import CheckpointError, OutputError
from detection.foreign_files import clean, describe_content, describe_file

FORMAT_VERSION = 3
READABLE_VERSIONS = (1, 2, 3)  # 1: no skipped steps; 2: the backbone was called encoder
DIGEST_KEY = "digest"
READ_HERE = (
    "this program reads its own checkpoints, Darknet's .weights, .onnx of export.py and what docs/weights.md lists"
)
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".tar")  # usual names of what torch.save writes
# A file may hold a tensor under several names (tied weights, an average), and small values in one byte each.
MOST_REPEATED, MOST_VALUES = 8, 1 << 20
DETECTOR_FIELDS = {"step": int, "settings": dict, "categories": dict, "model": dict}
RUN_FIELDS = {**DETECTOR_FIELDS, "data_digest": str, "progress": dict, "optimizer": dict}


def save_checkpoint(path: Path, content: dict[str, Any], other_names: Sequence[str] = ()) -> None:
    """Write `content` with its digest; a reader sees the old file or the complete new one, never a part.

    The new file is written to a temporary name, synced to disk and read back before it replaces the old one.

    Args:
        other_names: further names of the file in the same directory, linked before `path` is replaced, so that the new
            `path` implies them.

    Raises:
        OutputError: the file cannot be written (disk full, no permission) or fails verification; the old file is
            untouched.
    """
    content = {"format": FORMAT_VERSION, **content}
    content[DIGEST_KEY] = content_digest(content)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        load_checkpoint(temporary)
        for name in other_names:
            link_file(temporary, path.with_name(name))
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except (OSError, RuntimeError, CheckpointError) as error:  # torch's zip writer reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OutputError(f"checkpoint {path} cannot be written: {' '.join(str(error).split())[:200]}") from None


def link_file(path: Path, name: Path) -> None:
    """Give a file a second name in the same directory in one step; a copy where the file system has no hard links."""
    temporary = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, name)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def remove_leftovers(directory: Path) -> None:
    """Remove temporary files of killed processes; this process must hold the lock of the directory."""
    for path in directory.glob("*.[0-9]*.tmp"):  # of `save_checkpoint`, `link_file` and `drawing.files.replacing`
        with contextlib.suppress(OSError):
            path.unlink()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU and verify its digest. Nothing in the file is ever executed.

    Raises:
        CheckpointError: missing, damaged, foreign, or of an unknown format version.
    """
    return verify_checkpoint(read_file(path), path)


def read_file(path: Path, usable: str = READ_HERE) -> Any:
    """Read the tensors and plain values of a `torch.save` file onto the CPU.

    Args:
        usable: end of the error about a foreign file: which files are read.

    Raises:
        CheckpointError: missing, damaged, or holds other objects.
    """
    try:
        declared = declared_bytes(path)
        if declared > path.stat().st_size:
            what = describe_file(path) or f"refused: it would unpack to {declared} bytes, more than it has"
            raise CheckpointError(f"{path} is {what}; {usable}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about foreign formats before it refuses them
            content = torch.load(path, map_location="cpu", weights_only=True)
        if not is_as_large_as_it_looks(content, path.stat().st_size):
            raise CheckpointError(f"{path} is refused: its content repeats itself to many times the size of the file")
        return content
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} does not exist") from None
    except Exception as error:  # noqa: BLE001  (damaged files raise at least eight types in torch and zipfile)
        if kind := describe_file(path):
            raise CheckpointError(f"{path} is {kind}; {usable}") from None
        if isinstance(error, pickle.UnpicklingError):
            what = (
                "holds objects other than tensors and plain values" if zipfile.is_zipfile(path) else "is no checkpoint"
            )
            raise CheckpointError(f"{path} {what} and is refused; {usable}") from None
        reason = f"{type(error).__name__} {clean(str(error))}".strip()
        raise CheckpointError(f"checkpoint {path} is damaged: {reason}") from None


def declared_bytes(path: Path) -> int:
    """Return what the entries of a zip archive unpack to; 0: no archive. `torch.save` does not compress."""
    if not zipfile.is_zipfile(path):
        return 0
    with zipfile.ZipFile(path) as archive:
        return sum(entry.file_size for entry in archive.infolist())


def is_as_large_as_it_looks(content: Any, size: int) -> bool:
    """Whether walking loaded content takes work in proportion to its file: lists and tensors can share their content.

    Args:
        size: of the file, in bytes.
    """
    values, most = 0, MOST_REPEATED * size + MOST_VALUES
    left = [content]
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            values += value.numel() * value.element_size()
        elif isinstance(value, dict):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            left += value
        values += 1
        if values + len(left) > most:
            return False
    return True


def is_checkpoint(content: Any) -> bool:
    """Whether the content of a file was written by `save_checkpoint`."""
    return isinstance(content, dict) and DIGEST_KEY in content and "format" in content


def verify_checkpoint(content: Any, path: Path) -> dict[str, Any]:
    """Check the digest and version of what `read_file` returned; returns the content without the digest.

    Raises:
        CheckpointError: damaged, foreign, or of an unknown format version.
    """
    if not is_checkpoint(content):
        raise CheckpointError(f"{path} is {describe_content(content)}; {READ_HERE}")
    expected = content.pop(DIGEST_KEY)
    try:
        digest = content_digest(content)
    except (TypeError, RuntimeError, ValueError):  # not written by `save_checkpoint`
        digest = None
    if digest is None or digest != expected:
        raise CheckpointError(f"checkpoint {path} is damaged: its content does not match its digest")
    if type(content["format"]) is not int or content["format"] not in READABLE_VERSIONS:
        versions = f"{READABLE_VERSIONS[0]} to {READABLE_VERSIONS[-1]}"
        raise CheckpointError(
            f"checkpoint {path} has format version {clean(str(content['format']))}, this program reads {versions}"
        )
    return upgrade_checkpoint(content)


def upgrade_checkpoint(content: dict[str, Any]) -> dict[str, Any]:
    """Rename the tensors of an older format version in place."""
    if content["format"] < 3:
        for key in ("model", "average"):
            if isinstance(state := content.get(key), dict):
                content[key] = {re.sub(r"^encoder\.", "backbone.", name): value for name, value in state.items()}
    return content


def load_fields(path: Path, fields: Mapping[str, type]) -> dict[str, Any]:
    """Load a checkpoint that must have some fields.

    Args:
        fields: names and types; `DETECTOR_FIELDS` or `RUN_FIELDS`.

    Raises:
        CheckpointError: as `load_checkpoint`, or a field is missing or of another type.
    """
    return check_fields(load_checkpoint(path), path, fields)


def check_fields(content: dict[str, Any], path: Path, fields: Mapping[str, type]) -> dict[str, Any]:
    """Check that the content of a checkpoint has some fields; returns it; arguments and errors as `load_fields`."""
    for name, kind in fields.items():
        if not isinstance(content.get(name), kind) or (kind is int and not is_count(content[name])):
            raise CheckpointError(
                f"checkpoint {path} is not of a training run: {name!r} is missing or no {kind.__name__}"
            )
    return content


def is_count(value: Any) -> bool:
    """Whether a value is a number of steps or images; larger ones are not exact in a float."""
    return type(value) is int and 0 <= value <= 1 << 53


def content_digest(content: Any) -> str:
    """SHA-256 over every key, type, shape and value, in order."""
    digest = hashlib.sha256()
    _feed(digest, content)
    return digest.hexdigest()


def _feed(digest: "hashlib._Hash", value: Any) -> None:
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        digest.update(f"tensor {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data if value.numel() else b"")
    elif isinstance(value, dict):
        digest.update(f"dict {len(value)}\n".encode())
        for key, inner in value.items():
            _feed(digest, key)
            _feed(digest, inner)
    elif isinstance(value, list | tuple):
        digest.update(f"list {len(value)}\n".encode())
        for inner in value:
            _feed(digest, inner)
    elif type(value) in (type(None), bool, int, float, str):  # not subclasses: np.float64 would not load again
        digest.update(f"{type(value).__name__} {value!r}\n".encode())
    else:
        raise TypeError(f"a checkpoint holds tensors and plain values only, not {type(value).__name__}")
