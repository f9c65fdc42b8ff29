"""One line on stderr and the promised exit code for everything a user can cause."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
from torch._utils import ExceptionWrapper

from detection import errors
from detection.errors import (
    CheckpointError,
    DataError,
    DataReadError,
    DeviceMemoryError,
    NumericsError,
    OutputError,
    SettingsError,
    StoppedBySetting,
    StoppedBySignal,
    UserError,
    exit_with_message,
)
from detection.runtime import signals as stopping
from detection.runtime.signals import StopRequest
from detection.training.skipped_steps import NonFiniteLoss
from tests.support.paths import REPOSITORY

# The table of exit codes in design.md: 2 settings or data refused, 3 data failed in mid-run, 4 numerics, 5 memory,
# 6 output not writable, 7 checkpoint or weights unusable, 130 / 143 stopped by a signal after saving.
PROMISED = [
    (StoppedBySetting("text"), 0),  # of run.stop_after
    (UserError("text"), 1),
    (SettingsError("text"), 2),
    (DataError("text"), 2),
    (DataReadError("text"), 3),
    (NumericsError("text"), 4),
    (DeviceMemoryError("text"), 5),
    (OutputError("text"), 6),
    (CheckpointError("text"), 7),
    (StoppedBySignal("text", signal.SIGINT), 130),
    (StoppedBySignal("text", signal.SIGTERM), 143),
]


def leave(error: BaseException | None) -> int | str | None:
    """Exit code of a script whose `main` raises the error."""

    def main() -> None:
        if error is not None:
            raise error

    with pytest.raises((SystemExit, KeyboardInterrupt)) as exit_info:
        exit_with_message(main)
    assert isinstance(exit_info.value, SystemExit)  # a KeyboardInterrupt let through would end pytest
    return exit_info.value.code


@pytest.mark.parametrize(("error", "code"), PROMISED, ids=lambda value: type(value).__name__)
def test_exit_code_and_one_line(error: UserError, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert leave(error) == code
    assert capsys.readouterr() == ("", "text\n")


def test_steps_that_were_non_finite_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert leave(NonFiniteLoss({7: {"loss_box": float("inf"), "loss_class": 2.0}})) == 4
    line = "1 steps in a row were non-finite, the first is step 7: loss_box = inf, loss_class = 2\n"
    assert capsys.readouterr() == ("", line)


def test_every_error_class_is_promised() -> None:
    classes = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, UserError)}
    assert classes <= {type(error) for error, _ in PROMISED}


def test_done_is_0_and_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert leave(None) == 0
    assert capsys.readouterr() == ("", "")


def too_much_memory() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def no_memory() -> None:
    raise MemoryError


def dead_worker() -> None:
    raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")


@pytest.mark.parametrize(
    ("main", "code", "part"),
    [(too_much_memory, 5, "lower it"), (no_memory, 5, "lower it"), (dead_worker, 3, "killed by signal")],
)
def test_failures_that_torch_reports(main, code: int, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        exit_with_message(main, "lower it")
    out, err = capsys.readouterr()
    assert exit_info.value.code == code and out == "" and part in err and len(err.splitlines()) == 1


def test_message_of_a_loader_worker_is_reduced_to_its_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    # What torch's loader does: the worker pickles the exception with its traceback, the main process raises it anew.
    try:
        raise DataReadError("image a.jpg cannot be read: gone")
    except DataReadError:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(DataReadError) as raised:
        wrapped.reraise()
    assert str(raised.value).count("\n") > 3  # the traceback is there, or this test shows nothing
    assert leave(raised.value) == 3
    assert capsys.readouterr().err == "image a.jpg cannot be read: gone\n"


def test_error_without_text_names_its_class(capsys: pytest.CaptureFixture[str]) -> None:
    assert leave(OutputError("  \n")) == 6
    assert capsys.readouterr().err == "OutputError\n"


@pytest.mark.parametrize("error", [ValueError("a bug"), ZeroDivisionError()])
def test_bugs_keep_their_traceback(error: Exception) -> None:
    def main() -> None:
        raise error

    with pytest.raises(type(error)):
        exit_with_message(main)


def test_ctrl_c_before_there_is_anything_to_save(capsys: pytest.CaptureFixture[str]) -> None:
    assert leave(KeyboardInterrupt()) == 130
    assert capsys.readouterr() == ("", "stopped by SIGINT\n")


def test_exit_code_of_main_is_kept() -> None:
    assert leave(SystemExit(2)) == 2  # argparse


def test_reader_that_goes_away_causes_no_traceback() -> None:
    # `python script | head -1`: the pipe's reading end is closed before we write.
    program = (
        "from detection.errors import exit_with_message\n"
        "def main():\n"
        "    for number in range(100000):\n"
        "        print('line', number)\n"
        "exit_with_message(main)\n"
    )
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=writing, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    os.close(writing)
    os.close(reading)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0


# Stopping from outside


def in_child(action: Callable[[], bool]) -> int:
    """Exit code of a process that does this, minus the signal's number if one ends it; 0 where it returns True."""
    child = os.fork()
    if child == 0:
        result = False
        try:
            result = action()
        finally:
            os._exit(0 if result else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGHUP, 129)],
)
def test_first_signal_is_a_request_and_the_second_ends_at_once(number: int, code: int) -> None:
    def once() -> bool:
        signal.signal(number, signal.default_int_handler)
        request = StopRequest()
        request.install()
        request.check()
        os.kill(os.getpid(), number)
        try:
            request.check()
        except StoppedBySignal as stopped:
            return stopped.exit_code == code and signal.Signals(number).name in str(stopped)
        return False

    def twice() -> bool:
        stopping.ECHO_SECONDS = 0.0  # for so long a second one counts as the echo of the first
        once()
        os.kill(os.getpid(), number)  # an echo: a terminal and torchrun both pass one Ctrl-C on
        time.sleep(stopping.ECHO_SECONDS + 0.1)
        os.kill(os.getpid(), number)
        return True

    assert in_child(once) == 0
    assert in_child(twice) == -number


def test_a_stop_request_handles_nothing_before_it_is_installed() -> None:
    def action() -> bool:
        before = [signal.getsignal(number) for number in stopping.STOPPING]
        StopRequest()
        return before == [signal.getsignal(number) for number in stopping.STOPPING]

    assert in_child(action) == 0


def test_ignored_signals_stay_ignored() -> None:
    def action() -> bool:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        request = StopRequest()
        request.install()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
        request.check()
        return request.signal_number is None

    assert in_child(action) == 0
