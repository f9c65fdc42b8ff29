"""Model + loader -> detections in original pixels -> the official COCO metrics."""

import contextlib
import importlib.util
import io
import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from detection.data.coco import Annotations
from detection.data.loaders import Batch, targets_to
from detection.errors import SettingsError
from detection.postprocessing import boxes_to_original

# in the order of COCOeval.stats
METRIC_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass(frozen=True)
class Detections:
    """K detections on a dataset as flat arrays, grouped by image."""

    image_index: np.ndarray  # (K,) int64, position in the dataset
    boxes: np.ndarray  # (K, 4) float64 xyxy, original pixels
    scores: np.ndarray  # (K,) float64
    labels: np.ndarray  # (K,) int64, dense

    def __len__(self) -> int:
        return len(self.scores)

    def of_image(self, index: int) -> "Detections":
        rows = self.image_index == index
        return Detections(self.image_index[rows], self.boxes[rows], self.scores[rows], self.labels[rows])


@dataclass(frozen=True)
class Evaluation:
    """Everything one pass over the validation set gives."""

    metrics: dict[str, float | None]  # the twelve official numbers; None where no truth defines them
    class_ap: dict[str, tuple[float | None, float | None, int]]  # name -> (AP, AP50, number of truths)
    losses: dict[str, float]  # mean per image
    detections: Detections
    dropped: int  # detections that were not finite numbers
    seconds: dict[str, float]  # "network": load, forward and NMS; "metric"
    backend: str


class Found(NamedTuple):
    """What one process found on its images, unscored."""

    detections: Detections  # not finite ones too
    losses: dict[str, float]  # summed over the images
    seconds: float  # load, forward and NMS


