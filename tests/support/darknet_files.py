"""Files of a small Darknet network with known detections."""

import json
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest

import validation
from detection.errors import exit_with_message
from tests.support.darknet_descriptions import conv, net, output, write_cfg, yolo

CFG = write_cfg([net(32), conv(2, 3, 32, jitter=1), output(8), yolo("0", "16,16", 3, ignore_thresh=0.7)])


NAMES = "aeroplane\nmotorbike\nsofa\n"  # Darknet's spelling, in another order than the category ids


Run = Callable[..., tuple[int, str, str]]
CATEGORIES = [(4, "motorcycle"), (5, "airplane"), (63, "couch")]
SEEN = 64_000


def known_weights(num_classes: int = 3, label: int = 1) -> bytes:
    """Zero kernels; the bias of the output predicts the anchor centred in each cell, with one class."""
    classes = [6.0 if number == label else -9.0 for number in range(num_classes)]
    normalised = [0.0] * 2 + [1.0] * 2 + [0.0] * 2 + [1.0] * 2 + [0.0] * 54
    bias = [0.0, 0.0, 0.0, 0.0, 5.0, *classes]
    values = [*normalised, *bias, *[0.0] * (2 * len(bias))]
    return struct.pack("<3iQ", 0, 2, 5, SEEN) + struct.pack(f"<{len(values)}f", *values)


@dataclass(frozen=True)
class Files:
    """A directory with everything that validation.py needs."""

    root: Path

    def __call__(self, name: str, content: str | bytes) -> Path:
        path = self.root / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    @property
    def arguments(self) -> list[str]:
        words = [f"data.root={self.root}", "data.num_workers=0", "run.device=cpu", "run.precision=off"]
        return [*words, f"run.logs_path={self.root / 'logs'}"]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """COCO layout: two grey images with a motorcycle where the network predicts one, and an empty one."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val").mkdir()
    images, rows = [], []
    for number, side in ((1, 32), (2, 64), (3, 32)):
        cv2.imwrite(str(tmp_path / "val" / f"{number}.png"), np.full((side, side, 3), 90, np.uint8))
        images.append({"id": number, "file_name": f"{number}.png", "width": side, "height": side})
        if number < 3:
            box = [side / 4, side / 4, side / 2, side / 2]
            row = {"id": number, "image_id": number, "category_id": 4, "bbox": box, "area": side**2 / 4, "iscrowd": 0}
            rows.append(row)
    categories = [{"id": number, "name": name} for number, name in CATEGORIES]
    content = {"images": images, "annotations": rows, "categories": categories}
    (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(content))
    written = Files(tmp_path)
    written("net.cfg", CFG)
    written("net.names", NAMES)
    written("net.weights", known_weights())
    return written


@pytest.fixture
def run(files: Files, monkeypatch, capfd) -> Run:
    """`code, out, err = run("--weights", ...)`: validation.py in this process, in the directory of the files.

    Without its figures, which take most of the time, unless `figures` is set.
    """
    draw_evaluation = validation.draw_evaluation

    def started(*arguments: str | Path, figures: bool = False) -> tuple[int, str, str]:
        monkeypatch.setattr(validation, "draw_evaluation", draw_evaluation if figures else lambda *_: {})
        monkeypatch.chdir(files.root)
        monkeypatch.setattr(sys, "argv", ["validation.py", *map(str, arguments), *files.arguments])
        with pytest.raises(SystemExit) as left:
            exit_with_message(validation.main)
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return int(left.value.code or 0), out, err

    return started
