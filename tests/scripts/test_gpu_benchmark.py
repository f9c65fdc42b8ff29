"""`make gpu` on a CPU: the file of results, parts that fail or hang, and that every command can be parsed."""

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from tests.support.paths import REPOSITORY


def part(name: str, code: str, seconds: float = 60.0) -> gpu.Part:
    return gpu.Part(name, "P1", seconds, (sys.executable, "-c", code))


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(tmp_path: Path) -> None:
    output = tmp_path / "gpu.md"
    hang = "import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '600'])"
    parts = [
        part("good", "print('\\n'.join(map(str, range(70))))"),
        part("bad", "import sys; print('a reason'); sys.exit(3)"),
        part("hangs", hang, seconds=1.0),
        part("last", "print('42 images/s')"),
    ]
    outcomes = gpu.run_parts(parts, 5.0, ["some machine"], output)
    assert [outcome.status for outcome in outcomes] == [gpu.DONE, "failed: exit code 3", gpu.STOPPED, gpu.DONE]
    text = output.read_text()
    assert "some machine" in text and "a reason" in text and "begun" in text and "42 images/s" in text
    assert "... 10 lines before\n10\n" in text and "69\n```" in text  # of 70 lines the last 60
    assert re.search(r"^\| hangs \| P1 \| stopped: its time was over \| \d+ \|$", text, re.MULTILINE)


def test_no_part_is_begun_when_the_time_is_over(tmp_path: Path) -> None:
    outcomes = gpu.run_parts([part("late", "print(1)")], 0.01, [], tmp_path / "gpu.md")
    assert outcomes[0].status == gpu.LEFT_OUT and "left out" in (tmp_path / "gpu.md").read_text()


def test_the_parts_fit_into_the_time_and_name_what_there_is() -> None:
    parts = gpu.gpu_parts("cuda", 8)
    assert {row for of in parts for row in of.rows.split(", ")} >= {"P1", "P9", "P12", "P13", "P14", "P15"}
    alone = gpu.gpu_parts("cuda", 1)
    assert [of.name for of in alone] == [of.name for of in gpu.cpu_parts()]
    assert sum(of.seconds for of in alone) <= 13 * 60  # at most; most parts end earlier, and the whole is cut off
    for of in [*parts, *gpu.cpu_parts()]:
        module = next((word for word in of.words if word.startswith("benchmarks.")), None)
        files = [word for word in of.words if word.endswith((".py", ".yaml"))]
        assert all((REPOSITORY / file).is_file() for file in files)
        if module is not None:
            source = Path(importlib.import_module(module).__file__ or "").read_text()
            assert all(f'"{flag}"' in source for flag in of.words if flag.startswith("--")), of.command


def test_make_gpu_runs_it() -> None:
    text = (REPOSITORY / "Makefile").read_text()
    assert "-m benchmarks.gpu" in text and "make gpu" in text


def test_on_a_cpu(run_script: Callable[..., Any], tmp_path: Path) -> None:
    output = tmp_path / "gpu.md"
    done = run_script(gpu.main, "--device", "cpu", "--parts", "nms", "--output", output)
    assert done.returncode == 0, done.stdout
    text = output.read_text()
    assert "**No GPU" in text and "| nms | P12 | done |" in text and "batched_nms" in text
    wrong = run_script(gpu.main, "--device", "cpu", "--parts", "nmss")
    assert wrong.returncode == 2 and "must be tests, training_step" in wrong.stderr


@pytest.mark.slow
def test_everything_on_a_cpu(run_script: Callable[..., Any], tmp_path: Path) -> None:
    output = tmp_path / "gpu.md"
    done = run_script(gpu.main, "--device", "cpu", "--output", output)
    assert done.returncode == 0, output.read_text()
