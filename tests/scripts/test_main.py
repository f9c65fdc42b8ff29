"""The training script end to end: `python yolo-v3/main.py ...` in separate processes, from another directory.

Starting Python with torch takes seconds, so each run serves several tests; independent runs share the two cores.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
import yaml
from torchvision.models import mobilenet_v3_small

from detection.config.command_line import DEFAULTS
from detection.config.loading import load_settings
from detection.errors import CheckpointError
from detection.evaluation.coco_metric import METRIC_NAMES
from detection.runtime import devices
from detection.training.console import plan_lines
from tests.support.fault_runs import make_dataset
from tests.support.paths import MAIN
from tests.support.training_runs import first_difference, load_main, rows_of

STEPS = 12
TRAINING_IMAGES = 13  # 4 images per step: no step but the 13th, 26th, ... ends at the end of an epoch
HELD = "the highest: best.pt holds them"  # the weights without EMA were better at the end
TIMEOUT = 240  # seconds for one process, on a machine that does much else


OVERLAY = {
    "run": {"device": "cpu", "precision": "off", "log_frequency": 1, "seed": 3},
    "data": {
        "num_workers": 2,
        "augmentation": {"multiplicative_noise": {"p": 0.5}, "gauss_noise": {"p": 0.5}, "color_jitter": {"p": 0.5}},
    },
    "model": {"backbone": "mobilenet_v3_small"},
    "yolo": {"neck_channels": [16, 16, 16]},
    "train": {
        "batch_size": 2, "subdivisions": 2, "steps": STEPS, "image_size": 64, "resize_frequency": 2,
        "multiscale_sizes": [64, 96], "learning_rate": 1e-3, "ema_decay": 0.9, "ema_ramp": 2,
    },
    "scheduler": {"warmup": 3, "index": [6, 9], "scale": [1.0, 0.5, 0.1]},
    "evaluation": {"evaluate_frequency": 5, "image_size": 64, "visualize_images": 2},
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str  # empty where it was captured together with `out`


# The loader's workers and the training process would fight for two cores otherwise.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


def run(directory: Path, *arguments: str | Path) -> Result:
    command = [sys.executable, MAIN, *arguments]
    quiet: dict[str, Any] = {"env": ENVIRONMENT, "stdin": subprocess.DEVNULL, "capture_output": True}
    process = subprocess.run(command, cwd=directory, timeout=TIMEOUT, check=False, **quiet)
    return Result(process.returncode, process.stdout.decode(), process.stderr.decode())


def run_with_signal(
    directory: Path, output: Path, arguments: list[str | Path], signals: list[tuple[int, float, int]], before: str
) -> Result:
    """Start a run, send it signals, each at its moment (rows in its metrics.jsonl, seconds more), wait for its end.

    `before`: statement that the process executes before it becomes the script; signal handling is inherited.
    """
    program = f"import os, signal, sys; {before}; os.execv(sys.executable, sys.argv[1:])"
    with open(directory / f"{output.name}.out", "w+b") as captured:
        process = subprocess.Popen(
            [sys.executable, "-c", program, sys.executable, MAIN, "--output", output, *arguments],
            cwd=directory,
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=captured,
            stderr=subprocess.STDOUT,  # as in `main.py > nohup_0.out 2>&1`
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + TIMEOUT
            metrics = output / "metrics.jsonl"
            for rows, seconds, number in signals:
                while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= rows):
                    assert process.poll() is None, (directory / f"{output.name}.out").read_text()
                    assert time.monotonic() < deadline
                    time.sleep(0.005)
                time.sleep(seconds)
                send = os.killpg if number == signal.SIGHUP else os.kill  # a closing terminal reaches the whole group
                send(process.pid, number)
            code = process.wait(TIMEOUT)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        captured.seek(0)
        return Result(code, captured.read().decode(), "")


class Scenarios:
    """Start all processes that the tests below check, one after another in a thread."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.data = base / "data"
        make_dataset(self.data, TRAINING_IMAGES, sizes=((64, 90), (100, 60)))  # tall and wide
        self.overlay = base / "overlay.yaml"
        self.overlay.write_text(yaml.safe_dump(OVERLAY))
        self.common: list[str | Path] = ["--config", self.overlay, f"data.root={self.data}"]
        # Rows in metrics.jsonl, seconds more: after the evaluation of step 5, whose row is the sixth, there is a best
        # checkpoint.
        self.moment = (random.randint(6, 8), random.uniform(0, 0.1))
        self._pool = ThreadPoolExecutor(1)
        self._futures: dict[str, Future[Result]] = {
            part.__name__: self._pool.submit(part) for part in (self.whole, self.stopped, self.resumed)
        }

    def __getitem__(self, name: str) -> Result:
        return self._futures[name].result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def whole(self) -> Result:
        """An uninterrupted run."""
        return run(self.base, *self.common, "--output", self.base / "whole")

    def stopped(self) -> Result:
        """A run from the args.yaml of the first one alone, under nohup: SIGHUP, then SIGTERM at a random moment."""
        nohup = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"  # it does this and no more
        arguments: list[str | Path] = ["--config", self.base / "whole" / "args.yaml"]
        signals = [(3, 0.0, signal.SIGHUP), (*self.moment, signal.SIGTERM)]
        result = run_with_signal(self.base, self.base / "stopped", arguments, signals, nohup)
        shutil.copytree(self.base / "stopped", self.base / "at_stop")
        return result

    def resumed(self) -> Result:
        return run(self.base, "--resume", self.base / "stopped")


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scenarios]:
    scenarios = Scenarios(tmp_path_factory.mktemp("main"))
    yield scenarios
    scenarios.close()


