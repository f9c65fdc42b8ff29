"""Activation checkpointing changes memory and time, but no result."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detection.config.settings import Settings
from detection.errors import SettingsError
from detection.models import build_detector
from detection.models.backbones.activation_checkpointing import recompute_backbone
from detection.runtime.devices import autocast, build_scaler
from detection.training.memory.estimate import estimate_memory
from detection.training.optimizer import set_backbone_frozen
from detection.training.state import RunState
from detection.training.step import train_step

CPU = torch.device("cpu")
SMALL = {
    "darknet_tiny": ["yolo.neck_channels=[8, 8]", "yolo.anchors=[[[10, 14], [23, 27]], [[81, 82], [135, 169]]]"],
    "mobilenet_v3_small": ["yolo.neck_channels=[8, 8, 8]"],
}


def state_after_steps(settings: Settings, recomputed: bool, dtype: torch.dtype | None, frozen: bool) -> dict[str, Any]:
    """Two steps of two micro-batches; gradients of the last, weights, statistics, losses."""
    torch.manual_seed(0)
    detector = build_detector(settings, 3).to(CPU, channels_last=True)
    if recomputed:
        recompute_backbone(detector.model)
    state = RunState(detector.model, settings.train, (0.998, 10), build_scaler(CPU, dtype))
    set_backbone_frozen(state.model, frozen, settings.train.backbone_batch_norm)
    boxes = torch.tensor([[[4.0, 4, 30, 30]], [[20.0, 10, 60, 60]]])
    found: dict[str, Any] = {}
    for number in range(2):
        images = torch.randint(0, 256, (2, 2, 3, 64, 64), dtype=torch.uint8)
        batches = [{"images": part, "boxes": boxes, "labels": torch.tensor([[0], [1]])} for part in images]
        result = train_step(
            state.model, detector.criterion, state.optimizer, state.scaler, batches, lambda: autocast(CPU, dtype), CPU,
            None, state.statistics,
        )  # fmt: skip
        state.ema.update(state.model, number, result.finite)
        found |= {f"{name} {number}": value for name, value in result.losses.items()}
    found |= {f"gradient {name}": value.grad for name, value in state.model.named_parameters()}
    found |= {f"average {name}": value for name, value in state.ema.model.state_dict().items()}
    return found | state.model.state_dict()


@pytest.mark.parametrize(
    ("backbone", "dtype", "frozen", "words"),
    [
        ("darknet_tiny", None, False, []),
        ("mobilenet_v3_small", None, False, []),
        ("mobilenet_v3_small", torch.bfloat16, False, []),
        ("darknet_tiny", None, True, []),
        ("mobilenet_v3_small", None, False, ["train.backbone_batch_norm=frozen"]),
        ("darknet_tiny", None, False, ["model.batch_norm=darknet"]),
    ],
)
def test_every_number_is_the_same(
    default_settings, backbone: str, dtype: torch.dtype | None, frozen: bool, words: list[str]
) -> None:
    settings = default_settings(f"model.backbone={backbone}", *SMALL[backbone], "train.ema_decay=0.9", *words)
    plain = state_after_steps(settings, False, dtype, frozen)
    recomputed = state_after_steps(settings, True, dtype, frozen)
    assert list(plain) == list(recomputed)
    for name, value in plain.items():
        other = recomputed[name]
        assert (value is None and other is None) or torch.equal(value, other), name
    counters = [name for name in plain if name.endswith("num_batches_tracked") and "backbone" in name]
    moves = not frozen and "train.backbone_batch_norm=frozen" not in words
    assert {int(recomputed[name]) for name in counters} == {4 if moves else 0}


def test_blocks_run_twice_in_training_and_once_in_evaluation(default_settings) -> None:
    settings = default_settings("model.backbone=darknet_tiny", *SMALL["darknet_tiny"])
    model = build_detector(settings, 3).model
    recompute_backbone(model)
    calls: list[nn.Module] = []
    block = model.backbone.stages[1][1]
    block.register_forward_pre_hook(lambda *_: calls.append(block))
    outputs: list[Tensor] = model(torch.zeros(2, 3, 64, 64))
    sum(output.sum() for output in outputs).backward()
    assert len(calls) == 2
    with torch.no_grad():
        model(torch.zeros(2, 3, 64, 64))
    assert len(calls) == 3


def test_estimate_knows_it(default_settings) -> None:
    """By hand for Darknet-53: what is left of the backbone at 256 px, one image, float32."""
    settings = default_settings("train.batch_size=1")
    found = []
    for recomputed in (False, True):
        detector = build_detector(settings, 3)
        if recomputed:
            recompute_backbone(detector.model)
        estimate = estimate_memory(
            detector.model, detector.criterion, settings.train, 1, 256, lambda: autocast(CPU, None), CPU
        )
        found.append(estimate.activations)
    # inputs of the blocks: (channels, side, number); those of the first of a stage is the output of the last
    inputs = [(32, 256, 1), (64, 128, 2), (128, 64, 3), (256, 32, 9), (512, 16, 9), (1024, 8, 4)]
    minimum = 4 * sum(channels * side**2 * number for channels, side, number in inputs)
    assert minimum < found[1] < 0.5 * found[0]


def test_refusals_are_one_line(default_settings) -> None:
    for other in ("run.compile", "train.sync_batch_norm"):
        with pytest.raises(SettingsError, match=f"must be false with {other}"):
            default_settings("train.activation_checkpointing=true", f"{other}=true")
    model = nn.Module()
    model.backbone = nn.Conv2d(3, 3, 1)
    with pytest.raises(SettingsError, match="needs a backbone with stages"):
        recompute_backbone(model)
