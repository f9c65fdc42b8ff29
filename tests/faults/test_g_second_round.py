"""G: what broke beyond the first table: two processes in one run, ranks that differ, hostile text."""

import argparse
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from detection.errors import OutputError
from detection.runtime.run_directory import new_run_directory
from detection.training.checkpoint_writer import CheckpointWriter
from detection.training.resume import open_resumed_run
from tests.support.paths import REPOSITORY

# G01, G02, G03: who writes to a run directory


@contextmanager
def locked_by_another(directory: Path) -> Iterator[None]:
    program = (
        "import sys; from pathlib import Path; from detection.runtime.run_directory import lock_directory\n"
        "held = lock_directory(Path(sys.argv[1])); print(flush=True); input()"
    )
    command = [sys.executable, "-c", program, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY) as other:
        assert other.stdout is not None and other.stdout.readline()
        yield
        other.communicate(b"\n")


def resume_words(directory: Path) -> argparse.Namespace:
    return argparse.Namespace(
        resume=str(directory), config=[], output=None, settings=[], accept_changes=False, extend=False
    )


def test_G01_the_lock_comes_before_the_checkpoint_is_read(tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_text("the other process is about to replace this")
    with locked_by_another(tmp_path), pytest.raises(OutputError, match="another process writes to"):
        open_resumed_run(resume_words(tmp_path), [])


@pytest.mark.faults
def test_G01_a_rotated_log_lets_no_second_process_in(train, launch, tmp_path: Path) -> None:
    run = train("run", "train.steps=100000", "train.save_frequency=1")
    run.until(lambda: (tmp_path / "run" / "last.pt").exists())
    os.rename(tmp_path / "run" / "train.log", tmp_path / "run" / "train.log.1")
    half = tmp_path / "run" / ".last.pt.1.tmp"
    half.write_bytes(b"half a checkpoint of the first process")
    launch("second", "--resume", tmp_path / "run").ends_with(6, "another process writes to", str(tmp_path / "run"))
    assert half.exists() and run.process.is_alive()


def make_directory(logs: Path, barrier: Any, names: Any) -> None:
    barrier.wait()
    names.put(new_run_directory(logs, "x", None).name)


def test_G02_directories_made_in_the_same_second_by_many_processes(tmp_path: Path) -> None:
    context, count = multiprocessing.get_context("fork"), 16
    barrier, names = context.Barrier(count), context.Queue()
    processes = [context.Process(target=make_directory, args=(tmp_path, barrier, names)) for _ in range(count)]
    for process in processes:
        process.start()
    found = {names.get(timeout=30) for _ in processes}
    for process in processes:
        process.join()
    assert len(found) == count


def test_G02_a_directory_that_appears_in_between_is_not_shared(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda _: False)  # what another process makes now is not seen by looking
    assert len({new_run_directory(tmp_path, "x", None) for _ in range(3)}) == 3


def test_G03_leftovers_of_a_killed_process_are_removed_by_the_next(tmp_path: Path) -> None:
    for name in (".last.pt.4711.tmp", "detections.json.4711.tmp", "best.pt"):
        (tmp_path / name).write_bytes(b"half")
    CheckpointWriter(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]
