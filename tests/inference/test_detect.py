"""detect.py end to end on images, videos and cameras, with the network of tests/support/block_network.py."""

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import detect
from detection.data.image_file import UniqueNames
from detection.drawing.boxes import class_color
from detection.errors import DataError, OutputError, SettingsError
from detection.inference.sources import find_sources, read_ahead
from detection.inference.video import VideoWriter
from tests.support.block_network import GREEN, RED, block_image, cell_box
from tests.support.detect_runs import Run, boxes_of, rows_of, save, save_video, walk


@pytest.fixture
def run(run_detect: Run) -> Run:
    return run_detect


def video_facts(path: Path) -> tuple[int, float, tuple[int, int]]:
    """Read a video: number of readable frames, rate and (width, height)."""
    capture = cv2.VideoCapture(str(path))
    count = 0
    while capture.read()[0]:
        count += 1
    size = (int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT)))
    return count, capture.get(cv2.CAP_PROP_FPS), size


# Images


def test_boxes_pictures_and_yolo_lines(run: Run, tmp_path: Path) -> None:
    """Red at column 1, row 2 and green at column 3, row 0, in an image of twice the network's side."""
    picture = save(tmp_path / "photo.png", block_image((1, 2, RED), (3, 0, GREEN), side=128))
    result = run(picture, "--txt", "--format", "png")
    assert result.returncode == 0 and "2 boxes" in result.stdout and "0 left out" in result.stdout, result.stderr
    (row,) = rows_of(tmp_path / "out")
    assert (row["file"], row["picture"], row["width"], row["height"]) == (str(picture), "photo.png", 128, 128)
    found = sorted(boxes_of(row))
    assert [name for name, _ in found] == ["green", "red"]
    np.testing.assert_allclose([box for _, box in found], [cell_box(3, 0, 128), cell_box(1, 2, 128)], atol=0.01)
    for detection in row["detections"]:
        assert detection["score"] > 0.99 and ["red", "green"][detection["label"]] == detection["class"]
    # centre of column 1, row 2: 1.5 / 4 and 2.5 / 4 of the sides
    lines = (tmp_path / "out" / "labels" / "photo.txt").read_text().splitlines()
    assert sorted(lines) == ["0 0.375000 0.625000 0.250000 0.250000", "1 0.875000 0.125000 0.250000 0.250000"]
    assert (tmp_path / "out" / "classes.txt").read_text() == "red\ngreen\n"
    drawn = cv2.imread(str(tmp_path / "out" / "photo.png"))[..., ::-1]
    assert drawn.shape == (128, 128, 3)
    assert tuple(drawn[95, 50]) == class_color(0)  # the lower border of the red box lies inside it


def test_scores_in_txt_jpeg_pictures_and_images_without_boxes(run: Run, tmp_path: Path) -> None:
    save(tmp_path / "photos" / "a.png", block_image((0, 0, GREEN)))
    save(tmp_path / "photos" / "empty.png", block_image())
    result = run("photos", "--txt-scores")
    assert result.returncode == 0, result.stderr
    out = tmp_path / "out"
    (line,) = (out / "labels" / "a.txt").read_text().splitlines()
    numbers = [float(word) for word in line.split()]
    # logits 20 * 1 - 10 of objectness and class: score = sigmoid(10)^2
    assert numbers == [1, 0.125, 0.125, 0.25, 0.25, pytest.approx((1 / (1 + np.exp(-10))) ** 2, abs=1e-6)]
    assert (out / "labels" / "empty.txt").read_text() == ""
    assert [boxes_of(row) for row in rows_of(out)][1] == []
    assert (out / "a.jpg").read_bytes()[:2] == b"\xff\xd8" and (out / "empty.jpg").exists()


