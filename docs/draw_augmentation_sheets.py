"""Draw the sheets of augmented training images and of letterboxed validation images with visualize_batch.py.

python3 -m docs.draw_augmentation_sheets

Writes docs/train_aug.png and docs/val_aug.png: the built-in digits with the augmentation of args.yaml. The step is one
whose photographs are all in the public domain, CC0 or of no known copyright (docs/data_sources.md). The built-in images
are square, so those of the second sheet are first cut to 8:5 and 5:8.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from detection.data.annotations import load_annotations
from detection.data.image_file import read_image
from detection.drawing.boxes import save_png

DIGITS = Path("data/digits")
PHOTOGRAPHS = ("chelsea", "coins", "grass", "grace_hopper")  # public domain, CC0, no known copyright
SETTINGS = ("data.builtin=digits", "train.image_size=192", "train.batch_size=8", "evaluation.image_size=192")
STEP = 93  # its eight images show photographs that may be published
LONG, SHORT = 320, 200  # pixels
SMALLEST_SHARE = 0.3  # of a box


def main() -> None:
    draw("train_aug", f"data.root={DIGITS}", *SETTINGS, "--step", str(STEP))
    with tempfile.TemporaryDirectory() as directory:
        cut_validation_images(Path(directory))
        draw("val_aug", f"data.root={directory}", *SETTINGS[1:], "--split", "val")


def draw(name: str, *arguments: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run([sys.executable, "visualize_batch.py", *arguments, "--output", directory], check=True)
        Image.open(Path(directory) / "batch.png").save(f"docs/{name}.png", optimize=True)  # smaller than OpenCV's


def cut_validation_images(root: Path) -> None:
    """Two images of each photograph, one wide and one high; boxes are cut, those mostly outside left out."""
    file = DIGITS / "annotations" / "instances_val.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    annotations = load_annotations(file)
    new = {"images": [], "annotations": [], "categories": content["categories"]}
    of_photograph = {
        name: [index for index, image in enumerate(content["images"]) if image["photograph"] == name][:2]
        for name in PHOTOGRAPHS
    }
    for number in (0, 1):
        width, height = (LONG, SHORT) if number == 0 else (SHORT, LONG)
        for index in (found[number] for found in of_photograph.values()):
            left, top = (LONG - width) // 2, (LONG - height) // 2
            image = read_image(DIGITS / "val" / annotations.file_name(index))[top : top + height, left : left + width]
            name, new_id = annotations.file_name(index).replace(".jpg", ".png"), len(new["images"]) + 1
            save_png(root / "val" / name, image)
            new["images"].append({"id": new_id, "file_name": name, "width": width, "height": height})
            for row in content["annotations"]:
                x, y, w, h = row["bbox"]
                x1, y1 = max(x - left, 0), max(y - top, 0)
                x2, y2 = min(x + w - left, width), min(y + h - top, height)
                seen = max(x2 - x1, 0) * max(y2 - y1, 0)
                if row["image_id"] == annotations.image_ids[index] and seen >= SMALLEST_SHARE * w * h:
                    new["annotations"].append({**row, "image_id": new_id, "bbox": [x1, y1, x2 - x1, y2 - y1]})
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_val.json").write_text(json.dumps(new), encoding="utf-8")


if __name__ == "__main__":
    main()
