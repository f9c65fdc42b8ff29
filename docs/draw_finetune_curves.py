"""Draw the AP50 curves of docs/results.md from two finished runs of recipes/bccd_finetune.yaml.

python3 -m docs.draw_finetune_curves logs/<run with model.pretrained> logs/<run without>

Writes docs/finetune.png.
"""

import csv
import sys
from pathlib import Path

from detection.drawing.figures import plot_curves


def main() -> None:
    curves = {}
    for name, run in zip(("from Darknet weights", "from random weights"), sys.argv[1:], strict=True):
        with open(Path(run) / "results.csv", encoding="utf-8") as file:
            curves[name] = [(float(row["step"]), float(row["val/AP50"])) for row in csv.DictReader(file)]
    title = "yolo-fastest-1.1-xl on 205 images of blood cells"
    plot_curves(Path("docs/finetune.png"), curves, title, "optimizer step of 16 images", "AP50 on 87 images")


if __name__ == "__main__":
    main()
