"""Images that are replaced while nobody looks are named, those of a copy of the folder are not."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from detection.data.coco import CocoDataset
from detection.training.image_watch import FILE, ImageWatch
from tests.support.fault_runs import make_dataset


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_dataset(tmp_path / "data", count=12)
    return tmp_path / "data"


def watch(root: Path) -> ImageWatch:
    splits = {"training": "train", "validation": "val"}
    return ImageWatch(
        {kind: CocoDataset(root / name, root / f"annotations/instances_{name}.json") for kind, name in splits.items()}
    )


def replace(path: Path, more: bytes = b"", seconds: int = 1) -> None:
    """Change bytes of a file without changing their number, as a corrected image of the same camera might."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(bytes(content) + more)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + seconds * 10**9))


def test_replaced_images_are_named_by_the_next_run(root: Path, tmp_path: Path) -> None:
    watch(root).save(tmp_path)
    assert watch(root).differences(tmp_path) == []
    for number in range(5):
        replace(root / "train" / f"{number}.png")
    (root / "val" / "2.png").unlink()
    assert watch(root).differences(tmp_path) == [
        "5 training images have another size or time: 0.png, 1.png, 2.png and 2 more",
        "1 validation image has another size or time: 2.png",
    ]
    watch(root).save(tmp_path)
    assert watch(root).differences(tmp_path) == []


def test_of_a_copy_only_the_sizes_count(root: Path, tmp_path: Path) -> None:
    watch(root).save(tmp_path)
    copy = shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)
    replace(copy / "train" / "0.png")
    assert watch(copy).differences(tmp_path) == []
    replace(copy / "train" / "1.png", more=b"x", seconds=0)
    assert watch(copy).differences(tmp_path) == ["1 training image has another size or time: 1.png"]


def test_of_a_folder_that_was_copied_anew_only_the_sizes_count(root: Path, tmp_path: Path) -> None:
    """A machine that a scheduler starts in place of another fetches the data again, to the same path."""
    watch(root).save(tmp_path)
    for number in range(7):
        replace(root / "train" / f"{number}.png")
    assert watch(root).differences(tmp_path) == []
    replace(root / "train" / "1.png", more=b"x")
    assert watch(root).differences(tmp_path) == ["1 training image has another size or time: 1.png"]


def test_a_run_says_it_once(root: Path) -> None:
    watching = watch(root)
    assert watching.look_again() == []
    replace(root / "train" / "3.png")
    assert watching.look_again() == [
        "warning     1 training image has another size or time: 3.png; the run sees the new ones from here on"
    ]
    assert watching.look_again() == []


def test_without_stamps_or_with_damaged_ones_nothing_is_said(root: Path, tmp_path: Path) -> None:
    assert watch(root).differences(tmp_path) == []
    for content in (b"", b"PK\x03\x04", b"x" * 100):
        (tmp_path / FILE).write_bytes(content)
        assert watch(root).differences(tmp_path) == []
    np.savez(tmp_path / FILE, training_root=np.array("elsewhere"))
    assert watch(root).differences(tmp_path) == []
    ImageWatch({}).save(tmp_path / "other process")
    assert not (tmp_path / "other process").exists()
