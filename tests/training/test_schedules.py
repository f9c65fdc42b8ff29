import itertools
import math
import random
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, StepLR

from detection.config.loading import load_settings
from detection.training.schedules import BIAS_GROUP, Schedule, add_swa, build_schedule, full_rate, resolve_steps
from tests.support.paths import ARGS

STRATEGIES = [
    "LambdaLR",
    "CosineAnnealingWarmRestartsWithWarmup",
    "WarmupMultiStepLR",
    "StepLR",
    "FlatCosine",
    "UnshiftedCosine",
    "constant",
]


def build(
    strategy: str,
    learning_rate: float = 0.1,
    total_steps: int = 1000,
    steps_per_epoch: float = 10,
    clean_finish: float = 0.0,
    **values: Any,
) -> Schedule:
    """Build a schedule from settings, as the training script does."""
    values = {"step_size": 500, **values} if strategy == "StepLR" else values
    words = [f"scheduler.{name}={'null' if value is None else value}" for name, value in values.items()]
    settings, _ = load_settings(
        ARGS, words=[f"scheduler.strategy={strategy}", f"train.clean_finish={clean_finish}", *words]
    )
    return build_schedule(settings.scheduler, learning_rate, total_steps, steps_per_epoch, clean_finish)


# Durations


def test_durations_by_hand() -> None:
    assert resolve_steps(5000, 123.4) == 5000
    assert resolve_steps(0, 123.4) == 0
    assert resolve_steps("12ep", 100) == 1200
    assert resolve_steps("12ep", 62.5) == 750
    assert resolve_steps("2.5ep", 10) == 25
    assert resolve_steps("3ep", 33.4) == 100  # 100.2
    assert resolve_steps("3ep", 33.6) == 101  # 100.8


def test_epochs_are_resolved_in_every_duration() -> None:
    schedule = build("LambdaLR", warmup="1ep", index='["10ep", "20ep"]', scale="[1, 0.5, 0.1]", steps_per_epoch=7.4)
    assert schedule.warmup == 7 and schedule.index == (74, 148)
    cosine = build("CosineAnnealingWarmRestartsWithWarmup", warmup="2ep", T_0="4ep")
    assert (cosine.warmup, cosine.first_cycle) == (20, 40)
    assert build("WarmupMultiStepLR", milestones='["3ep", "5ep"]').milestones == (30, 50)


def test_steps_and_epochs_that_cross_are_refused() -> None:
    """3 epochs come before 50 steps only when an epoch is shorter than 17 steps."""
    words = {"index": '["3ep", 50]', "scale": "[1, 0.5, 0.1]"}
    assert build("LambdaLR", steps_per_epoch=10, **words).index == (30, 50)
    with pytest.raises(ValueError, match=r"scheduler\.index: must be ascending, is \[60, 50\] steps at 20\.0"):
        build("LambdaLR", steps_per_epoch=20, **words)
    with pytest.raises(ValueError, match=r"scheduler\.milestones: must be ascending, is \[60, 50\]"):
        build("WarmupMultiStepLR", steps_per_epoch=20, milestones='["3ep", 50]')


# LambdaLR


def test_lambda_by_hand() -> None:
    """Darknet's schedule: warm-up of power 4, which reaches the full rate in its last step, then the scales."""
    schedule = build("LambdaLR", warmup=10, index="[20, 30, 50]", scale="[1.0, 0.5, 0.1, 0.05]")
    expected = {
        0: 0.1 * 0.0001,  # (1 / 10)^4
        1: 0.1 * 0.0016,  # (2 / 10)^4
        4: 0.1 * 0.0625,  # (5 / 10)^4
        9: 0.1,  # (10 / 10)^4
        10: 0.1,
        19: 0.1,
        20: 0.05,
        29: 0.05,
        30: 0.01,
        49: 0.01,
        50: 0.005,
        999: 0.005,
        10**9: 0.005,  # the last one holds to the end
    }
    assert {step: schedule.at(step) for step in expected} == pytest.approx(expected, rel=1e-12)


