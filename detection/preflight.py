"""What would end a run hours later is found before its first step: disk, shared memory, checkpoint, evaluator."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from detection.checkpoints import save_checkpoint
from detection.data.coco import Annotations, select_images
from detection.data.loaders import collate_samples
from detection.errors import OutputError
from detection.evaluation import Evaluation, evaluate

SHARED_MEMORY = Path("/dev/shm")
PREFETCHED = 2  # batches of each worker, torch's default
EVALUATED_IMAGES = 2


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
    needed, free = (workers * PREFETCHED + 1) * batch_bytes, shutil.disk_usage(SHARED_MEMORY).free
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


def try_evaluation(detector: Any, dataset: Any, device: Any, autocast: Any, backend: str) -> Evaluation:
    """The first images of the validation set through network and metric."""
    count = min(EVALUATED_IMAGES, len(dataset))
    batch = collate_samples([dataset[index] for index in range(count)])
    few: Annotations = select_images(dataset.annotations, np.arange(count))
    model, criterion, postprocess = detector
    return evaluate(model, criterion, postprocess, [batch], few, device, autocast, backend)


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(tensor_bytes(item) for item in inner)
