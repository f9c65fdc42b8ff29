"""Run a model over a validation set and score its detections with the official COCO metric."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from detection.contract import Batch
from detection.data.annotations import Annotations
from detection.data.loaders import batch_to_device
from detection.evaluation.coco_metric import ClassAP, choose_backend, score
from detection.evaluation.detections import Detections
from detection.ops.letterbox import boxes_to_original
from detection.runtime.devices import synchronize


@dataclass(frozen=True)
class Evaluation:
    """The results of one pass over the validation set."""

    metrics: dict[str, float | None]  # the twelve official numbers; None where no ground-truth box defines them
    class_ap: ClassAP
    losses: dict[str, float]  # mean per image
    detections: Detections
    dropped: int  # detections that were non-finite numbers
    seconds: dict[str, float]  # those of `InferenceResult` and "metric"
    backend: str
    precision: np.ndarray  # (10, 101, C), see `Scores`


class InferenceResult(NamedTuple):
    """The detections of one process on its images, before they are scored."""

    detections: Detections  # non-finite ones too
    losses: dict[str, float]  # summed over the images
    seconds: dict[str, float]  # "load": waiting for the loader; "network"; "loss"; "nms": with the copy to the host


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
    """Run the model over every image of the loader and score its detections with the official COCO metric.

    Args:
        model: put into evaluation mode; the mode of every module is restored (a frozen backbone's is not the model's).
        criterion: for the validation loss; None: no losses.
        loader: every image once, in the dataset's order, with letterboxes.
        annotations: of the loader's dataset.
        backend: "auto", "arrays" or "pycocotools".
        on_batch: called after each batch; may raise to abandon the evaluation.
    """
    result = run_inference(model, criterion, postprocess, loader, device, autocast, on_batch)
    return compute_metrics([result], annotations, backend)


@torch.no_grad()
def run_inference(
    model: nn.Module,
    criterion: nn.Module | None,
    postprocess: nn.Module,
    loader: Iterable[Batch],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    on_batch: Callable[[], None] = lambda: None,
) -> InferenceResult:
    """Run the first half of `evaluate` on the images of the loader, which may be a share of the dataset."""
    were_training = [(module, module.training) for module in model.modules()]
    model.eval()
    parts: dict[str, list[np.ndarray]] = {"image_index": [], "boxes": [], "scores": [], "labels": []}
    totals: dict[str, float] = {}
    seconds = dict.fromkeys(("load", "network", "loss", "nms"), 0.0)
    started = time.perf_counter()

    def lap(part: str) -> None:
        nonlocal started
        synchronize(device)  # the host waits here anyway: NMS needs the number of candidates
        seconds[part] += time.perf_counter() - started
        started = time.perf_counter()

    try:
        for batch in loader:
            lap("load")
            images, targets = batch_to_device(batch, device)
            with autocast():
                outputs = model(images)
                lap("network")
                losses = criterion(outputs, targets) if criterion else {}
            for name, value in losses.items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(images)
            lap("loss")
            predictions = postprocess(outputs)
            counts = [len(image["scores"]) for image in predictions]
            # All images at once: the host waits for the device at each copy.
            boxes, scores, labels = (
                torch.cat([image[name] for image in predictions]).cpu() for name in ("boxes", "scores", "labels")
            )
            cuts = zip(boxes.split(counts), batch["letterboxes"], strict=True)
            original = torch.cat([boxes_to_original(of_image, letterbox) for of_image, letterbox in cuts])
            # Clipped to the image, an infinite box would become a finite one.
            original[~boxes.isfinite().all(dim=1)] = torch.nan
            parts["image_index"].append(np.repeat(batch["indices"].numpy(), counts))
            parts["boxes"].append(original.double().numpy())
            parts["scores"].append(scores.double().numpy())
            parts["labels"].append(labels.numpy())
            lap("nms")
            on_batch()
    finally:
        for module, was_training in were_training:
            module.training = was_training
    return InferenceResult(Detections(**join_arrays(parts)), totals, seconds)


def run_finder(
    find: Callable[[Sequence[Any]], Sequence[Mapping[str, torch.Tensor]]],
    loader: Iterable[Sequence[Any]],
    on_batch: Callable[[], None] = lambda: None,
) -> InferenceResult:
    """Run the first half of `evaluate` where the detections of an image come from several looks at it; no losses.

    Args:
        find: images of the loader to their detections on the CPU: boxes (K, 4) xyxy in original pixels, scores and
            labels (K,).
        loader: every image once, in the dataset's order, as lists of items with an `index`.
        on_batch: as in `evaluate`.
    """
    parts: dict[str, list[np.ndarray]] = {"image_index": [], "boxes": [], "scores": [], "labels": []}
    seconds = dict.fromkeys(("load", "network", "loss", "nms"), 0.0)
    started = time.perf_counter()
    for images in loader:
        loaded = time.perf_counter()
        for image, found in zip(images, find(images), strict=True):
            parts["image_index"].append(np.full(len(found["scores"]), image.index))
            parts["boxes"].append(found["boxes"].double().numpy())
            parts["scores"].append(found["scores"].double().numpy())
            parts["labels"].append(found["labels"].numpy())
        seconds["load"] += loaded - started
        started = time.perf_counter()
        seconds["network"] += started - loaded
        on_batch()
    return InferenceResult(Detections(**join_arrays(parts)), {}, seconds)


def compute_metrics(shares: Sequence[InferenceResult], annotations: Annotations, backend: str = "auto") -> Evaluation:
    """Run the second half of `evaluate`: join the shares of all processes and score them.

    Args:
        shares: one per process, together every image once.
    """
    started = time.perf_counter()
    parts = [vars(share.detections) for share in shares]
    joined = join_arrays({name: [part[name] for part in parts] for name in parts[0]})
    if len(shares) > 1:  # the order of a single process
        order = np.argsort(joined["image_index"], kind="stable")
        joined = {name: array[order] for name, array in joined.items()}
    detections, dropped = drop_non_finite(Detections(**joined))
    backend = choose_backend(backend)
    scores = score(annotations, detections, backend)
    seconds = {part: max(share.seconds[part] for share in shares) for part in shares[0].seconds}
    seconds["metric"] = time.perf_counter() - started
    names = dict.fromkeys(name for share in shares for name in share.losses)
    losses = {name: sum(share.losses.get(name, 0.0) for share in shares) / len(annotations) for name in names}
    return Evaluation(scores.metrics, scores.class_ap, losses, detections, dropped, seconds, backend, scores.precision)


def join_arrays(parts: dict[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
    """Join the parts of each field of `Detections`; no part (a process without an image) gives an empty array."""
    empty = {"boxes": np.zeros((0, 4)), "scores": np.zeros(0)}
    return {
        name: np.concatenate(arrays) if arrays else empty.get(name, np.zeros(0, np.int64))
        for name, arrays in parts.items()
    }


def drop_non_finite(detections: Detections) -> tuple[Detections, int]:
    """Remove detections with a NaN or infinite number: pycocotools counts a NaN box as a perfect match."""
    finite = np.isfinite(detections.boxes).all(axis=1) & np.isfinite(detections.scores)
    return detections if finite.all() else detections.take(finite), int((~finite).sum())
