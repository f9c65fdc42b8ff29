import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from detection.config.command_line import DEFAULTS
from detection.config.loading import load_settings
from detection.errors import OutputError, SettingsError
from detection.training.loggers import LOGGERS, Loggers, build_loggers, check_loggers, open_loggers
from detection.training.loggers.protocol import FAILED, FINISHED, Logger
from tests.support.run_logging import logging_to, resumed_at

NAN, INFINITY = float("nan"), float("inf")


def read_metrics(directory: Path, name: str = "metrics.jsonl") -> list[dict[str, float | None]]:
    return [json.loads(row) for row in (directory / name).read_text().splitlines()]


def read_results(directory: Path) -> list[dict[str, str]]:
    with open(directory / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def read_events(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory))
    events.Reload()
    return events


def read_scalars(directory: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, round(event.value, 6)) for event in read_events(directory).Scalars(tag)]


# Numbers


def test_scalars_are_on_disk_before_close(tmp_path: Path) -> None:
    with logging_to(tmp_path / "logs" / "run") as logger:
        logger.log(10, {"loss/box": 0.5, "images seen": 640})
        logger.log(20, {"loss/box": 0.25})
        assert read_metrics(tmp_path / "logs" / "run") == [
            {"step": 10, "loss/box": 0.5, "images seen": 640},
            {"step": 20, "loss/box": 0.25},
        ]
        assert read_scalars(tmp_path / "logs" / "run", "loss/box") == [(10, 0.5), (20, 0.25)]
        assert read_scalars(tmp_path / "logs" / "run", "images seen") == [(10, 640)]


def test_evaluation_goes_everywhere(tmp_path: Path) -> None:
    with logging_to(tmp_path) as logger:
        logger.evaluation(100, {"AP": 0.25, "APs": None, "boxes": 12})
        assert (tmp_path / "results.csv").read_text() == "step,AP,APs,boxes\n100,0.25,,12\n"
    assert read_metrics(tmp_path) == [{"step": 100, "AP": 0.25, "APs": None, "boxes": 12}]
    assert read_scalars(tmp_path, "AP") == [(100, 0.25)]
    assert "APs" not in read_events(tmp_path).Tags()["scalars"]


def test_numbers_keep_all_their_digits_and_non_finite_ones_become_null(tmp_path: Path) -> None:
    with logging_to(tmp_path, tensorboard=False) as logger:
        logger.log(1, {"loss": NAN, "grad": INFINITY, "lr": 0.1})
        logger.evaluation(2, {"AP": NAN, "AP50": -INFINITY, "AP75": 1 / 3, "loss": np.float64(1e-17)})
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": None, "grad": None, "lr": 0.1},
        {"step": 2, "AP": None, "AP50": None, "AP75": 1 / 3, "loss": 1e-17},
    ]
    assert read_results(tmp_path) == [{"step": "2", "AP": "", "AP50": "", "AP75": str(1 / 3), "loss": "1e-17"}]


def test_first_row_fixes_the_columns(tmp_path: Path, capsys) -> None:
    with logging_to(tmp_path, tensorboard=False) as logger:
        logger.evaluation(1, {"AP": 0.1, "AP50": 0.2})
        logger.evaluation(2, {"AP50": 0.4, "new": 0.5})
    assert (tmp_path / "results.csv").read_text() == "step,AP,AP50\n1,0.1,0.2\n2,,0.4\n"
    assert read_metrics(tmp_path)[1] == {"step": 2, "AP50": 0.4, "new": 0.5}
    assert "no column new" in capsys.readouterr().out


@pytest.mark.parametrize("tag", ["loss", "AP/val person", "lr:0", "Größe_1-a.b/c", "AP/狗"])
def test_legal_tags(tmp_path: Path, tag: str) -> None:
    with logging_to(tmp_path, tensorboard=False) as logger:
        logger.evaluation(1, {tag: 1.5})
    assert read_metrics(tmp_path) == [{"step": 1, tag: 1.5}]
    with open(tmp_path / "results.csv", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["step", tag], ["1", "1.5"]]


@pytest.mark.parametrize(
    "tag", ["", "a,b", "AP@50", "a\nb", "loss\n", "a\\b", "50%", "/a", "a//b", "a/", "../a", "step"]
)
def test_illegal_tags_are_refused_and_nothing_written(tmp_path: Path, tag: str) -> None:
    with logging_to(tmp_path, tensorboard=False) as logger:
        for write in (logger.log, logger.evaluation):
            with pytest.raises(ValueError, match="tag"):
                write(1, {"loss": 1.0, tag: 1.0})
        with pytest.raises(ValueError, match="tag"):
            logger.image(1, tag, np.zeros((2, 2, 3), dtype=np.uint8))
    assert (tmp_path / "metrics.jsonl").read_text() == "" and (tmp_path / "results.csv").read_text() == ""


