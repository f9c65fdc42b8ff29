"""The anchor-free network: sizes, layout, initial state, pretrained classes, and what the settings reach."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detection.config.loading import load_settings
from detection.contract import Detector, DetectorModel, HasClassRows
from detection.errors import SettingsError
from detection.models import POSTPROCESSES, build_detector
from detection.models.backbones.mobilenet import DepthwiseConv2d
from detection.models.darknet.weights import Header, write_darknet_weights
from detection.models.necks import TopDownNeck
from detection.models.pretrained import carry_outputs, load_pretrained
from detection.models.yolo.network import YOLOv3
from detection.models.yolox import ASSIGNERS, CRITERIA
from tests.support.paths import ARGS, REPOSITORY

SMALL = ("model.backbone=mobilenet_v3_small", "yolox.neck_channels=[24, 16, 8]", "yolox.head_channels=8")
PUBLISHED = REPOSITORY.parent / "shared" / "reference" / "keys" / "keys_yolox_darknet53.txt"


def build(num_classes: int, *words: str, seed: int = 0) -> Detector:
    torch.manual_seed(seed)
    return build_detector(load_settings(ARGS, words=["model.detector=yolox", *words])[0], num_classes)


def images_of(count: int, height: int, width: int) -> Tensor:
    return torch.randint(
        0, 256, (count, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def test_size_of_the_published_network() -> None:
    """63,724,767 parameters for 80 classes with Darknet-53 and pooling, as YOLOX-DarkNet53 has."""
    with torch.device("meta"):
        model = build(80, "yolox.spp=true").model
    assert sum(parameter.numel() for parameter in model.parameters()) == 63_724_767


def test_convolutions_stand_in_the_order_of_the_published_weights() -> None:
    """Backbone and neck one after another; of the heads the same shapes, there by kind, here by level."""
    if not PUBLISHED.is_file():
        pytest.skip(f"{PUBLISHED} is not on this machine")
    published = {}
    for line in PUBLISHED.read_text().splitlines():
        name, shape = line.split("\t")[:2]
        if len(numbers := tuple(map(int, re.findall(r"\d+", shape)))) == 4:
            published[name] = numbers
    with torch.device("meta"):
        model = build(80, "yolox.spp=true").model
    neck = []
    for level, stage in enumerate(model.neck.stages):
        neck += [*([model.neck.laterals[level - 1]] if level else []), stage]
    ours = [
        tuple(module.weight.shape)
        for part in (model.backbone, *neck)
        for module in part.modules()
        if isinstance(module, nn.Conv2d)
    ]
    theirs = [shape for name, shape in published.items() if not name.startswith("head.")]
    theirs_by_part = {
        part: [shape for name, shape in published.items() if name.startswith(part)]
        for part in ("backbone.backbone.", "backbone.out1_cbl", "backbone.out1.", "backbone.out2_cbl", "backbone.out2.")
    }
    assert ours == [shape for shapes in theirs_by_part.values() for shape in shapes] and len(ours) == len(theirs)
    for level, head in enumerate(model.heads):
        kinds = {
            "stems": head.stem, "cls_convs": head.class_branch, "reg_convs": head.box_branch,
            "cls_preds": head.classes, "reg_preds": head.boxes, "obj_preds": head.objectness,
        }  # fmt: skip
        for kind, part in kinds.items():
            expected = [shape for name, shape in published.items() if name.startswith(f"head.{kind}.{level}.")]
            assert [tuple(m.weight.shape) for m in part.modules() if isinstance(m, nn.Conv2d)] == expected != []


def test_the_neck_is_the_one_of_the_anchor_based_family() -> None:
    """With the same weights it makes the same maps as the neck of `YOLOv3`."""
    words = ["model.detector=yolo", "model.backbone=mobilenet_v3_small", "yolo.neck_channels=[24, 16, 8]"]
    torch.manual_seed(0)
    other = build_detector(load_settings(ARGS, words=words)[0], 3).model.eval()
    assert isinstance(other, YOLOv3)
    neck = TopDownNeck(other.backbone.out_channels, [24, 16, 8]).eval()
    neck.stages.load_state_dict(other.neck.state_dict())
    neck.laterals.load_state_dict(other.laterals.state_dict())
    assert neck.out_channels == (8, 16, 24)
    images = images_of(1, 64, 96)
    with torch.no_grad():
        maps = neck(other.backbone(other.normalize(images)))
        expected = other(images)
        for level, features in enumerate(maps):
            assert torch.equal(other.heads[2 - level](features), expected[level])


@pytest.mark.parametrize(
    ("words", "strides"),
    [
        (SMALL, (8, 16, 32)),
        ((*SMALL, "yolox.head_depthwise=true", "yolox.spp=true"), (8, 16, 32)),
        (("model.backbone=darknet_tiny", "yolox.neck_channels=[16, 8]", "yolox.head_channels=8"), (16, 32)),
        (
            ("model.backbone=timm/test_resnet", "yolox.neck_channels=[16, 8, 8, 8]", "yolox.head_channels=8"),
            (4, 8, 16, 32),
        ),
    ],
)
def test_outputs_and_gradients_on_any_backbone(words: tuple[str, ...], strides: tuple[int, ...]) -> None:
    if "timm" in words[0]:
        pytest.importorskip("timm")
    detector = build(3, *words)
    model = detector.model
    assert isinstance(model, DetectorModel) and isinstance(model, HasClassRows) and model.strides == strides
    outputs = model(images_of(2, 64, 96))
    assert [tuple(output.shape) for output in outputs] == [(2, 1, 64 // s, 96 // s, 8) for s in strides]
    boxes = torch.tensor([[[4.0, 4, 20, 20], [30, 10, 90, 60]]] * 2)
    losses = detector.criterion(outputs, {"boxes": boxes, "labels": torch.tensor([[0, 2]] * 2)})
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    depthwise = [module for module in model.heads.modules() if isinstance(module, DepthwiseConv2d)]
    assert len(depthwise) == (4 * len(strides) if "yolox.head_depthwise=true" in words else 0)
    with pytest.raises(ValueError, match="multiple of 32"):
        model(images_of(1, 48, 64))


@pytest.mark.parametrize("prior", [0.01, 0.1])
def test_the_untrained_network_predicts_the_prior(prior: float) -> None:
    """Objectness and classes at every cell, boxes of one stride at its corner, up to small random weights."""
    model = build(3, *SMALL, f"yolox.prior={prior}").model
    with torch.no_grad():
        for output in model(images_of(2, 64, 96)):
            assert (output[..., 4:] - math.log(prior / (1 - prior))).abs().max() < 0.5
            assert output[..., :4].abs().max() < 0.5


@pytest.mark.parametrize("assigner", ASSIGNERS)
def test_settings_reach_the_parts(assigner: str) -> None:
    words = [
        f"yolox.assigner={assigner}",
        "yolox.box_weight=2.0",
        "yolox.objectness_weight=3.0",
        "yolox.class_weight=4.0",
    ]
    words += ["yolox.l1_weight=5.0", "evaluation.iou_threshold=0.3", "model.batch_norm_momentum=0.03"]
    words += [
        "yolox.batch_norm_epsilon=0.002",
        "yolox.pixels=bgr255",
        "model.placement=top_left",
        "model.fill=[114, 114, 114]",
    ]
    detector = build(2, *SMALL, *words)
    assert type(detector.criterion) is CRITERIA["yolox"] and detector.criterion.weights == (2, 3, 4, 5)
    assert detector.criterion.assigner is ASSIGNERS[assigner] and detector.postprocess.iou_threshold == 0.3
    norms = [module for module in detector.model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps) for norm in norms} == {(0.03, 0.002)}
    geometry = detector.geometry
    assert (geometry.placement, geometry.fill, geometry.pixel_range, geometry.channel_order) == (
        "top_left", (114, 114, 114), 255.0, "bgr"
    )  # fmt: skip
    pixel = torch.tensor([255, 0, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    assert detector.model.normalize(pixel).flatten().tolist() == [51, 0, 255]
    plain = build(2, *SMALL)
    assert plain.model.normalize.pixel_range == 1 and {
        m.eps for m in plain.model.neck.modules() if hasattr(m, "eps")
    } == {1e-5}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.backbone=darknet_tiny"], "yolox.neck_channels: has 3 levels, but model.backbone=darknet_tiny has 2"),
        (["model.backbone=darknet_cfg", "model.cfg=CFG"], "model.backbone=darknet_cfg brings its own head"),
        (["yolox.neck_channels=[]"], "yolox.neck_channels"),
        (["yolox.assigner=ota"], "yolox.assigner = 'ota'"),
        (["yolox.prior=1"], "yolox.prior"),
    ],
)
def test_impossible_settings_are_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "a.cfg").write_text("[net]\nwidth=32\n")
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}") as caught, torch.device("meta"):
        build(2, *(word.replace("CFG", str(tmp_path / "a.cfg")) for word in words))
    assert "\n" not in str(caught.value)


def test_class_rows_carry_classes_by_name() -> None:
    """Boxes and objectness are the file's; of the classes those of equal names, the others the new network's."""
    old, new = build(2, *SMALL, seed=1).model, build(3, *SMALL, seed=2).model
    for convolution in old.output_convolutions():
        nn.init.normal_(convolution.bias)
    state = {name: value.clone() for name, value in old.state_dict().items()}
    lines = carry_outputs(new, state, ["cat", "dog"], ["bird", "cat", "fish"])
    assert "classes from the file: cat; starting anew: bird, fish; not used: dog" in lines[0]
    fresh = {name: value.clone() for name, value in new.state_dict().items()}
    new.load_state_dict(state)
    for level in range(3):
        ours, theirs, prefix = new.heads[level], old.heads[level], f"heads.{level}.classes"
        for part in ("weight", "bias"):
            assert torch.equal(getattr(ours.boxes, part), getattr(theirs.boxes, part))
            assert torch.equal(getattr(ours.objectness, part), getattr(theirs.objectness, part))
            classes = getattr(ours.classes, part)
            assert torch.equal(classes[1], getattr(theirs.classes, part)[0])
            assert torch.equal(classes[[0, 2]], fresh[f"{prefix}.{part}"][[0, 2]])
    counts: list[Any] = [tuple(rows.shape) for rows in new.class_rows(3)]
    assert counts == [(0, 3), (0, 3), (1, 3)] * 3


def test_raw_outputs_of_an_exported_file_are_decoded_alike() -> None:
    """From the plain values that the file carries."""
    detector = build(2, *SMALL)
    settings = load_settings(ARGS, words=["model.detector=yolox"])[0]
    postprocess = POSTPROCESSES["yolox"](json.loads(json.dumps(detector.metadata)), settings)
    with torch.no_grad():
        outputs = detector.model.eval()(images_of(2, 64, 96))
        for ours, other in zip(detector.postprocess.decode(outputs), postprocess.decode(outputs), strict=True):
            assert torch.equal(ours, other)


def test_a_darknet_backbone_starts_from_darknet_weights(tmp_path: Path) -> None:
    """A file of the backbone, which the anchor-based family wrote, fills the backbone and nothing else."""
    words = ["model.backbone=darknet_tiny", "yolo.neck_channels=[8, 8]", "yolo.anchors=[[[10, 14]], [[81, 82]]]"]
    other = build(2, *words, "model.detector=yolo", seed=1).model
    count = len(other.backbone.darknet_convolutions())
    path = tmp_path / f"tiny.conv.{count}"
    write_darknet_weights(other, path, Header(), count)
    settings = load_settings(
        ARGS, words=["model.detector=yolox", *words, "yolox.neck_channels=[8, 8]", f"model.pretrained={path}"]
    )[0]
    torch.manual_seed(2)
    model = build_detector(settings, 2).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert f"loaded the first {count} of" in load_pretrained(model, settings.model, ["cat", "dog"])[1]
    for name, value in model.state_dict().items():
        wanted = other.state_dict()[name] if name.startswith("backbone.") else before[name]
        assert torch.equal(value, wanted), name