def assert_equal_runs(first: Path, second: Path) -> None:
    for name in ("last.pt", "best.pt"):
        contents = [torch.load(directory / name, weights_only=True) for directory in (first, second)]
        assert contents[0]["step"] > 0 and (contents[0]["average"] is not None or name == "best.pt")
        for content in contents:
            content.pop("digest")  # follows from the rest
        assert first_difference(*contents) is None, name
    assert rows_of(first) == rows_of(second)
    for name in ("results.csv", "detections.json", "metrics.json", "best_detections.json", "best_metrics.json"):
        assert (first / name).read_text() == (second / name).read_text(), name


def assert_refused(result: Result, code: int, *words: str) -> None:
    assert result.code == code, result
    assert result.err.count("\n") == 1 and result.err.endswith("\n"), result.err
    for word in words:
        assert word in result.err
    assert_plain(result)


def assert_plain(result: Result) -> None:
    """Output redirected to a file has no traceback, carriage returns or terminal escape sequences."""
    for text in (result.out, result.err):
        assert "Traceback" not in text and "\r" not in text and "\x1b" not in text, text


# A whole run


def test_run_directory_is_complete(scenarios: Scenarios) -> None:
    result = scenarios["whole"]
    assert (result.code, result.err) == (0, ""), result
    assert_plain(result)
    directory = scenarios.base / "whole"
    names = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    (events,) = (name for name in names if name.startswith("events.out.tfevents."))
    assert names - {events} == {
        "args.yaml", "environment.json", "status.json", "train.log", "metrics.jsonl", "results.csv", "metrics.json",
        "run.lock", "images.npz", "detections.json", "best_metrics.json", "best_detections.json", "best.pt", "last.pt",
        "images/train_batch.png", "images/validation_000005.jpg",
        "images/validation_000010.jpg", "images/validation_000012.jpg", "report.html", "results.png",
        "precision_recall.png", "confusion_matrix.png", "worst_images.csv", "worst_images.jpg",
    }  # fmt: skip
    for name in names:
        if name.endswith(".png"):
            picture = cv2.imread(str(directory / name))
            assert picture is not None and picture.std() > 0, name
    assert (directory / events).stat().st_size > 10_000  # it holds pictures

    assert json.loads((directory / "environment.json").read_text())["packages"]["torch"] == version("torch")
    assert yaml.safe_load((directory / "args.yaml").read_text())["data"]["root"] == str(scenarios.data)
    assert [line.split(",")[0] for line in (directory / "results.csv").read_text().splitlines()] == [
        "step", "5", "10", "12",
    ]  # fmt: skip
    log = (directory / "train.log").read_text()
    printed, logged = result.out.splitlines(), log.splitlines()
    hidden = [line for line in logged if line not in printed]
    # Of three evaluations the twelve numbers, the head and the two classes are in the file alone; and of that of the
    # weights without EMA, if they are better.
    evaluations = 3 + (HELD in log)
    assert len(hidden) == evaluations * (12 + 1 + 2) and all(line.startswith(" ") for line in hidden)
    assert [line for line in logged if line not in hidden] == printed[-(len(logged) - len(hidden)) :]
    assert sum(line.startswith("AP ") and "classes: " in line for line in printed) == evaluations
    assert "finished at step 12" in logged[-1]


