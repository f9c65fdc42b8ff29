"""A detector without weights that finds what it can see: the bounding box of every blob of a colour.

It sees a cut object as a cut box, so what tiles and mirrored images must give is known by hand.
"""

from collections.abc import Callable

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from detection.contract import Detector, Geometry
from detection.inference.tiling import Tiling
from detection.inference.views import Viewer
from detection.ops.letterbox import Placement
from detection.runtime.devices import Machine

COLOURS = ((255, 0, 0), (0, 255, 0))  # of labels 0 and 1
SCORE = 0.9
Score = Callable[[int], float]


class Look(nn.Module):
    """Returns the images themselves as outputs, and keeps their sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []  # images, side of each batch

    def forward(self, images: Tensor) -> list[Tensor]:
        self.seen.append((len(images), images.shape[-1]))
        return [images]


class FindBlobs(nn.Module):
    """Boxes of the blobs; `score` gives a detection's score by the side of the network input."""

    def __init__(self, score: Score) -> None:
        super().__init__()
        self.score = score

    def forward(self, outputs: list[Tensor]) -> list[dict[str, Tensor]]:
        found = []
        for image in outputs[0].permute(0, 2, 3, 1).numpy():
            rows = []
            for label, colour in enumerate(COLOURS):
                mask = (np.abs(image.astype(int) - colour) < 128).all(axis=2).astype(np.uint8)
                _, _, stats, _ = cv2.connectedComponentsWithStats(mask)
                rows += [([x, y, x + w, y + h], label) for x, y, w, h, _ in stats[1:].tolist()]
            boxes = torch.tensor([box for box, _ in rows], dtype=torch.float32).reshape(-1, 4)
            labels = torch.tensor([label for _, label in rows], dtype=torch.int64)
            found.append({"boxes": boxes, "scores": torch.full((len(rows),), self.score(len(image))), "labels": labels})
        return found


def colour_viewer(
    size: int,
    tiling: Tiling | None = None,
    tta: bool = False,
    placement: Placement = "letterbox",
    score: Score = lambda side: SCORE,
    batch_size: int = 3,
) -> Viewer:
    """Viewer of a `Look` and `FindBlobs` with an input of `size` pixels, a multiple of 16."""
    geometry = Geometry(16, placement, interpolation="area", fill=(9, 9, 9))
    detector = Detector(Look(), None, FindBlobs(score), geometry)
    return Viewer(detector, Machine(torch.device("cpu")), size, batch_size, 0.45, 100, tiling, tta)


def paint(width: int, height: int, *boxes: tuple[int, int, int, int, int]) -> np.ndarray:
    """Draw an RGB image with filled boxes (x1, y1, x2, y2, label) on black."""
    image = np.zeros((height, width, 3), np.uint8)
    for x1, y1, x2, y2, label in boxes:
        image[y1:y2, x1:x2] = COLOURS[label]
    return image
