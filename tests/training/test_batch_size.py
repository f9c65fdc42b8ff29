"""`train.batch_size: auto` against memory counted by hand."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import lr_scheduler_creator
from detection.config.settings import Settings
from detection.contract import Detector, Geometry
from detection.errors import DeviceMemoryError, SettingsError
from detection.models import build_detector
from detection.runtime.devices import build_scaler
from detection.training.memory import batch_size
from detection.training.memory import estimate as memory
from detection.training.memory.batch_size import find_batch_size, has_room, sizes_up_to
from detection.training.memory.estimate import MemoryEstimate
from detection.training.moving_average import ExponentialMovingAverage
from tests.support.tiny_models import OneConvolution, Sum
from tests.support.training_runs import load_main

CPU = torch.device("cpu")
PER_IMAGE = 64 * 64 * (3 + 4) * 4  # bytes: pixels, channels kept, float32
STATE = 12 * 4 * 4  # bytes: 12 weights, with gradient and two moments
LOADED = (2 * 2 + 1) * 3 * 64 * 64  # bytes per image: two batches of each worker and the one worked on
WORDS = ("train.batch_size=auto", "train.image_size=64", "data.num_workers=2")


def alone(size: int = 1, others: tuple[int, ...] = ()) -> Any:
    """Ranks whose other processes have found these numbers."""
    return SimpleNamespace(
        size=size,
        local_size=size,
        all_reduce_max_async=lambda value: lambda: max(value(), *(-other for other in others or (64,))),
    )


def find(settings: Settings, ranks: Any = None, images: int = 1000, model: nn.Module | None = None) -> tuple[int, str]:
    detector = Detector(model or OneConvolution(), Sum(), nn.Identity(), Geometry(32))  # type: ignore[arg-type]
    scaler = lambda: build_scaler(CPU, None)  # noqa: E731
    return find_batch_size(detector, settings, ranks or alone(), images, contextlib.nullcontext, scaler)


def test_few_sizes_so_that_like_machines_find_the_same() -> None:
    assert sizes_up_to(64) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert sizes_up_to(5) == [1, 2, 3, 4] and sizes_up_to(1) == [1]


@pytest.mark.parametrize("number", [1, 3, 8, 12])
def test_the_largest_batch_that_fits_by_hand(monkeypatch, default_settings, number: int) -> None:
    needed = STATE + number * (PER_IMAGE + LOADED)
    for spare, expected in ((1, number), (-1, sizes_up_to(number - 1)[-1] if number > 1 else None)):
        free = int(needed / 0.5) + spare
        monkeypatch.setattr(memory, "available_memory", lambda device, free=free: free)
        if expected is None:
            with pytest.raises(DeviceMemoryError, match=r"^train.batch_size=auto: not even one image of 64 px fits"):
                find(default_settings(*WORDS))
        else:
            assert find(default_settings(*WORDS))[0] == expected


def test_processes_of_one_machine_share_its_memory(monkeypatch, default_settings) -> None:
    free = int(2 * (STATE + 6 * (PER_IMAGE + LOADED)) / 0.5) + 2
    monkeypatch.setattr(memory, "available_memory", lambda device: free)
    assert find(default_settings(*WORDS), alone(2))[0] == 6
    assert find(default_settings(*WORDS))[0] == 12  # alone: 2 * 6 and one state less


def test_unknown_memory_is_an_error(monkeypatch, default_settings) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda device: None)
    with pytest.raises(SettingsError, match="the free memory of cpu is not known; give a number"):
        find(default_settings(*WORDS))


@pytest.mark.parametrize(
    ("words", "ranks", "images", "expected"),
    [
        ((), alone(), 1000, 16),  # a CPU; an accelerator gets 64
        (("train.subdivisions=5",), alone(), 1000, 3),  # 16 // 5 = 3
        ((), alone(4), 1000, 4),
        ((), alone(2, others=(6,)), 1000, 6),  # another process has less memory
        ((), alone(), 150, 12),  # 150 / 12: at least twelve steps per epoch
        ((), alone(), 40, 8),  # 40 / 12 = 3, but eight images are a step
        (("train.subdivisions=100",), alone(), 1000, 1),  # one at least
        ((), alone(), 7, 6),  # no more than there are
        (("train.subdivisions=2",), alone(), 7, 3),
        (("train.subdivisions=2",), alone(2), 9, 2),
    ],
)
def test_neither_more_images_per_step_than_help_nor_than_there_are(
    default_settings, words: tuple[str, ...], ranks: Any, images: int, expected: int
) -> None:
    assert find(default_settings(*WORDS, *words), ranks, images)[0] == expected


def test_largest_size_of_multiscale_training_counts(monkeypatch, default_settings) -> None:
    monkeypatch.setattr(
        memory, "available_memory", lambda device: int((STATE + 9 * 6 * (PER_IMAGE + LOADED)) / 0.5) + 1
    )
    settings = default_settings(*WORDS, "train.resize_frequency=1", "train.multiscale_sizes=[32,192]")
    number, line = find(settings)  # 192 px: 9 times the pixels of 64
    assert number == 6
    assert "192 px, estimated; train.subdivisions=2 makes 12 images per step, not 6" in line


def test_on_an_accelerator_steps_are_tried_from_the_estimate_downwards(monkeypatch, default_settings) -> None:
    tried: list[int] = []
    monkeypatch.setattr(batch_size, "estimate_memory", lambda *_: MemoryEstimate(1000, 0, 100, 1, 6000))
    monkeypatch.setattr(batch_size, "has_room", lambda _, __, number, *___: (tried.append(number), number <= 12)[1])
    number, line = find(default_settings(*WORDS), model=OneConvolution().to("meta"))
    assert (number, tried) == (12, [32, 24, 16, 12])  # 0.9 * 6000 holds 44 images
    assert "steps tried" in line


def test_a_tried_step_has_everything_and_changes_nothing(monkeypatch, default_settings) -> None:
    settings = default_settings(
        "train.image_size=64", "train.subdivisions=4", "train.ema_decay=0.9", "train.learning_rate=0.1",
        "model.backbone=mobilenet_v3_small", "yolo.neck_channels=[8,8,8]",
    )  # fmt: skip
    detector = build_detector(settings, 2)
    before = {name: value.clone() for name, value in detector.model.state_dict().items()}
    state, real, taken = torch.get_rng_state(), batch_size.train_step, []

    def step(model: nn.Module, *arguments: Any, **options: Any) -> Any:
        batches = arguments[3]
        taken.append([tuple(batch["images"].shape) for batch in batches])
        if len(batches[0]["images"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return real(model, *arguments, **options)

    update, updates = ExponentialMovingAverage.update, []
    monkeypatch.setattr(
        ExponentialMovingAverage, "update", lambda self, model, step: (updates.append(step), update(self, model, step))
    )
    monkeypatch.setattr(batch_size, "train_step", step)

    def room(number: int) -> bool:
        return has_room(detector, settings, number, contextlib.nullcontext, build_scaler(CPU, None), 2**40)

    assert room(3)
    assert taken == [[(3, 3, 64, 64)] * 2] * 2  # a second step, and two micro-batches of the four
    assert updates == [0, 1]
    monkeypatch.setattr(batch_size, "_reserved", lambda device, reset=False: 0 if reset else int(0.95 * 2**40))
    assert not room(3)  # more than 0.9 of it
    monkeypatch.setattr(batch_size, "_reserved", lambda device, reset=False: 0)
    assert not room(4)
    assert all(torch.equal(before[name], value) for name, value in detector.model.state_dict().items())
    assert all(parameter.grad is None for parameter in detector.model.parameters())
    assert torch.equal(torch.get_rng_state(), state)

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(batch_size, "train_step", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        room(1)


@pytest.mark.gpu
def test_what_is_found_on_cuda_trains(default_settings) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    settings = default_settings("train.batch_size=auto", "train.image_size=608")
    detector = build_detector(settings, 80).to(torch.device("cuda"), channels_last=True)
    number, line = find_batch_size(
        detector, settings, alone(), 1000, contextlib.nullcontext, lambda: build_scaler(torch.device("cuda"), None)
    )
    assert number >= 1 and "steps tried" in line
    assert torch.cuda.memory_allocated() < 2**30  # the copy is gone


# As a user meets it


@pytest.fixture
def main(run_script) -> Callable[..., Any]:
    return lambda *words: run_script(load_main().main, *words)


def test_the_run_directory_holds_the_number(main: Callable[..., Any], tmp_path: Path) -> None:
    words = (
        "data.fake=true", "model.num_classes=2", "model.backbone=mobilenet_v3_small", "yolo.neck_channels=[8,8,8]",
        "train.image_size=64", "evaluation.image_size=64", "train.subdivisions=8", "train.steps=1",
        "data.num_workers=0", "run.device=cpu", "evaluation.max_images=2",
    )  # fmt: skip
    result = main(*words, "train.batch_size=auto", "--output", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert "batch size  2 found: about" in result.stdout and "2 x 8 subdivisions x 1" in result.stdout
    assert yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())["train"]["batch_size"] == 2
    checkpoint = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert checkpoint["settings"]["train"]["batch_size"] == 2
    result = main("--resume", tmp_path / "run", "train.steps=2")
    assert result.returncode == 0, result.stderr
    result = main("--resume", tmp_path / "run", "train.steps=3", "train.batch_size=auto")
    assert result.returncode == 2
    assert "train.batch_size was 2 and cannot become 'auto'" in result.stderr


def test_a_profile_needs_a_run(main: Callable[..., Any], tmp_path: Path) -> None:
    result = main("--profile", "--dry-run", "data.fake=true", "model.num_classes=2")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "--dry-run and --profile are both given\n"


def test_other_scripts_ask_for_a_number(run_script) -> None:
    result = run_script(lr_scheduler_creator.main, "--images", "100", "train.batch_size=auto")
    assert result.returncode == 2
    assert result.stderr.startswith("train.batch_size=auto: only yolo-v3/main.py resolves it")
    result = run_script(lr_scheduler_creator.main, "--images", "100", "train.batch_size=0")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "greater than or equal to 1" in result.stderr
