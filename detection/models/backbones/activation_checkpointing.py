"""Activation checkpointing: recompute the backbone's activations in the backward pass instead of keeping them."""

import contextlib
import functools
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from detection.errors import SettingsError


class RecomputedStage(nn.Sequential):
    """A stage that keeps only the inputs of its blocks for the backward pass; same parameters, names and results."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return cast(Tensor, super().forward(x))
        for block in self:
            contexts = functools.partial(_contexts, block)
            x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        return x


def recompute_backbone(model: nn.Module) -> None:
    """Turn the stages of the backbone into `RecomputedStage`s in place.

    Raises:
        SettingsError: the backbone has no stages.
    """
    stages = getattr(model.backbone, "stages", None)
    if not isinstance(stages, nn.ModuleList) or any(type(stage) is not nn.Sequential for stage in stages):
        raise SettingsError(
            "train.activation_checkpointing needs a backbone with stages: darknet, darknet_tiny or mobilenet_v3_*"
        )
    for stage in stages:
        stage.__class__ = RecomputedStage


def _contexts(block: nn.Module) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """Contexts of the forward pass and of the recomputation."""
    return contextlib.nullcontext(), _keep_statistics(block)


@contextlib.contextmanager
def _keep_statistics(block: nn.Module) -> Iterator[None]:
    """Keep batch-norm layers from updating their running statistics a second time with the same batch."""
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # Momentum 0 keeps the statistics; disabling them would change the tensors that autograd saves.
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, counter) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counter
