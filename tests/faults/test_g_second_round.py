"""G: what broke beyond the first table: two processes in one run, ranks that differ, hostile text."""

import argparse
import ast
import json
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Listener
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from detection.checkpoints import DETECTOR_FIELDS, load_checkpoint, load_fields, save_checkpoint
from detection.config.command_line import DEFAULTS
from detection.config.loading import dump_settings, read_cfg
from detection.config.settings import Settings
from detection.config.yaml_files import read_settings_file, read_yaml
from detection.data import workers
from detection.data.workers import prepare_process
from detection.errors import CheckpointError, OutputError, SettingsError, escape, name_list
from detection.evaluation.error_analysis import write_csv
from detection.evaluation.report import class_lines
from detection.inference.exported_model import read_metadata
from detection.inference.results import Results
from detection.inference.video import VideoWriter
from detection.inference.weights import open_weights, read_names
from detection.models import build_detector
from detection.models.darknet.cfg import parse_cfg
from detection.runtime.distributed import differences
from detection.runtime.run_directory import new_run_directory
from detection.training.checkpoint_writer import CheckpointWriter
from detection.training.resume import open_resumed_run
from tests.support.checkpoint_cases import STOPPED
from tests.support.fault_runs import NETWORK
from tests.support.paths import REPOSITORY
from tests.support.processes import free_port
from tests.support.run_logging import logging_to

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


# G04: ranks that differ


def test_G04_what_differs_between_ranks_is_named() -> None:
    first = {"train.learning_rate": 0.001, "classes": "cat, dog", "run.seed": 1}
    assert differences([first, dict(first)]) == ""
    line = differences([first, first | {"run.seed": 2}, first | {"classes": "c" * 1000, "new": "\n"}])
    assert line.startswith("rank 1 differs from rank 0: run.seed is 2, not 1; rank 2 differs from rank 0: classes is c")
    assert len(line) < 250


