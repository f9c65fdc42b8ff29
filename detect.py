"""Boxes on images: draws what trained weights find.

python detect.py --weights logs/240224-211713_LambdaLR/best.pt photo.jpg folder/
python detect.py --weights my.weights --cfg my.cfg --names my.names photo.jpg evaluation.visualization_threshold=0.3

Takes image files and folders (all images in them, not below). Writes each picture with its boxes and detections.json
(boxes x1, y1, x2, y2 in pixels of the image) into a new directory below logs/. A damaged image is named and left out.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from detection.habana_environment import prepare_habana

if __name__ == "__main__":
    prepare_habana(sys.argv[1:])  # torch reads the environment when it is imported

import numpy as np
import torch
from tqdm import tqdm

from detection.command_line import Parser
from detection.data.coco import read_image
from detection.data.loaders import collate_samples
from detection.data.transforms import Transform
from detection.devices import autocast, choose_precision, open_device
from detection.drawing import draw_boxes, save_png
from detection.errors import DataError, DataReadError, OutputError, exit_with_message
from detection.postprocessing import boxes_to_original
from detection.run_loggers import new_run_directory
from detection.weights import OpenedDetector, open_command_line

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
SETTING = re.compile(r"[a-z]\w*(\.\w+)*=")


def main() -> None:
    parser = Parser("detect.py", __doc__)
    parser.add_weights()
    parser.add_settings()
    parser.add_argument("--output", type=Path, metavar="DIRECTORY", help="where results go (default: new, below logs/)")
    arguments = parser.parse_intermixed_args()
    words = [word for word in arguments.settings if SETTING.match(word) and not Path(word).exists()]
    files = find_images([Path(word) for word in arguments.settings if word not in words])
    opened = open_command_line(arguments, words)
    settings = opened.settings
    directory = new_run_directory(Path(settings.run.logs_path), f"detect_{arguments.weights.stem}", arguments.output)
    try:
        rows = detect_and_draw(opened, files, directory)
        (directory / "detections.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")
    except OSError as error:  # reading an image has its own error
        raise OutputError(f"results cannot be written to {directory}: {error.strerror or error}") from None
    total = sum(len(row["detections"]) for row in rows)
    images = f"{len(rows)} images, {len(files) - len(rows)} left out"
    threshold = settings.evaluation.visualization_threshold
    print(f"{total} boxes with a score of at least {threshold:g} on {images}: {directory}")
    if not rows:
        raise DataReadError("no image could be read")


def detect_and_draw(opened: OpenedDetector, files: list[Path], directory: Path) -> list[dict[str, Any]]:
    """One picture per image that can be read, and its entry of detections.json; the others are named on stderr."""
    settings, names = opened.settings, opened.class_names()
    device = open_device(settings.run)
    dtype = choose_precision(device, settings.run.precision)
    detector = opened.detector.to(device, settings.run.channels_last)
    transform = Transform(settings.data, settings.evaluation.image_size, seed=0, training=False)
    rows = []
    for number, file in enumerate(tqdm(files, unit="image", disable=None)):
        try:
            image = read_image(file)
        except DataReadError as error:
            tqdm.write(f"left out: {error.line}", file=sys.stderr)
            continue
        sample = transform(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), number, 0, 0)
        with torch.no_grad(), autocast(device, dtype):
            outputs = detector.model(collate_samples([sample])["images"].to(device))
        found = detector.postprocess(outputs)[0]
        shown = found["scores"] >= settings.evaluation.visualization_threshold
        boxes = boxes_to_original(found["boxes"][shown], sample.letterbox).cpu().numpy()
        labels, scores = found["labels"][shown].cpu().numpy(), found["scores"][shown].cpu().numpy()
        save_png(directory / f"{number:05d}_{file.stem}.png", draw_boxes(image, boxes, labels, names, scores))
        rows.append(describe_image(file, image, boxes, labels, scores, names))
    return rows


def describe_image(
    file: Path, image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, scores: np.ndarray, names: tuple[str, ...]
) -> dict[str, Any]:
    """One entry of detections.json; boxes (K, 4) xyxy in pixels of the image, labels and scores (K,)."""
    columns = zip(labels.tolist(), scores.tolist(), boxes.tolist(), strict=True)
    detections = [
        {"class": names[label], "label": label, "score": round(score, 6), "box": [round(value, 3) for value in box]}
        for label, score, box in columns
    ]
    return {"file": str(file), "width": image.shape[1], "height": image.shape[0], "detections": detections}


def find_images(sources: list[Path]) -> list[Path]:
    """The files themselves and the images inside the folders, in order.

    Raises:
        DataError: nothing named, a source does not exist, or a folder without images.
    """
    if not sources:
        raise DataError("no images named: give files or folders, e.g. detect.py --weights best.pt photo.jpg folder/")
    files: list[Path] = []
    for source in sources:
        inside = (
            sorted(path for path in source.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
            if source.is_dir()
            else [source]
        )
        if not source.exists() or not inside:
            raise DataError(f"{source}: {'no image in this folder' if source.exists() else 'does not exist'}")
        files.extend(inside)
    return files


if __name__ == "__main__":
    exit_with_message(main)
