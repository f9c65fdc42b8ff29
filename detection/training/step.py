"""One optimizer step and what belongs to it; knows no dataset, no logger, no schedule."""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detection.data.loaders import Batch, targets_to
from detection.schedules import BIAS_GROUP
from detection.settings import TrainSettings
from detection.skipped_steps import NormalisationStatistics, StepResult, step_if
from detection.throughput import Throughput

FACTOR = "learning_rate_factor"  # key of an optimizer group


def build_optimizer(model: nn.Module, train: TrainSettings) -> torch.optim.Optimizer:
    """Adam, AdamW or SGD over three named groups; weight decay acts on convolution weights only.

    Groups: "weights" (kernels), "norms" (scale of the normalisations and other factors per channel), "biases" (all
    biases). With its own learning-rate factor the encoder has three more of the same names; they carry the factor.
    """
    factor = train.encoder_learning_rate_factor
    encoder = [] if factor == 1 else cast(nn.Module, model.encoder).parameters()
    of_encoder = {id(parameter) for parameter in encoder}
    parts = (False, True) if of_encoder else (False,)
    groups: dict[tuple[bool, str], list[nn.Parameter]] = {
        (part, kind): [] for part in parts for kind in ("weights", "norms", BIAS_GROUP)
    }
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind = BIAS_GROUP if name == "bias" else "norms" if parameter.ndim == 1 else "weights"
            groups[id(parameter) in of_encoder, kind].append(parameter)
    arguments = []
    for (part, kind), parameters in groups.items():
        decay = train.weight_decay if kind == "weights" else 0.0
        group: dict[str, Any] = {"params": parameters, "name": kind, "weight_decay": decay}
        if part:  # only then, so that other checkpoints stay as they are
            group[FACTOR] = factor
        arguments.append(group)
    fused = next(model.parameters()).device.type in ("cpu", "cuda")  # one kernel for all weights where there is one
    if train.optimizer == "sgd":
        sgd = torch.optim.SGD(arguments, lr=train.learning_rate, momentum=train.momentum, fused=fused)
        if train.momentum:
            # From the start: the kernel fails when an encoder that is unfrozen later has none beside a neck that has.
            for parameter in model.parameters():
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[train.optimizer]
    return optimizer(arguments, lr=train.learning_rate, fused=fused)


