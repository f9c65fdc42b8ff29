"""E: loader workers and ranks that die, hang, disagree; test_distributed.py and test_loaders.py have the rest."""

import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from detection.checkpoints import load_checkpoint
from detection.data.coco import CocoDataset
from detection.data.loaders import build_evaluation_loader, build_training_loader
from detection.data.sampler import TrainingBatchSampler
from detection.data.slow_samples import SlowSamples
from tests.support.detectors import datasets_of, transform_of
from tests.support.fault_runs import at_step
from tests.support.paths import REPOSITORY
from tests.support.processes import free_port, losses_of, output_of, rows_of, start

CPU = torch.device("cpu")
EVERYTHING = [  # each augmentation is drawn for each image
    f"data.augmentation.{name}.p=1" for name in ("gauss_noise", "random_brightness_contrast", "rgb_shift", "affine")
]

# Workers


def kill_worker(main: ModuleType, step: int) -> None:
    def kill() -> None:
        (worker, *_) = (process for process in multiprocessing.active_children() if process.daemon)
        os.kill(worker.pid, signal.SIGKILL)

    at_step(main, step, kill)


@pytest.mark.faults
def test_E01_a_killed_worker_is_named_and_last_is_whole(train, tmp_path: Path) -> None:
    words = ["data.num_workers=2", "train.save_frequency=2", "train.steps=2000", "evaluation.evaluate_frequency=9999"]
    started = time.monotonic()
    run = train("run", *words, fault=functools.partial(kill_worker, step=5))
    line = run.ends_with(3, "a loader worker died", "DataLoader worker (pid", f"--resume {tmp_path / 'run'}")
    assert time.monotonic() - started < 30
    step = load_checkpoint(tmp_path / "run" / "last.pt")["step"]
    assert step >= 5 and f"saved after step {step}," in line


def before_transform_of_5(dataset: Any, action: Callable[[], Any]) -> None:
    transform = dataset.sample_transform

    def act_and_transform(image: Any, boxes: Any, labels: Any, index: int, *rest: int) -> Any:
        if index == 5:
            action()
        return transform(image, boxes, labels, index, *rest)

    dataset.sample_transform = act_and_transform


@pytest.mark.parametrize("workers", [0, 1])
def test_E02_an_augmentation_that_raises_names_its_image(dataset: Path, default_settings, workers: int) -> None:
    training_set, _ = datasets_of(default_settings(f"data.root={dataset}"), 64, 64, 0, None)
    before_transform_of_5(training_set, lambda: 1 / 0)
    loader = build_training_loader(training_set, TrainingBatchSampler(13, 13, 1, (0, 1), 0, 64), workers, CPU)
    with pytest.raises(ZeroDivisionError) as raised:
        next(iter(loader))
    text = "".join(traceback.format_exception(raised.value))
    number, name = training_set.annotations.image_ids[5], training_set.annotations.file_name(5)
    assert f"while transforming image id {number} ({name}) of epoch 0 at 64 px" in text


@pytest.mark.parametrize("workers", [0, 2])
def test_E02_a_sample_that_takes_too_long_is_named_while_it_runs(
    dataset: Path, default_settings, workers: int, capfd
) -> None:
    settings = default_settings(f"data.root={dataset}", "data.slow_sample_seconds=0.4")
    training_set, _ = datasets_of(settings, 64, 64, 0, None)
    before_transform_of_5(training_set, lambda: time.sleep(1.2))
    sampler = TrainingBatchSampler(13, 13, 1, (0, 2), 0, 64)  # two epochs: with one worker twice the same image
    batches = list(build_training_loader(training_set, sampler, workers, CPU))
    assert sorted(batches[0]["indices"].tolist()) == list(range(13))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == max(workers, 1), lines  # once for each process that met it
    number, name = training_set.annotations.image_ids[5], training_set.annotations.file_name(5)
    for line in lines:
        assert line.startswith(f"warning: image id {number} ({name}) has been loading for 0."), line


