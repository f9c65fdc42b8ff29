"""Checks before the first step."""

from collections import namedtuple
from pathlib import Path

import pytest
import torch

from detection.checkpoints import load_checkpoint, save_checkpoint
from detection.errors import OutputError
from detection.training import dry_run as preflight
from detection.training.dry_run import check_disk, check_shared_memory, tensor_bytes, try_checkpoint

Usage = namedtuple("Usage", "total used free")
CONTENT = {"model": {"w": torch.zeros(2**28 // 4)}}  # a quarter of a GiB


def room(monkeypatch, free: float) -> None:
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: Usage(0, 0, int(free)))


def test_bytes_of_everything_inside() -> None:
    assert tensor_bytes({"a": [torch.zeros(3), (torch.zeros(2, dtype=torch.float64), "text")], "b": None}) == 12 + 16


def test_disk_with_room(monkeypatch, tmp_path: Path) -> None:
    room(monkeypatch, 4 * 2**30)
    assert (
        check_disk(tmp_path / "not" / "yet", CONTENT, keep=0) == "disk        4.0 GiB free, a checkpoint has 0.25 GiB"
    )
    # last, best, the one being written and 14 more
    assert "warning: 4.25 GiB may be needed" in check_disk(tmp_path, CONTENT, keep=14)


def test_disk_without_room(monkeypatch, tmp_path: Path) -> None:
    room(monkeypatch, 0.4 * 2**30)
    with pytest.raises(OutputError, match=r"0\.40 GiB free, a checkpoint has 0\.25 GiB") as raised:
        check_disk(tmp_path, CONTENT, keep=0)
    assert raised.value.exit_code == 6 and "\n" not in str(raised.value)


def test_shared_memory(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(preflight, "SHARED_MEMORY", tmp_path)
    room(monkeypatch, 100 * 2**20)
    assert check_shared_memory(workers=0, batch_bytes=2**40) is None
    assert check_shared_memory(workers=4, batch_bytes=11 * 2**20) is None  # 4 x 2 + 1 batches: 99 MiB
    line = check_shared_memory(workers=4, batch_bytes=12 * 2**20)
    assert line is not None and "100 MiB free, 4 workers may need 108" in line and "data.num_workers" in line


def test_checkpoint_is_written_read_and_removed(tmp_path: Path, full_disk, monkeypatch) -> None:
    small = {"step": 0, "w": torch.zeros(1000)}
    read = []
    monkeypatch.setattr(
        preflight,
        "save_checkpoint",
        lambda path, content: save_checkpoint(path, content) or read.append(load_checkpoint(path)),
    )
    try_checkpoint(tmp_path / "logs" / "deep", small)
    assert read[0]["step"] == 0 and not list(tmp_path.iterdir())
    with full_disk(100), pytest.raises(OutputError, match="cannot be written"):
        try_checkpoint(tmp_path, small)
    assert not list(tmp_path.iterdir())
