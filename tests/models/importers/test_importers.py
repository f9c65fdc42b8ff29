"""Weights of other programs: every tensor in its place, outputs as the other program computes them, or one line."""

import gc
import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from detection.contract import Geometry
from detection.errors import CheckpointError
from detection.models import build_detector
from detection.models.importers import Imported, import_weights, read_weights, settings_of
from detection.models.importers.paddle_file import read_pdparams
from detection.ops.pixels import NormalizePixels
from tests.support import efficientdet_reference, foreign_mmdetection
from tests.support import foreign_networks as foreign

COCO_IDS = [number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]


@dataclass(frozen=True)
class Case:
    """A format: its network, how many tensors and parameters its published file has, and a tensor to damage."""

    network: Callable[[Any, Tensor], list[Tensor]]
    tensors: int
    parameters: int
    tensor: str
    geometry: tuple[str, str, float, str]  # placement, interpolation, range, channel order
    wrap: Callable[[dict[str, Tensor]], Any] = dict
    complete: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict


def efficientdet_d0(tensors: Any, images: Tensor) -> list[Tensor]:
    """D0 with COCO's 90 outputs, by the forward pass that its own tests have."""
    shapes = efficientdet_reference.public_shapes(64, 3, 3, 90, 5, True)
    if isinstance(tensors, foreign.Recorder):
        tensors.state.update(efficientdet_reference.random_state(shapes))
        return []
    normalised = (images.float() / 255 - foreign.MEAN) / foreign.STD
    return efficientdet_reference.Reference({name: tensors(name, *shapes[name]) for name in shapes}, 5).forward(
        normalised
    )


# Counts: PaddleDetection and MMDetection have the 61,949,149 parameters of Darknet's YOLOv3, EfficientDet those of
# effdet's table; MMDetection's MobileNetV2: see there; the others were counted on the networks of the other programs.
CASES = {
    "paddle": Case(
        foreign.paddle, 366, 61_949_149, "neck.yolo_transition.1.conv.weight", ("squash", "cubic", 1.0, "rgb")
    ),
    "mmdetection": Case(
        foreign_mmdetection.mmdetection,
        438,
        61_949_149,
        "backbone.conv_res_block3.res7.conv2.bn.bias",
        ("top_left", "linear", 1.0, "rgb"),
        lambda state: {"meta": {"epoch": 273}, "state_dict": OrderedDict(state)},
    ),
    "mmdetection mobilenet": Case(
        foreign_mmdetection.mmdetection_mobilenet,
        438,
        2_223_872 + 1_513_821,  # torchvision's MobileNetV2 without its classifier; neck and heads by hand
        "neck.conv2.bn.running_mean",
        ("top_left", "linear", 1.0, "rgb"),
        lambda state: {"meta": {"epoch": 30}, "state_dict": OrderedDict(state)},
    ),
    "yolox": Case(
        foreign.yolox,
        528,
        63_724_767,
        "backbone.backbone.dark5.7.conv2.conv.weight",
        ("top_left", "linear", 255.0, "bgr"),
        lambda state: {"start_epoch": 300, "model": state},
    ),
    "research darknet": Case(
        foreign.research_darknet,
        458,
        63_196_480,
        "dbl_m_1.conv.bias",
        ("letterbox", "linear", 1.0, "rgb"),
        lambda state: {"state_dict": state, "optimizer": {"state": {0: {"step": torch.tensor(9.0)}}}},
    ),
    "research mobilenet": Case(
        foreign.research_mobilenet_small,
        630,
        10_078_232,
        "encoder.backbone_nn.4.block.1.0.weight",
        ("letterbox", "linear", 1.0, "rgb"),
        lambda state: {"state_dict": state},
        foreign.with_second_names,
    ),
    "research mobilenet large": Case(
        foreign.research_mobilenet_large,
        766,
        25_345_096,
        "encoder.backbone_nn.16.1.running_var",
        ("letterbox", "linear", 1.0, "rgb"),
        lambda state: {"state_dict": state},
        foreign.with_second_names,
    ),
    "efficientdet": Case(
        efficientdet_d0,
        784,
        3_880_067,
        "fpn.cell.2.fnode.7.combine.edge_weights",
        ("top_left", "linear", 1.0, "rgb"),
    ),
    "timm": Case(
        foreign.timm_darknet53,
        314,
        41_609_928,
        "stages.4.blocks.3.conv1.bn.running_var",
        ("letterbox", "linear", 1.0, "rgb"),
    ),
}
STATISTICS = ("running_mean", "running_var", "_mean", "_variance", "num_batches_tracked")


