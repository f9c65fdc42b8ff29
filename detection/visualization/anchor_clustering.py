"""Anchors from the boxes of a dataset: k-means by IoU, and its refinement."""

import numpy as np
from tqdm import tqdm

SAMPLE = 20_000  # boxes of a clustering; all of them changes the mean IoU by less than 0.001

CHUNK = 16_384  # boxes at a time


def cluster_anchors(box_sizes: np.ndarray, count: int, seed: int = 0, iterations: int = 300) -> np.ndarray:
    """k-means of box shapes with the distance 1 - IoU.

    Args:
        box_sizes: (width, height) of boxes in one unit, (N, 2), all positive.
        count: number of anchors.
        seed: of the initial choice, which prefers shapes far from those chosen before (k-means++).

    Returns:
        Anchors sorted by area, (count, 2) float64, in the unit of `box_sizes`.

    Raises:
        ValueError: with fewer distinct shapes than anchors.

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
        # The median is less drawn to the few very large boxes than the mean; an empty cluster keeps its centre.
        centres = np.array(
            [np.median(sizes[members == k], axis=0) if (members == k).any() else centres[k] for k in range(count)]
        )
    return _by_area(centres)


def fit_anchors(
    box_sizes: np.ndarray, count: int, seed: int = 0, restarts: int = 10, known: np.ndarray | None = None
) -> np.ndarray:
    """The anchors with the highest mean best IoU that several clusterings and a refinement of each find.

    The clusterings work on at most `SAMPLE` boxes; the best result is refined on all of them.

    Args:
        box_sizes, count: as in `cluster_anchors`, with the same result and errors.
        seed: of the sample and of the first clustering; the others count up from it.
        restarts: number of clusterings.
        known: anchors in use, refined and compared too if they are as many: the result is hardly ever below them.
    """
    sizes = np.asarray(box_sizes, dtype=np.float64)
    sample = sizes
    if len(sizes) > SAMPLE:
        sample = sizes[np.random.default_rng(seed).choice(len(sizes), SAMPLE, replace=False)]
    found = []
    for number in tqdm(range(restarts), desc="clustering", leave=False, disable=None):
        # Few iterations suffice: the refinement goes on from where they end.
        found.append(refine_anchors(sample, cluster_anchors(sample, count, seed + number, iterations=30)))
    if known is not None and len(known) == count:
        found.append(refine_anchors(sample, known))
    best = max(found, key=lambda anchors: mean_best_iou(sample, anchors))
    return best if sample is sizes else refine_anchors(sizes, best)


def refine_anchors(
    box_sizes: np.ndarray, anchors: np.ndarray, step: float = 0.1, tolerance: float = 0.002
) -> np.ndarray:
    """Move anchors until none gains from being wider, narrower, higher or lower: the mean best IoU never falls.

    Needed because neither mean nor median of a cluster is the shape with the highest mean IoU to its members.

    Args:
        box_sizes: (width, height), (N, 2), all positive.
        anchors: (K, 2), in the same unit.
        step: first change of a side, as a share of it; halved for an anchor that stands still.
        tolerance: ends when all changes are smaller.

    Returns:
        Anchors sorted by area, (K, 2) float64.
    """
    sizes, anchors = np.asarray(box_sizes, dtype=np.float64), np.array(anchors, dtype=np.float64)
    directions = np.array([(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)])
    steps = np.full(len(anchors), step)
    while (steps >= tolerance).any():
        candidates = anchors[:, None] * np.exp(directions * steps[:, None, None])  # (K, 9, 2), staying first
        sums = np.zeros((len(anchors), len(directions)))
        for chunk in _chunks(sizes):
            nearest = _wh_iou(chunk, anchors).argmax(axis=1)
            for k in np.unique(nearest):
                sums[k] += _wh_iou(chunk[nearest == k], candidates[k]).sum(axis=0)
        gains = sums - sums[:, :1] > 1e-9 * len(sizes)  # not the noise of adding up
        best = np.where(gains.any(axis=1), sums.argmax(axis=1), 0)
        steps = np.where(best == 0, steps / 2, steps)
        anchors = candidates[np.arange(len(anchors)), best]
    return _by_area(anchors)


def best_ious(box_sizes: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """Shape IoU of each box with its best anchor; (N, 2), (K, 2), one unit, to (N,)."""
    sizes, anchors = np.asarray(box_sizes, dtype=np.float64), np.asarray(anchors, dtype=np.float64)
    return np.concatenate([_wh_iou(chunk, anchors).max(axis=1) for chunk in _chunks(sizes)])


def nearest_anchors(box_sizes: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """Index of the anchor with the highest shape IoU; (N, 2), (K, 2), one unit, to (N,)."""
    sizes, anchors = np.asarray(box_sizes, dtype=np.float64), np.asarray(anchors, dtype=np.float64)
    return np.concatenate([_wh_iou(chunk, anchors).argmax(axis=1) for chunk in _chunks(sizes)])


def best_side_ratios(box_sizes: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """How many times a side of the box is longer or shorter than the anchor's, for the anchor that fits best; (N,)."""
    sizes, anchors = np.asarray(box_sizes, dtype=np.float64), np.asarray(anchors, dtype=np.float64)
    differences = [np.abs(np.log(chunk[:, None] / anchors)).max(axis=2).min(axis=1) for chunk in _chunks(sizes)]
    return np.exp(np.concatenate(differences))


def mean_best_iou(box_sizes: np.ndarray, anchors: np.ndarray) -> float:
    """Mean over boxes of the shape IoU with the best anchor; (N, 2), (K, 2), one unit."""
    return float(best_ious(box_sizes, anchors).mean())


def _by_area(anchors: np.ndarray) -> np.ndarray:
    """Sorted; the narrower first of equal areas."""
    return anchors[np.lexsort((anchors[:, 0], anchors.prod(axis=1)))]


def _chunks(sizes: np.ndarray) -> list[np.ndarray]:
    """Pieces that stay in the processor's cache: the (N, K) tables of a large dataset would not fit the memory."""
    return np.split(sizes, range(CHUNK, len(sizes), CHUNK))


def _wh_iou(sizes: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """(N, 2), (K, 2) to (N, K)."""
    intersection = np.minimum(sizes[:, :1], anchors[:, 0]) * np.minimum(sizes[:, 1:], anchors[:, 1])
    return intersection / (sizes.prod(axis=1)[:, None] + anchors.prod(axis=1)[None] - intersection)
