"""A checkpoint is complete and unchanged, or it is refused; a failed write touches nothing."""

import os
import pickle
import stat
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detection import checkpoints
from detection.checkpoints import DETECTOR_FIELDS, load_checkpoint, load_fields, save_checkpoint
from detection.errors import CheckpointError, OutputError
from detection.runtime.reproducibility import seed_everything, seed_step
from tests.support.checkpoint_cases import Payload, equal

NAN = float("nan")
DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.uint8, torch.bool),
]
SMALL = {"step": 7, "name": "Äb", "rate": 0.5, "weights": torch.tensor([1.5, -2.0, 0.0])}

FullDisk = Callable[[int], AbstractContextManager[None]]


def refuse(path: Path) -> str:
    """Message with which the file is refused; the process would end with code 7, one line and nothing else."""
    with warnings.catch_warnings(record=True) as warned, pytest.raises(CheckpointError) as raised:
        warnings.simplefilter("always")
        load_checkpoint(path)
    assert not warned  # they would be further lines on stderr
    assert raised.value.exit_code == 7
    message = str(raised.value)
    assert str(path) in message and "\n" not in message
    return message


# Round trip


def test_round_trip_of_every_type(tmp_path: Path) -> None:
    content = {
        "none": None,
        "bools": [True, False],
        "integers": [0, -1, 2**63, -(2**100)],
        "floats": [0.0, -0.0, 1e-320, float("inf"), -float("inf"), NAN, 1 / 3],
        "text": ["", "Größe 狗", "two\nlines"],
        "tuple": (1, (2.0, "three")),
        "empty": [[], (), {}],
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 1: {}}, "param_groups": [{"params": [0, 1]}]},
        "ordered": OrderedDict([("b", torch.zeros(1)), ("a", torch.ones(1))]),
        "tensors": [torch.tensor([1, 0, 200]).to(dtype) for dtype in DTYPES],
        "special": torch.tensor([0.0, -0.0, NAN, float("inf")]),
        "scalar": torch.tensor(2.5),
        "no_elements": torch.zeros(0, 3),
        "not_contiguous": torch.arange(12.0).view(3, 4).t(),
        "channels_last": torch.arange(48.0).view(2, 3, 4, 2).contiguous(memory_format=torch.channels_last),
        "slice": torch.arange(100)[10:20:3],
        "random": {"torch": torch.get_rng_state()},
    }  # fmt: skip
    save_checkpoint(tmp_path / "a.pt", content)
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert loaded.pop("format") == checkpoints.FORMAT_VERSION
    assert equal(loaded, content)
    assert loaded["channels_last"].is_contiguous(memory_format=torch.channels_last)
    # `equal` above is our own: it does see differences
    assert not equal(loaded, content | {"special": torch.tensor([-0.0, -0.0, NAN, float("inf")])})