@pytest.fixture(scope="module", params=CASES)
def made(request: pytest.FixtureRequest) -> Iterator[tuple[Case, dict[str, Tensor]]]:
    """A case and its synthetic file; full size, one at a time."""
    case = CASES[request.param]
    yield case, case.complete(foreign.synthetic_file(case.network, seed=len(request.param)))
    gc.collect()


def network_of(imported: Imported) -> tuple[Any, Geometry]:
    """Our network with these weights, built without drawing random ones first, and its geometry."""
    settings = settings_of(imported)
    with torch.device("meta"):
        detector = build_detector(settings, imported.num_classes)
    geometry, model = detector.geometry, cast(Any, detector.model.to_empty(device="cpu"))
    model.normalize = NormalizePixels(
        geometry.pixel_mean, geometry.pixel_std, geometry.pixel_range, geometry.channel_order
    )
    part = model if imported.whole else model.backbone
    part.load_state_dict(imported.state, assign=True)
    return model.eval(), geometry


def test_outputs_are_those_of_the_other_program(made: tuple[Case, dict[str, Tensor]]) -> None:
    case, state = made
    learnt = {name: value for name, value in state.items() if not name.endswith(STATISTICS)}
    twins = sum(value.numel() for name, value in learnt.items() if name.startswith("encoder.backbone_nn."))
    assert (len(state), sum(map(torch.numel, learnt.values())) - twins) == (case.tensors, case.parameters)
    imported = import_weights(case.wrap(state), "file", keep_classes=True)
    model, geometry = network_of(imported)
    assert (geometry.placement, geometry.interpolation, geometry.pixel_range, geometry.channel_order) == case.geometry
    if imported.num_classes == 80:
        assert imported.names is not None and imported.ids is not None and list(imported.ids) == COCO_IDS
        assert [imported.names[label] for label in (0, 11, 79)] == ["person", "stop sign", "toothbrush"]
    images = foreign.images_of(64)
    with torch.no_grad():
        expected = case.network(foreign.File(state), images)
        given = model(images) if imported.whole else model.backbone(model.normalize(images))
    for theirs, ours in zip(expected, given, strict=True):
        assert theirs.shape == ours.shape and theirs.std() > 0.1
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_what_does_not_fit_is_refused(made: tuple[Case, dict[str, Tensor]]) -> None:
    """Alone for the smallest file, all at once for the others: each is counted and named."""
    case, state = made
    # not of an encoder whose tensors have a second name, which would be wrong too
    kernels = [name for name in state if state[name].dim() == 4 and not name.startswith("encoder.")]
    other = next(name for name in reversed(kernels or list(state)) if name != case.tensor)
    cases = foreign.damaged(state, case.tensor, other)
    for what in cases if case.parameters < 4e6 else ["all"]:
        damaged, words = cases[what]
        with pytest.raises(CheckpointError) as raised:
            import_weights(case.wrap(damaged), "weights.pth")
        message = str(raised.value)
        assert words in message and message.startswith("weights.pth, ") and "\n" not in message, what


def research_file(seed: int = 3) -> dict[str, Tensor]:
    return foreign.with_second_names(foreign.synthetic_file(foreign.research_mobilenet_small, seed))


