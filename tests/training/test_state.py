"""State of a run: the best evaluation, and checkpoints that do not fit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from detection.errors import CheckpointError
from detection.training.state import RunState

Build = Callable[..., RunState]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 2, 1)


@pytest.fixture
def build(default_settings) -> Build:
    def state(scaled: bool = False) -> RunState:
        return RunState(Network(), default_settings().train, (0.998, 10), torch.amp.GradScaler("cpu", enabled=scaled))

    return state


def test_the_best_is_the_first_of_equals(build: Build) -> None:
    state = build()
    for step, ap50, best, without_rise in [(10, 0.0, 10, 0), (20, 0.5, 20, 0), (30, 0.5, 20, 1), (40, 0.4, 20, 2)]:
        state.step = step
        assert state.record_evaluation(ap50) == (best == step), "a tie keeps best.pt"
        assert (state.best_step, state.evaluations_without_rise, state.evaluated_step) == (best, without_rise, step)
    assert state.best_value == 0.5


def as_checkpoint(state: RunState, **changes: Any) -> dict[str, Any]:
    return {"conditions": {"precision": "float16"}, **state.content(), **changes}


def test_the_scale_of_fp16_is_restored(build: Build) -> None:
    state, other = build(scaled=True), build(scaled=True)
    state.scaler.load_state_dict(state.scaler.state_dict() | {"scale": 8.0, "_growth_tracker": 3})
    other.load(as_checkpoint(state))
    assert other.scaler.state_dict() == state.scaler.state_dict() and other.scaler.get_scale() == 8


@pytest.mark.parametrize("conditions", [{"precision": "float16"}, {}])
def test_fp16_without_its_scale_is_refused(build: Build, conditions: dict[str, str]) -> None:
    checkpoint = as_checkpoint(build(scaled=True), conditions=conditions)
    for broken in (checkpoint | {"scaler": {}}, {key: value for key, value in checkpoint.items() if key != "scaler"}):
        with pytest.raises(CheckpointError, match="no state of the gradient scaler"):
            build(scaled=True).load(broken)


def test_a_run_that_becomes_fp16_begins_with_a_new_scale(build: Build) -> None:
    checkpoint = as_checkpoint(build(), conditions={"precision": "bfloat16"})
    state = build(scaled=True)
    state.load(checkpoint)  # --accept-changes
    assert state.scaler.get_scale() == 65536
