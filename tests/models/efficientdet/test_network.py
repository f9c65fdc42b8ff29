"""The networks of EfficientDet and RetinaNet against the public layout, published counts and independent programs."""

import dataclasses
import math
import re
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from detection.contract import DetectorModel, Geometry, HasClassRows
from detection.models.backbones import BACKBONES
from detection.models.backbones.efficientnet import EfficientNet, tensorflow_efficientnet
from detection.models.efficientdet.bifpn import Combine, bifpn_nodes
from detection.models.efficientdet.network import EfficientDet
from detection.models.efficientdet.variants import VARIANTS
from detection.models.pretrained import carry_outputs
from tests.support.efficientdet_reference import NODES, Reference, public_shapes, random_state

IMAGENET = Geometry(128, pixel_mean=(0.485, 0.456, 0.406), pixel_std=(0.229, 0.224, 0.225))
PLAIN = Geometry(128)  # pixels as they are
SMALL = dataclasses.replace(VARIANTS["d0"], fpn_channels=16, fpn_cells=2, head_repeats=2)


def build(variant: str, num_classes: int, bias: bool | None = None) -> EfficientDet:
    chosen = VARIANTS[variant]
    return EfficientDet(BACKBONES[chosen.backbone](), chosen, num_classes, IMAGENET, bias)


def small(num_classes: int = 3, geometry: Geometry = PLAIN, seed: int = 0) -> EfficientDet:
    torch.manual_seed(seed)
    return EfficientDet(tensorflow_efficientnet(0), SMALL, num_classes, geometry)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# Parameters of 90 classes with redundant biases, stated by github google/automl, efficientdet_arch_test.py (d0 to d7,
# which is d6; d7x by hand); without them; of 80 classes with and without; of backbone, pyramid and heads; tensors of
# the public files with and without.
PUBLISHED = {
    "d0": (3_880_067, 3_877_763, 3_874_217, 3_871_913, (3_595_388, 196_281, 69_354, 19_044), (784, 748)),
    "d1": (6_625_898, 6_622_026, 6_617_888, 6_614_016, (6_101_024, 390_972, 101_394, 32_508), (1004, 960)),
    "d2": (8_097_039, 8_091_215, 8_086_869, 8_081_045, (7_202_562, 708_159, 136_890, 49_428), (1076, 1024)),
    "d3": (12_032_296, 12_022_376, 12_017_806, 12_007_886, (10_103_336, 1_559_474, 247_050, 122_436), (1270, 1208)),
    "d4": (20_723_675, 20_707_995, 20_703_425, 20_687_745, (16_742_216, 3_349_829, 402_890, 228_740), (1474, 1404)),
    "d5": (33_653_315, 33_633_155, 33_627_305, 33_607_145, (27_288_112, 5_405_893, 591_498, 367_812), (1622, 1552)),
    "d6": (51_871_782, 51_841_062, 51_837_132, 51_806_412, (39_403_992, 10_583_808, 1_090_986, 792_996), (1818, 1738)),
    "d7x": (77_147_166, 77_110_302, 77_112_516, 77_075_652, (62_143_440, 13_112_064, 1_094_826, 796_836), (2210, 2114)),
}


# Biases of 1x1 convolutions before a batch norm
REDUNDANT = re.compile(r"(resample\.\d\.conv\.conv|after_combine\.conv\.conv_pw|conv_rep\.\d\.conv_pw)\.bias$")


TAPS = {  # channels of the backbone's maps
    "d0": (40, 112, 320), "d1": (40, 112, 320), "d2": (48, 120, 352), "d3": (48, 136, 384), "d4": (56, 160, 448),
    "d5": (64, 176, 512), "d6": (72, 200, 576), "d7x": (80, 224, 640),
}  # fmt: skip


@pytest.mark.parametrize("variant", PUBLISHED)
def test_published_counts(variant: str) -> None:
    *totals, parts, tensors = PUBLISHED[variant]
    with torch.device("meta"):
        model = build(variant, 90)
        found, state = [count(model)], model.state_dict()
        assert model.backbone.out_channels == TAPS[variant]
        assert tuple(map(count, (model.backbone, model.fpn, model.class_net, model.box_net))) == parts
        model.class_net.predict.conv_pw = nn.Conv2d(VARIANTS[variant].fpn_channels, 9 * 80, 1)
        found.insert(1, count(model))
    redundant = [value.numel() for name, value in state.items() if REDUNDANT.search(name)]
    found = [found[0], found[0] - sum(redundant), found[1], found[1] - sum(redundant)]
    assert (found, (len(state), len(state) - len(redundant))) == (totals, tensors)


def test_d7_is_d6_on_larger_images() -> None:
    larger = dataclasses.replace(VARIANTS["d6"], name="d7", image_size=1536, anchor_scale=5.0)
    assert VARIANTS["d7"] == larger


def test_constructor_without_redundant_biases_and_with_other_classes() -> None:
    with torch.device("meta"):
        plain = build("d0", 80, False)
    assert (count(plain), len(plain.state_dict())) == (PUBLISHED["d0"][3], 748)


