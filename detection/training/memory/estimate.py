"""How much memory training will take, before it is tried."""

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

PROBE_SIDES = (128, 256)  # pixels; what the backward pass keeps grows linearly with the area of the input
OPTIMIZER_TENSORS = {"adam": 2, "adamw": 2, "sgd": 1}  # of the size of the weights
FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one training process needs on its device at the largest input size."""

    state: int  # weights, gradients, optimizer, EMA
    once: int  # kept for the backward pass, whatever the number of images
    per_image: float  # kept for each image of a micro-batch
    batch_size: int
    available: int | None  # on the device, before anything of it is there; None: unknown

    @property
    def activations(self) -> int:
        return self.once + round(self.per_image * self.batch_size)

    @property
    def total(self) -> int:
        return self.state + self.activations

    def line(self) -> str:
        available = "" if self.available is None else f" of {self.available / 2**30:.1f} GiB available"
        return (
            f"memory      about {self.total / 2**30:.1f} GiB{available}: weights, gradients and optimizer "
            f"{self.state / 2**30:.1f}, activations {self.activations / 2**30:.1f}"
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
    """Count what autograd keeps for one image of two small sizes and scale it to the batch and size.

    Workspaces of the convolutions, the loader's batches and the process itself come on top.

    Args:
        model: on the device; neither its weights nor its statistics change.
        batch_size: images of a micro-batch.
        size: side of the network input in pixels.
    """
    parameters = list(model.parameters())
    copies = 2 + OPTIMIZER_TENSORS[train.optimizer] + (train.ema_decay is not None)
    state = FLOAT32 * copies * sum(parameter.numel() for parameter in parameters)
    coarsest = cast(tuple[int, ...], model.strides)[-1]
    sides = [coarsest * math.ceil(side / coarsest) for side in PROBE_SIDES]
    was_training = [(module, module.training) for module in model.modules()]
    model.eval()  # batch-norm layers keep their statistics; the same tensors are kept for the backward pass
    try:
        small, large = (_kept_bytes(model, criterion, side, autocast, device) for side in sides)
    finally:
        for module, training in was_training:
            module.training = training
    # What does not grow with the area (weights cast to bfloat16) is there once.
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
    """Bytes that autograd keeps for one image, without the weights themselves."""
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
    # What is kept to compute a block again is no tensor that autograd saves.
    recomputed = [block for stage in model.modules() if isinstance(stage, RecomputedStage) for block in stage]
    hooks = [block.register_forward_pre_hook(lambda _, inputs: (count(inputs[0]), None)[1]) for block in recomputed]
    try:
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), autocast():
            losses = criterion(model(images), targets)
    finally:
        for hook in hooks:
            hook.remove()
    del losses  # held the graph, and with it what was counted
    return sum(kept.values())
