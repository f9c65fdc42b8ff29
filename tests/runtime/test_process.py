"""`prepare_process` configures all scripts, and nothing changes global state without it."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import anchor_creator
import batch_overfit
import check_dataset
import detect
import export
import lr_scheduler_creator
import validation
import visualization
import visualize_batch
from detection.data.coco import CocoDataset
from detection.data.loaders import build_evaluation_loader
from detection.errors import DataReadError
from detection.runtime import devices
from tests.support.darknet_files import Files
from tests.support.detectors import transform_of
from tests.support.paths import REPOSITORY
from tests.support.training_runs import load_main

# The same device for every script

FAKE = ["data.fake=true", "model.num_classes=2"]
WEIGHTS = ["--weights", "net.weights", "--cfg", "net.cfg", "--names", "net.names"]
COMMANDS: dict[str, tuple[Callable[[], None], list[str]]] = {
    "main.py": (lambda: load_main().main(), FAKE),
    "batch_overfit.py": (batch_overfit.main, FAKE),
    "visualize_batch.py": (visualize_batch.main, FAKE),
    "visualization.py": (visualization.main, ["data.root=.", "--split", "val"]),
    "visualization.py --weights": (visualization.main, ["data.root=.", *WEIGHTS]),
    "validation.py": (validation.main, ["data.root=.", *WEIGHTS]),
    "detect.py": (detect.main, [*WEIGHTS, "val/1.png"]),
}


# Scripts that compute on no device, but read the settings.
WITHOUT_FLAGS: dict[str, tuple[Callable[[], None], list[str]]] = {
    "anchor_creator.py": (anchor_creator.main, ["data.root=."]),
    "check_dataset.py": (check_dataset.main, ["data.root=."]),
    "export.py": (export.main, ["--weights", "absent.pt"]),  # before the weights are looked at
    "lr_scheduler_creator.py": (lr_scheduler_creator.main, []),
}


@pytest.mark.parametrize("name", list(WITHOUT_FLAGS))
def test_scripts_without_device_flags_refuse_the_setting(files: Files, run_script, monkeypatch, name: str) -> None:
    monkeypatch.setattr(devices, "available_devices", lambda: ["cpu"])
    main, words = WITHOUT_FLAGS[name]
    result = run_script(main, *words, "run.device=cuda", cwd=files.root)
    assert (result.returncode, result.stderr) == (2, "device 'cuda' is not available here; available: cpu\n")
    assert not (files.root / "logs").exists()


@pytest.mark.parametrize("name", list(COMMANDS))
@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--device", "mps"], "device 'mps' is not available here; available: cpu"),
        (["--device", "cpu", "--lazy"], "run.lazy (--lazy) is a mode of device hpu, this is cpu; set run.lazy=false"),
    ],
)
def test_every_script_refuses_alike(
    files: Files, run_script, monkeypatch, name: str, flags: list[str], line: str
) -> None:
    monkeypatch.setattr(devices, "available_devices", lambda: ["cpu"])
    main, words = COMMANDS[name]
    result = run_script(main, *words, *flags, cwd=files.root)
    assert (result.returncode, result.stderr) == (2, f"{line}\n")
    assert not (files.root / "logs").exists()


# Nothing global changes on import or construction

WATCHED = r"""
import ast, atexit, contextlib, importlib, io, os, signal, sys, threading, warnings
from pathlib import Path
import cv2, torch

def state():
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    return {
        "signals": [signal.getsignal(number) for number in sorted(signal.valid_signals())],
        "atexit": atexit._ncallbacks(),
        "warnings": list(warnings.filters),
        "hooks": (sys.excepthook, threading.excepthook),
        "OpenCV": (cv2.getNumThreads(), cv2.utils.logging.getLogLevel()),
        "torch": (torch.are_deterministic_algorithms_enabled(), *cudnn, torch.get_num_threads()),
        "environment": dict(os.environ),
    }

def report(when, before):
    after = state()
    print(when, [name for name in before if before[name] != after[name]])