def evaluate(
    model: nn.Module,
    criterion: nn.Module | None,
    postprocess: nn.Module,
    loader: Iterable[Batch],
    annotations: Annotations,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    backend: str = "auto",
    on_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Run the model over every image of the loader and score it with the official COCO metric.

    Args:
        criterion: for the validation loss; None: no losses.
        model: put into evaluation mode; the mode of every module is restored (a frozen encoder's is not the model's).
        loader: every image once, in the dataset's order, with letterboxes.
        annotations: of the loader's dataset.
        backend: "auto", "pycocotools" or "faster_coco_eval".
        on_batch: called after each batch; may raise to abandon the evaluation.
    """
    found = find_all(model, criterion, postprocess, loader, device, autocast, on_batch)
    return score_found([found], annotations, backend)


@torch.no_grad()
def find_all(
    model: nn.Module,
    criterion: nn.Module | None,
    postprocess: nn.Module,
    loader: Iterable[Batch],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    on_batch: Callable[[], None] = lambda: None,
) -> Found:
    """The first half of `evaluate`, on the images of the loader, which may be a share of the dataset."""
    were_training = [(module, module.training) for module in model.modules()]
    model.eval()
    parts: dict[str, list[np.ndarray]] = {"image_index": [], "boxes": [], "scores": [], "labels": []}
    totals: dict[str, float] = {}
    started = time.perf_counter()
    try:
        for batch in loader:
            images, targets = targets_to(batch, device)
            with autocast():
                outputs = model(images)
                losses = criterion(outputs, targets) if criterion else {}
            for name, value in losses.items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(images)
            for index, letterbox, found in zip(
                batch["indices"].tolist(), batch["letterboxes"], postprocess(outputs), strict=True
            ):
                boxes = boxes_to_original(found["boxes"], letterbox)
                # Cut to the image, an infinite box would be a finite one.
                boxes[~found["boxes"].isfinite().all(dim=1)] = torch.nan
                parts["image_index"].append(np.full(len(boxes), index, dtype=np.int64))
                parts["boxes"].append(boxes.double().cpu().numpy())
                parts["scores"].append(found["scores"].double().cpu().numpy())
                parts["labels"].append(found["labels"].cpu().numpy())
            on_batch()
    finally:
        for module, was_training in were_training:
            module.training = was_training
    return Found(Detections(**join_arrays(parts)), totals, time.perf_counter() - started)


def score_found(shares: Sequence[Found], annotations: Annotations, backend: str = "auto") -> Evaluation:
    """The second half of `evaluate`.

    Args:
        shares: of all processes, together every image once.
    """
    started = time.perf_counter()
    parts = [vars(share.detections) for share in shares]
    joined = join_arrays({name: [part[name] for part in parts] for name in parts[0]})
    if len(shares) > 1:  # one process finds them in this order
        order = np.argsort(joined["image_index"], kind="stable")
        joined = {name: array[order] for name, array in joined.items()}
    detections, dropped = drop_not_finite(Detections(**joined))
    backend = choose_backend(backend)
    metrics, class_ap = score_detections(annotations, detections, backend)
    seconds = {"network": max(share.seconds for share in shares), "metric": time.perf_counter() - started}
    names = dict.fromkeys(name for share in shares for name in share.losses)
    losses = {name: sum(share.losses.get(name, 0.0) for share in shares) / len(annotations) for name in names}
    return Evaluation(metrics, class_ap, losses, detections, dropped, seconds, backend)


def join_arrays(parts: dict[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
    """The fields of `Detections`, each from its parts; of no part too (a process without an image)."""
    empty = {"boxes": np.zeros((0, 4)), "scores": np.zeros(0)}
    return {
        name: np.concatenate(arrays) if arrays else empty.get(name, np.zeros(0, np.int64))
        for name, arrays in parts.items()
    }


def drop_not_finite(detections: Detections) -> tuple[Detections, int]:
    """Remove detections with a NaN or infinite number: pycocotools counts a NaN box as a perfect match."""
    finite = np.isfinite(detections.boxes).all(axis=1) & np.isfinite(detections.scores)
    kept = Detections(
        detections.image_index[finite], detections.boxes[finite], detections.scores[finite], detections.labels[finite]
    )
    return kept, int((~finite).sum())


def choose_backend(name: str) -> str:
    """The evaluator that runs: "auto" takes faster_coco_eval where it is installed, else the reference, pycocotools.

    Raises:
        SettingsError: the one that was asked for is not installed.
    """
    installed = importlib.util.find_spec("faster_coco_eval") is not None
    if name == "faster_coco_eval" and not installed:
        raise SettingsError("evaluation.backend=faster_coco_eval is not installed: pip install faster-coco-eval")
    if name != "auto":
        return name
    return "faster_coco_eval" if installed else "pycocotools"


def score_detections(
    annotations: Annotations, detections: Detections, backend: str = "pycocotools"
) -> tuple[dict[str, float | None], dict[str, tuple[float | None, float | None, int]]]:
    """The twelve official COCO numbers and AP per class.

    Annotations are renumbered from 1: the evaluators take id 0 for "no match" and lose one of two equal ids. Only boxes
    are handed over, so their mask code never runs. Numbers that no truth defines are None, never 0 or -1.

    Args:
        annotations: truth; its images are the ones that count.
        detections: in original pixels, all finite.
        backend: "pycocotools" (reference) or "faster_coco_eval" (proven equal).

    Returns:
        Metrics by name, and per class name (AP, AP50, number of truths without crowd).
    """
    if backend == "faster_coco_eval":
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = COCO(), COCO()
        truth.dataset = _truth_dataset(annotations)
        truth.createIndex()
        found.dataset = {**truth.dataset, "annotations": _detection_rows(annotations, detections)}
        found.createIndex()
        evaluator = COCOeval(truth, found, iouType="bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    metrics = {name: _defined(value) for name, value in zip(METRIC_NAMES, evaluator.stats[:12], strict=True)}

    # precision: (IoU thresholds, recalls, classes, areas, maxDets); area 0 is all, the last maxDets is 100
    precision = np.asarray(evaluator.eval["precision"])[:, :, :, 0, -1]
    class_ap = {}
    counts = np.bincount(annotations.labels[~annotations.crowd], minlength=len(annotations.categories.names))
    order = {number: column for column, number in enumerate(sorted(annotations.categories.ids))}
    for label, (name, number) in enumerate(zip(annotations.categories.names, annotations.categories.ids, strict=True)):
        of_class = precision[:, :, order[number]]
        defined = of_class[of_class > -1]
        at_50 = of_class[0][of_class[0] > -1]
        class_ap[name] = (
            float(defined.mean()) if defined.size else None,
            float(at_50.mean()) if at_50.size else None,
            int(counts[label]),
        )
    return metrics, class_ap


def _truth_dataset(annotations: Annotations) -> dict[str, Any]:
    image_of_box = np.repeat(annotations.image_ids, np.diff(annotations.first_box)).tolist()
    category_of_box = np.asarray(annotations.categories.ids)[annotations.labels].tolist()
    columns = zip(
        image_of_box,
        category_of_box,
        annotations.coco_boxes.tolist(),
        annotations.areas.tolist(),
        annotations.crowd.tolist(),
        strict=True,
    )
    return {
        "info": {},
        "images": [{"id": number} for number in annotations.image_ids.tolist()],
        "categories": [
            {"id": number, "name": name}
            for number, name in zip(annotations.categories.ids, annotations.categories.names, strict=True)
        ],
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


def _detection_rows(annotations: Annotations, detections: Detections) -> list[dict[str, Any]]:
    boxes = detections.boxes.copy()
    boxes[:, 2:] -= boxes[:, :2]
    columns = zip(
        annotations.image_ids[detections.image_index].tolist(),
        np.asarray(annotations.categories.ids)[detections.labels].tolist(),
        boxes.tolist(),
        boxes[:, 2:].prod(axis=1).tolist(),
        detections.scores.tolist(),
        strict=True,
    )
    return [
        {
            "id": row + 1,
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "area": area,
            "iscrowd": 0,
            "score": score,
        }
        for row, (image, category, box, area, score) in enumerate(columns)
    ]


def write_detections(path: Path, annotations: Annotations, detections: Detections) -> None:
    """COCO result format: image and category ids of the annotation file, [x, y, width, height] in original pixels."""
    rows = [
        {key: row[key] for key in ("image_id", "category_id", "bbox", "score")}
        for row in _detection_rows(annotations, detections)
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")


def _defined(value: float) -> float | None:
    return None if value < 0 else float(value)
