"""export.py --int8 and the formats beside ONNX: their files give what the weights give."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import export
import validation
from detection.config.command_line import DEFAULTS
from detection.errors import CheckpointError
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
