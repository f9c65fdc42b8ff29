"""DataLoaders: batches of a fixed form whose images, sizes and order are pure functions of seed and step.

A program that makes loaders with workers calls `workers.prepare_process` first, as the scripts do.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from detection.contract import PADDING_LABEL, Batch
from detection.data.sampler import TrainingBatchSampler
from detection.data.transforms import Sample
from detection.data.workers import prepare_worker, require_files
from detection.runtime.devices import pins_memory

# Ground-truth boxes per image; the padded number is this times a power of two, so few shapes occur.
SMALLEST_BUCKET = 32
TARGETS = ("boxes", "labels", "weights")  # of a batch, for the criterion; the last may be absent
PREFETCHED = 2  # batches of each worker, torch's default


def collate_samples(samples: Sequence[Sample]) -> Batch:
    """Stack samples into tensors of a few fixed shapes.

    Args:
        samples: B of them, of the same size S.

    Returns:
        "images" (B, 3, S, S) uint8, channels_last in memory because that is how images are decoded: no transposition;
        "boxes" (B, G, 4) float32 and "labels" (B, G) int64, padded with -1, G one of 32, 64, 128, ...;
        "indices" (B,) int64 of the images in the dataset; "letterboxes" list of B; "unreadable" list of lines;
        "weights" (B, G) float32 if the samples have them.
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
    batch: Batch = {
        "images": images,
        "boxes": boxes,
        "labels": labels,
        "indices": torch.tensor([sample.index for sample in samples]),
        "letterboxes": [sample.letterbox for sample in samples],
        "unreadable": [line for sample in samples for line in sample.unreadable],
    }
    if samples[0].weights is not None:
        batch["weights"] = torch.zeros(labels.shape)
        for row, sample in enumerate(samples):
            assert sample.weights is not None, "of one transform all samples have weights, or none"
            batch["weights"][row, : len(sample.labels)] = torch.from_numpy(sample.weights)
    return batch


def build_training_loader(
    dataset: Dataset, sampler: TrainingBatchSampler, num_workers: int, device: torch.device
) -> DataLoader:
    """Build a loader of micro-batches in the sampler's order, one pass over the rest of the run."""
    return _build_loader(dataset, num_workers, device, batch_sampler=sampler, collate_fn=collate_samples)


def build_evaluation_loader(
    dataset: Dataset,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    rank: int = 0,
    ranks: int = 1,
    collate: Callable[[Sequence[Any]], Any] = collate_samples,
) -> DataLoader:
    """Build a loader of every image once, in the dataset's order; several processes have disjoint images.

    Args:
        device: that the batches will be copied to.
        collate: makes a batch of the dataset's items.
    """
    images = range(rank, len(dataset), ranks)  # type: ignore[arg-type]
    return _build_loader(dataset, num_workers, device, sampler=images, batch_size=batch_size, collate_fn=collate)


def _build_loader(dataset: Dataset, num_workers: int, device: torch.device, **options: Any) -> DataLoader:
    require_files(num_workers)
    return DataLoader(
        dataset,
        num_workers=num_workers,
        worker_init_fn=prepare_worker,
        generator=torch.Generator(),  # the loader draws a number at its start; not from the run's random state
        pin_memory=pins_memory(device),
        **options,
    )


def batches_ahead(workers: int) -> int:
    """Maximum number of batches in memory: those that the workers have prefetched, and the current one."""
    return workers * PREFETCHED + 1


def batch_to_device(batch: Batch, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """Copy images and padded targets to the device, asynchronously if the batch is pinned."""
    images = batch["images"].to(device, non_blocking=True)
    targets = {key: batch[key].to(device, non_blocking=True) for key in TARGETS if key in batch}  # type: ignore[literal-required]
    return images, targets
