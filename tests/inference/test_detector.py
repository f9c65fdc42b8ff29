"""`from detection import load_detector`: any weights, any image, detect.py's own results; the notebook runs."""

import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
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


def test_grey_arrays_and_whatever_can_be_iterated(directory: Path, detector: Any) -> None:
    """Grey is what the red block looks like in the first channel; images are read as they are needed."""
    grey, read = np.ascontiguousarray(PICTURE[..., 0]), []

    def images() -> Iterator[Any]:
        for number in range(5):
            read.append(number)
            yield [grey, grey[..., None], Image.fromarray(grey), np.dstack([grey] * 3), directory / "photo.png"][number]

    one, two, pil, rgb, photo = load_detector(directory / "240224-211713_quickstart", batch_size=2)(images())
    assert read == list(range(5)) and one.image.shape == (128, 128, 3)
    for result in (one, two, pil):
        assert (result.boxes == rgb.boxes).all() and (result.scores == rgb.scores).all() and len(result) == len(rgb)
    assert_both_found(photo)
    assert len(detector(map(str, {directory / "photo.png"}))) == 1 and detector(iter(())) == []


def test_addresses(directory: Path, detector: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    (directory / "page.png").write_text("<html>")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(directory))) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert_both_found(detector(f"{address}/photo.png"))
        for found in detector([f"{address}/photo.png?size=1", PICTURE]):
            assert_both_found(found)
        for name in ("gone.png", "page.png"):
            with pytest.raises(DataReadError, match=name):
                detector(f"{address}/{name}")
        server.shutdown()


def test_some_of_the_detections(detector: Any) -> None:
    found = detector(PICTURE)
    first = found[0:1]
    assert (len(first), first.names, first[0], first.image is found.image) == (1, found.names[:1], found[0], True)
    assert first.to_coco(1) == found.to_coco(1)[:1] and first.draw().size == (128, 128)
    assert found[-1] == found[np.int64(1)] == list(found)[1] and list(found[::-1]) == list(found)[::-1]
    assert len(found[5:]) == 0
    with pytest.raises(IndexError):
        found[2]
    for index in ([0], 1.0, "0", found.scores > 0.5):
        with pytest.raises(TypeError):
            found[index]


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
    assert json.dumps(found.to_coco(np.int64(1), np.array([10, 20]))) == json.dumps(found.to_coco(1, [10, 20]))
    with pytest.raises(SettingsError, match="1 ids for 2 classes"):
        found.to_coco(1, [10])
    wrong_ids: list[Any] = [5, ["a", "b"], {0: 1, 1: 2}]
    for arguments in (("x",), (None,), *((1, ids) for ids in wrong_ids)):
        with pytest.raises(SettingsError, match=r"(image_id|category_ids): must be a"):
            found.to_coco(*arguments)
    assert repr(found) == "<2 detections in an image of 128 x 128 pixels>"


