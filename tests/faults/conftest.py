"""Faults, injected for real. The name of each test carries the id of its row in docs/reliability.md."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from detection.errors import UserError
from tests.support import fault_runs as runs
from tests.support.guards import switch_off
from tests.support.paths import REPOSITORY


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.get_closest_marker("guard"):
        unguarded = pytest.param(True, marks=pytest.mark.faults)  # shows that the test can fail
        metafunc.parametrize("guard_off", [None, unguarded], ids=["guarded", "unguarded"], indirect=True)


@pytest.fixture(autouse=True)
def guard_off(request: pytest.FixtureRequest, monkeypatch) -> bool:
    """Whether this test runs without its guard, here and in the processes that it starts."""
    if not getattr(request, "param", None):
        return False
    arguments = request.node.get_closest_marker("guard").args
    switch_off(*arguments, monkeypatch)
    monkeypatch.setenv(runs.GUARD_OFF, json.dumps(arguments))
    return True


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    if not pyfuncitem.funcargs.get("guard_off"):
        return (yield)
    try:
        yield
    except (AssertionError, pytest.fail.Exception, UserError):
        return True
    raise AssertionError("passes without its guard, so it proves nothing")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults") / "data"
    runs.make_dataset(root)
    return root


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> list[str]:
    """Arguments of a small, quick training."""
    directory = tmp_path_factory.mktemp("settings")
    (directory / "network.cfg").write_text(runs.NETWORK)
    (directory / "overlay.yaml").write_text(yaml.safe_dump(runs.OVERLAY))
    words = [f"model.cfg={directory / 'network.cfg'}", f"data.root={dataset}"]
    return ["--config", str(directory / "overlay.yaml"), *words]


@pytest.fixture(scope="session")
def server() -> Any:
    """Processes forked from one that has imported torch and the script."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([runs.__name__])
    with pytest.MonkeyPatch.context() as patch:  # the server starts with its first process, and finds `tests` by this
        patch.setenv("PYTHONPATH", str(REPOSITORY), prepend=os.pathsep)
        context.Process(target=int).start()
    return context


@pytest.fixture
def launch(server: Any, tmp_path: Path) -> Iterator[Callable[..., runs.Run]]:
    """`launch("run", *arguments, fault=...)`: the training script, its output in tmp_path/run.out and run.err.

    Without the report at its end, unless `report` is set.
    """
    started: list[runs.Run] = []

    def start(name: str, *arguments: str | Path, fault: runs.Fault | None = None, report: bool = False) -> runs.Run:
        output = tmp_path / name
        words = [str(argument) for argument in arguments]
        target = (words, str(tmp_path), str(output), fault, os.environ.get(runs.GUARD_OFF), report)
        process = server.Process(target=runs.run_script, args=target)
        process.start()
        started.append(runs.Run(process, output))
        return started[-1]

    yield start
    for run in started:
        if run.process.is_alive():
            try:
                os.killpg(run.process.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has not made its group yet
                run.process.kill()
            run.process.join()


@pytest.fixture
def train(launch: Callable[..., runs.Run], common: list[str], tmp_path: Path) -> Callable[..., runs.Run]:
    """`train("run", *settings, fault=...)` into tmp_path/run."""

    def start(name: str, *settings: str, fault: runs.Fault | None = None) -> runs.Run:
        return launch(f"{name}_out", *common, *settings, "--output", tmp_path / name, fault=fault)

    return start
