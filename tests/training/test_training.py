"""One optimizer step: accumulation, parameter groups, clipping, freezing, EMA, non-finite steps."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detection.config.loading import load_settings
from detection.config.settings import Settings, TrainSettings
from detection.contract import Detector
from detection.data.loaders import build_evaluation_loader
from detection.errors import SettingsError
from detection.evaluation.evaluate import evaluate
from detection.models import build_detector
from detection.runtime.devices import autocast, build_scaler
from detection.training import throughput
from detection.training.moving_average import ExponentialMovingAverage, MeanOfCycles
from detection.training.optimizer import build_optimizer, set_backbone_frozen, set_learning_rates
from detection.training.skipped_steps import BatchNormStatistics, NonFiniteLoss, SkippedSteps, StepResult
from detection.training.step import clip_each, train_step
from detection.training.throughput import Meter
from tests.support.detectors import datasets_of
from tests.support.paths import ARGS, REPOSITORY

CPU = torch.device("cpu")
WORDS = ["model.backbone=mobilenet_v3_small", "yolo.neck_channels=[8, 8, 8]"]


def read_settings(*words: str) -> Settings:
    return load_settings(REPOSITORY / "yolo-v3" / "args.yaml", words=[*WORDS, *words])[0]


def train_settings(**values: Any) -> TrainSettings:
    return read_settings().train.model_copy(update=values)


def small_detector(num_classes: int = 3) -> Detector:
    settings = read_settings()
    torch.manual_seed(0)
    return build_detector(settings, num_classes)


def training(**values: Any) -> tuple[nn.Module, Callable[..., dict[str, Tensor]], torch.optim.Optimizer]:
    """Model, criterion and optimizer of a small detector in training mode; `values` of the section train."""
    detector = small_detector()
    assert detector.criterion is not None
    model = detector.model.train()
    return model, detector.criterion, build_optimizer(model, train_settings(**values))


def make_batch(count: int, size: int = 64, seed: int = 0, first_index: int = 0) -> dict[str, Any]:
    """Make a batch of noise with 0, 1, 2, ... random boxes per image, and a crowd region in the last."""
    generator = torch.Generator().manual_seed(seed)
    boxes, labels = torch.zeros(count, 32, 4), torch.full((count, 32), -1)
    for image in range(count):
        for row in range(image):
            corner, side = torch.rand(2, 2, generator=generator) * size / 2
            boxes[image, row] = torch.cat([corner, corner + side + 1])
            labels[image, row] = int(torch.randint(0, 3, (1,), generator=generator))
    labels[-1, 0] = -2 if count > 1 else labels[-1, 0]
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return {"images": images, "boxes": boxes, "labels": labels, "indices": torch.arange(count) + first_index}


def take_rows(batch: dict[str, Any], rows: slice) -> dict[str, Any]:
    return {key: value[rows] for key, value in batch.items()}


def step(
    model: nn.Module,
    criterion: Callable[..., dict[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    batches: list[dict[str, Any]],
    dtype: torch.dtype | None = None,
    clip_norm: float | None = None,
    statistics: BatchNormStatistics | None = None,
) -> StepResult:
    scaler = build_scaler(CPU, dtype)
    return train_step(
        model, criterion, optimizer, scaler, batches, lambda: autocast(CPU, dtype), CPU, clip_norm, statistics
    )


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


class Weights(nn.Module):
    """Model of one weight `w`, whose gradient with the criterion below is given by the boxes of the batch."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values))

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.w]


