"""Images with one class each, whatever they come from."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from detection.classification.datasets import MARGIN, ClassSet, cut_box, open_class_sets
from detection.config.settings import Settings
from detection.contract import Geometry
from detection.data.sampler import Position
from detection.data.transforms import Transform
from detection.errors import DataError
from tests.support.class_folders import write_folders


def open_sets(settings: Settings, crops: bool = False) -> tuple[ClassSet, ClassSet]:
    return open_class_sets(settings.data, settings.run.seed, None, crops)


def test_a_folder_per_class(tmp_path: Path, default_settings: Callable[..., Settings]) -> None:
    write_folders(tmp_path / "train", {"cat": 3, "dog": 2})
    write_folders(tmp_path / "val", {"dog": 2})
    training, validation = open_sets(default_settings(f"data.root={tmp_path}"))
    assert training.annotations.categories.names == validation.annotations.categories.names == ("cat", "dog")
    assert training.annotations.labels.tolist() == [0, 0, 0, 1, 1]
    assert validation.annotations.labels.tolist() == [1, 1]  # not 0: the labels are those of training
    training.sample_transform = Transform(Geometry(32), 32)
    sample = training[Position(3, 0, 64)]
    # 40 x 20 in a square of 64: 64 x 32, with 16 rows above; the box is the image.
    assert sample.boxes.tolist() == [[0, 16, 64, 48]] and sample.labels.tolist() == [1]
    assert sample.image.shape == (64, 64, 3)


def test_one_set_is_divided(tmp_path: Path, default_settings: Callable[..., Settings]) -> None:
    write_folders(tmp_path, {"a": 20, "b": 20})
    training, validation = open_sets(default_settings(f"data.root={tmp_path}", "data.validation_fraction=0.25"))
    names = [{of.annotations.file_name(i) for i in range(len(of))} for of in (training, validation)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 40 and 3 <= len(names[1]) <= 18


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ({}, "no folder with images"),
        ({"train/a": 2, "val/a": 1}, "one class alone"),
        ({"train/a": 2, "train/b": 1, "val/c": 1}, "a class c that is not trained"),
        ({"train/a": 2, "train/b": 1}, "none of val"),
    ],
)
def test_folders_that_cannot_be_used(
    tmp_path: Path, default_settings: Callable[..., Settings], folders: dict[str, int], message: str
) -> None:
    write_folders(tmp_path, folders)
    with pytest.raises(DataError, match=message):
        open_sets(default_settings(f"data.root={tmp_path}"))


def test_no_such_folder(tmp_path: Path, default_settings: Callable[..., Settings]) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_sets(default_settings(f"data.root={tmp_path / 'x'}"))


def test_a_crop_has_its_margin_and_stays_in_the_image() -> None:
    image = np.arange(100 * 200 * 3, dtype=np.uint32).astype(np.uint8).reshape(100, 200, 3)
    # 20 x 40 pixels: margins of 3 and 6.
    assert MARGIN == 0.15
    crop = cut_box(image, np.array([50, 30, 70, 70], np.float32))
    assert (crop == image[24:76, 47:73]).all()
    assert cut_box(image, np.array([0, 0, 200, 100], np.float32)).shape == image.shape
    assert cut_box(image, np.array([199.5, 99.5, 200, 100], np.float32)).shape == (1, 1, 3)
    large = cut_box(np.zeros((600, 1200, 3), np.uint8), np.array([0, 0, 1200, 600], np.float32))
    assert large.shape == (128, 256, 3)


def test_an_unreadable_image_is_replaced_and_named(tmp_path: Path, default_settings: Callable[..., Settings]) -> None:
    write_folders(tmp_path / "train", {"a": 2, "b": 2})
    write_folders(tmp_path / "val", {"a": 1})
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"broken")
    training, _ = open_sets(default_settings(f"data.root={tmp_path}"))
    training.sample_transform = Transform(Geometry(32), 32)
    sample = training[0]
    assert sample.index == 1 and "0.png" in sample.unreadable[0]
    assert cv2.imread(str(tmp_path / "train" / "a" / "1.png")) is not None
