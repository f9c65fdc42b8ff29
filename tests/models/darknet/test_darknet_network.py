"""Networks from Darknet cfg files against an independent float64 forward pass, published facts and the contract."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tests.support.darknet_reference as reference
from detection.config.loading import load_settings
from detection.contract import Detector, Geometry
from detection.errors import SettingsError
from detection.models import build_detector
from detection.models.backbones.darknet import DarknetBatchNorm2d
from detection.models.darknet.cfg import parse_cfg, unused_keys
from detection.models.darknet.layers import cfg_classes
from detection.models.darknet.modules import GaussianOutput
from detection.models.darknet.network import DarknetNetwork
from detection.models.darknet.weights import Header, convolution_tensors, darknet_bytes, load_darknet_weights
from detection.training.optimizer import set_backbone_frozen
from tests.support.darknet_descriptions import (
    COCO_ANCHORS_V4,
    TINY_ANCHORS,
    Section,
    conv,
    net,
    output,
    pool,
    pyramid_pooling,
    route,
    shortcut,
    upsample,
    write_cfg,
    yolo,
    yolov3,
    yolov3_tiny,
    yolov4,
    yolov4_tiny,
)
from tests.support.loss_cases import decode_boxes
from tests.support.paths import REPOSITORY
from tests.support.training_runs import load_main

TOLERANCE = 1e-4  # absolute, on logits of the order of 10; of the reference's largest value where that exceeds 10

ANCHORS = "4,6, 8,12, 10,14"
# bytes and convolutions of the published files: as downloaders and listings of pjreddie.com and of the releases of
# AlexeyAB/darknet state them; for yolov3-spp its published number of values, 63,052,381, behind a header of 20 bytes
PUBLISHED = {
    "yolov3": (yolov3, 248_007_048, 75),
    "yolov3-spp": (lambda: yolov3(spp=True), 20 + 4 * 63_052_381, 76),
    "yolov3-tiny": (yolov3_tiny, 35_434_956, 13),
    "yolov4": (yolov4, 257_717_640, 110),
    "yolov4-tiny": (yolov4_tiny, 24_251_276, 21),
}
DARKNET53_BYTES = 162_482_580  # darknet53.conv.74: yolov3.weights up to the 52nd convolution


def single_level(*layers: Section, size: int = 32, height: int | None = None, **more: object) -> str:
    """Layers between the image and an output of 3 anchors and 2 classes."""
    return write_cfg([net(size, height), *layers, output(21), yolo("0,1,2", ANCHORS, 2, **more)])


def load(text: str, directory: Path, seed: int = 0) -> tuple[DarknetNetwork, np.ndarray]:
    """The network with random weights through a file, and the file's values."""
    path = directory / "random.weights"
    path.write_bytes(reference.random_weights(text, seed))
    sections = parse_cfg(text)
    network = DarknetNetwork(sections, cfg_classes(sections)).eval()
    load_darknet_weights(network, path)
    return network, reference.read_weights(path)


def random_image(text: str) -> Tensor:
    """At the description's size, uint8 (1, 3, H, W)."""
    options = reference.read_cfg(text)[0][1]
    shape = (3, int(options["height"]), int(options["width"]))
    return torch.from_numpy(np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8))[None]


def as_maps(found: Tensor) -> np.ndarray:
    """(1, A, H, W, 5 + C) as the convolution before it gave it, (A * (5 + C), H, W)."""
    return found[0].permute(0, 3, 1, 2).flatten(0, 1).numpy()


@torch.no_grad()
def assert_equals_reference(network: nn.Module, text: str, values: np.ndarray, darknet: bool = False) -> None:
    image = random_image(text)
    expected = reference.forward(text, values, image[0].numpy() / 255, darknet)
    expected.sort(key=lambda level: -level.shape[1])  # stride ascending
    found = network(image)
    assert len(found) == len(expected)
    for level, wanted in zip(found, expected, strict=True):
        largest = np.abs(wanted).max()
        assert largest > 0.05 and wanted.std() > 0.01, "a comparison of nothing"
        np.testing.assert_allclose(as_maps(level), wanted, rtol=0, atol=TOLERANCE * max(1, largest / 10))


