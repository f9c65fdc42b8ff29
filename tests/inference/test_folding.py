"""Folded networks compute what they computed before; what may not be folded stays."""

import importlib.util
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection.config.loading import load_settings
from detection.contract import Detector
from detection.inference.folding import fold, prepare_inference
from detection.inference.fused_convolution import FusedConv2d, can_fuse, fused_name
from detection.models import build_detector
from detection.models.darknet.cfg import parse_cfg
from detection.models.darknet.network import DarknetNetwork
from detection.runtime.devices import Machine
from tests.support.darknet_descriptions import yolov3_tiny
from tests.support.paths import ARGS

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
needs_fusion = pytest.mark.skipif(not can_fuse(), reason="oneDNN's fused convolutions are for x86")
NECK = "yolo.neck_channels=[16, 12, 8]"
FAMILIES = {
    "yolov3": ["model.backbone=darknet", "model.width=0.125", "model.depth=0.33", NECK],
    "darknet_norm": ["model.backbone=mobilenet_v3_small", "model.batch_norm=darknet", NECK],
    "torchvision": ["model.backbone=mobilenet_v3_large", NECK],
    "hand-written": ["model.backbone=tf_efficientnet_b0", NECK],
    "yolox": ["model.detector=yolox", "model.backbone=darknet", "model.width=0.125", "model.depth=0.33"],
    "efficientdet": ["model.detector=efficientdet", "model.backbone=tf_efficientnet_b0"],
    "timm": ["model.backbone=timm/test_resnet", NECK],
    "timm act inside": ["model.backbone=timm/mobilenetv3_small_050", NECK],
}


def build(name: str) -> Detector:
    """A detector whose batch-norm layers are far from doing nothing."""
    words = FAMILIES[name]
    torch.manual_seed(0)
    detector = build_detector(load_settings(ARGS, words=words)[0], 3)
    for module in detector.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    detector.model.eval()
    return detector


def noise(detector: Detector, cells: int = 2) -> Tensor:
    side = cells * detector.geometry.size_multiple
    return torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)


@torch.no_grad()
def outputs_of(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([level.flatten().float() for level in model(images)])


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


FAMILY = [pytest.param(name, marks=[needs_timm] if "timm" in name else []) for name in FAMILIES]


@pytest.mark.parametrize("fuse", [False, pytest.param(True, marks=needs_fusion)])
@pytest.mark.parametrize("name", FAMILY)
def test_every_family_computes_the_same(name: str, fuse: bool) -> None:
    detector = build(name)
    images = noise(detector)
    before = {key: value.clone() for key, value in detector.model.state_dict().items()}
    folded = fold(detector.model, images[:1], fuse)

    expected, found = outputs_of(detector.model, images), outputs_of(folded, images)
    assert (expected - found).abs().max() <= 1e-5 * max(expected.abs().max().item(), 1)
    assert expected.std() > 1e-3  # not constants
    after = detector.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], value) for key, value in before.items())
    # EfficientDet's heads share convolutions between levels, each with a batch norm of its own.
    heads = count(detector.model, nn.BatchNorm2d) - 2 * 3 * 5 if name == "efficientdet" else None
    folded_norms = count(detector.model, nn.BatchNorm2d) - count(folded, nn.BatchNorm2d)
    assert folded_norms == (count(detector.model, nn.BatchNorm2d) if heads is None else heads)
    if fuse and name != "efficientdet":
        assert count(folded, nn.Conv2d) == 0


