"""Averages of the weights: exponential moving average (EMA), and the mean over cycles (SWA)."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """EMA of the weights and batch-norm statistics of a model, for evaluation and for `best.pt`.

    ema += (1 - d) * (value - ema) with d = decay * (1 - exp(-(step + 1) / ramp))

    The ramp lets the early EMA forget the random initial weights. Without a ramp, d = min(decay, (1 + step) / (10 +
    step)) forgets them in a few steps, as short runs need; source: TensorFlow's `ExponentialMovingAverage`.

    Args:
        model: model to copy; the copy is `self.model`.
        decay: decay after the ramp.
        ramp: time constant of the ramp in optimizer steps; 0: the decay is constant; None: see above.
    """

    def __init__(self, model: nn.Module, decay: float, ramp: int | None) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.ramp = ramp
        self._pairs: _TensorPairs | None = None

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, finite: Tensor | None = None) -> None:
        """Update with the weights after optimizer step `step` (the first is 0).

        Args:
            model: current model.
            step: number of the step.
            finite: bool tensor on the device; false: the step was skipped, the EMA does not change.
        """
        if self.ramp is None:
            decay = min(self.decay, (1 + step) / (10 + step))
        else:
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
            else:  # a list of weights would take one kernel per tensor
                difference = torch._foreach_sub(new, own)
                torch._foreach_mul_(difference, share)
                torch._foreach_add_(own, difference)
        if self._pairs.others[0]:  # counters of the batch-norm layers; a skipped step leaves them alone
            torch._foreach_copy_(*self._pairs.others)


class MeanOfCycles:
    """Mean of the weights at the ends of learning-rate cycles (SWA), batch-norm statistics included.

    The statistics are averaged like the weights, as in the reference, not computed anew.

    Args:
        model: model to copy; the copy, `self.model`, is the mean of `self.count` cycles.
        start: number of the first step of the first cycle.
        cycle: optimizer steps of a cycle.

    Source: SWA Object Detection, https://arxiv.org/abs/2012.12645
    """

    def __init__(self, model: nn.Module, start: int, cycle: int) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.start, self.cycle, self.count = start, cycle, 0

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after optimizer step `step` (the first is 0), if a cycle ends with it."""
        done = step + 1 - self.start
        if done <= 0 or done % self.cycle:
            return
        self.count += 1
        pairs = _TensorPairs(self.model, model)
        torch._foreach_lerp_(*pairs.floats, 1 / self.count)
        if pairs.others[0]:
            torch._foreach_copy_(*pairs.others)


class _TensorPairs:
    """Corresponding tensors of two equal models, cached because collecting them takes as long as copying them."""

    def __init__(self, ema: nn.Module, model: nn.Module) -> None:
        self._places = [*_state_places(ema), *_state_places(model)]  # in the same order
        tensors = [place[name] for place, name in self._places]
        self._tensors = tensors
        pairs = list(zip(tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :], strict=True))
        self.floats = _unzip([pair for pair in pairs if pair[0].is_floating_point()])
        self.others = _unzip([pair for pair in pairs if not pair[0].is_floating_point()])

    def hold(self) -> bool:
        """Return whether the models still hold these tensors; `BatchNormStatistics` replaces some."""
        return all(place[name] is tensor for (place, name), tensor in zip(self._places, self._tensors, strict=True))


def _state_places(model: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """List the (dict, name) entries that hold the tensors of `state_dict()`."""
    return [
        (place, name)
        for module in model.modules()
        for place in (module._parameters, module._buffers)
        for name, tensor in place.items()
        if tensor is not None and name not in module._non_persistent_buffers_set
    ]


def _unzip(pairs: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return [first for first, _ in pairs], [second for _, second in pairs]