def test_scale_applies_within_the_warm_up() -> None:
    schedule = build("LambdaLR", warmup=10, index="[5]", scale="[1.0, 0.5]")
    assert schedule.at(4) == pytest.approx(0.1 * 0.5**4)
    assert schedule.at(5) == pytest.approx(0.1 * 0.6**4 * 0.5)


def test_lambda_without_index() -> None:
    schedule = build("LambdaLR", warmup=0, index="[]", scale="[0.3]")
    assert {schedule.at(step) for step in (0, 7, 10**6)} == {0.1 * 0.3}


def test_step_lr_equals_torchs_after_the_warm_up() -> None:
    schedule = build("StepLR", warmup=4, step_size="2ep", gamma=0.5, steps_per_epoch=3)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    reference = StepLR(optimizer, step_size=6, gamma=0.5)
    for step in range(40):
        rise = min((step + 1) / 4, 1) ** 4
        assert schedule.at(step) == pytest.approx(rise * optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert schedule.changes(20) == [6, 12, 18]


# Cosine


def test_cosine_by_hand() -> None:
    """Warm-up 4, cycles of 8 from 1.0 to 0.2: 0.2 + 0.8 * (1 + cos(pi * k / 8)) / 2."""
    schedule = build("CosineAnnealingWarmRestartsWithWarmup", 1.0, warmup=4, T_0=8, eta_min=0.2)
    expected = {
        0: 1 / 256,
        3: 1.0,
        4: 1.0,
        6: 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2,  # cos(pi / 4)
        8: 0.6,  # halfway
        10: 0.2 + 0.8 * (1 - math.sqrt(0.5)) / 2,
        12: 1.0,  # restart
        16: 0.6,
        20: 1.0,
        4 + 8 * 1000: 1.0,
    }
    assert {step: schedule.at(step) for step in expected} == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("growth", "restarts"),
    # after a warm-up of 5: every 6 steps; after 6, 6 + 12, 6 + 12 + 24, 6 + 12 + 24 + 48 steps
    [(1, [5, 11, 17, 23, 29, 35, 41, 47, 53, 59, 65, 71, 77, 83, 89, 95]), (2, [5, 11, 23, 47, 95])],
)
def test_cosine_restarts(growth: int, restarts: list[int]) -> None:
    schedule = build("CosineAnnealingWarmRestartsWithWarmup", 1.0, warmup=5, T_0=6, T_mult=growth, eta_min=0)
    rates = [schedule.at(step) for step in range(100)]
    assert [step for step in range(5, 100) if rates[step] == 1.0] == restarts
    rises = [step for step in range(5, 100) if rates[step] > rates[step - 1]]
    assert rises == restarts[1:]  # between restarts it only falls


