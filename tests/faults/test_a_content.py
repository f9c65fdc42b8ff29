"""A: what an annotation file may hold. tests/data/test_coco.py, test_evaluation.py and test_losses.py have the rest."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from detection.data.coco import CocoDataset
from detection.errors import DataError
from detection.evaluation.coco_metric import score
from detection.evaluation.detections import Detections, write_detections
from detection.evaluation.evaluate import InferenceResult, compute_metrics
from detection.models import build_detector
from detection.models.yolo.darknet_loss import DarknetLoss
from tests.support.detectors import datasets_of
from tests.support.evaluation_cases import ground_truth_as_detections
from tests.support.fault_runs import NETWORK

SIDE = 64
CONTENT: dict[str, Any] = {
    "images": [{"id": number, "file_name": f"{number}.png", "width": SIDE, "height": SIDE} for number in (1, 2, 3)],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 20]},
        {"id": 2, "image_id": 2, "category_id": 5, "bbox": [10, 20, 30, 30]},
        {"id": 3, "image_id": 2, "category_id": 90, "bbox": [40, 2, 12, 9]},
    ],
    "categories": [{"id": 1, "name": "one"}, {"id": 5, "name": "five"}, {"id": 90, "name": "ninety"}],
}


def write_dataset(root: Path, train: dict[str, Any], val: dict[str, Any] | None = None) -> Path:
    (root / "annotations").mkdir(parents=True)
    for split, content in (("train", train), ("val", CONTENT if val is None else val)):
        (root / split).mkdir()
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        for image in content["images"]:
            pixels = np.random.default_rng(image["id"]).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            cv2.imwrite(str(root / split / image["file_name"]), pixels)
    return root


def changed(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(CONTENT) | changes


def with_boxes(*boxes: list[float]) -> dict[str, Any]:
    """The dataset with more boxes, numbered from 100, on image 3."""
    common = {"image_id": 3, "category_id": 1, "area": 1}
    rows = [{"id": number, "bbox": box, **common} for number, box in enumerate(boxes, 100)]
    return changed(annotations=[*CONTENT["annotations"], *rows])


@pytest.fixture
def read(tmp_path: Path, default_settings) -> Callable[..., tuple[CocoDataset, CocoDataset]]:
    """`read(training content, validation content, *words)`: both datasets."""

    def datasets(train: dict[str, Any], val: dict[str, Any] | None = None, *words: str) -> Any:
        settings = default_settings(f"data.root={write_dataset(tmp_path / 'data', train, val)}", *words)
        return datasets_of(settings, SIDE, SIDE, 0, None)

    return datasets


Read = Callable[..., tuple[CocoDataset, CocoDataset]]


def test_A01_boxes_without_a_side(read: Read, common: list[str], train, tmp_path: Path) -> None:
    content = with_boxes([5, 5, 10, 0], [20, 20, -3, 8], [8, 8, 9, 9])
    training_set, _ = read(content)
    assert 100 not in training_set.annotations.annotation_ids and 102 in training_set.annotations.annotation_ids
    assert training_set.annotations.counts.lines() == ["2 boxes without width or height (annotation ids [100, 101])"]
    words = [f"data.root={tmp_path / 'data'}", f"model.cfg={network(tmp_path, 3)}", "train.steps=4"]
    left_out = "left out: 2 boxes without width or height (annotation ids [100, 101])"
    train("run", *words).ends_with(0, left_out)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["train/loss"] > 0 and row["train/skipped_steps"] == 0 for row in rows if "train/loss" in row)
    train("strict", *words, "data.strict=true").ends_with(2, "annotation 100 is one of 2 boxes without width or height")


def network(tmp_path: Path, classes: int) -> Path:
    path = tmp_path / "network.cfg"
    path.write_text(NETWORK.replace("classes=2", f"classes={classes}").replace("=21", f"={3 * (5 + classes)}"))
    return path


def test_A02_A03_boxes_out_of_the_image(read: Read) -> None:
    content = with_boxes([-5, 10, 15, 10], [60, 60, 20, 20], [0, 0, 64 + 1e-7, 30], [65, 1, 5, 5], [1, -9, 5, 5])
    training_set, _ = read(content)
    annotations = training_set.annotations
    found = {int(i): box.tolist() for i, box in zip(annotations.annotation_ids, annotations.boxes, strict=True)}
    cut = {100: [0, 10, 10, 20], 101: [60, 60, 64, 64], 102: [0, 0, 64, 30]}
    assert {i: box for i, box in found.items() if i >= 100} == cut
    assert annotations.counts.dropped == {"boxes outside their image": 2}
    for epoch in range(30):  # the augmenter refuses what is a hair outside
        sample = training_set[2, epoch, SIDE]
        boxes = np.asarray(sample.boxes)
        assert (boxes >= 0).all() and (boxes <= SIDE).all() and (boxes[:, 2:] > boxes[:, :2]).all()


def test_A07_a_whole_batch_without_boxes(default_settings, tmp_path: Path) -> None:
    settings = default_settings("model.backbone=darknet_cfg", f"model.cfg={network(tmp_path, 2)}")
    torch.manual_seed(0)
    detector = build_detector(settings, 2)
    images = torch.randint(0, 256, (4, 3, SIDE, SIDE), dtype=torch.uint8)
    targets = {"boxes": torch.zeros(4, 32, 4), "labels": torch.full((4, 32), -1)}
    losses = detector.criterion(detector.model.train()(images), targets)
    assert all(value.isfinite() for value in losses.values()), losses
    assert losses["loss_objectness"] > 0 and losses["loss_box"] == 0 == losses["loss_class"]
    sum(losses.values()).backward()
    for name, parameter in detector.model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_A08_a_crowd_region_is_neither_object_nor_background() -> None:
    # 4 x 4 cells of 32 px, anchor 10 px: the predictions of cells (0..1, 0..1) lie inside the crowd region.
    criterion = DarknetLoss([[(10, 10)]], [32], ignore_threshold=0.7)
    outputs = [torch.zeros(1, 1, 4, 4, 7, requires_grad=True)]
    losses = criterion(outputs, {"boxes": torch.tensor([[[0.0, 0, 64, 64]]]), "labels": torch.tensor([[-2]])})
    sum(losses.values()).backward()
    gradient = outputs[0].grad[0, 0]
    assert not gradient[:2, :2].any() and not gradient[..., :4].any() and not gradient[..., 5:].any()
    inside = torch.zeros(4, 4, dtype=torch.bool)
    inside[:2, :2] = True
    assert (gradient[..., 4][~inside] > 0).all()


def test_A08_a_crowd_region_is_no_miss(read: Read) -> None:
    content = with_boxes([1, 1, 60, 60])
    content["annotations"][-1] |= {"iscrowd": 1, "area": 3600}
    annotations = read(CONTENT, content)[1].annotations
    found = ground_truth_as_detections(annotations).take(~annotations.crowd)
    assert score(annotations, found).metrics["AP"] == pytest.approx(1)


def test_A09_category_ids_come_back(read: Read, tmp_path: Path) -> None:
    training_set, validation_set = read(CONTENT)
    assert training_set.annotations.labels.tolist() == [0, 1, 2]
    assert training_set.annotations.categories.ids == (1, 5, 90)
    found = ground_truth_as_detections(validation_set.annotations)
    assert score(validation_set.annotations, found).metrics["AP"] == pytest.approx(1)
    write_detections(tmp_path / "found.json", validation_set.annotations, found)
    assert [row["category_id"] for row in json.loads((tmp_path / "found.json").read_text())] == [1, 5, 90]


def test_A10_validation_knows_a_category_that_training_does_not(read: Read) -> None:
    content = changed(categories=[*CONTENT["categories"], {"id": 91, "name": "more"}])
    with pytest.raises(DataError, match="more") as raised:
        read(CONTENT, content)
    assert raised.value.exit_code == 2


def test_A10_the_same_names_under_other_ids(read: Read) -> None:
    order = {1: 90, 5: 1, 90: 5}
    content = changed(
        categories=[{"id": order[entry["id"]], "name": entry["name"]} for entry in CONTENT["categories"]],
        annotations=[row | {"category_id": order[row["category_id"]]} for row in CONTENT["annotations"]],
    )
    training_set, validation_set = read(CONTENT, content)
    assert validation_set.annotations.labels.tolist() == training_set.annotations.labels.tolist()
    found = ground_truth_as_detections(validation_set.annotations)
    assert score(validation_set.annotations, found).metrics["AP"] == pytest.approx(1)


def test_A11_a_class_without_any_box(train, read: Read, tmp_path: Path) -> None:
    content = changed(annotations=CONTENT["annotations"][:2])
    training_set, _ = read(content, content)
    scores = score(training_set.annotations, ground_truth_as_detections(training_set.annotations))
    assert scores.metrics["AP"] == pytest.approx(1) and scores.class_ap["ninety"] == (None, None, 0)
    run = train("run", f"data.root={tmp_path / 'data'}", f"model.cfg={network(tmp_path, 3)}", "train.steps=1")
    run.ends_with(0)
    (line,) = [line for line in run.out.splitlines() if "categories without boxes" in line]
    assert line.startswith("warning") and "ninety" in line


@pytest.mark.parametrize("ids", [(0, 1, 2), (7, 7, 7), (0, 0, 0)])
def test_A12_annotation_ids_of_nought_and_duplicates(read: Read, ids: tuple[int, ...]) -> None:
    rows = [row | {"id": number} for row, number in zip(CONTENT["annotations"], ids, strict=True)]
    annotations = read(CONTENT, changed(annotations=rows))[1].annotations
    scores = score(annotations, ground_truth_as_detections(annotations))
    assert scores.metrics["AP"] == pytest.approx(1) == scores.metrics["AR100"]
    assert [gt_boxes for _, _, gt_boxes in scores.class_ap.values()] == [1, 1, 1]


@pytest.mark.parametrize("fraction", [0.0001, 0.9999])
def test_A14_a_share_that_leaves_no_image(read: Read, fraction: float) -> None:
    with pytest.raises(DataError, match=r"data\.validation_fraction leaves none of 3 images") as raised:
        words = ("data.train_annotations=annotations/instances_train.json", f"data.validation_fraction={fraction}")
        read(CONTENT, None, *words)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("changes", [{"images": [], "annotations": []}, {"annotations": []}])
def test_A14_nothing_to_train_on(read: Read, split: str, changes: dict[str, Any]) -> None:
    if split == "val" and "images" not in changes:
        assert len(read(CONTENT, changed(**changes))[1]) == 3  # a validation set without boxes is one
        return
    with pytest.raises(DataError, match=r"no images|no usable box"):
        read(*((changed(**changes), None) if split == "train" else (CONTENT, changed(**changes))))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_A16_detections_that_are_non_finite_score_nothing(read: Read, value: float) -> None:
    annotations = read(CONTENT)[1].annotations
    wrong = Detections(np.arange(3), np.tile([1.0, 1, 4, 4], (3, 1)), np.full(3, 0.5), np.arange(3))
    boxes = wrong.boxes.copy()
    boxes[:, 2] = value
    broken = Detections(wrong.image_index, boxes, wrong.scores, wrong.labels)
    honest, injected = (
        compute_metrics([InferenceResult(found, {}, {})], annotations, "pycocotools") for found in (wrong, broken)
    )
    assert injected.dropped == 3 and len(injected.detections) == 0 and honest.dropped == 0
    for name, number in injected.metrics.items():
        assert (number or 0) <= (honest.metrics[name] or 0), name


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[" * 100_000,
        json.dumps(CONTENT).encode()[:200],
        json.dumps(CONTENT).replace('"bbox": [5,', '"bbox": [NaN,').encode(),
        b"\x00" * 1000,
        b"not json",
    ],
    ids=["empty", "deep", "cut", "NaN", "zeros", "text"],
)
def test_A18_a_file_that_is_no_json(launch, common: list[str], tmp_path: Path, text: bytes) -> None:
    root = write_dataset(tmp_path / "data", CONTENT)
    path = root / "annotations" / "instances_train.json"
    path.write_bytes(text)
    launch("run", *common, f"data.root={root}", "--dry-run").ends_with(2, str(path))


def test_A19_a_link_out_of_the_image_directory(train, tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data", CONTENT)
    (root / "train" / "2.png").rename(tmp_path / "secret.png")
    (root / "train" / "2.png").symlink_to(tmp_path / "secret.png")
    run = train("run", f"data.root={root}", f"model.cfg={network(tmp_path, 3)}")
    assert run.wait() in (2, 3) and "2.png" in run.err, run.err


def test_A22_a_read_only_dataset_stays_as_it_is(read: Read, default_settings, tmp_path: Path) -> None:
    read(CONTENT)
    paths = sorted((tmp_path / "data").rglob("*"))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in paths}
    for path in [tmp_path / "data", *paths]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    settings = default_settings(f"data.root={tmp_path / 'data'}")
    for dataset in datasets_of(settings, SIDE, SIDE, 0, None):
        assert len([dataset[index] for index in range(len(dataset))]) == 3
    assert sorted((tmp_path / "data").rglob("*")) == paths
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in paths}
