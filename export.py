"""Export trained weights to ONNX, or as Darknet files.

python export.py --weights logs/240224-211713_LambdaLR/best.pt                     best.onnx beside the weights
python export.py --weights logs/240224-211713_LambdaLR/best.pt --nms --half        with NMS, network in float16
python export.py --weights best.pt --dynamic-size --input float --output DIRECTORY
python export.py --weights best.pt --format darknet                                best.weights, best.cfg, best.names
python export.py --weights yolov3.weights --format backbone                        yolov3.conv.52: the backbone alone
python export.py --weights my.weights --cfg my.cfg --names my.names evaluation.image_size=416

onnx: a file for any batch size; docs/deploy_onnx.md shows how to use it. Input `images`: RGB (B, 3, size, size),
letterboxed; pixel scaling is part of the graph. Outputs:
  --outputs raw      one per level, `stride_8`, ...: logits (B, anchors, H, W, 5 + classes)
  --outputs decoded  (default) `boxes` (B, P, 4): x1, y1, x2, y2 in pixels of the input, and `scores` (B, P, classes):
                     objectness x class probability; before NMS
  --nms              final detections of the whole batch by descending score: `boxes` (K, 4), `scores`, `labels` and
                     `image_index` (K); thresholds: evaluation.confidence_threshold, .iou_threshold, .max_detections
The metadata holds class names, size, letterbox, anchors and thresholds; validation.py and detect.py accept the file as
--weights. ONNX Runtime is compared with PyTorch on images of data.root (or photographs of installed packages) and on
noise; if they differ by more than the tolerance, no file is written (exit code 1). Needs `pip install onnx onnxscript
onnxruntime`. Takes half a minute.
darknet: .weights, .cfg and .names for Darknet; the weights are bit-identical.
backbone: the Darknet .weights of the backbone alone.
"""

import argparse
import os
from pathlib import Path
from typing import cast

from torch import nn

from detection.config.command_line import Parser
from detection.data.workers import prepare_process
from detection.errors import CheckpointError, OutputError, SettingsError, exit_with_message
from detection.inference.export.onnx_comparison import compare_with_pytorch
from detection.inference.export.onnx_export import OPSETS, OnnxOptions, build_onnx, require_packages
from detection.inference.weights import OpenedDetector, open_command_line
from detection.models.darknet.cfg import format_cfg
from detection.models.darknet.export import describe_detector
from detection.models.darknet.weights import Header, as_darknet, write_darknet_weights


def main() -> None:
    prepare_process()
    arguments = parse_arguments()
    options = onnx_options(arguments)
    if arguments.weights.suffix == ".onnx":
        raise CheckpointError(f"{arguments.weights}: is an ONNX file already; give the weights it was made from")
    opened = open_command_line(arguments, arguments.settings)
    directory = arguments.output or arguments.weights.parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
        stem = directory / arguments.weights.stem
        if arguments.format == "onnx":
            export_onnx(opened, stem, options)
        else:
            {"darknet": export_darknet, "backbone": export_backbone}[arguments.format](opened, stem)
    except OSError as error:
        raise OutputError(f"{directory} cannot be written: {error}") from None


def parse_arguments() -> argparse.Namespace:
    parser = Parser("export.py", __doc__)
    parser.add_weights()
    parser.add_settings(device=False)
    add = parser.add_argument
    add("--format", choices=("onnx", "darknet", "backbone"), default="onnx", help="format to write (default: onnx)")
    add("--output", type=Path, metavar="DIRECTORY", help="output directory (default: that of the weights)")
    onnx = parser.add_argument_group("onnx")
    add = onnx.add_argument
    add("--outputs", choices=("raw", "decoded"), help="logits, or boxes and scores (default: decoded)")
    add("--nms", action="store_const", const=True, help="include NMS (operator NonMaxSuppression)")
    add("--input", choices=("uint8", "float"), help="input range: uint8 0..255 (default), or float32 0..1")
    add(
        "--dynamic-size",
        action="store_const",
        const=True,
        help="accept any height and width that are multiples of the largest stride",
    )
    add("--half", action="store_const", const=True, help="network in float16; inputs, outputs and boxes stay float32")
    add("--opset", type=int, metavar="N", help=f"ONNX opset, {OPSETS[0]} (default) to {OPSETS[-1]}")
    add(
        "--simplify",
        action=argparse.BooleanOptionalAction,
        help="fold constants and batch norm with onnxscript's optimizer (default), or keep the graph as traced",
    )
    return parser.parse_intermixed_args()