def test_a_continued_run_reports_all_of_it(scenarios: Scenarios) -> None:
    assert not (scenarios.base / "at_stop" / "report.html").exists() and scenarios["resumed"].code == 0
    page = (scenarios.base / "stopped" / "report.html").read_text()
    assert "last evaluation, after step 12" in page and page.count("data:image/") >= 4


def test_metrics_of_a_run(scenarios: Scenarios) -> None:
    assert scenarios["whole"].code == 0
    directory = scenarios.base / "whole"
    rows = rows_of(directory)
    training = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in training] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if "val/AP" in row] == [5, 10, 12]
    assert {row["train/image_size"] for row in training} == {64, 96}
    for row in training:
        parts = [row[f"train/loss_{name}"] for name in ("box", "objectness", "class")]
        assert row["train/loss"] == pytest.approx(sum(parts)) and min(parts) > 0
    # LambdaLR: rises as ((step + 1) / 3)^4 of 1e-3, half from step 6 on (0-based), a tenth from step 9 on
    expected = [1e-3 / 81, 1e-3 * 16 / 81] + [1e-3] * 4 + [5e-4] * 3 + [1e-4] * 3
    assert [row["train/learning_rate"] for row in training] == pytest.approx(expected)

    metrics = json.loads((directory / "metrics.json").read_text())
    assert set(METRIC_NAMES) <= set(metrics) and metrics["step"] == STEPS
    assert set(metrics["class_AP"]) == {"blue", "green"}
    detections = json.loads((directory / "detections.json").read_text())
    assert len(detections) == metrics["boxes"] > 0
    assert {row["category_id"] for row in detections} <= {1, 7}
    assert {row["image_id"] for row in detections} <= {1, 2, 3, 4}


def test_best_is_the_evaluation_with_the_highest_ap50(scenarios: Scenarios) -> None:
    assert scenarios["whole"].code == 0
    evaluations = [row for row in rows_of(scenarios.base / "whole") if "val/AP" in row]
    # the first of equal ones: only a rise replaces it
    best = max(evaluations, key=lambda row: (row["val/AP50"], -row["step"]))
    content = torch.load(scenarios.base / "whole" / "best.pt", weights_only=True)
    if HELD in (scenarios.base / "whole" / "train.log").read_text():
        assert content["step"] == STEPS == content["progress"]["best_step"] and content["average"] is None
        assert content["progress"]["best_value"] > best["val/AP50"]
    else:
        assert content["step"] == best["step"] == content["progress"]["best_step"]
        assert content["progress"]["best_value"] == best["val/AP50"]


def test_checkpoint_is_enough_for_every_script(scenarios: Scenarios) -> None:
    assert scenarios["whole"].code == 0
    content = torch.load(scenarios.base / "whole" / "last.pt", weights_only=True)
    assert content["categories"] == {"names": ["blue", "green"], "ids": [1, 7]}
    assert content["settings"]["model"]["backbone"] == "mobilenet_v3_small"
    assert len(content["pixel_mean"]) == len(content["pixel_std"]) == 3
    moved = [name for name, value in content["model"].items() if not torch.equal(value, content["average"][name])]
    assert moved  # the average is not just a copy


