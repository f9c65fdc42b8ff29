"""Trained weights in the form that other programs read.

python export.py --weights logs/240224-211713_LambdaLR/best.pt                     best.onnx beside the weights
python export.py --weights logs/240224-211713_LambdaLR/best.pt --format darknet    best.weights, best.cfg, best.names
python export.py --weights yolov3.weights --format backbone                        yolov3.conv.52: the encoder alone
python export.py --weights my.weights --cfg my.cfg --names my.names --output DIRECTORY

onnx: one file for any batch size. Input `images`: uint8 RGB (B, 3, size, size), letterboxed; the pixel scaling is
inside. Outputs `boxes` (B, P, 4): x1, y1, x2, y2 in pixels of the input, and `scores` (B, P, classes): objectness times
class probability, both before non-maximum suppression. Names, size, letterbox, strides and thresholds are in its
metadata. ONNX Runtime runs the file beside PyTorch; a difference beyond the tolerance removes it (exit 1). Needs
`pip install onnx onnxscript onnxruntime`. Always computed on the CPU.
darknet: files that the Darknet program loads, bit for bit our weights.
"""

import argparse
import json
import os
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from detection.command_line import Parser
from detection.errors import OutputError, SettingsError, UserError, exit_with_message
from detection.models.darknet_cfg import format_cfg
from detection.models.darknet_export import describe_network
from detection.models.darknet_weights import Header, as_darknet, write_darknet_weights
from detection.postprocessing import YOLOPostprocess
from detection.weights import OpenedDetector, open_command_line

OPSET = 18
BATCHES = (1, 3)  # compared sizes; the second is not the one that was traced
BOX_TOLERANCE = 0.05  # pixels, for boxes that lie within a few image sizes
SCORE_TOLERANCE = 1e-4