def onnx_options(arguments: argparse.Namespace) -> OnnxOptions:
    """Collect the flags of the ONNX export.

    Raises:
        SettingsError: flags contradict each other, or have invalid values.
    """
    names = ("outputs", "nms", "input", "dynamic_size", "half", "opset", "simplify")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if given and arguments.format != "onnx":
        flag = next(iter(given)).replace("_", "-")
        raise SettingsError(f"--{flag} belongs to --format onnx, not to --format {arguments.format}")
    if given.pop("nms", False):
        if "outputs" in given:
            raise SettingsError(f"--nms and --outputs {given['outputs']} are two kinds of outputs; choose one")
        given["outputs"] = "nms"
    options = OnnxOptions(**given)
    if options.opset not in OPSETS:
        raise SettingsError(f"--opset {options.opset}: must lie between {OPSETS[0]} and {OPSETS[-1]}")
    if options.half and not options.simplify:
        raise SettingsError("--half needs --simplify: batch norm in float16 would lose too many digits")
    return options


def refuse_overwriting(path: Path) -> None:
    """Raise OutputError if the file exists."""
    if path.exists():
        raise OutputError(f"{path} exists; choose another --output DIRECTORY")


def export_darknet(opened: OpenedDetector, stem: Path) -> None:
    """Write .weights, .cfg and .names."""
    weights, cfg, names = (stem.with_name(f"{stem.name}{suffix}") for suffix in (".weights", ".cfg", ".names"))
    for path in (weights, cfg, names):
        refuse_overwriting(path)
    sections = describe_detector(opened.detector, opened.settings.evaluation.image_size)
    write_darknet_weights(opened.detector.model, weights, Header(seen=opened.seen))
    cfg.write_text(format_cfg(sections), encoding="utf-8")
    names.write_text("\n".join(opened.class_names()) + "\n", encoding="utf-8")
    print(f"written: {weights} ({weights.stat().st_size} bytes), {cfg}, {names}")


def export_backbone(opened: OpenedDetector, stem: Path) -> None:
    """Write the convolutions of the backbone alone, in the format of darknet53.conv.74."""
    model = opened.detector.model
    own = {id(parameter) for parameter in cast(nn.Module, model.backbone).parameters()}
    modules = as_darknet(model).darknet_convolutions()
    count = sum(id(next(module.parameters())) in own for module in modules)
    path = stem.with_name(f"{stem.name}.conv.{count}")
    refuse_overwriting(path)
    write_darknet_weights(model, path, Header(seen=opened.seen), count)
    print(f"written: {path} ({path.stat().st_size} bytes), {count} convolutions")


def export_onnx(opened: OpenedDetector, stem: Path, options: OnnxOptions) -> None:
    """Export to a temporary file, compare it with PyTorch and, if they agree, rename it."""
    require_packages()
    import onnx

    path = stem.with_name(f"{stem.name}.onnx")
    refuse_overwriting(path)
    model, lines = build_onnx(opened, options)
    print("\n".join(lines), flush=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.onnx")
    try:
        onnx.save(model, str(temporary))
        print("\n".join(compare_with_pytorch(opened, temporary)))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    size = "any size" if options.dynamic_size else f"{opened.settings.evaluation.image_size} px"
    print(f"written: {path} ({path.stat().st_size} bytes), opset {options.opset}, {size}, outputs {options.outputs}")


if __name__ == "__main__":
    exit_with_message(main)
