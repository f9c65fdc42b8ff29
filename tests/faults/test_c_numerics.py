"""C: numbers that are non-finite, sizes that do not fit, schedules at their edges, the metric."""

import dataclasses
import functools
import json
import math
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from detection.checkpoints import load_checkpoint
from detection.config.loading import load_settings
from detection.config.settings import Settings
from detection.evaluation.evaluate import drop_non_finite, run_inference
from detection.models import build_detector
from detection.ops.boxes import pairwise_iou
from detection.ops.letterbox import Letterbox
from detection.ops.nms import grouped_nms
from detection.runtime import devices
from detection.runtime.devices import autocast
from detection.training import dry_run as preflight
from detection.training import run as run_parts
from detection.training.step import train_step
from tests.support.fault_runs import NETWORK, OVERLAY
from tests.support.paths import ARGS
from tests.support.slow_boxes import slow_nms
from tests.support.training_runs import first_difference

CPU = torch.device("cpu")
PARTS = ("model", "average", "optimizer")


def break_loss(main: ModuleType, value: float, steps: range, part: str = "loss_class") -> None:
    """One part of the loss has this value in these steps; its gradient is what it was."""
    criterion: list[Any] = []
    broken = False
    real = main.Supervisor.next_batches

    def next_batches(supervisor: Any, count: int) -> Any:
        nonlocal broken
        broken = supervisor.step in steps
        if not criterion:
            criterion.append(supervisor.run.criterion.forward)

            def forward(outputs: list[Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
                losses = criterion[0](outputs, targets)
                return losses | ({part: losses[part] * 0 + losses[part].detach() + value} if broken else {})

            supervisor.run.criterion.forward = forward
        return real(supervisor, count)

    main.Supervisor.next_batches = next_batches


def rows_of(directory: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "train/loss" in row]


@pytest.mark.parametrize("value", [math.nan, pytest.param(math.inf, marks=pytest.mark.faults)])
def test_C01_C04_one_step_that_is_non_finite_changes_nothing(train, tmp_path: Path, value: float) -> None:
    fault = functools.partial(break_loss, value=value, steps=range(3, 4))
    run = train("run", "train.save_frequency=1", "train.keep_checkpoints=9", "train.steps=6", fault=fault)
    run.ends_with(0)
    before, after, later = (load_checkpoint(tmp_path / "run" / f"step_00000000{step}.pt") for step in (3, 4, 5))
    for part in PARTS:  # of the optimizer the rates, which are set before each step, may differ
        contents = [content[part] for content in (before, after)]
        if part == "optimizer":
            contents = [content["state"] for content in contents]
        assert first_difference(*contents) is None, part
    assert first_difference(after["model"], later["model"]) is not None
    for name, tensor in load_checkpoint(tmp_path / "run" / "last.pt")["average"].items():
        assert tensor.isfinite().all(), name
    assert "warning: step 3 was skipped" in run.out
    # The schedule leaves the step out: the rate of step 3 comes again at step 4. Warm-up over 3 steps, half from 5 on.
    rates = [row["train/learning_rate"] for row in rows_of(tmp_path / "run")]
    assert rates == pytest.approx([1e-3 / 81, 1e-3 * 16 / 81, 1e-3, 1e-3, 1e-3, 1e-3])
    assert [row["train/skipped_steps"] for row in rows_of(tmp_path / "run")] == [0, 0, 0, 1, 1, 1]


def test_C01_always_ends_with_4_and_a_bundle(train, launch, tmp_path: Path) -> None:
    fault = functools.partial(break_loss, value=math.nan, steps=range(2, 99))
    run = train("run", "train.max_skipped_steps=3", fault=fault)
    line = run.ends_with(4, "3 steps in a row were non-finite, the first is step 2", "loss_class = nan", "--replay")
    bundle = tmp_path / "run" / "non_finite_000002"
    assert str(bundle) in line and line in (tmp_path / "run" / "train.log").read_text()
    report = json.loads((bundle / "report.json").read_text())
    assert [step["step"] for step in report["steps"]] == [2, 3, 4] and report["seed"] == OVERLAY["run"]["seed"]
    assert all(len(step["image_ids"]) == 4 and set(step["image_ids"]) <= set(range(1, 14)) for step in report["steps"])
    # The cause was the hook, not the state: taken again without it the step is finite.
    replayed = launch("replay", "--replay", bundle).ends_with(0)
    assert replayed.splitlines()[-2:] == ["finite: loss, outputs and gradient"] * 2
    # The same images as in the run: with the hook it is not, and says for which image.
    again = launch("again", "--replay", bundle, fault=break_criterion_of_image)
    again.ends_with(4, "step 2 is non-finite here either")
    assert f"loss of image id {report['steps'][0]['image_ids'][1]} alone: loss_class = nan" in again.out


def break_criterion_of_image(main: ModuleType) -> None:
    """NaN for the second image of each micro-batch of two."""
    build = run_parts.build_detector

    def build_with_fault(*arguments: Any) -> Any:
        detector = build(*arguments)
        real = detector.criterion.forward
        whole: list[Tensor] = []

        def forward(outputs: list[Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
            losses = real(outputs, targets)
            if len(outputs[0]) == 2:
                whole[:] = [outputs[0][1].detach()]
            broken = len(outputs[0]) == 2 or torch.equal(outputs[0][0], whole[0])
            return losses | ({"loss_class": losses["loss_class"] * math.nan} if broken else {})

        detector.criterion.forward = forward
        return detector

    run_parts.build_detector = build_with_fault


def test_C01_a_real_overflow_is_reproduced_from_its_bundle(train, launch, tmp_path: Path) -> None:
    words = ["train.optimizer=sgd", "train.learning_rate=1e30", "scheduler.warmup=0", "train.max_skipped_steps=2"]
    train("run", *words, "train.steps=20").ends_with(4, "2 steps in a row were non-finite")
    (bundle,) = (tmp_path / "run").glob("non_finite_*")
    replayed = launch("replay", "--replay", bundle)
    replayed.ends_with(4, "is non-finite here either")
    assert "first non-finite output: of " in replayed.out or "loss: loss_" in replayed.out, replayed.out


def use_scaler(main: ModuleType, scale: float, overflow: tuple[int, ...]) -> None:
    """fp16's scaler around float32; in these steps the gradients are infinite, the losses are not."""
    devices.build_scaler = lambda device, dtype: torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10_000)
    taken = 0
    real = main.train_step

    def train_step_with_overflow(model: torch.nn.Module, *arguments: Any, **keywords: Any) -> Any:
        nonlocal taken
        handles = [
            parameter.register_hook(lambda grad: grad * math.inf)
            for parameter in model.parameters()
            if taken in overflow
        ]
        taken += 1
        result = real(model, *arguments, **keywords)
        for handle in handles:
            handle.remove()
        return result

    main.train_step = train_step_with_overflow


@pytest.mark.faults
def test_C02_overflow_halves_the_scale_and_the_schedule_waits(train, tmp_path: Path) -> None:
    fault = functools.partial(use_scaler, scale=2.0**16, overflow=(0, 1, 4))
    words = ["scheduler.warmup=4", "train.max_skipped_steps=2", "train.save_frequency=1", "train.keep_checkpoints=9"]
    train("run", *words, fault=fault).ends_with(0)
    rows = rows_of(tmp_path / "run")
    assert [row["train/skipped_steps"] for row in rows] == [1, 2, 2, 2, 3, 3, 3, 3]
    assert [math.log2(row["train/loss_scale"]) for row in rows] == [15, 14, 14, 14, 13, 13, 13, 13]
    # Warm-up over 4 steps that count: (n / 4)^4 of 1e-3 for the n-th of them; a skipped one is repeated.
    contents = [load_checkpoint(tmp_path / "run" / f"step_{step:09d}.pt") for step in range(1, 9)]
    applied = [content["optimizer"]["param_groups"][0]["lr"] for content in contents]
    assert applied == pytest.approx([1e-3 * (n / 4) ** 4 for n in (1, 1, 1, 2, 3, 3, 4, 4)])


def test_C03_a_scale_that_falls_below_1_ends_with_4(train, tmp_path: Path) -> None:
    run = train("run", fault=functools.partial(use_scaler, scale=4.0, overflow=tuple(range(99))))
    run.ends_with(4, "step 3", "the loss scale has fallen to 0.5", "run.precision=bf16")
    assert not (tmp_path / "run" / "best.pt").exists()


def settings_of(tmp_path: Path, *words: str) -> Settings:
    (tmp_path / "network.cfg").write_text(NETWORK)
    words = ("model.backbone=darknet_cfg", f"model.cfg={tmp_path / 'network.cfg'}", *words)
    return load_settings(ARGS, words=words)[0]


@pytest.mark.parametrize("loss", ["darknet", "giou", "ciou", "mmdetection"])
@pytest.mark.parametrize("bias", [1e4, -1e4])
def test_C05_huge_logits(tmp_path: Path, loss: str, bias: float) -> None:
    settings = settings_of(tmp_path, f"yolo.loss={loss}")
    detector = build_detector(settings, 2)
    boxes, labels = torch.tensor([[[5.0, 5, 30, 40]], [[0, 0, 64, 64]]]), torch.tensor([[0], [1]])
    batch = {"images": torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "boxes": boxes, "labels": labels}
    batch |= {"indices": torch.arange(2), "letterboxes": [Letterbox(1, 1, 0, 0, 64, 64)] * 2}
    outputs = [(output.detach() + bias).requires_grad_() for output in detector.model(batch["images"])]
    losses = detector.criterion(outputs, {"boxes": boxes, "labels": labels})
    assert all(value.isfinite() for value in losses.values()), losses
    sum(losses.values()).backward()
    assert all(output.grad.isfinite().all() for output in outputs)
    # Boxes of e^10000 anchors are infinite: the evaluation counts them and scores the others.
    found = run_inference(detector.model, None, lambda _: detector.postprocess(outputs), [batch], CPU, nullcontext)
    kept, dropped = drop_non_finite(found.detections)
    assert np.isfinite(kept.boxes).all() and dropped == (len(found.detections) if bias > 0 else 0)


def test_C06_a_batch_norm_over_one_value_is_refused_before_the_first_step(train, tmp_path: Path) -> None:
    words = ["train.batch_size=1", "train.image_size=32", "train.resize_frequency=0", "evaluation.image_size=32"]
    train("run", *words, "run.preflight=true").ends_with(2, "train.batch_size", "32")
    train("more", *words, "train.batch_size=2", "train.steps=1", "run.preflight=true").ends_with(0)


@pytest.mark.parametrize("subdivisions", [1, 2, 5])
def test_C08_any_cut_into_micro_batches_trains_the_same(tmp_path: Path, subdivisions: int) -> None:
    # An epoch of 10 images as 10/subdivisions per micro-batch; batch norm frozen.
    def epoch(count: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        settings = settings_of(tmp_path)
        detector = build_detector(settings, 2)
        model, criterion = detector.model, detector.criterion
        optimizer = torch.optim.SGD(model.eval().parameters(), lr=0.01, momentum=0.9)
        generator = torch.Generator().manual_seed(1)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        for _ in range(3):
            images = torch.randint(0, 256, (10, 3, 64, 64), dtype=torch.uint8, generator=generator)
            boxes = torch.rand(10, 1, 4, generator=generator) * 20 + torch.tensor([0, 0, 30, 30])
            whole = {"images": images, "boxes": boxes, "labels": torch.arange(10)[:, None] % 2}
            size = 10 // count
            parts = [{key: value[at : at + size] for key, value in whole.items()} for at in range(0, 10, size)]
            train_step(model, criterion, optimizer, scaler, parts, lambda: autocast(CPU, None), CPU, None)
        return model.state_dict()

    large = epoch(1)
    for name, value in epoch(subdivisions if subdivisions > 1 else 10).items():
        torch.testing.assert_close(value, large[name], rtol=1e-6, atol=1e-6)


def test_C09_the_largest_size_is_tried_first_and_does_not_fit(train, tmp_path: Path) -> None:
    train("estimate", "run.preflight=true", fault=little_memory).ends_with(5, "train.batch_size", "train.subdivisions")
    run = train("tried", "run.preflight=true", fault=no_memory_at_96)
    run.ends_with(5, "train.batch_size", "train.subdivisions")
    assert "from step 0" not in run.out
    assert not list(tmp_path.glob("*/step_*.pt"))


def little_memory(main: ModuleType) -> None:
    estimate = preflight.estimate_memory
    preflight.estimate_memory = lambda *arguments: dataclasses.replace(estimate(*arguments), available=1000)


def no_memory_at_96(main: ModuleType) -> None:
    def no_step(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    preflight.train_step = no_step  # it tries the largest size, 96


def test_C10_sizes_that_the_network_cannot_take(train) -> None:
    train("run", "train.multiscale_sizes=[320,350]").ends_with(2, "train.multiscale_sizes", "350", "32")


@pytest.mark.faults  # the compiler takes a minute
@pytest.mark.parametrize("preflight", [False, True])
def test_C11_ten_sizes_are_ten_graphs_and_the_losses_of_eager_mode(train, tmp_path: Path, preflight: bool) -> None:
    if shutil.which("g++") is None:
        pytest.skip("the compiler needs g++, which is not on this machine")
    words = ["train.resize_frequency=1", "train.multiscale_sizes=[64,352]", "train.steps=12", "train.ema_decay=null"]
    # With this seed all ten sizes come in the first eleven steps.
    words += ["run.seed=141", "evaluation.evaluate_frequency=12", f"run.preflight={str(preflight).lower()}"]
    eager = train("eager", *words)
    compiled = train("compiled", *words, "run.compile=true", fault=count_graphs)
    eager.ends_with(0)
    assert compiled.wait(600) == 0, compiled.err
    rows, others = rows_of(tmp_path / "eager"), rows_of(tmp_path / "compiled")
    assert {row["train/image_size"] for row in rows} == set(range(64, 353, 32))
    for row, other in zip(rows, others, strict=True):
        # Fused operations round otherwise; 12 steps of it.
        assert other["train/loss"] == pytest.approx(row["train/loss"], rel=1e-3)
    assert "graphs 10, breaks 0, compiled once" in compiled.out  # the preflight's serves the loop


def count_graphs(main: ModuleType) -> None:
    import torch._dynamo.utils

    from detection.training import run

    real, calls = run.compile_forward, []
    run.compile_forward = lambda *arguments: (calls.append(arguments), real(*arguments))[1]  # type: ignore[assignment]

    def report() -> None:
        counters = torch._dynamo.utils.counters
        times = "once" if len(calls) == 1 else f"{len(calls)} times"
        breaks = sum(counters["graph_break"].values())
        print(f"graphs {counters['stats']['unique_graphs']}, breaks {breaks}, compiled {times}", flush=True)

    train = main.train
    main.train = lambda *arguments: (train(*arguments), report())


@pytest.mark.parametrize("count", [0, 1, 2000])
def test_C12_nms_at_equal_scores_is_the_slow_one(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    # whole pixels and four scores: exact, ties everywhere
    corner = torch.randint(0, 200, (count, 2), generator=generator)
    boxes = torch.cat([corner, corner + torch.randint(8, 40, (count, 2), generator=generator)], 1).float()
    scores = torch.randint(1, 5, (count,), generator=generator) / 8
    kept = grouped_nms(boxes, scores, torch.zeros(count, dtype=torch.int64), 0.45)
    assert kept.tolist() == slow_nms(boxes.tolist(), scores.tolist(), 0.45)


def test_C12_very_many_boxes_give_the_same_result_twice() -> None:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(200_000, 2, generator=generator) * 400
    boxes, scores = torch.cat([corner, corner + 60], 1), torch.full((200_000,), 0.5)
    labels = torch.zeros(200_000, dtype=torch.int64)
    kept = grouped_nms(boxes, scores, labels, 0.45)
    assert torch.equal(grouped_nms(boxes, scores, labels, 0.45), kept)
    overlaps = pairwise_iou(boxes[kept], boxes[kept]).fill_diagonal_(0)
    assert len(kept) > 50 and overlaps.max() <= 0.45 and kept[0] == 0
