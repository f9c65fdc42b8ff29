"""The contract of all backbones, and the YOLOv3 family compared with Darknet's cfg files."""

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from detection.config.loading import load_settings
from detection.contract import Detector
from detection.errors import CheckpointError, SettingsError
from detection.models import build_detector
from detection.models.backbones import BACKBONES, build_backbone
from detection.models.backbones.darknet import Darknet53, DarknetTiny
from detection.models.backbones.timm_backbone import check_declaration
from detection.models.darknet.cfg import format_cfg, parse_cfg
from detection.models.darknet.export import describe_detector
from detection.models.darknet.network import DarknetNetwork
from detection.models.darknet.weights import Header, load_darknet_weights, write_darknet_weights
from detection.models.necks import PyramidPooling
from detection.models.pretrained import load_pretrained
from detection.models.yolo.network import YOLOv3
from tests.support.darknet_descriptions import yolov3, yolov3_tiny
from tests.support.paths import ARGS

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
TIMM = [pytest.param(f"timm/{name}", marks=needs_timm) for name in ("test_resnet", "mobilenetv3_small_050")]
WIDTHS = [16, 12, 8, 8]  # of a neck, coarsest level first
TINY = ["model.backbone=darknet_tiny", "yolo.neck_channels=[256, 128]"]
TINY += ["yolo.anchors=[[[10, 14]], [[81, 82], [135, 169]]]"]


def words(backbone: str, levels: int) -> list[str]:
    anchors = [[[10 * 2**level, 12 * 2**level], [14 * 2**level, 9 * 2**level]] for level in range(levels)]
    return [f"model.backbone={backbone}", f"yolo.neck_channels={WIDTHS[:levels]}", f"yolo.anchors={anchors}"]


def build(*settings: str, num_classes: int = 2) -> Detector:
    loaded, _ = load_settings(ARGS, words=settings)
    return build_detector(loaded, num_classes)


def build_one(backbone: str, levels: int) -> Any:
    return build_backbone(load_settings(ARGS, words=words(backbone, levels))[0].model, levels, "yolo.anchors")


SCALED = ["model.width=0.25", "model.depth=0.33"]


# Of the EfficientNets the smallest; the others are the same code, see test_efficientnet.py.
SMALLEST = [name for name in BACKBONES if not re.match(r"efficientnet|tf_efficientnet_b[1-7]", name)]


@pytest.fixture(scope="module", params=[*SMALLEST, "narrow", *TIMM])
def backbone(request: pytest.FixtureRequest) -> nn.Module:
    """One of each, with batch-norm statistics of a few batches."""
    torch.manual_seed(0)
    levels = 2 if request.param == "darknet_tiny" else 3
    if request.param == "narrow":
        module: Any = build_backbone(load_settings(ARGS, words=SCALED)[0].model, 3, "yolo.anchors")
    else:
        module = build_one(request.param, levels)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.ones_(norm.weight)  # timm's ResNets begin with zeros, which let no gradient through
    with torch.no_grad():
        for _ in range(3):
            module.train()(torch.rand(4, 3, 64, 64))
    return module


# The contract


