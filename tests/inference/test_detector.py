"""`from detection import load_detector`: any weights, any image, detect.py's own results; the notebook runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import detect
import export
from detection import load_detector
from detection.checkpoints import save_checkpoint
from detection.errors import CheckpointError, DataError, DataReadError, SettingsError
from tests.support.block_network import GREEN, RED, block_image, build_block_network, cell_box, write_block_network
from tests.support.paths import REPOSITORY

PICTURE = block_image((1, 2, RED), (3, 0, GREEN), side=128)
SCORE = (1 / (1 + np.exp(-10))) ** 2  # logits 20 * 1 - 10 of objectness and class


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Darknet files, photo.png, and a run directory with best.pt of the same network; category ids 3 and 7."""
    from detection.config.command_line import DEFAULTS
    from detection.config.loading import load_settings

    root = write_block_network(tmp_path_factory.mktemp("net"))
    cv2.imwrite(str(root / "photo.png"), PICTURE[..., ::-1])
    words = ["model.backbone=darknet_cfg", f"model.cfg={root / 'net.cfg'}", "evaluation.image_size=64"]
    settings, _ = load_settings(DEFAULTS, words=[*words, "run.precision=off", "train.batch_size=4"])
    content = {
        "step": 1, "settings": settings.model_dump(mode="json"), "average": None,
        "categories": {"names": ["red", "green"], "ids": [3, 7]}, "model": build_block_network().state_dict(),
    }  # fmt: skip
    (root / "240224-211713_quickstart").mkdir()
    save_checkpoint(root / "240224-211713_quickstart" / "best.pt", content)
    return root


@pytest.fixture(scope="module")
def detector(directory: Path) -> Any:
    return load_detector(directory / "240224-211713_quickstart", device="cpu")


def assert_both_found(found: Any, *, names: tuple[str, str] = ("red", "green")) -> None:
    """The red block at column 1, row 2 and the green one at column 3, row 0 of an image of 128 x 128."""
    assert len(found) == 2
    objects = {name: (box, score) for box, score, _, name in found}
    for name, place in zip(names, ((1, 2), (3, 0)), strict=True):
        box, score = objects[name]
        assert box == pytest.approx(cell_box(*place, 128), abs=0.01) and score == pytest.approx(SCORE, abs=1e-5)


def test_importing_the_package_imports_no_torch() -> None:
    program = "import sys, detection; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True, timeout=60)
    with pytest.raises(ImportError):
        from detection import load_nothing  # type: ignore[attr-defined]  # noqa: F401


def test_every_kind_of_weights(directory: Path, detector: Any, run_script: Any) -> None:
    assert_both_found(detector(directory / "photo.png"))
    files = [directory / name for name in ("net.weights", "net.cfg", "net.names")]
    assert_both_found(load_detector(*files)(PICTURE))
    assert_both_found(load_detector(str(files[0]), str(files[1]), ["apple", "leaf"])(PICTURE), names=("apple", "leaf"))
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    best = directory / "240224-211713_quickstart" / "best.pt"
    exported = run_script(export.main, "--weights", best, "--output", directory / "onnx", cwd=directory)
    assert exported.returncode == 0, exported.stderr
    assert_both_found(load_detector(next((directory / "onnx").glob("*.onnx")))(PICTURE))


def test_every_kind_of_image(directory: Path, detector: Any) -> None:
    """PIL images are not turned by EXIF, files are; transparent pixels lie on grey; a list is computed in batches."""
    turned = Image.fromarray(np.rot90(PICTURE).copy())
    exif = turned.getexif()
    exif[0x0112] = 6  # to be shown turned clockwise by 90 degrees
    turned.save(directory / "turned.png", exif=exif)
    transparent = Image.fromarray(np.dstack([PICTURE, np.full((128, 128), 255, np.uint8)]))
    palette = Image.fromarray(PICTURE).convert("P", palette=Image.Palette.ADAPTIVE)
    pictures: list[Any] = [
        *(directory / "photo.png", str(directory / "photo.png"), directory / "turned.png"),
        *(PICTURE, Image.fromarray(PICTURE), transparent, palette, np.asfortranarray(PICTURE)),
    ]
    results = load_detector(directory / "240224-211713_quickstart", batch_size=3)(pictures)
    assert len(results) == len(pictures)
    for result in results:
        assert_both_found(result)
    assert len(detector(Image.fromarray(np.rot90(PICTURE).copy()))) == 2
    assert detector([]) == []
    empty = detector(np.zeros((30, 50, 3), np.uint8))
    assert (len(empty), empty.boxes.shape, empty.names, empty.to_coco(1)) == (0, (0, 4), [], [])


