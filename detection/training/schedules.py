"""Learning rate as a pure function of the step: resuming needs no scheduler state, and plotting no network."""

import dataclasses
import math
from dataclasses import dataclass

from detection.config.automatic import warmup_steps
from detection.config.settings import SchedulerSettings, TrainSettings

BIAS_GROUP = "biases"
SWA_END = 0.01  # share of the full rate at the end of each cycle


def resolve_steps(duration: int | str, steps_per_epoch: float) -> int:
    """Convert a duration to optimizer steps: 5000 is itself, "12ep" is 12 epochs, rounded."""
    if isinstance(duration, int):
        return duration
    return round(float(duration.removesuffix("ep")) * steps_per_epoch)


def full_rate(train: TrainSettings, images_per_step: int) -> float:
    """Return the full learning rate of a run, scaled from `train.learning_rate_batch` to its images per step.

    Source: the linear scaling rule of Accurate, Large Minibatch SGD, section 2.1, https://arxiv.org/abs/1706.02677
    """
    if train.learning_rate_batch is None:
        return train.learning_rate
    return train.learning_rate * images_per_step / train.learning_rate_batch


def first_finishing_step(share: float, steps: int) -> int:
    """Return the step from which a run of so many steps is in its last part, `train.clean_finish`."""
    return round((1 - share) * steps)