@pytest.mark.parametrize("value", [torch.tensor(1.0), np.float32(1), np.ones(1), "1"])
def test_only_python_numbers_are_accepted(tmp_path: Path, value: object) -> None:
    with logging_to(tmp_path, tensorboard=False) as logger:
        with pytest.raises(TypeError, match=r"loss must be a Python number.*float\(\)"):
            logger.log(1, {"loss": value})  # type: ignore[dict-item]
        with pytest.raises(TypeError, match="step must be an int"):
            logger.log(torch.tensor(1), {"loss": 1.0})  # type: ignore[arg-type]
    assert (tmp_path / "metrics.jsonl").read_text() == ""


# Resuming


def test_resume_moves_the_rows_that_will_be_repeated(tmp_path: Path, capsys) -> None:
    with logging_to(tmp_path) as logger:
        for step in (1, 2, 3, 4):
            logger.log(step, {"loss": float(step)})
        logger.evaluation(2, {"AP": 0.2})
        logger.evaluation(4, {"AP": 0.4})
        logger.line("first run")
    capsys.readouterr()
    with logging_to(tmp_path, resumed_at(2)) as logger:
        logger.log(3, {"loss": 30.0})
        logger.evaluation(4, {"AP": 0.44})

    assert [(row["step"], row.get("loss")) for row in read_metrics(tmp_path)] == [
        (1, 1.0), (2, 2.0), (2, None), (3, 30.0), (4, None),
    ]  # fmt: skip
    assert [row["step"] for row in read_metrics(tmp_path, "metrics.jsonl.discarded")] == [3, 4, 4]
    assert (tmp_path / "results.csv").read_text() == "step,AP\n2,0.2\n4,0.44\n"
    assert (tmp_path / "results.csv.discarded").read_text() == "4,0.4\n"
    assert read_scalars(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert read_scalars(tmp_path, "AP") == [(2, 0.2), (4, 0.44)]
    assert (tmp_path / "train.log").read_text().startswith("first run\n")
    assert "metrics.jsonl: 3 rows" in capsys.readouterr().out


def test_discarded_rows_of_every_resume_are_kept(tmp_path: Path) -> None:
    for loss in (1.0, 2.0, 3.0):
        with logging_to(tmp_path, resumed_at(0), tensorboard=False) as logger:
            logger.log(1, {"loss": loss})
    assert [row["loss"] for row in read_metrics(tmp_path)] == [3.0]
    assert [row["loss"] for row in read_metrics(tmp_path, "metrics.jsonl.discarded")] == [1.0, 2.0]


def test_resume_at_the_last_step_moves_nothing(tmp_path: Path, capsys) -> None:
    with logging_to(tmp_path, tensorboard=False) as logger:
        logger.evaluation(5, {"AP": 0.5})
    capsys.readouterr()
    with logging_to(tmp_path, resumed_at(5), tensorboard=False) as logger:
        logger.evaluation(10, {"AP": 0.6})
    assert (tmp_path / "results.csv").read_text() == "step,AP\n5,0.5\n10,0.6\n"
    assert not list(tmp_path.glob("*.discarded")) and not list(tmp_path.glob("*.tmp"))
    assert "moved" not in capsys.readouterr().out


@pytest.mark.parametrize("resume_step", [None, 2])
def test_rows_torn_by_a_crash_are_moved(tmp_path: Path, resume_step: int | None) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    (tmp_path / "results.csv").write_text("step,AP,AP50\n1,0.1,0.2\n2,0.1,0.")
    with logging_to(tmp_path, resume_step and resumed_at(resume_step), tensorboard=False) as logger:
        logger.evaluation(3, {"AP": 0.3, "AP50": 0.4})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3]
    assert (tmp_path / "results.csv").read_text() == "step,AP,AP50\n1,0.1,0.2\n3,0.3,0.4\n"
    assert (tmp_path / "metrics.jsonl.discarded").read_text() == '{"step": 2, "lo\n'
    assert (tmp_path / "results.csv.discarded").read_text() == "2,0.1,0.\n"


