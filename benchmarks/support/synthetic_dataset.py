"""Datasets of a given size for the benchmarks: photographs of noise, links to one of them, COCO annotation files."""

import json
import os
from pathlib import Path

import cv2
import numpy as np

TRAIN2017 = (118_287, 860_001)  # images and boxes
VAL2017 = (5_000, 36_781)
CLASSES = 80
WIDTH, HEIGHT = 640, 480
POLYGON = 24  # numbers in the outline of a box; with them a file is as large as COCO's


def photograph(seed: int) -> np.ndarray:
    """Shapes of every size and a little noise, RGB uint8 (480, 640, 3); 120 kB as JPEG of quality 90, as on COCO."""
    generator = np.random.default_rng(seed)
    image = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    for cells in (4, 12, 40, 120, 240):
        coarse = generator.uniform(-1, 1, (cells * 3 // 4, cells, 3)).astype(np.float32)
        image += cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC) * cells**-0.4
    image += generator.normal(0, 0.11, image.shape).astype(np.float32)
    return cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)  # type: ignore[call-overload]


def write_photographs(directory: Path, count: int, quality: int = 90) -> int:
    """0.jpg, 1.jpg, ...; returns their mean size in bytes."""
    directory.mkdir(parents=True)
    for number in range(count):
        options = [cv2.IMWRITE_JPEG_QUALITY, quality]
        cv2.imwrite(str(directory / f"{number:012}.jpg"), photograph(number)[..., ::-1], options)
    return sum(file.stat().st_size for file in directory.iterdir()) // count


def write_links(directory: Path, count: int, image: np.ndarray | None = None) -> None:
    """As many names as images for one JPEG: hard links, as many as the file system lets a file have, then a copy.

    Args:
        image: RGB uint8, (height, width, 3); None: a photograph.
    """
    directory.mkdir(parents=True)
    content = cv2.imencode(".jpg", (photograph(0) if image is None else image)[..., ::-1])[1].tobytes()
    first = None
    for number in range(count):
        path = directory / f"{number:012}.jpg"
        try:
            if first is None:
                raise OSError
            os.link(first, path)
        except OSError:
            path.write_bytes(content)
            first = path


def write_annotations(file: Path, num_images: int, num_boxes: int, seed: int = 0) -> None:
    """COCO's format with everything that COCO writes, outlines too: train2017 has 448 MB, this as many boxes in 400."""
    generator = np.random.default_rng(seed)
    image_of_box = np.sort(generator.integers(0, num_images, num_boxes))
    corner = generator.uniform(0, (WIDTH - 40, HEIGHT - 40), (num_boxes, 2))
    size = np.minimum(generator.gamma(1.2, 80, (num_boxes, 2)) + 4, (WIDTH, HEIGHT) - corner)
    categories = generator.integers(1, CLASSES + 1, num_boxes)
    outlines = generator.uniform(0, 1, (1000, POLYGON // 2, 2))
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", encoding="utf-8") as out:
        out.write('{"info": {"year": 2017}, "licenses": [], "images": [')
        for number in range(num_images):
            name = f"{number:012}.jpg"
            out.write(
                f'{", " if number else ""}{{"license": 3, "file_name": "{name}", "coco_url": '
                f'"http://images.cocodataset.org/train2017/{name}", "height": {HEIGHT}, "width": {WIDTH}, '
                f'"date_captured": "2013-11-14 11:18:45", "flickr_url": "http://farm9.staticflickr.com/{name}", '
                f'"id": {number + 1}}}'
            )
        out.write('], "annotations": [')
        for number in range(num_boxes):
            x, y, width, height = corner[number, 0], corner[number, 1], size[number, 0], size[number, 1]
            points = (outlines[number % 1000] * (width, height) + (x, y)).ravel().tolist()
            outline = ", ".join([f"{value:.2f}" for value in points])
            out.write(
                f'{", " if number else ""}{{"segmentation": [[{outline}]], "area": {width * height * 0.6:.4f}, '
                f'"iscrowd": 0, "image_id": {image_of_box[number] + 1}, '
                f'"bbox": [{x:.2f}, {y:.2f}, {width:.2f}, {height:.2f}], '
                f'"category_id": {categories[number]}, "id": {number + 1}}}'
            )
        names = [
            {"supercategory": "thing", "id": number, "name": f"class {number}"} for number in range(1, CLASSES + 1)
        ]
        out.write(f'], "categories": {json.dumps(names)}}}')
