"""Pages of dataset images in a grid, with ground truth alone or beside detections."""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from tqdm import tqdm

from detection.data.coco import CocoDataset
from detection.drawing.boxes import CROWD_LABEL, draw_boxes, make_grid
from detection.errors import DataReadError
from detection.evaluation.matching import NO_GROUND_TRUTH
from detection.visualization.dataset_figures import printable
from detection.visualization.image_ranking import Findings

PAGE_WIDTH = 1600  # pixels
LARGEST_TILE = 960  # pixels, longer side of an image on a page
LONGEST_FILE_NAME = 30  # characters of a file name above its image


@dataclass
class Pages:
    """Pages of images in a given order; unreadable images are reported and left out."""

    dataset: CocoDataset
    order: np.ndarray  # positions of the images, (K,)
    per_page: int
    findings: Findings | None
    unreadable: dict[int, str]  # position of an image -> error message; extended by `draw`

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.per_page)

    def indices(self, page: int) -> list[int]:
        """List the positions of the images of a page."""
        return self.order[page * self.per_page : (page + 1) * self.per_page].tolist()

    def draw(self, page: int) -> np.ndarray:
        """Draw a page as RGB uint8 (H, W, 3)."""
        columns = max(1, round(math.sqrt(self.per_page * 4 / 3)))
        if self.findings is not None:
            columns = math.ceil(columns / 2)  # pairs are twice as wide
        side = min(PAGE_WIDTH // columns // (1 if self.findings is None else 2), LARGEST_TILE)
        tiles = []
        for index in self.indices(page):
            if index in self.unreadable:
                continue
            try:
                tiles.append(draw_tile(self.dataset, index, side, self.findings))
            except DataReadError as error:
                self.unreadable[index] = error.line
                tqdm.write(f"left out: {error.line}")
        if not tiles:
            blank = np.full((side // 2, PAGE_WIDTH, 3), 255, np.uint8)
            return draw_boxes(blank, np.zeros((0, 4)), np.zeros(0), [], title="no image of this page can be read")
        return lay_out(tiles, columns)

    def caption(self, page: int) -> str:
        """List the ids and files of the images of a drawn page."""
        annotations = self.dataset.annotations
        shown = [index for index in self.indices(page) if index not in self.unreadable]
        names = ", ".join(f"{annotations.image_ids[index]} ({annotations.file_name(index)})" for index in shown)
        return f"page {page + 1} of {len(self)}: images {names}"


def draw_tile(dataset: CocoDataset, index: int, side: int, findings: Findings | None) -> np.ndarray:
    """Draw an image with its ground truth and, with `findings`, its detections beside it.

    Args:
        index: position of the image in the dataset.
        side: longer side of the drawn image in pixels.

    Raises:
        DataReadError: the image cannot be read.
    """
    annotations = dataset.annotations
    names = [printable(name) for name in annotations.categories.names]
    image = dataset.load_image(index)
    factor = side / max(image.shape[:2])
    size = [max(1, round(length * factor)) for length in (image.shape[1], image.shape[0])]
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
    rows = np.arange(*annotations.first_box[index : index + 2])
    boxes = annotations.boxes[rows] * factor
    labels = np.where(annotations.crowd[rows], CROWD_LABEL, annotations.labels[rows])
    head = f"id {annotations.image_ids[index]}"
    if findings is None:
        file_name = printable(annotations.file_name(index))
        if len(file_name) > LONGEST_FILE_NAME:
            file_name = f"...{file_name[-LONGEST_FILE_NAME:]}"
        return draw_boxes(image, boxes, labels, names, title=f"{head}  {file_name}  {len(rows)} boxes")
    mine = np.flatnonzero(findings.detections.image_index == index)
    matches = findings.matches[mine]
    missed = ~np.isin(rows, matches) & ~annotations.crowd[rows]
    gt = draw_boxes(
        image,
        boxes,
        labels,
        names,
        title=f"{head}  ground truth: {(~annotations.crowd[rows]).sum()}, missed {missed.sum()}",
        notes=np.where(missed, "missed", "").tolist(),
    )
    found = draw_boxes(
        image,
        findings.detections.boxes[mine] * factor,
        findings.detections.labels[mine],
        names,
        findings.detections.scores[mine],
        title=f"detections: {len(mine)}, false {(matches == NO_GROUND_TRUTH).sum()}",
        notes=np.where(matches == NO_GROUND_TRUTH, "false", "").tolist(),
    )
    return make_grid([gt, found], columns=2, padding=2)


def lay_out(tiles: list[np.ndarray], columns: int) -> np.ndarray:
    """Arrange tiles in rows, each as high as its highest tile, and columns as wide as the widest tile."""
    width = max(tile.shape[1] for tile in tiles)
    tiles = [np.pad(tile, ((0, 0), (0, width - tile.shape[1]), (0, 0)), constant_values=255) for tile in tiles]
    rows = [make_grid(tiles[first : first + columns], columns, padding=6) for first in range(0, len(tiles), columns)]
    gaps = [rows[0].shape[1] - row.shape[1] for row in rows]
    return np.vstack(
        [np.pad(row, ((0, 0), (0, gap), (0, 0)), constant_values=255) for row, gap in zip(rows, gaps, strict=True)]
    )
