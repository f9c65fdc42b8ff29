"""Log lines of a run: the plan before the first step, progress, and the summary at the end."""

import datetime

from detection.contract import Batch
from detection.errors import SettingsError, closed_streams, name_list
from detection.evaluation.coco_metric import choose_backend
from detection.evaluation.report import draw_batch
from detection.runtime.devices import describe_device, peak_memory_gib
from detection.training.checkpoint_writer import BEST
from detection.training.loggers import Loggers
from detection.training.report_page import report_run
from detection.training.run import Run
from detection.training.schedules import BIAS_GROUP
from detection.training.state import RunState
from detection.training.supervisor import Supervisor
from detection.training.throughput import Throughput, flops_per_pixel, matmul_ceiling, summary_lines

LONG_WARMUP = 3  # a warm-up of more than a third of the run is named
LOW_RATE = 10  # a rate that never reaches a tenth of its setting too
MANY_EPOCHS = 1000
# Classes of photographs taken upright, by their usual names.
UPRIGHT = frozenset(
    [
        "person",
        "people",
        "pedestrian",
        "face",
        "head",
        "man",
        "woman",
        "rider",
        "bicycle",
        "bike",
        "car",
        "van",
        "bus",
        "truck",
        "train",
        "motorcycle",
        "motorbike",
        "boat",
        "dog",
        "cat",
        "horse",
        "cow",
        "sheep",
        "bird",
        "chair",
        "table",
        "sofa",
        "bottle",
        "tree",
        "building",
        "house",
        "sign",
    ]
)


def plan_lines(run: Run) -> list[str]:
    """Format the plan of a run: device, data, batch size, duration and schedule."""
    settings, train, names = run.settings, run.settings.train, run.categories.names
    sizes = f"{train.image_size} px"
    if train.resize_frequency:
        smallest, largest = train.multiscale_sizes
        sizes = f"{smallest} to {largest} px, changed every {train.resize_frequency} steps"
    steps_shown = sorted({0, run.schedule.warmup, *run.schedule.changes(run.steps), run.steps - 1})
    rates = ", ".join(f"{run.schedule.at(step):.3g} at {step}" for step in steps_shown if step < run.steps)
    training, validation = run.training_set.annotations, run.validation_set.annotations
    when = f"every {run.evaluate_frequency} steps" if run.evaluate_frequency else "at the end"
    lines = [
        f"device      {describe_device(run.device)}, {run.precision}",
        *run.training_set.source_lines,
        *run.detector.plan,
        f"input       {run.detector.geometry.describe()}",
        f"classes     {len(names)}: {name_list(names[:10])}{' ...' if len(names) > 10 else ''}",
        f"training    {len(training)} images, {len(training.labels)} boxes, {sizes}",
        f"validation  {len(validation)} images, {len(validation.labels)} boxes, {settings.evaluation.image_size} px"
        f", {when} by {choose_backend(settings.evaluation.backend)}",
        f"batch       {train.micro_batch} x {train.subdivisions} subdivisions x {run.ranks.size} "
        f"process{'es' if run.ranks.size > 1 else ''} = {run.images_per_step} images per step",
        *run.batch_size_lines,
        f"duration    {run.steps} steps = {run.steps / run.steps_per_epoch:.1f} epochs"
        f" of {run.steps_per_epoch:.1f} steps",
        f"schedule    {train.optimizer}, {settings.scheduler.strategy}, learning rate {rates}",
    ]
    if closed := closed_streams():
        lines.insert(0, f"warning     {' and '.join(closed)} closed by the caller: its lines stand in train.log alone")
    if train.learning_rate_batch is not None:
        lines.append(
            f"rate        {run.learning_rate:.6g} for {run.images_per_step} images per step: train.learning_rate = "
            f"{train.learning_rate:g} is for {train.learning_rate_batch}"
        )
    if settings.train.clean_finish:
        lines.append(f"finish      from step {run.finish_step} without mosaic and mixup")
    if cycle := run.schedule.swa_cycle:
        lines.append(
            f"SWA         {train.swa_cycles} cycles of {cycle} steps from step {run.schedule.swa_start} on, mean of "
            "weights and batch-norm statistics"
        )
    lines += run.detector.notices(
        {"train.image_size": train.image_size, "evaluation.image_size": settings.evaluation.image_size}
    )
    factor, decay = train.backbone_learning_rate_factor, train.backbone_layer_decay
    if (factor, decay) != (1, 1) or train.backbone_batch_norm == "frozen" or run.unfreeze_step:
        lines.append(
            f"backbone    frozen for {run.unfreeze_step} steps, then learning rate x {factor:g}"
            f"{f' and x {decay:g} per stage towards the input' if decay != 1 else ''}, "
            f"batch norm {train.backbone_batch_norm}"
        )
    lines += [f"pretrained  {line}" for line in run.pretrained_lines]
    for name, annotations in (("training", training), ("validation", validation)):
        lines += [f"{name:<12}left out: {line}" for line in annotations.counts.lines()]
    return lines + run.data_warnings + [f"warning     {line}" for line in plan_warnings(run)]


