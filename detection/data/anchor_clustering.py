"""Fit anchors to the boxes of a dataset: k-means with IoU, and local refinement."""

import numpy as np
from tqdm import tqdm

SAMPLE = 20_000  # boxes per clustering; more change the mean IoU by less than 0.001
# Mean IoU that new anchors must gain. Anchors fitted to COCO at 416 px gain 0.015 over the published ones without
# raising the AP (https://github.com/ultralytics/yolov3/pull/754).
SMALL_GAIN = 0.02
CHUNK = 16_384  # boxes per array operation


def cluster_anchors(box_sizes: np.ndarray, count: int, seed: int = 0, iterations: int = 300) -> np.ndarray:
    """Cluster box shapes by k-means with the distance 1 - IoU.

    Args:
        box_sizes: (width, height) of boxes in any unit, (N, 2), all positive.
        count: number of anchors.
        seed: of the initialisation, k-means++.
        iterations: maximum number of iterations.

    Returns:
        Anchors sorted by area, (count, 2) float64, in the unit of `box_sizes`.

    Raises:
        ValueError: there are fewer distinct shapes than anchors.

    Source: YOLOv2, section 2 "Dimension Clusters", https://arxiv.org/abs/1612.08242
    """
    sizes = np.asarray(box_sizes, dtype=np.float64)
    if len(np.unique(sizes, axis=0)) < count:
        raise ValueError(
            f"{count} anchors need at least {count} distinct box shapes, found {len(np.unique(sizes, axis=0))}"
        )
    generator = np.random.default_rng(seed)
    centres = sizes[[generator.integers(len(sizes))]]
    while len(centres) < count:
        distance = 1 - best_ious(sizes, centres)
        centres = np.vstack([centres, sizes[generator.choice(len(sizes), p=distance / distance.sum())]])
    members = np.full(len(sizes), -1)
    for _ in range(iterations):
        nearest = nearest_anchors(sizes, centres)
        if (nearest == members).all():
            break
        members = nearest
        # The median is more robust to a few very large boxes than the mean; an empty cluster keeps its centre.
        centres = np.array(
            [np.median(sizes[members == k], axis=0) if (members == k).any() else centres[k] for k in range(count)]
        )
    return _by_area(centres)


def fit_anchors(
    box_sizes: np.ndarray, count: int, seed: int = 0, restarts: int = 10, known: np.ndarray | None = None
) -> np.ndarray:
    """Cluster and refine several times and return the anchors with the highest mean best IoU.

    The clusterings use at most `SAMPLE` boxes; the best result is refined on all boxes.

    Args:
        box_sizes, count: as in `cluster_anchors`, with the same result and errors.
        seed: of the sample and the first clustering; the next ones use seed + 1, seed + 2, ...
        restarts: number of clusterings.
        known: current anchors, (K, 2); with K = `count` they are another starting point, so that the result is hardly
            ever worse.
    """
    sizes = np.asarray(box_sizes, dtype=np.float64)
    sample = sizes
    if len(sizes) > SAMPLE:
        sample = sizes[np.random.default_rng(seed).choice(len(sizes), SAMPLE, replace=False)]
    found = []
    for number in tqdm(range(restarts), desc="clustering", leave=False, disable=None):
        # A few iterations suffice, because the refinement continues from their result.
        found.append(refine_anchors(sample, cluster_anchors(sample, count, seed + number, iterations=30)))
    if known is not None and len(known) == count:
        found.append(refine_anchors(sample, known))
    best = max(found, key=lambda anchors: mean_best_iou(sample, anchors))
    return best if sample is sizes else refine_anchors(sizes, best)


def refine_anchors(
    box_sizes: np.ndarray, anchors: np.ndarray, step: float = 0.1, tolerance: float = 0.002
) -> np.ndarray:
    """Hill-climb the sides of each anchor; the mean best IoU never decreases.

    Needed because neither the mean nor the median of a cluster maximises the mean IoU with its members.

    Args:
        box_sizes: (width, height), (N, 2), all positive.
        anchors: (K, 2), in the same unit.
        step: initial relative change of a side; halved for an anchor that no change improves.
        tolerance: stop when the steps of all anchors are smaller.

    Returns:
        Anchors sorted by area, (K, 2) float64.
    """
    sizes, anchors = np.asarray(box_sizes, dtype=np.float64), np.array(anchors, dtype=np.float64)
    directions = np.array([(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)])
    steps = np.full(len(anchors), step)
    while (steps >= tolerance).any():
        candidates = anchors[:, None] * np.exp(directions * steps[:, None, None])  # (K, 9, 2), the first is unchanged
        sums = np.zeros((len(anchors), len(directions)))
        for chunk in _chunks(sizes):
            nearest = _wh_iou(chunk, anchors).argmax(axis=1)
            for k in np.unique(nearest):
                sums[k] += _wh_iou(chunk[nearest == k], candidates[k]).sum(axis=0)
        gains = sums - sums[:, :1] > 1e-9 * len(sizes)  # above the rounding error of the sums
        best = np.where(gains.any(axis=1), sums.argmax(axis=1), 0)
        steps = np.where(best == 0, steps / 2, steps)
        anchors = candidates[np.arange(len(anchors)), best]
    return _by_area(anchors)


def best_ious(box_sizes: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """Compute the shape IoU of each box (N, 2) with its best anchor (K, 2), (N,)."""
    sizes, anchors = np.asarray(box_sizes, dtype=np.float64), np.asarray(anchors, dtype=np.float64)
    return np.concatenate([_wh_iou(chunk, anchors).max(axis=1) for chunk in _chunks(sizes)])


def nearest_anchors(box_sizes: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """Find the anchor (K, 2) with the highest shape IoU for each box (N, 2): indices, (N,)."""
    sizes, anchors = np.asarray(box_sizes, dtype=np.float64), np.asarray(anchors, dtype=np.float64)
    return np.concatenate([_wh_iou(chunk, anchors).argmax(axis=1) for chunk in _chunks(sizes)])


def best_side_ratios(box_sizes: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """Compute the larger side ratio (>= 1) of each box (N, 2) to the anchor (K, 2) that minimises it, (N,)."""
    sizes, anchors = np.asarray(box_sizes, dtype=np.float64), np.asarray(anchors, dtype=np.float64)
    differences = [np.abs(np.log(chunk[:, None] / anchors)).max(axis=2).min(axis=1) for chunk in _chunks(sizes)]
    return np.exp(np.concatenate(differences))


def mean_best_iou(box_sizes: np.ndarray, anchors: np.ndarray) -> float:
    """Compute the mean over boxes (N, 2) of the shape IoU with their best anchor (K, 2)."""
    return float(best_ious(box_sizes, anchors).mean())


def _by_area(anchors: np.ndarray) -> np.ndarray:
    """Sort anchors by area, then width."""
    return anchors[np.lexsort((anchors[:, 0], anchors.prod(axis=1)))]


def _chunks(sizes: np.ndarray) -> list[np.ndarray]:
    """Split boxes so that their (n, K) tables fit in the processor's cache."""
    return np.split(sizes, range(CHUNK, len(sizes), CHUNK))


def _wh_iou(sizes: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """Compute pairwise shape IoUs of boxes (N, 2) and anchors (K, 2), (N, K)."""
    intersection = np.minimum(sizes[:, :1], anchors[:, 0]) * np.minimum(sizes[:, 1:], anchors[:, 1])
    return intersection / (sizes.prod(axis=1)[:, None] + anchors.prod(axis=1)[None] - intersection)
