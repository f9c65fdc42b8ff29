"""`train.batch_size: auto`: the largest micro-batch whose step fits into memory at the largest input size."""

import copy
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from detection.config.settings import Settings
from detection.contract import Detector
from detection.data.fake import synthetic_batch
from detection.data.loaders import batches_ahead
from detection.errors import DeviceMemoryError, SettingsError, known_failure
from detection.runtime.devices import synchronize
from detection.runtime.distributed import Ranks
from detection.training.memory.estimate import estimate_memory
from detection.training.moving_average import ExponentialMovingAverage
from detection.training.optimizer import build_optimizer
from detection.training.step import train_step

# Of one optimizer step, in args.yaml and in Darknet's yolov3.cfg: what their learning rates belong to.
IMAGES_PER_STEP = 64
# Of the free memory. The rest is for workspaces of the convolutions and fragments; on the CPU for everything else too.
USED_SHARE, USED_SHARE_CPU = 0.9, 0.5
LARGEST = 4096  # of the numbers that are looked at

Autocast = Callable[[], AbstractContextManager]


def sizes_up_to(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, 24, ...: few, so that machines that differ little find the same one."""
    powers = [2**exponent for exponent in range(most.bit_length())]
    return sorted(size for size in {*powers, *(3 * power for power in powers)} if size <= most)


def find_batch_size(
    detector: Detector, settings: Settings, ranks: Ranks, num_images: int, autocast: Autocast, scaler: Callable
) -> tuple[int, str]:
    """The number for `train.batch_size`, the same in all processes, and a line for the plan.

    Never more than makes 64 images per optimizer step, nor than there are (one where subdivisions and processes alone
    make more). Found by the estimate of `memory.py`; on an accelerator whole steps are then tried, with smaller batches
    until one has room. On the CPU, where a process that asks for too much is killed, the step before training tries
    what was found.

    Args:
        detector: on its device; its weights and statistics stay as they are.
        num_images: of the training set.
        scaler: makes a gradient scaler.

    Raises:
        DeviceMemoryError: not even one image fits.
        SettingsError: nobody knows how much memory there is.
    """
    train, size = settings.train, settings.train.largest_size
    device = next(detector.model.parameters()).device
    limit, parts = min(IMAGES_PER_STEP, num_images), train.subdivisions * ranks.size
    most = max(limit // parts, 1)
    one = estimate_memory(detector.model, detector.criterion, train, 1, size, autocast, device)  # type: ignore[arg-type]
    if one.available is None:
        raise SettingsError(f"train.batch_size=auto: the free memory of {device} is not known; say a number")
    budget, per_loaded_image = USED_SHARE * one.available, 0
    if device.type == "cpu":
        budget = USED_SHARE_CPU * one.available / ranks.local_size
        per_loaded_image = batches_ahead(settings.data.num_workers) * 3 * size**2

    def estimated(number: int) -> float:
        return dataclasses.replace(one, batch_size=number).total + number * per_loaded_image

    room_for = [number for number in sizes_up_to(LARGEST) if estimated(number) <= budget]
    fitting = [number for number in room_for if number <= most]
    tries = 0
    while fitting and device.type != "cpu":
        tries += 1
        if has_room(detector, settings, fitting[-1], autocast, scaler(), one.available):
            break
        fitting.pop()
    number = -ranks.all_reduce_max_async(lambda: -fitting[-1] if fitting else 0)()
    if not number:
        raise DeviceMemoryError(
            f"train.batch_size=auto: not even one image of {size} px fits into {one.available / 2**30:.1f} GiB of free "
            "memory; take a smaller train.image_size or multiscale_sizes, or train.activation_checkpointing=true"
        )
    how = f"of {one.available / 2**30:.1f} GiB free at {size} px, " + ("steps tried" if tries else "estimated")
    line = f"batch size  {number} found: about {estimated(number) / 2**30:.1f} {how}"
    if number * parts > limit:
        line += f"; subdivisions and processes alone make {parts} images per step"
    elif number == sizes_up_to(most)[-1]:
        line += f"; not more than {limit} images per step unless you say so, there may be room for {room_for[-1]}"
    else:
        needed = train.subdivisions * limit // (number * parts)
        line += (
            f"; train.subdivisions={needed} makes {number * needed * ranks.size} images per step, not {number * parts}"
        )
    return number, line


def has_room(
    detector: Detector, settings: Settings, number: int, autocast: Autocast, scaler: torch.amp.GradScaler, room: int
) -> bool:
    """Whether two whole steps with everything that training keeps stay below the share of `room` bytes.

    They are those of a copy: the second step has the optimizer's state and, with subdivisions, adds to a gradient.
    """
    train, device = settings.train, next(detector.model.parameters()).device
    batch = synthetic_batch(train.largest_size, number, detector.model.num_classes)  # type: ignore[arg-type]
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what a failed try has left would count as taken before
    before = _reserved(device, reset=True)
    try:
        model = copy.deepcopy(detector.model).train()
        optimizer = build_optimizer(model, train)
        average = ExponentialMovingAverage(model, train.ema_decay, 0) if train.ema_decay else None
        for step in range(2):
            train_step(
                model,
                detector.criterion,  # type: ignore[arg-type]
                optimizer,
                scaler,
                [batch] * min(train.subdivisions, 2),
                autocast,
                device,
                train.clip_norm,
            )
            if average:
                average.update(model, step)
        synchronize(device)
        return _reserved(device) - before <= USED_SHARE * room
    except RuntimeError as error:
        if not isinstance(known_failure(error, ""), DeviceMemoryError):
            raise
        return False


def _reserved(device: torch.device, reset: bool = False) -> int:
    """Largest memory that torch has taken from a CUDA device; 0 elsewhere, where only running out of it tells."""
    if device.type != "cuda":
        return 0
    if reset:
        torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.max_memory_reserved(device)