# The same numbers again


def test_args_yaml_alone_stopped_by_sigterm_and_continued_equals_uninterrupted(scenarios: Scenarios) -> None:
    assert scenarios["whole"].code == 0
    stopped, resumed = scenarios["stopped"], scenarios["resumed"]
    moment = f"SIGTERM {scenarios.moment[1]:.3f} s after row {scenarios.moment[0]}"
    assert stopped.code == 143, (moment, stopped.out)  # SIGHUP came before and has not ended it
    assert resumed.code == 0, (moment, resumed)
    assert_plain(resumed)
    stopped_at = torch.load(scenarios.base / "at_stop" / "last.pt", weights_only=True)["step"]
    assert 5 <= stopped_at < STEPS and stopped_at * 4 % TRAINING_IMAGES, moment  # in the middle of an epoch
    assert f"from step {stopped_at}" in resumed.out
    assert_equal_runs(scenarios.base / "whole", scenarios.base / "stopped")


def test_equality_of_runs_is_no_empty_claim(scenarios: Scenarios) -> None:
    assert scenarios["whole"].code == 0 and scenarios["stopped"].code == 143
    last = [torch.load(scenarios.base / name / "last.pt", weights_only=True) for name in ("whole", "at_stop")]
    difference = first_difference(last[0]["model"], last[1]["model"])
    assert difference is not None and difference.startswith("/")
    assert first_difference({"a": [1, torch.zeros(2)]}, {"a": [1, torch.tensor([0.0, 1e-30])]}) == "/a/1"


# Stopping


def test_stop_saves_and_its_last_line_says_how_to_continue(scenarios: Scenarios) -> None:
    result = scenarios["stopped"]
    assert_plain(result)
    last_line = result.out.splitlines()[-1]
    assert "SIGTERM" in last_line and f"--resume {scenarios.base / 'stopped'}" in last_line, result.out
    assert "step" in last_line
    assert not [path.name for path in (scenarios.base / "at_stop").iterdir() if path.name.startswith(".")]
    assert "\nspeed " in result.out and "s per epoch of 13 images" in result.out


# Refusals, in this process


