"""Habana's HPU, with its software replaced by `tests/support/stand_in`, which computes on the CPU."""

import functools
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import mobilenet_v3_small

from detection.checkpoints import load_checkpoint
from detection.config.settings import Settings
from detection.data.loaders import SMALLEST_BUCKET, build_training_loader, collate_samples
from detection.data.sampler import TrainingBatchSampler
from detection.errors import SettingsError
from detection.models import build_detector
from detection.runtime import devices
from detection.runtime.devices import (
    autocast,
    available_memory,
    build_scaler,
    choose_device,
    choose_precision,
    compile_forward,
    describe_device,
    nms_device,
    open_machine,
    peak_memory_gib,
    pins_memory,
    prepare_distributed,
)
from detection.runtime.habana import LAZY_MODE, prepare_habana, wants_lazy
from detection.training.optimizer import build_optimizer
from detection.training.step import train_step
from tests.support.detectors import datasets_of
from tests.support.paths import REPOSITORY
from tests.support.processes import free_port
from tests.support.training_runs import load_main

STAND_IN = REPOSITORY / "tests" / "support" / "stand_in"
HPU = torch.device("hpu")
SMALL = (
    "data.fake=true", "data.num_workers=0", "model.num_classes=2", "model.backbone=mobilenet_v3_small",
    "yolo.neck_channels=[8,8,8]", "train.batch_size=2", "train.image_size=64",
)  # fmt: skip
ENTERED = "autocast hpu torch.bfloat16"


@pytest.fixture
def stand_in(monkeypatch, tmp_path: Path) -> Iterator[Callable[[], list[str]]]:
    """Install the stand-in; returns a function that lists the events so far."""
    file = tmp_path / "events"
    file.touch()
    monkeypatch.setenv("HPU_EVENTS", str(file))
    monkeypatch.setenv(LAZY_MODE, "0")
    monkeypatch.syspath_prepend(STAND_IN)
    yield lambda: file.read_text().splitlines()
    if package := sys.modules.get("habana_frameworks.torch"):
        package.remove()
    forget_software()


def forget_software() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "habana_frameworks"]:
        del sys.modules[name]


def step_events(subdivisions: int, lazy: bool) -> list[str]:
    """List the expected events of a step; lazy graphs run after each backward pass and after the optimizer."""
    mark = ["mark_step"] if lazy else []
    return [ENTERED, "backward", *mark] * subdivisions + ["optimizer", *mark]


def real_steps(settings: Settings, steps: int) -> None:
    """Take training steps as the training script does, with its loader."""
    train, machine = settings.train, open_machine(settings.run)
    device = machine.device
    dtype = choose_precision(device, settings.run.precision)
    scaler = build_scaler(device, dtype)
    assert not scaler.is_enabled()
    dataset, _ = datasets_of(settings, train.image_size, train.image_size, 0, settings.model.num_classes)
    detector = build_detector(settings, 2).to(device, settings.run.channels_last)
    assert detector.criterion is not None
    sampler = TrainingBatchSampler(len(dataset), train.batch_size, train.subdivisions, (0, steps), 0, train.image_size)
    batches = iter(build_training_loader(dataset, sampler, 0, torch.device("cpu")))
    model, optimizer = detector.model.train(), build_optimizer(detector.model, train)
    for _ in range(steps):
        train_step(
            model,
            detector.criterion.to(device),
            optimizer,
            scaler,
            [next(batches) for _ in range(train.subdivisions)],
            functools.partial(autocast, device, dtype),
            device,
            train.clip_norm,
            mark_step=machine.mark_step,
        )


# The calls of a training step


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("subdivisions", [1, 3])
def test_calls_of_training_steps(stand_in, monkeypatch, default_settings, subdivisions: int, lazy: bool) -> None:
    monkeypatch.setenv(LAZY_MODE, str(int(lazy)))
    words = ("run.device=hpu", f"run.lazy={str(lazy).lower()}", f"train.subdivisions={subdivisions}")
    real_steps(default_settings(*SMALL, *words), steps=2)
    events = stand_in()
    assert events[0] == f"import habana_frameworks.torch, {LAZY_MODE}={int(lazy)}"
    assert events[1:] == step_events(subdivisions, lazy) * 2


# The training script in its own process

