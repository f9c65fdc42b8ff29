"""The official COCO numbers of detections, by both evaluators, and the pass over a validation set that leads there."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from detection.contract import Geometry
from detection.data.annotations import flatten_annotations, load_annotations
from detection.data.coco import CocoDataset
from detection.data.loaders import build_evaluation_loader
from detection.data.transforms import Transform
from detection.evaluation.coco_metric import METRIC_NAMES, score
from detection.evaluation.detections import write_detections
from detection.evaluation.evaluate import Evaluation, evaluate
from detection.runtime.devices import autocast
from tests.support.evaluation_cases import annotate, coco_content, detect, ground_truth_as_detections, tied_set
from tests.support.paths import REPOSITORY

FIXTURE = REPOSITORY.parent / "shared" / "data" / "coco_eval_fixture"
GEOMETRY = Geometry(size_multiple=32)
CPU = torch.device("cpu")
NAN = float("nan")
ONE = pytest.approx(1.0, abs=1e-9)  # pycocotools adds a tiny number to its denominators
needs_fixture = pytest.mark.skipif(not FIXTURE.is_dir(), reason=f"{FIXTURE} is not there")


def numbers(*arguments: Any) -> tuple[dict[str, float | None], dict[str, Any]]:
    """The twelve metrics of `score`, and AP, AP50 and ground-truth boxes of each class."""
    scores = score(*arguments)
    return scores.metrics, scores.class_ap


# The published numbers


@needs_fixture
def test_twelve_published_numbers(backend: str) -> None:
    expected = json.loads((FIXTURE / "expected.json").read_text())
    annotations = load_annotations(FIXTURE / "annotations" / "instances_val.json")
    image_index = {number: index for index, number in enumerate(annotations.image_ids.tolist())}
    label = {number: label for label, number in enumerate(annotations.categories.ids)}
    results = json.loads((FIXTURE / "fakebbox100_results.json").read_text())
    detections = detect(
        [(image_index[row["image_id"]], label[row["category_id"]], row["bbox"], row["score"]) for row in results]
    )
    metrics, class_ap = numbers(annotations, detections, backend)
    assert {name: round(value, 3) for name, value in metrics.items() if value is not None} == expected
    # AP is the mean over the classes that have a ground-truth box; 80 classes, 10 of them without (the fixture's table)
    defined = [ap for ap, _, _ in class_ap.values() if ap is not None]
    assert len(class_ap) == 80 and len(defined) == 80 - sum(gt_boxes == 0 for _, _, gt_boxes in class_ap.values())
    assert float(np.mean(defined)) == pytest.approx(metrics["AP"], abs=1e-12)
    assert class_ap["person"][2] + class_ap["book"][2] == 256 + 18 - person_and_book_crowds()


def person_and_book_crowds() -> int:
    content = json.loads((FIXTURE / "annotations" / "instances_val.json").read_text())
    return sum(row["iscrowd"] and row["category_id"] in (1, 84) for row in content["annotations"])


@needs_fixture
def test_fixture_with_ground_truth_as_detections_is_perfect(backend: str) -> None:
    annotations = load_annotations(FIXTURE / "annotations" / "instances_val.json")
    metrics = score(annotations, ground_truth_as_detections(annotations), backend).metrics
    assert [metrics[name] for name in ("AP", "AP50", "AR100")] == [ONE, ONE, ONE]


# Hand calculations


def test_class_ap_by_hand(backend: str) -> None:
    annotations = annotate([(1, 1, [0, 0, 100, 100]), (1, 1, [200, 0, 100, 100]), (1, 5, [400, 0, 100, 100])])
    detections = detect(
        [
            # label 0: right, wrong, right. Precision is 1 up to recall 0.5, then 2/3. Of the 101 recalls 0, 0.01, ... 1
            # the first 51 (to 0.50) get 1, the other 50 get 2/3: AP = (51 + 50 * 2/3) / 101 at every IoU.
            (0, 0, [0, 0, 100, 100], 0.9),
            (0, 0, [600, 600, 100, 100], 0.8),
            (0, 0, [200, 0, 100, 100], 0.7),
            # label 1: IoU 0.78 is enough for 0.50, 0.55, ... 0.75, six of the ten thresholds: AP 0.6, AP50 1.
            (0, 1, [400, 0, 100, 78], 0.5),
            # label 2 has no ground-truth box: nothing to be said, whatever is detected.
            (0, 2, [700, 0, 100, 100], 1.0),
        ]
    )
    metrics, class_ap = numbers(annotations, detections, backend)
    first = (51 + 50 * 2 / 3) / 101
    assert class_ap == {
        "name 1": (pytest.approx(first), pytest.approx(first), 2),
        "name 5": (pytest.approx(0.6), pytest.approx(1.0), 1),
        "name 90": (None, None, 0),
    }
    assert metrics["AP"] == pytest.approx((first + 0.6) / 2)
    assert metrics["AP50"] == pytest.approx((first + 1) / 2)
    assert metrics["AP75"] == pytest.approx((first + 1) / 2)
    # One detection per image and class finds 1 of 2 and, at six of ten thresholds, 1 of 1; ten find both.
    assert metrics["AR1"] == pytest.approx((0.5 + 0.6) / 2)
    assert metrics["AR10"] == pytest.approx(0.8) and metrics["AR100"] == pytest.approx(0.8)
    # 100 x 100 = 10,000 pixels: above 96 x 96, so all ground-truth boxes are large and the other two are not defined.
    assert (metrics["APs"], metrics["APm"], metrics["ARs"], metrics["ARm"]) == (None, None, None, None)
    assert metrics["APl"] == pytest.approx(metrics["AP"])


def test_size_classes_follow_the_area_of_the_file(backend: str) -> None:
    # Boxes of 100 x 100; the file says the objects cover 500 (small: below 32^2) and 5000 pixels (medium: below 96^2).
    content = coco_content([(1, 1, [0, 0, 100, 100]), (1, 1, [200, 0, 100, 100])])
    content["annotations"][0]["area"], content["annotations"][1]["area"] = 500, 5000
    annotations = flatten_annotations(content, "test")
    metrics = score(annotations, detect([(0, 0, [0, 0, 100, 100], 1.0)]), backend).metrics
    assert (metrics["ARs"], metrics["ARm"], metrics["ARl"]) == (ONE, 0.0, None)


def test_detections_in_a_crowd_are_neither_right_nor_wrong(backend: str) -> None:
    boxes = [(1, 1, [0, 0, 50, 50]), (1, 1, [100, 100, 400, 400])]
    predictions = [(0, 0, [100 + 50 * number, 120, 40, 40], 0.9) for number in range(5)]  # inside the second box
    predictions += [(0, 0, [0, 0, 50, 50], 0.5)]
    metrics, class_ap = numbers(annotate(boxes, crowd=(1,)), detect(predictions), backend)
    assert class_ap["name 1"] == (ONE, ONE, 1)
    assert (metrics["AP"], metrics["AR100"]) == (ONE, ONE)
    # Were it no crowd: the one right detection comes sixth, precision 1/6 up to recall 1/2, then 0.
    metrics, class_ap = numbers(annotate(boxes), detect(predictions), backend)
    assert class_ap["name 1"] == (pytest.approx(51 / 6 / 101), pytest.approx(51 / 6 / 101), 2)


def test_no_detections_is_zero_and_no_ground_truth_is_none(backend: str) -> None:
    nothing = detect([])
    metrics, class_ap = numbers(annotate([(1, 5, [0, 0, 50, 50])]), nothing, backend)
    assert tuple(metrics) == METRIC_NAMES
    medium = {"AP", "AP50", "AP75", "APm", "AR1", "AR10", "AR100", "ARm"}  # 50 x 50 lies between 32^2 and 96^2
    assert metrics == {name: 0.0 if name in medium else None for name in METRIC_NAMES}
    assert class_ap == {"name 1": (None, None, 0), "name 5": (0.0, 0.0, 1), "name 90": (None, None, 0)}

    without_ground_truth = annotate([], images=2)
    for detections in (nothing, detect([(1, 0, [0, 0, 10, 10], 0.5)])):
        metrics, class_ap = numbers(without_ground_truth, detections, backend)
        assert metrics == dict.fromkeys(METRIC_NAMES)
        assert class_ap == dict.fromkeys(["name 1", "name 5", "name 90"], (None, None, 0))


def test_detection_of_another_class_or_image_does_not_count(backend: str) -> None:
    annotations = annotate([(1, 1, [0, 0, 50, 50]), (2, 5, [0, 0, 50, 50])], images=2)
    predictions = detect([(1, 0, [0, 0, 50, 50], 1.0), (0, 1, [0, 0, 50, 50], 1.0)])
    metrics = score(annotations, predictions, backend).metrics
    assert metrics["AP"] == metrics["AR100"] == 0.0


# Ids of the annotation file

MANY_BOXES = [
    (image, category, [float(60 * place), float(20 * image), 50.0, 40.0])
    for image in (1, 2, 3)
    for place, category in enumerate((1, 5, 90, 1, 90))
]


@pytest.mark.parametrize(
    "ids", [lambda number: number, lambda number: 0, lambda number: 7, lambda number: -number, lambda n: 2**40 + n],
    ids=["from 0", "all 0", "all equal", "negative", "large"],
)  # fmt: skip
def test_perfect_detections_score_1_whatever_the_annotation_ids(
    tmp_path: Path, backend: str, ids: Callable[[int], int]
) -> None:
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(coco_content(MANY_BOXES, images=4, ids=ids)))
    annotations = load_annotations(path)
    metrics, class_ap = numbers(annotations, ground_truth_as_detections(annotations), backend)
    assert [metrics[name] for name in ("AP", "AP50", "AP75", "APm", "AR100")] == [ONE] * 5
    # Three images with two boxes of class 1 and 90 each: a single detection finds half of them, and all of class 5.
    assert metrics["AR1"] == pytest.approx((0.5 + 1 + 0.5) / 3)
    assert class_ap == {"name 1": (ONE, ONE, 6), "name 5": (ONE, ONE, 3), "name 90": (ONE, ONE, 6)}


def test_written_detections_have_the_ids_and_boxes_of_the_annotation_file(tmp_path: Path) -> None:
    content = coco_content(MANY_BOXES, images=3)
    for image in content["images"]:
        image["id"] += 1000
    for row in content["annotations"]:
        row["image_id"] += 1000
    annotations = flatten_annotations(content, "test")
    detections = detect([(2, 2, [1.5, 2.0, 30.25, 40.0], 0.125), (0, 0, [0.0, 0.0, 1.0, 2.0], 1.0)])
    write_detections(tmp_path / "detections.json", annotations, detections)
    assert json.loads((tmp_path / "detections.json").read_text()) == [
        {"image_id": 1003, "category_id": 90, "bbox": [1.5, 2.0, 30.25, 40.0], "score": 0.125},
        {"image_id": 1001, "category_id": 1, "bbox": [0.0, 0.0, 1.0, 2.0], "score": 1.0},
    ]
    write_detections(tmp_path / "detections.json", annotations, detect([]))
    assert json.loads((tmp_path / "detections.json").read_text()) == []


def test_written_files_score_the_same_with_the_official_program(tmp_path: Path) -> None:
    content, annotations, detections = tied_set(3)
    (tmp_path / "gt.json").write_text(json.dumps(content))
    write_detections(tmp_path / "detections.json", annotations, detections)
    with contextlib.redirect_stdout(None):
        gt = COCO(str(tmp_path / "gt.json"))
        evaluator = COCOeval(gt, gt.loadRes(str(tmp_path / "detections.json")), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    official = [None if value == -1 else value for value in evaluator.stats.tolist()]
    assert list(score(load_annotations(tmp_path / "gt.json"), detections, "arrays").metrics.values()) == official


def test_mask_code_never_runs(tmp_path: Path, monkeypatch, backend: str) -> None:
    # Segmentations can be hostile: run lengths beyond the image, coordinates of 1e8. Nothing looks at them.
    content = coco_content(MANY_BOXES, images=3, size=(400, 400))
    for number, row in enumerate(content["annotations"]):
        hostile = {"counts": [2**31, 2**31], "size": [2**31, 2**31]}, [[1e8, 1e8, -1e8, 1e8, 0, 0]], "not a mask"
        row["segmentation"] = hostile[number % 3]

    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("mask code was called")

    overlap = mask.iou  # pycocotools computes the overlap of boxes in a function of this module

    def box_overlap(predictions: Any, gt: Any, crowd: Any) -> Any:
        assert all(np.shape(box) == (4,) for box in [*predictions, *gt])
        return overlap(predictions, gt, crowd)

    for name in ("encode", "decode", "merge", "area", "toBbox", "frPyObjects"):
        monkeypatch.setattr(mask, name, refuse)
    monkeypatch.setattr(mask, "iou", box_overlap)

    (tmp_path / "ground truth.json").write_text(json.dumps(content))
    for number in (1, 2, 3):
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.zeros((400, 400, 3), np.uint8))
    dataset = CocoDataset(tmp_path, tmp_path / "ground truth.json", Transform(GEOMETRY, 64, seed=0))
    assert len(dataset[0].labels) == 5
    metrics = score(dataset.annotations, ground_truth_as_detections(dataset.annotations), backend).metrics
    assert metrics["AP"] == ONE


# The pass over a validation set


# 100 x 50 pixels into 64: scale 0.64, 32 rows high, 16 rows of padding above. 40 x 80: scale 0.8, 32 columns wide,
# 16 columns of padding on the left. (x1, y1, x2, y2) in the image -> in the network input.
WIDE, TALL = (100, 50), (40, 80)
BOX_IN_WIDE, BOX_IN_WIDE_INPUT = (25.0, 12.5, 75.0, 50.0), (16.0, 24.0, 48.0, 48.0)
BOX_IN_TALL, BOX_IN_TALL_INPUT = (0.0, 5.0, 40.0, 20.0), (16.0, 4.0, 48.0, 16.0)


@pytest.fixture
def dataset(tmp_path: Path) -> CocoDataset:
    """Ten images, wide and tall by turns, of which number 0, 3, 6, 9 have no box and the others one."""
    content = coco_content([], images=10)
    for image in content["images"]:
        wide = image["id"] % 2 == 0
        image["width"], image["height"] = WIDE if wide else TALL
        cv2.imwrite(str(tmp_path / image["file_name"]), np.zeros((image["height"], image["width"], 3), np.uint8))
        if image["id"] % 3 != 1:
            x1, y1, x2, y2 = BOX_IN_WIDE if wide else BOX_IN_TALL
            row = {"id": 0, "image_id": image["id"], "category_id": 90 if wide else 5, "area": (x2 - x1) * (y2 - y1)}
            content["annotations"].append(row | {"bbox": [x1, y1, x2 - x1, y2 - y1]})
    (tmp_path / "ground truth.json").write_text(json.dumps(content))
    return CocoDataset(tmp_path, tmp_path / "ground truth.json", Transform(GEOMETRY, 64, seed=0))


class PerfectDetector(nn.Module):
    """Stand-in for model, criterion and postprocess; detects the ground truth, told by the image's padding."""

    def __init__(self, extra: Callable[[int], list[tuple[list[float], float]]] = lambda index: []) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout())
        self.modes: list[list[bool]] = []
        self.seen = 0
        self.batch_sizes: list[int] = []
        self.extra = extra

    def forward(self, images: Tensor) -> list[Tensor]:
        assert not torch.is_grad_enabled()
        self.modes.append([module.training for module in self.modules()])
        self.batch_sizes.append(len(images))
        return [images]

    def criterion(self, outputs: list[Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        per_image = (targets["labels"] >= 0).sum(1).float()
        return {"loss_box": per_image.mean(), "loss_class": 10 * per_image.mean()}

    def postprocess(self, outputs: list[Tensor]) -> list[dict[str, Tensor]]:
        predictions = []
        for image in outputs[0]:
            wide = (image[0, 0] == 124).all()  # the fill colour's red in the first row: padding above
            assert wide or (image[0, :, 0] == 124).all()
            right = [(list(BOX_IN_WIDE_INPUT if wide else BOX_IN_TALL_INPUT), 0.75)] if self.seen % 3 else []
            rows = right + self.extra(self.seen)
            boxes = torch.tensor([box for box, _ in rows]).reshape(-1, 4)
            scores, labels = torch.tensor([score for _, score in rows]), torch.full((len(rows),), 2 if wide else 1)
            predictions.append({"boxes": boxes, "scores": scores, "labels": labels})
            self.seen += 1
        return predictions


def run_evaluation(dataset: CocoDataset, model: PerfectDetector, batch_size: int = 4, **arguments: Any) -> Evaluation:
    loader = build_evaluation_loader(dataset, batch_size, num_workers=0, device=CPU)
    return evaluate(
        model, model.criterion, model.postprocess, loader, dataset.annotations, CPU, lambda: autocast(CPU, None),
        **arguments,
    )  # fmt: skip


def test_ground_truth_through_the_letterbox_scores_1(dataset: CocoDataset, backend: str) -> None:
    model = PerfectDetector()
    result = run_evaluation(dataset, model, backend=backend)
    assert model.batch_sizes == [4, 4, 2]
    assert (result.metrics["AP"], result.metrics["AR100"]) == (ONE, ONE)
    assert result.class_ap == {"name 1": (None, None, 0), "name 5": (ONE, ONE, 3), "name 90": (ONE, ONE, 3)}
    assert (result.backend, result.dropped, len(result.detections)) == (backend, 0, 6)
    assert result.detections.image_index.tolist() == [1, 2, 4, 5, 7, 8]
    # index 1, 5, 7 are image ids 2, 6, 8: wide
    expected = [BOX_IN_WIDE if index in (1, 5, 7) else BOX_IN_TALL for index in (1, 2, 4, 5, 7, 8)]
    np.testing.assert_allclose(result.detections.boxes, expected, atol=1e-4)
    assert result.detections.scores.tolist() == [0.75] * 6
    assert len(result.detections.of_image(5)) == 1 and len(result.detections.of_image(6)) == 0
    assert result.detections.of_image(5).labels.tolist() == [2]


def test_losses_are_means_over_images_whatever_the_batch_size(dataset: CocoDataset) -> None:
    # 6 of 10 images have a box. Batches of 4, 4, 2 have means 1/2, 3/4, 1/2, whose mean 0.583 is not 0.6.
    for batch_size in (4, 3, 10, 1):
        losses = run_evaluation(dataset, PerfectDetector(), batch_size).losses
        assert losses == {"loss_box": pytest.approx(0.6), "loss_class": pytest.approx(6.0)}


def test_non_finite_detections_never_raise_a_number(dataset: CocoDataset, backend: str) -> None:
    # On all images, the empty ones too, the best-scored detections are no numbers.
    infinite = float("inf")
    bad = [
        ([NAN, NAN, NAN, NAN], 1.0),
        ([0.0, 0.0, NAN, 10.0], 1.0),
        ([-infinite, -infinite, infinite, infinite], 1.0),  # clipped to the image it would be a detection
        ([0.0, 0.0, infinite, 10.0], 1.0),
        ([0.0, 0.0, 10.0, 10.0], NAN),
    ]
    wrong = [([0.0, 0.0, 8.0, 8.0], 0.9)]
    without = run_evaluation(dataset, PerfectDetector(lambda index: wrong), backend=backend)
    result = run_evaluation(dataset, PerfectDetector(lambda index: bad + wrong), backend=backend)
    assert 0 < without.metrics["AP"] < 1
    assert result.metrics == without.metrics and result.class_ap == without.class_ap
    assert result.dropped == 10 * len(bad) and without.dropped == 0
    assert len(result.detections) == len(without.detections)


def test_detections_are_cut_to_the_image(dataset: CocoDataset) -> None:
    result = run_evaluation(dataset, PerfectDetector(lambda index: [([-5.0, -5.0, 70.0, 70.0], 0.3)]))
    for index in range(10):
        predictions = result.detections.of_image(index)
        width, height = WIDE if index % 2 else TALL  # image id is index + 1
        np.testing.assert_allclose(predictions.boxes[predictions.scores < 0.5], [[0, 0, width, height]], atol=1e-4)


def test_no_detections_is_no_crash(dataset: CocoDataset, backend: str) -> None:
    class Blind(PerfectDetector):
        def postprocess(self, outputs: list[Tensor]) -> list[dict[str, Tensor]]:
            boxes, labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
            return [{"boxes": boxes, "scores": torch.zeros(0), "labels": labels}] * len(outputs[0])

    result = run_evaluation(dataset, Blind(), backend=backend)
    assert len(result.detections) == 0 and result.metrics["AP"] == 0.0 and result.metrics["AR100"] == 0.0
    assert result.losses["loss_box"] == pytest.approx(0.6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backbone_training", [True, False])
def test_mode_of_every_module_is_restored(dataset: CocoDataset, training: bool, backbone_training: bool) -> None:
    # A frozen backbone is in evaluation mode inside a model in training mode and must stay so.
    model = PerfectDetector().train(training)
    model.backbone.train(backbone_training)
    before = {name: module.training for name, module in model.named_modules()}
    run_evaluation(dataset, model)
    assert model.modes == [[False] * len(before)] * 3
    assert {name: module.training for name, module in model.named_modules()} == before


def test_abandoned_evaluation_restores_the_mode_too(dataset: CocoDataset) -> None:
    calls: Iterator[int] = iter(range(10))

    def stop() -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt

    model = PerfectDetector().train()
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(dataset, model, on_batch=stop)
    assert model.batch_sizes == [4, 4] and all(module.training for module in model.modules())
