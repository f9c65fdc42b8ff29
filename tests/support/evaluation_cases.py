"""Synthetic annotations and detections for tests of the metrics."""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection.data.annotations import Annotations, flatten_annotations
from detection.evaluation.detections import Detections

BACKENDS = ("pycocotools", "arrays")


def coco_content(
    boxes: list[tuple[int, int, list[float]]],
    images: int = 1,
    ids: Callable[[int], int] = lambda number: number + 1,
    categories: tuple[int, ...] = (1, 5, 90),
    size: tuple[int, int] = (1000, 1000),
    crowd: tuple[int, ...] = (),
) -> dict[str, Any]:
    """Parsed annotation file from (image id, category id, [x, y, width, height]); `crowd`: positions of crowd boxes."""
    return {
        "images": [
            {"id": number, "file_name": f"{number}.png", "width": size[0], "height": size[1]}
            for number in range(1, images + 1)
        ],
        "categories": [{"id": number, "name": f"name {number}"} for number in categories],
        "annotations": [
            {
                "id": ids(number),
                "image_id": image,
                "category_id": category,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": int(number in crowd),
            }
            for number, (image, category, box) in enumerate(boxes)
        ],
    }


def annotate(boxes: list[tuple[int, int, list[float]]], **arguments: Any) -> Annotations:
    return flatten_annotations(coco_content(boxes, **arguments), "test")


def detect(rows: list[tuple[int, int, list[float], float]]) -> Detections:
    """From (image index, dense label, [x, y, width, height], score)."""
    boxes = np.array([box for _, _, box, _ in rows], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return Detections(
        np.array([index for index, *_ in rows], dtype=np.int64),
        boxes,
        np.array([score for *_, score in rows], dtype=np.float64),
        np.array([label for _, label, *_ in rows], dtype=np.int64),
    )


def ground_truth_as_detections(annotations: Annotations) -> Detections:
    count = len(annotations.labels)
    image_index = np.repeat(np.arange(len(annotations)), np.diff(annotations.first_box))
    return Detections(image_index, annotations.boxes.astype(np.float64), np.ones(count), annotations.labels)


def join(*parts: Detections) -> Detections:
    return Detections(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("image_index", "boxes", "scores", "labels")
        )
    )


def random_set(seed: int) -> tuple[Annotations, Detections]:
    """`random_content` (categories 3 and 7 never occur) and noisy detections, many with equal scores."""
    annotations = flatten_annotations(random_content(seed), "test")
    generator = np.random.default_rng([seed, 1])
    rows = []
    image_of_box = np.repeat(np.arange(len(annotations)), np.diff(annotations.first_box)).tolist()
    for image, label, box in zip(
        image_of_box, annotations.labels.tolist(), annotations.coco_boxes.tolist(), strict=True
    ):
        for _ in range(int(generator.integers(0, 4))):
            noisy = (np.array(box) + generator.normal(0, 4, 4) * generator.integers(0, 3)).tolist()
            score = float(generator.integers(1, 6)) / 5  # ties
            rows.append((image, label, [*noisy[:2], max(noisy[2], 1.0), max(noisy[3], 1.0)], score))
    for _ in range(150):  # more than 100 of one class in one image
        x, y, width, height = generator.uniform([0, 0, 20, 20], [400, 400, 150, 150]).tolist()
        rows.append((0, 0, [x, y, width, height], float(generator.integers(0, 100)) / 100))
    rows += [(4, 1, [10.0, 10.0, 20.0, 20.0], 0.5)]  # a class without ground truth
    rows.sort(key=lambda row: row[0])
    return annotations, detect(rows)


def random_content(seed: int) -> dict[str, Any]:
    """Crowd boxes, images without boxes, classes without ground truth or detections, boxes that touch and repeat."""
    generator = np.random.default_rng(seed)
    boxes = []
    for image in range(1, 13):
        for _ in range(0 if image == 6 else int(generator.integers(1, 12))):
            x, y, width, height = generator.uniform([0, 0, 5, 5], [400, 400, 200, 200]).round(int(seed % 3)).tolist()
            boxes.append((image, int(generator.choice([1, 5, 90])), [x, y, max(width, 1.0), max(height, 1.0)]))
    crowd = np.flatnonzero(generator.random(len(boxes)) < 0.15)
    return coco_content(boxes, images=12, categories=(1, 3, 5, 7, 90), size=(640, 640), crowd=tuple(crowd.tolist()))


def tied_set(seed: int) -> tuple[dict[str, Any], Annotations, Detections]:
    """Boxes on a coarse grid in a random file order: IoUs and scores are equal everywhere, thresholds are met exactly.

    Image ids descend, category ids are mixed; one class is in crowds only, one image (the last by id) has no box.
    """
    generator = np.random.default_rng(seed)
    categories = (7, 2, 90, 5)

    def boxes(count: int) -> np.ndarray:
        corners, sides = generator.integers(0, 8, (count, 2)) * 10, generator.integers(1, 12, (count, 2)) * 10
        return np.concatenate([corners, sides], axis=1).astype(np.float64)

    gt_boxes = [
        (image, int(category), box.tolist())
        for image in range(1, 9)
        for category, box in zip(generator.choice(categories, 12), boxes(12), strict=True)
        if image not in (1, 4)
    ]
    generator.shuffle(gt_boxes)
    crowd = [number for number, (_, category, _) in enumerate(gt_boxes) if category == 5 or generator.random() < 0.3]
    content = coco_content(gt_boxes, images=9, categories=categories, crowd=tuple(crowd))
    for row in content["annotations"]:
        row["area"] = float(generator.choice([0, 32**2, 96**2, row["area"]]))  # on the borders of the size classes
        row["image_id"] = 100 - row["image_id"]
    for image in content["images"]:
        image["id"] = 100 - image["id"]
    count = 2500  # 70 per image and class, over 100 where one is favoured
    rows = zip(
        np.sort(generator.integers(0, 8, count)).tolist(),
        generator.choice(4, count, p=[0.6, 0.2, 0.1, 0.1]).tolist(),
        boxes(count).tolist(),
        (generator.integers(0, 8, count) / 8).tolist(),
        strict=True,
    )
    return content, flatten_annotations(content, "test"), detect(list(rows))


def official_evaluator(content: dict[str, Any], annotations: Annotations, detections: Detections) -> COCOeval:
    """COCOeval of pycocotools on the parsed annotation file; detection k has the id k + 1."""
    ids = annotations.categories.ids
    results = [
        {"image_id": int(annotations.image_ids[image]), "category_id": ids[label], "score": score,
         "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for image, (x1, y1, x2, y2), score, label in zip(
            *(getattr(detections, name).tolist() for name in ("image_index", "boxes", "scores", "labels")), strict=True
        )
    ]  # fmt: skip
    with contextlib.redirect_stdout(None):
        gt = COCO()
        gt.dataset = content
        gt.createIndex()
        return COCOeval(gt, gt.loadRes(results), "bbox")


def official_numbers(
    content: dict[str, Any], annotations: Annotations, detections: Detections
) -> tuple[list[float | None], np.ndarray]:
    """pycocotools' twelve numbers, and precision at (IoU, recall, label) as in `Scores`."""
    evaluator = official_evaluator(content, annotations, detections)
    with contextlib.redirect_stdout(None):
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    order = [sorted(annotations.categories.ids).index(number) for number in annotations.categories.ids]
    stats = [None if value == -1 else value for value in evaluator.stats.tolist()]
    return stats, evaluator.eval["precision"][:, :, order, 0, -1]
