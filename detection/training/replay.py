"""Steps that were non-finite: what is kept of them, and where in one of them numbers stop being finite."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from detection.checkpoints import RUN_FIELDS, load_fields, save_checkpoint
from detection.contract import Batch
from detection.data.loaders import collate_samples, targets_to
from detection.errors import CheckpointError, OutputError
from detection.runtime.reproducibility import seed_step
from detection.training.optimizer import set_backbone_frozen
from detection.training.run import Run

STATE, REPORT = "state.pt", "report.json"
MAX_NAMES = 5  # of modules and parameters


def write_bundle(
    directory: Path,
    checkpoint: dict[str, Any],
    seed: int,
    losses: Mapping[int, Mapping[str, float]],
    image_ids: Mapping[int, Sequence[int]],
) -> None:
    """Keep what is needed to take skipped steps again: they changed nothing, so the weights are those before the first.

    Args:
        directory: made here.
        checkpoint: of now.
        losses: parts of the loss of each step.
        image_ids: images of each step.

    Raises:
        OutputError: it cannot be written.
    """
    steps = [
        {
            "step": step,
            "losses": {name: str(value) for name, value in parts.items()},
            "image_ids": list(image_ids[step]),
        }
        for step, parts in losses.items()
    ]
    try:
        directory.mkdir(exist_ok=True)
        report = {"seed": seed, "settings": checkpoint["settings"], "steps": steps}
        (directory / REPORT).write_text(json.dumps(report, indent=2), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{directory} cannot be written: {error.strerror or error}") from None
    save_checkpoint(directory / STATE, checkpoint)


def read_bundle(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(checkpoint, report) of `write_bundle`.

    Raises:
        CheckpointError: it is not there or damaged.
    """
    checkpoint = load_fields(directory / STATE, RUN_FIELDS)
    try:
        report = json.loads((directory / REPORT).read_text(encoding="utf-8"))
        int(report["steps"][0]["step"])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(f"{directory / REPORT} cannot be read: {error}") from None
    return checkpoint, report


def retake_step(run: Run, checkpoint: dict[str, Any], step: int) -> Iterator[list[str]]:
    """`diagnose_batch` of each micro-batch of a skipped step, as it was: the same images, weights and streams.

    One process after the other, where the run had several.
    """
    settings, state = run.settings, run.new_state()
    state.load(checkpoint)
    set_backbone_frozen(state.model, step < run.unfreeze_step, settings.train.backbone_batch_norm)
    ids = run.training_set.annotations.image_ids
    for rank in range(run.processes):
        seed_step(settings.run.seed, step, rank)
        for positions in run.sampler(step, step + 1, rank):
            batch = collate_samples([run.training_set[position] for position in positions])
            yield diagnose_batch(state.model, run.criterion, batch, run.autocast, run.device, ids)


def diagnose_batch(
    model: nn.Module,
    criterion: Callable[[list[Tensor], dict[str, Tensor]], dict[str, Tensor]],
    batch: Batch,
    autocast: Callable[[], AbstractContextManager],
    device: torch.device,
    image_ids: np.ndarray,
) -> list[str]:
    """Where the numbers of one micro-batch stop being finite, forward and backward; no line where all are.

    Args:
        model: in training mode; its weights do not change, its statistics do.
        image_ids: of the whole dataset, (M,).
    """
    lines: list[str] = []
    # Before anything else: the forward pass moves the statistics, and they may be what it breaks.
    if bad := [name for name, value in model.state_dict().items() if not value.isfinite().all()]:
        lines.append(f"weights that are non-finite: {_shorten(bad)}")
    first: list[str] = []
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: _note(first, name, output))
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    images, targets = targets_to(batch, device)
    model.zero_grad(set_to_none=True)
    try:
        with autocast():
            outputs = model(images)
            losses = criterion(outputs, targets)
    finally:
        for handle in handles:
            handle.remove()
    if first:
        lines.append(f"first output that is non-finite: of {first[0]}")
    if bad := [f"{name} = {value.item():g}" for name, value in losses.items() if not value.isfinite()]:
        lines.append(f"loss: {', '.join(bad)}")
        for row, index in enumerate(batch["indices"].tolist()):
            own = [level[row : row + 1] for level in outputs]
            alone = criterion(own, {name: value[row : row + 1] for name, value in targets.items()})
            if bad := [f"{name} = {value.item():g}" for name, value in alone.items() if not value.isfinite()]:
                lines.append(f"loss of image id {image_ids[index]} alone: {', '.join(bad)}")
    torch.stack(list(losses.values())).sum().backward()
    if bad := [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]:
        lines.append(f"gradients that are non-finite: {_shorten(bad)}")
    model.zero_grad(set_to_none=True)
    return lines


def _note(first: list[str], name: str, output: Any) -> None:
    tensors = output if isinstance(output, list | tuple) else [output]
    if not first and any(isinstance(tensor, Tensor) and not tensor.isfinite().all() for tensor in tensors):
        first.append(name)


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:MAX_NAMES]) + (f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else "")