def test_folders_keep_their_structure_and_nothing_is_overwritten(run: Run, tmp_path: Path) -> None:
    """Four images named a: two formats in one folder, one in a subfolder, one in another folder."""
    blocks = {"one/a.png": (0, 0), "one/a.bmp": (1, 0), "one/deep/a.png": (2, 0), "two/A.png": (3, 0)}
    for name, (column, row) in blocks.items():
        save(tmp_path / name, block_image((column, row, RED)))
    (tmp_path / "one" / ".a.png").write_bytes(b"macOS leaves such files")
    (tmp_path / "one" / "notes.md").write_text("no image")
    result = run("one", "two", "--recursive", "--txt", "--format", "png")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    out = tmp_path / "out"
    places = {}
    for row in rows_of(out):
        ((_, box),) = boxes_of(row)
        assert box == pytest.approx(cell_box(*blocks[Path(row["file"]).as_posix()]), abs=0.01)
        places[row["file"]] = row["picture"]
    stems = {"one/a.bmp": "a", "one/a.png": "a_2", "one/deep/a.png": "deep/a", "two/A.png": "A_3"}
    assert places == {file: f"{stem}.png" for file, stem in stems.items()}
    for directory, suffix in ((out, "png"), (out / "labels", "txt")):
        written = {path.relative_to(directory).as_posix() for path in directory.rglob(f"*.{suffix}")}
        assert written == {f"{stem}.{suffix}" for stem in stems.values()}


def test_only_the_wanted_classes_and_scores(run: Run, tmp_path: Path) -> None:
    image = block_image((1, 1, RED), (3, 3, GREEN), (3, 1, (128, 0, 0)))  # half red: logit 20 * 128 / 255 - 10 = 0.04
    save(tmp_path / "photo.png", image)
    weak = (1 / (1 + np.exp(-(20 * 128 / 255 - 10)))) ** 2  # 0.26
    for number, (words, expected) in enumerate({
        (): ["green", "red"],
        ("--confidence", "0.2"): ["green", "red", "red"],
        ("evaluation.visualization_threshold=0.2",): ["green", "red", "red"],
        ("--confidence", str(weak + 0.001)): ["green", "red"],
        ("--confidence", "0.2", "--class", "red"): ["red", "red"],
        ("--class", "red", "--class", "green"): ["green", "red"],
    }.items()):  # fmt: skip
        result = run("photo.png", *words, "--no-pictures", out=str(number))
        assert result.returncode == 0, result.stderr
        (row,) = rows_of(tmp_path / str(number))
        assert sorted(found["class"] for found in row["detections"]) == expected, words
        assert [path.name for path in (tmp_path / str(number)).iterdir()] == ["detections.json"]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_order_and_boxes_do_not_depend_on_the_batch(run: Run, tmp_path: Path, batch_size: int) -> None:
    for number in range(7):
        save(tmp_path / "photos" / f"{number}.png", walk()[number])
    (tmp_path / "photos" / "2.png").write_bytes(b"damaged")
    (tmp_path / "photos" / "5.png").unlink()
    (tmp_path / "photos" / "5.png").symlink_to("nowhere")
    result = run("photos", f"evaluation.batch_size={batch_size}")
    assert result.returncode == 0 and "2 left out" in result.stdout
    errors = [line for line in result.stderr.splitlines() if line.startswith("left out")]
    assert len(errors) == 2 and "2.png" in errors[0] and "5.png" in errors[1]
    rows = rows_of(tmp_path / "out")
    assert [Path(row["file"]).stem for row in rows] == ["0", "1", "3", "4", "6"]
    for row in rows:
        number = int(Path(row["file"]).stem)
        ((name, box),) = boxes_of(row)
        assert name == ("red" if number % 2 else "green")
        assert box == pytest.approx(cell_box(number % 4, number // 4), abs=0.01)


def test_patterns_lists_and_words_that_look_like_settings(run: Run, tmp_path: Path) -> None:
    for name in ("photos/x1.png", "photos/x2.png", "photos/y1.png", "run.device=gpu"):
        save(tmp_path / f"{name.removesuffix('.png')}.png", block_image((1, 1, RED)))
    os.rename(tmp_path / "run.device=gpu.png", tmp_path / "run.device=gpu")
    (tmp_path / "list.txt").write_text("photos/y1.png\n\nphotos/x1.png\n")
    result = run("photos/x*.png", "list.txt", "run.device=gpu", "evaluation.visualization_threshold=0.4")
    assert result.returncode == 0 and "0.4" in result.stdout, result.stderr
    files = [row["file"] for row in rows_of(tmp_path / "out")]
    assert files == ["photos/x1.png", "photos/x2.png", "photos/y1.png", "photos/x1.png", "run.device=gpu"]


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        ([], 2, "nothing to look at"),
        (["nowhere.jpg"], 2, "nowhere.jpg: does not exist"),
        (["no*.jpg"], 2, "no image or video matches"),
        (["folder"], 2, "--recursive"),
        (["empty.txt"], 2, "empty list"),
        (["x" * 300], 2, "too long"),
        (["photo.png", "evaluation.nonsense=1"], 2, "evaluation.nonsense"),
        (["photo.png", "--class", "blue"], 2, "red, green"),
        (["photo.png", "--confidence", "2"], 2, "between 0 and 1"),
        (["photo.png", "--confidence", "0.0001"], 2, "evaluation.confidence_threshold = 0.001"),
        (["photo.png", "--stride", "0"], 2, "--stride 0"),
        (["photo.png", "--show", "--no-pictures"], 2, "contradict"),
        (["broken.jpg", "broken.mp4"], 3, "no image could be read"),
        (["7"], 3, "no image could be read"),
    ],
)
def test_refused_in_one_line(run: Run, tmp_path: Path, words: list[str], code: int, part: str) -> None:
    save(tmp_path / "photo.png", block_image())
    save(tmp_path / "folder" / "deep" / "photo.png", block_image())
    (tmp_path / "empty.txt").write_text("\n")
    for name in ("broken.jpg", "broken.mp4"):
        (tmp_path / name).write_bytes(b"\xff\xd8 nothing")
    result = run(*words)
    assert result.returncode == code and part in result.stderr.strip().splitlines()[-1], result.stderr
    assert all(line.startswith("left out: ") for line in result.stderr.strip().splitlines()[:-1])


