"""Export trained weights to ONNX, TorchScript, torch.export or OpenVINO, or as Darknet files.

python export.py --weights logs/240224-211713_LambdaLR/best.pt                     best.onnx beside the weights
python export.py --weights logs/240224-211713_LambdaLR/best.pt --nms --half        with NMS, network in float16
python export.py --weights logs/240224-211713_LambdaLR/best.pt --int8              8 bits, if that costs little AP
python export.py --weights best.pt --dynamic-size --input float --output DIRECTORY
python export.py --weights best.pt --format openvino                               best_openvino/best.xml and .bin
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
--weights. The file is compared with PyTorch on images of data.root (or photographs of installed packages) and on noise;
if they differ by more than the tolerance, it is not kept (exit code 1). Needs `pip install onnx onnxscript
onnxruntime`. Takes half a minute.
--int8: static quantization, ranges from --calibration-images of the training images; the AP of both on the validation
images is printed, and a file that loses more than --max-ap-loss is not kept (exit code 1).
torchscript (.torchscript), torch_export (.pt2): the same graph, metadata and comparison without NMS; need torch alone.
openvino: a folder with .xml and .bin, by OpenVINO's converter from the ONNX graph; needs `pip install openvino` too.
darknet: .weights, .cfg and .names for Darknet; the weights are bit-identical.
backbone: the Darknet .weights of the backbone alone.
"""

import argparse
import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from detection.config.command_line import DEFAULTS, Parser, at_least_one, at_least_zero
from detection.contract import Detector
from detection.data.build import build_validation_dataset
from detection.data.coco import CocoDataset
from detection.data.loaders import build_evaluation_loader
from detection.data.transforms import Transform
from detection.data.workers import prepare_process
from detection.drawing.files import replace_file
from detection.errors import CheckpointError, DataError, OutputError, SettingsError, exit_with_message, say
from detection.evaluation.evaluate import compute_metrics, run_inference
from detection.inference.export.calibration import calibration_images
from detection.inference.export.onnx_comparison import ComparisonFailed, compare_with_pytorch
from detection.inference.export.onnx_export import OPSETS, ExportOptions, build_onnx, describe, require_packages
from detection.inference.export.torch_formats import write_exported_program, write_torchscript
from detection.inference.exported_files import EXPORTED
from detection.inference.folding import prepare_inference
from detection.inference.openvino_model import require_openvino, save_openvino
from detection.inference.weights import OpenedDetector, check_classes, open_command_line, open_weights
from detection.models.darknet.cfg import format_cfg
from detection.models.darknet.export import describe_detector
from detection.models.darknet.weights import Header, as_darknet, write_darknet_weights
from detection.runtime.devices import Machine

# What the exported file is called, behind the name of the weights, and which options it has.
SUFFIXES = {"onnx": ".onnx", "torchscript": ".torchscript", "torch_export": ".pt2", "openvino": "_openvino"}
SHARED = ("outputs", "input")
ALLOWED = {
    "onnx": (*SHARED, "nms", "dynamic_size", "half", "int8", "opset", "simplify"),
    "torchscript": SHARED,
    "torch_export": (*SHARED, "dynamic_size"),
    "openvino": (*SHARED, "nms", "dynamic_size", "half", "opset", "simplify"),
}
CALIBRATION_IMAGES = 128
MAX_AP_LOSS = 0.02


def main() -> None:
    prepare_process()
    arguments = parse_arguments()
    options = export_options(arguments)
    if arguments.weights.suffix in EXPORTED:
        kind = "ONNX" if arguments.weights.suffix == ".onnx" else "exported"
        raise CheckpointError(f"{arguments.weights}: is an {kind} file already; give the weights it was made from")
    opened = open_command_line(arguments, arguments.settings)
    directory = arguments.output or arguments.weights.parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
        stem = directory / arguments.weights.stem
        if arguments.format in SUFFIXES:
            export_graph(opened, stem, options, arguments)
        else:
            {"darknet": export_darknet, "backbone": export_backbone}[arguments.format](opened, stem)
    except OSError as error:
        raise OutputError(f"{directory} cannot be written: {error}") from None


