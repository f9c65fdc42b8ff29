"""Export a detector to ONNX: trace it with torch, then convert to half precision and add NMS and metadata."""

import dataclasses
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from detection.contract import DetectorModel
from detection.errors import SettingsError
from detection.inference.export.nms_graph import NMS_INPUTS, add_nms, read_opset
from detection.inference.export.quantization import quantize
from detection.inference.exported_model import Description, OutputKind
from detection.inference.onnx_model import NEEDED
from detection.inference.weights import OpenedDetector
from detection.models.postprocess import DensePostprocess

OPSETS = range(18, 25)  # torch's exporter writes 18 and converts upwards
PROJECT = Path(__file__).resolve().parents[3] / "pyproject.toml"
OUTPUT_NAMES: dict[OutputKind, list[str]] = {
    "raw": [],
    "decoded": ["boxes", "scores"],
    "nms": NMS_INPUTS,  # inside the graph
}


@dataclass(frozen=True)
class ExportOptions:
    """Options of the export, see `export.py --help`; `half` and below are of ONNX files alone."""

    outputs: OutputKind = "decoded"
    input: str = "uint8"
    dynamic_size: bool = False
    half: bool = False
    int8: bool = False
    opset: int = OPSETS[0]
    simplify: bool = True


class ExportedDetector(nn.Module):
    """Module that is traced: network and, with `decode`, decoding of boxes; without NMS.

    Args:
        levels: return the raw levels too if they are decoded.
    """

    def __init__(self, opened: OpenedDetector, decode: bool, levels: bool = True) -> None:
        super().__init__()
        self.model, self.levels = opened.detector.model, levels
        self.postprocess = cast(DensePostprocess, opened.detector.postprocess)
        self.decode = decode

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map images (B, 3, H, W) to the raw levels and, with `decode`, boxes (B, P, 4) and scores (B, P, C)."""
        levels = self.model(images)
        if not self.decode:
            return tuple(levels)
        return (*(levels if self.levels else ()), *self.postprocess.decode(levels))


def require_packages() -> None:
    """Check that the packages for the export are installed.

    Raises:
        SettingsError: one is missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise SettingsError(f"{error}: ONNX export needs: {NEEDED}") from None


def build_onnx(
    opened: OpenedDetector, options: ExportOptions, calibration: Iterable[Tensor] = ()
) -> tuple[Any, list[str]]:
    """Build the `onnx.ModelProto` with its metadata.

    Args:
        calibration: with `int8` batches of training images, uint8 (B, 3, H, W).

    Returns:
        The model, and lines about each stage for the user.

    Raises:
        SettingsError: torch cannot export the network, or not to this opset.
    """
    import onnx
    from onnxscript.optimizer import remove_unused_nodes

    levels = [f"stride_{stride}" for stride in cast(list[int], opened.detector.model.strides)]
    program = trace(opened, options, levels)
    model = without_traces(program.model_proto)
    lines = [f"graph as traced: {len(model.graph.node)} nodes, {model.ByteSize()} bytes"]
    if options.simplify:
        program.optimize()  # onnxscript's optimizer: folds constants, and batch norm into convolutions
        model = without_traces(program.model_proto)
        lines.append(f"simplified: {len(model.graph.node)} nodes, {model.ByteSize()} bytes")
    network = nodes_before(model, levels)
    if options.outputs != "raw":
        del model.graph.output[: len(levels)]
        remove_unused_nodes(model)
    if options.half:
        model = halve(model, network)
        lines.append(f"network in float16: {len(model.graph.node)} nodes, {model.ByteSize()} bytes")
    if options.int8:
        values = (images if options.input == "uint8" else images.float() / 255 for images in calibration)
        model, more = quantize(model, network, levels, (images.numpy() for images in values))
        lines += more
    if options.outputs == "nms":
        model = add_nms(model, cast(DensePostprocess, opened.detector.postprocess))
    description = describe(opened, options)
    for key, value in description.to_metadata().items():
        model.metadata_props.add(key=key, value=value)
    model.producer_name, model.producer_version = description.program.split()
    onnx.checker.check_model(model, full_check=True)
    if (opset := read_opset(model)) != options.opset:  # the exporter warns only
        raise SettingsError(f"--opset {options.opset}: torch could not convert this network from opset {opset}")
    return model, lines


