"""Optimizer, parameter groups, and freezing of the backbone."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from detection.config.settings import TrainSettings
from detection.errors import SettingsError
from detection.training.schedules import BIAS_GROUP

FACTOR = "learning_rate_factor"  # key of an optimizer group


def build_optimizer(model: nn.Module, train: TrainSettings) -> torch.optim.Optimizer:
    """Build Adam, AdamW or SGD with three named parameter groups; weight decay applies to "weights" only.

    Groups: "weights" (kernels), "norms" (batch-norm scales and other one-dimensional weights), "biases", as YOLOX and
    RTMDet have them. Each learning-rate factor of the backbone has three more groups of the same names.

    Raises:
        SettingsError: see `backbone_factors`.
    """
    factors = backbone_factors(model, train)
    groups: dict[tuple[float | None, str], list[nn.Parameter]] = {
        (factor, kind): []
        for factor in (None, *sorted(set(factors.values()), reverse=True))
        for kind in ("weights", "norms", BIAS_GROUP)
    }
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind = BIAS_GROUP if name == "bias" else "norms" if parameter.ndim == 1 else "weights"
            groups[factors.get(id(parameter)), kind].append(parameter)
    arguments = []
    for (factor, kind), parameters in groups.items():
        decay = train.weight_decay if kind == "weights" else 0.0
        group: dict[str, Any] = {"params": parameters, "name": kind, "weight_decay": decay}
        if factor is not None:  # only then, so that checkpoints without such a group do not change
            group[FACTOR] = factor
        arguments.append(group)
    fused = next(model.parameters()).device.type in ("cpu", "cuda")  # one kernel for all weights where there is one
    if train.optimizer == "sgd":
        sgd = torch.optim.SGD(
            arguments, lr=train.learning_rate, momentum=train.momentum, nesterov=train.nesterov, fused=fused
        )
        if train.momentum:
            # Created now: the fused kernel fails if only some parameters have a buffer when the backbone unfreezes.
            for parameter in model.parameters():
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[train.optimizer]
    return optimizer(arguments, lr=train.learning_rate, fused=fused)


def backbone_factors(model: nn.Module, train: TrainSettings) -> dict[int, float]:
    """Map the ids of the backbone's parameters to their share of the learning rate; empty: all alike.

    Layer-wise decay: the last stage has `train.backbone_learning_rate_factor`, each stage nearer to the input once more
    the factor `train.backbone_layer_decay`; what comes before the stages counts as one.

    Source: ELECTRA, appendix A, https://arxiv.org/abs/2003.10555; per stage instead of per layer

    Raises:
        SettingsError: layer-wise decay, and the backbone has no stages.
    """
    factor, decay = train.backbone_learning_rate_factor, train.backbone_layer_decay
    if (factor, decay) == (1, 1):
        return {}
    backbone = cast(nn.Module, model.backbone)
    stages = getattr(backbone, "stages", None) if decay != 1 else nn.ModuleList()
    if not isinstance(stages, nn.ModuleList):
        raise SettingsError(
            "train.backbone_layer_decay needs a backbone with stages: darknet, darknet_tiny or mobilenet_v3_*"
        )
    factors = {id(parameter): factor * decay ** len(stages) for parameter in backbone.parameters()}
    for distance, stage in enumerate(reversed(stages)):
        factors |= {id(parameter): factor * decay**distance for parameter in stage.parameters()}
    return factors


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
