"""End of a run: exit code, log, and the status passed to the loggers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from detection.errors import (
    DataReadError,
    DeviceMemoryError,
    NumericsError,
    OutputError,
    SettingsError,
    StoppedBySignal,
)
from detection.runtime.distributed import RankError
from detection.training.endings import joint_work, logged_end
from detection.training.loggers.protocol import FAILED, FINISHED, STOPPED


def end(directory: Path, error: BaseException | None) -> tuple[BaseException | None, str | None, list[str]]:
    """End a run by an error in the second of two processes; returns what is raised, the status and the lines."""
    statuses: list[str] = []
    lines: list[str] = []
    loggers = SimpleNamespace(
        directory=directory, line=lambda text, show: lines.append(text), finish=lambda status: statuses.append(status)
    )
    ranks = SimpleNamespace(
        is_first=False, size=2, explain=lambda error, step: RankError(f"step {step}") if "gloo" in str(error) else None
    )
    settings = SimpleNamespace(train=SimpleNamespace(keep_checkpoints=0))
    run: Any = SimpleNamespace(ranks=ranks, settings=settings, script="yolo-v3/main.py")
    raised = None
    try:
        with logged_end(run, SimpleNamespace(step=7), loggers):  # type: ignore[arg-type]
            if error is not None:
                raise error
    except BaseException as other:  # noqa: BLE001
        raised = other
    assert len(statuses) == 1
    return raised, statuses[0], lines


def test_a_complete_run(tmp_path: Path) -> None:
    assert end(tmp_path, None) == (None, FINISHED, [])


@pytest.mark.parametrize(
    ("error", "kind", "status", "words"),
    [
        (StoppedBySignal("stopped by SIGTERM", 15), StoppedBySignal, STOPPED, ["saved after step 7", "--resume"]),
        (DataReadError("no image"), DataReadError, FAILED, ["no image; continue with", "--resume"]),
        (NumericsError("scale"), NumericsError, FAILED, ["scale"]),
        (RuntimeError("gloo: connection closed"), RankError, FAILED, ["step 7"]),
        (RuntimeError("DefaultCPUAllocator: not enough memory"), DeviceMemoryError, FAILED, ["train.batch_size"]),
    ],
)
def test_an_error_of_the_user_is_logged(
    tmp_path: Path, error: Exception, kind: type[Exception], status: str, words: list[str]
) -> None:
    raised, found, lines = end(tmp_path, error)
    assert type(raised) is kind and found == status
    assert lines == [str(raised)] and all(word in lines[0] for word in words)


def test_memory_in_the_middle_of_a_step_names_the_checkpoint_on_the_disk(tmp_path: Path) -> None:
    error = RuntimeError("DefaultCPUAllocator: not enough memory")
    assert "--resume" not in end(tmp_path, error)[2][0]
    (tmp_path / "last.pt").touch()
    assert end(tmp_path, error)[2][0].endswith(f"continue from its last.pt with: yolo-v3/main.py --resume {tmp_path}")


def test_a_bug_keeps_its_type(tmp_path: Path) -> None:
    for error in (ZeroDivisionError(), RuntimeError("a bug"), KeyboardInterrupt(), BrokenPipeError()):
        assert end(tmp_path, error) == (error, FAILED, [])


def test_an_unwritable_directory_has_its_own_exit_code(tmp_path: Path) -> None:
    raised, status, lines = end(tmp_path, PermissionError(13, "Permission denied"))
    assert isinstance(raised, OutputError) and status == FAILED and not lines
    assert f"run directory {tmp_path} cannot be written" in str(raised)


def test_the_group_of_processes_is_left_however_they_end() -> None:
    closed: list[int] = []
    ranks: Any = SimpleNamespace(
        close=lambda: closed.append(1),
        explain=lambda error, step: RankError(f"step {step}") if "gloo" in str(error) else None,
    )
    with joint_work(ranks):
        pass
    for error, kind in (
        (RuntimeError("gloo"), RankError), (RuntimeError("a bug"), RuntimeError), (SettingsError("x"), SettingsError),
    ):  # fmt: skip
        with pytest.raises(kind), joint_work(ranks):
            raise error
    assert len(closed) == 4