class ExportedDetector(nn.Module):
    """What the ONNX file computes."""

    def __init__(self, opened: OpenedDetector) -> None:
        super().__init__()
        self.model = opened.detector.model
        self.postprocess = cast(YOLOPostprocess, opened.detector.postprocess)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (B, 3, S, S) to boxes (B, P, 4) and scores (B, P, C)."""
        return self.postprocess.decode(self.model(images))


def main() -> None:
    arguments = parse_arguments()
    opened = open_command_line(arguments, arguments.settings)
    directory = arguments.output or arguments.weights.parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
        stem = directory / arguments.weights.stem
        {"onnx": export_onnx, "darknet": export_darknet, "backbone": export_backbone}[arguments.format](opened, stem)
    except OSError as error:
        raise OutputError(f"{directory} cannot be written: {error}") from None


def parse_arguments() -> argparse.Namespace:
    parser = Parser("export.py", __doc__)
    parser.add_weights()
    parser.add_settings(device=False)
    parser.add_argument("--format", choices=("onnx", "darknet", "backbone"), default="onnx", help="default: onnx")
    parser.add_argument(
        "--output", type=Path, metavar="DIRECTORY", help="where the files go (default: beside the weights)"
    )
    return parser.parse_intermixed_args()


def refuse_overwriting(path: Path) -> None:
    if path.exists():
        raise OutputError(f"{path} exists; choose another --output DIRECTORY")


def export_darknet(opened: OpenedDetector, stem: Path) -> None:
    """All convolutions, the description and the class names."""
    weights, cfg, names = (stem.with_name(f"{stem.name}{suffix}") for suffix in (".weights", ".cfg", ".names"))
    for path in (weights, cfg, names):
        refuse_overwriting(path)
    settings = opened.settings
    sections = describe_network(
        opened.detector.model, settings.yolo.anchors, settings.evaluation.image_size, settings.yolo.ignore_threshold
    )
    write_darknet_weights(opened.detector.model, weights, Header(seen=opened.seen))
    cfg.write_text(format_cfg(sections), encoding="utf-8")
    names.write_text("\n".join(opened.class_names()) + "\n", encoding="utf-8")
    print(f"written: {weights} ({weights.stat().st_size} bytes), {cfg}, {names}")


def export_backbone(opened: OpenedDetector, stem: Path) -> None:
    """The convolutions of the encoder alone, as darknet53.conv.74 holds them."""
    model = opened.detector.model
    own = {id(parameter) for parameter in cast(nn.Module, model.encoder).parameters()}
    modules = as_darknet(model).darknet_convolutions()
    count = sum(id(next(module.parameters())) in own for module in modules)
    path = stem.with_name(f"{stem.name}.conv.{count}")
    refuse_overwriting(path)
    write_darknet_weights(model, path, Header(seen=opened.seen), count)
    print(f"written: {path} ({path.stat().st_size} bytes), {count} convolutions")


def export_onnx(opened: OpenedDetector, stem: Path) -> None:
    """Trace, write, run and compare."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise SettingsError(f"{error}: ONNX export needs: pip install onnx onnxscript onnxruntime") from None
    path = stem.with_name(f"{stem.name}.onnx")
    refuse_overwriting(path)
    size = opened.settings.evaluation.image_size
    network = ExportedDetector(opened).eval()
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    program = torch.onnx.export(
        network,
        (example,),
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["boxes", "scores"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    settings = opened.settings
    metadata = {
        "names": json.dumps(opened.class_names()),
        "image_size": str(size),
        "letterbox": json.dumps(
            {
                "keep_aspect": settings.data.keep_aspect,
                "fill": settings.data.fill,
                "interpolation": settings.data.interpolation,
                "rounding": settings.data.letterbox_rounding,
            }
        ),
        "pixel_mean": json.dumps(opened.detector.model.get_buffer("pixel_mean").flatten().tolist()),
        "pixel_std": json.dumps(opened.detector.model.get_buffer("pixel_std").flatten().tolist()),
        "strides": json.dumps(opened.detector.model.strides),
        "thresholds": json.dumps(
            {
                "confidence": settings.evaluation.confidence_threshold,
                "iou": settings.evaluation.iou_threshold,
                "max_detections": settings.evaluation.max_detections,
            }
        ),
    }
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    onnx.save(model, str(temporary))
    try:
        box_difference, score_difference = compare(network, onnxruntime.InferenceSession(str(temporary)), size)
        print(
            f"ONNX Runtime against PyTorch, batches of {' and '.join(map(str, BATCHES))}: boxes differ by at most "
            f"{box_difference:.2g} px, scores by {score_difference:.2g}"
        )
        if not (box_difference <= BOX_TOLERANCE and score_difference <= SCORE_TOLERANCE):
            raise ComparisonFailed(f"more than {BOX_TOLERANCE:g} px or {SCORE_TOLERANCE:g}: {path} is not written")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"written: {path} ({path.stat().st_size} bytes), opset {OPSET}, {size} px")


class ComparisonFailed(UserError):
    """The exported file does not compute what PyTorch does."""


def compare(network: nn.Module, session, size: int) -> tuple[float, float]:
    """Largest differences in box coordinates (relative to boxes larger than the image) and scores."""
    generator = np.random.default_rng(0)
    box_difference = score_difference = 0.0
    for batch in BATCHES:
        images = generator.integers(0, 256, (batch, 3, size, size), dtype=np.uint8)
        with torch.no_grad():
            boxes, scores = (tensor.numpy() for tensor in network(torch.from_numpy(images)))
        found_boxes, found_scores = session.run(None, {"images": images})
        scale = np.maximum(np.abs(boxes) / size, 1)  # an untrained network may predict boxes of any size
        box_difference = max(box_difference, float(np.abs((found_boxes - boxes) / scale).max()))
        score_difference = max(score_difference, float(np.abs(found_scores - scores).max()))
    return box_difference, score_difference


if __name__ == "__main__":
    exit_with_message(main)
