"""Optimizer, parameter groups, and freezing of the backbone."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from detection.config.settings import TrainSettings
from detection.training.schedules import BIAS_GROUP

FACTOR = "learning_rate_factor"  # key of an optimizer group


def build_optimizer(model: nn.Module, train: TrainSettings) -> torch.optim.Optimizer:
    """Build Adam, AdamW or SGD with three named parameter groups; weight decay applies to "weights" only.

    Groups: "weights" (kernels), "norms" (batch-norm scales and other one-dimensional weights), "biases". A backbone
    with its own learning-rate factor has three more groups of the same names.
    """
    factor = train.backbone_learning_rate_factor
    backbone = [] if factor == 1 else cast(nn.Module, model.backbone).parameters()
    of_backbone = {id(parameter) for parameter in backbone}
    parts = (False, True) if of_backbone else (False,)
    groups: dict[tuple[bool, str], list[nn.Parameter]] = {
        (part, kind): [] for part in parts for kind in ("weights", "norms", BIAS_GROUP)
    }
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind = BIAS_GROUP if name == "bias" else "norms" if parameter.ndim == 1 else "weights"
            groups[id(parameter) in of_backbone, kind].append(parameter)
    arguments = []
    for (part, kind), parameters in groups.items():
        decay = train.weight_decay if kind == "weights" else 0.0
        group: dict[str, Any] = {"params": parameters, "name": kind, "weight_decay": decay}
        if part:  # only then, so that checkpoints without such a group do not change
            group[FACTOR] = factor
        arguments.append(group)
    fused = next(model.parameters()).device.type in ("cpu", "cuda")  # one kernel for all weights where there is one
    if train.optimizer == "sgd":
        sgd = torch.optim.SGD(arguments, lr=train.learning_rate, momentum=train.momentum, fused=fused)
        if train.momentum:
            # Created now: the fused kernel fails if only some parameters have a buffer when the backbone unfreezes.
            for parameter in model.parameters():
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[train.optimizer]
    return optimizer(arguments, lr=train.learning_rate, fused=fused)


def set_learning_rates(optimizer: torch.optim.Optimizer, rate_at: Callable[[int, str], float], step: int) -> None:
    """Set the learning rate of each group to the schedule's rate times the group's factor.

    Args:
        rate_at: returns the learning rate of a step and group, see `Schedule.at`.
        step: number of the next optimizer step, from 0.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate_at(step, group["name"]) * group.get(FACTOR, 1.0)


def set_backbone_frozen(model: nn.Module, frozen: bool, batch_norm: str = "train") -> None:
    """Freeze or unfreeze the backbone of a model in training mode.

    Args:
        model: model with a `backbone`.
        frozen: the weights get no gradient and the batch-norm layers keep their running statistics.
        batch_norm: "frozen": the batch-norm layers use and keep their running statistics even while the weights train.
    """
    backbone = cast(nn.Module, model.backbone)
    for parameter in backbone.parameters():
        parameter.requires_grad_(not frozen)
        if frozen:
            parameter.grad = None
    backbone.train(not frozen)
    if batch_norm == "frozen":
        for module in backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
