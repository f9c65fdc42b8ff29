"""Activation checkpointing: the backbone's blocks are computed again in the backward pass instead of being kept."""

import contextlib
import functools
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from detection.errors import SettingsError


class RecomputedStage(nn.Sequential):
    """Keeps only the input of each of its blocks for the backward pass; same parameters, names and numbers."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return cast(Tensor, super().forward(x))
        for block in self:
            contexts = functools.partial(_contexts, block)
            x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        return x


def recompute_backbone(model: nn.Module) -> None:
    """Turn every stage of the backbone into the class above.

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
    """Around the first computation, and around the second."""
    return contextlib.nullcontext(), _keep_statistics(block)


@contextlib.contextmanager
def _keep_statistics(block: nn.Module) -> Iterator[None]:
    """The batch has been counted once: batch-norm layers use its mean and variance again, but note them no more."""
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # A share of 0 leaves the statistics as they are; without them autograd would miss tensors that it saved.
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, counter) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counter
