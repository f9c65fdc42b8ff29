"""Small datasets of one line each: the files of a folder, with their text."""

import json
from pathlib import Path
from typing import Any

from PIL import Image


def box(name: str = "a", category: int = 1, number: int = 1, **keys: Any) -> dict[str, Any]:
    row = {"id": number, "image_id": 1, "category_id": category, "bbox": [1, 2, 10, 20], **keys}
    image = {"id": 1, "file_name": name, "width": 64, "height": 48}
    return {"images": [image], "annotations": [row], "categories": [{"id": 1, "name": "cell"}]}


def lay_out(root: Path, *names: str, content: dict[str, Any] | None = None) -> None:
    """Write files: pictures, JSON with one box on `x.png` (or this content), and text after a colon."""
    for name in names:
        path, _, text = name.partition(":")
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix.lower() in (".png", ".jpg"):
            Image.new("RGB", (64, 48)).save(file, format="PNG")
        else:
            file.write_text(text.replace("|", "\n") or json.dumps(content or box("x.png")), encoding="utf-8")


LINE = "0 0.5 0.5 0.5 0.5"
YOLO = ("images/x.png", f"labels/x.txt:{LINE}")
XML = (
    "<annotation><filename>x.png</filename><object><name>cell</name><difficult>1</difficult><bndbox>"
    "<xmin>3</xmin><ymin>5</ymin><xmax>9</xmax><ymax>8</ymax></bndbox></object></annotation>"
)
