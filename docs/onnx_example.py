"""Boxes on a photograph by ONNX Runtime: python docs/onnx_example.py MODEL.onnx PHOTO [MIN_SCORE]

For files of `export.py --nms`. Needs onnxruntime, numpy and Pillow, and nothing of this repository; the pixels are
those of cv2.resize, with which the detector was trained.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def neighbours(count, side):
    """Of each of `count` pixels of a resized side: the two pixels it lies between, and their weights, of 2048."""
    place = ((np.arange(count) + 0.5) * (side / count) - 0.5).astype(np.float32)
    first = np.floor(place).astype(int)
    share = place - first.astype(np.float32)
    weights = (np.rint((1 - share) * 2048).astype(int), np.rint(share * 2048).astype(int))
    return first.clip(0, side - 1), (first + 1).clip(0, side - 1), *weights


def resize(image, width, height):
    """Bilinear, (H, W, 3) to (height, width, 3) uint8, in the fixed-point steps of cv2.resize(..., INTER_LINEAR)."""
    left, right, left_weight, right_weight = neighbours(width, image.shape[1])
    above, below, upper, lower = neighbours(height, image.shape[0])
    rows = image[:, left] * left_weight[:, None] + image[:, right] * right_weight[:, None] >> 4
    upper, lower = upper[:, None, None], lower[:, None, None]
    return ((rows[above] * upper >> 16) + (rows[below] * lower >> 16) + 2 >> 2).astype(np.uint8)


if len(sys.argv) < 3:
    sys.exit(__doc__)
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
about = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
photo = ImageOps.exif_transpose(Image.open(sys.argv[2])).convert("RGB")
min_score = float(sys.argv[3]) if len(sys.argv) > 3 else 0.5

# Letterbox: as large as fits, in the middle of a square.
size, rule, longest = about["image_size"], about["geometry"], max(photo.size)
if rule["interpolation"] != "linear":
    sys.exit(f"{sys.argv[1]} was trained on images resized by {rule['interpolation']}, this example resizes linearly")
exact = [side * size / (side if rule["placement"] == "squash" else longest) for side in photo.size]
width, height = (max(int(side) if rule["rounding"] == "down" else round(side), 1) for side in exact)
zoom_x, zoom_y = photo.width / width, photo.height / height
left, top = (0, 0) if rule["placement"] == "top_left" else ((size - width) // 2, (size - height) // 2)
square = np.empty((size, size, 3), np.uint8)
square[:] = rule["fill"]
square[top : top + height, left : left + width] = resize(np.asarray(photo), width, height)

images = square.transpose(2, 0, 1)[None]  # (1, 3, size, size) uint8
images = images if about["input"] == "uint8" else images.astype(np.float32) / 255
boxes, scores, labels, _ = session.run(["boxes", "scores", "labels", "image_index"], {"images": images})
boxes = (boxes - [left, top, left, top]) * [zoom_x, zoom_y, zoom_x, zoom_y]  # pixels of the photograph
boxes = boxes.clip(0, [photo.width, photo.height, photo.width, photo.height])
for box, score, label in zip(boxes, scores, labels, strict=True):
    if score >= min_score:
        print(about["names"][label], f"{score:.3f}", *box.round(1).tolist())
