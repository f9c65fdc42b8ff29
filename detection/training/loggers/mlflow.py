"""MLflow: settings, numbers, pictures, files and the end of a run, in a SQLite file or on a server."""

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from detection.config.settings import Settings
from detection.drawing.files import replace_file
from detection.training.loggers.protocol import FAILED, FINISHED, STOPPED, Resumed

T = TypeVar("T")
RECORD = "mlflow.json"  # in the run directory: which MLflow run it is
EXPERIMENT = "yolo-v3"  # unless MLFLOW_EXPERIMENT_NAME says otherwise
STATUS = {FINISHED: "FINISHED", STOPPED: "KILLED", FAILED: "FAILED"}
CHECKPOINTS = ("best.pt", "last.pt")
AT_THE_END = ("args.yaml", "environment.json", "train.log", "results.csv", "metrics.jsonl", "report.html")
# Limits of MLflow: of a key, of a parameter's value in older servers, of the entities in one request.
MAX_KEY, MAX_PARAM, MAX_METRICS, MAX_PARAMS = 250, 500, 1000, 100
# Before the import. MLflow's own would wait many minutes for a dead server, and report its use to its makers.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class MLflowLogger:
    """Records a run in MLflow; a resumed one continues its MLflow run.

    The store is that of MLFLOW_TRACKING_URI, else `mlflow.db` beside `run.logs_path`, with the files in `mlartifacts`.
    A point that the store has already is not logged again. Every method raises an exception of MLflow if the store does
    not answer.
    """

    def start(
        self, directory: Path, settings: Settings, environment: Mapping[str, Any], resumed: Resumed | None
    ) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            import mlflow
            from mlflow.tracking import MlflowClient
        except ImportError:
            raise ImportError("MLflow is not installed (pip install mlflow)") from None
        logging.getLogger("alembic").setLevel(logging.WARNING)  # it lists the tables of a new SQLite file
        self._directory = directory
        base = Path(settings.run.logs_path).absolute().parent
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        mlflow.set_tracking_uri(uri or f"sqlite:///{base / 'mlflow.db'}")
        self._client = MlflowClient()
        self._logged: dict[str, int] = {}  # last step by key
        params = dict(_flatten(settings.model_dump(mode="json")))
        if resumed is None or not self._reopen(params, resumed):
            self._create(None if uri else (base / "mlartifacts").as_uri())
            self._log_params(params)
        tags = {f"environment.{key}": value for key, value in environment.items() if isinstance(value, str)}
        for key, value in tags.items():
            self._client.set_tag(self._run_id, key, value)
        self._upload(["args.yaml"])
        self._monitor = _start_monitor(self._run_id)

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Log what is finite; MLflow's stores treat NaN and infinity each in its own way."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        points = []
        for tag, value in values.items():
            key = tag[:MAX_KEY]
            if value is not None and math.isfinite(value) and step > self._logged.get(key, -1):
                points.append(Metric(key, float(value), now, step))
        for part in _parts(points, MAX_METRICS):
            self._client.log_batch(self._run_id, metrics=part)
        self._logged.update((point.key, step) for point in points)

    def evaluation(self, step: int, row: Mapping[str, float | None]) -> None:
        self.log(step, row)
        self._upload(["train.log"])  # so that a killed run has one

    def line(self, text: str) -> None:
        """Do nothing: `train.log` is uploaded at each evaluation and at the end."""

    def image(self, step: int, tag: str, image: np.ndarray) -> None:
        self._client.log_image(self._run_id, image, f"images/{tag}_{step:06d}.jpg")

    def artifact(self, path: Path) -> None:
        """Upload a file; checkpoints follow at the end of the run."""
        if path.name not in CHECKPOINTS and path.is_file():
            self._client.log_artifact(self._run_id, str(path))

    def finish(self, status: str) -> None:
        """Upload what is missing and end the MLflow run; one stopped by a signal gets no checkpoints: seconds count."""
        if self._monitor is not None:
            self._monitor.finish()
        if status == STOPPED:
            self._client.set_terminated(self._run_id, STATUS[status])
            self._upload(["train.log"])
            return
        self._upload([*AT_THE_END, *CHECKPOINTS])
        self._client.set_terminated(self._run_id, STATUS[status])

    def _create(self, artifacts: str | None) -> None:
        """Create the MLflow run and its experiment; `artifacts`: where its files go, None: the server decides."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            number = self._client.create_experiment(name, artifact_location=artifacts)
        else:
            number = experiment.experiment_id
        self._run_id = self._client.create_run(number, run_name=self._directory.name).info.run_id
        content = {"run_id": self._run_id, "experiment": name}
        replace_file(self._directory / RECORD, (json.dumps(content) + "\n").encode())

    def _reopen(self, params: Mapping[str, str], resumed: Resumed) -> bool:
        """Continue the MLflow run of the run directory; false: it had none, or this store does not know it."""
        from mlflow.exceptions import MlflowException

        try:
            self._run_id = json.loads((self._directory / RECORD).read_text(encoding="utf-8"))["run_id"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        try:
            run = self._client.get_run(self._run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        self._client.update_run(self._run_id, status="RUNNING")
        # Of each key the last step that the store has, which may lie after the checkpoint.
        self._logged = {metric.key: metric.step for metric in run.data.to_proto().metrics}
        before = run.data.params
        self._log_params({key: value for key, value in params.items() if key not in before})
        for key, value in params.items():
            if before.get(key, value) != value:  # a parameter of MLflow cannot change
                self._client.set_tag(self._run_id, f"{key} from step {resumed.step}"[:MAX_KEY], value)
        return True

    def _log_params(self, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        for part in _parts([Param(key, value) for key, value in params.items()], MAX_PARAMS):
            self._client.log_batch(self._run_id, params=part)

    def _upload(self, names: Iterable[str]) -> None:
        for name in names:
            path = self._directory / name
            if path.is_file():
                self._client.log_artifact(self._run_id, str(path))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (path, text) of every setting; the complete texts are in args.yaml."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"[:MAX_KEY], (value if isinstance(value, str) else json.dumps(value))[:MAX_PARAM]


def _parts(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """Divide values into lists of at most `size`."""
    rest = iter(values)
    while part := list(islice(rest, size)):
        yield part


def _start_monitor(run_id: str) -> Any:
    """Start the thread that logs the use of processor, memory and GPUs; None: without psutil, or switched off."""
    if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() not in ("true", "1"):
        return None
    with contextlib.suppress(ImportError):
        import psutil  # noqa: F401
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        # If the server dies, the logger is switched off by a call that fails, and named; the thread ends silently.
        logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)
        monitor = SystemMetricsMonitor(run_id, resume_logging=True)
        monitor.start()
        return monitor
    return None
