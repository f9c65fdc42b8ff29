"""One optimizer step and what belongs to it; knows no dataset, no logger, no schedule."""

import copy
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn

from detection.data.loaders import Batch, targets_to
from detection.errors import NumericsError
from detection.schedules import BIAS_GROUP
from detection.settings import TrainSettings

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
    if train.optimizer == "sgd":
        # Not fused: that kernel fails when an encoder without momentum yet is unfrozen beside a neck that has it.
        return torch.optim.SGD(arguments, lr=train.learning_rate, momentum=train.momentum)
    fused = next(model.parameters()).device.type in ("cpu", "cuda")  # one kernel for all weights where there is one
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
    mark_step: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Accumulate the gradients of all micro-batches, then move the weights once.

    Each micro-batch's loss is divided by their number, so the sum is the gradient of one large batch.

    Args:
        batches: the micro-batches of this step.
        clip_norm: largest L2 norm of the whole gradient; None: not clipped.
        mark_step: `devices.mark_step_of`, called after each backward pass and after the optimizer.

    Returns:
        Loss parts averaged over the micro-batches, detached, on the device: reading them is the caller's choice.

    Raises:
        NonFiniteLoss: a loss part or the gradient is not finite; names it and the images. The weights are unchanged.
    """
    optimizer.zero_grad(set_to_none=True)
    totals: dict[str, Tensor] = {}
    seen: list[int] = []
    for batch in batches:
        images, targets = targets_to(batch, device)
        with autocast():
            outputs = model(images)
            losses = criterion(outputs, targets)
        loss = sum(losses.values()) / len(batches)
        scaler.scale(loss).backward()
        mark_step()
        for name, value in losses.items():
            totals[name] = totals.get(name, 0) + value.detach() / len(batches)
        seen.extend(batch["indices"].tolist())
    values = torch.stack(list(totals.values()))
    if not bool(values.isfinite().all()):
        parts = ", ".join(
            f"{name} = {value:g}"
            for name, value in zip(totals, values.tolist(), strict=True)
            if not math.isfinite(value)
        )
        raise NonFiniteLoss(parts, seen)
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf if clip_norm is None else clip_norm)
    # Under fp16 an infinite gradient is ordinary: the scaler leaves the step out and lowers its scale.
    if not scaler.is_enabled() and not bool(norm.isfinite()):
        raise NonFiniteLoss(f"norm of the gradient = {norm.item():g}", seen)
    scaler.step(optimizer)
    scaler.update()
    mark_step()
    return totals


class NonFiniteLoss(NumericsError):
    """The caller knows the step and the image ids and names them."""

    def __init__(self, parts: str, image_indices: list[int]) -> None:
        super().__init__(parts)
        self.parts = parts
        self.image_indices = image_indices


class ExponentialAverage:
    """Moving average of the weights and of the normalisations' statistics, for evaluation and for `best.pt`.

    average += (1 - d) * (value - average) with d = decay * (1 - exp(-(step + 1) / ramp))

    The ramp lets the early average forget the random start.
    """

    def __init__(self, model: nn.Module, decay: float, ramp: int) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.ramp = ramp

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after optimizer step `step` (the first is 0)."""
        decay = self.decay * (1 - math.exp(-(step + 1) / self.ramp)) if self.ramp else self.decay
        averages, values = self.model.state_dict(), model.state_dict()
        floating = [name for name, value in values.items() if value.is_floating_point()]
        torch._foreach_lerp_([averages[name] for name in floating], [values[name] for name in floating], 1 - decay)
        for name in values.keys() - set(floating):  # counters of the normalisations
            averages[name].copy_(values[name])


class Meter:
    """Mean losses and rates since the last reading; losses stay on the device until they are read."""

    def __init__(self, images_per_step: int) -> None:
        self.images_per_step = images_per_step
        self.restart()

    def restart(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out the time until now (an evaluation); the losses since the last reading still count."""
        self.timed_steps, self.waited, self.started = 0, 0.0, time.perf_counter()

    def add(self, losses: dict[str, Tensor]) -> None:
        self.steps += 1
        self.timed_steps += 1
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value

    def read(self) -> dict[str, float]:
        """Tags and values for the log, then start anew."""
        parts = {f"train/{name}": value.item() / self.steps for name, value in self.sums.items()}
        seconds = time.perf_counter() - self.started
        rates = {
            "train/images_per_second": self.timed_steps * self.images_per_step / seconds,
            "train/wait_fraction": self.waited / seconds,
        }
        self.restart()
        return {"train/loss": sum(parts.values()), **parts, **rates}