def plan_warnings(run: Run) -> list[str]:
    """Name what is valid but seldom meant.

    Raises:
        SettingsError: the learning rate is 0 in every step.
    """
    settings, steps, epochs = run.settings, run.steps, run.steps / run.steps_per_epoch
    shown = range(0, steps, max(steps // 1000, 1))
    if steps and not any(run.schedule.at(step, group) for step in shown for group in ("weights", BIAS_GROUP)):
        raise SettingsError("the learning rate is 0 in every step: nothing would be learned; see train.learning_rate")
    warnings, highest = [], max(map(run.schedule.at, shown), default=0.0)
    if run.schedule.warmup > steps / LONG_WARMUP:
        warnings.append(
            f"the warm-up takes {run.schedule.warmup} of {steps} steps, so the learning rate reaches only "
            f"{highest:.2g}; a tenth is usual: scheduler.warmup=auto"
        )
    elif highest < run.learning_rate / LOW_RATE:
        warnings.append(
            f"the learning rate reaches only {highest:.2g}, of {run.learning_rate:g}: it falls before the "
            f"warm-up of {run.schedule.warmup} steps ends"
        )
    if epochs > MANY_EPOCHS:
        warnings.append(
            f"{epochs:.0f} epochs over the same {len(run.training_set)} images; usual are 30 to 300: "
            'train.steps="100ep", or --config recipes/own_data.yaml'
        )
    if run.evaluate_frequency is not None and run.evaluate_frequency >= steps > run.steps_per_epoch:
        warnings.append("no evaluation before the end of the run: evaluation.evaluate_frequency=auto makes twenty")
    flip, names = settings.data.augmentation.vertical_flip.p, run.categories.names
    upright = [name for name in names if name.lower() in UPRIGHT]
    if flip and upright:
        warnings.append(
            f"vertical_flip turns images upside down, but {', '.join(upright[:3])} looks like photographs with an up"
        )
    return warnings


def report_first_batch(run: Run, batch: Batch, loggers: Loggers) -> None:
    """Log the images of a batch as the network sees them, with their boxes."""
    if run.ranks.is_first:
        loggers.image(0, "train_batch", draw_batch(batch, run.categories.names))


def report_progress(run: Run, state: RunState, size: int, loggers: Loggers, supervisor: Supervisor) -> None:
    """Read the losses since the last report, average them over all processes and log them.

    Updates the progress bar if there is one, else prints a line.

    Args:
        size: side of the last images in pixels.

    Raises:
        NonFiniteLoss: too many consecutive steps were skipped.
        NumericsError: the fp16 loss scale is too low.
    """
    for skipped in state.skipped.read(run.ranks.average_of):
        loggers.line(f"warning: step {skipped} was skipped, its loss or gradient was non-finite; nothing changed")
    losses = list(state.meter.sums)
    values = run.ranks.average(state.meter.read())
    rate = run.schedule.at(state.step - 1 - state.skipped.total)
    values |= {"train/learning_rate": rate, "train/image_size": size, "train/skipped_steps": state.skipped.total}
    if state.scaler.is_enabled():
        values["train/loss_scale"] = state.scaler.get_scale()
    loggers.log(state.step, values)
    parts = {
        "loss": f"{values['train/loss']:.2f}",
        "lr": f"{rate:.3g}",
        "images/s": f"{values['train/images_per_second']:.1f}",
        "memory": f"{peak_memory_gib(run.device):.1f}G",
        **{name.removeprefix("loss_"): f"{values[f'train/{name}']:.2f}" for name in losses},
        "size": f"{size}",
        "wait": f"{values['train/wait_fraction']:.0%}",
    }
    text = "  ".join(f"{name} {value}" for name, value in parts.items())
    left = datetime.timedelta(seconds=round(supervisor.seconds_left()))
    place = f"step {state.step}/{run.steps}  epoch {state.step / run.steps_per_epoch:.1f}"
    bar = supervisor.bar
    loggers.line(f"{place}  {text}  left {left}", show=bool(bar.disable))
    if not bar.disable:
        bar.set_postfix(parts)
    state.check_scale()


def report_speed(run: Run, state: RunState, loggers: Loggers) -> None:
    """Log the speed of training; a collective call, to be made by every process."""
    peak = peak_memory_gib(run.device)  # before the measurement that follows
    total, ceiling = vars(state.meter.total), matmul_ceiling(run.device, run.dtype) or 0.0
    mean = run.ranks.average({**total, "ceiling": ceiling})
    ceiling = mean.pop("ceiling")
    flops = flops_per_pixel(run.detector.model, run.detector.geometry.size_multiple)
    images_per_epoch = round(run.steps_per_epoch * run.images_per_step)
    lines = summary_lines(Throughput(**mean), run.ranks.size, flops, ceiling, run.precision, images_per_epoch, peak)
    for line in lines:
        loggers.line(line)


def report_end(run: Run, state: RunState, loggers: Loggers, supervisor: Supervisor) -> None:
    """Log speed, duration and best checkpoint of a completed run, and write its report."""
    report_speed(run, state, loggers)
    report_run(run, state, loggers)
    best = f"best {run.settings.evaluation.best_metric} {state.best_value or 0.0:.3f} at step {state.best_step}"
    path = loggers.directory / BEST
    loggers.line(
        f"finished at step {state.step} in {supervisor.minutes():.1f} minutes with evaluations; "
        f"{best}: {path}{'' if path.exists() else ', which is gone'}"
    )
