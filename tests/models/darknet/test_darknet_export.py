"""`YOLOv3` networks exported as Darknet cfg and weights and read back are the same, weight for weight."""

from pathlib import Path

import pytest
import torch
from torch import nn

from detection.errors import CheckpointError
from detection.models import build_detector
from detection.models.darknet.cfg import format_cfg, parse_cfg
from detection.models.darknet.export import describe_detector
from detection.models.darknet.layers import cfg_classes
from detection.models.darknet.network import DarknetNetwork
from detection.models.darknet.weights import Header, darknet_bytes, load_darknet_weights

TINY = ("model.backbone=darknet_tiny", "yolo.neck_channels=[256, 128]",
        "yolo.anchors=[[[10,14],[23,27],[37,58]],[[81,82],[135,169],[344,319]]]")  # fmt: skip
# bytes of the published 80-class files: header of 20 and 4 for each number
FAMILY = [
    pytest.param((), 248_007_048, 107, id="yolov3"),
    pytest.param(("yolo.spp=true",), 252_209_544, 114, id="spp"),
    pytest.param(TINY, 35_434_956, 24, id="tiny"),
]


def build(default_settings, words: tuple[str, ...], num_classes: int) -> tuple[nn.Module, list]:
    settings = default_settings(*words)
    detector = build_detector(settings, num_classes)
    return detector.model, describe_detector(detector, 416)


@pytest.mark.parametrize(("words", "file_bytes", "layers"), FAMILY)
def test_sizes_are_the_published_ones(default_settings, words, file_bytes: int, layers: int) -> None:
    model, sections = build(default_settings, words, 80)
    # layers of yolov3.cfg (0 to 106), yolov3-spp.cfg (0 to 113) and yolov3-tiny.cfg (0 to 23)
    assert len(sections) - 1 == layers
    parameters = sum(parameter.numel() for parameter in model.parameters())
    statistics = sum(value.numel() for name, value in model.named_buffers() if "running" in name)
    assert 20 + 4 * (parameters + statistics) == file_bytes
    assert len(darknet_bytes(model, Header())) == file_bytes


@pytest.mark.parametrize(
    ("words", "file_bytes", "layers"),
    [pytest.param(*FAMILY[0].values, id="yolov3", marks=pytest.mark.slow), *FAMILY[1:]],
)
def test_the_description_is_the_same_network(
    default_settings, tmp_path: Path, words, file_bytes: int, layers: int
) -> None:
    torch.manual_seed(0)
    model, sections = build(default_settings, words, 3)
    for module in model.modules():  # statistics as after a training, so that a mistake shows
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    content = darknet_bytes(model, Header(seen=5))
    (tmp_path / "net.weights").write_bytes(content)
    again = parse_cfg(format_cfg(sections))
    network = DarknetNetwork(again, cfg_classes(again))
    loaded = load_darknet_weights(network, tmp_path / "net.weights")
    assert loaded.header.seen == 5 and loaded.num_classes is None and darknet_bytes(network, loaded.header) == content

    settings = default_settings(*words)
    assert network.anchors == settings.yolo.anchors and network.strides == model.strides
    images = torch.randint(0, 256, (1, 3, 96, 64), dtype=torch.uint8)
    with torch.no_grad():
        for ours, described in zip(model.eval()(images), network.eval()(images), strict=True):
            assert ours.shape == described.shape
            torch.testing.assert_close(ours, described, rtol=1e-5, atol=1e-5)


def test_yolov3_refers_to_the_layers_of_the_public_description(default_settings) -> None:
    """yolov3.cfg: the routes take layers 79 and 61, then 91 and 36; the detections are layers 82, 94 and 106."""
    _, sections = build(default_settings, (), 80)
    layers = sections[1:]
    assert [number for number, section in enumerate(layers) if section.name == "yolo"] == [82, 94, 106]
    routes = {number: section.options["layers"] for number, section in enumerate(layers) if section.name == "route"}
    assert routes == {83: "79", 86: "-1,61", 95: "91", 98: "-1,36"}
    assert [layers[number].options["mask"] for number in (82, 94, 106)] == ["6,7,8", "3,4,5", "0,1,2"]
    assert all(layers[number - 1].options["filters"] == "255" for number in (82, 94, 106))


def test_a_network_that_the_program_lacks_is_refused(default_settings) -> None:
    with pytest.raises(CheckpointError, match="darknet_tiny"):
        build(default_settings, ("model.backbone=mobilenet_v3_small",), 3)