# Every layer against the reference

DOWN = (conv(6, 3, 2), conv(8, 3, 2))
CASES: dict[str, str] = {
    **{
        f"activation {name}": single_level(*DOWN, conv(7, 3, 1, name), conv(6, 1, 1, name, batch_normalize=0))
        for name in (
            *("linear", "leaky", "relu", "relu6", "mish", "hard_mish", "swish", "silu", "logistic"),
            *("hard_swish", "hard-swish", "hardswish"),
        )
    },
    "activation of a shortcut": single_level(
        *DOWN, conv(8, 1, 1, "linear"), shortcut(-2, activation="leaky"),
        conv(5, 1), shortcut(-1, activation="mish"), shortcut(-4, activation="logistic"),
    ),
    "groups": single_level(conv(6, 3, 2), conv(8, 3, 2, groups=2), conv(8, 3, 1, groups=8), conv(16, 3, groups=4)),
    "depthwise with more filters than channels": single_level(conv(6, 3, 4), conv(18, 3, 1, groups=6)),
    "dilation": single_level(*DOWN, conv(8, 3, 1, dilation=2), conv(8, 1, 1, dilation=3), conv(4, 5, dilation=2)),
    "large kernel, stride 3": single_level(conv(6, 7, 2), conv(6, 5, 1), conv(6, 3, 3), size=36),
    "even kernel": single_level(conv(6, 4, 2, pad=0, padding=1), conv(6, 2, 2, pad=0)),
    "padding without pad": single_level(conv(6, 3, 2, pad=0, padding=1), conv(6, 3, 1, pad=0, padding=1)),
    "pad overrules padding": single_level(conv(6, 3, 2, padding=5), conv(6, 3, 2)),
    "pool 2 stride 2": single_level(*DOWN, pool(2, 2)),
    "pool 2 stride 1": single_level(*DOWN, pool(2, 1), conv(8, 3)),
    "pool 3 stride 2": single_level(*DOWN, pool(3, 2)),
    "pool 8 stride 2": single_level(*DOWN, pool(8, 2)),
    "pool without padding": single_level(conv(6, 3, 2), ("maxpool", {"size": 2, "stride": 2, "padding": 0})),
    "pool of the stride's size": single_level(conv(6, 3), ("maxpool", {"stride": 4, "size": 4})),
    "pool of negative values": single_level(*DOWN, conv(6, 1, 1, "linear"), pool(5, 1), pool(4, 2)),
    "pyramid pooling": single_level(*DOWN, *pyramid_pooling(6)),
    "upsample": single_level(*DOWN, upsample(2), conv(4, 3, 2), upsample(4), conv(6, 3, 4)),
    "scaled upsample": single_level(*DOWN, ("upsample", {"stride": 2, "scale": 0.5})),
    "route groups": single_level(
        *DOWN, route(-1, groups=2, group_id=1), conv(4, 3), route(-2, -1, groups=4, group_id=2)
    ),
    "route of four": single_level(*DOWN, conv(3, 1), conv(5, 1), route(-1, 1, -2, -1)),
    "route absolute and relative": single_level(*DOWN, conv(8, 3), route(1), conv(8, 1), route(2, -3), shortcut(1)),
    "shortcut with two sources": single_level(*DOWN, conv(8, 3), conv(8, 3), shortcut(-2, -3)),
    "shortcut with fewer channels": single_level(*DOWN, conv(5, 3), conv(9, 3), shortcut(-2), shortcut(-3, -4)),
    "shortcut with more channels": single_level(*DOWN, conv(9, 3), conv(5, 3), shortcut(-2), shortcut(1, -3)),
    "shortcut to itself": single_level(*DOWN, shortcut(-1), conv(6, 3), shortcut(-1, -1)),
    "dropout": single_level(*DOWN, ("dropout", {"probability": 0.7}), conv(6, 3)),
    "avgpool": single_level(*DOWN, ("avgpool", {}), conv(8, 1), ("upsample", {"stride": 8}), shortcut(1)),
    "scale_channels": single_level(
        *DOWN, ("avgpool", {}), conv(4, 1, 1, "swish"), conv(8, 1, 1, "logistic"), ("scale_channels", {"from": -4})
    ),
    "scale_channels of a cell": single_level(
        *DOWN, conv(8, 3), conv(1, 3, 1, "logistic"),
        ("scale_channels", {"from": -2, "scale_wh": 1, "activation": "leaky"}), conv(6, 3),
    ),
    "sam": single_level(
        *DOWN, conv(8, 1, 1, "logistic"), ("sam", {"from": 1}), conv(8, 1, 1, "linear"),
        ("sam", {"from": -2, "activation": "leaky"}),
    ),
    "reorg3d": single_level(conv(5, 3, 2), ("reorg3d", {"stride": 2}), conv(6, 3), ("reorg3d", {"stride": 2})),
    "reorg": single_level(conv(8, 3, 2), ("reorg", {"stride": 2}), conv(12, 3), ("reorg", {"stride": 2})),
    "reorg by 4, wide": single_level(conv(32, 3, 2), ("reorg", {"stride": 4}), size=64, height=32),
    "share_index": single_level(
        *DOWN, conv(8, 3), conv(8, 3, dilation=2, share_index=2), route(1), conv(8, 3, 2, "mish", share_index=-3),
        conv(8, 3, 1, "linear", batch_normalize=0), conv(8, 3, 1, batch_normalize=0, share_index=-1),
    ),
    "one cell": single_level(*DOWN, conv(8, 3, 8)),
    "wide": single_level(*DOWN, pool(2, 1), conv(6, 3), size=64, height=24),
    "tall": single_level(*DOWN, upsample(2), conv(5, 3, 4), size=24, height=80),
    "scale_x_y": single_level(*DOWN, scale_x_y=1.2),
    "two levels, coarse first": write_cfg([
        net(32, 48), *DOWN, conv(8, 3, 2), output(14), yolo("1,2", ANCHORS, 2),
        route(-3), upsample(), route(-1, 1), output(7), yolo("0", ANCHORS, 2),
    ]),
    "two levels, fine first": write_cfg([
        net(48, 32), *DOWN, output(7), yolo("0", ANCHORS, 2),
        route(-3), conv(8, 3, 2), output(14), yolo("1,2", ANCHORS, 2),
    ]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_layers_equal_the_reference(name: str, tmp_path: Path) -> None:
    network, values = load(CASES[name], tmp_path)
    assert_equals_reference(network, CASES[name], values)


def test_activations_at_their_bends() -> None:
    """Each by its formula at and around the points where its pieces meet."""
    points = np.array([-30.0, -6, -3.5, -3, -2.5, -2, -1, -0.1, 0, 0.1, 1, 2.9, 3, 3.5, 5.9, 6, 6.1, 30])
    for name, formula in reference.ACTIVATIONS.items():
        text = single_level(conv(4, 1, 1, name))
        layer = DarknetNetwork(parse_cfg(text), 2).backbone[0][2:]
        found = layer(torch.tensor(points, dtype=torch.float32)).double().numpy()
        np.testing.assert_allclose(found, formula(points), rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("variance", [1e-10, 1e-6, 1e-4])
def test_both_batch_norms_at_small_variances(variance: float, tmp_path: Path) -> None:
    """Where sqrt(v + 1e-5) and sqrt(v) + 1e-6 differ much; the latter by the setting model.batch_norm."""
    text = single_level(conv(4, 3, 2))
    path = tmp_path / "small.weights"
    content = bytearray(reference.random_weights(text, 0))
    content[20 + 4 * 12 : 20 + 4 * 16] = np.full(4, variance, "<f4").tobytes()  # behind beta, gamma and mean of 4
    content[20 + 4 * 4 : 20 + 4 * 8] = np.full(4, variance**0.5, "<f4").tobytes()
    path.write_bytes(bytes(content))
    values = reference.read_weights(path)
    for setting in ("standard", "darknet"):
        model = build(text, tmp_path, f"model.batch_norm={setting}").model.eval()
        load_darknet_weights(model, path)
        assert isinstance(model.backbone[0][1], DarknetBatchNorm2d) == (setting == "darknet")
        assert_equals_reference(model, text, values, setting == "darknet")


@pytest.mark.parametrize(
    ("name", "bytes_of_file", "strides"),
    [
        ("yoloface-50k", 45_012, (8,)),
        ("yolo-fastest-1.1", 1_384_268, (16, 32)),
        ("yolo-fastest-1.1-xl", 3_693_964, (16, 32)),
        ("MobileNetV2-YOLOv3-Nano-coco", 3_564_300, (16, 32)),
    ],
)
def test_real_models_equal_the_reference(
    shared_weights, name: str, bytes_of_file: int, strides: tuple[int, ...]
) -> None:
    """Trained weights at the description's size; bytes as the README beside them states."""
    path = shared_weights(f"{name}.weights")
    text = path.with_suffix(".cfg").read_text()
    sections = parse_cfg(text)
    network = DarknetNetwork(sections, cfg_classes(sections)).eval()
    loaded = load_darknet_weights(network, path)
    assert path.stat().st_size == bytes_of_file
    assert loaded.convolutions == len(network.darknet_convolutions()) and loaded.num_classes is None
    assert network.strides == strides and network.num_classes == (1 if name == "yoloface-50k" else 80)
    assert_equals_reference(network, text, reference.read_weights(path))


# Published descriptions


def on_meta(text: str) -> DarknetNetwork:
    """Without memory for its weights."""
    with torch.device("meta"):
        return DarknetNetwork(parse_cfg(text), 80)


def sizes_of_convolutions(network: DarknetNetwork) -> list[int]:
    return [sum(tensor.numel() for tensor in convolution_tensors(part)) for part in network.darknet_convolutions()]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str, tmp_path: Path) -> None:
    """A file of the published size, zeros but for its header, is what the network takes; one byte less is not."""
    write, byte_count, convolutions = PUBLISHED[name]
    network = on_meta(write())
    sizes = sizes_of_convolutions(network)
    assert len(sizes) == convolutions
    assert 20 + 4 * sum(sizes) == byte_count
    if name in ("yolov3", "yolov3-spp"):
        assert 20 + 4 * sum(sizes[:52]) == DARKNET53_BYTES
    assert unused_keys(network.sections) == ([], [])
    if name in ("yolov3-tiny", "yolov4-tiny"):  # the same code path, less to read
        path = tmp_path / f"{name}.weights"
        with open(path, "wb") as file:
            file.write(np.array([0, 2, 5], "<i4").tobytes())
            file.truncate(byte_count)
        assert load_darknet_weights(network, path).convolutions == convolutions


def test_published_levels() -> None:
    """Strides and anchors per level, from the papers and descriptions."""
    network = on_meta(yolov3())
    assert network.strides == (8, 16, 32) and network.scales_xy == (1.0, 1.0, 1.0)
    assert network.anchors == (
        ((10, 13), (16, 30), (33, 23)),
        ((30, 61), (62, 45), (59, 119)),
        ((116, 90), (156, 198), (373, 326)),
    )
    assert len(network.backbone) == 75  # Darknet-53: 52 convolutions and 23 shortcuts
    network = on_meta(yolov4())
    assert network.strides == (8, 16, 32) and network.scales_xy == (1.2, 1.1, 1.05)
    anchors = np.array([float(value) for value in COCO_ANCHORS_V4.split(",")]).reshape(3, 3, 2)
    assert np.array_equal(np.array(network.anchors), anchors)
    network = on_meta(yolov3_tiny())
    assert network.strides == (16, 32)
    assert len(network.backbone) == 10  # no shortcuts; the fifth pooling, layer 9, is the last to lower the resolution
    tiny = np.array([float(value) for value in TINY_ANCHORS.split(",")]).reshape(6, 2)
    assert np.array_equal(np.array(network.anchors), tiny.reshape(2, 3, 2))
    network = on_meta(yolov4_tiny())
    assert network.strides == (16, 32) and network.scales_xy == (1.05, 1.05)
    assert np.array_equal(np.array(network.anchors), np.stack([tiny[1:4], tiny[3:6]]))  # masks 1,2,3 and 3,4,5


@pytest.mark.parametrize("write", [yolov3_tiny, yolov4_tiny])
def test_tiny_detectors_equal_the_reference(write: Callable[[int], str], tmp_path: Path) -> None:
    network, values = load(write(64), tmp_path)
    assert_equals_reference(network, write(64), values)


@pytest.mark.slow
@pytest.mark.parametrize("write", [yolov3, lambda size: yolov3(True, size), yolov4])
def test_large_detectors_equal_the_reference(write: Callable[..., str], tmp_path: Path) -> None:
    text = write(size=64)
    network, values = load(text, tmp_path)
    assert_equals_reference(network, text, values)


# Weights of several layers, pooled branches


def test_shared_weights_are_one(tmp_path: Path) -> None:
    """In training, in a copy (the EMA) and in the file, which holds them once."""
    text = CASES["share_index"]
    network, values = load(text, tmp_path)
    layers = list(network.backbone) + list(network.decoder)
    assert layers[2][0].weight is layers[3][0].weight is layers[5][0].weight and layers[2][1] is layers[5][1]
    copied = copy.deepcopy(network)
    twins = list(copied.backbone) + list(copied.decoder)
    assert twins[2][0].weight is twins[5][0].weight is not layers[2][0].weight
    assert len(network.darknet_convolutions()) == 5
    assert darknet_bytes(network, Header(0, 2, 5, 0)) == (tmp_path / "random.weights").read_bytes()
    copied.load_state_dict(network.state_dict())
    assert_equals_reference(copied, text, values)


def test_one_cell_of_a_pooled_branch_does_not_bind_the_input_size(tmp_path: Path) -> None:
    """Squeeze and excite: strides 2 and 4, so any multiple of 4 goes, whatever the cfg's own size."""
    network, values = load(CASES["scale_channels"], tmp_path)
    assert network.size_multiple == 4
    assert_equals_reference(network, CASES["scale_channels"].replace("width=32", "width=44"), values)
    fixed = DarknetNetwork(parse_cfg(CASES["avgpool"]), 2)  # its single cell is enlarged by 8, so only 32 goes
    assert fixed.size_multiple == 32


# Levels, classes, sizes


def test_levels_ascend_whatever_the_order_in_the_file(tmp_path: Path) -> None:
    coarse, _ = load(CASES["two levels, coarse first"], tmp_path)
    fine, _ = load(CASES["two levels, fine first"], tmp_path)
    for network in (coarse, fine):
        assert network.strides == (4, 8)
        assert network.anchors == (((4, 6),), ((8, 12), (10, 14)))
        assert [part.out_channels for part in network.output_convolutions()] == [7, 14]
    with torch.no_grad():
        assert [tuple(level.shape) for level in coarse(torch.rand(2, 3, 48, 32))] == [(2, 1, 12, 8, 7), (2, 2, 6, 4, 7)]


def test_a_mask_orders_its_anchors() -> None:
    text = single_level(*DOWN).replace("mask=0,1,2", "mask=2,0,1")
    assert DarknetNetwork(parse_cfg(text), 2).anchors == (((10, 14), (4, 6), (8, 12)),)


@pytest.mark.parametrize("num_classes", [1, 2, 7])
def test_other_numbers_of_classes(num_classes: int) -> None:
    network = DarknetNetwork(parse_cfg(CASES["two levels, coarse first"]), num_classes)
    assert network.num_classes == num_classes == cfg_classes(network.sections)
    outputs = network(torch.rand(2, 3, 16, 24))
    assert [tuple(level.shape) for level in outputs] == [(2, 1, 4, 6, 5 + num_classes), (2, 2, 2, 3, 5 + num_classes)]


@pytest.mark.parametrize("size", [(31, 32), (32, 36), (4, 8), (33, 33)])
def test_size_must_be_a_multiple(size: tuple[int, int]) -> None:
    network = DarknetNetwork(parse_cfg(CASES["two levels, coarse first"]), 2)
    with pytest.raises(ValueError, match=rf"{size[0]}, {size[1]}.*multiple of 8"):
        network(torch.rand(1, 3, *size))


def test_a_map_coarser_than_every_level() -> None:
    """Down to stride 16 and back up to an output at 4: an image of 24 pixels would end in maps that do not fit."""
    text = single_level(*DOWN, conv(8, 3, 2), conv(8, 3, 2), upsample(4), route(-1, 1), conv(8, 3))
    network = DarknetNetwork(parse_cfg(text), 2)
    assert network.strides == (4,)
    assert network(torch.rand(1, 3, 48, 16))[0].shape == (1, 3, 12, 4, 7)
    with pytest.raises(ValueError, match="multiple of 16"):
        network(torch.rand(1, 3, 24, 32))
    Geometry(network.size_multiple).check_size("evaluation.image_size", 48)
    with pytest.raises(SettingsError, match=r"evaluation.image_size = 24: must be a multiple of 16"):
        Geometry(network.size_multiple).check_size("evaluation.image_size", 24)


def test_another_size_than_the_description(tmp_path: Path) -> None:
    """The network also takes sizes other than that of [net]."""
    text = yolov4_tiny(64)
    network, values = load(text, tmp_path)
    other = text.replace("width=64", "width=96").replace("height=64", "height=32")
    assert_equals_reference(network, other, values)


def test_bytes_single_images_and_channels_last_give_the_same_outputs(tmp_path: Path) -> None:
    """Darknet scales to 0..1 and does nothing else."""
    network, _ = load(yolov4_tiny(64), tmp_path)
    assert (network.pixel_mean, network.pixel_std) == ((0, 0, 0), (1, 1, 1))
    images = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(images)
        assert all(map(torch.equal, expected, network(images.float() / 255)))
        singles = list(zip(*(network(images[index : index + 1]) for index in range(3)), strict=True))
        network.to(memory_format=torch.channels_last)
        found = network(images.to(memory_format=torch.channels_last))
    for level, other, alone in zip(expected, found, singles, strict=True):
        torch.testing.assert_close(other, level, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.cat(alone), level, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["yolov4_tiny", "groups", "shortcut with fewer channels", "hard_mish"])
def test_bfloat16(name: str, tmp_path: Path) -> None:
    """Under autocast on the CPU, within what eight bits of mantissa leave."""
    text = {"yolov4_tiny": yolov4_tiny(64), "hard_mish": CASES["activation hard_mish"]}.get(name) or CASES[name]
    network, _ = load(text, tmp_path)
    with torch.no_grad():
        expected = network(random_image(text))
        with torch.autocast("cpu", torch.bfloat16):
            found = network(random_image(text))
    for level, other in zip(found, expected, strict=True):
        assert level.isfinite().all()
        assert (level.float() - other).abs().mean() < 0.03 * other.abs().mean()


# The contract


def build(text: str, directory: Path, *words: str, num_classes: int = 2) -> Detector:
    path = directory / "network.cfg"
    path.write_text(text)
    words = ("model.backbone=darknet_cfg", f"model.cfg={path}", *words)
    settings, _ = load_settings(REPOSITORY / "yolo-v3" / "args.yaml", words=words)
    return build_detector(settings, num_classes)


def test_contract(tmp_path: Path) -> None:
    """Model, criterion and postprocess: every parameter has a gradient, and there are detections."""
    torch.manual_seed(0)
    detector = build(CASES["two levels, coarse first"], tmp_path, num_classes=3)
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    targets = {
        "boxes": torch.tensor([[[3.0, 3, 7, 9], [10, 8, 20, 22]], [[0, 0, 0, 0], [0, 0, 0, 0]]]),
        "labels": torch.tensor([[2, 0], [-1, -1]]),
    }
    outputs = detector.model(images)
    assert detector.criterion is not None
    losses = detector.criterion(outputs, targets)
    assert sorted(losses) == ["loss_box", "loss_class", "loss_objectness"]
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in detector.model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
    found = detector.postprocess([level.detach() + 6 for level in outputs])
    assert len(found) == 2 and set(found[0]) == {"boxes", "scores", "labels"}
    assert len(found[0]["boxes"]) and found[0]["labels"].max() <= 2


def test_every_parameter_of_yolov4_tiny_gets_a_gradient(tmp_path: Path) -> None:
    torch.manual_seed(0)
    detector = build(yolov4_tiny(64), tmp_path, num_classes=1)
    outputs = detector.model(torch.rand(2, 3, 64, 64))
    sum(level.square().mean() for level in outputs).backward()
    for name, parameter in detector.model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_untrained_objectness_is_the_prior(tmp_path: Path) -> None:
    torch.manual_seed(0)
    detector = build(CASES["two levels, coarse first"], tmp_path, "yolo.objectness_prior=0.1", num_classes=3)
    with torch.no_grad():
        for level in detector.model(torch.rand(2, 3, 32, 48)):
            assert level[..., 4].sigmoid().mean().item() == pytest.approx(0.1, rel=0.1)
            assert level[..., 5:].sigmoid().mean().item() == pytest.approx(1 / 3, rel=0.1)


def test_settings_reach_the_batch_norms(tmp_path: Path) -> None:
    model = build(yolov4_tiny(64), tmp_path, "model.batch_norm_momentum=0.03", num_classes=80).model
    momenta = [module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert momenta == [0.03] * 19  # all but the two output convolutions


def test_backbone_can_be_frozen(tmp_path: Path) -> None:
    """Up to the last shortcut before the first output; the rest learns, the backbone's statistics stay."""
    layers = (*DOWN, conv(8, 3), shortcut(-2), conv(8, 3, 2), conv(8, 3))
    model = build(single_level(*layers), tmp_path).model.train()
    assert len(model.backbone) == 4 and len(model.decoder) == 4
    set_backbone_frozen(model, frozen=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model(torch.rand(2, 3, 32, 32))[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("backbone."), name
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(key.startswith("decoder.") for key in changed)
    set_backbone_frozen(model, frozen=False)
    model(torch.rand(2, 3, 32, 32))[0].square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# new_coords and Gaussian_yolo: inference only

PLAIN = single_level(conv(4, 3, 8), size=16, height=24, scale_x_y=2)
NEW_COORDS = single_level(conv(4, 3, 8), size=16, height=24, new_coords=1, scale_x_y=2).replace(
    "activation=linear", "activation=logistic"
)
GAUSSIAN = PLAIN.replace("[yolo]", "[Gaussian_yolo]").replace("filters=21", "filters=33")  # 3 * (9 + 2)
KINDS = {"new_coords": NEW_COORDS, "yolo": PLAIN, "Gaussian_yolo": GAUSSIAN}


def test_new_coords_by_hand() -> None:
    """centre = 2 * sigmoid - 0.5, size = 4 * sigmoid^2 * anchor; one cell at column 1, row 0 of stride 8."""
    raw = torch.zeros(1, 1, 1, 2, 7)
    raw[0, 0, 0, 1, :4] = torch.tensor([0.0, -np.log(3), np.log(3), 0.0])  # sigmoids 1/2, 1/4, 3/4, 1/2
    boxes = decode_boxes(raw, torch.tensor([[10.0, 20.0]]), 8, scale_xy=2.0, new_coords=True)
    # centre ((1 + 2 / 2 - 0.5) * 8, (0 + 2 / 4 - 0.5) * 8) = (12, 0); size (4 * 9/16 * 10, 4 * 1/4 * 20) = (22.5, 20)
    assert boxes[0, 0, 0, 1].tolist() == pytest.approx([0.75, -10, 23.25, 10], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_detections_equal_the_reference(kind: str, tmp_path: Path) -> None:
    """All boxes and scores of a level after postprocess without NMS, against Darknet's formulas."""
    text = KINDS[kind]
    words = ("evaluation.confidence_threshold=0", "evaluation.iou_threshold=1", "evaluation.max_detections=null")
    detector = build(text, tmp_path, *words)
    assert (detector.criterion is None) == (kind != "yolo")  # such networks can only detect
    assert detector.model.new_coords == (kind == "new_coords")
    path = tmp_path / "random.weights"
    path.write_bytes(reference.random_weights(text, 3))
    load_darknet_weights(detector.model.eval(), path)
    image = random_image(text)
    with torch.no_grad():
        (found,) = detector.postprocess(detector.model(image))
    outputs = reference.forward(text, reference.read_weights(path), image[0].numpy() / 255)
    (level,) = reference.decode(text, outputs)
    assert len(found["boxes"]) == 3 * 3 * 2 * 2  # anchors, rows, columns, classes
    for label in range(2):
        chosen = found["labels"] == label
        scores = level["scores"][..., label].flatten()
        order = np.argsort(-scores)
        assert np.diff(scores[order]).max() < -1e-5, "scores too close to be matched"
        np.testing.assert_allclose(found["scores"][chosen].numpy(), scores[order], atol=1e-5)
        np.testing.assert_allclose(
            found["boxes"][chosen].numpy(), level["boxes"].reshape(-1, 4)[order], atol=1e-3, rtol=1e-5
        )


def test_uncertainty_of_gaussian_yolo_by_hand() -> None:
    """Uncertainties 1/2, 1/4, 3/4, 1/2, mean 1/2; objectness 4/5 * 1/2 = 2/5, as a logit log(2/3)."""
    raw = torch.tensor([1.0, 0, 2, -np.log(3), 3, np.log(3), 4, 0, np.log(4), 7, 8]).view(1, 11, 1, 1)
    found = GaussianOutput(1)(raw).flatten()
    assert found.tolist() == pytest.approx([1, 2, 3, 4, np.log(2 / 3), 7, 8], abs=1e-6)
    raw[:, 8] = torch.inf
    assert GaussianOutput(1)(raw).flatten()[4].item() == pytest.approx(0, abs=1e-6)  # 1 * 1/2


@pytest.mark.parametrize("kind", ["new_coords", "Gaussian_yolo"])
def test_training_of_networks_that_can_only_detect_is_refused(kind: str, run_script, tmp_path: Path) -> None:
    path = tmp_path / "new.cfg"
    path.write_text(KINDS[kind].replace("height=24", "height=16"))
    words = ["data.fake=true", "model.num_classes=2", "model.backbone=darknet_cfg", f"model.cfg={path}"]
    words += ["train.image_size=16", "evaluation.image_size=16", "run.device=cpu", "--dry-run"]
    result = run_script(load_main().main, *words)
    assert result.returncode == 2, result
    assert result.stderr.count("\n") == 1 and kind in result.stderr
    assert "can detect but not be trained here" in result.stderr
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("loss", ["giou", "ciou", "multi"])
def test_a_network_with_new_coords_learns_with_losses_of_boxes(loss: str, tmp_path: Path) -> None:
    detector = build(NEW_COORDS, tmp_path, f"yolo.loss={loss}")
    criterion = detector.require_criterion()
    image = random_image(NEW_COORDS)
    targets = {"boxes": torch.tensor([[[2.0, 3, 9, 11]]]), "labels": torch.tensor([[1]])}
    optimizer = torch.optim.Adam(detector.model.parameters(), 0.03)
    losses = []
    for _ in range(12):
        parts = criterion(detector.model(image), targets)
        losses.append(parts["loss_box"].item())
        optimizer.zero_grad()
        sum(parts.values()).backward()
        optimizer.step()
    assert criterion.layout.new_coords and losses[-1] < 0.8 * losses[0]