def test_classes_without_objects_are_left_out() -> None:
    """Of three anchors' 91 scores those of COCO's 80 categories stay, in their order; boxes and objectness stay."""
    state = research_file()
    for level in (1, 2, 3):
        state[f"conv_s{level}.bias"] = torch.arange(288.0)
    imported = import_weights({"state_dict": state}, "file")
    expected = [96 * anchor + value for anchor in range(3) for value in (*range(5), *(5 + n for n in COCO_IDS))]
    outputs = [name for name in imported.state if name.endswith("1.bias") and len(imported.state[name]) == 255]
    assert len(outputs) == 3 and all(imported.state[name].tolist() == expected for name in outputs)
    kept = import_weights({"state_dict": state}, "file", keep_classes=True)
    assert kept.num_classes == 91 and kept.names is not None and kept.names[:2] == ("unused_0", "person")


def test_second_names_must_agree() -> None:
    state = research_file()
    state["encoder.backbone_nn.0.0.weight"] = state["encoder.backbone_nn.0.0.weight"] + 1
    with pytest.raises(CheckpointError, match=r"encoder\.backbone_nn\.0\.0\.weight differs from"):
        import_weights(state, "file")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("bbox_head.convs_pred.0.weight", torch.ones(255, 96, 1, 1), "another backbone than Darknet-53 or MobileNetV2"),
        ("dbl_1_1.conv.weight", torch.ones(4, 7, 1, 1), "reads 7 channels"),
        ("yolo_head.yolo_output.0.bias", torch.ones(16), "have 16 filters, not 3"),
        ("backbone.out1_cbl.conv.weight", torch.ones(1), "no head.cls_preds"),
        ("fpn.cell.0.fnode.0.x", torch.ones(1), "with symmetric padding"),
        ("fpn.cell.0.fnode.0.after_combine.conv.conv_pw.bias", torch.ones(1), "has no filters, as no published size"),
    ],
)
def test_networks_that_ours_cannot_be(name: str, value: Tensor, words: str) -> None:
    marks = {"bbox_head.convs_bridge.0.conv.weight": torch.ones(1)} if name.startswith("bbox") else {}
    with pytest.raises(CheckpointError, match=words):
        import_weights({name: value, **marks}, "file")


# Paddle's pickles


def pdparams(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 4])  # the lowest and the highest that Paddle writes
def test_arrays_of_a_pickle(protocol: int, tmp_path: Path) -> None:
    arrays = {
        "plain": np.arange(6, dtype=np.float32).reshape(2, 3),
        "columns first": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "high byte first": np.arange(3, dtype=">f8"),
        "whole numbers": np.array([[7]], dtype=np.int64),
        "one value": np.array(2.5, dtype=np.float16),
        "empty": np.zeros((0, 4), dtype=np.float32),
    }
    content = OrderedDict(arrays) | {"StructuredToParameterName@@": {"plain": "conv2d_0.w_0"}}
    state = read_pdparams(pdparams(tmp_path / "a.pdparams", content, protocol))
    assert list(state) == list(arrays)
    for name, array in arrays.items():
        assert state[name].tolist() == array.tolist() and tuple(state[name].shape) == array.shape, name


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def huge() -> bytes:
    """A pickle that asks for an array of 2^50 values."""
    small = pickle.dumps({"a": np.zeros(1000, dtype=np.float32)}, 2)
    return small.replace(b"M\xe8\x03", b"\x8a\x07" + (2**50).to_bytes(7, "little"))


def test_hostile_and_damaged_pickles(tmp_path: Path) -> None:
    path, trace = tmp_path / "a.pdparams", tmp_path / "trace"
    files = {
        "names .*system": pickle.dumps({"a": Command(trace)}),
        "names builtins.*eval": b"cbuiltins\neval\n(V1+1\ntR.",
        "array of the type O": pickle.dumps({"a": np.array([{}], dtype=object)}, 2),
        "in 4000 bytes": huge(),
        "it holds a list": pickle.dumps([1, 2]),
        "b is none": pickle.dumps({"b": 3.0}),
        "no .pdparams file": pickle.dumps({"a": np.zeros(9)}, 4)[:-20],
    }
    files["no .pdparams file of arrays: "] = struct.pack("<3iQ", 0, 2, 0, 7)
    for words, content in files.items():
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=words) as raised:
            read_weights(path)
        assert "\n" not in str(raised.value)
    assert not trace.exists()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_weights(tmp_path / "absent.pdparams")
