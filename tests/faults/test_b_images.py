"""B: image files that are not what they should be. tests/data/test_coco.py has the rest."""

import os
import resource
import shutil
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from detection.checkpoints import load_checkpoint
from detection.data.image_file import read_image
from detection.errors import DataReadError
from tests.support.detectors import datasets_of


@pytest.fixture
def data(dataset: Path, tmp_path: Path) -> Path:
    """A copy of the dataset, to be broken."""
    return shutil.copytree(dataset, tmp_path / "data")


@pytest.mark.guard("detection.data.image_file:decode_image", "rfind(end) < 0", "rfind(end) < -9")
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("progressive", [0, 1])
def test_B01_a_truncated_jpeg_is_never_a_half_grey_picture(
    tmp_path: Path, share: float, progressive: int, monkeypatch
) -> None:
    # Newer versions of OpenCV refuse most of these files themselves; older ones fill the rest with grey.
    monkeypatch.setattr(cv2, "imdecode", lambda *_: np.full((80, 120, 3), 128, np.uint8))
    pixels = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    path = tmp_path / "a.jpg"
    Image.fromarray(pixels).save(path, quality=95, progressive=bool(progressive))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataReadError, match=r"a\.jpg is damaged: the JPEG data ends early"):
        read_image(path)


@pytest.mark.parametrize("suffix", ["jpg", pytest.param("png", marks=pytest.mark.faults)])
def test_B01_the_training_stops_at_it_after_saving(train, launch, data: Path, tmp_path: Path, suffix: str) -> None:
    path = data / "train" / "5.png"  # the content decides, not the ending
    if suffix == "jpg":
        Image.open(path).convert("RGB").save(path, "JPEG")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    run = train("run", f"data.root={data}")
    line = run.ends_with(3, str(path), "damaged")
    assert f"saved after step {load_checkpoint(tmp_path / 'run' / 'last.pt')['step']}" in line
    path.write_bytes(whole)
    launch("resumed", "--resume", tmp_path / "run", "--accept-changes").ends_with(0)  # it is another image now


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.faults), 2])
def test_B01_a_few_are_named_and_counted_and_the_training_goes_on(train, data: Path, workers: int) -> None:
    for name in ("5.png", "6.png"):  # in a row: the substitute's substitute
        (data / "train" / name).write_bytes(b"not an image")
    words = [f"data.root={data}", f"data.num_workers={workers}", "train.steps=3ep"]
    run = train("enough", *words, "data.max_unreadable_fraction=0.2")
    run.ends_with(0)
    named = [line for line in run.out.splitlines() if line.startswith("warning: image ")]
    assert len(named) == 2, run.out  # once each in three epochs
    assert {name for name in ("5.png", "6.png") for line in named if name in line} == {"5.png", "6.png"}
    assert "2 of 13 images so far, 2 are allowed" in named[1]
    run = train("too_many", *words, "data.max_unreadable_fraction=0.1")
    run.ends_with(3, "number 2 of them", "allows 1", "saved after")


def test_B01_the_substitute_is_the_next_image_that_can_be_read(data: Path, default_settings) -> None:
    training_set, validation_set = datasets_of(default_settings(f"data.root={data}"), 64, 64, 0, None)
    expected = training_set[(0, 4, 96)]
    for index in (11, 12):
        (data / "train" / training_set.annotations.file_name(index)).unlink()
    with pytest.raises(DataReadError):
        training_set[(11, 4, 96)]
    training_set.substitutes = True
    sample = training_set[(11, 4, 96)]
    assert sample.index == 0 and len(sample.unreadable) == 2
    assert np.array_equal(sample.image, expected.image) and np.array_equal(sample.boxes, expected.boxes)
    assert not validation_set.substitutes
    shutil.rmtree(data / "train")
    with pytest.raises(DataReadError):
        training_set[(11, 4, 96)]


@pytest.mark.guard(
    "detection.data.image_file:decode_with_opencv",
    "cv2.IMREAD_COLOR_RGB",
    "cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION",
)
@pytest.mark.parametrize("orientation", [2, 3, 4, 5, 6, 7, 8])
def test_B04_every_orientation_of_a_camera(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((40, 60, 3), np.uint8)
    upright[2:12, 5:20] = (250, 10, 10)  # what the viewer sees, and the annotation says
    turned = {
        2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(turned[orientation](upright))).save(tmp_path / "a.jpg", quality=95, exif=exif)
    image = read_image(tmp_path / "a.jpg")
    assert image.shape == upright.shape
    assert image[3:11, 6:19, 0].min() > 150 and image[14:, 24:, 0].max() < 100


def test_B03_a_missing_image_is_found_before_the_first_step(train, data: Path) -> None:
    (data / "train" / "5.png").unlink()
    run = train("run", f"data.root={data}")
    run.ends_with(2, "5.png")
    assert "from step 0" not in run.out


def test_B06_a_decompression_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("L", (14_000, 14_000)).save(path)
    assert path.stat().st_size < 500_000
    child = os.fork()
    if child == 0:
        code = 1
        try:
            before = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
            resource.setrlimit(resource.RLIMIT_AS, (before + 100_000_000, resource.RLIM_INFINITY))
            read_image(path)
        except DataReadError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_B11_an_image_that_is_no_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waits for the pipe"))
    signal.alarm(5)
    try:
        with pytest.raises(DataReadError):
            read_image(path)
    finally:
        signal.alarm(0)
