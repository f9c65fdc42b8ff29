"""Checks before the first step of what could otherwise fail hours later: memory, disk, checkpoint, evaluation."""

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from detection.checkpoints import save_checkpoint
from detection.data.annotations import select_images
from detection.data.loaders import batches_ahead, collate_samples
from detection.errors import OUT_OF_MEMORY, DeviceMemoryError, OutputError, say
from detection.evaluation.evaluate import evaluate
from detection.runtime.devices import peak_memory_gib
from detection.training.checkpoint_writer import Saver
from detection.training.loggers import Loggers
from detection.training.memory.estimate import estimate_memory
from detection.training.optimizer import set_backbone_frozen
from detection.training.run import Run
from detection.training.state import RunState
from detection.training.step import train_step

SHARED_MEMORY = Path("/dev/shm")
EVALUATED_IMAGES = 2


def dry_run(run: Run, plan: Sequence[str], target: Path) -> None:
    """Print the plan and make all checks (`--dry-run`) without leaving files behind.

    Args:
        plan: lines to print first.
        target: path of the run directory, or of the directory that it would be created in.
    """

    def show(line: str) -> None:
        if run.ranks.is_first:
            say(line)

    for line in plan:
        show(line)
    state = run.new_state()
    try_step(run, state, show)
    if run.ranks.is_first:
        content = run.checkpoint(state)
        show(check_disk(target, content, run.settings.train.keep_checkpoints))
        try_checkpoint(target, content)
        show(f"{try_evaluation(run, state)}; a checkpoint was written and read back")


def preflight(run: Run, state: RunState, saver: Saver, loggers: Loggers) -> None:
    """Make the checks of a dry run at the start of a run, in its directory."""
    try_step(run, state, loggers.line)
    if run.ranks.is_first:
        loggers.line(check_disk(loggers.directory, run.checkpoint(state), run.settings.train.keep_checkpoints))
        saver.save()  # a run killed before its first regular checkpoint can be resumed from this one
        loggers.line(try_evaluation(run, state))
        saver.wait()


def try_step(run: Run, state: RunState, show: Callable[[str], None]) -> None:
    """Try a training step at the largest image size, for its peak memory; the state does not change.

    Args:
        show: called with each line of the result.

    Raises:
        DeviceMemoryError: there is not enough memory.
    """
    train = run.settings.train
    size = train.largest_size
    estimate = estimate_memory(
        run.detector.model, run.criterion, train, train.micro_batch, size, run.autocast, run.device
    )
    show(estimate.line())
    if estimate.available is not None and estimate.total > estimate.available:
        raise DeviceMemoryError(f"the step is not tried: {OUT_OF_MEMORY}")
    positions = next(iter(run.new_sampler(state.step, state.step + 1)))
    batch = collate_samples([run.training_set[position._replace(size=size)] for position in positions])
    set_backbone_frozen(state.model, False, train.backbone_batch_norm)
    # The second micro-batch adds to existing gradients; further ones need no more memory.
    micro_batches = min(train.subdivisions, 2)
    scale = state.scaler.state_dict()
    started = time.perf_counter()
    result = train_step(
        run.wrapped(state.model), run.criterion, state.optimizer, state.scaler, [batch] * micro_batches, run.autocast,
        run.device, train.clip_norm, state.statistics, True, run.mark_step, train.clip_tensor_norm,
    )  # fmt: skip
    values = ", ".join(f"{name} {value.item():.2f}" for name, value in result.losses.items())
    seconds = time.perf_counter() - started
    if scale:
        state.scaler.load_state_dict(scale)
    state.optimizer.zero_grad(set_to_none=True)
    whole = "" if run.device.type in ("cuda", "hpu") else " at the peak of the process, libraries included"
    step = "one step" if micro_batches == train.subdivisions else f"2 of a step's {train.subdivisions} micro-batches"
    memory = peak_memory_gib(run.device)
    show(f"preflight   {step} at {size} px: {seconds:.1f} s, {memory:.1f} GiB{whole}, {values}; weights unchanged")
    workers = run.settings.data.num_workers * run.ranks.local_size
    shared = check_shared_memory(workers, sum(batch[key].nbytes for key in ("images", "boxes", "labels")))
    if shared is not None:
        show(shared)


def check_disk(directory: Path, content: dict[str, Any], keep: int) -> str:
    """Compare the free disk space with the size of the checkpoints.

    Args:
        directory: run directory; its nearest existing parent is checked.
        content: content of a checkpoint.
        keep: number of checkpoints beside last.pt and best.pt.

    Returns:
        A line for the plan.

    Raises:
        OutputError: there is not enough space for a checkpoint beside the previous one.
    """
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    size, free = tensor_bytes(content), shutil.disk_usage(existing).free
    if free < 2 * size:
        raise OutputError(
            f"{existing}: {free / 2**30:.2f} GiB free, a checkpoint has {size / 2**30:.2f} GiB and is written beside "
            "the previous one; free some space or choose another run.logs_path"
        )
    whole = (3 + keep) * size
    short = "" if free > whole else f"; warning: {whole / 2**30:.2f} GiB may be needed with all that are kept"
    return f"disk        {free / 2**30:.1f} GiB free, a checkpoint has {size / 2**30:.2f} GiB{short}"


def check_shared_memory(workers: int, batch_bytes: int) -> str | None:
    """Return a warning if shared memory, through which the loader's workers pass batches, may be too small.

    Args:
        workers: number of loader workers on this machine.
        batch_bytes: size of a micro-batch.
    """
    if not workers or not SHARED_MEMORY.is_dir():
        return None
    needed, free = batches_ahead(workers) * batch_bytes, shutil.disk_usage(SHARED_MEMORY).free
    if free > needed:
        return None
    return (
        f"warning     {SHARED_MEMORY} has {free / 2**20:.0f} MiB free, {workers} workers may need "
        f"{needed / 2**20:.0f}: enlarge it (docker run --shm-size), or lower data.num_workers or train.batch_size"
    )


def try_checkpoint(parent: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint, read it back and remove it.

    Args:
        parent: directory, or its nearest existing parent, in which a temporary one is created.

    Raises:
        OutputError: it cannot be written, or reads back differently.
    """
    existing = next(path for path in (parent, *parent.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=existing) as directory:
            save_checkpoint(Path(directory) / "last.pt", content)
    except OSError as error:
        raise OutputError(f"{existing} cannot be written: {error.strerror or error}") from None


def try_evaluation(run: Run, state: RunState) -> str:
    """Evaluate the first validation images; returns a line for the log."""
    dataset, criterion, postprocess = run.validation_set, run.detector.criterion, run.detector.postprocess
    count = min(EVALUATED_IMAGES, len(dataset))
    batch = collate_samples([dataset[index] for index in range(count)])
    few = select_images(dataset.annotations, np.arange(count))
    backend = run.settings.evaluation.backend
    found = evaluate(state.evaluated_model, criterion, postprocess, [batch], few, run.device, run.autocast, backend)
    return f"evaluator   {found.backend} ran on {count} image{'s' if count > 1 else ''}"


def tensor_bytes(value: Any) -> int:
    """Return the size of all tensors in nested dicts and lists, in bytes."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(tensor_bytes(item) for item in inner)