@pytest.mark.parametrize("name", ["photo.png", "clip.mp4"])
def test_a_full_disk_is_one_line(run: Run, tmp_path: Path, full_disk, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    if name == "photo.png":
        save(tmp_path / name, noise)
    else:
        save_video(tmp_path / name, [noise, *walk()])
    with full_disk(1000):
        result = run(name)
    assert result.returncode == 6 and "out" in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr


def test_a_video_with_missing_frames_is_an_error(tmp_path: Path, full_disk) -> None:
    """OpenCV itself reports nothing."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), np.uint8)
    writer = VideoWriter(tmp_path / "x.mp4", 5)
    with full_disk(1000), pytest.raises(OutputError, match="0 of 20 frames"), writer:
        for image in noise:
            writer.write(image)


def test_reading_ahead_is_bounded_and_in_order() -> None:
    started: list[int] = []

    def work(item: int) -> int:
        started.append(item)
        time.sleep(0.02 if item == 0 else 0)  # the first is ready last
        return item * item

    with ThreadPoolExecutor(4) as pool:
        results = read_ahead(pool, work, range(20), 3)
        assert next(results) == (0, 0) and len(started) <= 4
        assert list(results) == [(number, number**2) for number in range(1, 20)]


def test_names_are_numbered_until_they_are_free() -> None:
    names = UniqueNames()
    assert [names.take(name) for name in ("a", "a_2", "A", "a", "b")] == ["a", "a_2", "A_3", "a_4", "b"]


def test_numbers_are_cameras_unless_there_is_such_a_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "1" / "photo.png", block_image())
    sources = find_sources(["0", "1"])
    assert [(source.kind, str(source.file)) for source in sources] == [("camera", "0"), ("image", "1/photo.png")]
    with pytest.raises(DataError, match=r"no image or video in this folder$"):
        (tmp_path / "2").mkdir()
        find_sources(["2"])


# Videos


@pytest.mark.parametrize(("stride", "side"), [(1, 64), (2, 64), (3, 128)])
def test_every_frame_of_a_video_has_its_boxes(run: Run, tmp_path: Path, stride: int, side: int) -> None:
    save_video(tmp_path / "clip.mp4", walk(side))
    result = run("clip.mp4", "--stride", str(stride), "--txt", "evaluation.batch_size=3")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    rows = rows_of(tmp_path / "out")
    assert [row["frame"] for row in rows] == list(range(0, 8, stride))
    for row in rows:
        number = row["frame"]
        ((name, box),) = boxes_of(row)
        assert name == ("red" if number % 2 else "green") and row["file"] == "clip.mp4"
        assert box == pytest.approx(cell_box(number % 4, number // 4, side), abs=0.05)
        assert row["seconds"] == pytest.approx(number / 12.5, abs=1e-6) and row["width"] == side
        (line,) = (tmp_path / "out" / "labels" / "clip" / f"frame_{number:06d}.txt").read_text().splitlines()
        assert line.split()[0] == ("0" if number % 2 else "1")
    assert f" on {len(rows)} video frames," in result.stdout
    count, rate, size = video_facts(tmp_path / "out" / "clip.mp4")
    assert (count, size) == (len(rows), (side, side))
    assert rate == pytest.approx(12.5 / stride, abs=0.001)  # OpenCV writes three digits


def test_odd_sides_get_a_line_more(run: Run, tmp_path: Path) -> None:
    """Write with Motion JPEG, a codec that allows odd sides."""
    codec = cv2.CAP_OPENCV_MJPEG, cv2.VideoWriter.fourcc(*"MJPG")
    writer = cv2.VideoWriter(str(tmp_path / "clip.avi"), *codec, 5, (65, 63))
    for image in walk():
        writer.write(cv2.copyMakeBorder(image, 0, 0, 0, 1, cv2.BORDER_REPLICATE)[:63, :, ::-1].copy())
    writer.release()
    assert run("clip.avi").returncode == 0
    rows = rows_of(tmp_path / "out")
    assert {(row["width"], row["height"]) for row in rows} == {(65, 63)}
    assert video_facts(tmp_path / "out" / "clip.mp4") == (8, 5, (66, 64))


def test_of_a_truncated_video_is_kept_what_can_be_read(run: Run, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)  # frames of some size
    save_video(tmp_path / "whole.avi", [noise] * 40, "MJPG", 10)
    content = (tmp_path / "whole.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(content[: len(content) // 2])
    readable, _, _ = video_facts(tmp_path / "cut.avi")
    assert 10 < readable < 30
    result = run("cut.avi", "whole.avi")
    assert result.returncode == 0 and f"cut.avi: {readable} of the 40 frames" in result.stderr
    assert "whole.avi" not in result.stderr
    assert len(rows_of(tmp_path / "out")) == readable + 40
    assert video_facts(tmp_path / "out" / "cut.mp4")[0] == readable


def test_ctrl_c_finishes_the_video(run: Run, tmp_path: Path, monkeypatch) -> None:
    """The signal arrives during the second batch of two frames; two of four sources are not processed."""
    save_video(tmp_path / "clip.mp4", walk())
    for name in ("before.png", "after.png"):
        save(tmp_path / name, block_image((1, 1, RED)))
    real, calls = detect.Finder.find, []

    def find(self: detect.Finder, samples: Any, **options: Any) -> Any:
        calls.append(len(samples))
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, samples, **options)

    monkeypatch.setattr(detect.Finder, "find", find)
    result = run("before.png", "clip.mp4", "after.png", "clip.mp4", "evaluation.batch_size=2")
    assert result.returncode == 130 and calls == [1, 2, 2]
    assert "SIGINT received" in result.stderr and "promises" not in result.stderr
    assert "5 boxes" in result.stdout and "1 images and 4 video frames" in result.stdout
    assert [row.get("frame") for row in rows_of(tmp_path / "out")] == [None, 0, 1, 2, 3]
    assert video_facts(tmp_path / "out" / "clip.mp4")[0] == 4


class Camera:
    """Replaces cv2.VideoCapture(0): endless frames, one every `seconds`, and a signal while frame `last` is read."""

    seconds, last = 0.0, 4

    def __init__(self, real: Any, clock: list[float]) -> None:
        self.real, self.clock, self.frames = real, clock, 0

    def __call__(self, source: int | str, *rest: int) -> Any:
        return self if source == 0 else self.real(source, *rest)

    def isOpened(self) -> bool:
        return True

    def get(self, which: int) -> float:
        return {cv2.CAP_PROP_FPS: 10.0, cv2.CAP_PROP_FRAME_COUNT: -1.0}[which]

    def grab(self) -> bool:
        self.clock[0] += self.seconds
        self.frames += 1
        if self.frames - 1 == self.last:
            os.kill(os.getpid(), signal.SIGINT)
        return True

    def retrieve(self) -> tuple[bool, np.ndarray]:
        return True, np.ascontiguousarray(walk(frames=16)[self.frames - 1][..., ::-1])

    def release(self) -> None:
        pass


@pytest.fixture
def camera(monkeypatch) -> Camera:
    clock = [100.0]
    stand_in = Camera(cv2.VideoCapture, clock)
    monkeypatch.setattr(cv2, "VideoCapture", stand_in)
    monkeypatch.setattr("detection.inference.video.time.perf_counter", lambda: clock[0])
    return stand_in


def test_a_camera_runs_until_ctrl_c_in_its_own_time(run: Run, tmp_path: Path, camera: Camera) -> None:
    """One frame every 0.4 s from a camera of 10 per second: frames at 0.4, ..., 2.0 s become 4 * 5 + 1 = 21 frames."""
    camera.seconds = 0.4
    result = run("0")
    assert result.returncode == 130 and "Ctrl-C stops" in result.stderr, result.stderr
    rows = rows_of(tmp_path / "out")
    assert [row["frame"] for row in rows] == [0, 1, 2, 3, 4] and {row["file"] for row in rows} == {"camera 0"}
    assert [row["seconds"] for row in rows] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert [boxes_of(row)[0][1] for row in rows] == [pytest.approx(cell_box(k % 4, k // 4), abs=0.01) for k in range(5)]
    assert video_facts(tmp_path / "out" / "camera_0.mp4") == (21, 10, (64, 64))


# Windows


class Screen:
    """Replaces detection.drawing.window.Window; q is pressed at the third image."""

    shown: list[np.ndarray] = []
    open = True

    def __init__(self, title: str) -> None:
        Screen.shown = []

    def show(self, image: np.ndarray, title: str = "") -> str:
        Screen.shown.append(image)
        return "q" if len(Screen.shown) == 3 else ""

    def close(self) -> None:
        pass


def test_q_stops_a_shown_video_and_its_files_are_complete(run: Run, tmp_path: Path, monkeypatch) -> None:
    save_video(tmp_path / "clip.mp4", walk())
    monkeypatch.setattr(detect, "Window", Screen)
    result = run("clip.mp4", "--show")
    assert result.returncode == 0 and len(rows_of(tmp_path / "out")) == 3
    assert video_facts(tmp_path / "out" / "clip.mp4")[0] == 3
    assert len(Screen.shown) == 3 and Screen.shown[0].shape == (64, 64, 3)
    assert tuple(Screen.shown[0][0, 0]) == class_color(1)  # the border of the green class's box, drawn


def test_images_are_shown_page_by_page_after_they_are_written(run: Run, tmp_path: Path, monkeypatch) -> None:
    for number in range(3):
        save(tmp_path / "photos" / f"{number}.png", walk()[number])
    pages = []

    def browse(title: str, count: int, page: Callable[[int], np.ndarray]) -> None:
        pages.extend(page(number) for number in range(count))

    monkeypatch.setattr(detect, "browse", browse)
    assert run("photos", "--show", "--format", "png").returncode == 0
    written = [cv2.imread(str(tmp_path / "out" / f"{number}.png"))[..., ::-1] for number in range(3)]
    assert len(pages) == 3 and all(np.array_equal(*pair) for pair in zip(pages, written, strict=True))


@pytest.mark.parametrize("name", ["clip.mp4", "photo.png"])
def test_without_a_display_everything_is_written_first(run: Run, tmp_path: Path, monkeypatch, name: str) -> None:
    def no_display(*_: Any) -> None:
        raise SettingsError("--show: there is no display here")

    monkeypatch.setattr(detect, "Window", no_display)
    monkeypatch.setattr(detect, "browse", no_display)
    save_video(tmp_path / "clip.mp4", walk())
    save(tmp_path / "photo.png", block_image())
    result = run(name, "--show")
    assert result.returncode == 2 and result.stderr.strip() == "--show: there is no display here"
    written = name.replace(".png", ".jpg")
    assert rows_of(tmp_path / "out") and (tmp_path / "out" / written).exists()
