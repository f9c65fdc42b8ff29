"""Partners for mosaic and mixup are functions of seed, epoch and index, whatever the batches, workers and store."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detection.config.settings import Settings
from detection.data.build import build_training_dataset, prepare_for_training
from detection.data.fake import FakeDataset
from detection.data.loaders import batch_to_device, build_training_loader, collate_samples
from detection.data.partners import PartnerImages
from detection.data.sampler import BLOCK, ImageOrder, Position, TrainingBatchSampler
from detection.errors import DataReadError
from tests.support.detectors import geometry_of
from tests.support.pictures import probabilities

Load = Callable[..., Settings]
CPU = torch.device("cpu")
MIXED = (*probabilities(mosaic=0.7, mixup=0.5, affine=0.5, horizontal_flip=0.5, gauss_noise=0.3), "train.image_size=64")
FACTORS = np.array([1, 1.5, 2.25, 1.25, 1, 1, 1, 1, 1])


@pytest.mark.parametrize(("count", "factors"), [(1, None), (2, None), (9, FACTORS), (15, None), (100, None)])
def test_neighbours_are_the_images_of_the_block(count: int, factors: np.ndarray | None) -> None:
    order = ImageOrder(count, 5, factors)
    stream = [order.at(position) for position in range(40 * BLOCK)]
    for epoch in range(400 // order.images_per_epoch if count < 40 else 4):
        for index in range(count):
            place = stream.index((index, epoch)) // BLOCK * BLOCK
            expected = [image for image, _ in stream[place : place + BLOCK] if image != index]
            assert order.neighbours(index, epoch) == list(dict.fromkeys(expected))
    # asked in another order, as another worker would
    again = ImageOrder(count, 5, factors)
    assert again.neighbours(count - 1, 2) == order.neighbours(count - 1, 2)


def test_partners_are_drawn_once_each_if_there_are_enough() -> None:
    partners, seen = PartnerImages(ImageOrder(40, 0)), set()
    for number in range(200):
        drawn = partners.draw(7, 3, 3, np.random.default_rng(number))
        assert len(set(drawn)) == 3 and 7 not in drawn
        seen |= set(drawn)
    assert len(seen) == BLOCK - 1
    assert PartnerImages(ImageOrder(1, 0)).draw(0, 0, 3, np.random.default_rng(0)) == [0, 0, 0]
    assert set(PartnerImages(ImageOrder(2, 0)).draw(0, 0, 3, np.random.default_rng(0))) == {1}


def test_the_store_is_bounded_and_forgets_what_was_used_longest_ago() -> None:
    partners, loaded = PartnerImages(ImageOrder(9, 0), max_bytes=3000), []

    def load(index: int) -> np.ndarray:
        loaded.append(index)
        return np.full((10, 400 if index == 8 else 30, 3), index, np.uint8)

    for index in (0, 1, 2, 0, 3, 0, 1, 8, 8, 0):
        assert (partners.load(index, load) == index).all() and partners.bytes <= 3000
        assert partners.bytes == sum(image.nbytes for image in partners.images.values())
    assert loaded == [0, 1, 2, 3, 1, 8, 8]  # 3 images; 0 was used again before 3 came; 8 alone is too large


@pytest.fixture
def mixed_set(drawn_dataset: Path, default_settings: Load) -> Callable[..., tuple[Any, Settings]]:
    def build(*words: str, root: Path = drawn_dataset) -> tuple[Any, Settings]:
        settings = default_settings(f"data.root={root}", *MIXED, *words)
        dataset = build_training_dataset(settings.data, 0, 2 if settings.data.fake else None)
        prepare_for_training(dataset, geometry_of(settings), settings)
        return dataset, settings

    return build


def batches_of(
    dataset: Any, workers: int, batch_size: int = 3, steps: tuple[int, int] = (0, 6), **options: Any
) -> list:
    sampler = TrainingBatchSampler(len(dataset), batch_size, 1, steps, 0, 64, **options)
    return list(build_training_loader(dataset, sampler, workers, CPU))


def test_batches_do_not_depend_on_workers_batch_size_or_cache(mixed_set: Callable, tmp_path: Path) -> None:
    words = ["data.augmentation.mixup.beta=1.5"]

    def rows(batches: list) -> list[tuple]:
        keys = ("images", "boxes", "labels", "weights", "indices")
        return [row for batch in batches for row in zip(*(batch[key].numpy() for key in keys), strict=True)]

    alone = rows(batches_of(mixed_set(*words)[0], 0))
    small = mixed_set(*words)[0]
    small.partners.max_bytes = 1
    others = {
        "two workers": batches_of(mixed_set(*words)[0], 2),
        "another batch size": batches_of(mixed_set(*words)[0], 0, 2, (0, 9)),
        "the rest of a continued run": batches_of(mixed_set(*words)[0], 1, 3, (2, 6)),
        "no store": batches_of(small, 0),
        "a cache": batches_of(mixed_set(*words, "data.cache=memory", "data.cache_gib=1")[0], 0),
    }
    for name, batches in others.items():
        found = rows(batches)
        for row, expected in zip(found, alone[-len(found) :], strict=True):
            assert all(np.array_equal(one, two) for one, two in zip(row, expected, strict=True)), name


def test_a_batch_of_a_block_decodes_each_image_once(mixed_set: Callable) -> None:
    dataset, _ = mixed_set("data.augmentation.mosaic.p=1")
    loaded: list[int] = []
    load_image = dataset.load_image
    dataset.load_image = lambda index: loaded.append(index) or load_image(index)  # type: ignore[func-returns-value]
    batches_of(dataset, 0, 9, (0, 4))
    assert sorted(loaded) == list(range(9))


def test_the_last_part_of_a_run_is_without_both(mixed_set: Callable, default_settings: Load) -> None:
    dataset, _ = mixed_set()
    plain, _ = mixed_set("data.augmentation.mosaic.p=0", "data.augmentation.mixup.p=0")
    assert plain.partners is None
    finishing, without, with_both = (
        batches_of(dataset, 0, finish_step=4), batches_of(plain, 0), batches_of(dataset, 0)
    )  # fmt: skip
    same = [[torch.equal(one["images"], two["images"]) for one, two in zip(finishing, other, strict=True)]
            for other in (without, with_both)]  # fmt: skip
    assert same[0] == [False] * 4 + [True] * 2 and same[1][:4] == [True] * 4 and not any(same[1][4:])


@pytest.mark.parametrize("kind", ["missing", "damaged"])
def test_an_unreadable_partner_is_replaced_and_recorded(
    mixed_set: Callable, drawn_dataset: Path, tmp_path: Path, kind: str
) -> None:
    shutil.copytree(drawn_dataset, tmp_path / "data")
    dataset, _ = mixed_set("data.augmentation.mosaic.p=1", "data.augmentation.mixup.p=0", root=tmp_path / "data")
    path = tmp_path / "data" / "train" / dataset.annotations.file_name(4)
    if kind == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataReadError, match=path.name):
        for index in range(9):
            _ = dataset[Position(index)]
    dataset.substitutes = True
    samples = [dataset[Position(index, epoch)] for epoch in range(3) for index in range(9)]
    named = [sample for sample in samples if sample.unreadable]
    assert all(len(sample.unreadable) == 1 and path.name in sample.unreadable[0] for sample in named)
    assert 3 < len(named) < 27  # 3 of 8 neighbours are drawn, and the image itself
    assert all(sample.index != 4 for sample in samples)


def test_weights_travel_with_the_batch(mixed_set: Callable) -> None:
    weighted, plain = mixed_set("data.augmentation.mixup={p: 0.6, beta: 1.5}")[0], mixed_set()[0]
    batch = collate_samples([weighted[Position(index, 1)] for index in range(9)])
    weights, labels = batch["weights"], batch["labels"]
    assert weights.dtype == torch.float32 and weights.shape == labels.shape
    assert (weights[labels == -1] == 0).all() and (weights[labels != -1] > 0).all() and (weights <= 1).all()
    assert ((weights > 0) & (weights < 1)).any() and (weights == 1).any()
    assert batch_to_device(batch, CPU)[1].keys() == {"boxes", "labels", "weights"}
    batch = collate_samples([plain[Position(index, 1)] for index in range(9)])
    assert "weights" not in batch and batch_to_device(batch, CPU)[1].keys() == {"boxes", "labels"}
    clean = collate_samples([weighted[Position(index, 1, clean=True)] for index in range(9)])
    assert (clean["weights"] == (clean["labels"] != -1)).all()  # the form of a batch stays the same


def test_synthetic_images_are_mixed_too(mixed_set: Callable) -> None:
    dataset, _ = mixed_set("data.fake=true", "model.num_classes=2")
    assert isinstance(dataset, FakeDataset)
    mixed, clean = dataset[Position(3, 0, 64)], dataset[Position(3, 0, 64, clean=True)]
    again = dataset[Position(3, 0, 64)]
    assert np.array_equal(mixed.image, again.image) and any(
        not np.array_equal(dataset[Position(index)].image, dataset[Position(index, clean=True)].image)
        for index in range(4)
    )
    assert clean.image.shape == (64, 64, 3)