SCRIPT_RUNS: dict[str, tuple[bool, int, list[str]]] = {
    "lazy": (True, 3, ["--config", "lazy.yaml", "train.subdivisions=3"]),
    "eager": (False, 1, ["--hpu=1", "--deterministic", "run.compile=true"]),
}


@pytest.mark.slow  # starts a process; test_the_example_of_one_card is the same loop in this one
@pytest.mark.parametrize("name", list(SCRIPT_RUNS))
def test_the_script_makes_the_calls_of_its_steps(tmp_path: Path, name: str) -> None:
    """Lazy mode is selected by an overlay."""
    lazy, subdivisions, words = SCRIPT_RUNS[name]
    (tmp_path / "lazy.yaml").write_text("run: {device: hpu, lazy: true}\n")
    command = [
        sys.executable, REPOSITORY / "yolo-v3" / "main.py", *SMALL, *words, "train.steps=2", "evaluation.image_size=64",
        "evaluation.max_images=2", "--eval-batch-size", "2", "--log-interval=1", "--output", "run",
    ]  # fmt: skip
    done = run_with(STAND_IN, tmp_path, command)
    assert done.returncode == 0, done.stdout + done.stderr
    events = (tmp_path / "events").read_text().splitlines()
    # torch finds the mode when it is imported
    assert events[0] == f"import torch, {LAZY_MODE}={int(lazy)}"
    assert events[1] == f"import habana_frameworks.torch, {LAZY_MODE}={int(lazy)}"
    assert f"device      hpu (STAND-IN, {name}), bfloat16" in done.stdout
    # The network is compiled when its first forward pass of the training runs, not before and not again.
    assert ("setDeterministic True" in events, events.count("compiled a graph")) == ((False, 0) if lazy else (True, 1))
    events = [event for event in events if event != "compiled a graph"]
    # Other passes (a trial before the first step, evaluations) may come before and after.
    assert "\n".join(step_events(subdivisions, lazy) * 2) in "\n".join(events)
    assert events.count("mark_step") == (events.count("backward") + events.count("optimizer") if lazy else 0)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["scaler"] == {}


def run_with(software: Path, directory: Path, command: list[Any]) -> subprocess.CompletedProcess[str]:
    """A process with Habana's software replaced by this; its events go to directory/events."""
    (directory / "events").touch()
    stand_in = {"PYTHONPATH": str(software), "HPU_EVENTS": str(directory / "events"), "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in os.environ.items() if name != LAZY_MODE} | stand_in
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=240)