def parse_arguments() -> argparse.Namespace:
    parser = Parser("export.py", __doc__)
    parser.add_weights()
    parser.add_settings(device=False)
    add = parser.add_argument
    add("--format", choices=(*SUFFIXES, "darknet", "backbone"), default="onnx", help="format to write (default: onnx)")
    add("--output", type=Path, metavar="DIRECTORY", help="output directory (default: that of the weights)")
    onnx = parser.add_argument_group("onnx", "openvino has the same but for --int8, torchscript and torch_export some")
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
    add(
        "--int8",
        action="store_const",
        const=True,
        help="network in 8 bits; decoding, NMS and output layers stay float32",
    )
    add("--calibration-images", type=at_least_one, metavar="N", help=f"for --int8 (default: {CALIBRATION_IMAGES})")
    add("--max-ap-loss", type=at_least_zero, metavar="AP", help=f"of --int8, 0..1 (default: {MAX_AP_LOSS:g})")
    add("--opset", type=int, metavar="N", help=f"ONNX opset, {OPSETS[0]} (default) to {OPSETS[-1]}")
    add(
        "--simplify",
        action=argparse.BooleanOptionalAction,
        help="fold constants and batch norm with onnxscript's optimizer (default), or keep the graph as traced",
    )
    return parser.parse_intermixed_args()


def export_options(arguments: argparse.Namespace) -> ExportOptions:
    """Collect the flags of a graph's export.

    Raises:
        SettingsError: flags contradict each other, or have invalid values.
    """
    names = ALLOWED["onnx"]
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    allowed = ALLOWED.get(arguments.format, ())
    if foreign := [name for name in given if name not in allowed]:
        owners = ", ".join(name for name, own in ALLOWED.items() if foreign[0] in own)
        flag = foreign[0].replace("_", "-")
        raise SettingsError(f"--{flag} belongs to --format {owners}, not to --format {arguments.format}")
    for name in ("calibration_images", "max_ap_loss"):
        if getattr(arguments, name) is not None and "int8" not in given:
            raise SettingsError(f"--{name.replace('_', '-')} belongs to --int8")
    if given.pop("nms", False):
        if "outputs" in given:
            raise SettingsError(f"--nms and --outputs {given['outputs']} are two kinds of outputs; choose one")
        given["outputs"] = "nms"
    options = ExportOptions(**given)
    if options.opset not in OPSETS:
        raise SettingsError(f"--opset {options.opset}: must lie between {OPSETS[0]} and {OPSETS[-1]}")
    for name in ("half", "int8"):
        if getattr(options, name) and not options.simplify:
            raise SettingsError(f"--{name} needs --simplify: batch norm in few digits would lose too many")
    if options.half and options.int8:
        raise SettingsError("--half and --int8 are two precisions; choose one")
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
    replace_file(cfg, format_cfg(sections).encode())
    replace_file(names, ("\n".join(opened.class_names()) + "\n").encode())
    say(f"written: {weights} ({weights.stat().st_size} bytes), {cfg}, {names}")


def export_backbone(opened: OpenedDetector, stem: Path) -> None:
    """Write the convolutions of the backbone alone, in the format of darknet53.conv.74."""
    model = opened.detector.model
    own = {id(parameter) for parameter in cast(nn.Module, model.backbone).parameters()}
    modules = as_darknet(model).darknet_convolutions()
    count = sum(id(next(module.parameters())) in own for module in modules)
    path = stem.with_name(f"{stem.name}.conv.{count}")
    refuse_overwriting(path)
    write_darknet_weights(model, path, Header(seen=opened.seen), count)
    say(f"written: {path} ({path.stat().st_size} bytes), {count} convolutions")


