"""Boxes on a photograph by ONNX Runtime: python docs/onnx_example.py MODEL.onnx PHOTO [MIN_SCORE]

For files of `export.py --nms`. Needs onnxruntime, numpy and Pillow, and nothing of this repository.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

if len(sys.argv) < 3:
    sys.exit(__doc__)
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
about = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
photo = ImageOps.exif_transpose(Image.open(sys.argv[2])).convert("RGB")
min_score = float(sys.argv[3]) if len(sys.argv) > 3 else 0.5

# Letterbox: as large as fits, in the middle of a square. AFFINE samples the pixels that training's resize does.
size, rule, longest = about["image_size"], about["geometry"], max(photo.size)
exact = [side * size / (side if rule["placement"] == "squash" else longest) for side in photo.size]
width, height = (max(int(side) if rule["rounding"] == "down" else round(side), 1) for side in exact)
zoom_x, zoom_y = photo.width / width, photo.height / height
left, top = (0, 0) if rule["placement"] == "top_left" else ((size - width) // 2, (size - height) // 2)
laid = photo.transform((width, height), Image.Transform.AFFINE, (zoom_x, 0, 0, 0, zoom_y, 0), Image.Resampling.BILINEAR)
square = Image.new("RGB", (size, size), tuple(rule["fill"]))
square.paste(laid, (left, top))

images = np.asarray(square).transpose(2, 0, 1)[None]  # (1, 3, size, size) uint8
images = images if about["input"] == "uint8" else images.astype(np.float32) / 255
boxes, scores, labels, _ = session.run(["boxes", "scores", "labels", "image_index"], {"images": images})
boxes = (boxes - [left, top, left, top]) * [zoom_x, zoom_y, zoom_x, zoom_y]  # pixels of the photograph
boxes = boxes.clip(0, [photo.width, photo.height, photo.width, photo.height])
for box, score, label in zip(boxes, scores, labels, strict=True):
    if score >= min_score:
        print(about["names"][label], f"{score:.3f}", *box.round(1).tolist())
