"""Loading: which images at which size is a function of (seed, step), and no worker count changes a byte."""

import hashlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from detection.config.settings import Settings
from detection.contract import Batch
from detection.data.coco import CocoDataset
from detection.data.loaders import batch_to_device, build_evaluation_loader, build_training_loader, collate_samples
from detection.data.sampler import Position, TrainingBatchSampler
from detection.data.transforms import Sample
from detection.errors import DataReadError
from detection.ops.letterbox import Letterbox
from tests.support.detectors import transform_of
from tests.support.paths import REPOSITORY
from tests.support.pictures import NAMED

Load = Callable[..., Settings]
CPU = torch.device("cpu")


def sampler(num_images: int, batch_size: int = 4, subdivisions: int = 1, steps=(0, 20), seed: int = 0, **other):
    return TrainingBatchSampler(num_images, batch_size, subdivisions, steps, seed, **{"size": 64, **other})


def flat(batches: list[list[Position]]) -> list[Position]:
    return [position for batch in batches for position in batch]


# --- order ---


@pytest.mark.parametrize("num_images", [1, 3, 7, 8, 9])
@pytest.mark.parametrize(("batch_size", "subdivisions"), [(4, 1), (2, 2), (4, 3)])
def test_every_image_comes_once_per_epoch_and_nothing_is_dropped(num_images, batch_size, subdivisions) -> None:
    batches = list(sampler(num_images, batch_size, subdivisions, steps=(0, 12)))
    assert len(batches) == 12 * subdivisions == len(sampler(num_images, batch_size, subdivisions, steps=(0, 12)))
    assert {len(batch) for batch in batches} == {batch_size}  # no short batch, also where the dataset is smaller
    stream = flat(batches)
    for start in range(0, len(stream), num_images):
        epoch = stream[start : start + num_images]
        assert {number for _, number, *_ in epoch} == {start // num_images}
        seen = [index for index, *_ in epoch]
        if len(epoch) == num_images:
            assert sorted(seen) == list(range(num_images))
        else:  # the run ends inside this epoch
            assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("factors", [None, np.array([1, 1.5, 2.25, 1.25, 1, 1, 1])], ids=["plain", "repeat factors"])
@pytest.mark.parametrize("first", [1, 5, 19, 20])
def test_starting_at_a_step_gives_the_tail_of_the_whole(first: int, factors: np.ndarray | None) -> None:
    other = {"resize_frequency": 3, "multiscale_sizes": (64, 192), "repeat_factors": factors}
    whole = list(sampler(7, 3, 2, steps=(0, 20), seed=4, **other))
    assert list(sampler(7, 3, 2, steps=(first, 20), seed=4, **other)) == whole[first * 2 :]
    repeated = sampler(7, 3, 2, steps=(0, 20), seed=4, **other)
    assert list(repeated) == list(repeated) == whole  # iterating leaves nothing behind


def test_the_stream_does_not_depend_on_how_it_is_cut() -> None:
    streams = [flat(list(sampler(9, *cut, steps=(0, 6)))) for cut in ((8, 1), (2, 4), (4, 2), (1, 8))]
    assert all(stream == streams[0] for stream in streams)


def test_epochs_and_seeds_have_their_own_order() -> None:
    orders = [tuple(sampler(50, seed=seed).order.of_epoch(epoch)) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == 16
    assert all(order != tuple(range(50)) for order in orders)
    # a fair shuffle: over 600 epochs each of 3 images opens a third of them, standard error 0.019
    firsts = Counter(int(sampler(3, seed=0).order.of_epoch(epoch)[0]) for epoch in range(600))
    assert all(abs(count / 600 - 1 / 3) < 0.08 for count in firsts.values()) and len(firsts) == 3


# --- sizes ---


def test_the_size_changes_every_resize_frequency_steps() -> None:
    steps, frequency, subdivisions = 1200, 3, 2
    batches = list(
        sampler(7, 2, subdivisions, steps=(0, steps), resize_frequency=frequency, multiscale_sizes=(320, 608))
    )
    sizes = [{size for _, _, size, _ in batch} for batch in batches]
    assert all(len(size) == 1 for size in sizes)  # one size within a batch
    per_step = [size.pop() for size in sizes[::subdivisions]]
    assert [size.pop() for size in sizes[1::subdivisions]] == per_step  # and within the batches of one step
    groups = [per_step[start : start + frequency] for start in range(0, steps, frequency)]
    assert all(len(set(group)) == 1 for group in groups)
    drawn = [group[0] for group in groups]
    # all ten sizes of the YOLOv3 paper and no other, each about a tenth of the 400 (standard error 0.015)
    assert sorted(set(drawn)) == [320, 352, 384, 416, 448, 480, 512, 544, 576, 608]
    assert all(abs(count / 400 - 0.1) < 0.06 for count in Counter(drawn).values())
    # the next group has another size nine times of ten
    assert np.mean([first != second for first, second in itertools.pairwise(drawn)]) == pytest.approx(0.9, abs=0.06)


def test_the_size_is_a_function_of_seed_and_step_alone() -> None:
    other = {"resize_frequency": 5, "multiscale_sizes": (320, 608)}
    first, second = sampler(7, 2, seed=3, **other), sampler(1000, 64, 4, steps=(9, 10), seed=3, **other)
    sizes = [first.size_of_step(step) for step in range(200)]
    assert [second.size_of_step(step) for step in reversed(range(200))] == sizes[::-1]
    assert [sampler(7, seed=4, **other).size_of_step(step) for step in range(200)] != sizes
    assert {size for _, _, size, _ in flat(list(sampler(7, size=416, multiscale_sizes=(320, 608))))} == {
        416
    }  # no resizing


# --- repeat factors ---


@pytest.mark.parametrize(
    "factors",
    [
        [1, 1.5, 2.25, 1.25],  # sum 6
        [1, 1, 1, 1.4],  # sum 4.4: no epoch of whole images has that length
        [1, 1, 1, 1, 1.7],
        [1.2] * 7,
        [1] * 5,
        [3.9, 1, 1],
    ],
    ids=str,
)
def test_repeat_factors(factors: list[float]) -> None:
    """Every epoch has the same length; each image comes floor(r) or ceil(r) times, r on average.

    r is the factor stretched so that the epoch holds a whole number of images; stretched, not shrunk: an image with
    factor 1 must not be left out of an epoch.
    """
    repeating = sampler(len(factors), repeat_factors=np.array(factors))
    epochs = 1500
    counts = np.array([np.bincount(repeating.order.of_epoch(epoch), minlength=len(factors)) for epoch in range(epochs)])
    assert set(counts.sum(axis=1)) == {repeating.images_per_epoch}
    length = repeating.images_per_epoch
    assert sum(factors) - 1e-9 <= length < sum(factors) + 1
    wanted = np.array(factors) * length / sum(factors)
    assert (counts >= np.floor(wanted + 1e-9)).all() and (counts <= np.ceil(wanted - 1e-9)).all()
    assert counts.min() >= 1
    # standard error of a mean over the epochs at most 0.5 / sqrt(1500) = 0.013
    assert np.abs(counts.mean(axis=0) - wanted).max() < 0.055


def test_an_epoch_with_repeated_images_runs_on_into_the_next() -> None:
    repeating = sampler(3, 5, steps=(0, 8), repeat_factors=np.array([1.0, 2.5, 1.5]))
    stream = flat(list(repeating))
    assert [epoch for _, epoch, *_ in stream] == [place // 5 for place in range(40)]
    assert repeating.images_per_epoch == 5


# --- collate ---


def sample(boxes: int, size: int = 32, index: int = 0) -> Sample:
    generator = np.random.default_rng([boxes, index])
    return Sample(
        generator.integers(0, 256, (size, size, 3), dtype=np.uint8),
        generator.uniform(0, size, (boxes, 4)).astype(np.float32),
        generator.choice([-2, 0, 5, 79], boxes),  # some are crowd regions
        index,
        Letterbox(1.0, 1.0, 0, 0, size, size),
    )


@pytest.mark.parametrize(
    ("most", "padded"), [(0, 32), (1, 32), (32, 32), (33, 64), (64, 64), (65, 128), (128, 128), (500, 512)]
)
def test_targets_are_padded_to_few_shapes_and_none_is_lost(most: int, padded: int) -> None:
    samples = [sample(count, index=number) for number, count in enumerate((0, most, most // 2))]
    batch = collate_samples(samples)
    assert batch["boxes"].shape == (3, padded, 4) and batch["boxes"].dtype == torch.float32
    assert batch["labels"].shape == (3, padded) and batch["labels"].dtype == torch.int64
    for row, one in enumerate(samples):
        count = len(one.labels)
        assert batch["labels"][row].tolist() == [*one.labels, *[-1] * (padded - count)]
        assert batch["boxes"][row, :count].tolist() == one.boxes.tolist()
    assert torch.isfinite(batch["boxes"]).all()


@pytest.mark.parametrize("count", [1, 3])
def test_images_are_uint8_channels_last(count: int) -> None:
    samples = [sample(2, index=number + 7) for number in range(count)]
    batch = collate_samples(samples)
    images = batch["images"]
    assert images.shape == (count, 3, 32, 32) and images.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)
    for row, one in enumerate(samples):
        assert np.array_equal(images[row].permute(1, 2, 0).numpy(), one.image)
    assert batch["indices"].tolist() == [number + 7 for number in range(count)]
    assert batch["letterboxes"] == [one.letterbox for one in samples]


def test_targets_move_with_the_images() -> None:
    batch = collate_samples([sample(3)])
    images, targets = batch_to_device(batch, CPU)
    assert images.dtype == torch.uint8 and targets.keys() == {"boxes", "labels"}
    assert torch.equal(targets["boxes"], batch["boxes"]) and torch.equal(targets["labels"], batch["labels"])


# --- loaders and workers ---


def digest(batch: Batch) -> str:
    content = hashlib.sha256()
    for key in ("images", "boxes", "labels", "indices"):
        content.update(f"{tuple(batch[key].shape)}{batch[key].stride()}".encode())
        content.update(batch[key].numpy().tobytes())
    content.update(repr(batch["letterboxes"]).encode())
    return content.hexdigest()


@pytest.fixture
def training_set(drawn_dataset: Path, default_settings: Load) -> CocoDataset:
    names = ("gauss_noise", "multiplicative_noise", *NAMED)
    settings = default_settings(*(f"data.augmentation.{name}.p=0.5" for name in names))
    transform = transform_of(settings, 64, 11, training=True)
    return CocoDataset(drawn_dataset / "train", drawn_dataset / "annotations" / "instances_train.json", transform)


def load_digests(dataset: Dataset, num_workers: int, first: int = 0) -> list[str]:
    batches = sampler(9, 3, 2, steps=(first, 6), seed=11, resize_frequency=2, multiscale_sizes=(32, 96))
    return [digest(batch) for batch in build_training_loader(dataset, batches, num_workers, CPU)]


def test_the_number_of_workers_changes_nothing(training_set: CocoDataset) -> None:
    alone = load_digests(training_set, 0)
    assert len(alone) == 12 and len(set(alone)) == 12
    assert load_digests(training_set, 1) == alone
    assert load_digests(training_set, 2) == alone
    # a continued run, which also starts its workers anew: the batches it still has to see
    assert load_digests(training_set, 2, first=4) == alone[8:]


def test_loading_leaves_the_random_state_of_the_run_alone(training_set: CocoDataset) -> None:
    """The state in a checkpoint must not depend on whether the loader was started before it was taken."""
    for num_workers in (0, 1):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        load_digests(training_set, num_workers, first=5)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_sees_every_image_once_in_order(drawn_dataset: Path, default_settings: Load, num_workers) -> None:
    transform = transform_of(default_settings(), 64, 0, training=False)
    dataset = CocoDataset(drawn_dataset / "val", drawn_dataset / "annotations" / "instances_val.json", transform)
    batches = list(build_evaluation_loader(dataset, 3, num_workers, CPU))
    assert [batch["indices"].tolist() for batch in batches] == [[0, 1, 2], [3]]
    for batch in batches:
        for row, index in enumerate(batch["indices"].tolist()):
            assert np.array_equal(batch["images"][row].permute(1, 2, 0).numpy(), dataset[index].image)


class SlowDataset(Dataset):
    """Takes long enough that signals find the workers at work."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, position: Position) -> Sample:
        time.sleep(0.02)
        return sample(1, index=position[0])


def test_workers_leave_signals_to_the_training_process() -> None:
    """Ctrl-C reaches the whole process group; the batches of the step under way must still come."""
    batches = sampler(100, 2, steps=(0, 20))
    iterator = iter(build_training_loader(SlowDataset(), batches, 2, CPU))
    received = [next(iterator), next(iterator)]  # one of each worker: both have begun
    for worker in iterator._workers:  # type: ignore[attr-defined]
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    received += list(iterator)
    assert [batch["indices"].tolist() for batch in received] == [[place[0] for place in batch] for batch in batches]


FAILING_RUN = """
import torch, numpy as np
from detection.data.loaders import build_training_loader
from detection.data.sampler import TrainingBatchSampler
from detection.data.workers import prepare_process
from detection.data.transforms import Sample

prepare_process()
class Failing:
    def __getitem__(self, position):
        if position[0] == 3:
            raise RuntimeError("unforeseen")
        return Sample(np.zeros((8, 8, 3), np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, int), 0, None)

for _ in build_training_loader(Failing(), TrainingBatchSampler(9, 1, 1, (0, 9), 0, 8), 2, torch.device("cpu")):
    pass
"""


@pytest.mark.slow  # starts Python with torch
def test_an_error_ends_the_process_although_workers_ignore_sigterm() -> None:
    """multiprocessing's own ending of the workers waits forever for processes that ignore its SIGTERM."""
    done = subprocess.run(
        [sys.executable, "-c", FAILING_RUN], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and done.stderr.strip().endswith("RuntimeError: unforeseen")


def test_a_damaged_image_in_a_worker_is_the_same_error(
    drawn_dataset: Path, default_settings: Load, tmp_path: Path
) -> None:
    """The last line is the message of `DataReadError`, which `exit_with_message` prints."""
    shutil.copytree(drawn_dataset, tmp_path, dirs_exist_ok=True)
    broken = tmp_path / "train" / "5.png"
    broken.write_bytes(broken.read_bytes()[:60])
    transform = transform_of(default_settings(), 64, 0, training=True)
    dataset = CocoDataset(tmp_path / "train", tmp_path / "annotations" / "instances_train.json", transform)
    for num_workers in (0, 1):
        with pytest.raises(DataReadError) as caught:
            list(build_training_loader(dataset, sampler(9, 3, steps=(0, 3)), num_workers, CPU))
        assert "5.png" in str(caught.value).strip().splitlines()[-1]


def test_sizes_begin_at_the_smallest_and_keep_their_step() -> None:
    """A network of stride 8 may have 56 px as its smallest size: 56, 88 and 120 px, never 64."""
    sampler = TrainingBatchSampler(8, 2, 1, (0, 200), 0, 56, 1, (56, 120))
    assert {sampler.size_of_step(step) for step in range(200)} == {56, 88, 120}
    coarse = TrainingBatchSampler(8, 2, 1, (0, 200), 0, 64, 1, (64, 256), size_step=64)
    assert {coarse.size_of_step(step) for step in range(200)} == {64, 128, 192, 256}
