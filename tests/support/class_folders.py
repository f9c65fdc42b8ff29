"""Folders of images, one per class."""

from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np


def write_folders(root: Path, counts: Mapping[str, int], width: int = 40, height: int = 20) -> Path:
    """Write PNG images whose colour tells their class, with noise; `counts` are images by class."""
    root.mkdir(parents=True, exist_ok=True)
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(number)
        for index in range(count):
            image = generator.integers(0, 60, (height, width, 3), dtype=np.uint8)
            image[..., number % 3] += 120
            cv2.imwrite(str(root / name / f"{index}.png"), image)
    return root
