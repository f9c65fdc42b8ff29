"""Replay of non-finite steps: save what is needed to repeat them, and find where values become non-finite."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from detection.checkpoints import save_checkpoint
from detection.config.command_line import DEFAULTS
from detection.config.loading import Flag, load_settings
from detection.contract import Batch
from detection.data.loaders import batch_to_device, collate_samples
from detection.drawing.files import replace_file
from detection.errors import CheckpointError, NumericsError, OutputError, say
from detection.models.stored import load_run, stored_settings
from detection.runtime.reproducibility import seed_step
from detection.training.optimizer import set_backbone_frozen
from detection.training.resume import check_continued
from detection.training.run import Run, join_ranks

STATE, REPORT = "state.pt", "report.json"
MAX_NAMES = 5  # of weights and gradients in a line


def replay(directory: Path, words: Sequence[str], flags: Sequence[Flag]) -> None:
    """Repeat the first step of a bundle and print where values become non-finite (`--replay`).

    Args:
        directory: directory of the bundle, see `write_bundle`.
        words: settings to change, as `key.path=value`.
        flags: settings to change, from command-line flags.

    Raises:
        NumericsError: the step is non-finite again.
    """
    checkpoint, report = read_bundle(directory)
    moved: list[str] = []
    settings, notices = load_settings(stored_settings(checkpoint, directory / STATE, DEFAULTS, moved), [], words, flags)
    processes = checkpoint["conditions"]["processes"]
    run = Run(settings, join_ranks(settings), fresh=False, processes=processes)
    notices = [*moved, *notices, *check_continued(run, checkpoint, directory, accept=True)]
    say(*notices)
    step, finite = report["steps"][0]["step"], True
    for lines in retake_step(run, checkpoint, step):
        finite &= not lines
        say(*(lines or ["finite: loss, outputs and gradient"]))
    if not finite:
        raise NumericsError(f"step {step} is non-finite here either")


def write_bundle(
    directory: Path,
    checkpoint: dict[str, Any],
    seed: int,
    losses: Mapping[int, Mapping[str, float]],
    image_ids: Mapping[int, Sequence[int]],
) -> None:
    """Write a bundle: what is needed to repeat skipped steps. These did not change the weights.

    Args:
        directory: directory of the bundle; created if absent.
        checkpoint: content of a checkpoint of the current state.
        seed: seed of the run.
        losses: losses by step and name.
        image_ids: image ids by step.

    Raises:
        OutputError: the bundle cannot be written.
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
        replace_file(directory / REPORT, json.dumps(report, indent=2).encode())
    except OSError as error:
        raise OutputError(f"{directory} cannot be written: {error.strerror or error}") from None
    save_checkpoint(directory / STATE, checkpoint)


def read_bundle(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the checkpoint and the report of a bundle.

    Raises:
        CheckpointError: the bundle is missing or damaged.
    """
    checkpoint = load_run(directory / STATE)
    try:
        report = json.loads((directory / REPORT).read_text(encoding="utf-8"))
        int(report["steps"][0]["step"])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(f"{directory / REPORT} cannot be read: {error}") from None
    return checkpoint, report


def retake_step(run: Run, checkpoint: dict[str, Any], step: int) -> Iterator[list[str]]:
    """Repeat a skipped step with the same images, weights and random streams, for one process after another.

    Yields:
        The lines of `diagnose_batch` for each micro-batch.
    """
    settings, state = run.settings, run.new_state(checkpoint)
    set_backbone_frozen(state.model, step < run.unfreeze_step, settings.train.backbone_batch_norm)
    run.set_progress(step)
    ids = run.training_set.annotations.image_ids
    for rank in range(run.processes):
        seed_step(settings.run.seed, step, rank)
        for positions in run.new_sampler(step, step + 1, rank):
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
    """Find where the values of one micro-batch become non-finite, forward and backward.

    Args:
        model: model in training mode; only its batch-norm statistics change.
        image_ids: ids of all images of the dataset, (M,).

    Returns:
        A line for each place; none if all values are finite.
    """
    lines: list[str] = []
    # Before the forward pass, which may make the batch-norm statistics non-finite.
    if bad := [name for name, value in model.state_dict().items() if not value.isfinite().all()]:
        lines.append(f"non-finite weights: {_shorten(bad)}")
    first: list[str] = []
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: _note(first, name, output))
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    images, targets = batch_to_device(batch, device)
    model.zero_grad(set_to_none=True)
    try:
        with autocast():
            outputs = model(images)
            losses = criterion(outputs, targets)
    finally:
        for handle in handles:
            handle.remove()
    if first:
        lines.append(f"first non-finite output: of {first[0]}")
    if bad := [f"{name} = {value.item():g}" for name, value in losses.items() if not value.isfinite()]:
        lines.append(f"loss: {', '.join(bad)}")
        for row, index in enumerate(batch["indices"].tolist()):
            own = [level[row : row + 1] for level in outputs]
            alone = criterion(own, {name: value[row : row + 1] for name, value in targets.items()})
            if bad := [f"{name} = {value.item():g}" for name, value in alone.items() if not value.isfinite()]:
                lines.append(f"loss of image id {image_ids[index]} alone: {', '.join(bad)}")
    torch.stack(list(losses.values())).sum().backward()
    if bad := [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]:
        lines.append(f"non-finite gradients: {_shorten(bad)}")
    model.zero_grad(set_to_none=True)
    return lines


def _note(first: list[str], name: str, output: Any) -> None:
    tensors = output if isinstance(output, list | tuple) else [output]
    if not first and any(isinstance(tensor, Tensor) and not tensor.isfinite().all() for tensor in tensors):
        first.append(name)


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:MAX_NAMES]) + (f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else "")