def trace(opened: OpenedDetector, options: ExportOptions, levels: list[str]) -> Any:
    """Trace the detector to an unoptimized `torch.onnx.ONNXProgram`.

    Args:
        opened: the detector.
        options: options of the export.
        levels: names of the raw outputs.

    Raises:
        SettingsError: torch cannot export the network.
    """
    images, sizes = example_images(opened, options)
    decode = options.outputs != "raw"
    try:
        return torch.onnx.export(
            ExportedDetector(opened, decode).eval(),
            (images,),
            dynamo=True,
            opset_version=options.opset,
            input_names=["images"],
            output_names=levels + OUTPUT_NAMES[options.outputs],
            dynamic_shapes={"images": sizes},
            verbose=False,
            optimize=False,
        )
    except torch.onnx.OnnxExporterError as error:
        hint = " with --dynamic-size" if options.dynamic_size else ""
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise SettingsError(f"torch cannot export this network{hint}: {reason}") from None


def example_images(opened: OpenedDetector, options: ExportOptions) -> tuple[Tensor, dict[int, Any]]:
    """Images for a trace, and the dimensions that stay free."""
    multiple, size = opened.detector.geometry.size_multiple, opened.settings.evaluation.image_size
    rows = columns = size
    sizes: dict[int, Any] = {0: torch.export.Dim("batch")}
    if options.dynamic_size:
        # The exporter would treat equal sides, or sides of a single cell, as constants.
        rows, columns = max(size, 2 * multiple), max(size, 2 * multiple) + multiple
        sizes |= {2: multiple * torch.export.Dim("rows"), 3: multiple * torch.export.Dim("columns")}
    dtype = torch.uint8 if options.input == "uint8" else torch.float32
    return torch.zeros(2, 3, rows, columns, dtype=dtype), sizes


def without_traces(model: Any) -> Any:
    """Remove the stack traces that torch adds to each node: they take half the file and contain local paths."""
    graph = model.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    return model


def nodes_before(model: Any, values: list[str]) -> set[str]:
    """Collect the names of all nodes that the given values depend on."""
    producers = {output: node for node in model.graph.node for output in node.output}
    names: set[str] = set()
    waiting = [*values]
    while waiting:
        node = producers.get(waiting.pop())
        if node is not None and node.name not in names:
            names.add(node.name)
            waiting.extend(node.input)
    return names


def halve(model: Any, network: set[str]) -> Any:
    """Convert the nodes of the network to float16; inputs, outputs and all other nodes stay float32."""
    import onnx
    import onnx_ir
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxscript.optimizer import remove_unused_nodes

    behind = {node.name for node in model.graph.node if node.name not in network}
    halved = onnx_ir.from_proto(convert_float_to_float16(model, keep_io_types=True, node_block_list=list(behind)))
    halved.graph.sort()  # the converter appends its casts at the end
    # Remove its casts to float16 and back between two float32 nodes, which would round the boxes.
    for up in [node for node in halved.graph if node.op_type == "Cast"]:
        down = up.inputs[0].producer()
        if down is None or down.op_type != "Cast":
            continue
        source = down.inputs[0]
        if source.producer() is not None and source.producer().name in behind:
            name, is_output = up.outputs[0].name, up.outputs[0].is_graph_output()
            up.outputs[0].replace_all_uses_with(source, replace_graph_outputs=True)
            if is_output:
                up.outputs[0].name, source.name = f"{name}_cast", name
    remove_unused_nodes(halved)
    result = onnx_ir.to_proto(halved)
    result.graph.ClearField("value_info")  # outdated types
    return onnx.shape_inference.infer_shapes(result)


def describe(opened: OpenedDetector, options: ExportOptions) -> Description:
    """Collect the metadata of the file."""
    settings, detector = opened.settings, opened.detector
    evaluation, name = settings.evaluation, settings.model.detector
    own = getattr(settings, name, None)
    return Description(
        program=f"yolo-v3 {tomllib.loads(PROJECT.read_text(encoding='utf-8'))['project']['version']}",
        output_kind=options.outputs,
        network=detector.name,
        names=opened.class_names(),
        category_ids=opened.category_ids,
        input=cast(Any, options.input),
        image_size=evaluation.image_size,
        dynamic_size=options.dynamic_size,
        size_multiple=detector.geometry.size_multiple,
        half=options.half,
        int8=options.int8,
        geometry=dataclasses.asdict(detector.geometry),
        strides=tuple(cast(DetectorModel, detector.model).strides),
        decoding=dict(detector.metadata),
        score=detector.score,
        deviations=detector.deviations,
        thresholds={
            "confidence": evaluation.confidence_threshold,
            "iou": evaluation.iou_threshold,
            "max_detections": evaluation.max_detections,
        },
        held_settings=cast(Any, detector.held_settings),
        settings={
            "model": settings.model.model_dump(mode="json") | {"pretrained": False},  # may be a local path
            **({} if own is None else {name: own.model_dump(mode="json")}),
        },
        parameters=opened.num_parameters(),
        step=opened.step,
        seen=opened.seen,
    )
