"""Compare an exported file with PyTorch on pictures and noise, at several batch and image sizes."""

import contextlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from detection.config.settings import DataSettings
from detection.data.digits import VALIDATION_PHOTOGRAPHS, load_photograph
from detection.data.image_file import read_image
from detection.data.image_places import open_images
from detection.data.resize import INTERPOLATIONS, resize_image
from detection.data.sources import find_source
from detection.errors import DataError, DataReadError, UserError
from detection.inference.exported_files import open_exported
from detection.inference.exported_model import Description
from detection.inference.weights import OpenedDetector
from detection.models.postprocess import DensePostprocess, FinalDetections

BATCHES = (1, 3)  # other than the traced batch size


@dataclass(frozen=True)
class Tolerance:
    """Allowed differences between an exported file and PyTorch."""

    logits: float  # absolute below 1, else relative
    boxes: float  # pixels; scaled up for coordinates outside the image
    scores: float
    unmatched: float  # share of final detections; rounding may change the decisions of NMS


FLOAT32 = Tolerance(logits=1e-3, boxes=0.05, scores=1e-4, unmatched=0.01)
FLOAT16 = Tolerance(logits=0.1, boxes=2.0, scores=0.03, unmatched=0.1)


class ComparisonFailed(UserError):
    """The outputs of the exported file differ from those of PyTorch."""


def compare_with_pytorch(opened: OpenedDetector, path: Path) -> list[str]:
    """Compare an exported file with the detector that it was exported from.

    Returns:
        Lines about what was compared and the largest differences, for the user.

    Raises:
        ComparisonFailed: a difference exceeds the tolerance.
    """
    file = open_exported(path)
    tolerance = FLOAT16 if file.description.half else FLOAT32
    compare = {"raw": compare_logits, "decoded": compare_decoded, "nms": compare_final}[file.description.output_kind]
    pictures, source = find_pictures(opened.settings.data)
    sizes = compared_sizes(file.description)
    largest: dict[str, float] = {}
    counts = np.zeros(2, np.int64)  # final detections with a partner, without
    for size, batch in itertools.product(sizes, BATCHES):
        images = make_batch(pictures, batch, size)
        with torch.no_grad():
            levels = opened.detector.model(images)
        found = compare(opened, levels, file(images), max(size), tolerance)
        counts += found.counts
        for name, value in found.largest.items():
            largest[name] = float(np.maximum(largest.get(name, 0.0), value))  # stays NaN

    pixels = ", ".join(f"{columns} x {rows}" for rows, columns in sizes)
    batches = " and ".join(map(str, BATCHES))
    parts = [f"{name} {value:.2g} (allowed {getattr(tolerance, name):g})" for name, value in largest.items()]
    if counts.any():
        largest["unmatched"] = counts[1] / counts.sum()
        parts.append(
            f"{counts[1]} of {counts.sum()} final detections without a partner (allowed {tolerance.unmatched:.0%})"
        )
    differences = f"largest differences: {', '.join(parts) or 'none, nothing was found'}"
    # "not <=" rather than ">", so that NaN fails
    if any(not value <= getattr(tolerance, name) for name, value in largest.items()):
        raise ComparisonFailed(f"the file does not compute what PyTorch does and is not kept; {differences}")
    return [f"{file.runtime} beside PyTorch on {source} and noise, batches of {batches}, {pixels} px", differences]


@dataclass(frozen=True)
class Differences:
    """Differences in one batch."""

    largest: dict[str, float]  # by the name of the tolerance
    counts: tuple[int, int] = (0, 0)  # final detections with a partner, without


def compare_logits(
    _: OpenedDetector, levels: list[Tensor], outputs: list[Tensor], __: int, ___: Tolerance
) -> Differences:
    """Largest difference of the raw outputs of all levels, relative where they are above 1."""
    pairs = zip(levels, outputs, strict=True)
    return Differences({"logits": max(_largest(raw, found, raw.abs().clamp(min=1)) for raw, found in pairs)})


def compare_decoded(
    opened: OpenedDetector, levels: list[Tensor], outputs: list[Tensor], side: int, _: Tolerance
) -> Differences:
    """Largest differences of the decoded boxes, relative to their scale, and of the scores."""
    boxes, scores = cast(DensePostprocess, opened.detector.postprocess).decode(levels)
    return Differences(
        {"boxes": _largest(boxes, outputs[0], _scale(boxes, side)), "scores": _largest(scores, outputs[1], 1)}
    )