def test_torn_header_is_written_anew(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("step,AP,A")
    with logging_to(tmp_path, resumed_at(0), tensorboard=False) as logger:
        logger.evaluation(1, {"AP": 0.1, "AP50": 0.2})
    assert (tmp_path / "results.csv").read_text() == "step,AP,AP50\n1,0.1,0.2\n"


# Pictures


def test_image_comes_back_from_tensorboard(tmp_path: Path) -> None:
    from PIL import Image

    image = np.full((7, 5, 3), (200, 30, 60), dtype=np.uint8)
    with logging_to(tmp_path) as logger:
        logger.image(3, "validation/0", image)
        with pytest.raises(ValueError, match="RGB uint8"):
            logger.image(3, "validation/0", image.astype(np.float32))
        (event,) = read_events(tmp_path).Images("validation/0")  # on disk before close
    assert event.step == 3
    shown = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert shown.shape == image.shape and np.abs(shown.astype(int) - image).max() < 4  # JPEG


def test_without_tensorboard_one_notice_and_everything_else(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)  # importing it raises ModuleNotFoundError
    with logging_to(tmp_path, resumed_at(0)) as logger:
        logger.log(1, {"loss": 1.0})
        logger.evaluation(1, {"AP": 0.1})
        logger.image(1, "picture", np.zeros((2, 2, 3), dtype=np.uint8))
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "TensorBoard is not installed" in printed
    assert (tmp_path / "train.log").read_text() == printed
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "args.yaml", "environment_0.json", "images", "metrics.jsonl", "results.csv", "run.lock", "status.json",
        "train.log",
    ]  # fmt: skip
    assert len(read_metrics(tmp_path)) == 2


def test_pictures_of_the_run_directory(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    with logging_to(tmp_path, tensorboard=False) as logger:
        logger.image(0, "train_batch", image)
        logger.image(20, "validation", image)
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["train_batch.png", "validation_000020.jpg"]
    assert np.array_equal(cv2.imread(str(tmp_path / "images" / "train_batch.png"), cv2.IMREAD_COLOR_RGB), image)


def test_settings_and_environment_of_every_continuation(tmp_path: Path) -> None:
    for resumed in (None, resumed_at(4)):
        with logging_to(tmp_path, resumed, tensorboard=False):
            pass
    assert load_settings(tmp_path / "args.yaml") == load_settings(DEFAULTS)
    for name in ("environment.json", "environment_4.json"):
        assert json.loads((tmp_path / name).read_text()) == {"python": "3"}


# Lines


def test_line_is_printed_and_appended(tmp_path: Path, capsys) -> None:
    for text in ("first", "Größe 狗 \udcff"):  # the last is how Python reads a file name that is not UTF-8
        with logging_to(tmp_path) as logger:
            logger.line(text)
            assert (tmp_path / "train.log").read_text().splitlines()[-1] == text.replace("\udcff", "\\udcff")
    assert (tmp_path / "train.log").read_text() == "first\nGröße 狗 \\udcff\n"
    assert capsys.readouterr().out == "first\nGröße 狗 \\udcff\n"


def test_terminal_that_cannot_show_a_letter_does_not_stop_a_run(tmp_path: Path, monkeypatch) -> None:
    written = io.BytesIO()
    with logging_to(tmp_path, tensorboard=False) as logger:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
        logger.line("class 狗")
        assert written.getvalue() == b"class \\u72d7\n"  # flushed


def test_line_does_not_tear_the_progress_bar(tmp_path: Path, monkeypatch) -> None:
    terminal = io.StringIO()  # a terminal shows stdout and stderr in one place
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    with logging_to(tmp_path, tensorboard=False) as logger, tqdm(total=10, file=sys.stderr, ncols=40) as bar:
        bar.update(3)
        terminal.truncate(0)
        terminal.seek(0)
        logger.line("a line")
        seen = terminal.getvalue()
    before, after = seen.split("a line\n")
    assert before.endswith("\r") and before.strip() == ""  # the bar is wiped
    assert "3/10" in after  # and drawn again


# Failures


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError), logging_to(directory):
            pass


def test_full_disk_is_an_os_error_of_the_files(tmp_path: Path, full_disk) -> None:
    with logging_to(tmp_path, tensorboard=False) as logger:
        logger.log(1, {"loss": 1.0})
        files = logger._loggers["files"]
        with full_disk((tmp_path / "metrics.jsonl").stat().st_size + 5):
            with pytest.raises(OSError):
                logger.log(2, {"loss": 2.0})
            with pytest.raises(OSError):
                logger.finish(FAILED)
        with pytest.raises(ValueError, match="closed"):  # all of them, although the first failed
            files.line("too late")


