"""The image cache: the same images with it and without, whatever happens to the files, the store or the workers."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from detection.config.settings import Settings
from detection.data.build import build_training_dataset
from detection.data.image_cache import HEAD, ROW, ImageCache, build_cache
from detection.data.image_file import read_image
from detection.data.loaders import build_training_loader
from detection.data.sampler import TrainingBatchSampler
from detection.errors import DataReadError, OutputError, SettingsError
from tests.support.detectors import datasets_of, transform_of

Load = Callable[..., Settings]
GIB = 2**30
KINDS = ["memory", "disk"]


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Four PNG files of 40 x 30 = 3,600 bytes decoded."""
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for number, path in enumerate(paths):
        pixels = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        cv2.imwrite(str(path), pixels)
    return paths


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., ImageCache]:
    def cache(kind: str = "disk", max_bytes: int = GIB) -> ImageCache:
        return ImageCache(4, max_bytes, "opencv", tmp_path / "caches" / "a.images" if kind == "disk" else None)

    return cache


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path, decoder: str) -> np.ndarray:
        raise AssertionError(f"{path} is decoded again")

    monkeypatch.setattr("detection.data.image_file.read_image", read)


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_time_nothing_is_decoded(kind: str, make, pictures: list[Path], monkeypatch) -> None:
    cache, expected = make(kind), [read_image(path) for path in pictures]
    for index in (2, 0, 3, 1):
        assert np.array_equal(cache.read(index, pictures[index]), expected[index])
    forbid_decoding(monkeypatch)
    for index, path in enumerate(pictures):
        image = cache.read(index, path)
        assert np.array_equal(image, expected[index]) and image.dtype == np.uint8
        image[:] = 0  # a caller's own copy
        assert np.array_equal(cache.read(index, path), expected[index])
    if kind == "disk":  # also in a later run
        assert np.array_equal(make(kind).read(1, pictures[1]), expected[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_with_a_cache(
    default_settings: Load, drawn_dataset: Path, tmp_path: Path, kind: str, workers: int
) -> None:
    """Two epochs of augmented batches at changing sizes, bit for bit; and the second one comes from the cache."""
    batches = []
    for name in ("none", kind):
        words = [f"data.root={drawn_dataset}", f"data.cache={name}", f"data.cache_path={tmp_path}", "data.cache_gib=1"]
        settings = default_settings(*words)
        dataset = build_training_dataset(settings.data, 0, None)
        dataset.sample_transform = transform_of(settings, 64, training=True)
        sampler = TrainingBatchSampler(9, 3, 1, (0, 6), 0, 64, 1, (64, 96))
        batches.append(list(build_training_loader(dataset, sampler, workers, torch.device("cpu"))))
    for plain, cached in zip(*batches, strict=True):
        assert all(torch.equal(plain[key], cached[key]) for key in ("images", "boxes", "labels", "indices"))
    pixels = dataset.cache.read_head()["end"] - dataset.cache.first_pixel
    once = 3 * dataset.annotations.image_sizes.astype(int).prod(axis=1).sum()
    # two workers may decode an image of the epochs' border at the same time, and both keep it
    assert pixels == once if workers == 0 else once <= pixels < 2 * once


def test_an_edited_file_is_decoded_anew(make, pictures: list[Path]) -> None:
    cache, status = make(), pictures[0].stat()
    before = cache.read(0, pictures[0])
    cv2.imwrite(str(pictures[0]), np.full((30, 40, 3), 9, np.uint8))
    assert (cache.read(0, pictures[0]) == 9).all() and before.max() > 9
    # another file of the same size and time under the same name
    content = pictures[1].read_bytes()
    pictures[0].unlink()
    pictures[0].write_bytes(content)
    os.utime(pictures[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert np.array_equal(cache.read(0, pictures[0]), read_image(pictures[1]))
    pictures[0].unlink()
    with pytest.raises(DataReadError, match=r"0\.png cannot be read: No such file"):
        cache.read(0, pictures[0])


def test_another_path_or_decoder_is_another_image(make, pictures: list[Path], monkeypatch) -> None:
    cache = make()
    cache.read(0, pictures[0])
    assert np.array_equal(cache.read(0, pictures[1]), read_image(pictures[1]))
    monkeypatch.setattr("detection.data.image_cache.describe_decoder", lambda name: "another library 1.0")
    other = make()
    assert cache.key_of(pictures[0]) != other.key_of(pictures[0])


@pytest.mark.parametrize("place", ["pixels", "key", "offset", "height", "row", "head", "end cut off", "emptied"])
def test_a_damaged_store_is_noticed(make, pictures: list[Path], place: str) -> None:
    cache = make()
    expected = [cache.read(index, path) for index, path in enumerate(pictures)]
    row = HEAD.itemsize + ROW.itemsize  # of image 1
    offset = {"pixels": cache.first_pixel + 3600 + 1234, "head": 3}.get(place, row + ROW.fields.get(place, (0, 0))[1])
    if place == "end cut off":
        os.truncate(cache.file, cache.first_pixel + 2 * 3600 - 1)
    elif place == "emptied":
        os.truncate(cache.file, 0)
    else:
        with open(cache.file, "r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1]))
    for reader in (cache, make()):
        for index, path in enumerate(pictures):
            assert np.array_equal(reader.read(index, path), expected[index])


def test_a_writer_that_died_in_the_middle_leaves_no_half_image(make, pictures: list[Path], monkeypatch) -> None:
    cache, write = make(), os.pwrite
    calls: list[int] = []

    def die(descriptor: int, content: object, offset: int) -> int:
        if offset >= cache.first_pixel:
            calls.append(write(descriptor, memoryview(content)[:1000], offset))
            raise KeyboardInterrupt
        return write(descriptor, content, offset)

    monkeypatch.setattr(os, "pwrite", die)
    with pytest.raises(KeyboardInterrupt):
        cache.read(0, pictures[0])
    monkeypatch.setattr(os, "pwrite", write)
    assert calls == [1000]
    for reader in (cache, make()):
        for index, path in enumerate(pictures):
            assert np.array_equal(reader.read(index, path), read_image(path))


def test_a_full_cache_says_so_once_and_goes_on(make, pictures: list[Path], capfd) -> None:
    cache = make("memory", HEAD.itemsize + 4 * ROW.itemsize + 2 * 3600 + 100)
    for _ in range(2):
        for index, path in enumerate(pictures):
            assert np.array_equal(cache.read(index, path), read_image(path))
    assert os.fstat(cache.descriptor).st_size <= cache.max_bytes
    line = capfd.readouterr().err
    assert line.count("\n") == 1 and "image cache in memory is full at 0.00 GiB (data.cache_gib)" in line


def test_a_full_disk_is_one_line(make, pictures: list[Path], capfd, full_disk) -> None:
    cache = make()
    cache.read(0, pictures[0])
    with full_disk(cache.first_pixel + 3600 + 1000):
        for index, path in enumerate(pictures):
            assert np.array_equal(cache.read(index, path), read_image(path))
    line = capfd.readouterr().err
    assert line.count("\n") == 1 and f"image cache {cache.file} cannot grow: File too large" in line


def test_no_place_for_the_store(default_settings: Load, drawn_dataset: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"image cache .* cannot be created"):
        ImageCache(4, GIB, "opencv", tmp_path / "file" / "a.images")
    data = default_settings("data.cache=memory", "data.cache_gib=1e9").data
    with pytest.raises(SettingsError, match=r"data\.cache_gib=1e\+09: only .* GiB are available"):
        build_cache(data, "opencv", drawn_dataset, np.zeros(0, np.uint8), 4)


def test_by_default_the_file_lies_in_the_users_cache(
    default_settings: Load, drawn_dataset: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    before = sorted(drawn_dataset.rglob("*"))
    settings = default_settings(f"data.root={drawn_dataset}", "data.cache=disk")
    training, validation = datasets_of(settings, 64, 64, 0, None)
    assert training.cache.file.parent == tmp_path / "caches" / "yolo-v3" and validation.cache is None
    training[0]
    assert sorted(drawn_dataset.rglob("*")) == before


def read_all(cache: ImageCache, pictures: list[Path], repeats: int) -> None:
    for _ in range(repeats):
        for index, path in enumerate(pictures):
            if not np.array_equal(cache.read(index, path), cv2.imread(str(path))[..., ::-1]):
                os._exit(1)
    os._exit(0)


@pytest.mark.parametrize(
    ("method", "count", "repeats"),
    [("fork", 4, 20), pytest.param("spawn", 1, 1, marks=pytest.mark.slow)],  # imports torch again
)
@pytest.mark.parametrize("kind", KINDS)
def test_processes_share_it(make, pictures: list[Path], kind: str, method: str, count: int, repeats: int) -> None:
    cache, context = make(kind), multiprocessing.get_context(method)
    processes = [context.Process(target=read_all, args=(cache, pictures, repeats)) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert cache.find(3, cache.key_of(pictures[3])) is not None  # what they wrote is here