def test_file_is_readable_without_this_program(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", SMALL)
    plain = torch.load(tmp_path / "a.pt", weights_only=True)
    assert plain["step"] == 7 and torch.equal(plain["weights"], SMALL["weights"])


def test_saving_does_not_change_the_content(tmp_path: Path) -> None:
    content = dict(SMALL)
    save_checkpoint(tmp_path / "a.pt", content)
    assert content.keys() == SMALL.keys()


def test_random_stream_of_a_step_is_a_function_of_seed_step_and_rank() -> None:
    def draw(seed: int, step: int, rank: int) -> float:
        seed_step(seed, step, rank)
        return torch.rand(1).item()

    places = [(0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0), (10**9, 10**9, 7)]
    drawn = [draw(*place) for place in places]
    assert len(set(drawn)) == len(places)
    assert [draw(*place) for place in reversed(places)] == drawn[::-1]


def test_one_seed_decides_every_stream() -> None:
    def draw(seed: int) -> list[float]:
        import random

        seed_everything(seed)
        return [random.random(), float(np.random.rand()), torch.rand(1).item()]

    assert draw(5) == draw(5)
    assert all(first != second for first, second in zip(draw(5), draw(6), strict=True))
    assert draw(2**63 - 1) == draw(2**63 - 1)  # the largest seed that the settings allow


@pytest.mark.parametrize(
    "value",
    [np.float64(1.0), np.float32(1.0), np.int64(1), np.bool_(True), np.str_("a"), np.ones(2), {1, 2}, b"bytes", Path()],
    ids=lambda value: type(value).__name__,
)
def test_what_safe_loading_would_refuse_is_refused_at_saving(tmp_path: Path, value: object) -> None:
    save_checkpoint(tmp_path / "a.pt", SMALL)
    before = (tmp_path / "a.pt").read_bytes()
    for content in ({"value": value}, {"nested": [{"value": (value,)}]}):
        with pytest.raises(TypeError, match=type(value).__name__):
            save_checkpoint(tmp_path / "a.pt", content)
    assert (tmp_path / "a.pt").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.pt"]


# Damage


def test_no_flipped_bit_loads_with_other_values(tmp_path: Path) -> None:
    # The checksums inside a zip file cover neither its headers nor the padding, and torch reads both leniently.
    path = tmp_path / "a.pt"
    save_checkpoint(path, SMALL)
    raw, expected = path.read_bytes(), load_checkpoint(path)
    seen: Counter[str] = Counter()
    with open(path, "r+b", buffering=0) as file:
        for position, byte in enumerate(raw):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), position)
                try:
                    assert equal(load_checkpoint(path), expected), f"bit {bit} of byte {position}"
                    seen["same"] += 1
                except CheckpointError as error:
                    assert "\n" not in str(error)
                    seen["refused"] += 1
            os.pwrite(file.fileno(), bytes([byte]), position)
    assert equal(load_checkpoint(path), expected)
    assert seen.total() == 8 * len(raw)
    # Every bit of the values themselves is noticed: three float32 and the digest of 64 characters.
    assert seen["refused"] >= 8 * (3 * 4 + 64)


def test_truncated_at_any_length(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(path, SMALL)
    raw = path.read_bytes()
    for length in [*range(0, len(raw), 7), len(raw) - 1]:
        path.write_bytes(raw[:length])
        refuse(path)


def test_zeros_in_the_place_of_a_part(tmp_path: Path) -> None:
    # What some file systems leave after a crash: the right length, blocks never written.
    path = tmp_path / "a.pt"
    save_checkpoint(path, SMALL | {"weights": torch.rand(4096)})
    raw = path.read_bytes()
    for start in range(0, len(raw), 4096):
        path.write_bytes(raw[:start] + bytes(len(raw[start : start + 4096])) + raw[start + 4096 :])
        refuse(path)


def test_values_of_another_checkpoint_are_noticed(tmp_path: Path) -> None:
    # Valid zip file, valid pickle, valid checksums: only the digest can tell.
    for name, step in (("a.pt", 7), ("b.pt", 8)):
        save_checkpoint(tmp_path / name, SMALL | {"step": step})
    content = torch.load(tmp_path / "a.pt", weights_only=True) | {"step": 8}
    torch.save(content, tmp_path / "c.pt")
    assert "digest" in refuse(tmp_path / "c.pt")
    changes: list[dict[str, Any]] = [
        {"name": "Äc"},
        {"rate": 0.5000000000000001},
        {"step": True},
        {"step": 7.0},
        {"weights": torch.tensor([1.5, -2.0, -0.0])},
        {"weights": torch.tensor([[1.5, -2.0, 0.0]])},
        {"weights": torch.tensor([1.5, -2.0, 0.0], dtype=torch.float64)},
        {"added": None},
    ]
    for change in changes:
        torch.save(torch.load(tmp_path / "a.pt", weights_only=True) | change, tmp_path / "c.pt")
        refuse(tmp_path / "c.pt")
    shorter = torch.load(tmp_path / "a.pt", weights_only=True)
    del shorter["name"]
    torch.save(shorter, tmp_path / "c.pt")
    refuse(tmp_path / "c.pt")


# Foreign files


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    assert "does not exist" in refuse(path)
    for content in (b"", b"\0", b"just text\n", "Größe".encode(), b"PK\x03\x04", os.urandom(2000)):
        path.write_bytes(content)
        refuse(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "a zip file")
    refuse(path)
    path.unlink()
    path.mkdir()
    refuse(path)


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"weight": torch.zeros(2)}},
        torch.zeros(3),
        [1, 2],
        {"digest": "0" * 64},
        {"digest": torch.zeros(2), "step": 1},
        {"digest": None, "format": 1},
        {"digest": "0" * 64, "format": 1, "kind": torch.float32},
        {"digest": "0" * 64, "format": 1, "place": torch.device("cpu")},
        {"digest": "0" * 64, "format": 1, "bytes": b"abc"},
        {"digest": "0" * 64, "format": 1, "complex": 1j, "set": {1}},
        {"digest": "0" * 64, "format": 1, "sparse": torch.eye(2).to_sparse()},
    ],
    ids=str,
)
def test_checkpoints_of_other_programs(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "a.pt")
    refuse(tmp_path / "a.pt")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickled_code_is_not_run(tmp_path: Path, protocol: int) -> None:
    path, marker = tmp_path / "a.pt", tmp_path / "marker"
    path.write_bytes(pickle.dumps({"model": Payload(marker)}, protocol=protocol))
    refuse(path)
    for zipped in (True, False):
        torch.save(
            {"format": 1, "digest": "0" * 64, "model": Payload(marker)},
            path,
            pickle_protocol=max(protocol, 2),
            _use_new_zipfile_serialization=zipped,
        )
        assert not marker.exists()
        refuse(path)
        assert not marker.exists()
    torch.load(path, weights_only=False)  # the payload does work
    assert marker.exists()