def set_learning_rates(optimizer: torch.optim.Optimizer, rate_of_group: Callable[[str], float]) -> None:
    """Give each group the schedule's rate for its name, times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate_of_group(group["name"]) * group.get(FACTOR, 1.0)


def set_encoder_frozen(model: nn.Module, frozen: bool, batch_norm: str = "train") -> None:
    """Freeze or unfreeze the encoder of a model in training mode.

    Args:
        frozen: its weights get no gradient and its normalisations keep their statistics.
        batch_norm: "frozen": those statistics stay, and normalise, while the weights train too.
    """
    encoder = cast(nn.Module, model.encoder)
    for parameter in encoder.parameters():
        parameter.requires_grad_(not frozen)
        if frozen:
            parameter.grad = None
    encoder.train(not frozen)
    if batch_norm == "frozen":
        for module in encoder.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def train_step(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batches: Sequence[Batch],
    autocast: Callable[[], AbstractContextManager],
    device: torch.device,
    clip_norm: float | None,
    statistics: NormalisationStatistics | None = None,
    discard: bool = False,
    mark_step: Callable[[], None] = lambda: None,
) -> StepResult:
    """Accumulate the gradients of all micro-batches, then move the weights once, or not at all.

    Each micro-batch's loss is divided by their number, so the sum is the gradient of one large batch. Where the loss or
    the gradient is not finite, weights, optimizer state and statistics keep their values; that is decided on the
    device, the host waits for nothing. All processes of a run decide alike: the gradient they see is the same.

    Args:
        model: may be wrapped in DistributedDataParallel; gradients are then exchanged with the last micro-batch only.
        batches: the micro-batches of this step.
        clip_norm: largest L2 norm of the whole gradient; None: not clipped.
        statistics: of the model's normalisations, to be kept in a skipped step; None: they move whatever happens.
        discard: skip the step whatever it is: everything is computed and all memory used, nothing changes.
        mark_step: `devices.mark_step_of`, called after each backward pass and after the optimizer.
    """
    optimizer.zero_grad(set_to_none=True)
    if statistics is not None:
        statistics.keep()
    totals: dict[str, Tensor] = {}
    for number, batch in enumerate(batches, start=1):
        images, targets = targets_to(batch, device)
        waits = isinstance(model, DistributedDataParallel) and number < len(batches)
        with cast(DistributedDataParallel, model).no_sync() if waits else contextlib.nullcontext():
            with autocast():
                outputs = model(images)
                losses = criterion(outputs, targets)
            loss = sum(losses.values()) / len(batches)
            # 1 for a finite loss. Any other may have a finite gradient; times NaN it has none.
            poison = loss.detach() * 0 + 1
            scaler.scale(loss * poison).backward()
        mark_step()
        for name, value in losses.items():
            totals[name] = totals.get(name, 0) + value.detach() / len(batches)
    scaler.unscale_(optimizer)
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if clip_norm is not None:
        nn.utils.clip_grads_with_norm_(model.parameters(), clip_norm, norm)
    finite = norm.isfinite() & (not discard)
    step_if(optimizer, finite)
    scaler.update()
    if statistics is not None:
        statistics.settle(finite)
    mark_step()
    return StepResult(totals, finite)


class ExponentialAverage:
    """Moving average of the weights and of the normalisations' statistics, for evaluation and for `best.pt`.

    average += (1 - d) * (value - average) with d = decay * (1 - exp(-(step + 1) / ramp))

    The ramp lets the early average forget the random start.
    """

    def __init__(self, model: nn.Module, decay: float, ramp: int) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.ramp = ramp
        self._pairs: _TensorPairs | None = None

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, finite: Tensor | None = None) -> None:
        """Take in the weights after optimizer step `step` (the first is 0).

        Args:
            finite: bool on the device; false: the step was skipped, the average keeps its values.
        """
        decay = self.decay * (1 - math.exp(-(step + 1) / self.ramp)) if self.ramp else self.decay
        if self._pairs is None or not self._pairs.hold():
            self._pairs = _TensorPairs(self.model, model)
        own, new = self._pairs.floats
        if finite is None:
            torch._foreach_lerp_(own, new, 1 - decay)
        else:
            share = torch.where(finite, 1 - decay, 0.0)
            if share.device.type == "cpu":
                torch._foreach_lerp_(own, new, [share] * len(own))
            else:  # there a list of shares means one kernel per tensor
                difference = torch._foreach_sub(new, own)
                torch._foreach_mul_(difference, share)
                torch._foreach_add_(own, difference)
        if self._pairs.others[0]:  # counters of the normalisations, kept by a skipped step themselves
            torch._foreach_copy_(*self._pairs.others)


class _TensorPairs:
    """The tensors of two equal models side by side, found once: collecting them takes as long as their copy."""

    def __init__(self, average: nn.Module, model: nn.Module) -> None:
        self._places = [*_state_places(average), *_state_places(model)]  # in the same order
        tensors = [place[name] for place, name in self._places]
        self._tensors = tensors
        pairs = list(zip(tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :], strict=True))
        self.floats = _unzip([pair for pair in pairs if pair[0].is_floating_point()])
        self.others = _unzip([pair for pair in pairs if not pair[0].is_floating_point()])

    def hold(self) -> bool:
        """Whether they are still the models' own; statistics that are joined become other tensors."""
        return all(place[name] is tensor for (place, name), tensor in zip(self._places, self._tensors, strict=True))


def _state_places(model: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where the tensors of `state_dict()` stand."""
    return [
        (place, name)
        for module in model.modules()
        for place in (module._parameters, module._buffers)
        for name, tensor in place.items()
        if tensor is not None and name not in module._non_persistent_buffers_set
    ]


def _unzip(pairs: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return [first for first, _ in pairs], [second for _, second in pairs]


class Meter:
    """Mean losses and rates since the last reading; losses stay on the device until they are read."""

    def __init__(self, images_per_step: int) -> None:
        self.images_per_step = images_per_step
        self.total = Throughput()  # of all readings
        self.restart()

    def restart(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps: Tensor | int = 0  # that were not skipped
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out the time until now (an evaluation); the losses since the last reading still count."""
        self.timed_steps, self.waited, self.started = 0, 0.0, time.perf_counter()
        self.images = self.pixels = 0  # of this process

    def add(self, result: StepResult, batches: Sequence[Batch] = ()) -> None:
        """A step and its micro-batches."""
        self.timed_steps += 1
        for images in (batch["images"] for batch in batches):
            self.images += len(images)
            self.pixels += len(images) * images.shape[2] * images.shape[3]
        self.steps = self.steps + result.finite
        for name, value in result.losses.items():
            self.sums[name] = self.sums.get(name, 0) + torch.where(result.finite, value, 0)

    def read(self) -> dict[str, float]:
        """Tags and values for the log, then start anew."""
        steps = max(int(self.steps), 1)
        parts = {f"train/{name}": value.item() / steps for name, value in self.sums.items()}
        seconds = time.perf_counter() - self.started
        rates = {
            "train/images_per_second": self.timed_steps * self.images_per_step / seconds,
            "train/wait_fraction": self.waited / seconds,
        }
        self.total.images += self.images
        self.total.pixels += self.pixels
        self.total.seconds += seconds
        self.total.waited += self.waited
        self.restart()
        return {"train/loss": sum(parts.values()), **parts, **rates}

    def state(self) -> dict[str, Any]:
        """For a checkpoint: the row that a continued run writes next is of all steps since the last one."""
        return {"steps": torch.as_tensor(self.steps), "sums": dict(self.sums)}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        self.restart()
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.steps = state["steps"].to(device) if self.sums else 0
