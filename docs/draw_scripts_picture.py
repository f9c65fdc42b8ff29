"""Draw the README's strip of what the scripts draw, from a finished quickstart run.

python3 -m docs.draw_scripts_picture logs/<run>

Writes docs/scripts.png: targets of an image by visualize_batch.py (of step 0, its second image: the public-domain
rocket), precision over recall and confusion by validation.py, curves by compare_runs.py. About a minute on 2 CPU cores.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np

from detection.data.image_file import read_image
from detection.drawing.boxes import save_png

WIDTH = 1400  # pixels of the picture
ROWS, COLUMNS = 3, 3  # images and levels in targets.png


def main() -> None:
    run = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as name:
        target = Path(name)
        for script, *arguments in (
            ("visualize_batch.py", "--config", "recipes/quickstart.yaml", "--targets", "--output", target / "batch"),
            ("validation.py", "--weights", run / "best.pt", "--output", target / "validation"),
            ("compare_runs.py", run, "--output", target / "runs"),
        ):
            subprocess.run([sys.executable, script, *map(str, arguments)], check=True)
        targets = read_image(target / "batch" / "targets.png")
        height, width = targets.shape[0] // ROWS, targets.shape[1] // COLUMNS
        pictures = [
            targets[height : 2 * height, : 2 * width],
            read_image(target / "validation" / "precision_recall.png"),
            read_image(target / "validation" / "confusion_matrix.png"),
            read_image(target / "runs" / "compare.png"),
        ]
    save_png(Path("docs/scripts.png"), np.vstack([row_of(*pictures[:2]), row_of(*pictures[2:])]))


def row_of(*pictures: np.ndarray) -> np.ndarray:
    """Pictures beside one another, of one height, on white, WIDTH wide together."""
    height = round(WIDTH / sum(picture.shape[1] / picture.shape[0] for picture in pictures))
    sizes = [(round(picture.shape[1] * height / picture.shape[0]), height) for picture in pictures]
    row = np.hstack(
        [cv2.resize(picture, size, interpolation=cv2.INTER_AREA) for picture, size in zip(pictures, sizes, strict=True)]
    )
    row = row[:, :WIDTH]  # widths are rounded
    return cv2.copyMakeBorder(row, 6, 6, 0, WIDTH - row.shape[1], cv2.BORDER_CONSTANT, value=(255, 255, 255))


if __name__ == "__main__":
    main()
