"""What a run says: its plan before the first step, its progress, and the numbers of an evaluation."""

import datetime
from pathlib import Path

from tqdm import tqdm

from detection.drawing.boxes import save_jpeg
from detection.evaluation.coco_metric import choose_backend
from detection.evaluation.evaluate import Evaluation
from detection.evaluation.report import draw_detections, metric_table, protocol_line, write_evaluation
from detection.runtime.devices import describe_device, peak_memory_gib
from detection.training.loggers import RunLogger
from detection.training.run import Run
from detection.training.state import RunState
from detection.training.throughput import Throughput, flops_per_pixel, matmul_ceiling, summary_lines


def plan_lines(run: Run) -> list[str]:
    """What is about to happen, for the user to check before it costs days."""
    settings, train, names = run.settings, run.settings.train, run.categories.names
    sizes = f"{train.image_size} px"
    if train.resize_frequency:
        smallest, largest = train.multiscale_sizes
        sizes = f"{smallest} to {largest} px, changed every {train.resize_frequency} steps"
    steps_shown = sorted({0, run.schedule.warmup, *run.schedule.changes(run.steps), run.steps - 1})
    rates = ", ".join(f"{run.schedule.at(step):.3g} at {step}" for step in steps_shown if step < run.steps)
    training, validation = run.training_set.annotations, run.validation_set.annotations
    lines = [
        f"device      {describe_device(run.device)}, {run.precision}",
        *run.detector.plan,
        f"input       {run.detector.geometry.describe()}",
        f"classes     {len(names)}: {', '.join(names[:10])}{' ...' if len(names) > 10 else ''}",
        f"training    {len(training)} images, {len(training.labels)} boxes, {sizes}",
        f"validation  {len(validation)} images, {len(validation.labels)} boxes, {settings.evaluation.image_size} px"
        f", every {run.evaluate_frequency} steps by {choose_backend(settings.evaluation.backend)}",
        f"batch       {train.micro_batch} x {train.subdivisions} subdivisions x {run.ranks.size} "
        f"process{'es' if run.ranks.size > 1 else ''} = {run.images_per_step} images per step",
        *run.found_batch_size,
        f"duration    {run.steps} steps = {run.steps / run.steps_per_epoch:.1f} epochs"
        f" of {run.steps_per_epoch:.1f} steps",
        f"schedule    {train.optimizer}, {settings.scheduler.strategy}, learning rate {rates}",
    ]
    lines += run.detector.notices(
        {"train.image_size": train.image_size, "evaluation.image_size": settings.evaluation.image_size}
    )
    if train.backbone_learning_rate_factor != 1 or train.backbone_batch_norm == "frozen" or run.unfreeze_step:
        lines.append(
            f"backbone    frozen for {run.unfreeze_step} steps, then learning rate x "
            f"{train.backbone_learning_rate_factor:g}, batch norm {train.backbone_batch_norm}"
        )
    lines += [f"pretrained  {line}" for line in run.pretrained]
    for name, annotations in (("training", training), ("validation", validation)):
        lines += [f"{name:<12}left out: {line}" for line in annotations.counts.lines()]
    return lines + run.data_warnings


def report_progress(logger: RunLogger, bar: tqdm, run: Run, state: RunState, size: int, seconds_left: float) -> None:
    """What the device has gathered since the last time, read and averaged over all processes, into the logs.

    On a terminal it becomes the bar's text, else a line, so that `tail -f nohup_0.out` reads well.

    Raises:
        NonFiniteLoss: too many steps in a row were skipped.
        NumericsError: fp16's scale has sunk.
    """
    for skipped in state.skipped.read(run.ranks.average_of):
        logger.line(f"warning: step {skipped} was skipped, its loss or gradient was non-finite; nothing changed")
    values = run.ranks.average(state.meter.read())
    rate = run.schedule.at(state.step - 1 - state.skipped.total)
    values |= {"train/learning_rate": rate, "train/image_size": size, "train/skipped_steps": state.skipped.total}
    if state.scaler.is_enabled():
        values["train/loss_scale"] = state.scaler.get_scale()
    logger.scalars(state.step, values)
    parts = {
        "loss": f"{values['train/loss']:.2f}",
        "lr": f"{rate:.3g}",
        "images/s": f"{values['train/images_per_second']:.1f}",
        "memory": f"{peak_memory_gib(run.device):.1f}G",
        "box": f"{values['train/loss_box']:.2f}",
        "objectness": f"{values['train/loss_objectness']:.2f}",
        "class": f"{values['train/loss_class']:.2f}",
        "size": f"{size}",
        "wait": f"{values['train/wait_fraction']:.0%}",
    }
    text = "  ".join(f"{name} {value}" for name, value in parts.items())
    left = datetime.timedelta(seconds=round(seconds_left))
    place = f"step {state.step}/{run.steps}  epoch {state.step / run.steps_per_epoch:.1f}"
    logger.line(f"{place}  {text}  left {left}", show=bool(bar.disable))
    if not bar.disable:
        bar.set_postfix(parts)
    state.check_scale()


def report_speed(logger: RunLogger, run: Run, total: Throughput) -> None:
    """The last lines of a run; every process calls it at the same time."""
    peak = peak_memory_gib(run.device)  # before what is measured now
    mean = run.ranks.average({**vars(total), "ceiling": matmul_ceiling(run.device, run.dtype) or 0.0})
    ceiling = mean.pop("ceiling")
    flops = flops_per_pixel(run.detector.model, run.detector.geometry.size_multiple)
    images_per_epoch = round(run.steps_per_epoch * run.images_per_step)
    lines = summary_lines(Throughput(**mean), run.ranks.size, flops, ceiling, run.precision, images_per_epoch, peak)
    for line in lines:
        logger.line(line)


def report_evaluation(run: Run, evaluation: Evaluation, step: int, directory: Path, logger: RunLogger) -> None:
    """Numbers into the logs, pictures and files into the run directory."""
    settings, dataset = run.settings.evaluation, run.validation_set
    loss = sum(evaluation.losses.values())
    row: dict[str, float | None] = {f"val/{name}": value for name, value in evaluation.metrics.items()}
    row |= {"val/loss": loss, **{f"val/{name}": value for name, value in evaluation.losses.items()}}
    row |= {"val/boxes": len(evaluation.detections), "epoch": step / run.steps_per_epoch}
    logger.evaluation(step, row)
    names = {"nms": "NMS", "metric": evaluation.backend}
    parts = [f"{names.get(name, name)} {seconds:.1f} s" for name, seconds in evaluation.seconds.items()]
    weights = "EMA" if run.settings.train.ema_decay else "weights"
    logger.line(f"evaluation of the {weights}: {protocol_line(run.settings, run.detector)}")
    logger.line(
        f"step {step}: {len(evaluation.detections)} boxes on {len(dataset)} images, {', '.join(parts)}, "
        f"validation loss {loss:.3f}"
    )
    if evaluation.dropped:
        logger.line(f"warning: {evaluation.dropped} detections were non-finite numbers and were dropped")
    for line in metric_table(evaluation):
        logger.line(line)
    picture = draw_detections(dataset, evaluation, settings.visualization_threshold, settings.visualize_images)
    if picture is not None:
        save_jpeg(directory / "images" / f"validation_{step:06d}.jpg", picture)
        logger.image(step, "validation", picture)
    write_evaluation(directory, evaluation, dataset, step, settings.model_dump(mode="json"))
