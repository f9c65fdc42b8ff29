"""CIFAR-10 files that we write ourselves, as its authors lay them out, and hostile ones."""

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detection.classification.cifar import FOLDER, TRAINING_BATCHES, read_cifar
from detection.errors import DataError

NAMES = [b"plane", b"car", b"bird", b"cat", b"deer", b"dog", b"frog", b"horse", b"ship", b"truck"]


def write_cifar(folder: Path, per_batch: int = 4) -> Path:
    """Six batches of a few images: image i of batch b has the red value 10 * b + i everywhere, and the label i % 10."""
    folder.mkdir(parents=True)
    for number, name in enumerate([*TRAINING_BATCHES, "test_batch"]):
        maps = np.zeros((per_batch, 3, 32, 32), np.uint8)
        maps[:, 0] = (10 * number + np.arange(per_batch))[:, None, None]
        maps[:, 2, 5, 7] = 99  # row 5, column 7 of the blue map
        content = {b"data": maps.reshape(per_batch, -1), b"labels": [i % 10 for i in range(per_batch)]}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": NAMES, b"num_vis": 3072}, protocol=2))
    return folder


def pack(folder: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, FOLDER)
    return archive


@pytest.mark.parametrize("kind", ["folder", "parent", "archive"])
def test_folder_and_archive_hold_the_same(tmp_path: Path, kind: str) -> None:
    folder = write_cifar(tmp_path / "c" / FOLDER)
    root = {"folder": folder, "parent": folder.parent, "archive": tmp_path / "cifar-10-python.tar.gz"}[kind]
    if kind == "archive":
        pack(folder, root)
    cifar = read_cifar(root)
    assert cifar.names == tuple(name.decode() for name in NAMES)
    assert cifar.training.pixels.shape == (20, 32, 32, 3) and cifar.test.pixels.shape == (4, 32, 32, 3)
    assert cifar.training.pixels[:, 0, 0, 0].tolist() == [10 * b + i for b in range(5) for i in range(4)]
    assert (cifar.test.pixels[:, 5, 7] == [[50 + i, 0, 99] for i in range(4)]).all()
    assert cifar.training.labels.tolist() == [0, 1, 2, 3] * 5


class Hostile:
    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


@pytest.mark.parametrize(
    "content",
    [
        Hostile(print, "executed"),
        Hostile(getattr, {}, "clear"),
        {b"data": Hostile(eval, "print('executed')"), b"labels": [0]},
        {b"data": Hostile(np.ndarray, (10**9,)), b"labels": [0]},
        {b"data": np.array([None]), b"labels": [0]},
        {b"data": Hostile(bytes.fromhex, "00"), b"labels": [0]},
        [1, 2],
        {b"data": np.zeros((1, 3072), np.int64), b"labels": [0]},
        {b"data": np.zeros((1, 3071), np.uint8), b"labels": [0]},
        {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]},
        {b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]},
        {b"data": np.zeros((1, 3072), np.uint8), b"labels": [True]},
    ],
    ids=range(12),
)
def test_a_hostile_or_wrong_batch_is_refused_and_nothing_runs(
    tmp_path: Path, content: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write_cifar(tmp_path / FOLDER)
    (folder / "data_batch_3").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(DataError, match="data_batch_3") as error:
        read_cifar(folder)
    assert "\n" not in str(error.value) and "executed" not in capfd.readouterr().out


@pytest.mark.parametrize("cut", [0, 1, 100])
def test_a_damaged_batch_is_refused(tmp_path: Path, cut: int) -> None:
    folder = write_cifar(tmp_path / FOLDER)
    path = folder / "test_batch"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match="test_batch"):
        read_cifar(folder)


def test_a_missing_batch_is_named(tmp_path: Path) -> None:
    folder = write_cifar(tmp_path / FOLDER)
    (folder / "data_batch_2").unlink()
    with pytest.raises(DataError, match="data_batch_2 is missing"):
        read_cifar(folder)


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (member(f"{FOLDER}/data_batch_1", tarfile.SYMTYPE, link="/etc/passwd"), "no plain file"),
        (member(f"{FOLDER}/data_batch_1", tarfile.LNKTYPE, link="x"), "no plain file"),
        (member(f"{FOLDER}/pipe", tarfile.FIFOTYPE), "no plain file"),
        (member("../test_batch"), "leads out"),
        (member("/tmp/test_batch"), "leads out"),
        (member("readme.html", size=2**27), "more than 64 MiB"),
    ],
)
def test_members_of_an_archive_are_checked(tmp_path: Path, info: tarfile.TarInfo, message: str) -> None:
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.addfile(info, io.BytesIO(bytes(info.size)))
    with pytest.raises(DataError, match=message):
        read_cifar(archive)


def test_an_archive_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(b"no archive")
    with pytest.raises(DataError, match="no CIFAR-10 archive"):
        read_cifar(tmp_path / "x.tar.gz")
