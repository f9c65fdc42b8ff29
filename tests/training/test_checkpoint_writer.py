"""Asynchronous checkpoints: the file holds the state at the call of `save`, whatever happens afterwards."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from detection.checkpoints import load_checkpoint, save_checkpoint
from detection.errors import OutputError
from detection.training import checkpoint_writer
from detection.training.checkpoint_writer import CheckpointWriter, Saver


def content(value: float = 1.0) -> dict[str, Any]:
    return {"step": 3, "model": {"w": torch.full((4, 3), value), "n": torch.tensor(7)}, "list": [torch.ones(2), "text"]}


@pytest.fixture
def held_back(monkeypatch) -> threading.Event:
    """Event that delays writing until it is set."""
    release = threading.Event()

    def slow(*arguments: Any) -> None:
        assert release.wait(20)
        save_checkpoint(*arguments)

    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", slow)
    return release


def test_what_is_written_is_the_state_when_it_was_saved(tmp_path: Path, held_back: threading.Event) -> None:
    state = content()
    with CheckpointWriter(tmp_path) as writer:
        writer.save(state)
        assert not (tmp_path / "last.pt").exists(), "save returned before the file was there"
        state["model"]["w"] += 5  # the next step
        state["step"] = 4
        held_back.set()
    written = load_checkpoint(tmp_path / "last.pt")
    assert written["step"] == 3 and written["model"]["w"].eq(1).all() and written["model"]["n"] == 7
    assert written["list"][0].tolist() == [1, 1] and written["list"][1] == "text"


def test_memory_of_the_copy_is_used_again_and_follows_the_state(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path) as writer:
        writer.save(content(1.0))
        memory = {tensor.data_ptr() for tensor in writer._memory.values()}
        writer.save(content(2.0))
        assert {tensor.data_ptr() for tensor in writer._memory.values()} == memory
        writer.save({"model": {"w": torch.zeros(9)}})  # another shape at the same place
    assert load_checkpoint(tmp_path / "last.pt")["model"]["w"].shape == (9,)


def test_views_are_written_alone(tmp_path: Path) -> None:
    # Statistics of batch-norm layers are views of one tensor; each must not carry the whole.
    whole = torch.arange(100_000.0)
    with CheckpointWriter(tmp_path) as writer:
        writer.save({"part": whole[10:13]})
    assert load_checkpoint(tmp_path / "last.pt")["part"].tolist() == [10, 11, 12]
    assert (tmp_path / "last.pt").stat().st_size < 10_000


def test_names_and_how_many_stay(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, keep=2) as writer:
        for step in (5, 10, 1000):
            writer.save(content(step), number=step)
        writer.save(content(1001), best=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best.pt", "last.pt", "step_000000010.pt", "step_000001000.pt",
    ]  # fmt: skip
    assert load_checkpoint(tmp_path / "step_000000010.pt")["model"]["w"][0, 0] == 10
    assert (tmp_path / "best.pt").samefile(tmp_path / "last.pt"), "one file of two names: written once"
    with CheckpointWriter(tmp_path) as writer:
        writer.save(content(7.0), number=7)
    assert load_checkpoint(tmp_path / "best.pt")["model"]["w"][0, 0] == 1001, "the other name keeps its file"


def test_who_goes_back_keeps_what_is_new(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, keep=2) as writer:
        for step in (7, 8):
            writer.save(content(step), number=step)
    (tmp_path / "step_mine.pt").touch()  # a file of the user's
    with CheckpointWriter(tmp_path, keep=2) as writer:  # continued from step 2
        for step in (3, 4):
            writer.save(content(step), number=step)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == [
        "step_000000003.pt", "step_000000004.pt", "step_mine.pt",
    ]  # fmt: skip


def test_no_hard_links(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("not on this file system")

    monkeypatch.setattr("os.link", refuse)
    with CheckpointWriter(tmp_path) as writer:
        writer.save(content(2.0), best=True)
    assert not (tmp_path / "best.pt").samefile(tmp_path / "last.pt")
    assert load_checkpoint(tmp_path / "best.pt")["model"]["w"][0, 0] == 2


def test_failed_write_is_loud(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "gone")
    writer.save(content())
    with pytest.raises(OutputError, match=r"gone/last\.pt cannot be written") as raised:
        writer.wait()
    assert raised.value.exit_code == 6
    writer.check()  # said once
    for call in (lambda: writer.save(content()), writer.check):
        writer.save(content())
        writer._thread.join()
        with pytest.raises(OutputError):
            call()
    with pytest.raises(OutputError), CheckpointWriter(tmp_path / "gone") as another:
        another.save(content())


def test_unexpected_failure_is_loud_too(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", lambda *_: 1 / 0)
    writer = CheckpointWriter(tmp_path)
    writer.save(content())
    with pytest.raises(OutputError, match="ZeroDivisionError"):
        writer.wait()


def test_an_error_inside_waits_for_the_file_and_stays_the_error(tmp_path: Path, held_back: threading.Event) -> None:
    threading.Timer(0.2, held_back.set).start()
    with pytest.raises(KeyError), CheckpointWriter(tmp_path) as writer:
        writer.save(content())
        raise KeyError
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 3


def test_damage_on_the_way_to_the_disk_keeps_the_old_file(tmp_path: Path, monkeypatch) -> None:
    save_checkpoint(tmp_path / "last.pt", content(1.0))
    real = torch.save

    def damaging(value: Any, file: Any) -> None:
        real(value, file)
        file.seek(-2000, 2)
        file.write(b"\xff" * 64)
        file.seek(0, 2)

    monkeypatch.setattr(torch, "save", damaging)
    with pytest.raises(OutputError, match="cannot be written"):
        save_checkpoint(tmp_path / "last.pt", content(2.0))
    assert load_checkpoint(tmp_path / "last.pt")["model"]["w"][0, 0] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_last_has_its_average_also_while_best_gets_the_weights_alone(tmp_path: Path, monkeypatch) -> None:
    """A process killed between the two files could not be continued otherwise."""
    written: list[tuple[str, bool]] = []

    def record(path: Path, content: dict[str, Any], others: list[str]) -> None:
        written.extend((name, content["average"] is not None) for name in [*others, path.name])

    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", record)
    settings = SimpleNamespace(train=SimpleNamespace(keep_checkpoints=0, save_minutes=None))
    state = {"model": {}, "average": {"w": torch.ones(1)}}
    run = SimpleNamespace(settings=settings, ranks=SimpleNamespace(is_first=True), checkpoint=lambda _: state)
    loggers = SimpleNamespace(directory=tmp_path, artifact=lambda _: None)
    saver = Saver(run, SimpleNamespace(step=20), loggers)  # type: ignore[arg-type]
    saver.save_best_of(torch.nn.Identity())
    saver.wait()
    assert written == [("best.pt", False), ("last.pt", True)]


def test_best_is_announced_once_when_it_is_on_the_disk(tmp_path: Path, held_back: threading.Event) -> None:
    announced: list[Path] = []
    loggers = SimpleNamespace(directory=tmp_path, artifact=announced.append)
    settings = SimpleNamespace(train=SimpleNamespace(keep_checkpoints=0, save_minutes=None))
    run = SimpleNamespace(
        settings=settings, ranks=SimpleNamespace(is_first=True), save_frequency=10, checkpoint=lambda _: content()
    )
    saver = Saver(run, SimpleNamespace(step=20), loggers)
    assert saver.due()
    saver.save(best=True)
    saver.check()
    assert not announced, "it is still being written"
    held_back.set()
    saver.wait()
    saver.save()  # last.pt alone is no news
    saver.wait()
    assert announced == [tmp_path / "best.pt"]
