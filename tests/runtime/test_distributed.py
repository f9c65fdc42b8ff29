"""Distributed training: two processes on the CPU over gloo, started by torchrun."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pack
from detection.checkpoints import load_checkpoint
from detection.errors import SettingsError
from detection.runtime.distributed import (
    Ranks,
    device_of_rank,
    is_exchange_failure,
    read_environment,
    synchronise_batch_norm,
)
from tests.support.processes import STEPS, losses_of, output_of, rows_of, start
from tests.support.training_runs import first_difference

CPU = torch.device("cpu")


def train_as_one_and_two(directory: Path, common: list[str], one: str, two: str) -> tuple[Path, Path]:
    """Run directories of one process and of two.

    Args:
        one, two: the setting that makes their steps equally large.
    """
    runs = [directory / name / "run" for name in ("one", "two")]
    running = [
        start(count, run.parent, *common, word, "--output", run)
        for count, run, word in zip((1, 2), runs, (one, two), strict=True)
    ]
    for process in running:
        output = output_of(process, 240)
        assert process.returncode == 0, output
    return runs[0], runs[1]


def evaluations_of(directory: Path) -> list[dict[str, float]]:
    rows = [row for row in rows_of(directory) if "val/AP" in row]
    return [{key: value for key, value in row.items() if key.startswith("val/") and value is not None} for row in rows]


@pytest.mark.parametrize(
    ("subdivisions", "unfreeze_step"),
    [
        pytest.param(1, 0),
        pytest.param(4, 0, marks=pytest.mark.faults),
        # The backbone's gradients are exchanged only from then on; the wrapper that exchanges them is another one.
        pytest.param(1, 4, marks=pytest.mark.faults),
    ],
)
def test_two_processes_train_as_one(drawn_dataset: Path, tmp_path: Path, subdivisions: int, unfreeze_step: int) -> None:
    # 9 training and 4 validation images; effective batch 4 * subdivisions either way
    common = [
        f"data.root={drawn_dataset}",
        f"train.subdivisions={subdivisions}",
        f"train.unfreeze_step={unfreeze_step}",
    ]
    one, two = train_as_one_and_two(tmp_path, common, "train.batch_size=4", "train.batch_size=2")
    assert len(losses_of(one)) == STEPS
    np.testing.assert_allclose(losses_of(two), losses_of(one), rtol=1e-5)
    for first, second in zip(evaluations_of(one), evaluations_of(two), strict=True):
        assert first == pytest.approx(second, rel=1e-4, abs=1e-6), "every validation image counts once"
    for key in ("model", "average"):
        weights = [load_checkpoint(run / "last.pt")[key] for run in (one, two)]
        for name, value in weights[0].items():
            torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-6)
    assert "x 2 processes" in (two / "train.log").read_text()
    assert sorted(path.name for path in two.iterdir() if path.suffix == ".pt") == ["best.pt", "last.pt"]


@pytest.mark.faults
def test_the_loss_that_is_a_sum_has_its_micro_batches_on_two_processes(drawn_dataset: Path, tmp_path: Path) -> None:
    common = [f"data.root={drawn_dataset}", "yolo.loss=mmdetection", "train.batch_size=2", "train.learning_rate=1e-4"]
    one, two = train_as_one_and_two(tmp_path, common, "train.subdivisions=2", "train.subdivisions=1")
    np.testing.assert_allclose(losses_of(two), losses_of(one), rtol=1e-5)


@pytest.mark.faults
def test_a_loss_divided_by_the_positives_of_a_micro_batch_on_two_processes(drawn_dataset: Path, tmp_path: Path) -> None:
    words = ["model.detector=efficientdet", "train.image_size=128", "evaluation.image_size=128"]
    words += ["train.resize_frequency=0", "train.batch_size=2", "train.clip_tensor_norm=1", "train.ema_ramp=null"]
    common = [f"data.root={drawn_dataset}", *words]
    one, two = train_as_one_and_two(tmp_path, common, "train.subdivisions=2", "train.subdivisions=1")
    np.testing.assert_allclose(losses_of(two), losses_of(one), rtol=1e-5)


@pytest.mark.faults
def test_two_processes_on_shards_are_two_on_the_folder(
    drawn_dataset: Path, run_script: Callable[..., Any], tmp_path: Path
) -> None:
    """Bit for bit: losses, weights and evaluations."""
    result = run_script(pack.main, f"data.root={drawn_dataset}", "--output", tmp_path / "shards", "--shards", "2")
    assert result.returncode == 0, result.stderr
    runs = [tmp_path / name / "run" for name in ("folder", "packed")]
    for run, root in zip(runs, (drawn_dataset, tmp_path / "shards"), strict=True):
        process = start(2, run.parent, f"data.root={root}", "train.batch_size=2", "--output", run)
        output = output_of(process, 240)
        assert process.returncode == 0, output
        assert "x 2 processes" in (run / "train.log").read_text()
    assert losses_of(runs[0]) == losses_of(runs[1]) and len(losses_of(runs[0])) == STEPS
    assert (runs[0] / "detections.json").read_bytes() == (runs[1] / "detections.json").read_bytes()
    first, second = (load_checkpoint(run / "last.pt") for run in runs)
    for key in ("model", "average", "optimizer"):
        assert first_difference(first[key], second[key]) is None


@pytest.mark.faults
def test_a_process_without_validation_images_does_not_halve_the_time_of_an_evaluation(
    drawn_dataset: Path, tmp_path: Path
) -> None:
    """The others wait for the slowest: `train.minutes` plans with the longest time, not with the mean."""
    words = [f"data.root={drawn_dataset}", "evaluation.max_images=1", "train.batch_size=2", "train.minutes=0.5"]
    process = start(2, tmp_path, *words, "--output", tmp_path / "run", fault="timed_evaluation")
    output = output_of(process, 240)
    assert process.returncode == 0, output
    assert "rank 0 measured something" in output and "rank 1 measured nothing" in output
    assert "evaluations of about 2.0 s" in (tmp_path / "run" / "train.log").read_text()


# One process


def test_alone_every_exchange_returns_at_once(monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = Ranks(CPU, lambda: pytest.fail("no backend is needed"), 1)
    value = 3
    later = ranks.all_reduce_max_async(lambda: value)
    value = 15
    assert later() == 15, "a signal that comes during the step counts"
    tensor = torch.ones(2)
    ranks.average_(tensor)
    assert tensor.tolist() == [1, 1] and ranks.gather("x") == ["x"] and ranks.broadcast("y") == "y" and ranks.is_first
    assert ranks.explain(RuntimeError("gloo timed out"), 1) is None


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, ["LOCAL_RANK, MASTER_ADDR, MASTER_PORT", "torchrun"]),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, ["RANK=2", "0..1"]),
        ({"WORLD_SIZE": "two", "RANK": "0", "LOCAL_RANK": "0"}, ["whole numbers", "two"]),
    ],
)
def test_broken_environment(environment: dict[str, str], words: list[str], monkeypatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    if "LOCAL_RANK" in environment:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(SettingsError) as raised:
        read_environment()
    assert raised.value.exit_code == 2 and all(word in str(raised.value) for word in words)


def test_port_in_use_is_one_line(monkeypatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        for name, text in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", **address}.items():
            monkeypatch.setenv(name, text)
        with pytest.raises(SettingsError, match="rank 0: the 2 processes do not find one another") as raised:
            Ranks(CPU, lambda: "gloo", 5)
    assert "\n" not in str(raised.value)


def test_each_process_takes_its_own_gpu(monkeypatch) -> None:
    assert device_of_rank("cuda:3", 0, 1) == "cuda:3"
    with pytest.raises(SettingsError, match="cannot share device cuda:0"):
        device_of_rank("cuda:0", 1, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device_of_rank("auto", rank, 2) for rank in (0, 1)] == ["cuda:0", "cuda:1"]
    assert device_of_rank("cpu", 1, 2) == "cpu"
    with pytest.raises(SettingsError, match="process 2 of this machine has no GPU: there are 2"):
        device_of_rank("cuda", 2, 4)


def test_batch_norm_over_all_processes_needs_a_device_that_has_it() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    with pytest.raises(SettingsError, match="needs CUDA devices, this is cpu"):
        synchronise_batch_norm(model, CPU)
    converted = synchronise_batch_norm(model, torch.device("cuda"))
    assert isinstance(converted[0], torch.nn.SyncBatchNorm)


def test_other_errors_are_no_failed_exchange() -> None:
    assert not is_exchange_failure(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"))
    assert is_exchange_failure(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]"))
