"""Small datasets in every format for the tests of convert_dataset.py, and what it wrote."""

import json
import struct
import zlib
from pathlib import Path
from typing import Any

from PIL import Image

from tests.support.pictures import oriented


def save(path: Path, width: int = 10, height: int = 20, orientation: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if width * height > 10**8:  # the header alone, which is all that is read
        chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT")
        packed = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
        return path
    Image.new("RGB", (width, height)).save(path, exif=oriented(orientation))
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def voc_object(name: str, box: tuple[Any, ...], rest: str = "") -> str:
    edges = "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name>{rest}<bndbox>{edges}</bndbox></object>"


def voc_xml(objects: str, width: int = 10, height: int = 20, filename: str = "a.jpg") -> str:
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation><filename>{filename}</filename>{size}{objects}</annotation>"


def coco_of(out: Path, split: str = "train") -> dict[str, Any]:
    return json.loads((out / "annotations" / f"instances_{split}.json").read_text())


def boxes_of(out: Path, split: str = "train") -> list[tuple[str, str, list[float]]]:
    """List (file name, class, bbox) of every annotation."""
    content = coco_of(out, split)
    names, images = names_in(content)
    return [(images[row["image_id"]], names[row["category_id"]], row["bbox"]) for row in content["annotations"]]


def tree(root: Path) -> dict[str, Any]:
    """Map every file below a directory to its content."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def coco_set(root: Path, boxes: list[tuple[int, list[float]]], size: tuple[int, int] = (10, 20), **more: Any) -> Path:
    """One image a.png in COCO's layout; categories 7 (dog) and 3 (cat)."""
    save(root / "train" / "a.png", *size)
    rows = [
        {"id": k, "image_id": 5, "category_id": category, "bbox": box, "area": 1, "iscrowd": 0, **more}
        for k, (category, box) in enumerate(boxes)
    ]
    content = {
        "images": [{"id": 5, "file_name": "a.png", "width": size[0], "height": size[1]}],
        "annotations": rows,
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    }
    write(root / "annotations" / "instances_train.json", json.dumps(content))
    return root


def lay_out(root: Path, files: dict[str, str]) -> Path:
    """Images (10 x 20) where the name says so, text elsewhere."""
    for name, text in files.items():
        (save(root / name) if name.endswith((".jpg", ".png")) else write(root / name, text))
    return root


def names_in(content: dict[str, Any]) -> tuple[dict[int, str], dict[int, str]]:
    """Class names and file names by id."""
    names = {category["id"]: category["name"] for category in content["categories"]}
    return names, {image["id"]: image["file_name"] for image in content["images"]}
