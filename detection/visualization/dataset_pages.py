"""Pages of dataset images in a grid, with ground truth alone or beside detections."""

import math
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from detection.data.coco import CocoDataset
from detection.drawing.boxes import draw_boxes, make_grid
from detection.errors import DataReadError, escape
from detection.evaluation.mistakes import Findings, draw_tile

PAGE_WIDTH = 1600  # pixels
LARGEST_TILE = 960  # pixels, longer side of an image on a page


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
                tqdm.write(escape(f"left out: {error.line}"))
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


def lay_out(tiles: list[np.ndarray], columns: int) -> np.ndarray:
    """Arrange tiles in rows, each as high as its highest tile, and columns as wide as the widest tile."""
    width = max(tile.shape[1] for tile in tiles)
    tiles = [np.pad(tile, ((0, 0), (0, width - tile.shape[1]), (0, 0)), constant_values=255) for tile in tiles]
    rows = [make_grid(tiles[first : first + columns], columns, padding=6) for first in range(0, len(tiles), columns)]
    gaps = [rows[0].shape[1] - row.shape[1] for row in rows]
    return np.vstack(
        [np.pad(row, ((0, 0), (0, gap), (0, 0)), constant_values=255) for row, gap in zip(rows, gaps, strict=True)]
    )