def compare_final(
    opened: OpenedDetector, levels: list[Tensor], outputs: list[Tensor], side: int, tolerance: Tolerance
) -> Differences:
    """Match final detections per image and class, in both directions.

    A detection whose score is within the tolerance of the confidence threshold, or of the score at which a limit of its
    image cuts (`Selection`), needs no partner.
    """
    postprocess = cast(DensePostprocess, opened.detector.postprocess)
    threshold = opened.settings.evaluation.confidence_threshold
    largest, counts = {"boxes": 0.0, "scores": 0.0}, [0, 0]
    cuts = _candidate_cuts(postprocess, levels)
    for expected, found, cut in zip(postprocess(levels), FinalDetections()(outputs), cuts, strict=True):
        last = [each["scores"].amin().item() for each in (expected, found) if _is_full(postprocess, each)]
        minimum = max(threshold, cut, *last) + tolerance.scores
        for label in torch.cat([expected["labels"], found["labels"]]).unique():
            one, other = (_of_label(detections, label) for detections in (expected, found))
            score_gap = (one["scores"][:, None] - other["scores"][None]).abs()  # (K, K')
            boxes = one["boxes"][:, None]
            box_gap = ((boxes - other["boxes"][None]).abs() / _scale(boxes, side)).amax(-1)
            partners = (score_gap <= tolerance.scores) & (box_gap <= tolerance.boxes)
            for name, gap in (("boxes", box_gap), ("scores", score_gap)):
                nearest = gap.where(partners, torch.inf).amin(1) if partners.numel() else gap.new_zeros(0)
                largest[name] = max([largest[name], *nearest[nearest.isfinite()].tolist()])
            for has_partner, detections in ((partners.any(1), one), (partners.any(0), other)):
                needed = has_partner | (detections["scores"] > minimum)
                counts[0] += int(has_partner.sum())
                counts[1] += int((needed & ~has_partner).sum())
    return Differences(largest, (counts[0], counts[1]))


def _candidate_cuts(postprocess: DensePostprocess, levels: list[Tensor]) -> list[float]:
    """Score of each image's last candidate; 0 without a limit."""
    limit = postprocess.selection.max_candidates
    scores = postprocess.decode(levels)[1].flatten(1)
    if limit is None or scores.shape[1] <= limit:
        return [0.0] * len(scores)
    cuts: list[float] = scores.topk(limit, dim=1).values[:, -1].tolist()
    return cuts


def _is_full(postprocess: DensePostprocess, detections: dict[str, Tensor]) -> bool:
    """Whether the limit of detections per image was reached."""
    limit = postprocess.selection.max_per_image
    return limit is not None and 0 < limit <= len(detections["scores"])


def _of_label(detections: dict[str, Tensor], label: Tensor) -> dict[str, Tensor]:
    rows = detections["labels"] == label
    return {name: values[rows] for name, values in detections.items()}


def _scale(boxes: Tensor, side: int) -> Tensor:
    """Return the scale of the tolerance, 1 within the image: an untrained network may predict huge coordinates."""
    return (boxes.abs() / side).clamp(min=1)


def _largest(expected: Tensor, found: Tensor, scale: Tensor | int) -> float:
    difference = ((expected - found).abs() / scale).where(expected != found, 0.0)  # equal infinities too
    return float(difference.max())


def compared_sizes(description: Description) -> list[tuple[int, int]]:
    """List (height, width) in pixels to compare: the validation size and, if dynamic, two that are not square."""
    size, multiple = description.image_size, description.size_multiple
    smaller = max(size // 2 // multiple, 1) * multiple
    return [(size, size), (size + multiple, size), (smaller, size + multiple)][
        : None if description.dynamic_size else 1
    ]


def make_batch(pictures: list[np.ndarray], count: int, size: tuple[int, int]) -> Tensor:
    """Make a batch, uint8 (count, 3, height, width): the first picture, or the others followed by noise."""
    height, width = size
    shown = pictures[:1] if count == 1 else pictures[1:count]
    images = [resize_image(picture, width, height, INTERPOLATIONS["linear"]) for picture in shown]
    generator = np.random.default_rng(0)
    while len(images) < count:
        images.append(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy())


def find_pictures(data: DataSettings) -> tuple[list[np.ndarray], str]:
    """Load pictures for the largest batch: validation images if there are any, else photographs of installed packages.

    Returns:
        RGB uint8 pictures (H, W, 3), and their origin for the user.
    """
    pictures: list[np.ndarray] = []
    with contextlib.suppress(DataError):
        directory = find_source(data, "validation").image_directory()
        images = open_images(directory, data.follow_links)
        for name in images.names()[: 2 * max(BATCHES)]:
            with contextlib.suppress(DataReadError):
                pictures.append(read_image(images.locate(name)))
        if len(pictures) >= max(BATCHES):
            return pictures[: max(BATCHES)], f"images of {directory}"
    photographs = list(VALIDATION_PHOTOGRAPHS.items())[: max(BATCHES)]
    source = f"photographs of installed packages ({', '.join(name for name, _ in photographs)})"
    return [load_photograph(*place) for _, place in photographs], source
