"""One dataset in eleven formats and layouts, as the programs that write them lay them out, and its first losses."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from detection.data.workers import prepare_process
from detection.training.automatic import load_run_settings
from detection.training.run import Run, join_ranks

NAMES = ("rose", "ant", "cell")  # not in alphabetical order


class Split(NamedTuple):
    """Content of a COCO file, and the directory of its images."""

    content: dict[str, Any]
    images: Path

    @property
    def names(self) -> list[str]:
        return [entry["name"] for entry in sorted(self.content["categories"], key=lambda entry: entry["id"])]

    def files(self) -> list[str]:
        return [entry["file_name"] for entry in self.content["images"]]

    def rows(self, entry: dict[str, Any]) -> list[tuple[int, list[float]]]:
        """Label and bbox of the boxes of an image."""
        labels = {number: label for label, number in enumerate(sorted(c["id"] for c in self.content["categories"]))}
        rows = self.content["annotations"]
        return [(labels[row["category_id"]], row["bbox"]) for row in rows if row["image_id"] == entry["id"]]


Splits = dict[str, Split]  # "train", perhaps "val"


def draw_splits(root: Path, **counts: int) -> Splits:
    """Noise with three boxes of whole pixels on each image; image ids begin from 1 in every split."""
    generator = np.random.default_rng(1)
    splits: Splits = {}
    for split, count in counts.items():
        (root / split).mkdir(parents=True)
        images, rows = [], []
        for number in range(1, count + 1):
            name = f"{split}_{number:02}.png"
            Image.fromarray(generator.integers(0, 255, (48, 64, 3), np.uint8)).save(root / split / name)
            images.append({"id": number, "file_name": name, "width": 64, "height": 48})
            for _ in range(3):
                x, y, width, height = (int(value) for value in generator.integers(1, 24, 4))
                rows.append({"id": len(rows) + 1, "image_id": number, "category_id": int(generator.integers(1, 4)),
                             "bbox": [x, y, width, height], "area": width * height, "iscrowd": 0})  # fmt: skip
        categories = [{"id": number, "name": name} for number, name in enumerate(NAMES, start=1)]
        splits[split] = Split({"images": images, "annotations": rows, "categories": categories}, root / split)
    return splits


def read_splits(root: Path, *names: str) -> Splits:
    """Splits of a dataset in COCO's layout."""
    return {
        name: Split(json.loads((root / "annotations" / f"instances_{name}.json").read_text()), root / name)
        for name in names
    }


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def link(split: Split, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in split.files():
        try:
            os.link(split.images / name, folder / name)
        except OSError:
            (folder / name).write_bytes((split.images / name).read_bytes())


def write_coco(path: Path, split: Split, prefix: str = "") -> None:
    images = [entry | {"file_name": prefix + entry["file_name"]} for entry in split.content["images"]]
    write(path, json.dumps(split.content | {"images": images}))


def write_yolo(folder: Path, split: Split) -> None:
    for entry in split.content["images"]:
        lines = []
        for label, (x, y, width, height) in split.rows(entry):
            shares = ((x + width / 2) / entry["width"], (y + height / 2) / entry["height"])
            shares += (width / entry["width"], height / entry["height"])
            lines.append(f"{label} " + " ".join(f"{share:.14f}" for share in shares))
        write(folder / f"{Path(entry['file_name']).stem}.txt", "\n".join(lines) + "\n")


def coco(root: Path, splits: Splits) -> None:
    for name, split in splits.items():
        write_coco(root / "annotations" / f"instances_{name}.json", split)
        link(split, root / name)


def yolo(root: Path, splits: Splits) -> None:
    for name, split in splits.items():
        write_yolo(root / "labels" / name, split)
        link(split, root / "images" / name)
    write(root / "data.yaml", yaml(splits, "images/{}"))


def yaml(splits: Splits, place: str, valid: str = "val") -> str:
    lines = [f"{name}: {place.format({'val': valid}.get(name, name))}" for name in splits]
    return "\n".join([*lines, f"nc: {len(splits['train'].names)}", f"names: {splits['train'].names}", ""])


def yolo_folders(root: Path, splits: Splits) -> None:
    for name, split in splits.items():
        write_yolo(root / name / "labels", split)
        link(split, root / name / "images")
    write(root / "classes.txt", "\n".join(splits["train"].names))


def darknet_voc(root: Path, splits: Splits) -> None:
    """As scripts/voc_label.py of Darknet: lists of the paths of another machine, labels/ beside JPEGImages/."""
    for name, split in splits.items():
        link(split, root / "VOC2007" / "JPEGImages")
        write_yolo(root / "VOC2007" / "labels", split)
        paths = [f"/home/somebody/VOCdevkit/VOC2007/JPEGImages/{file}\n" for file in split.files()]
        write(root / f"2007_{name}.txt", "".join(paths))
    write(root / "voc.names", "\n".join(splits["train"].names) + "\n")
    keys = {"train": "train", "val": "valid"}
    lists = [f"{keys[name]}  = /home/somebody/2007_{name}.txt" for name in splits]
    write(root / "voc.data", "\n".join(["classes= 3", *lists, "names = data/voc.names", "backup = backup", ""]))


def voc(root: Path, splits: Splits) -> None:
    for name, split in splits.items():
        link(split, root / "JPEGImages")
        write(root / "ImageSets" / "Main" / f"{name}.txt", "".join(f"{Path(file).stem}\n" for file in split.files()))
        for entry in split.content["images"]:
            objects = ""
            for label, (x, y, width, height) in split.rows(entry):
                edges = {"xmin": x + 1, "ymin": y + 1, "xmax": x + width, "ymax": y + height}
                box = "".join(f"<{edge}>{value}</{edge}>" for edge, value in edges.items())
                objects += f"<object><name>{split.names[label]}</name><bndbox>{box}</bndbox></object>"
            size = f"<size><width>{entry['width']}</width><height>{entry['height']}</height></size>"
            text = f"<annotation><filename>{entry['file_name']}</filename>{size}{objects}</annotation>"
            write(root / "Annotations" / f"{Path(entry['file_name']).stem}.xml", text)
    labels = "".join(f"{name}:128,0,0::\n" for name in ("background", *splits["train"].names))
    write(root / "labelmap.txt", f"# label:color_rgb:parts:actions\n{labels}")


def cvat_coco(root: Path, splits: Splits) -> None:
    write_coco(root / "annotations" / "instances_default.json", splits["train"])
    link(splits["train"], root / "images" / "default")


def cvat_yolo(root: Path, splits: Splits) -> None:
    keys = {"train": "train", "val": "valid"}
    for name, split in splits.items():
        folder = f"obj_{keys[name]}_data"
        link(split, root / folder)
        write_yolo(root / folder, split)
        write(root / f"{keys[name]}.txt", "".join(f"data/{folder}/{file}\n" for file in split.files()))
    write(root / "obj.names", "\n".join(splits["train"].names) + "\n")
    lists = "".join(f"{keys[name]} = data/{keys[name]}.txt\n" for name in splits)
    write(root / "obj.data", f"classes = 3\n{lists}names = data/obj.names\nbackup = backup/\n")


def label_studio(root: Path, splits: Splits) -> None:
    write_coco(root / "result.json", splits["train"], "images/")
    link(splits["train"], root / "images")


def fiftyone(root: Path, splits: Splits) -> None:
    write_coco(root / "labels.json", splits["train"])
    link(splits["train"], root / "data")


def roboflow_coco(root: Path, splits: Splits) -> None:
    for name, split in splits.items():
        folder = root / {"val": "valid"}.get(name, name)
        write_coco(folder / "_annotations.coco.json", split)
        link(split, folder)
    write(root / "README.roboflow.txt", "exported\n")


def roboflow_yolo(root: Path, splits: Splits) -> None:
    for name, split in splits.items():
        folder = root / {"val": "valid"}.get(name, name)
        write_yolo(folder / "labels", split)
        link(split, folder / "images")
    write(root / "data.yaml", yaml(splits, "../{}/images", "valid") + "roboflow:\n  license: CC BY 4.0\n")


Write = Callable[[Path, Splits], None]
TWO_SPLITS: dict[str, Write] = {
    function.__name__: function
    for function in (coco, yolo, yolo_folders, darknet_voc, voc, cvat_yolo, roboflow_coco, roboflow_yolo)
}
FORMATS = TWO_SPLITS | {function.__name__: function for function in (cvat_coco, label_studio, fiftyone)}
# What the plan calls them
KINDS = {
    **{"yolo": "YOLO data.yaml", "yolo_folders": "YOLO folders", "darknet_voc": "Darknet voc.data"},
    **{"voc": "Pascal VOC XML", "cvat_yolo": "Darknet obj.data", "roboflow_yolo": "YOLO data.yaml"},
}


def first_losses(*words: str) -> tuple[dict[str, float], int, list[str]]:
    """The losses of the first step, the number of training images, and the plan's lines about the data."""
    prepare_process()
    settings, _ = load_run_settings([], [*words, "data.num_workers=0"])  # the plan for own data
    run = Run(settings, join_ranks(settings), fresh=True)
    batch = next(run.training_batches(0, 1))
    losses = run.criterion(run.detector.model.train()(batch["images"]), batch)
    values = {name: float(value) for name, value in losses.items()}
    return values, len(run.training_set), run.training_set.source_lines
