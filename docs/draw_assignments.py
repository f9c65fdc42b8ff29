"""Draw docs/assignments.jpg: which cells rungs of the ladder assign, in one training image of BCCD.

python3 -m docs.draw_assignments "NAME=DIRECTORY"...

DIRECTORY is that of a `visualize_batch.py --targets train.batch_size=2` with recipes/bccd.yaml and the overlay of the
rung; for rungs that look at the predictions with `--weights` of such a run.
"""

import sys
from pathlib import Path

import cv2
import numpy as np

WIDTH, LABEL = 1000, 26  # pixels: of the picture, and the height of a rung's name


def main() -> None:
    rows = []
    for word in sys.argv[1:]:
        name, _, directory = word.rpartition("=")
        image = cv2.imread(str(Path(directory) / "targets.png"))
        image = image[: len(image) // 2]  # the first of the two images of the batch
        image = cv2.resize(image, (WIDTH, round(len(image) * WIDTH / image.shape[1])), interpolation=cv2.INTER_AREA)
        label = np.full((LABEL, WIDTH, 3), 255, np.uint8)
        cv2.putText(label, name, (4, LABEL - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (0, 0, 0), 1, cv2.LINE_AA)
        rows += [label, image]
    cv2.imwrite("docs/assignments.jpg", np.vstack(rows), [cv2.IMWRITE_JPEG_QUALITY, 80])


if __name__ == "__main__":
    main()
