"""nohup_train.sh with a stand-in for Python that records what it is given."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

SCRIPT = REPOSITORY / "nohup_train.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def start(tmp_path: Path, program: str, *arguments: str) -> subprocess.Popen[str]:
    """The script with a Python that runs this shell program, in a session of its own."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{program}\n")
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "LOG_DIRECTORY": str(tmp_path / "logs with space")}
    return subprocess.Popen(
        ["bash", SCRIPT, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Where pytest runs behind a `&` it is ignored, and bash cannot trap what it inherits as ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def only(tmp_path: Path, suffix: str) -> Path:
    (path,) = (tmp_path / "logs with space").glob(f"*{suffix}")
    return path


def test_arguments_log_and_exit_code_are_those_of_the_training(tmp_path: Path) -> None:
    running = start(tmp_path, 'printf "<%s>\\n" "$@"; echo problem >&2; exit 4', "--gpu", "0", "data.root=a b")
    out, _ = running.communicate(timeout=20)
    lines = [f"<{REPOSITORY / 'yolo-v3' / 'main.py'}>", "<--gpu>", "<0>", "<data.root=a b>", "problem"]
    assert running.returncode == 4 and out.splitlines()[1:] == lines
    assert only(tmp_path, ".out").read_text().splitlines() == lines
    assert not list((tmp_path / "logs with space").glob("*.pid"))  # the run has ended


def test_ctrl_c_ends_the_view_alone(tmp_path: Path) -> None:
    program = "trap 'echo saved; exit 143' TERM; echo started; while [ ! -e go ]; do sleep 0.05; done; echo done"
    running = start(tmp_path, f"cd '{tmp_path}'; {program}")
    assert running.stdout is not None
    lines = [running.stdout.readline(), running.stdout.readline()]
    assert "training as PID" in lines[0] and lines[1] == "started\n"
    os.killpg(running.pid, signal.SIGINT)  # what a terminal sends to its foreground group
    assert running.wait(20) == 0 and "training goes on as PID" in running.stdout.read()
    pid, log = int(only(tmp_path, ".pid").read_text()), only(tmp_path, ".out")
    os.kill(pid, 0)  # it lives
    (tmp_path / "go").touch()
    deadline = time.monotonic() + 20
    while "done" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "saved" not in log.read_text()