package = Path(sys.argv[1])
files = sorted(package.rglob("*.py"))
# What other packages do when they are imported is theirs.
others = set()
for file in files:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            others |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module)
for name in sorted(others, key=str):
    if name.split(".")[0] != "detection":
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
cv2.setNumThreads(2)
before = state()
for file in files:
    importlib.import_module(".".join(file.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"))
report("import", before)

from detection.config.command_line import DEFAULTS
from detection.config.loading import load_settings
from detection.data.loaders import build_evaluation_loader
from detection.inference.video import VideoReader
from detection.runtime.devices import machine_of
from detection.runtime.distributed import Ranks
from detection.runtime.signals import StopRequest
from detection.training.loggers import open_loggers
from detection.training.loggers.protocol import FINISHED
from detection.training.run import Run

def construct():
    words = ["data.fake=true", "data.num_workers=2", "model.num_classes=2", "model.backbone=mobilenet_v3_small",
             "yolo.neck_channels=[8,8,8]", "train.image_size=64", "evaluation.image_size=64", "train.batch_size=2",
             "run.deterministic=true"]
    settings = load_settings(DEFAULTS, words=words)[0]
    machine = machine_of(torch.device("cpu"), settings.run)
    run = Run(settings, Ranks(machine.device, lambda: "gloo", 60), fresh=True)
    run.new_state()
    stop = StopRequest()
    with contextlib.suppress(Exception):
        VideoReader(Path("gone.mp4"))
    loader = build_evaluation_loader(run.validation_set, 2, 2, machine.device)
    next(iter(loader))
    with contextlib.redirect_stdout(io.StringIO()):
        open_loggers(run, Path("run"), None).finish(FINISHED)
    done.append(True)

done = []
before = state()
thread = threading.Thread(target=construct)
thread.start()
thread.join()
report("construction", before)
assert done

from detection.data.workers import prepare_process
prepare_process()
report("prepare_process", before)
"""


@pytest.mark.slow  # imports everything; tests/test_layers.py does so for each eighth module
def test_importing_and_constructing_change_nothing_global(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, REPOSITORY / "detection"],
        cwd=tmp_path,
        env={
            "NO_ALBUMENTATIONS_UPDATE": "1",
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "import []",
        "construction []",
        "prepare_process ['atexit', 'warnings', 'OpenCV', 'environment']",  # shows that the watch would see something
    ]


# Damaged images


@pytest.fixture
def messages_of_opencv() -> Iterator[None]:
    """Reset the state to that before `prepare_process`."""
    before = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_WARNING)
    yield
    cv2.utils.logging.setLogLevel(before)


def truncated_bitmap() -> bytes:
    """OpenCV would log an error."""
    whole = cv2.imencode(".bmp", np.full((40, 40, 3), 90, np.uint8))[1].tobytes()
    return whole[: len(whole) // 2]


def test_a_damaged_image_in_a_worker_is_no_line_of_opencv(
    drawn_dataset: Path, default_settings, tmp_path: Path, messages_of_opencv, capfd
) -> None:
    cv2.imdecode(np.frombuffer(truncated_bitmap(), np.uint8), cv2.IMREAD_COLOR)
    assert "imdecode" in capfd.readouterr().err, "this process was not prepared"
    shutil.copytree(drawn_dataset, tmp_path, dirs_exist_ok=True)
    (tmp_path / "val" / "0.png").write_bytes(truncated_bitmap())
    dataset = CocoDataset(tmp_path / "val", tmp_path / "annotations" / "instances_val.json")
    dataset.sample_transform = transform_of(default_settings(), 64)
    with pytest.raises(DataReadError, match=r"0\.png"):
        next(iter(build_evaluation_loader(dataset, 1, 1, torch.device("cpu"))))
    assert capfd.readouterr().err == ""


def test_a_damaged_image_is_one_line_of_a_script(files: Files, run_script, messages_of_opencv) -> None:
    (files.root / "val" / "2.png").write_bytes(truncated_bitmap())
    words = ["data.root=.", "data.num_workers=0", "run.device=cpu", "run.precision=off"]
    result = run_script(validation.main, *WEIGHTS, *words, cwd=files.root)
    assert result.returncode == 3
    (line,) = result.stderr.splitlines()
    assert "2.png" in line
