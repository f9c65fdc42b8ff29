"""One optimizer step and what belongs to it; knows no dataset, no logger, no schedule."""

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detection.contract import Batch
from detection.data.loaders import targets_to
from detection.training.skipped_steps import BatchNormStatistics, StepResult, step_if


def train_step(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batches: Sequence[Batch],
    autocast: Callable[[], AbstractContextManager],
    device: torch.device,
    clip_norm: float | None,
    statistics: BatchNormStatistics | None = None,
    discard: bool = False,
    mark_step: Callable[[], None] = lambda: None,
) -> StepResult:
    """Accumulate the gradients of all micro-batches, then move the weights once, or not at all.

    Each micro-batch's loss is divided by their number, so the sum is the gradient of one large batch. Where the loss or
    the gradient is non-finite, weights, optimizer state and statistics keep their values; that is decided on the
    device, the host waits for nothing. All processes of a run decide alike: the gradient they see is the same.

    Args:
        model: may be wrapped in DistributedDataParallel; gradients are then exchanged with the last micro-batch only.
        batches: the micro-batches of this step.
        clip_norm: largest L2 norm of the whole gradient; None: not clipped.
        statistics: of the model's batch-norm layers, to be kept in a skipped step; None: they move whatever happens.
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
