"""visualization.py end to end: order of pages, statistics counted by hand, and the HTML report."""

import csv
import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import nn

import visualization
from detection.contract import Detector, Geometry
from detection.data.annotations import flatten_annotations, load_annotations
from detection.data.loaders import build_evaluation_loader
from detection.drawing.boxes import class_color, draw_boxes
from detection.evaluation.detections import Detections
from detection.evaluation.matching import IN_CROWD, NO_GROUND_TRUTH
from detection.evaluation.mistakes import count_mistakes
from detection.inference.weights import OpenedDetector
from detection.visualization.dataset_figures import draw_box_statistics
from detection.visualization.dataset_statistics import measure_dataset

Run = Callable[..., Any]


@pytest.fixture
def run(run_script, tmp_path: Path) -> Run:
    def started(*arguments: str | Path) -> Any:
        return run_script(visualization.main, "run.device=cpu", *arguments, "--output", tmp_path / "out")

    return started


@pytest.fixture
def no_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the statistics figures, which take most of the time."""
    monkeypatch.setattr(visualization, "write_statistics", lambda *_: None)


def pages_of(report: Path) -> list[list[int]]:
    """Read the image ids of each page from the captions of the report."""
    captions = re.findall(r"<figcaption>page \d+ of \d+: images (.*?)</figcaption>", report.read_text())
    return [[int(number) for number in re.findall(r"(\d+) \(", caption)] for caption in captions]


def content_of(sizes: list[tuple[int, int]], boxes: list[tuple[int, int, list[float], dict[str, Any]]]) -> dict:
    """Build COCO annotations; boxes are (image id, category id, bbox, further keys)."""
    return {
        "images": [{"id": n, "file_name": f"{n}.png", "width": w, "height": h} for n, (w, h) in enumerate(sizes)],
        "annotations": [
            {"id": n, "image_id": image, "category_id": category, "bbox": box, **more}
            for n, (image, category, box, more) in enumerate(boxes)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "eel"}],
    }


def test_statistics_by_hand() -> None:
    content = content_of(
        [(100, 50), (200, 200), (0, 0), (80, 80), (80, 80)],
        [
            (0, 1, [10, 10, 20, 10], {}),  # area 200: small; 4 % of the image; centre (20, 15) of 100 x 50
            (0, 1, [0, 0, 50, 50], {"area": 1024}),  # the file's area counts: on the limit, medium
            (0, 2, [50, 0, 50, 25], {"area": 9216}),  # large
            (1, 1, [0, 0, 200, 100], {"area": 9215}),  # medium; half of the image
            (2, 2, [0, 0, 30, 10], {}),  # small; the image's size is not stated
            (3, 2, [0, 0, 80, 80], {"iscrowd": 1}),
        ],
    )
    statistics = measure_dataset(flatten_annotations(content, "made up"))
    summary = statistics.summary()
    found = {name: tuple(row.values()) for name, row in summary["classes"].items()}
    assert list(summary["classes"]["cat"]) == ["boxes", "images", "crowd_regions"]
    assert found == {"cat": (3, 2, 0), "dog": (2, 2, 1), "eel": (0, 0, 0)}
    assert summary["sizes"] == {"small": 2, "medium": 2, "large": 1}
    counts = {"images": 5, "boxes": 5, "crowd_regions": 1, "images_without_boxes": 1, "images_without_stated_size": 1}
    assert summary.items() >= (counts | {"images_with_crowd_regions_only": 1}).items()
    assert summary["boxes_per_image"] == {"0": 2, "1": 2, "3": 1}
    assert sorted(statistics.relative_areas.tolist()) == pytest.approx([0.04, 0.25, 0.5, 0.5])
    assert sorted(statistics.centres.tolist()) == [[0.2, 0.3], [0.25, 0.5], [0.5, 0.25], [0.75, 0.25]]
    # (0.2, 0.3), (0.25, 0.5) and so on as (row, column) of tenths
    assert np.argwhere(summary["centres"]).tolist() == [[2, 5], [2, 7], [3, 2], [5, 2]]
    assert summary["percentiles"]["aspect"]["50"] == 2.0  # of 1, 2, 2, 2, 3


def test_no_box_at_all_is_no_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text(json.dumps(content_of([(10, 10)], [])))
    result = run(f"data.train_annotations={tmp_path / 'empty.json'}")
    assert result.returncode == 0 and "classes without any box: cat, dog, eel" in result.stdout
    assert "no images: statistics only" in result.stdout
    assert json.loads((tmp_path / "out" / "statistics.json").read_text())["percentiles"]["width"] is None


@pytest.mark.parametrize(
    "boxes",
    [[[0, 0, 0.3, 0.2], [0, 0, 0.3, 0.2]], [[0, 0, 0.01, 9], [0, 0, 9, 0.01]], [[0, 0, 10, 10]], [[0, 0, 1, 1]]],
)
def test_odd_boxes_can_be_drawn(boxes: list[list[float]], tmp_path: Path) -> None:
    content = content_of([(10, 10)], [(0, 1, box, {}) for box in boxes])
    draw_box_statistics(tmp_path / "figure.png", measure_dataset(flatten_annotations(content, "made up")))
    assert (tmp_path / "figure.png").exists()


def test_val2017_has_its_published_counts(run: Run, shared_data, tmp_path: Path) -> None:
    """Counts of the README beside the file, which come from another program."""
    result = run(f"data.root={shared_data('coco_val2017_boxes')}", "--split", "val")
    assert result.returncode == 0 and "statistics only" in result.stdout, result.stderr
    summary = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert (summary["images"], summary["boxes"], summary["images_without_boxes"]) == (5000, 36780, 48)
    assert summary["classes"]["person"]["boxes"] == 11004 and summary["classes"]["stop sign"]["boxes"] == 75
    report = tmp_path / "out" / "report.html"
    assert report.stat().st_size < 2e6 and "data:image/png" in report.read_text()
    assert not list((tmp_path / "out").glob("page*"))


def test_pages_follow_the_flags(run: Run, drawn_dataset: Path, tmp_path: Path, no_statistics: None) -> None:
    root, out = f"data.root={drawn_dataset}", tmp_path / "out"

    def shown(*arguments: str | int) -> tuple[list[str], list[list[int]]]:
        result = run(root, *arguments)
        assert result.returncode == 0, result.stderr
        found = [path.name for path in sorted(out.glob("page*"))], pages_of(out / "report.html")
        shutil.rmtree(out)
        return found

    pages = [[100, 101, 102, 103], [104, 105, 106, 107], [108]]
    assert shown("--pages", "all", "--per-page", 4) == ([f"page_000{number}.png" for number in (1, 2, 3)], pages)
    assert shown("--page", 2, "--per-page", 4) == (["page_0002.png"], pages[1:2])
    assert shown("--pages", "2-3", "--per-page", 4)[1] == pages[1:]
    assert shown("--images", 105, 101, 103)[1] == [[105, 101, 103]]
    content = json.loads((drawn_dataset / "annotations" / "instances_train.json").read_text())
    green = sorted({row["image_id"] for row in content["annotations"] if row["category_id"] == 7})
    assert shown("--class", "green")[1] == [green] and green
    shuffled, again, other = (shown("--random", f"run.seed={seed}")[1] for seed in (1, 1, 2))
    assert shuffled == again != other and sorted(shuffled[0]) == sorted(other[0]) == list(range(100, 109))
    words = ("data.train_annotations=annotations/instances_train.json", "data.validation_fraction=0.5")
    parts = [shown(*words, "--split", split)[1][0] for split in ("train", "val")]
    assert sorted(parts[0] + parts[1]) == list(range(100, 109)) and min(map(len, parts)) > 0


def test_box_lies_on_its_object(run: Run, drawn_dataset: Path, tmp_path: Path, no_statistics: None) -> None:
    """Image 101 alone on a page, 68 x 92 pixels enlarged to a height of 960."""
    run(f"data.root={drawn_dataset}", "--images", 101, "--per-page", 1)
    page = cv2.imread(str(tmp_path / "out" / "page_0001.png"))[:, :, ::-1]
    content = json.loads((drawn_dataset / "annotations" / "instances_train.json").read_text())
    (row,) = [row for row in content["annotations"] if row["image_id"] == 101]
    height, width = 960, round(68 * 960 / 92)
    top = page.shape[0] - 6 - height  # below the title
    assert page.shape[1] == width + 12
    x, y, w, h = (value * 960 / 92 for value in row["bbox"])
    below = page[round(top + y + h) - 1, round(6 + x + w / 2)]  # the lower border, where no name is
    right = page[round(top + y + h * 0.9), round(6 + x + w) - 1]
    color = list(class_color({3: 0, 7: 1}[row["category_id"]]))
    assert below.tolist() == right.tolist() == color


def test_report_is_safe_and_complete(run: Run, drawn_dataset: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(drawn_dataset, root)
    file = root / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    evil = '<script>alert("$x_{")</script>\n\x1b[31m'
    content["categories"][0]["name"] = evil
    content["images"][1]["file_name"] = "a' onload='x.png"
    (root / "train" / "1.png").rename(root / "train" / "a' onload='x.png")
    file.write_text(json.dumps(content))
    result = run(f"data.root={root}")
    assert result.returncode == 0 and "\x1b" not in result.stdout, result.stderr
    text = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in text and "onload='x" not in text and "&lt;script&gt;" in text
    assert re.findall(r'src="(?!data:image/)', text) == [] and "http" not in re.sub(r'src="[^"]*"', "", text)
    assert evil in unescape(text)
    assert evil in json.loads((tmp_path / "out" / "statistics.json").read_text())["classes"]


def damage(root: Path) -> None:
    """Image 103 cut short, image 105 gone, image 106 of another size than stated."""
    (root / "train" / "3.png").write_bytes((root / "train" / "3.png").read_bytes()[:40])
    (root / "train" / "5.png").unlink()
    cv2.imwrite(str(root / "train" / "6.png"), np.zeros((10, 10, 3), np.uint8))


def test_unreadable_images_are_named_and_left_out(
    run: Run, drawn_dataset: Path, tmp_path: Path, no_statistics: None
) -> None:
    root = tmp_path / "data"
    shutil.copytree(drawn_dataset, root)
    damage(root)
    result = run(f"data.root={root}", "--pages", "all", "--per-page", 1)
    text = result.stdout + (tmp_path / "out" / "report.html").read_text()
    assert result.returncode == 0 and "3 images cannot be read and were left out" in text
    for name, reason in (("3.png", "damaged"), ("5.png", "No such file"), ("6.png", "10 x 10 pixels")):
        assert any(name in line and reason in line for line in result.stdout.splitlines())
    shown = [ids for ids in pages_of(tmp_path / "out" / "report.html") if ids]
    assert shown == [[number] for number in (100, 101, 102, 104, 107, 108)]


def test_mistakes_by_hand() -> None:
    """Image 0: both found, one false of 0.6. Image 1: one of two missed. Image 2: false 0.9 and 0.3, one in crowd."""
    here, there = [0, 0, 9, 9], [50, 50, 9, 9]
    boxes: list[Any] = [(0, 1, here, {}), (0, 1, there, {}), (1, 1, here, {}), (1, 2, there, {}), (3, 1, here, {})]
    content = content_of([(100, 100)] * 4, [*boxes[:4], (2, 1, [0, 0, 60, 60], {"iscrowd": 1}), *boxes[4:]])
    annotations = flatten_annotations(content, "made up")
    matches = np.array([0, 1, NO_GROUND_TRUTH, 2, NO_GROUND_TRUTH, NO_GROUND_TRUTH, IN_CROWD, 5])
    images, scores = np.array([0, 0, 0, 1, 2, 2, 2, 3]), np.array([0.9, 0.8, 0.6, 0.7, 0.9, 0.3, 0.5, 0.99])
    found = Detections(images, np.zeros((8, 4)), scores, np.zeros(8, np.int64))
    mistakes = count_mistakes(annotations, found, matches)
    assert mistakes.gt_boxes.tolist() == [2, 2, 0, 1] and mistakes.found.tolist() == [2, 1, 0, 1]
    assert mistakes.missed.tolist() == [0, 1, 0, 0] and mistakes.false.tolist() == [1, 0, 2, 0]
    assert mistakes.in_crowd.tolist() == [0, 0, 1, 0] and mistakes.surest_false.tolist() == [0.6, 0, 0.9, 0]
    assert mistakes.worst_first().tolist() == [2, 0, 1, 3]  # 2 mistakes, then 1 with a false one of 0.6, 1, 0


class MadeUp(nn.Module):
    """Detector that returns given detections, image after image."""

    def __init__(self, answers: list[dict[str, torch.Tensor]]) -> None:
        super().__init__()
        self.answers = iter(answers)

    def forward(self, outputs: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        return [next(self.answers) for _ in outputs]


def test_worst_images_first(
    run: Run, drawn_dataset: Path, tmp_path: Path, default_settings, monkeypatch, no_statistics: None
) -> None:
    """Made up: every ground-truth box is found, but none of the three on image 107; on 104 (no box) a dog is seen."""
    root = tmp_path / "data"
    shutil.copytree(drawn_dataset, root)
    damage(root)
    words = f"data.root={root}", "data.num_workers=0", "evaluation.batch_size=2", "evaluation.image_size=96"
    settings, empty = default_settings(*words), Detector(nn.Identity(), None, nn.Identity(), Geometry(32))
    opened = OpenedDetector(empty, settings, ("red", "green"), 2, 0, 0, [])
    _, annotations, dataset = visualization.open_dataset(settings, "train", opened)
    assert dataset is not None
    answers = []
    for index, number in enumerate(annotations.image_ids.tolist()):
        if number in (103, 105, 106):  # not readable
            continue
        sample = dataset[index]
        boxes, labels, score = torch.tensor(sample.boxes), torch.tensor(sample.labels), 0.9
        if number == 104:
            boxes, labels, score = torch.tensor([[1.0, 1, 20, 20]]), torch.tensor([0]), 0.7
        if number == 107:  # below the threshold of 0.5
            score = 0.4
        answers.append({"boxes": boxes, "labels": labels, "scores": torch.full((len(boxes),), score)})
    detector = opened.detector.replace(postprocess=MadeUp(answers))
    monkeypatch.setattr(visualization, "open_command_line", lambda *_: dataclasses.replace(opened, detector=detector))
    result = run("--weights", "made-up.pt", "--split", "train", "--pages", "all", "--per-page", 2)
    assert result.returncode == 0, result.stderr
    # ground-truth boxes k % 4 of images 100, 101, 102, 104, 107, 108: 0, 1, 2, 0, 3, 0
    assert "6 ground-truth boxes: 3 found, 3 missed; 4 detections: 1 false" in result.stdout
    assert "worst first: most missed ground-truth boxes + false detections" in result.stdout
    with open(tmp_path / "out" / "worst_images.csv", encoding="utf-8") as file:
        rows = [[int(row[name]) for name in ("image_id", "missed", "false")] for row in csv.DictReader(file)]
    assert rows == [[107, 3, 0], [104, 0, 1], [100, 0, 0], [101, 0, 0], [102, 0, 0], [108, 0, 0]]
    assert pages_of(tmp_path / "out" / "report.html") == [[107, 104], [100, 101], [102, 108]]
    assert "3 images cannot be read" in result.stdout


def test_a_trained_detector_on_real_photographs(
    run: Run, shared_data, shared_weights, tmp_path: Path, no_statistics: None
) -> None:
    weights = shared_weights("yolo-fastest-1.1.weights")
    cfg, names = shared_weights("yolo-fastest-1.1.cfg"), shared_weights("coco.names")
    root = shared_data("coco_mini")
    result = run(
        "--weights", weights, "--cfg", cfg, "--names", names, f"data.root={root}", "data.num_workers=0",
        "evaluation.batch_size=8", "evaluation.image_size=160", "--per-page", 1,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    annotations = load_annotations(root / "annotations" / "instances_val.json")
    with open(tmp_path / "out" / "worst_images.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    gt_boxes = sum(int(row["gt_boxes"]) for row in rows)
    assert len(rows) == len(annotations) and gt_boxes == (~annotations.crowd).sum()
    assert all(int(row["gt_boxes"]) == int(row["found"]) + int(row["missed"]) for row in rows)
    mistakes = [int(row["missed"]) + int(row["false"]) for row in rows]
    assert mistakes == sorted(mistakes, reverse=True) and mistakes[0] > mistakes[-1]


def test_notes_stand_behind_names() -> None:
    image, boxes, labels = np.zeros((60, 200, 3), np.uint8), np.array([[5, 30, 40, 50]]), np.array([0])
    plain = draw_boxes(image, boxes, labels, ["cat"])
    assert (draw_boxes(image, boxes, labels, ["cat"], notes=[""]) == plain).all()
    noted = draw_boxes(image, boxes, labels, ["cat"], notes=["missed"])
    assert (noted == draw_boxes(image, boxes, labels, ["cat missed"])).all() and (noted != plain).any()


def test_loader_is_told_how_to_collate(drawn_dataset: Path) -> None:
    """`find_mistakes` changes the loader's collate function: it must be read when the loader runs."""
    loader = build_evaluation_loader(range(4), 2, 0, torch.device("cpu"))  # type: ignore[arg-type]
    loader.collate_fn = list
    assert list(loader) == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["--page", "0"], 2, "--page 0: there are pages 1 to 1"),
        (["--page", "2"], 2, "--page 2: there are pages 1 to 1"),
        (["--pages", "2-1"], 2, "--pages 2-1"),
        (["--pages", "some"], 2, "--pages some"),
        (["--per-page", "0"], 2, "--per-page 0"),
        (["--images", "5"], 2, "--images 5: no image has this id"),
        (["--images", "train.steps=5"], 2, "expected the ids"),
        (["--class", "blue"], 2, "the classes are red, green"),
        (["--class", "red", "--images", "100"], 2, "none of these images"),
        (["--names", "coco.names"], 2, "--weights, which is missing"),
        (["--weights", "gone.pt"], 7, "gone.pt"),
        (["--show"], 2, "--show: there is no display"),
        (["data.root=/nowhere"], 2, "/nowhere"),
        (["data.train_annotations=annotations"], 2, "annotations"),
        (["data.fake=true", "model.num_classes=2"], 2, "data.fake"),
        (["run.seed=x"], 2, "run.seed"),
    ],
)
def test_bad_input_is_one_line(
    run: Run, drawn_dataset: Path, arguments: list[str], code: int, part: str, no_statistics: None
) -> None:
    result = run(f"data.root={drawn_dataset}", *arguments)
    assert result.returncode == code and part in result.stderr, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_no_images_and_a_full_disk_are_one_line(run: Run, drawn_dataset: Path, tmp_path: Path, full_disk) -> None:
    with full_disk(5000):
        result = run(f"data.root={drawn_dataset}")
    assert result.returncode == 6 and "cannot be written" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    shutil.copytree(drawn_dataset / "annotations", tmp_path / "data" / "annotations")
    result = run(f"data.root={tmp_path / 'data'}", "--class", "red")
    assert result.returncode == 2 and "--class: there are no images" in result.stderr
