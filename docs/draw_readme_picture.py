"""Draw the README's picture from a finished quickstart run: ground truth beside detections.

python3 -m docs.draw_readme_picture logs/<run>

Writes docs/quickstart.png. Only digits on photographs that are CC0 or of no known copyright (docs/data_sources.md).
"""

import json
import sys
from pathlib import Path

import numpy as np

from detection.data.annotations import load_annotations
from detection.data.image_file import read_image
from detection.drawing.boxes import ground_truth_beside_detections, make_grid, save_png

PHOTOGRAPHS = ("chelsea", "coins", "grass")
THRESHOLD = 0.5
PICTURES = 4


def main() -> None:
    root, run = Path("data/digits"), Path(sys.argv[1])
    content = json.loads((root / "annotations" / "instances_val.json").read_text(encoding="utf-8"))
    annotations = load_annotations(root / "annotations" / "instances_val.json")
    detections = json.loads((run / "detections.json").read_text(encoding="utf-8"))
    label_of_id = {number: label for label, number in enumerate(annotations.categories.ids)}
    chosen = [index for index, image in enumerate(content["images"]) if image["photograph"] in PHOTOGRAPHS][:PICTURES]
    pictures = []
    for index in chosen:
        rows = slice(annotations.first_box[index], annotations.first_box[index + 1])
        number = annotations.image_ids[index]
        found = [row for row in detections if row["image_id"] == number and row["score"] >= THRESHOLD]
        boxes = np.array([row["bbox"] for row in found]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        pictures.append(
            ground_truth_beside_detections(
                read_image(root / "val" / annotations.file_name(index)),
                annotations.boxes[rows],
                annotations.labels[rows],
                boxes,
                np.array([label_of_id[row["category_id"]] for row in found], dtype=int),
                np.array([row["score"] for row in found]),
                annotations.categories.names,
            )
        )
    save_png(Path("docs/quickstart.png"), make_grid(pictures, columns=2))


if __name__ == "__main__":
    main()
