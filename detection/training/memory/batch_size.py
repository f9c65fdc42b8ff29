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

# Images per optimizer step in args.yaml and Darknet's yolov3.cfg, for which their learning rates are tuned. A CPU is
# not faster with more than 16, and small datasets need steps: an epoch has at least 12, if they have 8 images each.
IMAGES_PER_STEP, IMAGES_PER_STEP_CPU, STEPS_PER_EPOCH, FEWEST = 64, 16, 12, 8
# Of the free memory; the rest is for convolution workspaces and fragmentation, on the CPU also for other processes.
USED_SHARE, USED_SHARE_CPU = 0.9, 0.5
LARGEST = 4096  # largest batch size considered

Autocast = Callable[[], AbstractContextManager]


def sizes_up_to(maximum: int) -> list[int]:
    """List the candidate sizes 1, 2, 3, 4, 6, 8, 12, ...: few, so that similar machines choose the same one."""
    powers = [2**exponent for exponent in range(maximum.bit_length())]
    return sorted(size for size in {*powers, *(3 * power for power in powers)} if size <= maximum)


def most_images(device_type: str, num_images: int) -> int:
    """Return the most images per optimizer step that `train.batch_size: auto` makes of a training set."""
    most = IMAGES_PER_STEP_CPU if device_type == "cpu" else IMAGES_PER_STEP
    return min(most, num_images, max(num_images // STEPS_PER_EPOCH, FEWEST))


def find_batch_size(
    detector: Detector, settings: Settings, ranks: Ranks, num_images: int, autocast: Autocast, scaler: Callable
) -> tuple[int, str]:
    """Find the largest `train.batch_size` that fits, the same in all processes.

    At most `IMAGES_PER_STEP` images per optimizer step, fewer for small datasets, and at most `num_images` (but at
    least one per micro-batch).
    Starts from `estimate_memory`; on an accelerator, training steps are then tried with decreasing batch sizes until
    one fits. On the CPU, where a process that allocates too much is killed, only the estimate is used; the preflight
    step tries the result.

    Args:
        detector: detector on its device; its weights and statistics do not change.
        settings: settings of the run.
        ranks: processes of the run.
        num_images: number of training images.
        autocast: returns the context of the forward pass.
        scaler: builds a gradient scaler.

    Returns:
        The batch size, and a line for the plan.

    Raises:
        DeviceMemoryError: not even one image fits.
        SettingsError: the free memory is unknown.
    """
    train, size = settings.train, settings.train.largest_size
    device = next(detector.model.parameters()).device
    limit = most_images(device.type, num_images)
    parts = train.subdivisions * ranks.size
    maximum = max(limit // parts, 1)
    one = estimate_memory(detector.model, detector.criterion, train, 1, size, autocast, device)  # type: ignore[arg-type]
    if one.available is None:
        raise SettingsError(f"train.batch_size=auto: the free memory of {device} is not known; give a number")
    budget, per_loaded_image = USED_SHARE * one.available, 0
    if device.type == "cpu":
        budget = USED_SHARE_CPU * one.available / ranks.local_size
        per_loaded_image = batches_ahead(settings.data.num_workers) * 3 * size**2

    def estimated(number: int) -> float:
        return dataclasses.replace(one, batch_size=number).total + number * per_loaded_image

    room_for = [number for number in sizes_up_to(LARGEST) if estimated(number) <= budget]
    fitting = [number for number in room_for if number <= maximum]
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
    elif number == sizes_up_to(maximum)[-1]:
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
    """Return whether two training steps of a copy of the model stay below `USED_SHARE` of `room` bytes.

    Two, because only the second has the optimizer's state.
    """
    train, device = settings.train, next(detector.model.parameters()).device
    batch = synthetic_batch(train.largest_size, number, detector.model.num_classes)  # type: ignore[arg-type]
    if device.type == "cuda":
        torch.cuda.empty_cache()  # else memory cached by a failed try would count as used before this one
    before = _reserved(device, reset=True)
    try:
        model = copy.deepcopy(detector.model).train()
        optimizer = build_optimizer(model, train)
        average = ExponentialMovingAverage(model, 0.9, 0) if train.ema_decay else None
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
                clip_tensor_norm=train.clip_tensor_norm,
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
    """Return the peak memory that torch has reserved on a CUDA device; 0 on others, where only an error counts."""
    if device.type != "cuda":
        return 0
    if reset:
        torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.max_memory_reserved(device)
