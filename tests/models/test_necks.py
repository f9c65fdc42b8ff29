"""Necks: interface, the path aggregation by a slow loop, and the top-down network as it was."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detection.config.loading import load_settings
from detection.errors import SettingsError
from detection.models import build_detector
from detection.models.necks import BottomUpPath, PathAggregationNeck, TopDownNeck
from detection.models.yolo.network import YOLOv3
from tests.support.paths import ARGS

CHANNELS, WIDTHS = (6, 10, 12), (8, 6, 4)  # stride ascending; coarsest level first
SMALL = ["model.backbone=mobilenet_v3_small", "yolo.neck_channels=[8, 6, 4]"]


def feature_maps(channels: tuple[int, ...] = CHANNELS) -> list[Tensor]:
    return [torch.randn(2, count, 16 >> level, 24 >> level) for level, count in enumerate(channels)]


@pytest.mark.parametrize("neck", [TopDownNeck, PathAggregationNeck])
def test_maps_in_and_out_ascend_in_stride(neck: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module = neck(CHANNELS, WIDTHS)
    outputs = module(feature_maps())
    assert module.out_channels == (4, 6, 8)
    assert [tuple(output.shape) for output in outputs] == [(2, 4, 16, 24), (2, 6, 8, 12), (2, 8, 4, 6)]
    sum((output * torch.randn_like(output)).sum() for output in outputs).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())


def test_bottom_up_by_hand() -> None:
    """The finest map stays; each other one: stride-2 convolution of the finer output first, then its own map."""
    torch.manual_seed(0)
    path = BottomUpPath((4, 6, 8)).eval()
    maps = feature_maps((4, 6, 8))
    outputs = path(maps)
    assert outputs[0] is maps[0]
    finer = maps[0]
    for level in (1, 2):
        down, stage = path.downs[level - 1], path.stages[level - 1]
        halved = F.conv2d(finer, down[0].weight, stride=2, padding=1) / (1 + 1e-5) ** 0.5
        joined = torch.cat([F.leaky_relu(halved, 0.1), maps[level]], dim=1)
        finer = stage(joined)
        torch.testing.assert_close(outputs[level], finer, atol=1e-5, rtol=1e-4)
    assert [[tuple(block[0].kernel_size) for block in stage] for stage in path.stages] == [[(1, 1), (3, 3), (1, 1)]] * 2


def test_path_aggregation_is_the_top_down_neck_and_then_the_other_way() -> None:
    torch.manual_seed(0)
    neck, maps = PathAggregationNeck(CHANNELS, WIDTHS).eval(), feature_maps()
    for found, expected in zip(neck(maps), neck.bottom_up(neck.top_down(maps)), strict=True):
        assert torch.equal(found, expected)


def test_fpn_keeps_its_names_and_pan_adds_to_them() -> None:
    """The same random weights in the same order; what a checkpoint of fpn holds, pan has too."""
    models = {}
    for neck in ("fpn", "pan"):
        torch.manual_seed(0)
        models[neck] = build_detector(load_settings(ARGS, words=[*SMALL, f"yolo.neck={neck}"])[0], 2).model
    fpn, pan = (model.state_dict() for model in models.values())
    assert {name.split(".")[0] for name in fpn} == {"backbone", "neck", "laterals", "heads"}
    assert set(fpn) < set(pan) and all(name.startswith("bottom_up.") for name in set(pan) - set(fpn))
    assert all(torch.equal(value, pan[name]) for name, value in fpn.items())


@pytest.mark.parametrize("detector", ["yolo", "yolox"])
def test_both_families_train_with_pan(detector: str) -> None:
    torch.manual_seed(0)
    words = [*SMALL, f"model.detector={detector}", f"{detector}.neck=pan", f"{detector}.neck_channels=[8, 6, 4]"]
    built = build_detector(load_settings(ARGS, words=words)[0], 2)
    outputs = built.model(torch.rand(2, 3, 64, 96))
    assert [tuple(output.shape[2:4]) for output in outputs] == [(8, 12), (4, 6), (2, 3)]
    boxes = torch.tensor([[[4.0, 4, 60, 50]], [[10, 10, 30, 30]]])
    sum(built.require_criterion()(outputs, {"boxes": boxes, "labels": torch.tensor([[1], [0]])}).values()).backward()
    assert all(parameter.grad is not None for parameter in built.model.parameters())


def test_outputs_of_fpn_are_those_of_the_plain_loop() -> None:
    torch.manual_seed(0)
    model = build_detector(load_settings(ARGS, words=SMALL)[0], 2).model.eval()
    assert isinstance(model, YOLOv3)
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        carried, expected = None, []
        for level, features in enumerate(reversed(model.backbone(model.normalize(images)))):
            if carried is not None:
                upsampled = F.interpolate(model.laterals[level - 1](carried), scale_factor=2.0, mode="nearest")
                features = torch.cat([upsampled, features], dim=1)
            carried = model.neck[level](features)
            expected.insert(0, model.heads[level](carried))
        assert all(torch.equal(*pair) for pair in zip(model(images), expected, strict=True))


def test_a_network_from_a_cfg_has_its_own_neck(tmp_path: Path) -> None:
    (tmp_path / "a.cfg").write_text("[net]")
    with pytest.raises(SettingsError, match=r"yolo\.neck: a network from a cfg brings its own neck; must be fpn"):
        load_settings(ARGS, words=["model.backbone=darknet_cfg", f"model.cfg={tmp_path / 'a.cfg'}", "yolo.neck=pan"])
