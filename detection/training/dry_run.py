"""What would end a run hours later is found before its first step: disk, shared memory, checkpoint, evaluator."""

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from detection.checkpoints import save_checkpoint
from detection.data.annotations import select_images
from detection.data.loaders import batches_ahead, collate_samples
from detection.errors import OUT_OF_MEMORY, DeviceMemoryError, OutputError
from detection.evaluation.evaluate import evaluate
from detection.runtime.devices import peak_memory_gib
from detection.training.memory.estimate import estimate_memory
from detection.training.optimizer import set_backbone_frozen
from detection.training.run import Run
from detection.training.state import RunState

SHARED_MEMORY = Path("/dev/shm")
EVALUATED_IMAGES = 2


def try_step(run: Run, state: RunState, say: Callable[[str], None]) -> None:
    """A whole step at the largest size, with all its memory, that changes nothing."""
    train = run.settings.train
    size = train.largest_size
    estimate = estimate_memory(
        run.detector.model, run.criterion, train, train.micro_batch, size, run.autocast, run.device
    )
    say(estimate.line())
    if estimate.available is not None and estimate.total > estimate.available:
        raise DeviceMemoryError(f"the step is not tried: {OUT_OF_MEMORY}")
    positions = next(iter(run.sampler(state.step, state.step + 1)))
    batch = collate_samples([run.training_set[(index, epoch, size)] for index, epoch, _ in positions])
    set_backbone_frozen(state.model, False, train.backbone_batch_norm)
    # A second one adds to gradients that are there; more show nothing new.
    micro_batches = min(train.subdivisions, 2)
    scale = state.scaler.state_dict()
    started = time.perf_counter()
    result = run.take_step(state, run.wrapped(state.model), [batch] * micro_batches, discard=True)
    values = ", ".join(f"{name} {value.item():.2f}" for name, value in result.losses.items())
    seconds = time.perf_counter() - started
    if scale:
        state.scaler.load_state_dict(scale)
    state.optimizer.zero_grad(set_to_none=True)
    step = "one step" if micro_batches == train.subdivisions else f"2 of a step's {train.subdivisions} micro-batches"
    memory = peak_memory_gib(run.device)
    say(f"dry run     {step} at {size} px: {seconds:.1f} s, {memory:.1f} GiB, {values}; thrown away")
    workers = run.settings.data.num_workers * run.ranks.local_size
    shared = check_shared_memory(workers, sum(batch[key].nbytes for key in ("images", "boxes", "labels")))
    if shared is not None:
        say(shared)


def check_disk(directory: Path, content: dict[str, Any], keep: int) -> str:
    """Compare the room on the disk with what the checkpoints will take.

    Args:
        directory: of the run; its nearest existing parent counts.
        content: of a checkpoint.
        keep: numbered checkpoints beside last.pt and best.pt.

    Returns:
        A line for the plan.

    Raises:
        OutputError: there is no room for a checkpoint beside an older one.
    """
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    size, free = tensor_bytes(content), shutil.disk_usage(existing).free
    if free < 2 * size:
        raise OutputError(
            f"{existing}: {free / 2**30:.2f} GiB free, a checkpoint has {size / 2**30:.2f} GiB and is written beside "
            "the one before; free some room or choose another run.logs_path"
        )
    whole = (3 + keep) * size
    short = "" if free > whole else f"; warning: {whole / 2**30:.2f} GiB may be needed with all that are kept"
    return f"disk        {free / 2**30:.1f} GiB free, a checkpoint has {size / 2**30:.2f} GiB{short}"


def check_shared_memory(workers: int, batch_bytes: int) -> str | None:
    """A warning where the loader's workers may not find the shared memory that they hand batches over in."""
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
        parent: of a run's directory; its nearest existing parent counts.

    Raises:
        OutputError: it cannot be written, or is not what was written.
    """
    existing = next(path for path in (parent, *parent.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=existing) as directory:
            save_checkpoint(Path(directory) / "last.pt", content)
    except OSError as error:
        raise OutputError(f"{existing} cannot be written: {error.strerror or error}") from None


def try_evaluation(run: Run, state: RunState) -> str:
    """The first validation images through network and metric; returns a line for the plan."""
    dataset, criterion, postprocess = run.validation_set, run.detector.criterion, run.detector.postprocess
    count = min(EVALUATED_IMAGES, len(dataset))
    batch = collate_samples([dataset[index] for index in range(count)])
    few = select_images(dataset.annotations, np.arange(count))
    backend = run.settings.evaluation.backend
    found = evaluate(state.evaluated_model, criterion, postprocess, [batch], few, run.device, run.autocast, backend)
    return f"evaluator   {found.backend} ran on two images"


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(tensor_bytes(item) for item in inner)