def test_maps_are_as_declared(backbone: nn.Module) -> None:
    height, width = 64, 96
    with torch.no_grad():
        maps = backbone.eval()(torch.rand(2, 3, height, width))
    assert [tuple(feature.shape) for feature in maps] == [
        (2, channels, height // stride, width // stride)
        for channels, stride in zip(backbone.out_channels, backbone.strides, strict=True)
    ]
    # the neck doubles the size from level to level, and image sizes are multiples of 32
    assert list(backbone.strides) == [32 >> step for step in reversed(range(len(backbone.strides)))]
    assert len(backbone.pixel_mean) == len(backbone.pixel_std) == 3
    assert all(0 <= value <= 1 for value in backbone.pixel_mean)
    assert all(0 < value <= 1 for value in backbone.pixel_std)


def test_batch_equals_singles(backbone: nn.Module) -> None:
    images = torch.rand(3, 3, 64, 96)
    with torch.no_grad():
        together = backbone.eval()(images)
        for index in range(3):
            for feature, alone in zip(together, backbone(images[index : index + 1]), strict=True):
                tolerance = 1e-4 * alone.abs().max().item()
                torch.testing.assert_close(feature[index : index + 1], alone, atol=tolerance, rtol=1e-4)


def test_every_parameter_gets_a_gradient(backbone: nn.Module) -> None:
    """No unused classifier, which a distributed run would wait for."""
    torch.manual_seed(1)
    backbone.train().zero_grad()
    # random factors: the sum of a normalised map would not depend on what was normalised
    sum((feature * torch.randn_like(feature)).sum() for feature in backbone(torch.rand(2, 3, 64, 96))).backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
    assert not any(len(value.shape) == 2 for value in backbone.state_dict().values())  # no fully connected layer


def test_bfloat16_is_near_float32(backbone: nn.Module) -> None:
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = backbone.eval()(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = backbone(images)
    for feature, other in zip(found, expected, strict=True):
        assert (feature.float() - other).norm() < 0.1 * other.norm()


# Levels


@pytest.mark.parametrize(
    ("settings", "strides"),
    [
        (TINY, (16, 32)),
        (words("mobilenet_v3_small", 3), (8, 16, 32)),
        (words("efficientnet_b0", 3), (8, 16, 32)),
        (words("resnet50", 3), (8, 16, 32)),
        pytest.param(words("timm/test_resnet", 1), (32,), marks=needs_timm),
        pytest.param(words("timm/test_resnet", 4), (4, 8, 16, 32), marks=needs_timm),
    ],
)
def test_any_number_of_levels_works_from_images_to_boxes(settings: list[str], strides: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    detector = build(*settings, "evaluation.confidence_threshold=0.0")
    assert detector.criterion is not None
    outputs = detector.model(torch.rand(2, 3, 64, 96))
    assert detector.model.strides == strides
    assert [tuple(output.shape[2:]) for output in outputs] == [(64 // s, 96 // s, 5 + 2) for s in strides]
    boxes = torch.tensor([[[4.0, 4, 60, 50]], [[0, 0, 0, 0]]])
    losses = detector.criterion(outputs, {"boxes": boxes, "labels": torch.tensor([[1], [-1]])})
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in detector.model.parameters())
    assert all(len(found["boxes"]) for found in detector.postprocess(outputs))


def refuse(*settings: str) -> str:
    with pytest.raises(SettingsError) as raised:
        build(*settings)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(("name", "own", "levels"), [("darknet_tiny", 2, 3), ("darknet", 3, 2), ("darknet", 3, 4)])
def test_levels_must_be_the_backbones(name: str, own: int, levels: int) -> None:
    message = refuse(*words(name, levels))
    assert f"yolo.anchors: has {levels} levels" in message and f"model.backbone={name} has {own}" in message


def test_spp_needs_a_neck_that_pools(tmp_path: Path) -> None:
    (tmp_path / "a.cfg").write_text("[net]")
    described = ["model.backbone=darknet_cfg", f"model.cfg={tmp_path / 'a.cfg'}"]
    for settings, name in ((TINY, "darknet_tiny"), (described, "darknet_cfg")):
        assert f"yolo.spp: backbone {name}" in refuse(*settings, "yolo.spp=true")


# Width and depth of Darknet-53


@pytest.mark.parametrize(
    ("width", "depth", "channels", "blocks"),
    [
        (1.0, 1.0, [32, 64, 128, 256, 512, 1024], [1, 2, 8, 8, 4]),
        (0.25, 0.33, [8, 16, 32, 64, 128, 256], [1, 1, 3, 3, 1]),
        (0.375, 0.33, [16, 24, 48, 96, 192, 384], [1, 1, 3, 3, 1]),  # 12 and 0.375 * 8 / 8 round up
        (0.1, 0.01, [8, 8, 16, 24, 48, 104], [1, 1, 1, 1, 1]),
        (1.25, 1.33, [40, 80, 160, 320, 640, 1280], [1, 3, 11, 11, 5]),
    ],
)
def test_scaled_darknet(width: float, depth: float, channels: list[int], blocks: list[int]) -> None:
    with torch.device("meta"):
        network = Darknet53(width, depth)
    assert network.out_channels == tuple(channels[3:])
    assert [len(stage) - 1 for stage in network.stages] == blocks
    assert [network.stem[0].out_channels, *(stage[0][0].out_channels for stage in network.stages)] == channels
    if (width, depth) == (1, 1):
        names = list(network.state_dict())
        assert len(names) == 52 * 6 and names[0] == "stem.0.weight"
        assert sum(value.numel() for value in network.parameters()) == 40_584_928


def test_factors_are_of_darknet_53_alone() -> None:
    for factor in ("width", "depth"):
        message = refuse(*words("mobilenet_v3_small", 3), f"model.{factor}=0.5")
        assert f"model.{factor}: only of backbone darknet; must be 1 with mobilenet_v3_small" in message


def test_weights_of_another_width_are_refused_in_one_line(tmp_path: Path) -> None:
    narrow = build(*SCALED, NARROW)
    half = ["model.width=0.125", "model.depth=0.33", NARROW]
    file = tmp_path / "narrow.conv.16"
    write_darknet_weights(narrow.model, file, Header(), 16)
    assert load_darknet_weights(build(*SCALED, NARROW).model, file).convolutions == 16
    for settings in (half, ["model.depth=0.33", NARROW], ["model.width=0.25", NARROW]):
        with pytest.raises(CheckpointError, match="this network needs") as raised:
            load_darknet_weights(build(*settings).model, file)
        assert "\n" not in str(raised.value)
    settings, _ = load_settings(ARGS, words=[*SCALED, NARROW, "model.pretrained=true"])
    with pytest.raises(SettingsError, match=r"are of model\.width 1 and model\.depth 1, not of 0\.25 and 0\.33"):
        load_pretrained(narrow.model, settings.model, ["a", "b"])


@pytest.mark.parametrize("more", [[], ["yolo.neck=pan"], ["yolo.neck=pan", "yolo.spp=true"]])
def test_a_narrow_network_and_a_pan_export_to_darknet(more: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    detector = build(*SCALED, NARROW, *more)
    assert isinstance(detector.model, YOLOv3)
    for convolution in detector.model.output_convolutions():
        nn.init.normal_(convolution.weight)
    write_darknet_weights(detector.model, tmp_path / "file.weights", Header())
    described = DarknetNetwork(parse_cfg(format_cfg(describe_detector(detector, 64))), 2)
    loaded = load_darknet_weights(described, tmp_path / "file.weights").convolutions
    assert loaded == sum(isinstance(module, nn.Conv2d) for module in detector.model.modules())
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        pairs = zip(detector.model.eval()(images), described.eval()(images), strict=True)
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


# timm


@needs_timm
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mobilenetv3_smal_050", "no such model; the nearest are mobilenetv3_small_050"),
        ("resnet18.a1_in2k", "no such model; the nearest are resnet18.a1_in1k"),
        ("vit_tiny_patch16_224", "has maps at the strides 16; 3 levels need maps of strides 8, 16, 32"),
        ("swin_tiny_patch4_window7_224", "cannot be run on 96 x 64 pixels"),
    ],
)
def test_timm_models_that_do_not_serve(name: str, expected: str) -> None:
    assert f"timm/{name}" in refuse(*words(f"timm/{name}", 3)) and expected in refuse(*words(f"timm/{name}", 3))


@needs_timm
def test_a_false_declaration_is_found() -> None:
    backbone = build_one("timm/test_resnet", 3)
    for name, value in (("out_channels", (48, 192, 97)), ("strides", (4, 8, 16))):
        right = getattr(backbone, name)
        setattr(backbone, name, value)
        with pytest.raises(SettingsError, match=r"timm/test_resnet.*are declared.*\(96, 2, 3\)"):
            check_declaration(backbone)
        setattr(backbone, name, right)


@needs_timm
def test_the_check_of_the_declaration_leaves_no_trace() -> None:
    backbone = build_one("timm/test_resnet", 3)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert all(value == 0 for name, value in before.items() if name.endswith("num_batches_tracked"))
    random = torch.get_rng_state()
    check_declaration(backbone)
    assert torch.equal(torch.get_rng_state(), random) and all(module.training for module in backbone.modules())
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in backbone.parameters())


def test_timm_is_optional(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # importing it raises ImportError
    assert "pip install timm" in refuse(*words("timm/resnet18", 3))


# The family, as Darknet describes it


NARROW = "yolo.neck_channels=[16, 12, 8]"
THREE_EACH = "yolo.anchors=[[[10, 14], [23, 27], [37, 58]], [[81, 82], [135, 169], [344, 319]]]"


@pytest.mark.parametrize(
    ("cfg", "settings", "convolutions"),
    [
        (yolov3(size=64, widths=(16, 12, 8)), [NARROW], 75),
        (yolov3(True, 64, (16, 12, 8)), [NARROW, "yolo.spp=true"], 76),
        (yolov3_tiny(64), [*TINY, THREE_EACH], 13),
    ],
    ids=["yolov3", "yolov3-spp", "yolov3-tiny"],
)
def test_family_is_the_described_network(cfg: str, settings: list[str], convolutions: int, tmp_path: Path) -> None:
    """With the same weights file both networks compute the same: order of layers and channels, padding."""
    torch.manual_seed(0)
    model = build(*settings).model
    assert isinstance(model, YOLOv3) and len(model.darknet_convolutions()) == convolutions
    with torch.no_grad():
        for _ in range(2):
            model.train()(torch.rand(2, 3, 64, 64))
        for convolution in model.output_convolutions():
            nn.init.normal_(convolution.weight)  # small values would hide differences
    write_darknet_weights(model, tmp_path / "file.weights", Header())
    described = DarknetNetwork(parse_cfg(cfg), 2)
    assert load_darknet_weights(described, tmp_path / "file.weights").convolutions == convolutions
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        pairs = list(zip(model.eval()(images), described.eval()(images), strict=True))
    for found, expected in pairs:
        assert expected.std() > 0.01
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_output_convolutions_ascend_in_stride() -> None:
    model = build(*TINY).model
    # one anchor at stride 16, two at stride 32; 5 + 2 values each
    assert [convolution.out_channels for convolution in model.output_convolutions()] == [7, 14]
    assert build(*words("mobilenet_v3_small", 3)).model.darknet_convolutions() == []


def test_pyramid_pooling_by_a_slow_loop() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2, 9, 15) - 3  # below 0, where zeros at the border would win
    result = PyramidPooling()(x)
    assert result.shape == (1, 8, 9, 15)
    for position, size in enumerate((13, 9, 5, 1)):
        for row in range(9):
            for column in range(15):
                reach = size // 2
                rows = slice(max(row - reach, 0), row + reach + 1)
                columns = slice(max(column - reach, 0), column + reach + 1)
                window = x[0, :, rows, columns].amax(dim=(1, 2))
                assert torch.equal(result[0, 2 * position : 2 * position + 2, row, column], window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tiny_pools_over_its_neighbours_below_and_right(dtype: torch.dtype) -> None:
    x = torch.tensor([[-9.0, -8, -1], [-2, -7, -6]], dtype=dtype).view(1, 1, 2, 3)
    for layer in DarknetTiny().stages[1][2:4]:
        x = layer(x)
    # [-9 -8 | -2 -7] -> -2, [-8 -1 | -7 -6] -> -1, [-1 | -6] -> -1; last row: [-2 -7], [-7 -6], [-6]
    assert x[0, 0].tolist() == [[-2, -1, -1], [-2, -6, -6]]