@pytest.fixture
def run_here(run_script: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`run_here(*arguments)`: the script in an empty directory of its own."""
    main = load_main().main
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # pytest's Ctrl-C is its own

    def started(*arguments: str | Path) -> Result:
        done = run_script(main, *arguments)
        return Result(done.returncode, done.stdout, done.stderr)

    return started


REFUSED = {  # arguments (COMMON: of a run on sound data), exit code, and what the line must hold
    "no data": ([], 2, ["data/download_coco.sh", "--config recipes/quickstart.yaml", "data.root"]),
    "unknown setting": (["COMMON", "train.batchsize=3"], 2, ["'train.batchsize'", "'train.batch_size'"]),
    "unwritable output": (["COMMON", "run.logs_path=OVERLAY/logs"], 6, ["overlay.yaml/logs"]),
    "unknown logger": (["COMMON", "run.loggers=[files,mlflw]"], 2, ["run.loggers", "'mlflw'", "files, tensorboard"]),
    "no logger": (["COMMON", "run.loggers=[]", "--dry-run"], 2, ["run.loggers", "files must be among them"]),
    "no run to resume": (["--resume"], 2, ["logs/*/last.pt"]),
    "no such run": (["--resume", "nowhere"], 7, ["nowhere/last.pt", "does not exist"]),
    "resume with an overlay": (["--resume", "a", "--config", "OVERLAY"], 2, ["--config", "--resume"]),
    "resume elsewhere": (["--resume", "a", "--output", "b"], 2, ["--output", "--resume"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(scenarios: Scenarios, run_here: Callable[..., Result], tmp_path: Path, case: str) -> None:
    arguments, code, words = REFUSED[case]
    common = scenarios.common if "COMMON" in arguments else []
    given = [word.replace("OVERLAY", str(scenarios.overlay)) for word in arguments if word != "COMMON"]
    assert_refused(run_here(*common, *given), code, *words)
    assert not list(tmp_path.iterdir())


def test_absent_gpu(scenarios: Scenarios, run_here: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "available_devices", lambda: ["cpu"])
    assert_refused(run_here(*scenarios.common, "--gpu", "0"), 2, "cuda:0", "available: ", "cpu")


def test_changed_settings_are_refused_in_a_continued_run(scenarios: Scenarios, run_here: Callable[..., Result]) -> None:
    assert scenarios["stopped"].code == 143
    arguments = ["--resume", scenarios.base / "at_stop", "train.batch_size=4"]
    assert_refused(run_here(*arguments), 2, "train.batch_size was 2 and cannot become 4")


def test_output_directory_in_use(scenarios: Scenarios, run_here: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "last.pt").touch()
    assert_refused(run_here(*scenarios.common, "--output", "used"), 6, "used", "not empty", "--resume")
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["last.pt"]


def test_resume_on_data_of_other_classes(scenarios: Scenarios, run_here: Callable[..., Result], tmp_path: Path) -> None:
    assert scenarios["whole"].code == 0
    shutil.copytree(scenarios.data, tmp_path / "data")
    for file in (tmp_path / "data" / "annotations").iterdir():
        file.write_text(file.read_text().replace("green", "yellow"))
    arguments = ["--resume", scenarios.base / "whole", f"data.root={tmp_path / 'data'}"]
    assert_refused(run_here(*arguments), 7, "blue, green", "blue, yellow")


# Pretrained weights


def test_only_a_fresh_run_reads_pretrained_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = load_main()
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(OVERLAY))
    words = ["data.fake=true", "model.num_classes=3", "model.pretrained=gone.pth"]
    settings, _ = load_settings(DEFAULTS, [tmp_path / "overlay.yaml"], words)
    alone = module.join_ranks(settings)
    with pytest.raises(CheckpointError, match=r"gone\.pth: does not exist"):
        module.Run(settings, alone, fresh=True)
    assert module.Run(settings, alone, fresh=False).pretrained_lines == []  # all weights come from the checkpoint

    state = mobilenet_v3_small(weights=None).state_dict()
    torch.save(state, "gone.pth")
    run = module.Run(settings, alone, fresh=True)
    assert torch.equal(run.detector.model.backbone.stages[0][0][0].weight, state["features.0.0.weight"])
    assert any(line.startswith("pretrained  backbone") and "gone.pth" in line for line in plan_lines(run))


# Small ways to run


def test_help_is_short(run_here: Callable[..., Result]) -> None:
    result = run_here("--help")
    assert (result.code, result.err) == (0, "")
    assert len(result.out.splitlines()) <= 40
    for word in ("--config", "--resume", "--gpu", "--device", "--output", "--dry-run", "key.path=value", "args.yaml"):
        assert word in result.out


def test_dry_run_leaves_nothing(scenarios: Scenarios, run_here: Callable[..., Result], tmp_path: Path) -> None:
    result = run_here(*scenarios.common, "--dry-run")
    assert (result.code, result.err) == (0, ""), result
    assert_plain(result)
    # the plan: 2 x 2 images per step; the step runs at the largest size
    assert "= 4 images per step" in result.out and "one step at 96 px" in result.out
    assert not list(tmp_path.iterdir())


def test_fake_data_needs_no_dataset(scenarios: Scenarios, run_here: Callable[..., Result], tmp_path: Path) -> None:
    words = ["data.fake=true", "model.num_classes=3", "train.steps=1", "run.name=made-up", "data.num_workers=0"]
    result = run_here("--config", scenarios.overlay, *words, "evaluation.max_images=4")
    assert (result.code, result.err) == (0, ""), result
    assert_plain(result)
    (directory,) = (tmp_path / "logs").iterdir()  # the default, below the working directory
    assert directory.name.endswith("_made-up") and (directory / "last.pt").is_file()
