"""One optimizer step: forward, criterion, backward, gradient clipping, update."""

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detection.contract import Batch
from detection.data.loaders import batch_to_device
from detection.training.skipped_steps import BatchNormStatistics, StepResult, step_if


def train_step(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    micro_batches: Sequence[Batch],
    autocast: Callable[[], AbstractContextManager],
    device: torch.device,
    clip_norm: float | None,
    statistics: BatchNormStatistics | None = None,
    discard: bool = False,
    mark_step: Callable[[], None] = lambda: None,
    clip_tensor_norm: float | None = None,
) -> StepResult:
    """Accumulate the gradients of all micro-batches, then update the weights once, or not at all.

    The loss of each micro-batch is divided by their number, so that the gradients add up to the mean. If the loss or
    the gradient is non-finite, the step is skipped: weights, optimizer state and batch-norm statistics keep their
    values. This is decided on the device, without waiting for it, and alike in all processes of a run, because they
    have the same gradient.

    Args:
        model: may be wrapped in DistributedDataParallel; gradients are then reduced with the last micro-batch only.
        criterion: (outputs, targets) -> dict of losses.
        optimizer: optimizer of the model.
        scaler: gradient scaler, disabled unless in fp16.
        micro_batches: micro-batches of this step; images are uint8 RGB.
        autocast: returns the context of the forward pass.
        device: device of the model.
        clip_norm: maximum L2 norm of the whole gradient; None: no clipping.
        statistics: batch-norm statistics, restored if the step is skipped; None: they always change.
        discard: compute everything but skip the update.
        mark_step: called after each backward pass and after the update, see `devices.mark_step_of`.
        clip_tensor_norm: maximum L2 norm of the gradient of each tensor, before `clip_norm`; None: no such limit.

    Returns:
        The losses, averaged over the micro-batches, and whether the step was taken; both on the device.
    """
    optimizer.zero_grad(set_to_none=True)
    if statistics is not None:
        statistics.keep()
    totals: dict[str, Tensor] = {}
    for number, batch in enumerate(micro_batches, start=1):
        images, targets = batch_to_device(batch, device)
        accumulates = isinstance(model, DistributedDataParallel) and number < len(micro_batches)
        with cast(DistributedDataParallel, model).no_sync() if accumulates else contextlib.nullcontext():
            with autocast():
                outputs = model(images)
                losses = criterion(outputs, targets)
            loss = sum(losses.values()) / len(micro_batches)
            # 1 if the loss is finite, else NaN: a non-finite loss may have a finite gradient.
            poison = loss.detach() * 0 + 1
            scaler.scale(loss * poison).backward()
        mark_step()
        for name, value in losses.items():
            totals[name] = totals.get(name, 0) + value.detach() / len(micro_batches)
    scaler.unscale_(optimizer)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if clip_tensor_norm is not None:
        clip_each(gradients, clip_tensor_norm)
    norm = nn.utils.get_total_norm(gradients)
    if clip_norm is not None:
        nn.utils.clip_grads_with_norm_(model.parameters(), clip_norm, norm)
    finite = norm.isfinite() & (not discard)
    step_if(optimizer, finite)
    scaler.update()
    if statistics is not None:
        statistics.settle(finite)
    mark_step()
    return StepResult(totals, finite)


def clip_each(gradients: list[Tensor], max_norm: float) -> None:
    """Scale each tensor down, in place, to at most this L2 norm; a non-finite one becomes NaN."""
    factors = torch._foreach_norm(gradients)
    torch._foreach_reciprocal_(factors)
    torch._foreach_mul_(factors, max_norm)
    torch._foreach_clamp_max_(factors, 1.0)
    torch._foreach_mul_(gradients, factors)


def tell_progress(criterion: nn.Module, share_done: float, finishing: bool) -> None:
    """Call `criterion.set_progress(share_done, finishing)`, an optional method, before a step.

    Args:
        share_done: steps done of those of the run, 0 to below 1.
        finishing: the run has reached its last part, `train.clean_finish`.
    """
    set_progress = getattr(criterion, "set_progress", None)
    if callable(set_progress):
        set_progress(share_done, finishing)