# The environment


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], False),
        (["--lazy"], True),
        (["run.lazy=true"], True),
        (["run={lazy: true, seed: 2}"], True),
        (["run.lazy=true", "run.lazy=false"], False),
        (["--config", "lazy.yaml", "--device", "hpu"], True),
        (["--config=lazy.yaml", "run.lazy=false"], False),
        (["--config", "lazy.yaml", "--config", "eager.yaml"], False),
        (["--resume", "logs/one"], True),
        (["--resume"], True),
        (["--resume", "train.steps=9"], True),
        (["--resume", "logs/one", "run.lazy=false"], False),
        (["--resume", "run.logs_path=elsewhere"], False),
        (["--config", "missing.yaml", "--lazy"], False),  # the script itself will say so
        (["photo.jpg", "--weights", "a=b.pt", "--lazy"], True),
    ],
)
def test_the_mode_is_read_from_the_command_line(
    tmp_path: Path, monkeypatch, arguments: list[str], expected: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lazy.yaml").write_text("run: {lazy: true}\n")
    Path("eager.yaml").write_text("run.lazy: false\n")
    Path("logs/one").mkdir(parents=True)
    Path("logs/one/last.pt").touch()
    Path("logs/one/args.yaml").write_text("run: {lazy: true, device: hpu}\n")
    assert wants_lazy(arguments) is expected


def test_nothing_is_set_without_habanas_software(monkeypatch) -> None:
    monkeypatch.delenv(LAZY_MODE, raising=False)
    prepare_habana(["--lazy"])
    assert LAZY_MODE not in os.environ


def test_a_mode_that_is_set_stays_and_must_agree(stand_in, monkeypatch, default_settings) -> None:
    monkeypatch.setenv(LAZY_MODE, "1")
    prepare_habana(["run.lazy=false"])
    assert os.environ[LAZY_MODE] == "1"
    with pytest.raises(SettingsError, match=f"^run.lazy = false needs {LAZY_MODE}=0, the environment has 1; set it "):
        open_machine(default_settings("run.device=hpu").run)
    monkeypatch.delenv(LAZY_MODE)
    with pytest.raises(SettingsError, match="=1, the environment has no such variable; "):
        open_machine(default_settings("run.device=hpu", "run.lazy=true").run)


def test_lazy_mode_is_for_hpu_only_and_does_not_compile(default_settings) -> None:
    with pytest.raises(SettingsError, match=r"^run.lazy \(--lazy\) is a mode of device hpu, this is cpu"):
        open_machine(default_settings("run.device=cpu", "run.lazy=true").run)
    with pytest.raises(SettingsError, match=r"^run.compile: must be false in lazy mode"):
        default_settings("run.lazy=true", "run.compile=true")


# What the device says of itself


def test_the_device_is_found_and_described(stand_in) -> None:
    assert choose_device("hpu") == choose_device("auto") == HPU
    assert describe_device(HPU) == "hpu (STAND-IN, eager)"
    assert peak_memory_gib(HPU) == 3.0
    assert available_memory(HPU) == (96 - 5) * 2**30
    assert pins_memory(HPU) == torch.accelerator.is_available()  # torch itself must know the accelerator


def test_software_that_does_not_fit_this_torch_is_named(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "habana_frameworks" / "torch").mkdir(parents=True)
    (tmp_path / "habana_frameworks" / "torch" / "__init__.py").write_text("assert False, 'built for torch 2.7'")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(devices, "_hpu_failure", "")
    with pytest.raises(
        SettingsError, match=r"'hpu' is not available here \(habana_frameworks: built for torch 2.7\); "
    ):
        choose_device("hpu")
    forget_software()


def test_detections_are_picked_on_the_host() -> None:
    assert nms_device(HPU) == nms_device(torch.device("mps")) == torch.device("cpu")
    assert nms_device(torch.device("cuda", 1)) == torch.device("cuda", 1)


# Several devices


def test_backend_of_each_device(stand_in) -> None:
    assert [prepare_distributed(name) for name in ("cpu", "mps", "cuda")] == ["gloo", "gloo", "nccl"]
    assert stand_in() == []
    assert prepare_distributed("hpu") == "hccl"
    assert stand_in()[-1] == "import hccl"


def test_hccl_is_imported_before_the_process_group_starts(stand_in, monkeypatch) -> None:
    distributed = pytest.importorskip("detection.runtime.distributed")
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))

    def started(backend: str, **_: Any) -> None:  # after the rendezvous, which is not there to be met
        from habana_frameworks import record

        record(f"init_process_group {backend}")

    monkeypatch.setattr(torch.distributed, "init_process_group", started)
    store = types.SimpleNamespace(set_timeout=lambda timeout: None)
    monkeypatch.setattr(distributed, "rendezvous", lambda *_, **__: iter([(store, 0, 2)]))
    monkeypatch.setattr(torch.distributed, "new_group", lambda **_: None)
    distributed.Ranks(HPU, functools.partial(prepare_distributed, "hpu"), 10)
    assert stand_in()[-2:] == ["import hccl", "init_process_group cpu:gloo,hpu:hccl"]


EIGHT_CARDS = [  # the recipe of eight cards, small
    *("--config", REPOSITORY / "recipes" / "d53_320_273e_8x16.yaml", "data.fake=true", "model.num_classes=2"),
    *("model.backbone=mobilenet_v3_small", "model.pretrained=false", "yolo.neck_channels=[8,8,8]"),
    *("train.batch_size=2", "train.image_size=64", "train.steps=2", "evaluation.image_size=64"),
    *("evaluation.max_images=2", "data.num_workers=0", "run.preflight=false", "run.log_frequency=1"),
]


