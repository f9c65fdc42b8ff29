"""Draw the README's picture of a detector that Darknet trained, on photographs that may be published.

python3 -m docs.draw_darknet_picture MODEL.weights MODEL.cfg COCO.names

Writes docs/darknet.png. The photographs are public domain or CC0 and come with scikit-image and matplotlib
(docs/data_sources.md); the weights are not part of this repository.
"""

import sys
from pathlib import Path

import cv2
import matplotlib.cbook
import numpy as np
import skimage.data
import torch

from detection.config.command_line import DEFAULTS
from detection.data.image_file import read_image
from detection.data.loaders import collate_samples
from detection.data.transforms import Transform
from detection.drawing.boxes import draw_boxes, make_grid, save_png
from detection.inference.weights import open_weights
from detection.ops.letterbox import boxes_to_original

THRESHOLD = 0.5
HEIGHT = 280  # pixels of each picture


def main() -> None:
    weights, cfg, names = (Path(argument) for argument in sys.argv[1:])
    opened = open_weights(weights, cfg, names, DEFAULTS)
    transform = Transform(opened.detector.geometry, opened.settings.evaluation.image_size)
    hopper = read_image(Path(str(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))))
    photographs = [skimage.data.astronaut(), hopper, skimage.data.chelsea(), skimage.data.coffee()]
    pictures = []
    for photograph in photographs:
        image = cv2.resize(photograph, (round(photograph.shape[1] * HEIGHT / photograph.shape[0]), HEIGHT))
        sample = transform(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), 0, 0, 0)
        with torch.no_grad():
            found = opened.detector.postprocess(opened.detector.model(collate_samples([sample])["images"]))[0]
        shown = found["scores"] >= THRESHOLD
        boxes = boxes_to_original(found["boxes"][shown], sample.letterbox).numpy()
        labels, scores = found["labels"][shown].numpy(), found["scores"][shown].numpy()
        pictures.append(draw_boxes(image, boxes, labels, opened.class_names(), scores))
    save_png(Path("docs/darknet.png"), make_grid(pictures, columns=2))


if __name__ == "__main__":
    main()
