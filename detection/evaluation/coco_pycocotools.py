"""The COCO metric by pycocotools, the reference, which takes a Python dict per box."""

import contextlib
import io
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection.data.annotations import Annotations
from detection.evaluation.detections import Detections, result_rows


def accumulate(
    annotations: Annotations,
    labels: np.ndarray,
    gt_rows: np.ndarray,
    gt_areas: np.ndarray,
    detections: Detections,
    detection_areas: np.ndarray,
    params: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Compute COCOeval's arrays for some classes, by ascending category id.

    Ids are renumbered from 1: COCOeval takes id 0 for "no match" and loses one of two equal ids. Only boxes are handed
    over, so its mask code never runs.

    Args:
        labels: of these classes.
        gt_rows, gt_areas: rows of `annotations` in the file's order, and values compared with the area ranges, (G,).
        detections, detection_areas: of these classes, (K,).
        params: COCOeval's, of which `maxDets`, `areaRng` and `areaRngLbl` count.

    Returns:
        Precision (10, 101, C, A, M) and recall (10, C, A, M); -1 where a class has no ground-truth box.
    """
    gt, results = COCO(), COCO()
    with contextlib.redirect_stdout(io.StringIO()):
        gt.dataset = _gt_dataset(annotations, labels, gt_rows, gt_areas, detections)
        gt.createIndex()
        results.dataset = {**gt.dataset, "annotations": _detection_rows(annotations, detections, detection_areas)}
        results.createIndex()
        evaluator = COCOeval(gt, results, iouType="bbox")
        evaluator.params.maxDets = params.maxDets
        evaluator.params.areaRng, evaluator.params.areaRngLbl = params.areaRng, params.areaRngLbl
        evaluator.evaluate()
        evaluator.accumulate()
    return np.asarray(evaluator.eval["precision"]), np.asarray(evaluator.eval["recall"])


def _gt_dataset(
    annotations: Annotations, labels: np.ndarray, rows: np.ndarray, areas: np.ndarray, detections: Detections
) -> dict[str, Any]:
    """The content of an annotation file, reduced to some classes and to the images with ground truth or detections."""
    ids = np.asarray(annotations.categories.ids)
    image_of_box = np.searchsorted(annotations.first_box, rows, side="right") - 1
    images = np.union1d(image_of_box, detections.image_index)
    columns = zip(
        annotations.image_ids[image_of_box].tolist(),
        ids[annotations.labels[rows]].tolist(),
        annotations.coco_boxes[rows].tolist(),
        areas.tolist(),
        annotations.crowd[rows].tolist(),
        strict=True,
    )
    return {
        "info": {},
        "images": [{"id": number} for number in annotations.image_ids[images].tolist()],
        "categories": [{"id": number} for number in ids[labels].tolist()],
        "annotations": [
            {
                "id": row + 1,
                "image_id": image,
                "category_id": category,
                "bbox": box,
                "area": area,
                "iscrowd": int(crowd),
            }
            for row, (image, category, box, area, crowd) in enumerate(columns)
        ],
    }


def _detection_rows(annotations: Annotations, detections: Detections, areas: np.ndarray) -> list[dict[str, Any]]:
    rows = zip(result_rows(annotations, detections), areas.tolist(), strict=True)
    return [{**row, "id": number + 1, "area": area, "iscrowd": 0} for number, (row, area) in enumerate(rows)]
