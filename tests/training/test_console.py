"""The progress line shows whatever losses a criterion returns."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from detection.training.console import report_progress
from detection.training.skipped_steps import SkippedSteps, StepResult
from detection.training.throughput import Meter


@pytest.mark.parametrize("has_bar", [False, True])
@pytest.mark.parametrize("losses", [{"loss_box": 1.0, "loss_objectness": 2.0, "loss_class": 3.0}, {"focal": 0.5}])
def test_losses_of_any_criterion(losses: dict[str, float], has_bar: bool) -> None:
    result = StepResult({name: torch.tensor(value) for name, value in losses.items()}, torch.tensor(True))
    state: Any = SimpleNamespace(
        skipped=SkippedSteps(3), meter=Meter(4), step=10, check_scale=lambda: None,
        scaler=torch.amp.GradScaler("cpu", init_scale=8.0, enabled=True),
    )  # fmt: skip
    state.skipped.add(9, result)
    state.meter.add(result)
    ranks = SimpleNamespace(average_of=lambda values: values, average=lambda values: values)
    run: Any = SimpleNamespace(
        ranks=ranks,
        steps=20,
        steps_per_epoch=5.0,
        device=torch.device("cpu"),
        schedule=SimpleNamespace(at=lambda _: 0.1),
    )
    rows: dict[int, dict[str, float]] = {}
    lines: list[tuple[str, bool]] = []
    loggers: Any = SimpleNamespace(
        log=lambda step, values: rows.update({step: values}), line=lambda text, show: lines.append((text, show))
    )
    shown: list[dict[str, str]] = []
    bar = SimpleNamespace(disable=not has_bar, set_postfix=shown.append)
    report_progress(run, state, 64, loggers, SimpleNamespace(bar=bar, seconds_left=lambda: 61.4))  # type: ignore[arg-type]

    total = sum(losses.values())
    assert rows[10] | {"train/loss": total, "train/loss_scale": 8} == rows[10]
    assert {f"train/{name}": value for name, value in losses.items()}.items() <= rows[10].items()
    ((line, printed),) = lines
    assert printed == (not has_bar) and len(shown) == has_bar
    parts = "  ".join(f"{name.removeprefix('loss_')} {value:.2f}" for name, value in losses.items())
    assert line.startswith(f"step 10/20  epoch 2.0  loss {total:.2f}  lr 0.1  images/s ")
    assert f"G  {parts}  size 64  wait 0%  left 0:01:01" in line, "the scale of fp16 is no loss"
