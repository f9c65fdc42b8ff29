"""Batches of a fixed form: which images, at which size, in which order, is a pure function of seed and step."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from detection.contract import PADDING_LABEL, Batch
from detection.data.sampler import TrainingBatchSampler
from detection.data.transforms import Sample
from detection.data.workers import prepare_process, prepare_worker
from detection.runtime.devices import pinning

SMALLEST_BUCKET = (
    32  # ground-truth boxes per image; the padded number is this times a power of two, so few shapes occur
)

PREFETCHED = 2  # batches of each worker, torch's default


def collate_samples(samples: Sequence[Sample]) -> Batch:
    """Stack samples into tensors of a few fixed shapes.

    Returns:
        "images" (B, 3, S, S) uint8, channels_last in memory because that is how images are decoded: no transposition;
        "boxes" (B, G, 4) float32 and "labels" (B, G) int64, padded with -1, G one of 32, 64, 128, ...;
        "indices" (B,) int64 of the images in the dataset; "letterboxes" list of B; "unreadable" list of lines.
    """
    # In a worker `default_collate` copies the images straight into the memory that the training process shares.
    images = default_collate([torch.from_numpy(sample.image) for sample in samples]).permute(0, 3, 1, 2)
    most = max(len(sample.labels) for sample in samples)
    padded = SMALLEST_BUCKET
    while padded < most:
        padded *= 2
    boxes = torch.zeros(len(samples), padded, 4)
    labels = torch.full((len(samples), padded), PADDING_LABEL, dtype=torch.int64)
    for row, sample in enumerate(samples):
        boxes[row, : len(sample.labels)] = torch.from_numpy(sample.boxes)
        labels[row, : len(sample.labels)] = torch.from_numpy(sample.labels)
    return {
        "images": images,
        "boxes": boxes,
        "labels": labels,
        "indices": torch.tensor([sample.index for sample in samples]),
        "letterboxes": [sample.letterbox for sample in samples],
        "unreadable": [line for sample in samples for line in sample.unreadable],
    }


def build_training_loader(
    dataset: Dataset, sampler: TrainingBatchSampler, num_workers: int, device: torch.device
) -> DataLoader:
    """Micro-batches in the sampler's order, one pass over the whole rest of the run."""
    prepare_process()
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate_samples,
        worker_init_fn=prepare_worker,
        generator=torch.Generator(),  # the loader draws a number at its start; not from the run's random state
        **pinning(device),
    )


def build_evaluation_loader(
    dataset: Dataset, batch_size: int, num_workers: int, device: torch.device, rank: int = 0, ranks: int = 1
) -> DataLoader:
    """Every image once, in the dataset's order; of several processes each has its own images."""
    prepare_process()
    return DataLoader(
        dataset,
        sampler=range(rank, len(dataset), ranks),  # type: ignore[arg-type]
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate_samples,
        worker_init_fn=prepare_worker,
        generator=torch.Generator(),  # the loader draws a number at its start; not from the run's random state
        **pinning(device),
    )


def batches_ahead(workers: int) -> int:
    """How many batches lie in memory at most beside the one that is worked on, and that one."""
    return workers * PREFETCHED + 1


def targets_to(batch: Batch, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """Images and padded targets on the device; the copy does not wait when the batch is pinned."""
    images = batch["images"].to(device, non_blocking=True)
    targets = {key: batch[key].to(device, non_blocking=True) for key in ("boxes", "labels")}
    return images, targets