@pytest.mark.slow  # 20 s
@pytest.mark.parametrize("complete", [True, False])
def test_the_recipe_of_eight_cards_with_two_processes(tmp_path: Path, complete: bool) -> None:
    """End to end over hccl, replaced by gloo; a one-line error if Habana's software lacks it."""
    software = STAND_IN
    if not complete:
        software = tmp_path / "software"
        shutil.copytree(STAND_IN, software, ignore=shutil.ignore_patterns("distributed"))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"),
        *(REPOSITORY / "yolo-v3" / "main.py", *EIGHT_CARDS, "--output", tmp_path / "run"),
    ]
    done = run_with(software, tmp_path, command)
    if not complete:
        assert done.returncode != 0 and "need Habana's hccl, which is missing" in done.stderr
        assert 'main.py", line' not in done.stderr, done.stderr  # no traceback of ours
        return
    assert done.returncode == 0, done.stderr
    assert "2 processes = 4 images per step" in done.stdout and "finished at step 2" in done.stdout
    assert load_checkpoint(tmp_path / "run" / "last.pt")["conditions"]["processes"] == 2
    assert (tmp_path / "events").read_text().count("process group hccl") == 2


# Static shapes, and what MPS lacks


class Forbidden(TorchDispatchMode):
    """Collects operations with data-dependent result shapes or float64 results."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        self.operations += 1
        masks = function is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in arguments[1]
        )
        if masks or (torch.Tag.dynamic_output_shape in function.tags and function is not torch.ops.aten.index.Tensor):
            self.found.add(str(function))
        if isinstance(result, torch.Tensor) and result.dtype is torch.float64:
            self.found.add(f"float64 of {function}")
        return result


@pytest.mark.parametrize("loss", ["darknet", "giou", "ciou", "mmdetection"])
def test_no_shape_in_a_step_depends_on_values(default_settings, loss: str) -> None:
    with Forbidden() as watch:
        (torch.rand(3) > 0.5).nonzero()
        torch.rand(3)[torch.tensor([True, False, True])]
        torch.rand(2).double()
    assert len(watch.found) == 3, "the watch itself"
    settings = default_settings(*SMALL, "run.device=cpu", "run.precision=bf16", f"yolo.loss={loss}")
    detector = build_detector(settings, 2)
    dataset, _ = datasets_of(settings, 64, 64, 0, 2)
    batch = collate_samples([dataset[(index, 0, 64)] for index in range(4)])
    batch["labels"][0, 0] = -2  # a crowd region
    optimizer = build_optimizer(detector.model.train(), settings.train)
    context = functools.partial(autocast, torch.device("cpu"), torch.bfloat16)
    assert detector.criterion is not None
    with Forbidden() as watch:
        train_step(
            detector.model, detector.criterion, optimizer, build_scaler(torch.device("cpu"), None), [batch], context,
            torch.device("cpu"), 35.0,
        )  # fmt: skip
    assert watch.found == set() and watch.operations > 500


@pytest.mark.parametrize("resize_frequency", [0, 1])
def test_an_epoch_has_batches_of_few_shapes(drawn_dataset: Path, default_settings, resize_frequency: int) -> None:
    settings = default_settings(f"data.root={drawn_dataset}", "data.num_workers=0")
    dataset, _ = datasets_of(settings, 64, 64, 0, None)
    steps = 5  # of 2 images: 9 images do not fill the last batch of an epoch, the next epoch does
    sampler = TrainingBatchSampler(len(dataset), 2, 1, (0, steps), 0, 64, resize_frequency, (64, 128))
    shapes = set()
    for batch in build_training_loader(dataset, sampler, 0, torch.device("cpu")):
        shapes.add(tuple(tuple(batch[name].shape) for name in ("images", "boxes", "labels")))
    sizes = {images[-1] for images, _, _ in shapes}
    assert sizes <= {64, 96, 128} if resize_frequency else sizes == {64}
    assert shapes == {((2, 3, size, size), (2, SMALLEST_BUCKET, 4), (2, SMALLEST_BUCKET)) for size in sizes}


# Compiling on the CPU


@pytest.mark.slow  # inductor compiles its headers first
def test_a_compiled_forward_pass_trains_the_same_weights(monkeypatch) -> None:
    try:
        network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.LeakyReLU(0.1))
        compiled = compile_forward(network, torch.device("cpu"))
    except SettingsError as error:
        pytest.skip(str(error))
    images = torch.rand(2, 1, 8, 8)
    network(images).square().sum().backward()
    expected = network[0].weight.grad.clone()
    network.zero_grad()
    counted = torch._dynamo.utils.counters
    counted.clear()
    compiled(images).square().sum().backward()
    assert counted["stats"]["unique_graphs"] == 1 and counted["graph_break"] == {}
    torch.testing.assert_close(network[0].weight.grad, expected)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SettingsError, match=r"^run.compile: on the CPU it needs a C\+\+ compiler, .* no-such-compiler"):
        compile_forward(network, torch.device("cpu"))


# What is installed


def test_requirements_leave_habanas_torch_alone() -> None:
    def packages(name: str) -> list[str]:
        lines = [line.partition("#")[0].strip() for line in (REPOSITORY / name).read_text().splitlines()]
        return [line for line in lines if line]

    core = [line for line in packages("requirements.txt") if not line.startswith("torch")]
    assert packages("requirements-hpu.txt") == core
    assert len(packages("requirements.txt")) == len(core) + 2  # torch, torchvision


# The example commands of the TensorFlow EfficientDet, adapted (docs/efficientdet_commands.md), on a small network

EFFICIENTDET = REPOSITORY / "efficientdet"
SMALL_EFFICIENTDET = (
    "model.backbone=mobilenet_v3_small", "data.num_workers=0", "run.log_frequency=1", "run.preflight=false",
    "evaluation.visualize_images=0", "--hparams", "image_size=128",
    "--eval_samples", "2", "--eval_batch_size=2", "--num_epochs", "1", "--num_examples_per_epoch",
)  # fmt: skip


def test_the_example_of_one_card(stand_in, run_script: Any, drawn_dataset: Path, tmp_path: Path) -> None:
    torch.save(mobilenet_v3_small().state_dict(), tmp_path / "backbone.pth")
    command = [
        *("--experiment", EFFICIENTDET, "--mode=train", "--train_batch_size", "2", "--dataset_dir", drawn_dataset),
        *("--backbone_ckpt", tmp_path / "backbone.pth", *SMALL_EFFICIENTDET, "4", "--model_dir", tmp_path / "run"),
    ]
    done = run_script(load_main().main, *command)
    assert done.returncode == 0, done.stderr
    assert "device      hpu (STAND-IN, eager), bfloat16" in done.stdout
    assert "batch       2 x 1 subdivisions x 1 process = 2 images per step" in done.stdout
    # 0.08 for 64 images, and 1 epoch of 4 examples
    assert "rate        0.0025 for 2 images per step: train.learning_rate = 0.08 is for 64" in done.stdout
    assert "duration    2 steps" in done.stdout and "finished at step 2" in done.stdout
    assert len((tmp_path / "run" / "results.csv").read_text().splitlines()) == 2  # the header and the end
    assert "\n".join(step_events(1, lazy=False) * 2) in "\n".join(stand_in())
    words = ("--experiment", EFFICIENTDET, "--mode", "eval", "--model_dir", tmp_path / "run", "--eval_timeout=600")
    followed = run_script(load_main().main, *words)
    assert followed.returncode == 0, followed.stderr
    own, others = (
        [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines() if "val/AP50" in line]
        for directory in (tmp_path / "run", tmp_path / "run" / "evaluator")
    )
    assert own == others


@pytest.mark.slow  # 40 s
def test_the_example_of_eight_cards_with_two(tmp_path: Path, drawn_dataset: Path) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"),
        *(EFFICIENTDET / "main.py", "--train_batch_size=2", f"--dataset_dir={drawn_dataset}", *SMALL_EFFICIENTDET, "8"),
        *(
            "--model_dir",
            tmp_path / "run",
            "--keep_checkpoint_max=300",
            "model.pretrained=false",
            "--cp_every_n_steps=1",
        ),
    ]
    done = run_with(STAND_IN, tmp_path, command)
    assert done.returncode == 0, done.stderr
    assert "2 x 1 subdivisions x 2 processes = 4 images per step" in done.stdout
    assert "rate        0.005 for 4 images per step" in done.stdout and "finished at step 2" in done.stdout
    assert (tmp_path / "events").read_text().count("process group hccl") == 2
    assert sorted(path.name for path in (tmp_path / "run").glob("step_*.pt")) == [
        "step_000000001.pt",
        "step_000000002.pt",
    ]
