"""`train.minutes`: as many steps as fit into the time, known before the first one."""

import itertools
import math
import time
from collections.abc import Iterator

import torch

from detection.config.automatic import EVALUATIONS
from detection.contract import Batch
from detection.data.loaders import build_evaluation_loader
from detection.errors import SettingsError
from detection.evaluation.evaluate import run_inference
from detection.runtime.devices import synchronize
from detection.runtime.reproducibility import seed_step
from detection.training.optimizer import set_backbone_frozen, set_learning_rates
from detection.training.run import Clock, Run
from detection.training.step import train_step

MEASURED_SHARE, MEASURED_SECONDS = 0.04, 60.0  # of the budget, and at most, spent on timing steps
COLD_STEPS, FEWEST_STEPS, MOST_STEPS = 3, 4, 200
EVALUATION_SHARE = 0.12  # largest share of the time for evaluations whose frequency is auto
EVALUATED_BATCHES = 4  # timed; the rest of the validation set takes as long per batch
SCORING = 1.2  # an evaluation with NMS, metric and files, compared with the network and the loader alone
START, FINISH = 2.0, 4.0  # seconds for the preflight checks and for the report at the end


def fit_to_clock(run: Run, started: float) -> list[str]:
    """Set the number of steps and the evaluations so that the run takes `train.minutes`; a collective call.

    Real steps on the run's own batches are timed, and then undone.

    Args:
        run: the run, whose `settings`, durations and `clock` are replaced.
        started: `time.perf_counter` when the budget began.

    Returns:
        Lines for the plan.

    Raises:
        SettingsError: the time is too short for a single step.
    """
    settings = run.settings
    assert settings.train.minutes is not None
    seconds = 60 * settings.train.minutes
    measured = {"step": measure_step(run, min(MEASURED_SHARE * seconds, MEASURED_SECONDS)), "start": START}
    shares = run.ranks.gather(measure_evaluation(run))
    evaluation = run.ranks.broadcast(None if shares is None else max(shares))  # the others wait for the slowest
    measured["left"] = seconds - (time.perf_counter() - started)
    measured = run.ranks.average(measured)  # all processes must agree
    step = measured["step"]
    finish = FINISH + evaluation * (2 if run.ema else 1)
    left = measured["left"] - measured["start"] - finish
    frequency = settings.evaluation.evaluate_frequency
    if frequency == "auto":
        count = min(EVALUATIONS, int(EVALUATION_SHARE * max(left, 0) / evaluation))
        steps = int((left - max(count - 1, 0) * evaluation) / step)  # the last one is part of the end
        count = max(min(count, int(steps / run.steps_per_epoch)), 1)
        frequency = max(math.ceil(steps / count), 1)
    else:
        between = math.inf if frequency is None else max(run.in_steps(frequency), 1)
        steps = int(left / (step + evaluation / between))
    if steps < 1:
        raise SettingsError(
            f"train.minutes={settings.train.minutes:g}: no step fits, one takes {step:.2f} s and an evaluation "
            f"{evaluation:.1f} s; take more minutes, fewer evaluation.max_images or a smaller train.batch_size"
        )
    run.set_length(steps, frequency)
    run.clock = Clock(started, seconds, finish)
    return [
        f"time        {settings.train.minutes:g} minutes: {steps} steps of {step:.3f} s, "
        f"{math.ceil(steps / (run.evaluate_frequency or steps))} evaluations of about {evaluation:.1f} s"
    ]


def measure_step(run: Run, seconds: float) -> float:
    """Time real training steps for so many seconds, and undo them; returns the seconds of a step."""
    settings, train = run.settings, run.settings.train
    state = run.new_state()
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    set_backbone_frozen(state.model, False, train.backbone_batch_norm)
    model = run.wrapped(state.model)
    batches = run.training_batches(0, COLD_STEPS + MOST_STEPS)
    started, taken = time.perf_counter(), 0
    try:
        for step in range(COLD_STEPS + MOST_STEPS):
            if step == COLD_STEPS:
                synchronize(run.device)
                started = time.perf_counter()
            taken = step - COLD_STEPS
            if run.ranks.broadcast(taken >= FEWEST_STEPS and time.perf_counter() - started >= seconds):
                break
            set_learning_rates(state.optimizer, run.schedule.at, step)
            seed_step(settings.run.seed, step, run.ranks.rank)
            run.set_progress(0)
            micro_batches = list(itertools.islice(batches, train.subdivisions))
            result = train_step(
                model, run.criterion, state.optimizer, state.scaler, micro_batches, run.autocast, run.device,
                train.clip_norm, state.statistics, False, run.mark_step, train.clip_tensor_norm,
            )  # fmt: skip
            if state.ema:
                state.ema.update(state.model, step, result.finite)
            batches.prefetch(train.subdivisions)
            synchronize(run.device)
        spent = time.perf_counter() - started
    finally:
        batches.close()
        state.model.load_state_dict(before)
        state.optimizer.zero_grad(set_to_none=True)
    return spent / max(taken, 1)


def measure_evaluation(run: Run) -> float:
    """Estimate the seconds of this process's share of an evaluation from its first batches; 0: it has no image.

    Without NMS, which is slow for a fresh network.
    """
    settings, dataset = run.settings, run.validation_set
    batch_size = settings.evaluation.batch_size or settings.train.micro_batch
    loader = build_evaluation_loader(
        dataset, batch_size, settings.data.num_workers, run.device, run.ranks.rank, run.ranks.size
    )
    times, sizes = [time.perf_counter()], [0]

    def first_batches() -> Iterator[Batch]:
        for batch in itertools.islice(loader, EVALUATED_BATCHES):
            sizes.append(len(batch["images"]))
            yield batch

    empty = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
    run_inference(
        run.detector.model,
        run.criterion,
        lambda outputs: [empty] * sizes[-1],  # type: ignore[arg-type]
        first_batches(),
        run.device,
        run.autocast,
        on_batch=lambda: times.append(time.perf_counter()),
    )
    if len(times) == 1:  # fewer images than processes; the longest time of all counts
        return 0.0
    first, rest = times[1] - times[0], times[-1] - times[1]
    per_batch = rest / (len(times) - 2) if len(times) > 2 else first
    return SCORING * (first + per_batch * (len(loader) - 1))