@pytest.mark.parametrize("growth", [1, 2])
@pytest.mark.parametrize(("warmup", "first_cycle"), [(0, 7), (13, 10), (5, 1)])
def test_cosine_against_torch(growth: int, warmup: int, first_cycle: int) -> None:
    schedule = build(
        "CosineAnnealingWarmRestartsWithWarmup", warmup=warmup, T_0=first_cycle, T_mult=growth, eta_min=0.003
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    theirs = CosineAnnealingWarmRestarts(optimizer, T_0=first_cycle, T_mult=growth, eta_min=0.003)
    for step in range(warmup, warmup + 120):
        assert schedule.at(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6), step
        optimizer.step()
        theirs.step()


def test_cosine_over_the_whole_run() -> None:
    """T_0 null: one cycle from the end of the warm-up to the end of the run."""
    schedule = build("CosineAnnealingWarmRestartsWithWarmup", total_steps=1000, warmup=200, T_0=None, eta_min=0)
    assert schedule.at(200) == 0.1
    assert schedule.at(600) == pytest.approx(0.05)
    assert schedule.at(999) == pytest.approx(0, abs=1e-6)
    assert all(schedule.at(step) < schedule.at(step - 1) for step in range(201, 1000))


def test_smallest_rate_as_a_share_and_another_power() -> None:
    cosine = build("CosineAnnealingWarmRestartsWithWarmup", 0.4, warmup=10, T_0=20, eta_min_factor=0.05, warmup_power=2)
    assert cosine.eta_min == pytest.approx(0.02) and cosine.at(4) == pytest.approx(0.4 * 0.25)
    assert cosine.at(20) == pytest.approx(0.02 + 0.38 / 2)
    assert build("WarmupMultiStepLR", warmup=10, warmup_power=2).at(5) == pytest.approx(0.1 * (0.1 + 0.9 * 0.25))


# FlatCosine


def yolox_rate(step: int, rate: float, steps: int, warmup: int, finish: int, share: float) -> float:
    """The paper's schedule, from its description: quadratic, cosine to `share`, constant in the last `finish` steps."""
    if step <= warmup:
        return rate * (step / warmup) ** 2
    if step >= steps - finish:
        return share * rate
    position = (step - warmup) / (steps - warmup - finish)
    return share * rate + (1 - share) * rate * 0.5 * (1 + math.cos(math.pi * position))


def rtmdet_rate(step: int, rate: float, steps: int, warmup: int, share: float) -> float:
    """The paper's schedule: linear from 1e-5, flat to the half, cosine to `share` at the end."""
    if step < warmup:
        return rate * (1e-5 + (1 - 1e-5) * step / warmup)
    half = steps // 2
    if step < half:
        return rate
    return share * rate + (1 - share) * rate * 0.5 * (1 + math.cos(math.pi * (step - half) / (steps - half)))


@pytest.mark.parametrize("steps", [300, 3000, 4440])
def test_flat_cosine_is_the_schedule_of_both_papers(steps: int) -> None:
    """YOLOX: 5 of 300 epochs of warm-up, 15 without mosaic; RTMDet: flat for 150 of 300 epochs."""
    words = {"warmup": '"5ep"', "warmup_power": 2, "warmup_start_factor": 0, "flat": 0, "constant_finish": "true"}
    epoch = steps / 300
    yolox = build("FlatCosine", 0.01, steps, epoch, clean_finish=0.05, eta_min_factor=0.05, **words)
    warmup = round(5 * epoch)
    expected = [yolox_rate(step, 0.01, steps, warmup, steps // 20, 0.05) for step in range(steps)]
    assert [yolox.at(step) for step in range(steps)] == pytest.approx(expected, rel=1e-12)
    assert yolox.changes(steps) == [warmup, steps - steps // 20]
    rtmdet = build("FlatCosine", 0.004, steps, epoch, warmup=20, warmup_start_factor=1e-5, eta_min_factor=0.05)
    expected = [rtmdet_rate(step, 0.004, steps, 20, 0.05) for step in range(steps)]
    assert [rtmdet.at(step) for step in range(steps)] == pytest.approx(expected, rel=1e-12)
    assert rtmdet.changes(steps) == [steps // 2]


def test_a_finish_is_held_only_where_asked() -> None:
    values: dict[str, Any] = {"warmup": 0, "flat": 0.2, "eta_min_factor": 0.1, "clean_finish": 0.3, "total_steps": 100}
    held = build("FlatCosine", constant_finish="true", **values)
    assert held.at(19) == 0.1 and held.at(45) == pytest.approx(0.055) and held.at(69) > 0.01
    assert [held.at(step) for step in (70, 99, 1000)] == pytest.approx([0.01] * 3)
    assert build("FlatCosine", **values).at(70) > 0.03


def test_a_warm_up_longer_than_the_flat_part_delays_the_cosine() -> None:
    schedule = build("FlatCosine", warmup=60, flat=0.5, eta_min_factor=0, total_steps=100)
    assert [schedule.at(step) for step in (59, 60, 80)] == pytest.approx([0.1 * (0.1 + 0.9 * 59 / 60), 0.1, 0.05])


def test_flat_to_the_end() -> None:
    assert {build("FlatCosine", warmup=0, flat=1, total_steps=50).at(step) for step in range(50)} == {0.1}


def test_a_cosine_that_counts_from_the_first_step() -> None:
    """EfficientDet's: 300,000 steps, 1,000 of warm-up from a tenth; numbers computed from its published formula."""
    words = {"warmup": 1000, "warmup_start_factor": 0.1, "eta_min": 0}
    schedule = build("UnshiftedCosine", 0.08, 300_000, **words)
    golden = {0: 0.008, 500: 0.044, 999: 0.079928, 1000: 0.07999779, 150_000: 0.03978986, 299_000: 0.0}
    assert [schedule.at(step) for step in golden] == pytest.approx(list(golden.values()), rel=1e-6, abs=1e-12)
    assert schedule.at(299_999) == pytest.approx(2.2e-6, rel=0.02)  # it rises a hair at the end
    assert schedule.changes(300_000) == [1000]


def test_swa_cycles_follow_by_hand() -> None:
    """A run of 100 steps, then 3 cycles of 8: 0.01 + 0.99 (1 + cos(pi k / 8)) / 2 of the rate."""
    settings, _ = load_settings(ARGS, words=["train.swa_cycles=3", "train.swa_cycle=2ep"])
    plain = build("FlatCosine", warmup=10, total_steps=100)
    schedule, steps = add_swa(plain, settings.train, 100, 4.0)
    assert steps == 124 and schedule.changes(steps) == [50, 100, 108, 116]
    assert [schedule.at(step) for step in range(100)] == [plain.at(step) for step in range(100)]
    for first in (100, 108, 116):
        assert schedule.at(first) == pytest.approx(0.1)
        assert schedule.at(first + 4) == pytest.approx(0.1 * (0.01 + 0.99 / 2))
        assert 0.001 < schedule.at(first + 7, BIAS_GROUP) < 0.006
    off, _ = load_settings(ARGS)
    assert add_swa(plain, off.train, 100, 4.0) == (plain, 100)


# The rate of the batch


def test_rate_follows_the_images_per_step() -> None:
    for words, images, expected in (([], 16, 0.004), (["train.learning_rate_batch=256"], 16, 0.004 / 16)):
        settings, _ = load_settings(ARGS, words=["train.learning_rate=0.004", *words])
        assert full_rate(settings.train, images) == expected


# WarmupMultiStepLR and constant


def test_multi_step_by_hand() -> None:
    """Linear warm-up from a tenth over 100 steps, then two drops to a fifth."""
    schedule = build("WarmupMultiStepLR", warmup=100, milestones="[300, 400]", gamma=0.2, warmup_start_factor=0.1)
    expected = {
        0: 0.01,
        50: 0.055,
        99: 0.1 * (0.1 + 0.9 * 0.99),
        100: 0.1,
        299: 0.1,
        300: 0.02,
        399: 0.02,
        400: 0.004,
        10**6: 0.004,
    }
    for group in ("weights", BIAS_GROUP):
        assert {step: schedule.at(step, group) for step in expected} == pytest.approx(expected, rel=1e-12)


def test_bias_group_of_the_warm_up() -> None:
    """Biases have their own rate in the warm-up, which may be 0, and the common rate afterwards."""
    for bias_lr in (0.07, 0.0):
        schedule = build("WarmupMultiStepLR", warmup=10, milestones="[20]", warmup_bias_lr=bias_lr)
        assert [schedule.at(step, BIAS_GROUP) for step in (0, 5, 9)] == [bias_lr] * 3
        assert schedule.at(5, "weights") == pytest.approx(0.1 * 0.55)
        for step in (10, 19, 20, 99):
            assert schedule.at(step, BIAS_GROUP) == schedule.at(step, "weights")


def test_other_strategies_treat_groups_alike() -> None:
    for strategy in ("LambdaLR", "CosineAnnealingWarmRestartsWithWarmup", "constant"):
        schedule = build(strategy, warmup=10, warmup_bias_lr=0.5)
        assert [schedule.at(step, BIAS_GROUP) for step in range(30)] == [schedule.at(step) for step in range(30)]


def test_constant_by_hand() -> None:
    schedule = build("constant", warmup=4)
    steps = (0, 1, 2, 3, 4, 10**6)
    expected = [0.1 / 256, 0.1 / 16, 0.1 * (3 / 4) ** 4, 0.1, 0.1, 0.1]
    assert [schedule.at(step) for step in steps] == pytest.approx(expected, rel=1e-12)
    assert build("constant", warmup=0).at(0) == 0.1


# All strategies


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("growth", [1, 2])
def test_extreme_settings_give_finite_rates(strategy: str, growth: int) -> None:
    """No warm-up, cycles of one step, a run shorter than its warm-up, learning rate 0."""
    words = [f"scheduler.strategy={strategy}", f"scheduler.T_mult={growth}"]
    words += ["scheduler.step_size=1"] if strategy == "StepLR" else []
    defaults, _ = load_settings(ARGS, words=words)
    for warmup, first_cycle, eta_min in itertools.product([0, 1, 50], [None, 0, 1, 3], [0.0, 1e-6]):
        scheduler = defaults.scheduler.model_copy(update={"warmup": warmup, "T_0": first_cycle, "eta_min": eta_min})
        for learning_rate, total_steps in itertools.product([0.0, 0.1], [1, 30]):
            schedule = build_schedule(scheduler, learning_rate, total_steps, steps_per_epoch=10)
            for step in [*range(total_steps + 30), 10**7]:
                for group in ("weights", BIAS_GROUP):
                    rate = schedule.at(step, group)
                    assert math.isfinite(rate) and 0 <= rate <= max(learning_rate, eta_min)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("warmup", [1, 7, 100])
def test_warm_up_rises_to_the_learning_rate(strategy: str, warmup: int) -> None:
    schedule = build(strategy, warmup=warmup, T_0=1000, milestones="[500]", index="[500]", scale="[1, 0.5]")
    rates = [schedule.at(step) for step in range(warmup + 1)]
    assert all(later > earlier for earlier, later in itertools.pairwise(rates[:-1]))
    # a cosine that counts from the first step has left the full rate a little
    shift = warmup / (1000 - warmup) if strategy == "UnshiftedCosine" else 0
    assert rates[-1] == pytest.approx(0.05 * (1 + math.cos(math.pi * shift)), rel=1e-4) and rates[0] > 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rate_depends_on_the_step_alone(strategy: str) -> None:
    """The rate does not depend on the order of calls, repetition, or rebuilding the schedule as on resume."""
    values = {"warmup": 20, "T_0": 30, "T_mult": 2, "milestones": "[60, 90]", "index": "[40]", "scale": "[1, 0.5]"}
    schedule = build(strategy, **values)
    in_order = [schedule.at(step) for step in range(200)]
    shuffled = list(range(200))
    random.Random(0).shuffle(shuffled)
    assert {step: schedule.at(step) for step in shuffled} == dict(enumerate(in_order))
    assert [build(strategy, **values).at(step) for step in (150, 3)] == [in_order[150], in_order[3]]
    assert len(set(in_order)) > 15


def test_changes_are_where_the_rate_turns() -> None:
    assert build("LambdaLR", warmup=2, index=[6, 9], scale=[1.0, 0.5, 0.1]).changes(12) == [6, 9]
    assert build("LambdaLR", warmup=2, index=[6, 19], scale=[1.0, 0.5, 0.1]).changes(12) == [6]
    assert build("WarmupMultiStepLR", milestones=[5, 8]).changes(12) == [5, 8]
    # cycles of 10, 20 and 40 steps after 2 steps of warm-up
    growing = build("CosineAnnealingWarmRestartsWithWarmup", warmup=2, T_0=10, T_mult=2)
    assert growing.changes(70) == [2, 12, 32]
    equal = build("CosineAnnealingWarmRestartsWithWarmup", warmup=0, T_0=1, T_mult=1)
    assert equal.changes(10**9) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert build("constant").changes(12) == []