@pytest.mark.parametrize(("variant", "anchors"), [("d0", 49_104), ("d1", 76_725), ("d7", 441_936), ("d7x", 442_260)])
def test_published_numbers_of_anchors(variant: str, anchors: int) -> None:
    size = VARIANTS[variant].image_size
    assert sum(9 * (size // stride) ** 2 for stride in VARIANTS[variant].strides) == anchors
    assert size % VARIANTS[variant].strides[-1] == 0


# The public layout


# Channels, cells, repeats, levels, learned weights; the input.
@pytest.mark.parametrize(
    ("channels", "cells", "repeats", "levels", "fast", "size"),
    [
        (64, 3, 3, 5, True, (128, 128)),
        (64, 3, 3, 5, True, (97, 141)),  # odd on every level: 97 -> 49, 25, 13, 7, 4, 2, 1
        (24, 2, 2, 5, False, (128, 64)),
        (16, 2, 1, 6, False, (256, 128)),
    ],
    ids=["d0", "d0 odd", "d6 cut", "d7x cut"],
)
def test_public_weights_load_and_give_the_outputs_of_the_reference(
    channels: int, cells: int, repeats: int, levels: int, fast: bool, size: tuple[int, int]
) -> None:
    variant = dataclasses.replace(
        SMALL, fpn_channels=channels, fpn_cells=cells, head_repeats=repeats, max_level=levels + 2
    )
    variant = dataclasses.replace(variant, fusion="fast" if fast else "sum")
    state = random_state(public_shapes(channels, cells, repeats, 4, levels, fast))
    model = EfficientDet(tensorflow_efficientnet(0), variant, 4, PLAIN).eval()
    model.load_state_dict(state, strict=True)
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs, expected = model(images), Reference(state, levels).forward(images)
    assert len(outputs) == len(expected) == levels == len(model.strides)
    for stride, output, wanted in zip(model.strides, outputs, expected, strict=True):
        assert output.shape == (2, 9, -(-size[0] // stride), -(-size[1] // stride), 4 + 4)
        torch.testing.assert_close(output, wanted, atol=1e-4, rtol=1e-4)
        assert wanted.std() > 0.02  # the comparison says something


def test_nodes_of_a_cell() -> None:
    assert all(bifpn_nodes(levels) == nodes for levels, nodes in NODES.items())


@pytest.mark.parametrize(
    ("fast", "weights", "expected"),
    [(True, (1, 1), 4 / 2.0001), (True, (-1, 2), 6 / 2.0001), (False, None, 4.0)],
)
def test_fusion(fast: bool, weights: tuple[float, ...] | None, expected: float) -> None:
    """Inputs of 1 and 3: by hand, and github google/automl states 0.99995 and 2.99985 for two equal inputs 1 and 3."""
    norm = partial(nn.BatchNorm2d, eps=1e-3)
    combine = Combine(0, (0, 1), (0, 1), (1, 1), 1, fast, True, True, norm)
    if weights is not None:
        assert combine.edge_weights.tolist() == [1, 1]
        combine.edge_weights.data = torch.tensor(weights, dtype=torch.float32)
    with torch.no_grad():
        joined = combine([torch.full((1, 1, 5, 4), 1.0), torch.full((1, 1, 3, 2), 3.0)])
    torch.testing.assert_close(joined, torch.full((1, 1, 5, 4), expected))


# RetinaNet


def test_retinanet_is_torchvisions() -> None:
    """34,014,999 parameters of 91 classes as torchvision counts them, and with its weights its outputs."""
    from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights, retinanet_resnet50_fpn

    torch.manual_seed(0)
    other = retinanet_resnet50_fpn(weights=None, weights_backbone=None).eval()
    state = random_state({name: tuple(value.shape) for name, value in other.state_dict().items()})
    other.load_state_dict(state)
    model = build("retinanet", 91).eval()
    frozen = sum(count(module) for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    assert count(model) - frozen == RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["num_params"] == 34_014_999
    body = {name.removeprefix("backbone.body."): value for name, value in state.items() if ".body." in name}
    names = model.backbone.torchvision_names()
    model.backbone.load_state_dict({names[name]: value for name, value in body.items()})
    parts: list[tuple[nn.Module, list[nn.Module]]] = [
        (model.fpn.laterals, [block[0] for block in other.backbone.fpn.inner_blocks]),
        (model.fpn.outputs, [block[0] for block in other.backbone.fpn.layer_blocks]),
        (model.fpn.downs, [other.backbone.fpn.extra_blocks.p6, other.backbone.fpn.extra_blocks.p7]),
    ]
    for ours, head in ((model.class_net, other.head.classification_head), (model.box_net, other.head.regression_head)):
        parts.append((ours.convolutions, [block[0] for block in head.conv]))
    parts.append((model.class_net.output, [other.head.classification_head.cls_logits]))
    parts.append((model.box_net.output, [other.head.regression_head.bbox_reg]))
    for part, theirs in parts:
        own = [part] if isinstance(part, nn.Conv2d) else list(part)
        for module, source in zip(own, theirs, strict=True):
            module.load_state_dict(source.state_dict())
    images = torch.rand(1, 3, 96, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        heads = other.head(list(other.backbone(model.normalize(images)).values()))
        outputs = model(images)
    flat = torch.cat([output.permute(0, 2, 3, 1, 4).flatten(1, 3) for output in outputs], dim=1)
    for found, wanted in ((flat[..., :4], heads["bbox_regression"]), (flat[..., 4:], heads["cls_logits"])):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
        assert wanted.std() > 0.01


# The contract


def test_untrained_predictions() -> None:
    """Class probability 0.01 everywhere, boxes about their anchors; the fan-in of the first paper's program."""
    model = small(geometry=IMAGENET)
    assert isinstance(model, DetectorModel) and isinstance(model, HasClassRows)
    with torch.no_grad():
        outputs = model(torch.rand(2, 3, 128, 128))
    for output in outputs:
        assert (output[..., 4:] + 4.59512).abs().mean() < 0.2 and output[..., :4].abs().mean() < 0.2
    bias = model.class_net.output.bias
    assert bias.tolist() == pytest.approx([-math.log(99)] * 27) and not model.box_net.output.bias.any()
    assert model.class_net.conv_rep[0].conv_pw.weight.std().item() == pytest.approx(1 / 4, rel=0.2)  # 1 / sqrt(16)
    assert model.class_net.predict.conv_dw.weight.std().item() == pytest.approx(1 / 12, rel=0.2)  # 1 / sqrt(9 * 16)


def test_pixels_are_normalised_inside() -> None:
    pixels = torch.randint(0, 256, (1, 3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET.pixel_mean, IMAGENET.pixel_std))
    with torch.no_grad():
        found, plain = small(geometry=IMAGENET).eval()(pixels), small().eval()((pixels / 255 - mean) / std)
    for output, expected in zip(found, plain, strict=True):
        torch.testing.assert_close(output, expected)


def test_flattening_copies_nothing() -> None:
    """`flatten_levels` orders by row, column, anchor, which is how a level's values lie."""
    for output in small().eval()(torch.rand(1, 3, 128, 128)):
        assert output.permute(0, 2, 3, 1, 4).is_contiguous()


def test_every_parameter_gets_a_gradient_in_either_layout() -> None:
    images = torch.rand(2, 3, 128, 128)
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = small().to(memory_format=layout)
        outputs = model(images.contiguous(memory_format=layout))
        torch.manual_seed(1)
        sum((output * torch.randn(output.shape)).sum() for output in outputs).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
        gradients.append(model.class_net.output.weight.grad.clone())
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-3)


def test_classes_are_carried_by_name() -> None:
    """Boxes are the file's; of the classes those of equal names, for each anchor; the others are the new network's."""
    old, new = small(2, seed=1), small(3, seed=2)
    nn.init.normal_(old.class_net.output.bias)
    assert [tuple(rows.shape) for rows in new.class_rows(3)] == [(9, 3), (0, 3)]
    state = {name: value.clone() for name, value in old.state_dict().items()}
    fresh = {name: value.clone() for name, value in new.state_dict().items()}
    lines = carry_outputs(new, state, ["cat", "dog"], ["bird", "cat", "fish"])
    assert "classes from the file: cat; starting anew: bird, fish; not used: dog" in lines[0]
    new.load_state_dict(state)
    for part in ("weight", "bias"):
        found = getattr(new.class_net.output, part)
        for anchor in range(9):
            assert torch.equal(found[3 * anchor + 1], getattr(old.class_net.output, part)[2 * anchor])
            for label in (0, 2):
                assert torch.equal(
                    found[3 * anchor + label], fresh[f"class_net.predict.conv_pw.{part}"][3 * anchor + label]
                )
        assert torch.equal(getattr(new.box_net.output, part), getattr(old.box_net.output, part))


def test_momentum_and_epsilon() -> None:
    model = small()
    assert {(norm.momentum, norm.eps) for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)} == {(0.01, 1e-3)}
    native = EfficientDet(BACKBONES["efficientnet_b0"](), SMALL, 2, PLAIN, batch_norm_momentum=0.2)
    norms = [[m for m in part.modules() if isinstance(m, nn.BatchNorm2d)] for part in (native.backbone, native.fpn)]
    assert [{(norm.momentum, norm.eps) for norm in part} for part in norms] == [{(0.2, 1e-5)}, {(0.2, 1e-3)}]
    assert isinstance(native.backbone, EfficientNet) and not native.fpn.same_padding
    assert native.class_net.conv_rep[0].conv_pw.bias is None and model.class_net.conv_rep[0].conv_pw.bias is not None


def test_symmetric_padding_of_the_native_form() -> None:
    """Shapes are those of SAME padding, values are not."""
    model, maps = small().eval(), [torch.randn(1, c, s, s) for c, s in ((40, 16), (112, 8), (320, 4))]
    with torch.no_grad():
        same: list[Tensor] = model.fpn(maps)
        for module in model.fpn.modules():
            if hasattr(module, "same_padding"):
                module.same_padding = False
        symmetric = model.fpn(maps)
    for first, second in zip(same, symmetric, strict=True):
        assert first.shape == second.shape and (first - second).norm() > 1e-3 * first.norm()