def test_full_disk_switches_tensorboard_off(tmp_path: Path, full_disk, capfd) -> None:
    with logging_to(tmp_path) as logger:
        event_file = next(tmp_path.glob("events.*"))
        with full_disk(event_file.stat().st_size + 50):
            for step in (1, 2):
                logger.log(step, {"loss": 1.0})
        logger.log(3, {"loss": 3.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    out, err = capfd.readouterr()
    assert out.count("logger tensorboard is switched off: [Errno 27] File too large") == 1 and not err


def service(fails: str, calls: list[Any]) -> Logger:
    def method(name: str) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            calls.append((name, *arguments))
            if name == fails:
                raise ZeroDivisionError("no\nconnection")

        return call

    if fails == "build":
        method("build")()
    return SimpleNamespace(**{name: method(name) for name in METHODS})


METHODS = ("build", "start", "log", "evaluation", "line", "image", "artifact", "finish")


@pytest.mark.parametrize("fails", METHODS)
def test_a_logger_that_fails_is_named_once_and_switched_off(
    tmp_path: Path, default_settings, fails: str, capsys, monkeypatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setitem(LOGGERS, "service", lambda: service(fails, calls))
    check_loggers(["files", "service"])
    assert not calls
    loggers = Loggers(tmp_path, build_loggers(["files", "service"]))
    loggers.start(default_settings(), {})
    for step in (1, 2):
        loggers.log(step, {"loss": 1.0})
        loggers.line("a line")
        loggers.evaluation(step, {"AP": 0.5})
        loggers.image(step, "picture", np.zeros((2, 2, 3), dtype=np.uint8))
        loggers.artifact(tmp_path / "best.pt")
    loggers.finish(FINISHED)
    assert [name for name, *_ in calls].count(fails) == 1 and calls[-1][0] == fails
    line = "warning: logger service is switched off: no connection"
    assert (tmp_path / "train.log").read_text().splitlines().count(line) == 1
    assert capsys.readouterr().out.splitlines().count(line) == 1
    assert len(read_metrics(tmp_path)) == 4 and len(read_results(tmp_path)) == 2


def test_every_logger_gets_everything(tmp_path: Path, default_settings) -> None:
    calls: list[Any] = []
    loggers = Loggers(tmp_path, {"service": service("", calls)}, show=False)
    settings, resumed = default_settings(), resumed_at(7)
    loggers.start(settings, {"python": "3"}, resumed)
    loggers.artifact(tmp_path / "best.pt")
    loggers.finish(FAILED)
    loggers.finish(FINISHED)  # nothing is left to finish
    loggers.log(8, {"loss": 1.0})
    assert calls == [
        ("start", tmp_path, settings, {"python": "3"}, resumed), ("artifact", tmp_path / "best.pt"), ("finish", FAILED),
    ]  # fmt: skip


def test_a_resumed_run_keeps_the_name_of_its_directory(tmp_path: Path, default_settings, monkeypatch) -> None:
    calls: list[Any] = []
    monkeypatch.setitem(LOGGERS, "service", lambda: service("", calls))
    ranks = SimpleNamespace(is_first=True, broadcast=lambda value: value)
    settings = default_settings("run.loggers=[files,service]")
    run: Any = SimpleNamespace(settings=settings, ranks=ranks, device=torch.device("cpu"), precision="float32")
    open_loggers(run, tmp_path / "the run", {"step": 7, "progress": {"evaluated_step": 5}}).finish(FINISHED)
    assert calls[0][-1] == ("the run", 7, 5)


def test_names_of_loggers() -> None:
    assert list(build_loggers(["tensorboard", "files"])) == ["files", "tensorboard"]  # the lock comes first
    with pytest.raises(SettingsError, match=r"run\.loggers: unknown logger 'mlflw'; allowed are files, tensorboard"):
        build_loggers(["files", "mlflw"])
    with pytest.raises(SettingsError, match=r"run\.loggers = \['tensorboard'\]: files must be among them"):
        build_loggers(["tensorboard"])


def test_a_locked_directory_gets_no_event_file(tmp_path: Path) -> None:
    lock = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", lock, str(tmp_path / "run.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(OutputError, match="another process writes to"), logging_to(tmp_path):
            pass
        other.communicate(b"\n")
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
