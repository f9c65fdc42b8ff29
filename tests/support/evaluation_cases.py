"""Annotations and detections made up for tests of the metrics."""

from collections.abc import Callable
from typing import Any

import numpy as np

from detection.data.annotations import Annotations, flatten_annotations
from detection.evaluation.detections import Detections

BACKENDS = ("pycocotools", "faster_coco_eval", "arrays")


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
    """Ground truth with category ids 1, 3, 5, 7, 90 (3 and 7 never occur) and noisy detections, many with equal scores."""
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
