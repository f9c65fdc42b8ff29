"""The built-in dataset: what its files hold, exact boxes, disjoint splits, and when it is generated again."""

import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from detection.data import digits
from detection.data.digits import IMAGE_COUNTS, Scene, Sources, compose_scene, ensure_digits, paint_scene
from tests.support.paths import REPOSITORY

COUNTS = {"train": 14, "val": 6}  # more images than photographs in both splits
FEW = {"train": 2, "val": 1}


@pytest.fixture(scope="module")
def sources() -> Sources:
    return digits.load_sources()


@pytest.fixture(scope="module")
def scenes(sources: Sources) -> dict[str, list[Scene]]:
    return {split: [compose_scene(sources, split, index) for index in range(30)] for split in IMAGE_COUNTS}


@pytest.fixture(scope="module")
def dataset(sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "digits"
    with pytest.MonkeyPatch.context() as patch:  # opens no connection
        patch.setattr(socket.socket, "connect", lambda *_: pytest.fail("no network allowed"))
        assert ensure_digits(root, COUNTS)
    return root


@pytest.fixture
def quick(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not read the photographs again for every directory that a test fills."""
    monkeypatch.setattr(digits, "load_sources", lambda: sources)


def read(root: Path, split: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
    return content


def read_bytes(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# The promised numbers


@pytest.mark.parametrize("split", ["train", "val"])
def test_files_are_ordinary_coco(dataset: Path, split: str) -> None:
    content = read(dataset, split)
    assert [(entry["id"], entry["name"]) for entry in content["categories"]] == [(n + 1, str(n)) for n in range(10)]
    assert [image["id"] for image in content["images"]] == list(range(1, COUNTS[split] + 1))
    assert sorted(path.name for path in (dataset / split).iterdir()) == [i["file_name"] for i in content["images"]]
    for image in content["images"]:
        pixels = cv2.imread(str(dataset / split / image["file_name"]))
        assert pixels is not None and pixels.shape == (image["height"], image["width"], 3) == (320, 320, 3)

    for number, annotation in enumerate(content["annotations"], start=1):
        left, top, width, height = annotation["bbox"]
        assert left >= 0 and left + width <= 320 and top >= 0 and top + height <= 320
        assert annotation["id"] == number and annotation["area"] == width * height and 28 <= height <= 76
        assert annotation["iscrowd"] == 0 and annotation["segmentation"] == []
    for image in content["images"]:
        assert 5 <= sum(annotation["image_id"] == image["id"] for annotation in content["annotations"]) <= 14


def test_category_is_the_label_of_the_glyph(dataset: Path) -> None:
    from sklearn.datasets import load_digits

    labels = load_digits().target
    for split in COUNTS:
        for annotation in read(dataset, split)["annotations"]:
            assert annotation["category_id"] == labels[annotation["glyph"]] + 1


# Training and validation share nothing


def test_glyphs_are_divided(sources: Sources) -> None:
    train, validation = (set(sources.glyph_split[split].tolist()) for split in ("train", "val"))
    assert not train & validation
    assert train | validation == set(range(1797))
    for label in range(10):  # a fifth of every class, not of the whole
        count = int((sources.labels == label).sum())
        assert sum(int(sources.labels[glyph]) == label for glyph in train) == pytest.approx(0.8 * count, abs=0.5)


def test_files_show_disjoint_glyphs_and_photographs(dataset: Path) -> None:
    train, validation = read(dataset, "train"), read(dataset, "val")
    for content, key in (("annotations", "glyph"), ("images", "photograph")):
        assert not {entry[key] for entry in train[content]} & {entry[key] for entry in validation[content]}
    assert {image["photograph"] for image in train["images"]} == set(digits.TRAIN_PHOTOGRAPHS)
    assert {image["photograph"] for image in validation["images"]} == set(digits.VALIDATION_PHOTOGRAPHS)


def test_photographs_are_different_pictures(sources: Sources) -> None:
    assert not set(digits.TRAIN_PHOTOGRAPHS.values()) & set(digits.VALIDATION_PHOTOGRAPHS.values())

    def shrink(photograph: np.ndarray) -> np.ndarray:
        small = cv2.resize(photograph, (16, 16), interpolation=cv2.INTER_AREA).astype(float).ravel()
        return (small - small.mean()) / small.std()

    train, validation = (
        {name: shrink(photograph) for name, photograph in sources.photographs[split].items()}
        for split in ("train", "val")
    )
    # The correlation recognises a near copy: the two views of the motorcycle, which share a split.
    assert (train["motorcycle_left"] * train["motorcycle_right"]).mean() > 0.7
    for (name, one), (other_name, other) in itertools.product(train.items(), validation.items()):
        assert (one * other).mean() < 0.7, (name, other_name)


# Boxes


def test_box_of_a_mask_drawn_by_hand(sources: Sources, scenes: dict[str, list[Scene]]) -> None:
    # Opaque enough are the columns 1 to 3 of rows 1 and 2, so the box is 3 wide, 2 high, one pixel inside the patch.
    alpha = np.array(
        [[0.0, 0.1, 0.4, 0.1, 0.0], [0.2, 0.5, 0.9, 0.3, 0.1], [0.0, 0.4, 1.0, 0.6, 0.49], [0.0, 0.0, 0.2, 0.0, 0.0]],
        np.float32,
    )
    digit = replace(scenes["val"][0].digits[0], left=10, top=20, alpha=alpha)
    assert digit.box_xywh == (11, 21, 3, 2)


def test_digits_of_every_class_that_do_not_touch(scenes: dict[str, list[Scene]]) -> None:
    for split in IMAGE_COUNTS:
        assert {digit.label for scene in scenes[split] for digit in scene.digits} == set(range(10))
        for scene in scenes[split]:
            times_covered = np.zeros((320, 320), int)
            for digit in scene.digits:
                height, width = digit.alpha.shape
                times_covered[digit.top : digit.top + height, digit.left : digit.left + width] += 1
            assert times_covered.max() == 1


def test_boxes_are_tight_around_painted_pixels(scenes: dict[str, list[Scene]]) -> None:
    # White ink on black turns opacity into brightness: 0.5 and more becomes 128 and more.
    white = np.full(3, 255, np.float32)
    for scene in itertools.chain(*scenes.values()):
        inked = tuple(replace(digit, ink_rgb=white) for digit in scene.digits)
        painted = paint_scene(replace(scene, background=np.zeros_like(scene.background), digits=inked))[:, :, 0] >= 128
        for digit in scene.digits:
            left, top, width, height = digit.box_xywh
            inside = painted[top : top + height, left : left + width]
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            painted[top : top + height, left : left + width] = False
        assert not painted.any()  # nothing outside the boxes


def test_stored_picture_shows_ink_where_the_file_says(dataset: Path, scenes: dict[str, list[Scene]]) -> None:
    for split, count in COUNTS.items():
        content = read(dataset, split)
        for image, scene in zip(content["images"], scenes[split][:count], strict=True):
            stored = cv2.imread(str(dataset / split / image["file_name"]))
            assert stored is not None
            difference = np.abs(stored[:, :, ::-1].astype(int) - scene.background).mean(axis=2)
            outside = np.ones((320, 320), bool)
            for annotation in content["annotations"]:
                if annotation["image_id"] == image["id"]:
                    left, top, width, height = annotation["bbox"]
                    changed = difference[top : top + height, left : left + width] > 40
                    assert changed.mean() > 0.15
                    outside[max(0, top - 8) : top + height + 8, max(0, left - 8) : left + width + 8] = False
            assert difference[outside].mean() < 6  # what JPEG costs


# Readable digits


@pytest.mark.parametrize("degrees", [-12.0, 0.0, 12.0])
@pytest.mark.parametrize("height", [25.0, 50.0, 79.0])
def test_rendered_glyph_has_the_wanted_height(sources: Sources, height: float, degrees: float) -> None:
    for glyph in sources.glyphs[:20]:
        alpha = digits.render_glyph(glyph, height, degrees)
        assert alpha.min() >= 0 and alpha.max() == 1
        rows = np.flatnonzero((alpha >= 0.5).any(axis=1))
        assert rows[-1] + 1 - rows[0] == pytest.approx(height, abs=1)


def test_rendered_glyph_is_neither_mirrored_nor_turned_over(sources: Sources) -> None:
    for glyph in sources.glyphs[:20]:
        alpha = digits.render_glyph(glyph, height=64, degrees=0)
        columns = np.flatnonzero((glyph >= 0.5).any(axis=0))
        source = glyph[:, columns[0] : columns[-1] + 1]
        small = cv2.resize(alpha, (source.shape[1], source.shape[0]), interpolation=cv2.INTER_AREA)
        candidates = source, source[::-1], source[:, ::-1]
        likeness = [np.corrcoef(small.ravel(), turned.ravel())[0, 1] for turned in candidates]
        assert likeness[0] == max(likeness) > 0.75


def test_ink_contrasts_with_what_lies_beneath(scenes: dict[str, list[Scene]]) -> None:
    for scene in itertools.chain(*scenes.values()):
        for digit in scene.digits:
            height, width = digit.alpha.shape
            beneath = scene.background[digit.top : digit.top + height, digit.left : digit.left + width].astype(float)
            grey = 0.299 * beneath[..., 0] + 0.587 * beneath[..., 1] + 0.114 * beneath[..., 2]
            ink = 0.299 * digit.ink_rgb[0] + 0.587 * digit.ink_rgb[1] + 0.114 * digit.ink_rgb[2]
            assert (np.abs(grey - ink) > 70).mean() > 0.9


def test_no_ink_for_a_background_of_all_greys() -> None:
    all_greys = np.tile(np.linspace(0, 255, 40, dtype=np.float32), (40, 1))
    assert digits.choose_ink(all_greys, np.random.default_rng(0)) is None


# Deterministic


@pytest.mark.usefixtures("quick")
def test_same_bytes_on_every_run(dataset: Path, tmp_path: Path) -> None:
    ensure_digits(tmp_path / "again", COUNTS)
    assert read_bytes(tmp_path / "again") == read_bytes(dataset)


def test_an_image_depends_on_its_index_only(sources: Sources, scenes: dict[str, list[Scene]]) -> None:
    for split in IMAGE_COUNTS:
        assert np.array_equal(paint_scene(compose_scene(sources, split, 7)), paint_scene(scenes[split][7]))
    count = len(digits.VALIDATION_PHOTOGRAPHS)  # the same photograph comes again, with other digits on another crop
    assert scenes["val"][0].photograph == scenes["val"][count].photograph
    assert not np.array_equal(scenes["val"][0].background, scenes["val"][count].background)


# When it is generated


@pytest.mark.usefixtures("quick")
def test_complete_dataset_is_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "new" / "digits"
    assert ensure_digits(root, FEW) is True
    (root / "notes.txt").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert ensure_digits(root, FEW) is False
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    (root / "notes.txt").unlink()
    assert ensure_digits(root, {"train": 1, "val": 1}) is True  # of other counts
    assert len(list((root / "train").iterdir())) == 1
    assert [path.name for path in root.parent.iterdir()] == ["digits"]


def rewrite(change: Callable[[str], str], *splits: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        for split in splits:
            path = root / "annotations" / f"instances_{split}.json"
            path.write_text(change(path.read_text()))

    return damage


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "image missing": lambda root: (root / "train" / "digits_train_0001.jpg").unlink(),
    "image empty": lambda root: (root / "val" / "digits_val_0000.jpg").write_bytes(b""),
    "annotations cut": rewrite(lambda text: text[:100], *FEW),
    "annotations missing": lambda root: (root / "annotations" / "instances_val.json").unlink(),
    "other version": rewrite(lambda text: text.replace('"generator_version":', '"generator_version":9'), "train"),
    "everything but folders": lambda root: [path.unlink() for path in root.rglob("*.*")],
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_incomplete_or_other_version_is_rebuilt(tmp_path: Path, damage: Any) -> None:
    root = tmp_path / "digits"
    ensure_digits(root, FEW)
    expected = read_bytes(root)
    damage(root)
    assert ensure_digits(root, FEW) is True
    assert read_bytes(root) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("holiday.jpg", "mine"),
        ("train/IMG_0001.jpg", "mine"),
        ("annotations/instances_train.json", '{"info": {"description": "COCO 2017"}, "images": []}'),
        ("annotations/instances_train.json", '{"info": null}'),
        ("annotations/instances_val.json", "[]"),
        ("annotations/instances_val.json", "not JSON"),
    ],
)
def test_foreign_directory_is_refused(tmp_path: Path, name: str, text: str) -> None:
    root = tmp_path / "digits"
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)
    with pytest.raises(ValueError, match="digits generator did not write") as caught:
        ensure_digits(root, FEW)
    assert str(root) in str(caught.value) and "\n" not in str(caught.value)
    assert (root / name).read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
    with pytest.raises(ValueError, match="not a directory"):
        ensure_digits(root / name, FEW)


@pytest.mark.usefixtures("quick")
def test_interrupted_generation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: Path, image_rgb: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "write_jpeg", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ensure_digits(tmp_path / "digits", FEW)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("quick")
def test_killed_generation_is_swept_up_once_it_is_old(tmp_path: Path) -> None:
    old, young = tmp_path / ".digits.building-old", tmp_path / ".digits.building-young"
    for path in (old, young):  # a killed process cannot clean up; a living one must not be disturbed
        (path / "new").mkdir(parents=True)
    os.utime(old, (0, 0))
    assert ensure_digits(tmp_path / "digits", FEW) is True
    assert sorted(path.name for path in tmp_path.iterdir()) == [young.name, "digits"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("late", [False, True])
def test_two_processes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    root = tmp_path / "digits"
    write, check = digits.write_dataset, digits.is_complete
    calls = []

    def write_twice(target: Path, counts: dict[str, int]) -> None:
        write(target, counts)
        if not late:
            write(root, counts)

    def check_twice(target: Path, counts: dict[str, int]) -> bool:
        complete = check(target, counts)
        calls.append(complete)
        if late and len(calls) == 2:  # the other process finishes between our last look and our rename
            monkeypatch.setattr(Path, "exists", lambda path: False)
            write(root, counts)
        return complete

    monkeypatch.setattr(digits, "write_dataset", write_twice)
    monkeypatch.setattr(digits, "is_complete", check_twice)
    assert ensure_digits(root, FEW) is False
    assert check(root, FEW)
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


# What it needs


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(digits, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="install scikit-learn") as caught:
        ensure_digits(tmp_path / "digits", FEW)
    assert "\n" not in str(caught.value)


def test_import_does_not_need_the_packages_of_the_sources() -> None:
    code = "import sys, detection.data.digits; print(sorted({'sklearn', 'skimage'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
