"""The MLflow logger, with a stand-in that records calls and, where it is installed, with MLflow itself."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from detection.training.loggers import Loggers, build_loggers
from detection.training.loggers import mlflow as logger_module
from detection.training.loggers.protocol import FAILED, FINISHED, STOPPED
from tests.support.run_logging import resumed_at
from tests.support.training_runs import load_main

PICTURE = np.full((4, 6, 3), 200, np.uint8)


class Metric(NamedTuple):
    key: str
    value: float
    timestamp: int
    step: int


class Param(NamedTuple):
    key: str
    value: str


class ServerError(Exception):
    """Stands for MlflowException."""

    error_code = "INTERNAL_ERROR"


class Server:
    """What the stand-in's client has been told; `dead`: it does not answer."""

    def __init__(self) -> None:
        self.uri = ""
        self.dead = False
        self.experiments: dict[str, str | None] = {}
        self.runs: dict[str, SimpleNamespace] = {}
        self.batches: list[int] = []

    def new_run(self, name: str) -> SimpleNamespace:
        run = SimpleNamespace(name=name, status="RUNNING", params={}, points=[], tags={}, files=[])
        self.runs[f"id{len(self.runs)}"] = run
        return run


class Client:
    def __init__(self, server: Server) -> None:
        self.server = server

    def _run(self, run_id: str) -> Any:
        if self.server.dead:
            raise ServerError("no\nconnection")
        return self.server.runs[run_id]

    def get_experiment_by_name(self, name: str) -> Any:
        if self.server.dead:
            raise ServerError("no\nconnection")
        return SimpleNamespace(experiment_id=name) if name in self.server.experiments else None

    def create_experiment(self, name: str, artifact_location: str | None) -> str:
        self.server.experiments[name] = artifact_location
        return name

    def create_run(self, experiment: str, run_name: str) -> Any:
        assert experiment in self.server.experiments
        self.server.new_run(run_name)
        return SimpleNamespace(info=SimpleNamespace(run_id=list(self.server.runs)[-1]))

    def get_run(self, run_id: str) -> Any:
        if run_id not in self.server.runs:
            error = ServerError("unknown run")
            error.error_code = "RESOURCE_DOES_NOT_EXIST"
            raise error
        run = self._run(run_id)
        last = {point.key: point for point in sorted(run.points, key=lambda point: point.step)}
        proto = SimpleNamespace(metrics=list(last.values()))
        return SimpleNamespace(data=SimpleNamespace(params=dict(run.params), to_proto=lambda: proto))

    def update_run(self, run_id: str, status: str) -> None:
        self._run(run_id).status = status

    def set_terminated(self, run_id: str, status: str) -> None:
        self._run(run_id).status = status

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        self._run(run_id).tags[key] = value

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        run = self._run(run_id)
        assert len(metrics) <= 1000 and len(params) <= 100
        run.points += metrics
        for param in params:
            assert param.key not in run.params or run.params[param.key] == param.value, "parameters cannot change"
            run.params[param.key] = param.value

    def log_image(self, run_id: str, image: np.ndarray, artifact_file: str) -> None:
        self._run(run_id).files.append(artifact_file)

    def log_artifact(self, run_id: str, path: str) -> None:
        assert Path(path).is_file()
        self._run(run_id).files.append(Path(path).name)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    """A stand-in for the package."""
    there = Server()
    modules: dict[str, dict[str, Any]] = {
        "mlflow": {"set_tracking_uri": lambda uri: setattr(there, "uri", uri)},
        "mlflow.tracking": {"MlflowClient": lambda: Client(there)},
        "mlflow.entities": {"Metric": Metric, "Param": Param},
        "mlflow.exceptions": {"MlflowException": ServerError},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    clear_environment(monkeypatch)
    monkeypatch.setattr(logger_module, "_start_monitor", lambda _: None)
    return there


def clear_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", *logger_module.ENVIRONMENT):
        monkeypatch.setenv(name, "")  # so that what the logger sets is taken back
        monkeypatch.delenv(name)


@pytest.fixture
def open_run(tmp_path: Path, default_settings: Callable[..., Any]) -> Callable[..., Loggers]:
    """`open_run(resumed, "train.steps=9")`: the loggers of a run in logs/run."""

    def opened(resumed: Any = None, *words: str) -> Loggers:
        settings = default_settings(f"run.logs_path={tmp_path / 'logs'}", *words)
        loggers = Loggers(tmp_path / "logs" / "run", build_loggers(["files", "mlflow"]), show=False)
        loggers.start(settings, {"device": "cpu", "threads": 1}, resumed)
        return loggers

    return opened


def test_everything_of_a_run(tmp_path: Path, server: Server, open_run: Callable[..., Loggers]) -> None:
    loggers = open_run()
    assert server.uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert server.experiments == {"yolo-v3": (tmp_path / "mlartifacts").as_uri()}
    run = server.runs["id0"]
    assert json.loads((loggers.directory / "mlflow.json").read_text())["run_id"] == "id0"
    assert run.name == "run" and run.tags == {"environment.device": "cpu"}
    assert run.params["train.batch_size"] == "64" and run.params["run.device"] == "auto"
    assert run.params["data.augmentation.clahe.p"] == "0.1" and max(map(len, run.params.values())) <= 500
    loggers.log(10, {"train/loss": 2.5, "lr": float("nan"), "x" * 300: 1.0})
    loggers.evaluation(10, {"val/AP": 0.5, "val/APs": None, "epoch": 1})
    loggers.image(10, "validation", PICTURE)
    (loggers.directory / "best.pt").write_bytes(b"weights")
    (loggers.directory / "metrics.json").write_text("{}")
    loggers.artifact(loggers.directory / "best.pt")
    loggers.artifact(loggers.directory / "metrics.json")
    assert [(point.key, point.value, point.step) for point in run.points] == [
        ("train/loss", 2.5, 10), ("x" * 250, 1.0, 10), ("val/AP", 0.5, 10), ("epoch", 1.0, 10),
    ]  # fmt: skip
    assert run.files == ["args.yaml", "train.log", "images/validation_000010.jpg", "metrics.json"]
    loggers.finish(FINISHED)
    assert run.status == "FINISHED" and {"best.pt", "train.log", "results.csv"} <= set(run.files[4:])


@pytest.mark.parametrize(
    ("status", "shown", "uploaded"),
    [(FINISHED, "FINISHED", True), (FAILED, "FAILED", True), (STOPPED, "KILLED", False)],
)
def test_ends_are_told_apart(
    server: Server, open_run: Callable[..., Loggers], status: str, shown: str, uploaded: bool
) -> None:
    loggers = open_run()
    (loggers.directory / "last.pt").write_bytes(b"weights")
    loggers.finish(status)
    run = server.runs["id0"]
    assert run.status == shown and ("last.pt" in run.files) == uploaded and "train.log" in run.files


def test_a_resumed_run_continues_without_a_point_twice(server: Server, open_run: Callable[..., Loggers]) -> None:
    """Killed after step 4, saved after step 2: steps 3 and 4 come again. Of `rare` the store has step 2 only."""
    loggers = open_run()
    for step in range(1, 5):
        loggers.log(step, {"loss": 1 / step, **({"rare": 1.0} if step == 2 else {})})
    loggers.finish(FAILED)
    loggers = open_run(resumed_at(2), "train.steps=777")
    assert server.runs["id0"].status == "RUNNING"
    for step in range(3, 6):
        loggers.log(step, {"loss": 1 / step, "rare": float(step)})
    loggers.finish(FINISHED)
    points = server.runs["id0"].points
    assert [point.step for point in points if point.key == "loss"] == [1, 2, 3, 4, 5]
    assert [point.step for point in points if point.key == "rare"] == [2, 3, 4, 5]
    assert server.runs["id0"].tags["train.steps from step 2"] == "777" and len(server.runs) == 1


def test_a_store_that_does_not_know_the_run_gets_a_new_one(server: Server, open_run: Callable[..., Loggers]) -> None:
    open_run().finish(STOPPED)
    server.runs = {"other": server.runs["id0"]}
    open_run(resumed_at(2)).finish(FINISHED)
    assert list(server.runs) == ["other", "id1"]


@pytest.mark.parametrize("dies", ["before the start", "in mid-run"])
def test_a_dead_server_is_named_once(server: Server, open_run: Callable[..., Loggers], dies: str) -> None:
    server.dead = dies == "before the start"
    loggers = open_run()
    server.dead = True
    for step in (1, 2):
        loggers.log(step, {"loss": 1.0})
        loggers.image(step, "validation", PICTURE)
    loggers.finish(FINISHED)
    log = (loggers.directory / "train.log").read_text()
    assert log.count("mlflow") == 1 and "warning: logger mlflow is switched off: no connection" in log
    assert (loggers.directory / "metrics.jsonl").read_text().count("\n") == 2


def test_without_the_package(open_run: Callable[..., Loggers], monkeypatch: pytest.MonkeyPatch) -> None:
    clear_environment(monkeypatch)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    loggers = open_run()
    loggers.finish(FINISHED)
    line = "warning: logger mlflow is switched off: MLflow is not installed (pip install mlflow)\n"
    assert line in (loggers.directory / "train.log").read_text()


def test_a_server_of_the_environment(
    server: Server, open_run: Callable[..., Loggers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "cells")
    open_run().finish(FINISHED)
    assert server.uri == "http://tracker:5000" and server.experiments == {"cells": None}


# MLflow itself


def test_in_mlflow(tmp_path: Path, open_run: Callable[..., Loggers], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    clear_environment(monkeypatch)
    loggers = open_run()
    long = {f"AP/class {number}": 0.1 for number in range(1200)}
    for step in (1, 2, 3):
        loggers.log(step, {"train/loss": 1 / step, "AP/Größe 50:95": 0.25})
    loggers.evaluation(3, {"val/AP": 0.5, "val/APs": None, **long})
    loggers.image(3, "validation", PICTURE)
    (loggers.directory / "best.pt").write_bytes(b"weights")
    loggers.artifact(loggers.directory / "best.pt")
    loggers.finish(STOPPED)
    run_id = json.loads((loggers.directory / "mlflow.json").read_text())["run_id"]
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert client.get_run(run_id).info.status == "KILLED"
    loggers = open_run(resumed_at(1), "train.steps=777")
    assert client.get_run(run_id).info.status == "RUNNING"
    for step in (2, 3, 4):
        loggers.log(step, {"train/loss": 1 / step})
    loggers.finish(FINISHED)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "run" and run.data.params["train.batch_size"] == "64"
    assert run.data.tags["train.steps from step 1"] == "777"
    history = client.get_metric_history(run_id, "train/loss")
    assert sorted((point.step, point.value) for point in history) == [(step, 1 / step) for step in (1, 2, 3, 4)]
    assert run.data.metrics["AP/Größe 50:95"] == 0.25 and run.data.metrics["AP/class 1199"] == 0.1
    names = {file.path for file in client.list_artifacts(run_id)}
    assert {"args.yaml", "train.log", "best.pt", "metrics.jsonl", "images"} <= names
    assert [file.path for file in client.list_artifacts(run_id, "images")] == ["images/validation_000003.jpg"]
    assert "switched off" not in (loggers.directory / "train.log").read_text()


def test_a_real_dead_server(
    open_run: Callable[..., Loggers], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow")
    clear_environment(monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    loggers = open_run()
    loggers.log(1, {"loss": 1.0})
    loggers.finish(FINISHED)
    log = (loggers.directory / "train.log").read_text()
    assert log.count("warning: logger mlflow is switched off") == 1 and "127.0.0.1" in log, log
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_training_in_mlflow(
    run_script: Callable[..., Any], drawn_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 steps, continued from step 2: every number that the files have is in MLflow, once."""
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    clear_environment(monkeypatch)
    run = tmp_path / "logs" / "run"
    words: list[str | Path] = [
        f"data.root={drawn_dataset}", "model.backbone=mobilenet_v3_small", "yolo.neck_channels=[8,8,8]",
        "train.image_size=64", "evaluation.image_size=64", "train.batch_size=2", "data.num_workers=0",
        "run.device=cpu", "run.preflight=false", "scheduler.warmup=1", "train.patience=null", "run.precision=off",
        "train.steps=4", "train.save_frequency=1", "train.keep_checkpoints=9", "run.log_frequency=1",
        "run.loggers=[files,mlflow]", "--resume", "auto", "--output", run,
    ]  # fmt: skip
    main = load_main().main
    for _ in range(2):
        result = run_script(main, *words)
        assert result.returncode == 0 and "switched off" not in result.stdout, result.stdout
        (run / "last.pt").write_bytes((run / "step_000000002.pt").read_bytes())
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run_id = json.loads((run / "mlflow.json").read_text())["run_id"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for key in {key for row in rows for key in row} - {"step"}:
        steps = sorted({row["step"] for row in rows if row.get(key) is not None})
        assert sorted(point.step for point in client.get_metric_history(run_id, key)) == steps, key
    assert client.get_run(run_id).info.status == "FINISHED"
