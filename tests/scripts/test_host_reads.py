"""A training step, without logging, never makes the host wait for the device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.support.operation_trace import OperationTrace
from detection.config.settings import Settings
from detection.models import build_detector, yolox
from detection.models.yolo import CRITERIA
from detection.runtime.devices import autocast, build_scaler
from detection.training.optimizer import set_backbone_frozen
from detection.training.state import RunState
from detection.training.step import train_step
from detection.training.throughput import Meter

CPU = torch.device("cpu")
POINTS = ("model.detector=yolox", "yolox.neck_channels=[8, 8, 8]", "yolox.head_channels=8")
WORDS = ["model.backbone=mobilenet_v3_small", "yolo.neck_channels=[8, 8, 8]", "train.ema_decay=0.99"]


def make_batch(size: int = 64) -> dict[str, Any]:
    corner = torch.rand(2, 32, 2) * size / 2
    labels = torch.full((2, 32), -1)
    labels[0, :7], labels[1, :3] = 1, -2
    boxes = torch.cat([corner, corner + 9], dim=-1)
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    return {"images": images, "boxes": boxes, "labels": labels, "indices": torch.arange(2)}


def whole_step(settings: Settings, device: torch.device, frozen: bool = False) -> Callable[[], None]:
    """Two micro-batches, clipping, the EMA and what the loop keeps of the step."""
    torch.manual_seed(0)
    detector = build_detector(settings, 3).to(device, channels_last=True)
    state = RunState(detector.model, settings.train, (0.998, 10), build_scaler(device, torch.bfloat16))
    set_backbone_frozen(state.model, frozen, settings.train.backbone_batch_norm)
    meter, batches = Meter(4), [make_batch(), make_batch()]
    if device.type == "cuda":
        batches = [{name: value.pin_memory() for name, value in batch.items()} for batch in batches]

    def step() -> None:
        result = train_step(
            state.model, detector.criterion, state.optimizer, state.scaler, batches,
            lambda: autocast(device, torch.bfloat16), device, settings.train.clip_norm, state.statistics,
            clip_tensor_norm=settings.train.clip_tensor_norm,
        )  # fmt: skip
        state.ema.update(state.model, state.step, result.finite)
        state.skipped.add(state.step, result)
        meter.add(result)
        state.step += 1

    step()  # the first one makes tables and the optimizer's state
    return step


@pytest.mark.parametrize(
    ("words", "frozen"),
    [
        *(([f"yolo.loss={loss}"], False) for loss in CRITERIA),
        *(([f"yolo.loss={loss}", "yolo.class_loss=cross_entropy"], False) for loss in ("darknet", "mmdetection")),
        *(([f"train.optimizer={name}", "train.clip_norm=0.1"], False) for name in ("adam", "adamw", "sgd")),
        # each loss with its default, each assigner with one loss: they know nothing of each other
        *(([*POINTS, f"yolox.loss={loss}"], False) for loss in yolox.CRITERIA),
        *(([*POINTS, f"yolox.assigner={name}"], False) for name in yolox.ASSIGNERS),
        (["model.detector=efficientdet", "train.clip_tensor_norm=0.1"], False),
        (["train.clip_norm=null"], False),
        (["train.encoder_batch_norm=frozen"], False),
        (["model.batch_norm=darknet"], True),
    ],
)
def test_no_host_read_in_a_whole_step(
    default_settings: Callable[..., Settings], words: list[str], frozen: bool
) -> None:
    step = whole_step(default_settings(*WORDS, *words), CPU, frozen)
    with OperationTrace() as trace:
        step()
    assert not trace.host_reads
    names = set(trace.operations)
    assert {"aten.convolution.default", "aten.convolution_backward.default", "aten._foreach_lerp_.List"} <= names


def test_a_read_anywhere_in_the_step_is_seen(
    monkeypatch: pytest.MonkeyPatch, default_settings: Callable[..., Settings]
) -> None:
    step = whole_step(default_settings(*WORDS), CPU)
    add = Meter.add
    monkeypatch.setattr(Meter, "add", lambda meter, result: (add(meter, result), result.finite.item()))
    with OperationTrace() as trace:
        step()
    assert trace.host_reads == ["aten._local_scalar_dense.default"]


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_no_synchronisation_on_cuda(default_settings: Callable[..., Settings], optimizer: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    step = whole_step(default_settings(*WORDS, f"train.optimizer={optimizer}"), torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
