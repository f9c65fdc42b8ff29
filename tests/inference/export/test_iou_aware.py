"""A network that predicts its IoU: its outputs, its checkpoint, and its ONNX file, which gives the same detections."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import export
import validation
from detection.checkpoints import save_checkpoint
from detection.config.command_line import DEFAULTS
from detection.config.loading import load_settings
from detection.contract import Detector
from detection.errors import CheckpointError
from detection.inference.export.onnx_export import ExportOptions, describe
from detection.inference.weights import open_weights
from detection.models import POSTPROCESSES, build_detector
from detection.models.backbones import BACKBONES
from detection.models.darknet.export import describe_detector
from detection.models.darknet.weights import Header, load_darknet_weights, write_darknet_weights

IOU_AWARE = ["yolo.iou_aware=true", "yolo.iou_aware_factor=0.3", "yolo.scale_xy=1.05"]
SMALL = ["model.backbone=mobilenet_v3_small", "yolo.neck_channels=[8, 8]", "train.image_size=64"]
SMALL += ["yolo.anchors=[[[10, 12], [20, 16], [16, 20]], [[30, 28], [40, 24], [50, 50]]]"]
SMALL += ["evaluation.image_size=64", *IOU_AWARE]
TINY = ["model.backbone=darknet_tiny", "yolo.neck_channels=[8, 8]", "yolo.anchors=[[[10, 14]], [[81, 82]]]"]


class ThreeConvolutions(nn.Module):
    """A backbone that is quickly traced."""

    out_channels, strides = (8, 12), (16, 32)
    pixel_mean, pixel_std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, 8)
        self.stages = nn.ModuleList([nn.Conv2d(8, 8, 2, 2), nn.Conv2d(8, 12, 2, 2)])

    def forward(self, images: Tensor) -> list[Tensor]:
        fine = self.stages[0](self.stem(images).relu())
        return [fine, self.stages[1](fine.relu())]


@pytest.fixture(autouse=True)
def small_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, "mobilenet_v3_small", ThreeConvolutions)


def build(num_classes: int, *words: str) -> Detector:
    torch.manual_seed(0)
    return build_detector(load_settings(DEFAULTS, words=words)[0], num_classes)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """best.pt with two classes and outputs that vary enough to give detections."""
    settings, _ = load_settings(DEFAULTS, words=SMALL)
    model = build(2, *SMALL, "yolo.objectness_prior=0.5").model
    with torch.no_grad():
        model.train()(torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8))
        for convolution in model.output_convolutions():
            convolution.weight.mul_(50)
    content = {"step": 5, "settings": settings.model_dump(mode="json"), "model": model.state_dict(), "average": None}
    save_checkpoint(tmp_path / "best.pt", content | {"categories": {"names": ["red", "green"], "ids": [3, 7]}})
    return tmp_path / "best.pt"


def test_values_and_first_predictions_by_hand() -> None:
    """Six values before the classes; an untrained network predicts the prior, an IoU of a half, equal classes."""
    detector = build(3, *SMALL)
    with torch.no_grad():
        outputs = detector.model(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    for output, rows in zip(outputs, detector.model.class_rows(3), strict=True):
        means = output.mean(dim=(0, 1, 2, 3)).tolist()
        assert means == pytest.approx([0, 0, 0, 0, math.log(0.01 / 0.99), 0, *[-math.log(2)] * 3], abs=0.2)
        assert rows.tolist() == [[9 * anchor + 6 + label for label in range(3)] for anchor in range(3)]
    assert detector.score == "objectness^0.7 x IoU^0.3 x class probability"


def test_the_file_gives_the_detections_of_the_checkpoint(
    run_script: Callable[..., Any], checkpoint: Path, drawn_dataset: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    common = [f"data.root={drawn_dataset}", "data.num_workers=0", "run.precision=off", "run.device=cpu"]
    arguments = ["--weights", checkpoint, "--nms", "--output", tmp_path / "onnx", common[0]]
    result = run_script(export.main, *arguments)
    assert result.returncode == 0, result.stderr
    found = []
    for place, weights in (("one", checkpoint), ("other", tmp_path / "onnx" / "best.onnx")):
        result = run_script(validation.main, "--weights", weights, *common, "--output", tmp_path / place)
        assert result.returncode == 0, result.stderr
        assert "objectness^0.7 x IoU^0.3 x class probability" in result.stdout
        rows = json.loads((tmp_path / place / "detections.json").read_text())
        found.append(sorted((row["image_id"], row["category_id"], *row["bbox"], row["score"]) for row in rows))
    assert len(found[0]) == len(found[1]) > 10
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3, atol=2e-3)


def test_metadata_is_enough_to_decode_raw_outputs(checkpoint: Path) -> None:
    opened = open_weights(checkpoint, None, None, DEFAULTS)
    decoding = describe(opened, ExportOptions(outputs="raw")).decoding
    assert decoding["iou_aware"] is True and decoding["scale_xy"] == [1.05] * 2
    postprocess = POSTPROCESSES["yolo"](json.loads(json.dumps(decoding)), opened.settings)
    outputs = [torch.randn(2, 3, side, side, 8) for side in (4, 2)]
    for found, expected in zip(postprocess.decode(outputs), opened.detector.postprocess.decode(outputs), strict=True):
        assert torch.equal(found, expected)


def test_darknet_has_no_such_network(tmp_path: Path) -> None:
    detector = build(4, *TINY, *IOU_AWARE)
    with pytest.raises(CheckpointError, match="iou_aware"):
        describe_detector(detector, 64)
    path = tmp_path / "five.weights"  # 5 + 5 values per anchor, as many as 6 + 4
    write_darknet_weights(build(5, *TINY).model, path, Header())
    with pytest.raises(CheckpointError, match="iou_aware"):
        load_darknet_weights(detector.model, path)


def test_grid_scale_and_sizes_are_described_to_darknet() -> None:
    detector = build(2, *TINY, "yolo.loss=multi", "yolo.scale_xy=2.0", "yolo.new_coords=true")
    sections = describe_detector(detector, 64)
    layers = [section for section in sections if section.name == "yolo"]
    assert [(layer.options["scale_x_y"], layer.options["new_coords"]) for layer in layers] == [("2", "1")] * 2
    before = [sections[sections.index(layer) - 1].options["activation"] for layer in layers]
    assert before == ["logistic"] * 2
