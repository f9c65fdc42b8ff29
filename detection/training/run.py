"""A training run: everything that settings, data and device determine before the first step."""

import functools
import inspect
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from detection.config import automatic
from detection.config.settings import Settings
from detection.contract import Detector
from detection.data.annotations import annotations_digest, repeat_factors
from detection.data.build import build_datasets, make_builtin, prepare_for_training
from detection.data.coco import CocoDataset
from detection.data.image_file import choose_decoder, describe_decoder
from detection.data.loaders import build_training_loader
from detection.data.sampler import ImageOrder, TrainingBatchSampler, size_step
from detection.data.transforms import Transform
from detection.dataset_checks.before_training import check_before_training
from detection.errors import SettingsError, StoppedBySetting
from detection.models import build_detector, check_input_sizes, check_shares
from detection.models.backbones.activation_checkpointing import recompute_backbone
from detection.models.pretrained import load_pretrained
from detection.runtime.devices import compile_forward, machine_of, open_machine, prepare_distributed
from detection.runtime.distributed import Ranks, device_of_rank, read_environment, synchronise_batch_norm
from detection.runtime.reproducibility import seed_everything
from detection.training.image_watch import ImageWatch
from detection.training.memory.batch_size import find_batch_size
from detection.training.prefetch import Prefetcher
from detection.training.schedules import add_swa, build_schedule, first_finishing_step, full_rate, resolve_steps
from detection.training.state import RunState
from detection.training.step import tell_progress


def join_ranks(settings: Settings) -> Ranks:
    """Open the device of this process and, if started by torchrun, join the process group.

    Raises:
        SettingsError: see `open_machine`, `device_of_rank` and `Ranks`.
    """
    _, local_rank, size = read_environment()
    device = open_machine(settings.run, device_of_rank(settings.run.device, local_rank, size)).device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return Ranks(device, functools.partial(prepare_distributed, device.type), 60 * settings.run.timeout_minutes)


@dataclass(frozen=True)
class Clock:
    """The end of a run that has a budget of time.

    Attributes:
        started: `time.perf_counter` when the budget began.
        seconds: the budget.
        finish: seconds that the end of the run takes: evaluation, the weights without EMA, the report.
    """

    started: float
    seconds: float
    finish: float

    def end_share(self, steps_left: int, step_seconds: float) -> float:
        """Return the expected duration of the whole run in shares of the budget, without further evaluations."""
        spent = time.perf_counter() - self.started
        return (spent + steps_left * step_seconds + self.finish) / self.seconds