@dataclass(frozen=True)
class Schedule:
    """Learning-rate schedule with all durations in optimizer steps; `args.yaml` documents the fields.

    `flat_end` and `cosine_end` are those of FlatCosine: the last step at the full rate, and the first at `eta_min`.
    UnshiftedCosine has the length of the run without its warm-up, but counts from the first step, warm-up included: the
    rate drops a little where the warm-up ends, and rises a hair in as many steps at the end.

    Source: warm-up power 4, Darknet's `burn_in`; StepLR, torch's scheduler of that name; cosine restarts, SGDR,
    https://arxiv.org/abs/1608.03983; FlatCosine, RTMDet, section 4.1, https://arxiv.org/abs/2212.07784, and with a
    quadratic warm-up and a constant finish YOLOX, section 2.1, https://arxiv.org/abs/2107.08430; UnshiftedCosine,
    `CosineLrSchedule` of `tf2/train_lib.py` of https://github.com/google/automl, folder efficientdet
    """

    strategy: str
    learning_rate: float
    warmup: int
    index: tuple[int, ...]
    scale: tuple[float, ...]
    first_cycle: int
    cycle_growth: int
    eta_min: float
    milestones: tuple[int, ...]
    gamma: float
    warmup_start_factor: float
    warmup_bias_lr: float | None
    step_size: int
    warmup_power: float
    flat_end: int
    cosine_end: int
    swa_start: int = 0
    swa_cycle: int = 0  # 0: no SWA

    def at(self, step: int, group: str = "weights") -> float:
        """Return the learning rate of optimizer step `step` (the first is 0) for a parameter group."""
        if self.swa_cycle and step >= self.swa_start:
            position = (step - self.swa_start) % self.swa_cycle / self.swa_cycle
            return self.learning_rate * (SWA_END + (1 - SWA_END) * (1 + math.cos(math.pi * position)) / 2)
        if self.strategy == "WarmupMultiStepLR":
            return self._multi_step(step, group)
        if self.strategy == "FlatCosine":
            return self._flat_cosine(step)
        if self.strategy == "UnshiftedCosine":
            return self._rise(step) if step < self.warmup else self._half_wave(step / self.first_cycle)
        # step + 1, as in Darknet, which counts the batch before the update: the first rate is not 0.
        rise = min((step + 1) / self.warmup, 1.0) ** self.warmup_power if self.warmup else 1.0
        if self.strategy == "LambdaLR":
            return self.learning_rate * rise * self.scale[sum(step >= begin for begin in self.index)]
        if self.strategy == "CosineAnnealingWarmRestartsWithWarmup":
            return self.learning_rate * rise if step < self.warmup else self._cosine(step - self.warmup)
        if self.strategy == "StepLR":
            return self.learning_rate * rise * self.gamma ** (step // self.step_size)
        return self.learning_rate * rise

    def changes(self, total_steps: int, limit: int = 8) -> list[int]:
        """Return the first `limit` steps below `total_steps` at which a new scale, milestone or cosine begins."""
        if self.strategy == "LambdaLR":
            steps = list(self.index)
        elif self.strategy == "WarmupMultiStepLR":
            steps = list(self.milestones)
        elif self.strategy == "StepLR":
            steps = list(range(self.step_size, total_steps, self.step_size))
        elif self.strategy == "CosineAnnealingWarmRestartsWithWarmup":
            steps, start, length = [], self.warmup, self.first_cycle
            while start < total_steps and len(steps) <= limit:
                steps.append(start)
                start, length = start + length, length * self.cycle_growth
        elif self.strategy == "UnshiftedCosine":
            steps = [self.warmup]
        elif self.strategy == "FlatCosine":
            steps = sorted({self.flat_end, max(self.cosine_end, self.flat_end)})
        else:
            steps = []
        if self.swa_cycle:
            steps = [step for step in steps if step < self.swa_start]
            steps += range(self.swa_start, total_steps, self.swa_cycle)
        return [step for step in steps if step < total_steps][:limit]

    def _cosine(self, step: int) -> float:
        length = self.first_cycle
        if self.cycle_growth == 1:
            step %= length
        else:
            # lengths T, 2T, 4T, ...: cycle n begins at T * (2^n - 1)
            cycle = (step // length + 1).bit_length() - 1
            step -= length * (2**cycle - 1)
            length *= 2**cycle
        return self._half_wave(step / length)

    def _half_wave(self, share: float) -> float:
        """From the full rate to `eta_min`, with the share of the cosine that is done."""
        return self.eta_min + (self.learning_rate - self.eta_min) * (1 + math.cos(math.pi * share)) / 2

    def _multi_step(self, step: int, group: str) -> float:
        if step < self.warmup:
            if group == BIAS_GROUP and self.warmup_bias_lr is not None:
                return self.warmup_bias_lr
            return self._rise(step)
        return self.learning_rate * self.gamma ** sum(step >= milestone for milestone in self.milestones)

    def _flat_cosine(self, step: int) -> float:
        if step < self.warmup:
            return self._rise(step)
        if step < self.flat_end:
            return self.learning_rate
        if step >= self.cosine_end:
            return self.eta_min
        return self._half_wave((step - self.flat_end) / (self.cosine_end - self.flat_end))

    def _rise(self, step: int) -> float:
        """Warm-up from `warmup_start_factor`; the first step has exactly that share."""
        start, power = self.warmup_start_factor, self.warmup_power
        return self.learning_rate * (start + (1 - start) * step**power / self.warmup**power)


def build_schedule(
    scheduler: SchedulerSettings,
    learning_rate: float,
    total_steps: int,
    steps_per_epoch: float,
    clean_finish: float = 0.0,
) -> Schedule:
    """Build the schedule of the settings, with all durations resolved to steps.

    Args:
        scheduler: settings of the schedule.
        learning_rate: the full rate.
        total_steps: length of the run.
        steps_per_epoch: to resolve durations in epochs.
        clean_finish: share of the run at its end that `scheduler.constant_finish` holds at the smallest rate.

    Raises:
        ValueError: milestones or index are not ascending after epochs have become steps.
    """

    def steps(duration: int | str) -> int:
        return resolve_steps(duration, steps_per_epoch)

    warmup = warmup_steps(total_steps, steps_per_epoch) if scheduler.warmup == "auto" else steps(scheduler.warmup)
    index, milestones = tuple(map(steps, scheduler.index)), tuple(map(steps, scheduler.milestones))
    for name, values in (("index", index), ("milestones", milestones)):
        if list(values) != sorted(values):
            raise ValueError(
                f"scheduler.{name}: must be ascending, is {list(values)} steps at {steps_per_epoch:.1f} steps per epoch"
            )
    linear = ("WarmupMultiStepLR", "FlatCosine", "UnshiftedCosine")
    power = scheduler.warmup_power or (1 if scheduler.strategy in linear else 4)
    eta_min = scheduler.eta_min if scheduler.eta_min_factor is None else scheduler.eta_min_factor * learning_rate
    finish = clean_finish if scheduler.constant_finish else 0.0
    whole = scheduler.T_0 is None or scheduler.strategy == "UnshiftedCosine"  # which does not read it
    first_cycle = max(total_steps - warmup, 1) if whole else max(steps(scheduler.T_0 or 0), 1)
    return Schedule(
        scheduler.strategy,
        learning_rate,
        warmup,
        index,
        scheduler.scale,
        first_cycle,
        scheduler.T_mult,
        eta_min,
        milestones,
        scheduler.gamma,
        scheduler.warmup_start_factor,
        scheduler.warmup_bias_lr,
        max(steps(scheduler.step_size or 0), 1),
        power,
        max(round(scheduler.flat * total_steps), warmup),
        first_finishing_step(finish, total_steps),
    )


def add_swa(schedule: Schedule, train: TrainSettings, steps: int, steps_per_epoch: float) -> tuple[Schedule, int]:
    """Let the cycles of `train.swa_cycles` follow on a run of `steps`; returns the schedule and the steps of both.

    Source: SWA Object Detection, section 3, https://arxiv.org/abs/2012.12645
    """
    if not train.swa_cycles:
        return schedule, steps
    cycle = max(resolve_steps(train.swa_cycle, steps_per_epoch), 1)
    return dataclasses.replace(schedule, swa_start=steps, swa_cycle=cycle), steps + train.swa_cycles * cycle
