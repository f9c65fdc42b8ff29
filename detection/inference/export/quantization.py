"""Static quantization of an ONNX graph to 8 bits, with ranges measured on images."""

import contextlib
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

# Between two convolutions these would otherwise turn 8 bits into float and back.
OPERATORS = ["Conv", "MaxPool", "Concat", "Resize", "Add", "LeakyRelu", "Relu", "Clip"]
SHOWN = 6  # names of nodes that stay float


class _Batches:
    """ONNX Runtime's way to ask for batches."""

    def __init__(self, batches: Iterable[np.ndarray]) -> None:
        self._batches: Iterator[np.ndarray] = iter(batches)
        self.images = 0

    def get_next(self) -> dict[str, np.ndarray] | None:
        images = next(self._batches, None)
        if images is None:
            return None
        self.images += len(images)
        return {"images": images}


def quantize(model: Any, network: set[str], levels: list[str], batches: Iterable[np.ndarray]) -> tuple[Any, list[str]]:
    """Quantize the convolutions of a network, and what lies between them, to 8 bits.

    Weights are signed with a scale per filter, activations unsigned with a scale and a zero per tensor, from the
    smallest and the largest value that the images give (QDQ form: each operator between QuantizeLinear and
    DequantizeLinear). Decoding stays float32, and so do the convolutions that make the predictions: one scale for
    offsets, sizes and class logits together would leave none of them enough steps.

    Args:
        model: `onnx.ModelProto`, with input `images`.
        network: names of the nodes of the network.
        levels: names of the raw outputs.
        batches: inputs of the model.

    Returns:
        The quantized model, and lines about it for the user.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    outputs, behind = output_nodes(model, levels)
    decoding = [node.name for node in model.graph.node if node.name not in network]
    reader = _Batches(batches)
    with tempfile.TemporaryDirectory() as directory:
        before, after = Path(directory) / "float.onnx", Path(directory) / "int8.onnx"
        onnx.save(model, str(before))
        with quiet():
            quantize_static(
                str(before),
                str(after),
                reader,
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=OPERATORS,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=[*outputs, *behind, *decoding],
                calibrate_method=CalibrationMethod.MinMax,
            )
        quantized = onnx.load(str(after))
    del quantized.metadata_props[:]  # the quantizer adds entries of its own
    quantized.metadata_props.extend(model.metadata_props)
    count = sum(node.op_type == "Conv" for node in model.graph.node)
    more = ", ..." if len(outputs) > SHOWN else ""
    return quantized, [
        f"int8: {count - len(outputs)} of {count} convolutions, a scale per filter; ranges of {reader.images} training "
        f"images; {quantized.ByteSize()} bytes",
        f"stay float32: the output convolutions ({', '.join(outputs[:SHOWN])}{more}), {len(behind)} nodes that arrange "
        f"their results and {len(decoding)} of decoding",
    ]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out the quantizer's advice to prepare the graph, which onnxscript's optimizer has done."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def output_nodes(model: Any, levels: list[str]) -> tuple[list[str], list[str]]:
    """Names of the convolutions that make the raw outputs, and of the nodes between them and the outputs."""
    producers = {output: node for node in model.graph.node for output in node.output}
    outputs: dict[str, None] = {}
    between: dict[str, None] = {}
    waiting = [*levels]
    while waiting:
        node = producers.get(waiting.pop())
        if node is None or node.name in outputs or node.name in between:
            continue
        if node.op_type == "Conv":
            outputs[node.name] = None
        else:
            between[node.name] = None
            waiting.extend(node.input)
    return list(outputs), list(between)