def test_E02_a_sample_that_holds_the_lock_of_python_is_named_afterwards(capfd) -> None:
    """No thread runs while one long call into C keeps the lock; here the thread that looks is asleep for good."""
    samples = SlowSamples(0.05, lambda index: f"image {index}")
    samples.watch = lambda: None  # type: ignore[method-assign]
    for _ in range(2):
        assert samples.load_timed(lambda position: time.sleep(0.1) or position, (7, 0, 64)) == (7, 0, 64)
    samples.load_timed(lambda position: None, 8)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: image 7 took 0.1 s")


def test_E03_no_two_samples_share_their_random_numbers_whatever_the_workers(dataset: Path, default_settings) -> None:
    settings = default_settings(f"data.root={dataset}", *EVERYTHING)
    training_set, _ = datasets_of(settings, 64, 64, 0, None)
    training_set.load_image = lambda index: np.full((64, 64, 3), 128, np.uint8)  # only augmentation tells them apart
    hashes: dict[int, list[str]] = {}
    for workers in (0, 1, 4):
        sampler = TrainingBatchSampler(len(training_set), 13, 1, (0, 3), 0, 64)  # three epochs
        loader = build_training_loader(training_set, sampler, workers, CPU)
        images = [image for batch in loader for image in batch["images"]]
        hashes[workers] = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images]
    assert hashes[0] == hashes[1] == hashes[4]
    assert len(set(hashes[0])) == 39


