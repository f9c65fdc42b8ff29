"""Draw the README's picture from a finished run on the blood cells: ground truth beside detections.

python3 -m docs.draw_readme_picture logs/<run> DIRECTORY_OF_BCCD_IN_COCO_FORMAT

Writes docs/blood_cells.jpg. BCCD is under the MIT licence (docs/data_sources.md).
"""

import json
import sys
from pathlib import Path

import numpy as np

from detection.data.annotations import load_annotations
from detection.data.image_file import read_image
from detection.drawing.boxes import ground_truth_beside_detections, make_grid, save_jpeg

THRESHOLD = 0.4
PICTURES = (40, 62)  # of the validation set


def main() -> None:
    run, root = Path(sys.argv[1]), Path(sys.argv[2])
    annotations = load_annotations(root / "annotations" / "instances_val.json")
    detections = json.loads((run / "detections.json").read_text(encoding="utf-8"))
    label_of_id = {number: label for label, number in enumerate(annotations.categories.ids)}
    pictures = []
    for index in PICTURES:
        rows = slice(annotations.first_box[index], annotations.first_box[index + 1])
        number = annotations.image_ids[index]
        shown = [row for row in detections if row["image_id"] == number and row["score"] >= THRESHOLD]
        boxes = np.array([row["bbox"] for row in shown]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        pictures.append(
            ground_truth_beside_detections(
                read_image(root / "val" / annotations.file_name(index)),
                annotations.boxes[rows],
                annotations.labels[rows],
                boxes,
                np.array([label_of_id[row["category_id"]] for row in shown], dtype=int),
                np.array([row["score"] for row in shown]),
                annotations.categories.names,
            )
        )
    save_jpeg(Path("docs/blood_cells.jpg"), make_grid(pictures, columns=1))


if __name__ == "__main__":
    main()
