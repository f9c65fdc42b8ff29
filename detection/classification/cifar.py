"""CIFAR-10 as its authors publish it: pickled batches, in a folder or a tar archive. Nothing in them is executed.

Source: https://www.cs.toronto.edu/~kriz/cifar.html
"""

import io
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from detection.errors import DataError

SIDE_PX = 32
TRAINING_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_BATCH, NAMES_FILE = "test_batch", "batches.meta"
FILES = (*TRAINING_BATCHES, TEST_BATCH, NAMES_FILE)
FOLDER = "cifar-10-batches-py"  # within the archive
MOST_BYTES = 64 * 2**20  # of a member; a batch has 31 MB
MOST_MEMBERS = 64  # the archive has 9
SUFFIXES = (".tar.gz", ".tgz", ".tar")


class CifarSplit(NamedTuple):
    """Images of one split."""

    pixels: np.ndarray  # (N, 32, 32, 3) uint8 RGB
    labels: np.ndarray  # (N,) int64


class Cifar(NamedTuple):
    """Both splits and the names of the classes."""

    training: CifarSplit
    test: CifarSplit
    names: tuple[str, ...]


def is_cifar(root: Path) -> bool:
    """Return whether a path is the archive, the folder of the batches, or a folder that holds that folder."""
    return root.name.endswith(SUFFIXES) or find_folder(root) is not None


def find_folder(root: Path) -> Path | None:
    """Return the folder of the batches in or at `root`."""
    return next((path for path in (root, root / FOLDER) if (path / TEST_BATCH).is_file()), None)


def read_cifar(root: Path) -> Cifar:
    """Read all batches.

    Args:
        root: see `is_cifar`.

    Raises:
        DataError: a file is missing, damaged, too large, or holds anything but arrays, numbers and texts.
    """
    try:
        files = dict(archive_files(root) if root.is_file() else folder_files(root))
    except (OSError, tarfile.TarError, EOFError) as error:
        raise DataError(f"{root} is no CIFAR-10 archive that can be read: {' '.join(str(error).split())}") from None
    if missing := [name for name in FILES if name not in files]:
        raise DataError(f"{root}: {', '.join(missing)} is missing; CIFAR-10 has {', '.join(FILES)}")
    where = {name: f"{root}: {name}" for name in FILES}
    names = unpickle(files[NAMES_FILE], where[NAMES_FILE]).get("label_names")
    if not isinstance(names, list) or not 2 <= len(names) <= 1000:
        raise DataError(f"{where[NAMES_FILE]} has no list of label_names")
    texts = tuple(name.decode(errors="replace") if isinstance(name, bytes) else str(name) for name in names)
    parts = {name: read_batch(files[name], where[name], len(names)) for name in (*TRAINING_BATCHES, TEST_BATCH)}
    training = CifarSplit(*(np.concatenate([parts[name][part] for name in TRAINING_BATCHES]) for part in (0, 1)))
    return Cifar(training, parts[TEST_BATCH], texts)


def folder_files(root: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the files of a folder."""
    folder = find_folder(root) or root
    for name in FILES:
        path = folder / name
        if path.is_file():
            if path.stat().st_size > MOST_BYTES:
                raise DataError(f"{path} has more than {MOST_BYTES // 2**20} MiB, which no batch of CIFAR-10 has")
            yield name, path.read_bytes()


def archive_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the members that CIFAR-10 has; nothing is written to the disk.

    Raises:
        DataError: a member is no plain file or folder, too large, or its name leads out of the archive.
    """
    with tarfile.open(path, "r:*") as archive:
        for count, member in enumerate(archive):
            parts = Path(member.name).parts
            if member.isdir() and ".." not in parts and not member.name.startswith("/"):
                continue
            reason = None
            if count >= MOST_MEMBERS:
                reason = f"has more than {MOST_MEMBERS} members"
            elif not member.isreg():
                reason = f"holds {member.name}, which is no plain file"
            elif ".." in parts or member.name.startswith("/"):
                reason = f"holds {member.name}, which leads out of it"
            elif member.size > MOST_BYTES:
                reason = f"holds {member.name} with more than {MOST_BYTES // 2**20} MiB"
            if reason is not None:
                raise DataError(f"{path} {reason}; CIFAR-10's own archive does not")
            if parts[-1] in FILES and parts[:-1] in ((FOLDER,), ()):
                file = archive.extractfile(member)
                assert file is not None, "a plain file"
                yield parts[-1], file.read()


def _latin1(text: Any, encoding: Any = "latin1") -> bytes:
    """What Python 3 writes for bytes in an old protocol, `_codecs.encode`, for the one codec that it names."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("an encoding other than latin1")
    return text.encode("latin1")


class _ArrayName:
    """Stands for `numpy.ndarray`, which pickles of arrays name and never call."""

    def __new__(cls, *_: Any) -> "_ArrayName":
        raise pickle.UnpicklingError("an array that is made by its class")


def _new_array(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """What NumPy's `_reconstruct` makes: an empty array, whose values `__setstate__` brings."""
    if kind is not _ArrayName or shape != (0,):
        raise pickle.UnpicklingError("an array that is not empty before its values come")
    return np.ndarray((0,), np.uint8)


def _plain_dtype(code: Any, *_: Any) -> np.dtype:
    """A type of numbers; object arrays are refused."""
    made = np.dtype(code if isinstance(code, str) else bytes(code).decode())
    if made.kind not in "uifb":
        raise pickle.UnpicklingError(f"an array of {made}")
    return made


ALLOWED = {
    ("numpy", "ndarray"): _ArrayName,
    ("numpy", "dtype"): _plain_dtype,
    ("_codecs", "encode"): _latin1,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _new_array for core in ("core", "_core")},
}


class PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, numbers, texts and arrays of numbers; every other name is refused before it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"the name {module}.{name}")
        return ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("a reference to something outside")


def unpickle(content: bytes, where: str) -> dict[str, Any]:
    """Read a pickled dict with the keys as text.

    Raises:
        DataError: it holds other things, or is damaged.
    """
    try:
        made = PlainUnpickler(io.BytesIO(content), encoding="bytes").load()
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{where} is refused: as a batch of CIFAR-10 it must not hold {reason}") from None
    except Exception as error:  # noqa: BLE001  (a damaged pickle raises whatever its operations raise)
        raise DataError(f"{where} is damaged: {type(error).__name__}") from None
    if not isinstance(made, dict):
        raise DataError(f"{where} holds no dict")
    return {key.decode(errors="replace") if isinstance(key, bytes) else str(key): made[key] for key in made}


def read_batch(content: bytes, where: str, num_classes: int) -> CifarSplit:
    """Read one batch: N rows of 3072 values, the red, green and blue map of 32 x 32 one after another."""
    made = unpickle(content, where)
    data, labels = made.get("data"), made.get("labels")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * SIDE_PX**2:
        raise DataError(f"{where}: `data` is no uint8 array (N, {3 * SIDE_PX**2})")
    whole = isinstance(labels, list) and len(labels) == len(data)
    if not whole or not all(type(label) is int and 0 <= label < num_classes for label in labels or ()):
        raise DataError(f"{where}: `labels` are not {len(data)} whole numbers from 0 to {num_classes - 1}")
    pixels = data.reshape(-1, 3, SIDE_PX, SIDE_PX).transpose(0, 2, 3, 1)  # (N, 32, 32, 3)
    return CifarSplit(np.ascontiguousarray(pixels), np.array(labels, np.int64))
