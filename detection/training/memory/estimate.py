"""Estimate the memory of training without running a full-size step."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from detection.config.settings import TrainSettings
from detection.models.backbones.activation_checkpointing import RecomputedStage
from detection.runtime.devices import available_memory

PROBE_SIDES = (128, 256)  # pixels; activations grow linearly with the area of the input
OPTIMIZER_TENSORS = {"adam": 2, "adamw": 2, "sgd": 1}  # state tensors per weight tensor
FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one training process needs on its device at the largest input size."""

    state: int  # weights, gradients, optimizer, EMA
    once: int  # saved for the backward pass, independent of the number of images
    per_image: float  # saved for the backward pass per image of a micro-batch
    batch_size: int
    available: int | None  # free on the device before training; None: unknown

    @property
    def activations(self) -> int:
        """Bytes saved for the backward pass of a micro-batch."""
        return self.once + round(self.per_image * self.batch_size)

    @property
    def total(self) -> int:
        """Bytes of everything."""
        return self.state + self.activations

    def line(self) -> str:
        """Format the line of the plan."""
        available = "" if self.available is None else f" of {self.available / 2**30:.1f} GiB available"
        return (
            f"memory      a step needs about {self.total / 2**30:.1f} GiB{available}, libraries not counted: "
            f"weights, gradients and optimizer {self.state / 2**30:.1f}, activations {self.activations / 2**30:.1f}"
        )


def estimate_memory(
    model: nn.Module,
    criterion: nn.Module,
    train: TrainSettings,
    batch_size: int,
    size: int,
    autocast: Callable[[], AbstractContextManager],
    device: torch.device,
) -> MemoryEstimate:
    """Measure the tensors that autograd saves for one image at two small sizes and extrapolate to batch and size.

    Does not include workspaces of convolutions, batches of the loader, or the process itself.

    Args:
        model: model on the device; neither its weights nor its statistics change.
        criterion: (outputs, targets) -> dict of losses.
        train: settings of optimizer and EMA.
        batch_size: images per micro-batch.
        size: side of the network input in pixels.
        autocast: returns the context of the forward pass.
        device: device of the model.
    """
    parameters = list(model.parameters())
    copies = 2 + OPTIMIZER_TENSORS[train.optimizer] + (train.ema_decay is not None) + bool(train.swa_cycles)
    state = FLOAT32 * copies * sum(parameter.numel() for parameter in parameters)
    coarsest = cast(tuple[int, ...], model.strides)[-1]
    sides = [coarsest * math.ceil(side / coarsest) for side in PROBE_SIDES]
    was_training = [(module, module.training) for module in model.modules()]
    model.eval()  # keeps the batch-norm statistics; autograd saves the same tensors as in training mode
    try:
        small, large = (_kept_bytes(model, criterion, side, autocast, device) for side in sides)
    finally:
        for module, training in was_training:
            module.training = training
    # What does not grow with the area, such as weights cast to bfloat16, does not grow with the batch either.
    per_pixel = (large - small) / (sides[1] ** 2 - sides[0] ** 2)
    once = max(round(large - per_pixel * sides[1] ** 2), 0)
    return MemoryEstimate(state, once, per_pixel * size**2, batch_size, available_memory(device))


def _kept_bytes(
    model: nn.Module,
    criterion: nn.Module,
    side: int,
    autocast: Callable[[], AbstractContextManager],
    device: torch.device,
) -> int:
    """Count the bytes that autograd saves for one image, without the weights."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device)
    targets = {
        "boxes": torch.zeros(1, 1, 4, device=device),
        "labels": torch.full((1, 1), -1, dtype=torch.int64, device=device),
    }
    # The inputs that activation checkpointing keeps are not reported to saved_tensors_hooks.
    recomputed = [block for stage in model.modules() if isinstance(stage, RecomputedStage) for block in stage]
    hooks = [block.register_forward_pre_hook(lambda _, inputs: (count(inputs[0]), None)[1]) for block in recomputed]
    try:
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), autocast():
            losses = criterion(model(images), targets)
    finally:
        for hook in hooks:
            hook.remove()
    del losses  # kept the graph alive until here, so that no storage address was reused
    return sum(kept.values())