def export_graph(opened: OpenedDetector, stem: Path, options: ExportOptions, arguments: argparse.Namespace) -> None:
    """Export to a temporary place, compare with PyTorch (8 bits: the AP) and, if they agree, give the file its name."""
    kind = arguments.format
    path = stem.with_name(f"{stem.name}{SUFFIXES[kind]}")
    refuse_overwriting(path)
    if kind in ("onnx", "openvino"):
        require_packages()
        if kind == "openvino":
            require_openvino(path)
        calibration = calibration_images(
            opened.settings, opened.detector.geometry, arguments.calibration_images or CALIBRATION_IMAGES
        )
        # build_onnx reads the images with --int8 alone
        model, lines = build_onnx(opened, options, calibration) if options.int8 else build_onnx(opened, options)
        say(*lines)
    with tempfile.TemporaryDirectory(prefix=f".{stem.name}.", dir=stem.parent) as directory:
        temporary = Path(directory) / path.name
        if kind == "onnx":
            file = write_onnx(model, temporary)
        elif kind == "openvino":
            file = write_openvino(model, temporary / f"{stem.name}.xml", opened, options)
        else:
            file = (write_torchscript if kind == "torchscript" else write_exported_program)(opened, options, temporary)
        limit = MAX_AP_LOSS if arguments.max_ap_loss is None else arguments.max_ap_loss
        say(*(compare_ap(opened, file, limit) if options.int8 else compare_with_pytorch(opened, file)))
        os.replace(temporary, path)
    size = "any size" if options.dynamic_size else f"{opened.settings.evaluation.image_size} px"
    count = sum(part.stat().st_size for part in (path.iterdir() if path.is_dir() else [path]))
    opset = f"opset {options.opset}, " if kind in ("onnx", "openvino") else ""
    say(f"written: {path} ({count} bytes), {opset}{size}, outputs {options.outputs}")


def write_onnx(model: Any, path: Path) -> Path:
    """Write an ONNX file; returns its path."""
    import onnx

    onnx.save(model, str(path))
    return path


def write_openvino(model: Any, path: Path, opened: OpenedDetector, options: ExportOptions) -> Path:
    """Convert an ONNX model to OpenVINO's .xml and .bin; returns the path of the first."""
    path.parent.mkdir()
    with tempfile.TemporaryDirectory() as directory:
        save_openvino(
            write_onnx(model, Path(directory) / "graph.onnx"),
            path,
            describe(opened, options).to_metadata(),
            options.half,
        )
    return path


def compare_ap(opened: OpenedDetector, file: Path, max_loss: float) -> list[str]:
    """Measure the AP of the detector and of its file on the validation images.

    Returns:
        A line with both, for the user.

    Raises:
        ComparisonFailed: the file loses more than `max_loss`.
        DataError: there are no validation images with boxes.
    """
    settings, machine = opened.settings, Machine(torch.device("cpu"))
    dataset = build_validation_dataset(settings.data, opened.names, settings.evaluation.max_images)
    dataset.sample_transform = Transform(opened.detector.geometry, settings.evaluation.image_size)
    check_classes(opened, dataset.annotations.categories.names)
    if dataset.annotations.crowd.all():
        raise DataError("--int8 compares the AP of both: the validation images have no ground-truth box")
    exported = open_weights(file, None, None, DEFAULTS)
    before = average_precision(prepare_inference(opened.detector, machine), dataset, opened)
    after = average_precision(exported.detector, dataset, opened)
    line = (
        f"AP on {len(dataset)} validation images: {before:.4f} in float32, {after:.4f} in 8 bits; lost "
        f"{before - after:.4f} (allowed {max_loss:g})"
    )
    if not before - after <= max_loss:  # NaN fails
        raise ComparisonFailed(f"the file is not kept: {line}; more --calibration-images, or --max-ap-loss")
    return [line]


def average_precision(detector: Detector, dataset: CocoDataset, opened: OpenedDetector) -> float:
    """AP of a detector on the CPU."""
    settings, device = opened.settings, torch.device("cpu")
    batch_size = settings.evaluation.batch_size or settings.train.micro_batch
    loader = build_evaluation_loader(dataset, batch_size, settings.data.num_workers, device)
    result = run_inference(detector.model, None, detector.postprocess, loader, device, contextlib.nullcontext)
    value = compute_metrics([result], dataset.annotations, settings.evaluation.backend).metrics["AP"]
    return float("nan") if value is None else float(value)


if __name__ == "__main__":
    exit_with_message(main)
