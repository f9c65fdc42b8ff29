"""Skip non-finite steps as a whole: weights, optimizer state and batch-norm statistics keep their values.

The decision is made on the device; the host reads it a few steps later.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from detection.errors import NumericsError


class StepResult(NamedTuple):
    """Result of a step, on the device; reading it waits for the device."""

    losses: dict[str, Tensor]  # averaged over the micro-batches, detached
    finite: Tensor  # bool; false: the step was skipped


@torch.no_grad()
def step_if(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Call `optimizer.step()`, and undo it unless `finite`, a bool tensor on the device, is true."""
    if all(group.get("fused") for group in optimizer.param_groups):  # these kernels read the flag themselves
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
        return
    tensors = [
        tensor
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
        for tensor in (parameter, *optimizer.state[parameter].values())
        if isinstance(tensor, Tensor)
    ]
    before = [tensor.clone() for tensor in tensors]
    optimizer.step()
    for tensor, old in zip(tensors, before, strict=True):
        tensor.copy_(torch.where(finite.to(tensor.device), tensor, old))


class BatchNormStatistics:
    """Running means and variances of all batch-norm layers of a model in one tensor.

    They can thus be saved and restored by one operation. Build it when the model is on its device; the buffers of the
    modules become views of the tensor.

    Args:
        model: model on its device.
        exchange: averages a tensor over the processes of a run in place, because each process sees different images;
            None: one process.
    """

    def __init__(self, model: nn.Module, exchange: Callable[[Tensor], None] | None = None) -> None:
        self.exchange = exchange
        places = [
            (module, name, buffer)
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            for name, buffer in module.named_buffers(recurse=False)
        ]
        self.floats = self._join([place for place in places if place[2].is_floating_point()])
        self.counters = self._join([place for place in places if not place[2].is_floating_point()])
        self._kept = [tensor.clone() for tensor in (self.floats, self.counters)]

    @staticmethod
    def _join(places: list[tuple[nn.Module, str, Tensor]]) -> Tensor:
        if not places:
            return torch.zeros(0)
        joined = torch.cat([buffer.reshape(-1) for _, _, buffer in places])
        start = 0
        for module, name, buffer in places:
            module._buffers[name] = joined[start : start + buffer.numel()].view(buffer.shape)
            start += buffer.numel()
        return joined

    def keep(self) -> None:
        """Save the statistics before a step."""
        self._kept[0].copy_(self.floats)
        self._kept[1].copy_(self.counters)

    def settle(self, finite: Tensor) -> None:
        """Average the statistics over the processes after a step; restore the saved ones unless `finite` is true."""
        if self.exchange is not None:
            # The change is averaged, not the value, so that frozen statistics stay bit-identical.
            change = self.floats - self._kept[0]
            self.exchange(change)
            torch.add(self._kept[0], change, out=self.floats)
        for tensor, kept in zip((self.floats, self.counters), self._kept, strict=True):
            torch.where(finite, tensor, kept, out=tensor)


class SkippedSteps:
    """Counter of skipped steps that keeps results on the device until `read`.

    Args:
        max_in_a_row: number of consecutive non-finite steps that ends the run.
        ordinary: do not count non-finite gradients of finite losses, for fp16, where the scaler then lowers its scale.
    """

    def __init__(self, max_in_a_row: int, ordinary: bool = False) -> None:
        self.max_in_a_row, self.ordinary = max_in_a_row, ordinary
        self.total = 0  # skipped steps read so far; the schedule does not advance for them
        self.in_a_row: list[int] = []  # the latest consecutive skipped steps that count
        self._pending: list[tuple[int, Tensor]] = []  # unread: (step, (finite, losses ...) as float32)
        self.parts: list[str] = []
        self.last: dict[int, dict[str, float]] = {}  # losses of the steps in a row

    def add(self, step: int, result: StepResult) -> None:
        """Add the result of a step, numbered from 0, without reading it."""
        self.parts = list(result.losses)
        values = torch.stack([result.finite.float(), *(value.float() for value in result.losses.values())])
        self._pending.append((step, values))

    def read(self, average: Callable[[Tensor], Tensor] = lambda values: values) -> list[int]:
        """Return the steps skipped since the last call; waits for the device.

        Args:
            average: averages a CPU tensor over all processes, so that all decide alike.

        Raises:
            NonFiniteLoss: too many consecutive steps were skipped.
        """
        if not self._pending:
            return []
        skipped = []
        rows = average(torch.stack([values for _, values in self._pending]).cpu()).tolist()
        for (step, _), (finite, *losses) in zip(self._pending, rows, strict=True):
            if not finite:
                skipped.append(step)
            if finite or (self.ordinary and all(math.isfinite(value) for value in losses)):
                self.in_a_row, self.last = [], {}
                continue
            self.in_a_row.append(step)
            self.last[step] = dict(zip(self.parts, losses, strict=True))
        self._pending = []
        self.total += len(skipped)
        if len(self.in_a_row) >= self.max_in_a_row:
            raise NonFiniteLoss(self.last)
        return skipped

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, with the results not read yet."""
        return {
            "total": self.total,
            "in_a_row": list(self.in_a_row),
            "last": [[step, *parts.values()] for step, parts in self.last.items()],
            "parts": list(self.parts),
            "pending": [(step, values) for step, values in self._pending],
        }

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore what `state` returned."""
        self.total, self.in_a_row, self.parts = state["total"], list(state["in_a_row"]), list(state["parts"])
        self.last = {step: dict(zip(self.parts, values, strict=True)) for step, *values in state["last"]}
        self._pending = [(step, values.to(device)) for step, values in state["pending"]]


class NonFiniteLoss(NumericsError):
    """Too many consecutive steps were non-finite.

    Args:
        losses: losses by step and name.
    """

    def __init__(self, losses: dict[int, dict[str, float]]) -> None:
        first, parts = next(iter(losses.items()))
        text = ", ".join(f"{name} = {value:g}" for name, value in parts.items())
        super().__init__(f"{len(losses)} steps in a row were non-finite, the first is step {first}: {text}")
        self.losses = losses