def become_rank(main: ModuleType, rank: int, port: int) -> None:
    """What torchrun puts into the environment of its processes; without it their own exit codes are seen."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), TORCH_CPP_LOG_LEVEL="ERROR",
    )  # fmt: skip


def ends_of_two_ranks(launch, common: list[str], output: Path, other: list[str]) -> list[str]:
    port = free_port()
    runs = [
        launch(f"rank{rank}", *common, *words, "--output", output, fault=partial(become_rank, rank=rank, port=port))
        for rank, words in enumerate(([], other))
    ]
    return [run.ends_with(2) for run in runs]


@pytest.mark.faults
@pytest.mark.parametrize("word", ["run.seed=4", "train.learning_rate=0.5", "train.batch_size=1", "train.image_size=96"])
def test_G04_a_rank_of_other_settings_is_refused(launch, common: list[str], tmp_path: Path, word: str) -> None:
    key, _, value = word.partition("=")
    for line in ends_of_two_ranks(launch, common, tmp_path / "run", [word]):
        assert line.startswith(f"rank 1 differs from rank 0: {key} is {value}, not ")
    assert not (tmp_path / "run").exists()


@pytest.mark.faults
def test_G04_a_rank_of_other_data_is_refused(launch, common: list[str], dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "stale")
    file = tmp_path / "stale" / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][0] += 1
    file.write_text(json.dumps(content))
    for line in ends_of_two_ranks(launch, common, tmp_path / "run", [f"data.root={tmp_path / 'stale'}"]):
        assert line.startswith("rank 1 differs from rank 0: training annotations is ")
    assert not (tmp_path / "run").exists()


# G05 to G08: results, weights and files of a run that are not what they seem

# What writes under the final name: files of datasets, in directories that get their name last, and temporary ones.
IN_PLACE = ("detection/drawing/files.py", "detection/data/", "detection/models/darknet/weights.py")

OPENED_OR_RENAMED = [
    "detection/models/catalogue.py: open said",  # the text of the script that downloads
    "detection/models/catalogue.py: open self.path",  # a lock
    "detection/training/loggers/files.py: shortened.write_text",  # renamed there
    "detection/training/loggers/tensorboard.py: open directory / f'{name}.{number}'",  # grows, has a number
]


def test_G05_no_result_is_written_in_place() -> None:
    files = [*REPOSITORY.glob("*.py"), *(REPOSITORY / "detection").rglob("*.py")]
    names = {path.relative_to(REPOSITORY).as_posix(): path for path in files}
    found = []
    for name, path in names.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not name.startswith(IN_PLACE):
                written = node.func.attr in ("write_text", "write_bytes")
                found += [f"{name}: {ast.unparse(node.func)}"] * written
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "open" and not name.startswith(IN_PLACE):
                mode = ast.unparse(node.args[1]) if len(node.args) > 1 else "r"
                written = "w" in mode and ast.unparse(node.args[0]) != "temporary"
                found += [f"{name}: open {ast.unparse(node.args[0])}"] * written
    assert sorted(found) == OPENED_OR_RENAMED


def test_G05_a_video_killed_in_the_middle_leaves_the_previous_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("OPENCV_FFMPEG_LOGLEVEL", "-8")  # read by its first use, for all tests
    file = tmp_path / "clip.mp4"
    file.write_text("previous")
    VideoWriter(file, 5).write(np.zeros((32, 32, 3), np.uint8))
    assert file.read_text() == "previous"


def test_G05_detections_killed_in_the_middle_leave_the_previous_file(tmp_path: Path) -> None:
    file = tmp_path / "detections.json"
    file.write_text("previous")
    with pytest.raises(KeyError), Results(tmp_path, ["cat"], None, None):
        assert file.read_text() == "previous"  # what a kill would leave
        raise KeyError
    assert json.loads(file.read_text()) == [] and [path.name for path in tmp_path.iterdir()] == [file.name]


def test_G05_a_table_killed_in_the_middle_leaves_the_previous_file(tmp_path: Path) -> None:
    file = tmp_path / "errors.csv"
    write_csv(file, ["a", "b"], [[1, None]])

    def rows() -> Iterator[list[int]]:
        yield [2, 3]
        assert file.read_text() == "a,b\n1,\n"  # what a kill would leave
        raise KeyError

    with pytest.raises(KeyError):
        write_csv(file, ["a", "b"], rows())
    assert file.read_text() == "a,b\n1,\n" and [path.name for path in tmp_path.iterdir()] == [file.name]


def test_G06_weights_that_are_not_finite_are_refused(tmp_path: Path, default_settings) -> None:
    (tmp_path / "network.cfg").write_text(NETWORK)
    settings = default_settings("model.backbone=darknet_cfg", f"model.cfg={tmp_path / 'network.cfg'}")
    weights = build_detector(settings, 2).model.state_dict()
    name = next(iter(weights))
    weights[name].view(-1)[0] = float("nan")
    content = {"step": 1, "settings": settings.model_dump(mode="json"), "model": weights, "average": None}
    save_checkpoint(tmp_path / "best.pt", {**content, "categories": {"names": ["a", "b"], "ids": [1, 2]}})
    with pytest.raises(CheckpointError, match=f"1 of its {len(weights)} tensors have NaN or infinity.*{name}"):
        open_weights(tmp_path / "best.pt", None, None, DEFAULTS)


@pytest.fixture
def stopped(tmp_path: Path, default_settings) -> Path:
    """A run directory with what `--resume` reads first."""
    for name in ("last.pt", "best.pt"):
        save_checkpoint(tmp_path / name, STOPPED | {"settings": default_settings().model_dump(mode="json")})
    (tmp_path / "args.yaml").write_text(dump_settings(default_settings()))
    return tmp_path


def test_G07_an_edited_args_yaml_is_named(stopped: Path, default_settings) -> None:
    assert open_resumed_run(resume_words(stopped), [])[3] == []
    (stopped / "args.yaml").write_text(dump_settings(default_settings("train.learning_rate=0.5")))
    (line,) = open_resumed_run(resume_words(stopped), [])[3]
    assert "args.yaml: train.learning_rate = 0.5 is not followed, last.pt has 0.0001" in line
    (stopped / "args.yaml").write_text("a: [\n")
    (line,) = open_resumed_run(resume_words(stopped), [])[3]
    assert line.startswith("warning     args.yaml is written anew")


def test_G08_a_lost_best_is_named_and_written_again(stopped: Path) -> None:
    (stopped / "best.pt").unlink()
    checkpoint, _, _, notices, _ = open_resumed_run(resume_words(stopped), [])
    assert notices == ["warning     best.pt, of step 2, is gone; the next evaluation writes a new one"]
    assert checkpoint["progress"]["best_value"] is None


@pytest.mark.faults
def test_G08_a_lost_best_is_not_named_as_if_it_were_there(train, launch, tmp_path: Path) -> None:
    train("run", "evaluation.evaluate_frequency=4", "train.steps=4").ends_with(0)
    (tmp_path / "run" / "best.pt").unlink()
    out = launch("second", "--resume", tmp_path / "run", "train.steps=8").ends_with(0, "best.pt, of step 4, is gone")
    assert "which is gone" not in out and load_checkpoint(tmp_path / "run" / "best.pt")["step"] == 8


# G09, G10: limits of the system


@pytest.fixture
def long_tmpdir(tmp_path: Path, monkeypatch) -> Path:
    """A temporary folder with a path of more than 107 bytes, not yet used by multiprocessing."""
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setitem(multiprocessing.process.current_process()._config, "tempdir", None)
    return folder


def test_G09_a_long_tmpdir_does_not_hang_the_loader(long_tmpdir: Path) -> None:
    with pytest.raises(OSError, match="AF_UNIX path too long"):
        Listener(family="AF_UNIX")
    multiprocessing.process.current_process()._config["tempdir"] = None
    prepare_process()
    with Listener(family="AF_UNIX") as listener:
        assert len(str(listener.address)) < 107
    assert tempfile.gettempdir() == str(long_tmpdir)


def test_G09_no_short_folder_is_said(long_tmpdir: Path, monkeypatch) -> None:
    monkeypatch.setattr(workers, "SHORT_TMPDIRS", ("/nowhere",))
    with pytest.raises(SettingsError, match=r"^TMPDIR has \d+ bytes, sockets allow 75: set a shorter one$"):
        prepare_process()


def test_G10_a_low_limit_of_open_files_is_raised_or_said(monkeypatch) -> None:
    limits = [24, 1024]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.__setitem__(slice(None), new))
    workers.require_files(8)
    assert limits == [1024, 1024]
    limits[:] = [64, 64]
    with pytest.raises(SettingsError, match=r"at most 64 files may be open \(ulimit -n\), 128 are needed: raise it$"):
        workers.require_files(0)
    limits[:] = [200, 200]
    workers.require_files(0)
    with pytest.raises(SettingsError, match=r"256 are needed: raise it, or lower data.num_workers \(8\)$"):
        workers.require_files(8)


# G11: text from files

HOSTILE = "cat\nstep 9: AP 1.000\x1b[2J\x9b\u202egod"
ESCAPED = "cat\\nstep 9: AP 1.000\\x1b[2J\\x9b\\u202egod"


def test_G11_what_a_terminal_obeys_is_escaped() -> None:
    assert escape(HOSTILE) == ESCAPED and escape(ESCAPED) == ESCAPED
    assert escape("Größe 狗\t👩‍🚒 \\n") == "Größe 狗\t👩‍🚒 \\n"
    assert name_list([HOSTILE, "dog"]) == f"{ESCAPED}, dog"
    assert SettingsError(f"{HOSTILE}: unknown").line == f"{ESCAPED}: unknown"


def test_G11_no_class_name_forges_a_line(tmp_path: Path, capsys) -> None:
    with logging_to(tmp_path) as loggers:
        for line in class_lines({HOSTILE: (0.5, 0.5, 1)}):
            loggers.line(line)
        loggers.line(HOSTILE)
    log = (tmp_path / "train.log").read_text()
    assert log.count("\n") == 3 and log.endswith(f"{ESCAPED}\n") and capsys.readouterr().out == log


# G12, G13, G14: hostile files


def shared_lists() -> list:
    content: list = [0]
    for _ in range(60):
        content = [content, content]
    return content


def endless_list() -> list:
    content: list = []
    content.append(content)
    return content


@pytest.mark.parametrize(
    "content", [shared_lists(), endless_list(), torch.zeros(1).expand(10**12), [torch.zeros(10**6)] * 10**6]
)
def test_G12_content_that_repeats_itself_is_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "last.pt"
    torch.save({"format": 3, "digest": "", "x": content}, path)
    with pytest.raises(CheckpointError, match="repeats itself to many times the size of the file"):
        load_checkpoint(path)


def test_G12_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(10**6)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"it would unpack to 40\d+ bytes, more than it has"):
        load_checkpoint(tmp_path / "bomb.pt")


def test_G12_a_negative_step_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last.pt", {"step": -1, "settings": {}, "categories": {}, "model": {}})
    with pytest.raises(CheckpointError, match="'step' is missing or no int"):
        load_fields(tmp_path / "last.pt", DETECTOR_FIELDS)


# Each with what is said.
ODD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"format": 4}, "has format version 4, this program reads 1 to 3"),
    ({"format": "9\n"}, r"has format version 9\\n, this program reads 1 to 3"),
    ({"format": torch.zeros(2)}, "has format version tensor"),
    ({"step": -1}, "is not of a training run: 'step' is missing or no int"),
    ({"step": True}, "is not of a training run: 'step' is missing or no int"),
    ({"step": 10**30}, "is not of a training run: 'step' is missing or no int"),
    ({"step": 3.0}, "is not of a training run: 'step' is missing or no int"),
    ({"categories": {}}, "is refused: 'categories' must be the names of one class or more, and their ids, is a dict"),
    ({"categories": {"names": [], "ids": []}}, "is refused: 'categories'"),
    ({"categories": {"names": ["a"], "ids": [1, 2]}}, "is refused: 'categories'"),
    ({"categories": {"names": [None, 3], "ids": [1, 2]}}, "is refused: 'categories'"),
    ({"categories": {"names": "ab", "ids": [1, 2]}}, "is refused: 'categories'"),
    ({"model": {"weight": 1.0}}, "is refused: 'model' must be tensors by name, is a dict"),
    ({"model": {0: torch.zeros(1)}}, "is refused: 'model'"),
    ({"average": [1]}, "is refused: 'average' must be tensors by name, or None, is a list"),
    ({"settings": {"x": 1}}, "its settings cannot be used: checkpoint: unknown setting 'x'"),
    ({"settings": {0: 1}}, "its settings cannot be used: "),
    ({"settings": {"train": {"learning_rate": float("nan")}}}, "its settings cannot be used: train.learning_rate"),
    ({"settings": {"train": {"learning_rate": torch.zeros(2)}}}, "its settings cannot be used: train.learning_rate"),
]
ODD_STATES: list[tuple[dict[str, Any], str]] = [
    ({"optimizer": {"state": {}, "param_groups": [{"lr": float("nan")}]}}, "is refused: 'optimizer'"),
    ({"optimizer": {"state": {}, "param_groups": [{"betas": (0.9, float("inf"))}]}}, "is refused: 'optimizer'"),
    ({"optimizer": {}}, "is refused: 'optimizer' must be 'state' and 'param_groups' with finite numbers"),
    ({"progress": {}}, "is refused: 'progress'"),
    ({"progress": STOPPED["progress"] | {"best_value": float("nan")}}, "is refused: 'progress'"),
    ({"progress": STOPPED["progress"] | {"evaluated_step": None}}, "is refused: 'progress'"),
    ({"conditions": 3}, "is refused: 'conditions' must be a dict, is 3"),
    ({"extended": [[1]]}, "is refused: 'extended'"),
    ({"skipped": {"total": "x"}}, "is refused: 'skipped'"),
    ({"data_digest": 3}, "is not of a training run: 'data_digest' is missing or no str"),
]


def odd_checkpoint(directory: Path, settings: Settings, changes: dict[str, Any], monkeypatch) -> Path:
    """Write last.pt with a right digest; this program reads back what it writes, so the check is left out here."""
    path = directory / "last.pt"
    with monkeypatch.context() as patched:
        patched.setattr("detection.checkpoints.load_checkpoint", lambda _: None)
        save_checkpoint(path, STOPPED | {"settings": settings.model_dump(mode="json")} | changes)
    return path


@pytest.mark.parametrize(("changes", "said"), [*ODD_FIELDS, *ODD_STATES])
def test_G15_odd_fields_are_refused_by_resume(
    tmp_path: Path, default_settings, monkeypatch, changes: dict[str, Any], said: str
) -> None:
    path = odd_checkpoint(tmp_path, default_settings(), changes, monkeypatch)
    with pytest.raises(CheckpointError) as raised:
        open_resumed_run(resume_words(tmp_path), [])
    line = raised.value.line
    assert line.startswith(f"checkpoint {path}") and re.search(said, line), line
    assert len(line) < len(str(path)) + 400 and "intact" not in line and raised.value.exit_code == 7


@pytest.mark.parametrize(("changes", "said"), ODD_FIELDS)
def test_G15_odd_fields_are_refused_by_what_opens_weights(
    tmp_path: Path, default_settings, monkeypatch, changes: dict[str, Any], said: str
) -> None:
    path = odd_checkpoint(tmp_path, default_settings(), changes, monkeypatch)
    with pytest.raises(CheckpointError) as raised:
        open_weights(path, None, None, DEFAULTS)
    line = raised.value.line
    assert line.startswith(f"checkpoint {path}") and re.search(said, line), line


BOMB = "a0: &a0 [0, 0]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))


@pytest.mark.parametrize("text", ["a: &a [*a]", BOMB, f"a: {'9' * 10**5}", "a: !!bool q", "[" * 10**4, "a: !!int x"])
def test_G13_hostile_yaml_is_one_short_line(text: str) -> None:
    with pytest.raises(SettingsError) as raised:
        read_yaml(text, "overlay.yaml")
    assert raised.value.line.startswith("overlay.yaml: not valid YAML: ") and len(raised.value.line) < 400


def test_G14_endless_files_are_bounded() -> None:
    endless = Path("/dev/zero")
    for read in (read_names, read_settings_file, lambda path: read_cfg(str(path))):
        with pytest.raises(SettingsError, match="it has more than 16 MiB"):
            read(endless)


def test_G14_very_many_sections() -> None:
    with pytest.raises(SettingsError, match="line 10001: more than 10000 sections"):
        parse_cfg("[convolutional]\n" * 10**5)


def test_G14_nested_metadata_of_an_exported_file() -> None:
    nested = {"program": '"x"', "output_kind": "[" * 10**5}
    with pytest.raises(CheckpointError, match="its metadata is damaged"):
        read_metadata(nested, Path("x.onnx"))


# G16: logs that somebody removes or renames while the run writes to them


def removed(path: Path) -> None:
    path.unlink()


def rotated(path: Path) -> None:
    path.rename(path.with_name(f"{path.name}.1"))


def replaced_by_a_copy(path: Path) -> None:
    """What `sed -i` and most editors do."""
    shutil.copyfile(path, path.with_name("copy"))
    path.with_name("copy").replace(path)


@pytest.mark.parametrize("lose", [removed, rotated, replaced_by_a_copy])
@pytest.mark.parametrize("name", ["train.log", "metrics.jsonl", "results.csv"])
def test_G16_a_log_that_is_lost_in_mid_run_is_made_anew(tmp_path: Path, capsys, name: str, lose) -> None:
    file = tmp_path / name
    with logging_to(tmp_path) as loggers:
        loggers.line("first line")
        loggers.evaluation(1, {"val/AP": 0.25})
        before = file.read_text()
        lose(file)
        loggers.line("second line")
        loggers.evaluation(2, {"val/AP": 0.5})
        loggers.line("third line")
    said = f"warning: {name} was removed or renamed while the run writes to it; it goes on in a new one"
    kept = before if lose is replaced_by_a_copy else ""
    header = "" if kept else "step,val/AP\n"
    after = {
        "train.log": "second line\nthird line\n",
        "metrics.jsonl": '{"step": 2, "val/AP": 0.5}\n',
        "results.csv": f"{header}2,0.5\n",
    }
    log = (tmp_path / "train.log").read_text()
    assert log.count(said) == 1 == capsys.readouterr().out.count(said)
    assert file.read_text().replace(f"{said}\n", "") == kept + after[name]
    if lose is rotated:
        assert (tmp_path / f"{name}.1").read_text() == before


def test_G16_a_table_that_is_emptied_gets_its_header_again(tmp_path: Path) -> None:
    with logging_to(tmp_path) as loggers:
        loggers.evaluation(1, {"val/AP": 0.25})
        (tmp_path / "results.csv").write_text("")
        loggers.evaluation(2, {"val/AP": 0.5})
    assert (tmp_path / "results.csv").read_text() == "step,val/AP\n2,0.5\n"


# G17: standard streams

CLOSED = "<&- >&- 2>&-"


def test_G17_a_closed_stream_gives_its_number_to_no_file(tmp_path: Path) -> None:
    program = (
        "import os, sys; from detection.errors import closed_streams, exit_with_message\n"
        "def main():\n"
        "    file = open('result', 'w'); print(file.fileno(), closed_streams(), file=file, flush=True)\n"
        "    os.system('echo from a program; echo from a program >&2'); os.write(1, b'from a library')\n"
        "    print('line'); input()\n"
        "try: exit_with_message(main)\n"
        "except EOFError: print('end of input', file=open('result', 'a'))"
    )
    command = [sys.executable, "-c", program]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(["sh", "-c", f'exec "$@" {CLOSED}', "sh", *command], cwd=tmp_path, env=environment)
    assert done.returncode == 0
    assert (tmp_path / "result").read_text() == "3 ['stdout', 'stderr']\nend of input\n"


@pytest.mark.faults
@pytest.mark.parametrize(
    ("streams", "encoding"), [(CLOSED, "utf-8"), ("2>&-", "utf-8"), (">out 2>err", "ascii:strict")]
)
def test_G17_streams_that_are_closed_or_lack_letters(
    common: list[str], dataset: Path, tmp_path: Path, streams: str, encoding: str
) -> None:
    """A training, then detect.py and validation.py with its weights, on a class and images with Chinese names."""
    shutil.copytree(dataset, data := tmp_path / "data")
    for split in ("train", "val"):
        file = data / "annotations" / f"instances_{split}.json"
        file.write_text(file.read_text().replace("blue", "狗").replace('.png"', '狗.png"'))
        for image in (data / split).iterdir():
            image.rename(image.with_stem(f"{image.stem}狗"))
    words = [*common, f"data.root={data}", "data.num_workers=1", "train.steps=2", "evaluation.evaluate_frequency=2"]
    best, environment = ["--weights", "run/best.pt"], os.environ | {"PYTHONIOENCODING": encoding}
    for script, *arguments in (
        ["yolo-v3/main.py", *words, "--output", "run"],
        ["detect.py", *best, "data/val", "--output", "found"],
        ["validation.py", *best, f"data.root={data}", "--output", "measured"],
    ):
        command = ["sh", "-c", f'exec "$@" {streams}', "sh", sys.executable, str(REPOSITORY / script), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, b"")
    log = (tmp_path / "run" / "train.log").read_text()
    assert "狗" in log and "finished at step 2" in log
    assert ("closed by the caller" in log) == ("&-" in streams)
    assert (tmp_path / "found" / "0狗.jpg").is_file() and (tmp_path / "measured" / "metrics.json").is_file()
    assert "&-" in streams or "\\u72d7" in (tmp_path / "out").read_text()


# G18: images that are replaced while nobody looks


@pytest.mark.faults
def test_G18_replaced_images_are_refused_by_resume_unless_told(train, launch, dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, data := tmp_path / "data")
    words = [f"data.root={data}", "train.steps=2", "evaluation.evaluate_frequency=2"]
    train("run", *words).ends_with(0)
    image = data / "train" / "1.png"
    status = image.stat()
    shutil.copyfile(data / "train" / "2.png", image)
    os.truncate(image, status.st_size)  # of the same size
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    resume = ["--resume", tmp_path / "run", "train.steps=3"]
    line = "1 training image has another size or time: 1.png"
    launch("resumed", *resume).ends_with(2, line, "--accept-changes")
    launch("told", *resume, "--accept-changes").ends_with(0, line)
