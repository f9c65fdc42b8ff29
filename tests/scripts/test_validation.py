"""validation.py: error analysis, the check by pycocotools, several thresholds, and comparison of detectors.

What the numbers of a single run must be is in test_weights.py; the network is the one made there.
"""

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import validation
from detection.data.annotations import flatten_annotations
from detection.data.build import keep_evenly
from detection.errors import SettingsError
from detection.evaluation import pycocotools_check
from detection.evaluation.coco_metric import score
from detection.evaluation.comparison import check_same_data
from detection.evaluation.pycocotools_check import check_with_pycocotools, estimate_seconds
from tests.support.darknet_files import CFG, NAMES, Files, Run, known_weights
from tests.support.detectors import datasets_of
from tests.support.evaluation_cases import annotate, coco_content, detect, ground_truth_as_detections

WEIGHTS = ("--weights", "net.weights", "--cfg", "net.cfg", "--names", "net.names")


def read_csv(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_everything_is_written(files: Files, run: Run) -> None:
    code, out, err = run(*WEIGHTS, "--output", "out", figures=True)
    assert (code, err) == (0, "")
    directory = files.root / "out"
    for name in ("validation", "precision_recall", "confidence_curves", "confusion_matrix", "size_and_aspect"):
        assert (directory / f"{name}.png").stat().st_size > 5000, name
    metrics = json.loads((directory / "metrics.json").read_text())
    # Two of three boxes of equal confidence are right: F1 = 2 * 2 / (3 + 2)
    assert metrics["best_f1"] == pytest.approx(
        {"confidence": 0.001, "f1": 0.8, "precision": 2 / 3, "recall": 1}, abs=1e-6
    )
    assert "highest mean F1 0.800 at confidence 0.001: precision 0.667, recall 1.000" in out
    assert metrics["deviations"] == [] and "deviates" not in out and "by position" not in out
    assert metrics["images"] == 3 and metrics["images_per_second"] > 0 and metrics["parameters"] > 0
    assert set(metrics["seconds"]) == {"load", "network", "loss", "nms", "metric", "analysis"}
    assert all(value >= 0 for value in metrics["seconds"].values()) and 0.05 < metrics["peak_memory_gib"] < 100
    # Boxes of 16 and 32 pixels
    assert {name: group["gt_boxes"] for name, group in metrics["sizes"].items() if group["gt_boxes"]} == {
        "16-32": 1,
        "32-64": 1,
    }
    assert metrics["aspects"]["3:4-4:3"]["gt_boxes"] == 2
    matrix = read_csv(directory / "confusion_matrix.csv")
    names = matrix[0][1:-1]
    row = {line[0]: dict(zip(matrix[0][1:], map(int, line[1:]), strict=True)) for line in matrix[1:]}
    assert row["motorcycle"]["motorcycle"] == 2 and row["no ground-truth box"]["motorcycle"] == 1
    assert sum(map(sum, (line.values() for line in row.values()))) == 3 and len(names) == 3
    classes = {line[0]: line[1:] for line in read_csv(directory / "classes.csv")}
    assert classes["motorcycle"] == ["2", "3", "1", "1", "0.666667", "1", "0.8"]
    assert classes["couch"] == ["0", "0", "", "", "", "", ""]
    curve = read_csv(directory / "precision_recall.csv")
    assert len(curve) == 102 and curve[0][:2] == ["recall", "mean"] and curve[-1][:2] == ["1", "1"]
    points = read_csv(directory / "confidence_curves.csv")
    assert len(points) == 1 + 4 * 1000 and points[1][0] == "mean"


def test_the_official_program_agrees_or_the_exit_code_is_1(
    files: Files, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A value that no longer exists is read as the default, with a notice.
    code, out, err = run(*WEIGHTS, "evaluation.backend=faster_coco_eval", "--output", "good")
    assert (code, err) == (0, "") and out.count("pycocotools gives the same twelve numbers") == 1
    assert "evaluation.backend=faster_coco_eval no longer exists and is read as arrays" in out
    check = json.loads((files.root / "good" / "metrics.json").read_text())["pycocotools"]
    assert check["agrees"] is True and check["differences"] == {} and check["seconds"] > 0

    def wrong(*arguments: Any) -> Any:
        scores = score(*arguments)
        return dataclasses.replace(scores, metrics=scores.metrics | {"AP75": 0.25, "APl": 0.5})

    monkeypatch.setattr(pycocotools_check, "score", wrong)
    code, out, err = run(*WEIGHTS, "--output", "bad")
    assert code == 1 and err.count("\n") == 1 and "pycocotools disagrees with arrays: AP75" in err
    metrics = json.loads((files.root / "bad" / "metrics.json").read_text())  # written all the same
    assert metrics["pycocotools"]["agrees"] is False
    assert metrics["pycocotools"]["differences"] == {"AP75": 0.25, "APl": 0.5}


def test_the_official_program_is_not_asked_where_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    annotations = annotate([(1, 1, [0.0, 0.0, 9.0, 9.0]), (2, 90, [0.0, 0.0, 9.0, 9.0])], images=2)
    detections = ground_truth_as_detections(annotations)
    # 2 images x 3 classes, 2 of these pairs occupied, 2 detections, 2 pairs of boxes
    assert estimate_seconds(annotations, detections) == pytest.approx(6 * 1.3e-5 + 2 * (1.5e-4 + 3e-5 + 7e-6))
    # only the best 100 detections of an image and class count
    many, most = (detect([(0, 0, [0.0, 0.0, 9.0, 9.0], 0.5)] * count) for count in (100, 1000))
    assert estimate_seconds(annotations, many) == estimate_seconds(annotations, most)
    metrics = score(annotations, detections, "arrays").metrics
    monkeypatch.setattr(pycocotools_check, "MAX_SECONDS", 0)
    check, line = check_with_pycocotools(annotations, detections, metrics, "arrays")
    assert check["agrees"] is None and "evaluation.backend=pycocotools" in line
    assert check_with_pycocotools(annotations, detections, metrics, "pycocotools")[0]["agrees"] is True


def test_deviations_are_named(files: Files, run: Run) -> None:
    words = ["--score", "objectness", "evaluation.max_images=2", "evaluation.iou_threshold=0.6"]
    (files.root / "val" / "3.png").unlink()  # images 1 and 2 of 3 are chosen; the other one is not read
    code, out, err = run(*WEIGHTS, *words, "evaluation.max_detections=7", "--output", "out")
    assert (code, err) == (0, "") and "2 boxes on 2 images" in out
    metrics = json.loads((files.root / "out" / "metrics.json").read_text())
    expected = [
        "scored by objectness alone",
        "NMS 0.6 instead of 0.45",
        "7 boxes per class and image instead of 100",
        "at most 2 images",
    ]
    assert metrics["deviations"] == expected and f"deviates from the protocol: {', '.join(expected)}" in out
    rows = json.loads((files.root / "out" / "detections.json").read_text())
    assert [row["score"] for row in rows] == pytest.approx([1 / (1 + np.exp(-5))] * 2)  # objectness alone


@pytest.mark.parametrize("word", ["data.validation_fraction=null", "data.validation_fraction=0.5"])
def test_a_divided_file_is_named(files: Files, run: Run, word: str) -> None:
    """Unasked too: of a single set a share validates, so the numbers are not those of the whole file."""
    (files.root / "val").rename(files.root / "images")
    (files.root / "annotations" / "instances_val.json").rename(files.root / "annotations" / "instances_default.json")
    code, out, err = run(*WEIGHTS, word, "--output", "out")
    assert (code, err) == (0, "")
    metrics = json.loads((files.root / "out" / "metrics.json").read_text())
    (line,) = metrics["deviations"]
    share = float(line.removeprefix("a fraction of ").removesuffix(" of the images"))
    assert 0 < metrics["images"] < 3 and (share == 0.5 or "0.5" not in word)
    assert f"one set only: {share:g} of the images" in out or "0.5" in word
    assert f"deviates from the protocol: {line}" in out


def test_images_are_spread_evenly(default_settings: Any) -> None:
    settings = default_settings("data.fake=true", "model.num_classes=3")
    whole, part = (datasets_of(settings, 64, 64, 0, 3, most)[1] for most in (None, 5))
    assert len(whole) == 64 and len(part) == 5
    assert part.annotations.image_ids.tolist() == [1, 13, 26, 39, 52]  # 64 / 5 = 12.8 apart
    for place, index in enumerate((0, 12, 25, 38, 51)):
        rows, kept = (
            slice(*data.annotations.first_box[number : number + 2]) for data, number in ((whole, index), (part, place))
        )
        assert np.array_equal(whole.annotations.boxes[rows], part.annotations.boxes[kept])
    keep_evenly(part, 100)
    assert len(part) == 5


def test_three_thresholds_in_one_pass_are_three_runs(
    shared_weights: Any, shared_data: Any, run_script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [
        "--weights", shared_weights("yolo-fastest-1.1.weights"), "--cfg", shared_weights("yolo-fastest-1.1.cfg"),
        "--names", shared_weights("coco.names"), f"data.root={shared_data('coco_mini')}", "data.num_workers=0",
        "evaluation.batch_size=4", "evaluation.max_images=6", "run.device=cpu", "run.precision=off",
        "evaluation.visualize_images=0",
    ]  # fmt: skip
    thresholds = ["0.01", "0.001", "0.0001"]
    result = run_script(validation.main, *arguments, "--output", "all", "--confidence", *thresholds)
    assert (result.returncode, result.stderr) == (0, "")
    together = json.loads((tmp_path / "all" / "metrics.json").read_text())["thresholds"]
    assert [row["confidence"] for row in together] == [0.01, 0.001, 0.0001]
    assert 0 < together[0]["boxes"] < together[1]["boxes"] < together[2]["boxes"]
    for word, row in zip(thresholds, together, strict=True):
        alone = run_script(validation.main, *arguments, "--output", word, f"evaluation.confidence_threshold={word}")
        assert (alone.returncode, alone.stderr) == (0, "")
        metrics = json.loads((tmp_path / word / "metrics.json").read_text())
        for name, value in row.items():
            assert name == "confidence" or metrics[name] == value, name
        table = alone.stdout[alone.stdout.index(" Average Precision") : alone.stdout.index(" class ")]
        assert f"Confidence Threshold: {word}\nFound Boxes: {row['boxes']}\n{table}" in result.stdout


def test_detectors_side_by_side(files: Files, run: Run) -> None:
    files("blind.cfg", CFG)
    files("blind.weights", known_weights(label=2))  # finds a couch where the motorcycles are
    files("coco.names", NAMES)
    code, out, err = run("--compare", "net.weights", "blind.weights", "--names", "coco.names", "--output", "out")
    assert (code, err) == (0, "")
    assert (files.root / "out" / "comparison.png").stat().st_size > 5000
    first, second = json.loads((files.root / "out" / "comparison.json").read_text())
    assert (first["name"], second["name"]) == ("net", "blind")
    assert first["metrics"]["AP"] == pytest.approx(1) and second["metrics"]["AP"] == 0
    assert first["class_ap"]["motorcycle"] == pytest.approx(1) and second["class_ap"]["couch"] is None
    assert first["parameters"] == second["parameters"] > 0 and first["image_size"] == 32
    assert "motorcycle   1.000  -1.000" in out and "*1.000" in out
    rows = read_csv(files.root / "out" / "comparison.csv")
    assert rows[0][0] == "weights" and [row[0] for row in rows[1:]] == ["net", "blind"]


def test_detectors_on_different_data_are_not_compared() -> None:
    boxes = [(1, 1, [0.0, 0.0, 9.0, 9.0]), (2, 90, [0.0, 0.0, 9.0, 9.0])]
    first = annotate(boxes, images=2)
    check_same_data(first, annotate(boxes[::-1], images=2), Path("b.pt"))
    # a class without ground truth more or less, and another order, change no number
    content = coco_content(boxes, images=2, categories=(1, 90, 91))
    check_same_data(first, flatten_annotations(content, "test", ("name 91", "name 90", "name 1")), Path("b.pt"))
    for other in (annotate(boxes, images=3), annotate(boxes[:1], images=2), annotate([*boxes, boxes[0]], images=2)):
        with pytest.raises(SettingsError, match=r"b\.pt lead to other validation images or classes"):
            check_same_data(first, other, Path("b.pt"))


def test_files_of_the_same_name_are_told_apart_by_their_directory(files: Files, run: Run) -> None:
    for name in ("first", "second"):
        (files.root / name).mkdir()
        for suffix in ("weights", "cfg", "names"):
            files(f"{name}/best.{suffix}", (files.root / f"net.{suffix}").read_bytes())
    code, out, err = run("--compare", "first/best.weights", "second/best.weights", "--output", "out")
    assert (code, err) == (0, "") and " first/best " in out and " second/best " in out


def test_pictures_are_shown_after_they_were_written(
    files: Files, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    shown = []

    def browse(title: str, count: int, page: Any) -> None:
        shown.append((title, [page(number).shape for number in range(count)]))
        assert (files.root / "out" / "size_and_aspect.png").is_file()

    monkeypatch.setattr(validation, "browse", browse)
    assert run(*WEIGHTS, "--output", "out", "--show", figures=True)[0] == 0
    ((title, shapes),) = shown
    assert title == "validation_net" and len(shapes) == 5 and all(len(shape) == 3 for shape in shapes)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "give one of --weights FILE, --compare"),
        ([*WEIGHTS, "--compare", "net.weights", "net.cfg"], "give one of --weights FILE, --compare"),
        (["--compare", "net.weights"], "at least two"),
        (["--compare", "net.weights", "./net.weights"], "occurs twice"),
        (["--compare", "net.weights", "net.cfg", "--cfg", "net.cfg"], "--cfg belongs to --weights"),
        (["--compare", "net.weights", "net.cfg", "--confidence", "0.1"], "--confidence belongs to --weights"),
        (["--compare", "a.pt", "b.pt", "--names", "net.names"], "--names belongs to Darknet weights"),
        ([*WEIGHTS, "--confidence", "1"], "--confidence 1: must lie between 0 and 1"),
        ([*WEIGHTS, "--confidence", "0.1", "0"], "--confidence 0: must lie between 0 and 1"),
        ([*WEIGHTS, "--confidence", "nan"], "--confidence nan: must lie between 0 and 1"),
        ([*WEIGHTS, "--confidence", "low"], "--confidence low: is not a number"),
        ([*WEIGHTS, "--confidence", "0.1", "1e-1"], "--confidence 1e-1: occurs twice"),
        ([*WEIGHTS, "--confidence", "0.1", "evaluation.confidence_threshold=0.2"], "contradict"),
        ([*WEIGHTS, "evaluation.max_images=0"], "evaluation.max_images"),
        ([*WEIGHTS, "yolo.score=class"], "yolo.score"),
        ([*WEIGHTS, "--tiles", "64", "--overlap", "0.9"], "--overlap 0.9: must be a share"),
        ([*WEIGHTS, "--no-ground-truth", "--confidence", "0.1"], "--no-ground-truth scores nothing"),
        (["--compare", "a.pt", "b.pt", "--no-ground-truth"], "--no-ground-truth scores nothing"),
        ([*WEIGHTS, "--no-ground-truth", "--show"], "--no-ground-truth scores nothing"),
        ([*WEIGHTS, "--tta", "--confidence", "0.1", "0.2"], "--confidence takes one value with --tiles and --tta"),
    ],
)
def test_refused_in_one_line(files: Files, run: Run, arguments: list[str], word: str) -> None:
    code, _, err = run(*arguments)
    assert code == 2 and err.count("\n") == 1 and word in err, err
    assert not (files.root / "logs").exists()


def test_data_without_ground_truth_is_refused(files: Files, run: Run) -> None:
    path = files.root / "annotations" / "instances_val.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    code, _, err = run(*WEIGHTS)
    assert code == 2 and err.count("\n") == 1 and "no ground-truth box: none of the 3 validation images" in err


def test_classes_taken_by_position_are_named(files: Files, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --names label 1, which is the motorcycle of net.names, is read as the second id, 5: an airplane."""
    monkeypatch.setattr(validation, "draw_evaluation", lambda *arguments: {})
    assumed = "the weights name no classes: taken by position, in the order of "
    code, out, err = run(*WEIGHTS[:4], "--output", "out")
    assert (code, err) == (0, "")
    assert out.count(f"{assumed}ascending category id: motorcycle, airplane, couch (--names)") == 1
    rows = json.loads((files.root / "out" / "detections.json").read_text())
    assert {row["category_id"] for row in rows} == {5}
    code, out, _ = run(*WEIGHTS[:4], "data.class_names=[couch,motorcycle,airplane]", "--output", "own")
    assert code == 0 and f"{assumed}data.class_names: couch, motorcycle, airplane (--names)" in out
    code, _, err = run(*WEIGHTS[:4], "data.class_names=[couch,airplane]", "--output", "fewer")
    assert code == 2 and "the network has 3 classes, the data 2; name the classes with --names" in err


def test_a_long_list_of_classes_is_shortened(files: Files, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "draw_evaluation", lambda *arguments: {})
    path = files.root / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    content["categories"] = [{"id": 4 + number, "name": f"c{number}"} for number in range(12)]
    path.write_text(json.dumps(content))
    files("net.cfg", CFG.replace("filters=8", "filters=17").replace("classes=3", "classes=12"))
    files("net.weights", known_weights(num_classes=12))
    code, out, err = run(*WEIGHTS[:4], "--output", "out")
    assert (code, err) == (0, "") and "category id: c0, c1, c2, c3, c4, c5, c6, ..., c11 (--names)" in out


def test_no_ground_truth_gives_the_server_its_file(files: Files, run: Run) -> None:
    """As image_info_test-dev2017.json: no list of annotations; ids that are not the labels; a class that is missing."""
    path = files.root / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    run(*WEIGHTS, "--output", "scored")
    expected = json.loads((files.root / "scored" / "detections.json").read_text())
    images = {"images": content["images"], "categories": content["categories"], "info": {}}
    (files.root / "annotations" / "image_info.json").write_text(json.dumps(images))
    words = ["data.validation_annotations=annotations/image_info.json", "data.validation_images=val"]
    code, out, err = run(*WEIGHTS, "--no-ground-truth", *words, "--output", "test")
    assert (code, err) == (0, "") and "3 boxes on 3 images" in out and "Average Precision" not in out
    rows = json.loads((files.root / "test" / "detections.json").read_text())
    assert rows == expected and [(row["image_id"], row["category_id"]) for row in rows] == [(1, 4), (2, 4), (3, 4)]
    assert [entry.name for entry in (files.root / "test").iterdir()] == ["detections.json"]
    code, _, err = run(*WEIGHTS, *words)
    assert code == 2 and "has no list 'annotations'" in err
    images["categories"] = content["categories"][1:]  # without the motorcycle
    path.write_text(json.dumps(images))
    code, out, err = run(*WEIGHTS, "--no-ground-truth", "--output", "fewer")
    assert (code, err) == (0, "") and "has no such category: motorbike" in out and "0 boxes on 3 images" in out
    assert json.loads((files.root / "fewer" / "detections.json").read_text()) == []


@pytest.mark.parametrize("words", [["--tiles", "64"], ["--tta"], ["--tiles", "32", "--overlap", "0", "--tta"]])
def test_several_looks_give_the_same_boxes_and_are_named(
    files: Files, run: Run, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network finds the centre of its input whatever it shows, so in an image of one tile nothing may change."""
    monkeypatch.setattr(validation, "draw_evaluation", lambda *arguments: {})
    code, out, err = run(*WEIGHTS, *words, "evaluation.max_images=1", "--output", "out")
    assert (code, err) == (0, "")
    metrics = json.loads((files.root / "out" / "metrics.json").read_text())
    assert metrics["AP"] == pytest.approx(1) and metrics["losses"] == {}
    named = [text for text in metrics["deviations"] if "px" in text]
    assert len(named) == sum(word in ("--tiles", "--tta") for word in words) and all(text in out for text in named)


@pytest.mark.parametrize("config", ["yolov3_d53_320_273e_coco.py", "more.yaml"])
def test_the_call_of_mmdetection(files: Files, run: Run, config: str) -> None:
    files("more.yaml", "evaluation: {max_images: 2}\n")
    words = [word for word in WEIGHTS if word not in ("--weights", "net.weights")]
    code, out, err = run(config, "net.weights", "--eval", "bbox", *words)
    assert (code, err) == (0, "")
    assert (", 2 images;" in out) == (config == "more.yaml")  # not a speed of 2 images/s
    assert ("is not read" in out) == config.endswith(".py")


@pytest.mark.parametrize("words", [["net.weights"], ["a.txt", "net.weights"], ["a.py", "b.py", "net.weights"]])
def test_an_incomplete_call_of_mmdetection(run: Run, words: list[str]) -> None:
    code, _, err = run(*words, "--eval", "bbox")
    assert code == 2 and err.startswith("--eval bbox") and len(err.splitlines()) == 1