def test_other_format_version_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "FORMAT_VERSION", 99)
        patch.setattr(checkpoints, "READABLE_VERSIONS", (99,))
        save_checkpoint(tmp_path / "a.pt", SMALL)
    message = refuse(tmp_path / "a.pt")
    assert "version 99" in message and "reads 1 to 3" in message


def test_checkpoint_without_format_version(tmp_path: Path) -> None:
    content = {"step": 1}
    torch.save(content | {"digest": checkpoints.content_digest(content)}, tmp_path / "a.pt")
    refuse(tmp_path / "a.pt")


# Failed writes


@pytest.mark.parametrize("room", [0, 100, 1000, 20_000, 39_000])
def test_full_disk_leaves_the_old_file(
    tmp_path: Path,
    full_disk: FullDisk,
    room: int,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, SMALL)
    before = path.read_bytes()
    with full_disk(room), pytest.raises(OutputError) as raised:
        save_checkpoint(path, {"weights": torch.zeros(10_000)})  # 40 kB of float32
    assert raised.value.exit_code == 6
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.pt"]
    assert load_checkpoint(path)["step"] == 7
    assert capfd.readouterr() == ("", "")


def test_directory_that_is_gone_or_read_only(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file"):
        save_checkpoint(tmp_path / "gone" / "last.pt", SMALL)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Not a directory"):
        save_checkpoint(tmp_path / "file" / "last.pt", SMALL)
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="Permission denied"):
            save_checkpoint(tmp_path / "last.pt", SMALL)
    finally:
        tmp_path.chmod(0o700)


def test_target_that_cannot_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "last.pt").mkdir()
    (tmp_path / "last.pt" / "kept").touch()
    with pytest.raises(OutputError):
        save_checkpoint(tmp_path / "last.pt", SMALL)
    assert os.listdir(tmp_path) == ["last.pt"] and os.listdir(tmp_path / "last.pt") == ["kept"]


def test_the_directory_is_flushed_after_the_new_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(number: int) -> None:
        calls.append("directory" if stat.S_ISDIR(os.fstat(number).st_mode) else "file")
        fsync(number)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("replace"), replace(*names)))
    save_checkpoint(tmp_path / "a.pt", SMALL)
    assert calls == ["file", "replace", "directory"]


@pytest.mark.parametrize(("fields", "name"), [({"step": "7"}, "step"), ({"settings": None}, "settings")])
def test_fields_of_another_type(tmp_path: Path, fields: dict[str, Any], name: str) -> None:
    save_checkpoint(tmp_path / "a.pt", {"step": 7, "settings": {}, "categories": {}, "model": {}} | fields)
    with pytest.raises(CheckpointError, match=f"not of a training run: '{name}'"):
        load_fields(tmp_path / "a.pt", DETECTOR_FIELDS)