def private_bytes(pid: int) -> int:
    """Memory that this process alone has: what it has written to since the fork."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return 1024 * sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_"))


@pytest.mark.faults
def test_E05_annotations_are_not_copied_by_the_workers(tmp_path: Path, default_settings) -> None:
    # 100,000 boxes on 2,000 images that share a file; as Python objects they would take about 100 MB per worker.
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((64, 64, 3), np.uint8))
    images = [{"id": number, "file_name": "a.png", "width": 64, "height": 64} for number in range(2000)]
    rows = [
        {"id": number, "image_id": number % 2000, "category_id": 1, "bbox": [number % 30, 5, 10, 10]}
        for number in range(100_000)
    ]
    content = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    transform = transform_of(default_settings(), 64, 0, training=False)
    training_set = CocoDataset(tmp_path, tmp_path / "a.json", transform)
    sampler = TrainingBatchSampler(len(training_set), 20, 1, (0, 100), 0, 64)  # one epoch
    grown: dict[int, list[int]] = {}
    others = set(multiprocessing.active_children())  # a test that ended with an error may have left a worker
    for number, _ in enumerate(build_training_loader(training_set, sampler, 2, CPU)):
        if number in (10, 95):
            for process in set(multiprocessing.active_children()) - others:
                grown.setdefault(process.pid or 0, []).append(private_bytes(process.pid or 0))
    assert len(grown) == 2
    for first, last in grown.values():
        assert last - first < 50e6


@pytest.mark.guard("detection.data.workers:_prepare_libraries", "cv2.setNumThreads(0)", "pass")
def test_E06_workers_use_no_threads_of_opencv(dataset: Path, default_settings) -> None:
    training_set, _ = datasets_of(default_settings(f"data.root={dataset}"), 64, 64, 0, None)
    load_image = training_set.load_image

    def checked(index: int) -> np.ndarray:
        assert cv2.getNumThreads() == 1
        return load_image(index)

    training_set.load_image = checked
    sampler = TrainingBatchSampler(len(training_set), 2, 1, (0, 2), 0, 64)
    loader = build_training_loader(training_set, sampler, 1, CPU)
    cv2.setNumThreads(4)  # of this process; building the loader set it too
    try:
        assert sum(1 for _ in loader) == 2
    finally:
        cv2.setNumThreads(0)


@pytest.mark.faults
def test_E06_workers_after_threads_of_opencv(dataset: Path, default_settings) -> None:
    settings = default_settings(f"data.root={dataset}", *EVERYTHING)
    training_set, _ = datasets_of(settings, 64, 64, 0, None)
    started = time.monotonic()
    for _ in range(50):
        cv2.setNumThreads(4)
        cv2.GaussianBlur(np.zeros((2000, 2000, 3), np.uint8), (31, 31), 5)  # its threads are running now
        sampler = TrainingBatchSampler(len(training_set), 2, 1, (0, 6), 0, 64)
        assert sum(1 for _ in build_training_loader(training_set, sampler, 4, CPU)) == 6
        assert time.monotonic() - started < 300
    cv2.setNumThreads(0)


# Ranks


@pytest.mark.parametrize("count", [7, 8, 9])
def test_E08_each_image_is_evaluated_once_and_all_ranks_take_as_many_steps(
    tmp_path: Path, default_settings, count: int
) -> None:
    make_sparse_dataset(tmp_path / "data", count)
    settings = default_settings(f"data.root={tmp_path / 'data'}")
    _, validation_set = datasets_of(settings, 64, 64, 0, None)
    shares = [
        [index for batch in build_evaluation_loader(validation_set, 3, 0, CPU, rank, 2) for index in batch["indices"]]
        for rank in (0, 1)
    ]
    assert sorted(int(index) for share in shares for index in share) == list(range(count))
    samplers = [list(TrainingBatchSampler(count, 2, 1, (0, 20), 0, 64, rank=rank, ranks=2)) for rank in (0, 1)]
    assert len(samplers[0]) == len(samplers[1]) == 20
    whole = list(TrainingBatchSampler(count, 4, 1, (0, 20), 0, 64))
    assert [first + second for first, second in zip(*samplers, strict=True)] == whole


def test_E12_all_ranks_have_the_same_size_in_each_step() -> None:
    sizes = [
        [batch[0][2] for batch in TrainingBatchSampler(9, 2, 2, (5, 60), 3, 64, 2, (64, 256), rank=rank, ranks=3)]
        for rank in range(3)
    ]
    assert sizes[0] == sizes[1] == sizes[2] and len(set(sizes[0])) > 3


def make_sparse_dataset(root: Path, count: int) -> None:
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / split).mkdir()
        images, boxes = [], []
        for number in range(count):
            image = np.full((64, 80, 3), 30 + 10 * number, np.uint8)
            images.append({"id": number + 1, "file_name": f"{number}.png", "width": 80, "height": 64})
            if number % 2 == 0:
                image[10:30, 20:50] = (0, 0, 255)
                boxes.append({"id": number + 1, "image_id": number + 1, "category_id": 1, "bbox": [20, 10, 30, 20]})
            cv2.imwrite(str(root / split / f"{number}.png"), image)
        content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "red"}]}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


@pytest.fixture
def two_ranks(drawn_dataset: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`two_ranks(*settings, fault=...)`: torchrun with two processes into tmp_path/run; killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def run(*settings: str, fault: str = "none") -> subprocess.Popen[str]:
        words = [f"data.root={drawn_dataset}", "train.batch_size=2", *settings, "--output", tmp_path / "run"]
        started.append(start(2, tmp_path / "work", *words, fault=fault))
        return started[-1]

    yield run
    for process in started:
        process.kill()


def wait_for_rows(process: subprocess.Popen[str], directory: Path, count: int) -> None:
    deadline = time.monotonic() + 90
    rows = directory / "metrics.jsonl"
    while not rows.exists() or rows.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children_of(pid: int) -> list[int]:
    """Python processes that torchrun started, by rank."""
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    ranks = {}
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks.update({int(entry[5:]): child for entry in environment if entry.startswith(b"RANK=")})
    return [ranks[rank] for rank in sorted(ranks)]


@pytest.mark.faults
@pytest.mark.parametrize("images", [7, 8, 9])
def test_E08_E09_E13_any_number_of_images_and_a_rank_without_boxes(images: int, tmp_path: Path) -> None:
    # Validation has as many images; only every second has boxes, so rank 1 validates images without any.
    make_sparse_dataset(tmp_path / "data", images)
    running = [
        start(count, tmp_path / str(count), f"data.root={tmp_path / 'data'}", f"train.batch_size={4 // count}",
              "train.steps=4", "--output", tmp_path / str(count) / "run")
        for count in (1, 2)
    ]  # fmt: skip
    for process in running:
        output = process.communicate(timeout=240)[0]
        assert process.returncode == 0, output
    np.testing.assert_allclose(losses_of(tmp_path / "2" / "run"), losses_of(tmp_path / "1" / "run"), rtol=1e-5)
    found = [json.loads((tmp_path / name / "run" / "detections.json").read_text()) for name in ("1", "2")]
    assert [row["image_id"] for row in found[0]] == [row["image_id"] for row in found[1]]
    metrics = [json.loads((tmp_path / name / "run" / "metrics.json").read_text())["AP50"] for name in ("1", "2")]
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-6)


@pytest.mark.faults
@pytest.mark.guard("detection.runtime.distributed:Ranks.all_reduce_max_async", "if self.size == 1:", "if True:")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_E11_a_signal_to_one_rank_stops_all_at_the_same_step(two_ranks, tmp_path: Path, number: int) -> None:
    stop_and_check(two_ranks, tmp_path / "run", number, lambda launcher: children_of(launcher)[0])


@pytest.mark.faults
def test_E11_a_signal_to_the_launcher_stops_all_at_the_same_step(two_ranks, tmp_path: Path) -> None:
    # SIGTERM alone: torchrun dies of SIGUSR1, docs/scaling.md signals the ranks.
    stop_and_check(two_ranks, tmp_path / "run", signal.SIGTERM, lambda launcher: launcher)


def stop_and_check(two_ranks, directory: Path, number: int, choose: Callable[[int], int]) -> None:
    """Send a signal to the process that is chosen by the launcher's pid."""
    process = two_ranks("train.steps=100000")
    wait_for_rows(process, directory, 6)
    os.kill(choose(process.pid), number)
    output = process.communicate(timeout=60)[0]
    name = signal.Signals(number).name
    assert process.returncode != 0 and f"stopped by {name}; saved after step" in output, output
    step = load_checkpoint(directory / "last.pt")["step"]
    lines = [line for line in output.splitlines() if "saved after" in line]
    stops = [int(line.split("saved after step ")[1].split(",")[0]) for line in lines]
    assert stops == [step, step], "both ranks stop after the same step"