class Corner(nn.Module):
    """Cases that must not be folded, each with its own convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.twice, self.returned, self.ends = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(5))
        self.shared, self.bent = nn.LeakyReLU(0.1), nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> list[Tensor]:
        seen = self.seen(x)
        y = self.norms[0](seen) + seen  # the convolution's own output is used too
        y = self.norms[1](self.twice(y)) + self.norms[2](self.twice(y))  # two norms
        returned = self.returned(y)
        y = self.norms[3](returned)
        y = self.shared(self.norms[4](self.bent(y)))
        return [returned, self.shared(self.ends(y))]


@pytest.mark.parametrize("fuse", [False, pytest.param(True, marks=needs_fusion)])
def test_what_others_use_stays(fuse: bool) -> None:
    torch.manual_seed(1)
    model = Corner()
    for norm in model.norms:
        nn.init.uniform_(cast(nn.BatchNorm2d, norm).weight, 2, 3)
    model.eval()
    images = torch.randn(2, 3, 8, 8)
    folded = fold(model, images[:1], fuse)
    torch.testing.assert_close(outputs_of(folded, images), outputs_of(model, images))
    assert count(folded, nn.BatchNorm2d) == 4  # but for that behind the padding of `bent`
    assert isinstance(cast(Any, folded).shared, nn.LeakyReLU)


def test_a_hook_keeps_its_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    seen: list[Tensor] = []
    model[1].register_forward_hook(lambda *arguments: seen.append(arguments[2]))
    folded = fold(model, torch.zeros(1, 3, 2, 2), can_fuse())
    seen.clear()
    folded(torch.zeros(1, 3, 2, 2))
    assert count(folded, nn.BatchNorm2d) == 1 and len(seen) == 1


@needs_fusion
@pytest.mark.parametrize(
    ("layer", "function"),
    [
        (nn.LeakyReLU(0.1, inplace=True), lambda x: torch.where(x > 0, x, 0.1 * x)),
        (nn.ReLU(), lambda x: x.clamp(min=0)),
        (nn.ReLU6(inplace=True), lambda x: x.clamp(0, 6)),
        (nn.SiLU(), lambda x: x / (1 + torch.exp(-x))),
        (nn.Hardswish(), lambda x: x * (x + 3).clamp(0, 6) / 6),
    ],
)
@pytest.mark.parametrize("groups", [1, 4])
def test_fused_activations_by_their_formulas(layer: nn.Module, function: Any, groups: int) -> None:
    torch.manual_seed(2)
    convolution = nn.Conv2d(4, 8, (3, 1), stride=(2, 1), padding=(1, 0), groups=groups)
    x = torch.randn(2, 4, 7, 5) * 4
    name = fused_name(layer)
    assert name is not None
    expected = function(F.conv2d(x, convolution.weight, convolution.bias, (2, 1), (1, 0), 1, groups))
    with torch.no_grad():
        found = FusedConv2d(convolution, *name, None)(x)
        half = FusedConv2d(convolution, *name, torch.bfloat16)(x)
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-5)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected.detach(), atol=0.1, rtol=0.02)


@needs_fusion
@pytest.mark.parametrize("groups", [1, 16])
def test_weights_packed_for_one_size_are_right_for_others(groups: int) -> None:
    torch.manual_seed(3)
    convolution = nn.Conv2d(16, 32, 3, padding=1, groups=groups)
    fused = FusedConv2d(convolution, "none", [], None)
    for shape in ((1, 16, 40, 40), (4, 16, 5, 9), (2, 16, 1, 1), (1, 16, 90, 64)):
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(fused(x), convolution(x), atol=1e-5, rtol=1e-5)


def test_mish_stays_a_layer() -> None:
    assert fused_name(nn.Mish()) is None


def test_bfloat16_follows_the_machine() -> None:
    detector = build("torchvision")
    machine = Machine(torch.device("cpu"), torch.bfloat16)
    prepared = prepare_inference(detector, machine)
    images = noise(detector)
    with machine.autocast():
        found = outputs_of(prepared.model, images)
    expected = outputs_of(detector.model, images)
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    assert prepared.postprocess is detector.postprocess


def test_a_description_with_routes_is_folded_too() -> None:
    torch.manual_seed(3)
    model = DarknetNetwork(parse_cfg(yolov3_tiny(64)), 3).eval()
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    folded = fold(model, images, can_fuse())
    expected = outputs_of(model, images)
    assert (outputs_of(folded, images) - expected).abs().max() <= 1e-5 * max(expected.abs().max().item(), 1)
    assert count(folded, nn.BatchNorm2d) == 0
