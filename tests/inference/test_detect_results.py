"""detect.py: crops, COCO result files, tiles and variants, and every kind of image file."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

import validation
from detection.data.image_file import IMAGE_SUFFIXES
from detection.drawing.files import safe_name
from tests.support.block_network import GREEN, RED, block_image, cell_box
from tests.support.detect_runs import Run, boxes_of, rows_of, save, save_video, walk

HALF_RED = (128, 0, 0)  # score 0.26: below what is shown, above evaluation.confidence_threshold


def write_annotations(path: Path, images: dict[str, int], categories: dict[int, str]) -> Path:
    content = {
        "images": [{"id": number, "file_name": name, "width": 64, "height": 64} for name, number in images.items()],
        "categories": [{"id": number, "name": name} for number, name in categories.items()],
    }
    path.write_text(json.dumps(content))
    return path


# Crops


def test_crops_are_the_pixels_of_the_boxes(run_detect: Run, tmp_path: Path) -> None:
    image = block_image((1, 2, RED), (3, 0, GREEN), side=128)
    save(tmp_path / "photos" / "deep" / "a.png", image)
    save_video(tmp_path / "photos" / "clip.mp4", walk(frames=2))
    result = run_detect("photos", "--recursive", "--crops", "--format", "png")
    assert result.returncode == 0, result.stderr
    crops = tmp_path / "out" / "crops"
    names = {path.relative_to(crops).as_posix() for path in crops.rglob("*.png")}
    # Of equal scores either may come first.
    first, second = ("red", "green") if (crops / "red" / "deep" / "a_0.png").exists() else ("green", "red")
    of_image = {f"{first}/deep/a_0.png", f"{second}/deep/a_1.png"}
    assert names == of_image | {"green/clip/frame_000000_0.png", "red/clip/frame_000001_0.png"}
    for name, (column, row) in {"red": (1, 2), "green": (3, 0)}.items():
        (path,) = (crops / name / "deep").iterdir()
        x1, y1, x2, y2 = map(int, cell_box(column, row, 128))
        assert np.array_equal(cv2.imread(str(path))[..., ::-1], image[y1:y2, x1:x2])


def test_crops_are_jpeg_and_need_no_pictures(run_detect: Run, tmp_path: Path) -> None:
    save(tmp_path / "a.png", block_image((1, 2, RED)))
    assert run_detect("a.png", "--crops", "--no-pictures").returncode == 0
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {"detections.json", "crops/red/a_0.jpg"}
    assert (tmp_path / "out" / "crops" / "red" / "a_0.jpg").read_bytes()[:2] == b"\xff\xd8"


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("traffic light", "traffic light"),
        ("../../etc/passwd", "_.._etc_passwd"),
        ("a/b\\c:d*e", "a_b_c_d_e"),
        ("..", "_"),
        ("", "_"),
        ("con", "_con"),
        ("Aux.txt", "_Aux.txt"),
        ("赤血球", "赤血球"),
        ("x" * 300, "x" * 80),
        ("tab\there\x00", "tab_here_"),
    ],
)
def test_any_class_name_becomes_a_folder(name: str, safe: str) -> None:
    assert safe_name(name) == safe


# COCO result files


def test_coco_results_have_the_ids_of_the_annotations(run_detect: Run, tmp_path: Path) -> None:
    """By file name with its folder, by the last part alone where it is unique; weak detections too."""
    for place, block in {"one/a.png": RED, "two/a.png": GREEN, "two/b.png": HALF_RED, "two/extra.png": RED}.items():
        save(tmp_path / place, block_image((1, 1, block)))
    write_annotations(tmp_path / "a.json", {"one/a.png": 7, "two/a.png": 5, "val\\b.png": 9}, {4: "green", 90: "red"})
    words = ["--coco-results", "results.json", "--annotations", "a.json"]
    result = run_detect("one", "two", "one/a.png", *words)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [(row["image_id"], row["category_id"]) for row in rows] == [(7, 90), (5, 4), (9, 90)]
    assert all(row["bbox"] == pytest.approx([16, 16, 16, 16], abs=0.01) for row in rows)
    weak = (1 / (1 + np.exp(-(20 * 128 / 255 - 10)))) ** 2
    assert [row["score"] for row in rows] == pytest.approx([1, 1, weak], abs=1e-3)
    lines = result.stderr.splitlines()
    assert len(lines) == 2 and lines[0].startswith("two/extra.png: not in the result file: no image of a.json")
    assert lines[1] == "one/a.png: not in the result file: image id 7 is in the result file already"
    assert "3 boxes with a score above 0.001 on 3 images: results.json" in result.stdout
    assert [len(row["detections"]) for row in rows_of(tmp_path / "out")] == [1, 1, 0, 1, 1]  # shown from 0.5


def test_classes_that_the_annotations_lack_are_left_out(run_detect: Run, tmp_path: Path) -> None:
    save(tmp_path / "a.png", block_image((1, 1, RED), (2, 2, GREEN)))
    write_annotations(tmp_path / "a.json", {"a.png": 1}, {3: "green"})
    words = ["--coco-results", "results.json", "--annotations"]
    result = run_detect("a.png", *words, "a.json")
    assert result.returncode == 0 and "leaves out classes that a.json lacks: red" in result.stdout
    assert [row["category_id"] for row in json.loads((tmp_path / "results.json").read_text())] == [3]
    write_annotations(tmp_path / "b.json", {"a.png": 1}, {3: "blue"})
    for file, part in (("b.json", "none of the detector's classes"), ("c.json", "cannot be read")):
        result = run_detect("a.png", *words, file, out="refused")
        assert result.returncode == 2 and part in result.stderr and result.stderr.count("\n") == 1
    result = run_detect("a.png", "--coco-results", "none/x.json", "--annotations", "a.json", out="refused")
    assert result.returncode == 6 and "none/x.json: cannot be written" in result.stderr
    assert not (tmp_path / "refused").exists()
    result = run_detect("a.png", "--coco-results", "x.json")
    assert result.returncode == 2 and "--coco-results and --annotations belong together" in result.stderr


@pytest.mark.parametrize("words", [[], ["--tiles", "64"], ["--tta"]])
def test_both_scripts_write_the_same_detections(
    run_detect: Run,
    run_script: Callable[..., Any],
    block_weights: list[str | Path],
    drawn_dataset: Path,
    tmp_path: Path,
    words: list[str],
) -> None:
    """detect.py on the folder, and validation.py --no-ground-truth on the annotation file without its annotations."""
    content = json.loads((drawn_dataset / "annotations" / "instances_val.json").read_text())
    expected_ids = {(entry["id"], category["id"]) for entry in content["images"] for category in content["categories"]}
    del content["annotations"]
    (tmp_path / "images.json").write_text(json.dumps(content))
    data = [f"data.root={drawn_dataset}", f"data.validation_annotations={tmp_path / 'images.json'}"]
    data += [f"data.validation_images={drawn_dataset / 'val'}", "data.num_workers=0", "run.precision=off"]
    result = run_script(
        validation.main, *block_weights, "--no-ground-truth", *words, *data, "--output", tmp_path / "test"
    )
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    assert [path.name for path in (tmp_path / "test").iterdir()] == ["detections.json"]
    results = ["--coco-results", "results.json", "--annotations", tmp_path / "images.json", "--no-pictures"]
    result = run_detect(drawn_dataset / "val", *words, *results)
    assert result.returncode == 0, result.stderr
    one, other = (
        {(row["image_id"], row["category_id"], round(row["score"], 5), *np.round(row["bbox"], 2)) for row in rows}
        for rows in (json.loads((tmp_path / name).read_text()) for name in ("test/detections.json", "results.json"))
    )
    assert one == other and len(one) > 3 and {row[:2] for row in one} <= expected_ids


# Tiles and variants


def test_tiles_find_what_the_whole_image_hides(run_detect: Run, tmp_path: Path) -> None:
    """A cell of 16 px in an image of 256: the network at 64 px skips it, a tile of 64 px does not."""
    image = np.zeros((256, 256, 3), np.uint8)
    image[90:106, 80:96] = RED  # of the tiles at 64 (64 - 0.2 * 64 = 51, so 4 + 1 tiles per side at 0, 48, ...)
    save(tmp_path / "large.png", image)
    assert run_detect("large.png").returncode == 0
    assert boxes_of(rows_of(tmp_path / "out")[0]) == []
    result = run_detect("large.png", "--tiles", "64", "--overlap", "16", "--crops", out="tiles")
    assert result.returncode == 0, result.stderr
    # tiles at 0, 48, 96, ...: the one at (48, 48) sees the corner (80, 96) of its cell (2, 3) red
    assert ("red", pytest.approx([80, 96, 96, 112], abs=0.01)) in boxes_of(rows_of(tmp_path / "tiles")[0])


def test_a_mirrored_image_gives_the_same_box(run_detect: Run, tmp_path: Path) -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[16:32, 16:32] = RED  # the cell's top left pixel is red, and so is that of the mirrored image
    save(tmp_path / "a.png", image)
    result = run_detect("a.png", "--tta", "--confidence", "0.3")
    assert result.returncode == 0, result.stderr
    assert ("red", pytest.approx([16, 16, 32, 32], abs=4)) in boxes_of(rows_of(tmp_path / "out")[0])


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--overlap", "0.2"], "--overlap 0.2: belongs to --tiles"),
        (["--tiles", "64", "--overlap", "40"], "--overlap 40: must be a share"),
        (["--tiles", "0"], "--tiles: must be a whole number from 1"),
    ],
)
def test_refused_in_one_line(run_detect: Run, tmp_path: Path, words: list[str], part: str) -> None:
    save(tmp_path / "a.png", block_image())
    result = run_detect("a.png", *words)
    assert result.returncode == 2 and part in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


# Image files

PILLOW_FORMAT = {".jfif": "JPEG", ".mpo": "MPO", ".j2k": "JPEG2000", ".pbm": "PPM", ".pgm": "PPM", ".gif": "GIF"}


def test_every_image_suffix_is_found_in_a_folder(run_detect: Run, tmp_path: Path) -> None:
    """Red at column 1, row 2; a file without colour has white there, which is red and green to the network."""
    (tmp_path / "photos").mkdir()
    image = block_image((1, 2, RED))
    for suffix in sorted(IMAGE_SUFFIXES):
        path = tmp_path / "photos" / f"{suffix[1:]}{suffix.upper()}"
        if suffix in PILLOW_FORMAT:
            mode = {".pbm": "1", ".pgm": "L"}.get(suffix)
            grey = image if mode is None else image.max(axis=2)
            buffer = io.BytesIO()
            Image.fromarray(grey).convert(mode or "RGB").save(buffer, PILLOW_FORMAT[suffix])
            path.write_bytes(buffer.getvalue())
        else:
            encoded, content = cv2.imencode(suffix, image[..., ::-1].copy())
            assert encoded, suffix
            path.write_bytes(content.tobytes())
    result = run_detect("photos", "--no-pictures")
    assert result.returncode == 0 and "0 left out" in result.stdout, result.stderr
    rows = {Path(row["file"]).suffix.lower(): boxes_of(row) for row in rows_of(tmp_path / "out")}
    assert set(rows) == IMAGE_SUFFIXES
    for suffix, found in rows.items():
        names = [name for name, _ in found]
        assert names == (["red", "green"] if suffix in (".pbm", ".pgm") else ["red"]), suffix
        assert found[0][1] == pytest.approx(cell_box(1, 2), abs=0.01), suffix