@pytest.mark.faults
def test_B01_an_image_that_one_rank_cannot_read_stops_all_at_the_same_step(
    two_ranks, drawn_dataset: Path, tmp_path: Path
) -> None:
    shutil.copytree(drawn_dataset, tmp_path / "data")
    path = sorted((tmp_path / "data" / "train").iterdir())[0]
    path.write_bytes(b"not an image")
    output = output_of(two_ranks(f"data.root={tmp_path / 'data'}", "run.preflight=false", "train.steps=30"))
    lines = [line for line in output.splitlines() if "saved after step" in line]
    step = load_checkpoint(tmp_path / "run" / "last.pt")["step"]
    assert len(lines) == 2 and all(f"saved after step {step}," in line for line in lines), output
    assert any(str(path) in line for line in lines) and step < 30


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["raise", "kill", "hang"])
def test_E07_a_rank_that_fails_ends_all_and_the_others_name_rank_and_step(
    two_ranks, tmp_path: Path, fault: str
) -> None:
    process = two_ranks("run.timeout_minutes=0.2", "train.resize_frequency=0", fault=fault)
    wait_for_rows(process, tmp_path / "run", 2)
    started = time.monotonic()
    output = process.communicate(timeout=90)[0]
    assert process.returncode != 0
    assert time.monotonic() - started < 12 + 10
    if fault == "hang":
        assert "rank 1 of 2, step 2: no progress" in output or "rank 0 of 2, step 2: another process" in output, output
    else:  # what the survivor says
        assert "rank 0 of 2, step 2: another process failed or hangs" in output, output
    if fault == "raise":
        assert "a bug in rank 1" in output
    # Step 4 was never reached: nothing was saved, and nothing half.
    assert not list((tmp_path / "run").glob("*.pt")) and not list((tmp_path / "run").glob("*.tmp"))