def loss_with_gradient(outputs: list[Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"loss_box": (outputs[0] * targets["boxes"]).sum()}


def batch_with_gradient(*gradient: float, index: int = 0) -> dict[str, Any]:
    return {
        "images": torch.zeros(1, 3, 2, 2, dtype=torch.uint8),
        "boxes": torch.tensor(gradient),
        "labels": torch.zeros(1),
        "indices": torch.tensor([index]),
    }


# Accumulation


@pytest.mark.parametrize("split", [(8,), (2, 2, 2, 2), (4, 4), (1,) * 8])
def test_micro_batches_have_the_gradient_of_one_large_batch(split: tuple[int, ...]) -> None:
    detector = small_detector()
    model, batch = detector.model, make_batch(8)
    for _ in range(20):
        model.train()(batch["images"])  # statistics with which signals neither vanish nor grow
    model.eval()  # batch norm frozen: else each micro-batch has its own mean
    # Oracle: the mean over the images of each image's own loss, without `train_step`.
    expected = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    expected_losses: dict[str, float] = {}
    for image in range(8):
        single = take_rows(batch, slice(image, image + 1))
        model.zero_grad()
        losses = detector.criterion(model(single["images"]), {key: single[key] for key in ("boxes", "labels")})
        (sum(losses.values()) / 8).backward()
        for name, parameter in model.named_parameters():
            expected[name] += parameter.grad
        for name, value in losses.items():
            expected_losses[name] = expected_losses.get(name, 0.0) + value.item() / 8

    ends = torch.tensor(split).cumsum(0).tolist()
    micro_batches = [take_rows(batch, slice(end - count, end)) for count, end in zip(split, ends, strict=True)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    losses = step(model, detector.criterion, optimizer, micro_batches).losses
    for name, parameter in model.named_parameters():
        difference, size = (parameter.grad - expected[name]).norm(), expected[name].norm()
        assert size > 0, name
        assert difference <= 1e-5 * size, name
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(expected_losses, rel=1e-5)


def test_nothing_leaks_from_one_step_into_the_next() -> None:
    model = Weights(0.0, 0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step(model, loss_with_gradient, optimizer, [batch_with_gradient(1, 0), batch_with_gradient(3, 0)])
    assert model.w.tolist() == [-2.0, 0.0]  # minus the mean of (1, 0) and (3, 0)
    step(model, loss_with_gradient, optimizer, [batch_with_gradient(0, 5)])
    assert model.w.tolist() == [-2.0, -5.0]


# Optimizer


def test_every_parameter_is_in_exactly_one_group_and_only_kernels_decay() -> None:
    model = small_detector().model
    optimizer = build_optimizer(model, train_settings(weight_decay=0.01))
    groups = {group["name"]: group for group in optimizer.param_groups}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [names[id(parameter)] for group in groups.values() for parameter in group["params"]]
    assert sorted(grouped) == sorted(names.values())
    # Oracle by shape and name: kernels are the only parameters with four axes, biases are called so.
    for kind, expected in {
        "weights": {name for name, value in model.named_parameters() if value.ndim == 4},
        "biases": {name for name in names.values() if name.endswith(".bias")},
        "norms": {name for name, value in model.named_parameters() if value.ndim == 1 and name.endswith(".weight")},
    }.items():
        assert expected and {names[id(parameter)] for parameter in groups[kind]["params"]} == expected, kind
    assert {kind: group["weight_decay"] for kind, group in groups.items()} == {
        "weights": 0.01, "norms": 0.0, "biases": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_decay_by_hand(name: str) -> None:
    # Without a gradient, w -> w - lr * decay * w = w * (1 - 0.5 * 0.4) = 0.8 w for kernels, nothing for the rest.
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 2.0)
        parameter.grad = torch.zeros_like(parameter)
    build_optimizer(model, train_settings(optimizer=name, learning_rate=0.5, weight_decay=0.4)).step()
    for parameter_name, parameter in model.named_parameters():
        decays = parameter_name in ("0.weight", "2.weight")
        torch.testing.assert_close(parameter.data, torch.full_like(parameter, 1.6 if decays else 2.0))


def test_first_step_of_each_optimizer_by_hand() -> None:
    # gradient (3, -4), lr 0.1: SGD moves by lr * gradient; Adam's first step is lr * sign(gradient), its bias
    # correction cancels both averages: m / (1 - b1) = g, v / (1 - b2) = g^2.
    for name, expected in {"sgd": [-0.3, 0.4], "adam": [-0.1, 0.1], "adamw": [-0.1, 0.1]}.items():
        model = Weights(0.0, 0.0)
        optimizer = build_optimizer(model, train_settings(optimizer=name, learning_rate=0.1, weight_decay=0.0))
        step(model, loss_with_gradient, optimizer, [batch_with_gradient(3, -4)])
        assert model.w.tolist() == pytest.approx(expected, abs=1e-6), name


def test_momentum_by_hand() -> None:
    # velocity 1, then 0.5 * 1 + 1 = 1.5; lr 1: w = -1, then -2.5
    model = Weights(0.0)
    settings = train_settings(optimizer="sgd", learning_rate=1.0, momentum=0.5, weight_decay=0.0)
    optimizer = build_optimizer(model, settings)
    for expected in (-1.0, -2.5):
        step(model, loss_with_gradient, optimizer, [batch_with_gradient(1)])
        assert model.w.item() == pytest.approx(expected)


def test_nesterov_by_hand() -> None:
    # velocity 1, then 1.5, as above; each step goes to gradient + 0.5 * velocity: 1.5, then 1.75
    model = Weights(0.0)
    settings = train_settings(optimizer="sgd", learning_rate=1.0, momentum=0.5, weight_decay=0.0, nesterov=True)
    optimizer = build_optimizer(model, settings)
    for expected in (-1.5, -3.25):
        step(model, loss_with_gradient, optimizer, [batch_with_gradient(1)])
        assert model.w.item() == pytest.approx(expected)


def test_only_one_axis_and_no_bias_is_a_norm() -> None:
    """timm's backbones have other batch-norm layers, factors per channel and fully connected layers."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)
            self.linear = nn.Linear(4, 4)
            self.gamma = nn.Parameter(torch.ones(4))

    block = Block()
    groups = {group["name"]: group["params"] for group in build_optimizer(block, train_settings()).param_groups}
    assert [id(value) for value in groups["weights"]] == [id(block.linear.weight)]
    assert {id(value) for value in groups["norms"]} == {id(block.gamma), id(block.norm.weight)}
    assert {id(value) for value in groups["biases"]} == {id(block.norm.bias), id(block.linear.bias)}


def test_mean_of_cycles_by_a_slow_mean() -> None:
    """Cycles of 3 steps from step 4 on end with steps 6, 9 and 12; statistics are averaged, counters are the last."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    mean, kept = MeanOfCycles(model, start=4, cycle=3), []
    for step_number in range(14):
        for name, value in model.state_dict().items():
            value.add_(1) if name.endswith("tracked") else value.normal_()
        mean.update(model, step_number)
        if step_number in (6, 9, 12):
            kept.append({name: value.clone() for name, value in model.state_dict().items()})
        assert mean.count == len(kept)
    for name, value in mean.model.state_dict().items():
        if name.endswith("tracked"):
            assert value == kept[-1][name] == 13
        else:
            torch.testing.assert_close(value, sum(state[name] for state in kept) / 3)


# The backbone's learning rate


def test_backbone_has_groups_of_its_own_with_a_factor_only() -> None:
    model = small_detector().model
    plain = build_optimizer(model, train_settings(backbone_learning_rate_factor=1.0))
    assert [set(group) & {"name", "learning_rate_factor"} for group in plain.param_groups] == [{"name"}] * 3

    optimizer = build_optimizer(model, train_settings(backbone_learning_rate_factor=0.1, weight_decay=0.01))
    assert [group["name"] for group in optimizer.param_groups] == ["weights", "norms", "biases"] * 2
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0, 0.0] * 2
    backbone = {id(parameter) for parameter in model.backbone.parameters()}
    found = [id(parameter) for group in optimizer.param_groups[3:] for parameter in group["params"]]
    rest = [id(parameter) for group in optimizer.param_groups[:3] for parameter in group["params"]]
    assert set(found) == backbone and len(found) == len(backbone)
    assert sorted(found + rest) == sorted(id(parameter) for parameter in model.parameters())


def test_layer_decay_by_stage() -> None:
    """Darknet-53: five stages and what comes before them; every parameter once, its rate by a slow loop over names."""
    settings, _ = load_settings(ARGS, words=["model.width=0.125", "model.depth=0.25", "yolo.neck_channels=[8, 8, 8]"])
    model = build_detector(settings, 2).model
    optimizer = build_optimizer(
        model, train_settings(backbone_learning_rate_factor=0.5, backbone_layer_decay=0.8, weight_decay=0.01)
    )
    set_learning_rates(optimizer, lambda *_: 1.0, 0)
    rates = {id(value): group["lr"] for group in optimizer.param_groups for value in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(rates)
    for name, value in model.named_parameters():
        parts, expected = name.split("."), 1.0
        if parts[0] == "backbone":
            stage = int(parts[2]) if parts[1] == "stages" else -1
            expected = 0.5 * 0.8 ** (4 - stage)
        assert rates[id(value)] == pytest.approx(expected), name
    kernels = [value for group in optimizer.param_groups for value in group["params"] if group["weight_decay"]]
    assert sorted(map(id, kernels)) == sorted(id(value) for value in model.parameters() if value.ndim == 4)


def test_layer_decay_needs_stages() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Conv2d(1, 1, 1)

    with pytest.raises(SettingsError, match="backbone_layer_decay needs a backbone with stages"):
        build_optimizer(Plain(), train_settings(backbone_layer_decay=0.9))


def test_factor_multiplies_every_rate_of_the_schedule() -> None:
    optimizer = build_optimizer(small_detector().model, train_settings(backbone_learning_rate_factor=0.25))
    rates = {"weights": 0.4, "norms": 0.2, "biases": 8.0}  # biases: their warm-up
    set_learning_rates(optimizer, lambda _, group: rates[group], 0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.4, 0.2, 8.0, 0.1, 0.05, 2.0])


@pytest.mark.parametrize("factor", [0.0, 0.25, 3.0])
def test_backbone_moves_by_its_share(factor: float) -> None:
    # SGD's first step is lr * gradient (no decay), so the same gradient moves the backbone by factor times as much.
    moved = {}
    for name, value in {"plain": 1.0, "own": factor}.items():
        model, criterion, optimizer = training(
            optimizer="sgd", learning_rate=1e-3, weight_decay=0.0, backbone_learning_rate_factor=value
        )
        set_learning_rates(optimizer, lambda *_: 1e-3, 0)
        before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
        step(model, criterion, optimizer, [make_batch(4)])
        moved[name] = {key: parameter.detach() - before[key] for key, parameter in model.named_parameters()}
    for key, change in moved["own"].items():
        expected = moved["plain"][key] * (factor if key.startswith("backbone.") else 1.0)
        torch.testing.assert_close(change, expected, rtol=1e-2, atol=1e-6)
        assert moved["plain"][key].any(), key
        if factor == 0 and key.startswith("backbone."):
            assert not change.any()


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_optimizer_with_a_factor_continues_exactly(name: str) -> None:
    def continued(interrupt: bool) -> dict[str, Tensor]:
        values = {"optimizer": name, "learning_rate": 1e-3, "backbone_learning_rate_factor": 0.3}
        model, criterion, optimizer = training(**values)
        for number in range(4):
            if interrupt and number == 2:
                state, weights = optimizer.state_dict(), bits(model)
                model, criterion, optimizer = training(**values)
                model.load_state_dict(weights)
                optimizer.load_state_dict(state)
            set_learning_rates(optimizer, lambda step, _: 1e-3 / (step + 1), number)
            step(model, criterion, optimizer, [make_batch(4, seed=number)])
        return bits(model)

    assert not changed(continued(False), continued(True))


# Training on a fixed batch


@pytest.mark.parametrize(
    ("name", "rate", "dtype"), [("adam", 2e-3, torch.bfloat16), ("adamw", 2e-3, None), ("sgd", 1e-2, torch.bfloat16)]
)
def test_loss_of_a_fixed_batch_falls(name: str, rate: float, dtype: torch.dtype | None) -> None:
    model, criterion, optimizer = training(optimizer=name, learning_rate=rate)
    batch = make_batch(4)
    history = []
    for _ in range(12):
        losses = step(model, criterion, optimizer, [batch], dtype, clip_norm=35.0).losses
        assert set(losses) == {"loss_box", "loss_objectness", "loss_class"}
        assert all(value.dtype is torch.float32 and not value.requires_grad for value in losses.values())
        history.append(sum(losses.values()).item())
    assert history[-1] < 0.8 * history[0], history


# Clipping


class TwoWeights(Weights):
    def __init__(self) -> None:
        super().__init__(0.0)
        self.v = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> list[Tensor]:
        return [torch.cat([self.w, self.v])]


@pytest.mark.parametrize(
    ("clip_norm", "expected"),
    [
        (None, (-3.0, -4.0)),
        (10.0, (-3.0, -4.0)),  # the norm is 5: below the limit nothing happens
        (1.0, (-0.6, -0.8)),  # (3, 4) / 5
        (2.5, (-1.5, -2.0)),
    ],
)
def test_clipping_by_hand(clip_norm: float | None, expected: tuple[float, float]) -> None:
    # The accumulated gradient is the mean of (6, 0) and (0, 8), so (3, 4); each alone would be clipped differently, and
    # so would each of the two parameters.
    model = TwoWeights()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    batches = [batch_with_gradient(6, 0), batch_with_gradient(0, 8)]
    losses = step(model, loss_with_gradient, optimizer, batches, clip_norm=clip_norm).losses
    assert (model.w.item(), model.v.item()) == pytest.approx(expected, abs=1e-5)
    assert losses["loss_box"].item() == 0.0  # both were 0


def test_each_tensor_is_cut_before_the_whole() -> None:
    """Norms 2, 0.5 and 0 with the limit 1; a non-finite one becomes NaN, which the norm of the whole reports."""
    gradients = [torch.tensor([1.2, -1.6]), torch.tensor([0.3, 0.4]), torch.zeros(3)]
    clip_each(gradients, 1.0)
    expected = ([0.6, -0.8], [0.3, 0.4], [0, 0, 0])
    assert all(found.tolist() == pytest.approx(hand) for found, hand in zip(gradients, expected, strict=True))
    for value in (math.nan, math.inf):
        gradients = [torch.tensor([value, 1.0]), torch.ones(1)]
        clip_each(gradients, 1.0)
        assert not nn.utils.get_total_norm(gradients).isfinite()


# Numbers that are non-finite


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    **{
        name: (lambda model, name=name: build_optimizer(model, train_settings(optimizer=name, learning_rate=0.1)))
        for name in ("adam", "adamw", "sgd")
    },
    "not fused": lambda model: torch.optim.Adam(model.parameters(), lr=0.1, fused=False),
}


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bad_micro_batch", [0, 1])
def test_step_that_is_non_finite_changes_nothing(value: float, bad_micro_batch: int, optimizer_name: str) -> None:
    model = Weights(1.0, 2.0)
    optimizer = OPTIMIZERS[optimizer_name](model)

    def criterion(outputs: list[Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        # The second part has the ordinary gradient 1 whatever it is.
        return {"loss_box": outputs[0].sum(), "loss_class": outputs[0].sum() + targets["boxes"][0]}

    batches = [batch_with_gradient(0, index=7), batch_with_gradient(0, index=3)]
    assert step(model, criterion, optimizer, batches).finite  # the optimizer has a state now
    before, state = bits(model), [value.clone() for value in optimizer.state[model.w].values()]
    batches[bad_micro_batch]["boxes"] = torch.tensor([value])
    result = step(model, criterion, optimizer, batches)
    assert not result.finite and not result.losses["loss_class"].isfinite()
    assert result.losses["loss_box"] == model.w.sum()
    assert not changed(before, bits(model))
    assert state and all(map(torch.equal, state, optimizer.state[model.w].values()))
    batches[bad_micro_batch]["boxes"] = torch.tensor([0.0])
    assert step(model, criterion, optimizer, batches).finite
    assert changed(before, bits(model)) == {"w"}


def test_finite_loss_with_an_infinite_gradient_is_skipped() -> None:
    model = Weights(0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    criterion = lambda outputs, targets: {"loss_box": outputs[0].sqrt().sum()}  # noqa: E731
    result = step(model, criterion, optimizer, [batch_with_gradient(1)])
    assert result.losses["loss_box"] == 0 and not result.finite  # d sqrt(w) / dw at 0 is infinite
    assert model.w.item() == 0.0


def test_parts_that_cancel_are_noticed() -> None:
    # inf - inf in two micro-batches is NaN, but inf in one and a finite loss in the other must not hide either
    model = Weights(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    batches = [batch_with_gradient(math.inf, index=1), batch_with_gradient(-math.inf, index=2)]
    assert not step(model, loss_with_gradient, optimizer, batches).finite
    assert model.w.item() == 1.0


@pytest.mark.parametrize("optimizer_name", ["adam", "sgd"])
def test_skipped_step_in_a_real_network(optimizer_name: str) -> None:
    # weights, optimizer, statistics of the batch-norm layers and their counters, average: each bit stays
    model, criterion, optimizer = training(optimizer=optimizer_name, learning_rate=1e-3)
    statistics, average = BatchNormStatistics(model), ExponentialMovingAverage(model, 0.9, 0)

    def poisoned(outputs: list[Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value * math.nan for name, value in criterion(outputs, targets).items()}

    average.update(model, 0, step(model, criterion, optimizer, [make_batch(4)], statistics=statistics).finite)
    before, averaged = bits(model), bits(average.model)
    state = {id(p): [v.clone() for v in optimizer.state[p].values()] for p in model.parameters()}
    result = step(model, poisoned, optimizer, [make_batch(4, seed=1), make_batch(4, seed=2)], statistics=statistics)
    average.update(model, 1, result.finite)
    assert not result.finite
    assert not changed(before, bits(model)) and not changed(averaged, bits(average.model))
    for parameter in model.parameters():
        assert all(map(torch.equal, state[id(parameter)], optimizer.state[parameter].values()))
    # The same without the poison moves all of it: the assertions above can fail.
    result = step(model, criterion, optimizer, [make_batch(4, seed=1)], statistics=statistics)
    average.update(model, 1, result.finite)
    assert changed(before, bits(model)) == set(before) == changed(averaged, bits(average.model))


def test_guarded_step_equals_the_plain_one() -> None:
    # Views, remembered statistics and the factor of the loss change no bit of a finite step.
    results = []
    for guarded in (False, True):
        model, criterion, optimizer = training(optimizer="adam", learning_rate=1e-3)
        statistics = BatchNormStatistics(model) if guarded else None
        for seed in range(3):
            step(model, criterion, optimizer, [make_batch(4, seed=seed)], statistics=statistics)
        results.append(bits(model))
    assert not changed(*results)


def result_of(finite: bool, **losses: float) -> StepResult:
    return StepResult({name: torch.tensor(value) for name, value in losses.items()}, torch.tensor(finite))


def test_skipped_steps_are_counted_when_they_are_read() -> None:
    skipped = SkippedSteps(max_in_a_row=3)
    for number, finite in enumerate([True, False, True, False, False]):
        skipped.add(number, result_of(finite, loss_box=math.nan if not finite else 1.0))
    assert skipped.total == 0
    assert skipped.read() == [1, 3, 4] and skipped.total == 3 and skipped.in_a_row == [3, 4]
    copied = SkippedSteps(max_in_a_row=3)
    copied.load(skipped.state(), CPU)
    for counter in (skipped, copied):
        counter.add(5, result_of(False, loss_box=math.inf))
        with pytest.raises(
            NonFiniteLoss, match="3 steps in a row were non-finite, the first is step 3: loss_box = nan"
        ) as raised:
            counter.read()
        assert raised.value.exit_code == 4 and list(raised.value.losses) == [3, 4, 5]
        assert raised.value.losses[5] == {"loss_box": math.inf}


def test_a_checkpoint_between_two_readings_keeps_what_is_unread() -> None:
    skipped, continued = SkippedSteps(9), SkippedSteps(9)
    skipped.add(0, result_of(False, loss_box=math.nan))
    continued.load(skipped.state(), CPU)
    assert continued.total == 0 and continued.read() == [0] and continued.total == 1


def test_infinite_gradients_are_ordinary_in_half_precision() -> None:
    # fp16: the scaler lowers its scale; only losses that are non-finite count as in a row
    skipped = SkippedSteps(max_in_a_row=2, ordinary=True)
    for number in range(5):
        skipped.add(number, result_of(False, loss_box=1.0))
    assert skipped.read() == [0, 1, 2, 3, 4] and skipped.total == 5 and not skipped.in_a_row
    for number in (5, 6):
        skipped.add(number, result_of(False, loss_box=math.nan))
    with pytest.raises(NonFiniteLoss):
        skipped.read()


# Freezing


def test_frozen_backbone_stays_exactly_as_it_is() -> None:
    model, criterion, optimizer = training(optimizer="sgd", learning_rate=1e-3, weight_decay=0.1)
    step(model, criterion, optimizer, [make_batch(4)])  # its momentum and decay must not move the backbone either
    set_backbone_frozen(model, True)
    before = bits(model)
    for seed in (1, 2):
        step(model, criterion, optimizer, [make_batch(4, seed=seed)])
    # everything else moves: weights, statistics and their counters
    assert changed(before, bits(model)) == {name for name in before if not name.startswith("backbone.")}
    assert all(parameter.grad is None for parameter in model.backbone.parameters())


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_backbone_frozen_from_the_start_trains_once_unfrozen(name: str) -> None:
    # The optimizer then has a state for the neck and none for the backbone.
    model, criterion, optimizer = training(optimizer=name, learning_rate=1e-3)
    set_backbone_frozen(model, True)
    step(model, criterion, optimizer, [make_batch(4)])
    set_backbone_frozen(model, False)
    before = bits(model)
    step(model, criterion, optimizer, [make_batch(4)])
    assert changed(before, bits(model)) == set(before)
    assert all(module.training for module in model.modules())


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize("frozen_before", [False, True])
def test_frozen_batch_norm_keeps_its_statistics_while_all_weights_train(frozen_before: bool) -> None:
    model, criterion, optimizer = training(learning_rate=1e-3)
    for _ in range(3):
        model(make_batch(4)["images"])  # statistics that are not those of a fresh module
    if frozen_before:  # train.unfreeze_step
        set_backbone_frozen(model, True, "frozen")
        step(model, criterion, optimizer, [make_batch(4)])
    set_backbone_frozen(model, False, "frozen")
    before = bits(model)
    step(model, criterion, optimizer, [make_batch(4)])
    kept = {name for name in before if name.startswith("backbone.") and name.endswith(STATISTICS)}
    assert len(kept) > 90 and changed(before, bits(model)) == set(before) - kept
    # they normalise: a second image in the batch changes nothing of the first one's maps
    images = make_batch(2)["images"].float() / 255
    for found, alone in zip(model.backbone(images), model.backbone(images[:1]), strict=True):
        torch.testing.assert_close(found[:1], alone, rtol=1e-4, atol=1e-4)
    # only batch-norm layers of the backbone are in evaluation mode
    for module_name, module in model.named_modules():
        is_norm = isinstance(module, nn.BatchNorm2d) and module_name.startswith("backbone.")
        assert module.training != is_norm, module_name


def test_frozen_batch_norm_survives_an_evaluation(drawn_dataset: Path) -> None:
    settings = read_settings(f"data.root={drawn_dataset}", "data.num_workers=0", "evaluation.image_size=64")
    _, validation_set = datasets_of(settings, 64, 64, 0, None)
    detector = small_detector(2)
    model = detector.model.train()
    set_backbone_frozen(model, False, "frozen")
    modes, before = [module.training for module in model.modules()], bits(model)
    loader = build_evaluation_loader(validation_set, 4, 0, CPU)
    everything = model, detector.criterion, detector.postprocess, loader, validation_set.annotations
    evaluate(*everything, CPU, lambda: autocast(CPU, None))
    assert [module.training for module in model.modules()] == modes and True in modes and False in modes
    assert not changed(before, bits(model))


# Exponential average


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)


@pytest.mark.parametrize(("decay", "ramp"), [(0.9, 0), (0.5, 0), (0.9, 5), (0.998, 300)])
def test_average_is_the_slow_loop(decay: float, ramp: int) -> None:
    torch.manual_seed(0)
    model = Normalised()
    average = ExponentialMovingAverage(model, decay, ramp)
    expected = {name: value.double().clone() for name, value in model.state_dict().items()}
    for number in range(6):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.copy_(torch.randn(value.shape) if value.is_floating_point() else torch.tensor(3 * number))
        average.update(model, number)
        # the first step is number 0 and already counts as one step of the ramp
        d = decay * (1 - math.exp(-(number + 1) / ramp)) if ramp else decay
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] = d * expected[name] + (1 - d) * value.double()
            else:
                expected[name] = value.double()
    state = average.model.state_dict()
    assert {"linear.weight", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"} <= set(state)
    for name, value in state.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-6)
    assert state["norm.num_batches_tracked"].item() == 15 and state["norm.num_batches_tracked"].dtype is torch.int64


def test_average_by_hand() -> None:
    # decay 0.75 without ramp, the weight jumps from 0 to 8: 0 -> 2 -> 2 + 6 / 4 = 3.5
    model = Weights(0.0)
    average = ExponentialMovingAverage(model, 0.75, 0)
    nn.init.constant_(model.w, 8.0)
    for number, expected in enumerate((2.0, 3.5)):
        average.update(model, number)
        assert average.model.w.item() == expected
    # ramp 1: d = 0.75 * (1 - 1/e) = 0.474 at step 0, so 0 -> 8 * 0.526 = 4.207
    average = ExponentialMovingAverage(Weights(0.0), 0.75, 1)
    average.update(model, 0)
    assert average.model.w.item() == pytest.approx(8 * (1 - 0.75 * (1 - 1 / math.e)), rel=1e-6)


def test_average_is_a_copy_that_only_evaluates() -> None:
    model = Normalised().train()
    average = ExponentialMovingAverage(model, 0.9, 0)
    nn.init.constant_(model.linear.weight, 5.0)
    assert not (average.model.linear.weight == 5).any()
    assert not any(module.training for module in average.model.modules()) and model.training
    assert not any(parameter.requires_grad for parameter in average.model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    average.update(model, 0)
    assert model.linear.weight.unique().tolist() == [5.0]


def test_average_of_channels_last_weights() -> None:
    model = nn.Conv2d(2, 2, 3)
    nn.init.zeros_(model.weight)
    average = ExponentialMovingAverage(model.to(memory_format=torch.channels_last), 0.5, 0)
    values = torch.arange(36.0).view(2, 2, 3, 3)
    with torch.no_grad():
        model.weight.copy_(values)
    average.update(model, 0)
    assert torch.equal(average.model.weight, values / 2)


def test_average_follows_tensors_that_are_exchanged_between_two_updates() -> None:
    """The EMA uses the current tensors after statistics were joined, a checkpoint loaded or a parameter replaced."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2, affine=False))
    model.register_buffer("constant", torch.ones(1), persistent=False)
    average = ExponentialMovingAverage(model, 0.5, 0)

    def exchange(number: int) -> None:
        if number == 1:
            BatchNormStatistics(model)
        if number == 2:
            model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
        if number == 3:
            model[2].bias = nn.Parameter(torch.tensor([5.0, 6.0]))
        if number == 4:
            BatchNormStatistics(average.model)

    for number in range(5):
        exchange(number)
        with torch.no_grad():
            for value in model.state_dict().values():
                value.add_(1)
        # (a + b) / 2 of whatever stands in both now
        before, values = bits(average.model), bits(model)
        average.update(model, number)
        for name, value in average.model.state_dict().items():
            own, new = before[name].double(), values[name].double()
            expected = (own + new) / 2 if value.is_floating_point() else new
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
    assert "constant" not in before and len(before) == 12


# Meter


def test_meter_by_hand(monkeypatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
    meter = Meter(images_per_step=8)
    for box, objectness in ((1.0, 10.0), (2.0, 20.0)):
        meter.add(result_of(True, loss_box=box, loss_objectness=objectness))
    meter.add(result_of(False, loss_box=math.nan, loss_objectness=math.inf))  # skipped: takes time, counts for no loss
    meter.waited += 1.0
    clock[0] += 4.0
    assert meter.read() == {
        "train/loss": 16.5,  # 1.5 + 15
        "train/loss_box": 1.5,
        "train/loss_objectness": 15.0,
        "train/images_per_second": 6.0,  # 3 steps * 8 images / 4 s
        "train/wait_fraction": 0.25,
    }
    meter.add(result_of(True, loss_box=7.0, loss_objectness=0.0))
    clock[0] += 2.0
    values = meter.read()
    assert (values["train/loss"], values["train/images_per_second"], values["train/wait_fraction"]) == (7.0, 4.0, 0.0)


def test_step_runs_the_forward_pass_under_autocast_and_the_backward_pass_outside() -> None:
    inside = []

    class Watched(Weights):
        def forward(self, images: Tensor) -> list[Tensor]:
            inside.append(torch.is_autocast_enabled("cpu"))
            self.w.register_hook(lambda gradient: inside.append(torch.is_autocast_enabled("cpu")))
            return super().forward(images)

    model = Watched(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step(model, loss_with_gradient, optimizer, [batch_with_gradient(1)], torch.bfloat16)
    assert inside == [True, False]
