"""export.py --int8 and the formats beside ONNX: their files give what the weights give."""

import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

import detect
import export
import validation
from detection.config.command_line import DEFAULTS
from detection.errors import CheckpointError
from detection.inference.onnx_model import read_weights
from detection.inference.torch_programs import METADATA
from detection.inference.weights import open_weights
from detection.models.darknet.cfg import parse_cfg
from detection.models.darknet.network import DarknetNetwork
from detection.models.darknet.weights import Header, write_darknet_weights
from tests.support.darknet_descriptions import conv, net, output, write_cfg, yolo

CFG = write_cfg([net(64), conv(8, 3, 4), conv(12, 3, 4), output(3 * 7), yolo("0,1,2", "10,12, 30,28, 60,50", 2)])
NAMES = ("red", "green")


@pytest.fixture
def weights(tmp_path: Path) -> list[str | Path]:
    """Command-line words of a small network with random weights and the classes of `drawn_dataset`."""
    torch.manual_seed(0)
    network = DarknetNetwork(parse_cfg(CFG), num_classes=2, objectness_prior=0.5).eval()
    write_darknet_weights(network, tmp_path / "net.weights", Header(seen=7))
    (tmp_path / "net.cfg").write_text(CFG)
    (tmp_path / "net.names").write_text("\n".join(NAMES))
    return [
        *("--weights", tmp_path / "net.weights", "--cfg", tmp_path / "net.cfg", "--names", tmp_path / "net.names"),
        *("data.num_workers=0", "run.device=cpu", "run.precision=off"),
    ]


@pytest.mark.parametrize(
    ("kind", "suffix"), [("torchscript", ".torchscript"), ("torch_export", ".pt2"), ("openvino", "_openvino/net.xml")]
)
def test_a_file_of_each_format_gives_the_boxes_of_the_weights(
    kind: str, suffix: str, weights: list[str | Path], run_script: Callable[..., Any], tmp_path: Path
) -> None:
    if kind == "openvino":
        pytest.importorskip("openvino", reason="openvino is not installed")
    out = tmp_path / "out"
    result = run_script(export.main, *weights, "--format", kind, "--output", out)
    assert result.returncode == 0 and "largest differences" in result.stdout, result.stdout + result.stderr
    file = out / f"net{suffix}"
    source = open_weights(tmp_path / "net.weights", tmp_path / "net.cfg", tmp_path / "net.names", DEFAULTS)
    opened = open_weights(file, None, None, DEFAULTS)
    assert opened.class_names() == NAMES and opened.num_parameters() == source.num_parameters()
    for batch in (1, 2):
        images = torch.randint(0, 256, (batch, 3, 64, 64), dtype=torch.uint8)
        with torch.no_grad():
            boxes, scores = source.detector.postprocess.decode(source.detector.model(images))
            found = opened.detector.model(images)
        torch.testing.assert_close(found[0], boxes, atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(found[1], scores, atol=1e-5, rtol=1e-4)
    assert run_script(export.main, *weights, "--format", kind, "--output", out).returncode != 0  # never overwritten
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="net"):
        open_weights(file, None, None, DEFAULTS)


def poison(file: Path, value: float) -> None:
    """Write a number over the first weight of a file of export.py."""
    if file.suffix == ".xml":
        content = bytearray(file.with_suffix(".bin").read_bytes())
        content[:4] = struct.pack("<f", value)
        file.with_suffix(".bin").write_bytes(content)
    elif file.suffix == ".onnx":
        import onnx

        model = onnx.load(file)
        tensor = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
        tensor.raw_data = struct.pack("<f", value) + tensor.raw_data[4:]
        onnx.save(model, file)
    else:
        extra = {METADATA: ""}
        load = torch.jit.load if file.suffix == ".torchscript" else torch.export.load
        program = load(file, **{f"{'_' * (file.suffix == '.torchscript')}extra_files": extra})
        weights = program.state_dict() if file.suffix == ".torchscript" else program.state_dict
        with torch.no_grad():
            next(iter(weights.values())).view(-1)[0] = value
        if file.suffix == ".torchscript":
            torch.jit.save(program, str(file), _extra_files=extra)
        else:
            torch.export.save(program, file, extra_files=extra)