class Run:
    """Everything that is fixed before the first step: device, data, detector, and durations in optimizer steps.

    Args:
        settings: settings of the run.
        ranks: rank and device of this process.
        fresh: load pretrained weights; false for a resumed run, whose weights come from its checkpoint.
        processes: number of processes of the original run when one process replays its step; None: `ranks.size`.

    Attributes:
        script: what continues such a run.
    """

    script = "yolo-v3/main.py"

    def __init__(self, settings: Settings, ranks: Ranks, fresh: bool, processes: int | None = None) -> None:
        self.settings, self.ranks, self.processes = settings, ranks, processes or ranks.size
        self.device, self.machine = ranks.device, machine_of(ranks.device, settings.run)
        self.dtype, self.precision, self.mark_step = self.machine.dtype, self.machine.precision, self.machine.mark_step
        self.autocast, self.build_scaler = self.machine.autocast, self.machine.build_scaler
        self._build_data()
        sets = {"training": self.training_set, "validation": self.validation_set}
        self.images = ImageWatch(sets if ranks.is_first else {})
        seed_everything(settings.run.seed)
        self.detector = self._build_detector(fresh)
        self.criterion = self.detector.require_criterion()
        self._resolve_durations()
        self.extended: list[list[int | str]] = []  # by --extend: step, train.steps before and after
        self.clock: Clock | None = None  # of a run with `train.minutes`, unless it is resumed
        self.data_warnings = self._check_data()

    def _build_data(self) -> None:
        """Read both datasets; they get their transform once the detector is built, whose geometry it follows."""
        settings = self.settings
        if self.ranks.is_first:
            make_builtin(settings.data)
        self.ranks.broadcast(None)  # barrier: the others wait for the dataset
        self.training_set, self.validation_set = build_datasets(
            settings.data, settings.run.seed, settings.model.num_classes, settings.evaluation.max_images
        )
        if isinstance(self.training_set, CocoDataset):
            self.training_set.substitutes = True
        self.categories = self.training_set.annotations.categories
        self.data_digest = annotations_digest(self.training_set.annotations)
        self.validation_digest = annotations_digest(self.validation_set.annotations)
        self.repeat_factors = None
        if settings.data.balance == "repeat_factor":
            self.repeat_factors = repeat_factors(self.training_set.annotations, settings.data.balance_threshold)

    def _check_data(self) -> list[str]:
        """Look at both datasets before the first step; returns warnings for the plan."""
        return check_before_training(
            self.training_set, self.validation_set, self.settings.data, self.settings.train, self.detector
        )

    def _new_detector(self) -> Detector:
        """Build the detector with random weights, on the CPU."""
        return build_detector(self.settings, len(self.categories.names))

    def _build_detector(self, fresh: bool) -> Detector:
        """Build the detector on the device, the datasets' transforms, and a batch size for `auto`."""
        settings, train = self.settings, self.settings.train
        detector = self._new_detector()
        self.pretrained_lines = load_pretrained(detector.model, settings.model, self.categories.names) if fresh else []
        if train.activation_checkpointing:
            recompute_backbone(detector.model)
        detector.require_criterion()
        check_input_sizes(detector, settings)
        check_shares(detector, settings)
        geometry, seed = detector.geometry, settings.run.seed
        prepare_for_training(self.training_set, geometry, settings, self.repeat_factors)
        self.validation_set.sample_transform = Transform(geometry, settings.evaluation.image_size, seed)
        detector = self.machine.to_device(detector)
        self.batch_size_lines: list[str] = []
        if train.batch_size == "auto":
            number, line = find_batch_size(
                detector, settings, self.ranks, len(self.training_set), self.autocast, self.build_scaler
            )
            train = train.model_copy(update={"batch_size": number})
            self.settings = settings.model_copy(update={"train": train})
            self.batch_size_lines = [line]
        smallest = train.multiscale_sizes[0] if train.resize_frequency else train.image_size
        if train.micro_batch == 1 and smallest == geometry.size_multiple:
            raise SettingsError(
                f"train.batch_size=1 with images of {smallest} px: the coarsest map has one cell, and a batch norm "
                "needs more than one value; take train.batch_size=2 or larger images"
            )
        self.size_step = size_step(geometry.size_multiple)
        if train.sync_batch_norm:
            detector = detector.replace(model=synchronise_batch_norm(detector.model, self.device))
        return detector

    def _resolve_durations(self) -> None:
        """Turn every duration of the settings, in steps or epochs, into optimizer steps, and build the schedule."""
        settings, train = self.settings, self.settings.train
        self.images_per_step = train.micro_batch * train.subdivisions * self.processes
        order = ImageOrder(len(self.training_set), settings.run.seed, self.repeat_factors)
        self.steps_per_epoch = order.images_per_epoch / self.images_per_step
        self.steps = max(self.in_steps(train.steps), 1)
        stop_after = settings.run.stop_after
        self.stop_step = None if stop_after is None else self.in_steps(stop_after)
        self.unfreeze_step = self.in_steps(train.unfreeze_step)
        self.finish_step = first_finishing_step(train.clean_finish, self.steps)
        self.ema: tuple[float, int | None] | None = None
        if train.ema_decay == "auto":
            self.ema = automatic.ema_decay(self.steps), None
        elif train.ema_decay is not None:
            self.ema = train.ema_decay, None if train.ema_ramp is None else self.in_steps(train.ema_ramp)
        self.save_frequency = max(self.in_steps(train.save_frequency), 1)
        frequency = settings.evaluation.evaluate_frequency
        if frequency == "auto":
            frequency = automatic.evaluation_steps(self.steps, self.steps_per_epoch)
        self.evaluate_frequency = None if frequency is None else max(self.in_steps(frequency), 1)
        self.learning_rate = full_rate(train, self.images_per_step)
        try:
            self.schedule = build_schedule(
                settings.scheduler, self.learning_rate, self.steps, self.steps_per_epoch, train.clean_finish
            )
        except ValueError as error:
            raise SettingsError(str(error)) from None
        # Last: what depends on the length of the run depends on `train.steps` alone.
        self.schedule, self.steps = add_swa(self.schedule, train, self.steps, self.steps_per_epoch)
        if not train.clean_finish:
            self.finish_step = self.steps

    @property
    def patience(self) -> float:
        """Number of evaluations without a higher `evaluation.best_metric` after which the run ends."""
        patience = self.settings.train.patience
        return math.inf if patience is None else patience

    def in_steps(self, duration: int | str) -> int:
        """Resolve a duration, in steps or epochs, to optimizer steps."""
        return resolve_steps(duration, self.steps_per_epoch)

    def logs_at(self, step: int) -> bool:
        """Return whether progress is logged after this many steps."""
        return step % self.settings.run.log_frequency == 0 or step == self.steps

    def evaluates_at(self, step: int) -> bool:
        """Return whether the model is evaluated after this many steps; before SWA begins and at `run.stop_after`."""
        regular = self.evaluate_frequency is not None and step % self.evaluate_frequency == 0
        return regular or step in (self.steps, self.schedule.swa_start, self.stop_step)

    def check_stop(self, step: int) -> None:
        """Raise if a run that has done this many steps, and is not complete, goes no further now.

        Raises:
            StoppedBySetting: `run.stop_after` is reached.
        """
        if self.stop_step is not None and step >= self.stop_step:
            raise StoppedBySetting(f"stopped after step {step}: run.stop_after = {self.settings.run.stop_after}")

    def new_sampler(self, first_step: int, end_step: int, rank: int | None = None) -> TrainingBatchSampler:
        """Build the sampler of micro-batches from `first_step` up to `end_step`, for this or another rank."""
        train = self.settings.train
        return TrainingBatchSampler(
            len(self.training_set),
            train.micro_batch,
            train.subdivisions,
            (first_step, end_step),
            self.settings.run.seed,
            train.image_size,
            train.resize_frequency,
            train.multiscale_sizes,
            self.repeat_factors,
            self.size_step,
            self.ranks.rank if rank is None else rank,
            self.processes,
            self.finish_step,
        )

    def set_progress(self, step: int) -> None:
        """Tell the criterion, if it wants to know, how much of the run is done before a step, and whether it finishes.

        Losses and assigners that change in the course of a run depend on this alone, so a resumed run goes on exactly.
        """
        length = self.schedule.swa_start or self.steps  # the share is that of `train.steps`; SWA comes after it
        tell_progress(self.criterion, min(step / length, 1.0), step >= self.finish_step)

    def set_length(self, steps: int, evaluate_frequency: int | str | None) -> None:
        """Replace the number of steps and the time between evaluations, and every duration that follows from them."""
        train = self.settings.train.model_copy(update={"steps": steps})
        evaluation = self.settings.evaluation.model_copy(update={"evaluate_frequency": evaluate_frequency})
        self.settings = self.settings.model_copy(update={"train": train, "evaluation": evaluation})
        self._resolve_durations()

    def training_batches(self, first_step: int, end_step: int | None = None) -> Prefetcher:
        """Start the loader; returns the micro-batches of this process from `first_step` to the end of the run."""
        sampler = self.new_sampler(first_step, self.steps if end_step is None else end_step)
        loader = build_training_loader(self.training_set, sampler, self.settings.data.num_workers, self.device)
        return Prefetcher(iter(loader), self.device)

    def image_ids_of_step(self, step: int) -> list[int]:
        """List the image ids of a step, over all micro-batches and processes."""
        images = range(step * self.images_per_step, (step + 1) * self.images_per_step)
        sampler = self.new_sampler(step, step + 1)
        return [int(self.training_set.annotations.image_ids[sampler.image_at(place)[0]]) for place in images]

    def new_state(self, checkpoint: dict[str, Any] | None = None) -> RunState:
        """Build the state before the first step, or restore that of a checkpoint.

        Raises:
            CheckpointError: the checkpoint does not fit this run.
        """
        state = RunState(
            self.detector.model,
            self.settings.train,
            self.ema,
            self.build_scaler(),
            self.ranks.average_ if self.ranks.size > 1 else None,
            self.images_per_step,
            (self.schedule.swa_start, self.schedule.swa_cycle) if self.schedule.swa_cycle else None,
        )
        if checkpoint is not None:
            state.load(checkpoint)
            self.extended = checkpoint.get("extended", [])
            if self.ranks.size > 1:
                state.meter.restart()  # the sums in the checkpoint are those of the first process
        return state

    def conditions(self) -> dict[str, str | int]:
        """Return what influences the results besides settings and annotations."""
        decoder = describe_decoder(choose_decoder(self.settings.data.decoder))
        return {"processes": self.processes, "precision": self.precision, "image decoder": decoder}

    def checkpoint(self, state: RunState) -> dict[str, Any]:
        """Return the content of a checkpoint, which can resume the run or rebuild the detector; copies no tensors."""
        geometry = self.detector.geometry
        return {
            "settings": self.settings.model_dump(mode="json"),
            "data_digest": self.data_digest,
            "validation_digest": self.validation_digest,
            "conditions": self.conditions(),
            "categories": {"names": list(self.categories.names), "ids": list(self.categories.ids)},
            "pixel_mean": list(geometry.pixel_mean),
            "pixel_std": list(geometry.pixel_std),
            "extended": self.extended,
            "length": {"steps": self.schedule.swa_start or self.steps, "steps_per_epoch": self.steps_per_epoch},
            **state.content(),
        }

    @functools.cached_property
    def compiled(self) -> torch.nn.Module:
        """The compiled network, shared by the preflight step and the training loop."""
        train = self.settings.train
        smallest, largest = train.multiscale_sizes if train.resize_frequency else (0, 0)
        return compile_forward(self.detector.model, self.device, (largest - smallest) // self.size_step + 1)

    def wrapped(self, model: torch.nn.Module) -> torch.nn.Module:
        """Wrap the model for training, with `torch.compile` and DistributedDataParallel as configured.

        Call it again after a part of the model was frozen or unfrozen.
        """
        if self.settings.run.compile:
            model = self.compiled
        if self.ranks.size == 1:
            return model
        # DDP must not sync buffers: BatchNormStatistics averages batch-norm statistics once per step.
        names = inspect.signature(DistributedDataParallel).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"  # before torch 2.14
        options: dict[str, Any] = {sync: False, "gradient_as_bucket_view": True}
        return DistributedDataParallel(model, **options)