@pytest.mark.faults
@pytest.mark.guard("detection.runtime.distributed:Watchdog._watch", "last is not None and", "False and")
def test_E07_a_hanging_rank_ends_itself(two_ranks, tmp_path: Path) -> None:
    """The others end by the timeout of their exchange; torchrun would wait half a minute for the hanging one."""
    process = two_ranks("run.timeout_minutes=0.1", fault="hang")
    wait_for_rows(process, tmp_path / "run", 2)
    started = time.monotonic()
    output = process.communicate(timeout=90)[0]
    assert process.returncode != 0 and "step 2" in output
    assert time.monotonic() - started < 6 + 10


@pytest.mark.faults
def test_E07_a_rank_that_hangs_in_the_evaluation(two_ranks, tmp_path: Path) -> None:
    process = two_ranks("train.steps=5", "run.timeout_minutes=0.1", fault="hang_in_evaluation")
    output = output_of(process, 60)
    assert process.returncode != 0 and "rank 1 of 2, step 5: no progress" in output, output
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 5


@pytest.mark.faults
def test_C01_the_bundle_of_two_ranks_replays_the_images_of_both(two_ranks, tmp_path: Path) -> None:
    words = ["train.optimizer=sgd", "train.learning_rate=1e30", "scheduler.warmup=0", "train.max_skipped_steps=2"]
    output = output_of(two_ranks(*words))
    assert "2 steps in a row were non-finite" in output, output
    (bundle,) = (tmp_path / "run").glob("non_finite_*")
    step = json.loads((bundle / "report.json").read_text())["steps"][0]
    replayed = output_of(start(1, tmp_path / "work", "--replay", bundle))
    assert f"step {step['step']} is non-finite here either" in replayed and "warning" not in replayed, replayed
    named = {int(line.split("image id ")[1].split(" ")[0]) for line in replayed.splitlines() if "of image id " in line}
    assert named and named <= set(step["image_ids"])
    # Micro-batches of both ranks; each says something of its loss.
    assert sum(line.startswith("loss: ") for line in replayed.splitlines()) == 2, replayed


@pytest.mark.faults
def test_E14_processes_that_never_come(tmp_path: Path) -> None:
    code = (
        "import datetime, torch, detection.runtime.distributed as d; d.JOIN_TIMEOUT = datetime.timedelta(seconds=2)\n"
        "d.Ranks(torch.device('cpu'), lambda: 'gloo', 600)"
    )
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **alone, "MASTER_PORT": str(free_port())}
    started = time.monotonic()
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert "SettingsError: rank 0: the 2 processes do not find one another" in process.stderr, process.stderr
    assert time.monotonic() - started < 30


@pytest.mark.faults
def test_E07_a_rank_that_ends_before_the_first_step(two_ranks, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "something").touch()
    output = output_of(two_ranks())
    assert 'two_ranks.py", line' not in output, output  # no traceback of ours; torchrun has its own
    assert f"{tmp_path / 'run'} " in output and "is not empty" in output, output  # what the first rank says
    assert "rank 1 of 2, step 0: another process failed" in output or output.count("exitcode") == 1, output


@pytest.mark.faults
@pytest.mark.guard("detection.runtime.distributed:Ranks.broadcast", "group=self._patient", "group=None")
def test_E10_an_evaluation_longer_than_the_timeout(two_ranks, tmp_path: Path) -> None:
    # Rank 0 scores for 15 s, a rank that does not answer for 6 s ends the run.
    process = two_ranks("train.steps=5", "run.timeout_minutes=0.1", fault="slow_evaluation")
    output = output_of(process, 120)
    assert process.returncode == 0, output
    assert any("val/AP" in row for row in rows_of(tmp_path / "run"))