def truncated_picture() -> Image.Image:
    """A PIL image whose file ends too early, which is noticed when its pixels are needed."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()[: file.tell() // 2]))


@pytest.mark.parametrize(
    ("image", "error", "part"),
    [
        (np.zeros((4, 4, 3)), DataError, "RGB (H, W, 3) or grey (H, W), this is float64 (4, 4, 3)"),
        (np.zeros((4, 4, 4), np.uint8), DataError, "this is uint8 (4, 4, 4)"),
        (np.zeros((0, 4), np.uint8), DataError, "this is uint8 (0, 4)"),
        (np.zeros((2, 4, 4, 3), np.uint8), DataError, "several images go into a list"),
        (7, DataError, "not int"),
        (torch.zeros(3, 4, 4), DataError, "not Tensor"),
        (b"photo.png", DataError, "not bytes"),
        ({"a": PICTURE}, DataError, "not dict"),
        ((image for image in (PICTURE, None)), DataError, "image 1: an image is a path"),
        ([[PICTURE]], DataError, "image 0: an image is a path"),
        (Image.new("I;16", (4, 4)), DataError, "mode I;16"),
        (Image.new("RGB", (0, 4)), DataError, "without pixels"),
        (truncated_picture(), DataError, "cannot be decoded: "),
        ("gone.jpg", DataReadError, "gone.jpg"),
        ("a\0.jpg", DataReadError, "null byte"),
        ("rtsp://me:secret@127.0.0.1/a", DataReadError, "rtsp://127.0.0.1/a: a stream"),
        ("http://me:secret@[1/a.png", DataReadError, "the address: Invalid IPv6 URL"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_images_that_are_refused(detector: Any, image: Any, error: type[Exception], part: str) -> None:
    with pytest.raises(error) as raised:
        detector(image)
    line = str(raised.value)
    assert part in line and line.isprintable() and "secret" not in line


@pytest.mark.parametrize(
    ("arguments", "error", "part"),
    [
        ({"weights": "gone.pt"}, CheckpointError, "gone.pt does not exist"),
        ({"names": ["a", "b"]}, SettingsError, "belongs to Darknet weights"),
        ({"confidence_threshold": 2}, SettingsError, "visualization_threshold"),
        ({"confidence_threshold": "0.5"}, SettingsError, "confidence_threshold: must be a number, not '0.5'"),
        ({"confidence_threshold": True}, SettingsError, "confidence_threshold: must be a number, not True"),
        ({"confidence_threshold": float("nan")}, SettingsError, "visualization_threshold = nan"),
        ({"iou_threshold": [0.5]}, SettingsError, "iou_threshold: must be a number, not [0.5]"),
        ({"max_detections": torch.tensor(3)}, SettingsError, "max_detections: must be a number"),
        ({"max_detections": 2.5}, SettingsError, "max_detections = 2.5: should be a valid integer"),
        ({"batch_size": "8"}, SettingsError, "batch_size: must be a number, not '8'"),
        ({"weights": None}, SettingsError, "weights: must be a path, not NoneType"),
        ({"weights": ["best.pt"]}, SettingsError, "weights: must be a path, not list"),
        ({"cfg": 5}, SettingsError, "cfg: must be a path, not int"),
        ({"names": 5}, SettingsError, "names: must be a file"),
        ({"weights": "net.weights", "cfg": "net.cfg", "names": [1, 2]}, SettingsError, "names: must be a file"),
        ({"weights": "net.weights", "cfg": "net.cfg", "names": {"a"}}, SettingsError, "a list of the names"),
        ({"device": "abacus"}, SettingsError, "abacus"),
        ({"device": 0}, SettingsError, "run.device = 0: must be auto, cpu"),
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


def test_numbers_of_numpy_and_a_device_of_torch(directory: Path) -> None:
    changed = {"confidence_threshold": np.float32(0.25), "max_detections": np.int64(3), "device": torch.device("cpu")}
    settings = load_detector(directory / "240224-211713_quickstart", **changed).settings
    assert (settings.evaluation.visualization_threshold, settings.evaluation.max_detections) == (0.25, 3)
    assert settings.run.device == "cpu"


def test_scores_below_the_protocol(directory: Path) -> None:
    """Black cells have a score of sigmoid(-10)^2 = 2e-9, which the standard protocol drops."""
    found = load_detector(directory / "240224-211713_quickstart", confidence_threshold=1e-10)(PICTURE)
    assert len(found) > 2 and float(found.scores.min()) < 1e-6


def test_torch_hub(directory: Path) -> None:
    best = directory / "240224-211713_quickstart"
    assert_both_found(torch.hub.load(str(REPOSITORY), "load_detector", source="local", weights=best)(PICTURE))


def test_the_notebook_runs(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells, in order, in a checkout with the hand-made network and pictures where `make train` leaves its own.

    Jupyter starts a notebook in the folder that holds it.
    """
    shutil.copytree(directory / "240224-211713_quickstart", tmp_path / "logs" / "240224-211713_quickstart")
    (tmp_path / "data" / "digits" / "val").mkdir(parents=True)
    for number in range(2):
        shutil.copy(directory / "photo.png", tmp_path / "data" / "digits" / "val" / f"{number}.png")
    (tmp_path / "docs").mkdir()
    shutil.copy(REPOSITORY / "hubconf.py", tmp_path)
    monkeypatch.chdir(tmp_path / "docs")
    monkeypatch.syspath_prepend(REPOSITORY)  # and so restored, whatever the cells add
    cells = json.loads((REPOSITORY / "docs" / "example.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert_both_found(names["detections"])
    assert os.path.getsize(tmp_path / "detections.png") > 0