@pytest.mark.filterwarnings("ignore:.torch.jit")  # deprecated
@pytest.mark.parametrize(
    ("kind", "suffix", "value"),
    [
        ("onnx", ".onnx", math.nan),
        ("onnx", ".onnx", -math.inf),
        ("torchscript", ".torchscript", math.nan),
        ("torch_export", ".pt2", math.nan),
        ("openvino", "_openvino/net.xml", math.nan),
    ],
)
def test_a_file_that_is_not_finite_is_refused(
    kind: str, suffix: str, value: float, weights: list[str | Path], run_script: Callable[..., Any], tmp_path: Path
) -> None:
    for module in {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}.get(kind, ()):
        pytest.importorskip(module, reason=f"{module} is not installed")
    assert run_script(export.main, *weights, "--format", kind, "--output", tmp_path / "out").returncode == 0
    file = tmp_path / "out" / f"net{suffix}"
    poison(file, value)
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((64, 64, 3), np.uint8))
    for main, words in ((detect.main, [tmp_path / "a.png"]), (validation.main, [])):
        code, out, err = run_script(main, "--weights", file, *words, "--output", tmp_path / "found")
        assert code == 7 and out == "" and not (tmp_path / "found").exists()
        assert re.fullmatch(r".*net\.\w+ is of no use: 1 of its \d+ tensors have NaN or infinity \(.+\); .*\n", err)


def test_weights_of_an_unusual_onnx_file_are_read_or_refused(tmp_path: Path) -> None:
    """Protobuf of hand: ONNX Runtime is not asked. A graph in two parts, values in float_data; then an old group."""
    tensor = b"\x10\x01" + b"\x22\x08" + struct.pack("<2f", 1.0, math.inf) + b"\x42\x01w"  # float32, values, name
    graph = b"\x2a" + bytes([len(tensor)]) + tensor
    (tmp_path / "a.onnx").write_bytes((b"\x3a" + bytes([len(graph)]) + graph) * 2)
    assert [(name, values.tolist()) for name, values in read_weights(tmp_path / "a.onnx")] == [("w", [1, math.inf])] * 2
    (tmp_path / "a.onnx").write_bytes(b"\x0b\x0c")
    with pytest.raises(CheckpointError, match="its weights cannot be read"):
        next(read_weights(tmp_path / "a.onnx"))


def test_eight_bits_are_kept_only_if_they_cost_little(
    weights: list[str | Path],
    run_script: Callable[..., Any],
    drawn_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    words = [*weights, f"data.root={drawn_dataset}", "--int8", "--calibration-images", 4]
    values = iter([0.5, 0.44])
    with monkeypatch.context() as patch:
        patch.setattr(export, "average_precision", lambda *_: next(values))
        refused = run_script(export.main, *words, "--max-ap-loss", 0.05, "--output", tmp_path / "refused")
    assert refused.returncode == 1 and "lost 0.0600 (allowed 0.05)" in refused.stderr
    assert not list((tmp_path / "refused").iterdir())

    result = run_script(export.main, *words, "--output", tmp_path / "out")
    assert result.returncode == 0 and "AP on 4 validation images" in result.stdout, result.stdout + result.stderr
    graph = onnx.load(tmp_path / "out" / "net.onnx").graph
    eight = {value.name for value in graph.initializer if value.data_type == onnx.TensorProto.INT8}
    assert sum(name.endswith("_quantized") or "weight" in name for name in eight) >= 2  # both hidden convolutions
    source = open_weights(tmp_path / "net.weights", tmp_path / "net.cfg", tmp_path / "net.names", DEFAULTS)
    opened = open_weights(tmp_path / "out" / "net.onnx", None, None, DEFAULTS)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        scores = source.detector.postprocess.decode(source.detector.model(images))[1]
        assert 0 < (opened.detector.model(images)[1] - scores).abs().max() < 0.05  # some of 256 steps of each layer
    seen = run_script(validation.main, "--weights", tmp_path / "out" / "net.onnx", f"data.root={drawn_dataset}")
    assert seen.returncode == 0 and "convolutions in 8 bits" in seen.stdout, seen.stderr