def test_results_are_those_of_detect(directory: Path, detector: Any, run_script: Any, tmp_path: Path) -> None:
    """On noise with many boxes of every score: the same numbers, as far as the file rounds them."""
    generator = np.random.default_rng(0)
    for number, size in enumerate([(90, 64), (64, 100), (128, 128)]):
        noise = generator.integers(0, 256, (*size, 3), np.uint8)
        cv2.imwrite(str(tmp_path / f"{number}.png"), noise)
    best = directory / "240224-211713_quickstart"
    words = ["--confidence", "0.01", "--no-pictures", "evaluation.iou_threshold=0.3", "evaluation.max_detections=2"]
    done = run_script(detect.main, "--weights", best, tmp_path, *words, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "detections.json").read_text())
    mine = load_detector(best, confidence_threshold=0.01, iou_threshold=0.3, max_detections=2)
    results = mine([row["file"] for row in rows])
    assert sum(map(len, results)) > 5
    for row, result in zip(rows, results, strict=True):
        assert [one["class"] for one in row["detections"]] == result.names
        assert [one["score"] for one in row["detections"]] == [round(float(score), 6) for score in result.scores]
        assert [one["box"] for one in row["detections"]] == [
            [round(x, 3) for x in box] for box in result.boxes.tolist()
        ]
        assert max((result.names.count(name) for name in mine.names), default=0) <= 2


def test_drawing_and_coco_rows(directory: Path, detector: Any, tmp_path: Path) -> None:
    found = detector(PICTURE)
    drawn = found.draw()
    assert isinstance(drawn, Image.Image) and drawn.size == (128, 128)
    assert (np.asarray(drawn) != PICTURE).any() and (found.image == PICTURE).all()
    assert (np.asarray(Image.open(found.save(tmp_path / "deep" / "x.png"))) == np.asarray(drawn)).all()
    assert found.save(str(tmp_path / "x.JPG")).read_bytes()[:2] == b"\xff\xd8"
    with pytest.raises(SettingsError, match=r"x\.gif: pictures are written as"):
        found.save(tmp_path / "x.gif")
    rows = {row["category_id"]: row for row in found.to_coco(42)}
    assert rows[3]["bbox"] == pytest.approx([32, 64, 32, 32], abs=0.01)  # x, y, width, height of column 1, row 2
    assert rows[7]["bbox"] == pytest.approx([96, 0, 32, 32], abs=0.01) and rows[7]["image_id"] == 42
    assert json.loads(json.dumps(list(rows.values())))
    assert {row["category_id"] for row in found.to_coco(1, [10, 20])} == {10, 20}
    with pytest.raises(SettingsError, match="1 ids for 2 classes"):
        found.to_coco(1, [10])
    assert repr(found) == "<2 detections in an image of 128 x 128 pixels>"


@pytest.mark.parametrize(
    ("image", "error", "part"),
    [
        (np.zeros((4, 4, 3)), DataError, "RGB uint8 (H, W, 3), this is float64 (4, 4, 3)"),
        (np.zeros((4, 4), np.uint8), DataError, "this is uint8 (4, 4)"),
        (np.zeros((2, 4, 4, 3), np.uint8), DataError, "several images go into a list"),
        (7, DataError, "not int"),
        (Image.new("I;16", (4, 4)), DataError, "mode I;16"),
        ("gone.jpg", DataReadError, "gone.jpg"),
    ],
)
def test_images_that_are_refused(detector: Any, image: Any, error: type[Exception], part: str) -> None:
    with pytest.raises(error) as raised:
        detector(image)
    assert part in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "error", "part"),
    [
        ({"weights": "gone.pt"}, CheckpointError, "gone.pt does not exist"),
        ({"names": ["a", "b"]}, SettingsError, "belongs to Darknet weights"),
        ({"confidence_threshold": 2}, SettingsError, "visualization_threshold"),
        ({"device": "abacus"}, SettingsError, "abacus"),
        ({"weights": "net.weights", "cfg": "net.cfg", "names": ["a"]}, SettingsError, "names: has 1 names"),
        ({"weights": "net.weights", "cfg": "net.cfg", "names": ["a", "a"]}, SettingsError, "'a' occurs twice"),
    ],
    ids=str,
)
def test_arguments_that_are_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], error: type[Exception], part: str
) -> None:
    monkeypatch.chdir(directory)
    with pytest.raises(error) as raised:
        load_detector(**{"weights": "240224-211713_quickstart", **arguments})
    assert part in str(raised.value) and "\n" not in str(raised.value)


def test_scores_below_the_protocol(directory: Path) -> None:
    """Black cells have a score of sigmoid(-10)^2 = 2e-9, which the standard protocol drops."""
    found = load_detector(directory / "240224-211713_quickstart", confidence_threshold=1e-10)(PICTURE)
    assert len(found) > 2 and float(found.scores.min()) < 1e-6


def test_torch_hub(directory: Path) -> None:
    best = directory / "240224-211713_quickstart"
    assert_both_found(torch.hub.load(str(REPOSITORY), "load_detector", source="local", weights=best)(PICTURE))


def test_the_notebook_runs(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells, in order, on the hand-made network and a picture where `make train` leaves its own."""
    shutil.copytree(directory / "240224-211713_quickstart", tmp_path / "logs" / "240224-211713_quickstart")
    (tmp_path / "data" / "digits" / "val").mkdir(parents=True)
    for number in range(2):
        shutil.copy(directory / "photo.png", tmp_path / "data" / "digits" / "val" / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    cells = json.loads((REPOSITORY / "docs" / "example.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert_both_found(names["detections"])
    assert os.path.getsize("detections.png") > 0
