"""Train a detector on COCO-format images.

python3 yolo-v3/main.py --config recipes/quickstart.yaml           built-in digits, about 4 minutes on 2 CPU cores
python3 yolo-v3/main.py data.root=/my/dataset train.batch_size=16  your own images
python3 yolo-v3/main.py --resume logs/240224-211713_LambdaLR       continue, number for number
nohup python3 yolo-v3/main.py --gpu 0 > nohup_0.out &              COCO in data/coco, in the background

Writes logs/<YYMMDD-HHMMSS>_<name>/: args.yaml (resolved), environment.json, train.log, metrics.jsonl, results.csv,
TensorBoard events, images/, metrics.json and detections.json of the last evaluation, best.pt (highest AP50), last.pt.
"""

import argparse
import datetime
import functools
import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from detection.habana_environment import prepare_habana

if __name__ == "__main__":
    prepare_habana(sys.argv[1:])  # torch reads the environment when it is imported

import torch
from tqdm import tqdm

from detection.aliases import add_training_flags
from detection.checkpoints import load_checkpoint, save_checkpoint
from detection.command_line import DEFAULTS, Parser, device_flags
from detection.data import build_datasets
from detection.data.coco import annotations_digest, repeat_factors
from detection.data.loaders import TrainingBatchSampler, build_evaluation_loader, build_training_loader, collate_samples
from detection.devices import (
    autocast,
    build_scaler,
    choose_precision,
    compile_forward,
    describe_device,
    mark_step_of,
    open_device,
    peak_memory_gib,
)
from detection.drawing import save_png
from detection.errors import (
    CheckpointError,
    DataError,
    DataReadError,
    DeviceMemoryError,
    NumericsError,
    OutputError,
    SettingsError,
    StoppedBySignal,
    UserError,
    exit_with_message,
)
from detection.evaluation import choose_backend, evaluate
from detection.memory import estimate_memory
from detection.models import build_detector, check_image_size, size_multiple
from detection.models.darknet_cfg import cfg_notices, parse_cfg
from detection.pretrained import load_pretrained
from detection.reports import draw_batch, draw_detections, metric_table, protocol_line, write_evaluation
from detection.reproducibility import environment_report, random_state, restore_random_state, seed_everything
from detection.run_loggers import RunLogger, new_run_directory
from detection.schedules import build_schedule, resolve_steps
from detection.settings import (
    SIZE_MULTIPLE,
    Flag,
    Settings,
    changed_settings,
    complete_settings,
    dump_settings,
    load_settings,
)
from detection.stopping import StopRequest
from detection.training import (
    ExponentialAverage,
    Meter,
    NonFiniteLoss,
    build_optimizer,
    set_encoder_frozen,
    set_learning_rates,
    train_step,
)

NARROWEST_BAR = 40  # columns
OUT_OF_MEMORY = "out of memory: lower train.batch_size and raise train.subdivisions, or take a smaller train.image_size"
# May differ between a run and its continuation: where it runs, how long, how often it saves; not what it learns from.
RESUMABLE = (
    "run.device",
    "run.lazy",
    "run.compile",
    "run.deterministic",
    "run.log_frequency",
    "run.logs_path",
    "data.root",
    "data.num_workers",
    "train.steps",
    "train.save_frequency",
    "train.patience",
)


def parse_arguments() -> argparse.Namespace:
    parser = Parser("yolo-v3/main.py", __doc__)
    parser.add_settings()
    add_training_flags(parser)
    add = parser.add_argument
    add(
        "--resume",
        nargs="?",
        const="",
        metavar="DIRECTORY",
        help="continue a run (default: the newest) from its last.pt",
    )
    add("--output", type=Path, metavar="DIRECTORY", help="run directory instead of a new one below run.logs_path")
    add("--dry-run", action="store_true", help="print the plan, take one step that is thrown away, write nothing")
    arguments = parser.parse_intermixed_args()
    if arguments.resume and "=" in arguments.resume:  # `--resume train.steps=9` names no directory
        arguments.settings.append(arguments.resume)
        arguments.resume = ""
    return arguments


def main() -> None:
    arguments = parse_arguments()
    flags = device_flags(arguments)
    checkpoint, directory = None, arguments.output
    if arguments.resume is None:
        settings, notices = load_settings(DEFAULTS, arguments.config, arguments.settings, flags)
    else:
        checkpoint, directory, settings, notices = open_resumed_run(arguments, flags)

    run = Run(settings, fresh=checkpoint is None)
    if checkpoint is not None and list(run.categories.names) != checkpoint["categories"]["names"]:
        raise CheckpointError(
            f"{directory}: trained on the classes {', '.join(checkpoint['categories']['names'])}, "
            f"the data has {', '.join(run.categories.names)}"
        )
    if checkpoint is not None and run.data_digest != checkpoint["data_digest"]:
        raise DataError(
            f"the training annotations are not those that {directory} was trained on: images, boxes or classes differ"
        )
    plan = [*notices, *run.plan()]
    if arguments.dry_run:
        print("\n".join(plan), flush=True)
        run.discarded_step()
        return

    stop = StopRequest()
    if checkpoint is None:
        name = settings.run.name or settings.scheduler.strategy
        directory = new_run_directory(Path(settings.run.logs_path), name, arguments.output)
    try:
        with RunLogger(directory, resume_step=checkpoint["step"] if checkpoint else None) as logger:
            (directory / "images").mkdir(exist_ok=True)
            (directory / "args.yaml").write_text(dump_settings(settings), encoding="utf-8")
            report = environment_report(describe_device(run.device), run.precision)
            # Each continuation has its own environment beside the first one.
            name = f"environment_{checkpoint['step']}.json" if checkpoint else "environment.json"
            (directory / name).write_text(json.dumps(report, indent=2), encoding="utf-8")
            for line in plan:
                logger.line(line)
            try:
                train(run, directory, logger, stop, checkpoint)
            except UserError as error:
                logger.line(error.line, show=False)  # stderr has it too
                raise
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"run directory {directory} cannot be written: {error}") from None


class Run:
    """Everything that is fixed before the first step: device, data, detector and all durations in steps.

    Args:
        fresh: false for a continued run, whose weights all come from its checkpoint.
    """

    def __init__(self, settings: Settings, fresh: bool) -> None:
        train, evaluation = settings.train, settings.evaluation
        self.settings = settings
        self.device = open_device(settings.run)
        self.mark_step = mark_step_of(self.device, settings.run.lazy)
        dtype = choose_precision(self.device, settings.run.precision)
        self.precision = "float32" if dtype is None else str(dtype).removeprefix("torch.")
        self.autocast = functools.partial(autocast, self.device, dtype)
        self.build_scaler = functools.partial(build_scaler, self.device, dtype)

        self.training_set, self.validation_set = build_datasets(
            settings.data, train.image_size, evaluation.image_size, settings.run.seed, settings.yolo.num_classes
        )
        self.categories = self.training_set.annotations.categories
        self.data_digest = annotations_digest(self.training_set.annotations)
        self.repeat_factors = None
        if settings.data.balance == "repeat_factor":
            self.repeat_factors = repeat_factors(self.training_set.annotations, settings.data.balance_threshold)

        self.size_step = SIZE_MULTIPLE
        self.images_per_step = train.batch_size * train.subdivisions
        self.steps_per_epoch = self.sampler(0, 0).images_per_epoch / self.images_per_step
        self.steps = max(self.in_steps(train.steps), 1)
        self.unfreeze_step = self.in_steps(train.unfreeze_step)
        self.ema_ramp = self.in_steps(train.ema_ramp)
        self.save_frequency = max(self.in_steps(train.save_frequency), 1)
        self.evaluate_frequency = max(self.in_steps(evaluation.evaluate_frequency), 1)
        try:
            self.schedule = build_schedule(settings.scheduler, train.learning_rate, self.steps, self.steps_per_epoch)
        except ValueError as error:
            raise SettingsError(str(error)) from None

        seed_everything(settings.run.seed)
        detector = build_detector(settings.yolo, evaluation, len(self.categories.names))
        self.pretrained = load_pretrained(detector.model, settings.yolo) if fresh else []
        self.detector = detector.to(self.device, settings.run.channels_last)
        if detector.criterion is None:
            raise SettingsError("yolo.cfg: a network with new_coords = 1 can detect but not be trained here")
        self.criterion = detector.criterion.to(self.device)
        self.size_step = math.lcm(SIZE_MULTIPLE, size_multiple(detector.model))
        for name, sizes in (
            ("train.image_size", [train.image_size]),
            ("train.multiscale_sizes", train.multiscale_sizes if train.resize_frequency else []),
            ("evaluation.image_size", [evaluation.image_size]),
        ):
            for size in sizes:
                check_image_size(detector.model, name, size)

    def in_steps(self, duration: int | str) -> int:
        return resolve_steps(duration, self.steps_per_epoch)

    def sampler(self, first_step: int, end_step: int) -> TrainingBatchSampler:
        train = self.settings.train
        return TrainingBatchSampler(
            len(self.training_set),
            train.batch_size,
            train.subdivisions,
            (first_step, end_step),
            self.settings.run.seed,
            train.image_size,
            train.resize_frequency,
            train.multiscale_sizes,
            self.repeat_factors,
            self.size_step,
        )

    def plan(self) -> list[str]:
        """What is about to happen, for the user to check before it costs days."""
        settings, train, names = self.settings, self.settings.train, self.categories.names
        parameters = sum(parameter.numel() for parameter in self.detector.model.parameters())
        sizes = f"{train.image_size} px"
        if train.resize_frequency:
            smallest, largest = train.multiscale_sizes
            sizes = f"{smallest} to {largest} px, changed every {train.resize_frequency} steps"
        steps_shown = sorted({0, self.schedule.warmup, *self.schedule.changes(self.steps), self.steps - 1})
        rates = ", ".join(f"{self.schedule.at(step):.3g} at {step}" for step in steps_shown if step < self.steps)
        training, validation = self.training_set.annotations, self.validation_set.annotations
        lines = [
            f"device      {describe_device(self.device)}, {self.precision}",
            f"model       {settings.yolo.encoder}, {parameters:,} parameters",
            f"classes     {len(names)}: {', '.join(names[:10])}{' ...' if len(names) > 10 else ''}",
            f"training    {len(training)} images, {len(training.labels)} boxes, {sizes}",
            f"validation  {len(validation)} images, {len(validation.labels)} boxes, {settings.evaluation.image_size} px"
            f", every {self.evaluate_frequency} steps by {choose_backend(settings.evaluation.backend)}",
            f"batch       {train.batch_size} x {train.subdivisions} subdivisions x 1 process"
            f" = {self.images_per_step} images per step",
            f"duration    {self.steps} steps = {self.steps / self.steps_per_epoch:.1f} epochs"
            f" of {self.steps_per_epoch:.1f} steps",
            f"schedule    {train.optimizer}, {settings.scheduler.strategy}, learning rate {rates}",
        ]
        if settings.yolo.cfg is not None:
            used = {"train.image_size": train.image_size, "evaluation.image_size": settings.evaluation.image_size}
            lines += [f"cfg         {line}" for line in cfg_notices(parse_cfg(settings.yolo.cfg), used)]
        if train.encoder_learning_rate_factor != 1 or train.encoder_batch_norm == "frozen" or self.unfreeze_step:
            lines.append(
                f"encoder     frozen for {self.unfreeze_step} steps, then learning rate x "
                f"{train.encoder_learning_rate_factor:g}, normalisation {train.encoder_batch_norm}"
            )
        lines += [f"pretrained  {line}" for line in self.pretrained]
        for name, annotations in (("training", training), ("validation", validation)):
            lines += [f"{name:<12}left out: {line}" for line in annotations.counts.lines()]
        present = set(training.labels[~training.crowd].tolist())
        if absent := [name for label, name in enumerate(names) if label not in present]:
            lines.append(f"warning     classes without any training box: {', '.join(absent)}")
        return lines

    def discarded_step(self) -> None:
        """Forward, backward and update on the largest size, to see that memory and data hold."""
        train = self.settings.train
        size = train.multiscale_sizes[1] if train.resize_frequency else train.image_size
        estimate = estimate_memory(self.detector.model, self.criterion, train, size, self.autocast, self.device)
        print(estimate.line(), flush=True)
        if estimate.available is not None and estimate.total > estimate.available:
            raise DeviceMemoryError(f"the step is not tried: {OUT_OF_MEMORY}")
        positions = next(iter(self.sampler(0, 1)))
        batch = collate_samples([self.training_set[(index, epoch, size)] for index, epoch, _ in positions])
        model = self.detector.model.train()
        set_encoder_frozen(model, False, train.encoder_batch_norm)
        optimizer = build_optimizer(model, train)
        # A second one adds to gradients that are there; more show nothing new.
        micro_batches = min(train.subdivisions, 2)
        started = time.perf_counter()
        losses = train_step(
            model,
            self.criterion,
            optimizer,
            self.build_scaler(),
            [batch] * micro_batches,
            self.autocast,
            self.device,
            train.clip_norm,
            mark_step=self.mark_step,
        )
        values = ", ".join(f"{name} {value.item():.2f}" for name, value in losses.items())
        seconds = time.perf_counter() - started
        step = (
            "one step" if micro_batches == train.subdivisions else f"2 of a step's {train.subdivisions} micro-batches"
        )
        print(f"dry run     {step} at {size} px: {seconds:.1f} s, {peak_memory_gib(self.device):.1f} GiB, {values}")


def train(run: Run, directory: Path, logger: RunLogger, stop: StopRequest, checkpoint: dict[str, Any] | None) -> None:
    """The training loop: from the first step, or the checkpoint's, to the last."""
    settings, device, criterion = run.settings, run.device, run.criterion
    subdivisions, clip_norm = settings.train.subdivisions, settings.train.clip_norm
    model = run.detector.model.train()
    optimizer = build_optimizer(model, settings.train)
    scaler = run.build_scaler()
    average = ExponentialAverage(model, settings.train.ema_decay, run.ema_ramp) if settings.train.ema_decay else None
    progress: dict[str, Any] = {"best_ap50": None, "best_step": 0, "evaluations_without_rise": 0, "evaluated_step": 0}
    step = 0
    if checkpoint is not None:
        load_state(checkpoint, run, optimizer, scaler, average)
        step, progress = checkpoint["step"], checkpoint["progress"]
    network = compile_forward(model, device) if settings.run.compile else model
    first_step, started = step, time.perf_counter()

    def save(name: str) -> None:
        save_checkpoint(directory / name, state_of(run, step, optimizer, scaler, average, progress))

    def evaluate_and_keep() -> None:
        save("last.pt")  # whatever happens to the evaluation, the steps are kept; a continued run repeats it
        ap50 = evaluate_run(run, average.model if average else model, step, directory, logger, stop) or 0.0
        rises = progress["best_ap50"] is None or ap50 > progress["best_ap50"]
        progress["evaluated_step"] = step
        progress["evaluations_without_rise"] = 0 if rises else progress["evaluations_without_rise"] + 1
        if rises:
            progress["best_ap50"], progress["best_step"] = ap50, step
            save("best.pt")
        save("last.pt")
        meter.restart_clock()

    logger.line(f"run directory {directory}, from step {step}")
    workers = settings.data.num_workers
    batches = iter(build_training_loader(run.training_set, run.sampler(step, run.steps), workers, device))
    meter = Meter(run.images_per_step)
    # A terminal of unknown width (0 columns) shows no bar at all: plain lines are better there.
    has_bar = sys.stderr.isatty() and shutil.get_terminal_size((0, 0)).columns >= NARROWEST_BAR
    bar = tqdm(total=run.steps, initial=step, unit="step", dynamic_ncols=True, disable=not has_bar)
    try:
        if step and (step % run.evaluate_frequency == 0 or step == run.steps) and progress["evaluated_step"] != step:
            evaluate_and_keep()  # the run was stopped during this evaluation
        while step < run.steps:
            if step == first_step or step == run.unfreeze_step:
                set_encoder_frozen(model, step < run.unfreeze_step, settings.train.encoder_batch_norm)
            set_learning_rates(optimizer, functools.partial(run.schedule.at, step))
            waiting = time.perf_counter()
            micro_batches = [next(batches) for _ in range(subdivisions)]
            meter.waited += time.perf_counter() - waiting
            if step == 0:
                picture = draw_batch(micro_batches[0], run.categories.names)
                save_png(directory / "images" / "train_batch.png", picture)
                logger.image(0, "train_batch", picture)
            try:
                losses = train_step(
                    network,
                    criterion,
                    optimizer,
                    scaler,
                    micro_batches,
                    run.autocast,
                    device,
                    clip_norm,
                    mark_step=run.mark_step,
                )
            except NonFiniteLoss as error:
                ids = run.training_set.annotations.image_ids[error.image_indices].tolist()
                raise NumericsError(
                    f"not finite at step {step}: {error.parts}; image ids {ids}; last.pt is of the last "
                    "save; try a lower train.learning_rate or a longer scheduler.warmup"
                ) from None
            if average:
                average.update(model, step)
            meter.add(losses)
            step += 1
            bar.update(1)

            if step % settings.run.log_frequency == 0 or step == run.steps:
                values = meter.read() | {
                    "train/learning_rate": run.schedule.at(step - 1),
                    "train/image_size": micro_batches[-1]["images"].shape[-1],
                }
                logger.scalars(step, values)
                seconds_left = (time.perf_counter() - started) / (step - first_step) * (run.steps - step)
                show_progress(logger, bar, run, step, values, seconds_left)
            if (step % run.evaluate_frequency == 0 or step == run.steps) and stop.signal_number is None:
                evaluate_and_keep()
                patience = settings.train.patience
                if patience is not None and progress["evaluations_without_rise"] >= patience and step < run.steps:
                    logger.line(f"stopped at step {step}: AP50 has not risen in {patience} evaluations")
                    break
            elif step % run.save_frequency == 0:
                save("last.pt")
            stop.check()
    except (StoppedBySignal, DataReadError) as error:
        save("last.pt")
        line = f"{error.line}; saved after step {step}, continue with: yolo-v3/main.py --resume {directory}"
        if isinstance(error, StoppedBySignal):
            raise StoppedBySignal(line, error.signal_number) from None
        raise DataReadError(line) from None
    finally:
        bar.close()
        del batches  # ends the workers
    logger.line(
        f"finished at step {step} in {(time.perf_counter() - started) / 60:.1f} minutes with evaluations; "
        f"best AP50 {progress['best_ap50'] or 0.0:.3f} at step {progress['best_step']}: {directory / 'best.pt'}"
    )


def evaluate_run(
    run: Run, model: torch.nn.Module, step: int, directory: Path, logger: RunLogger, stop: StopRequest
) -> float | None:
    """Score the validation set, log the numbers, draw detections beside the truth; returns AP50."""
    settings, dataset = run.settings.evaluation, run.validation_set
    batch_size = settings.batch_size or run.settings.train.batch_size
    evaluation = evaluate(
        model,
        run.criterion,
        run.detector.postprocess,
        build_evaluation_loader(dataset, batch_size, run.settings.data.num_workers, run.device),
        dataset.annotations,
        run.device,
        run.autocast,
        settings.backend,
        on_batch=stop.check,
    )
    loss = sum(evaluation.losses.values())
    row: dict[str, float | None] = {f"val/{name}": value for name, value in evaluation.metrics.items()}
    row |= {"val/loss": loss, **{f"val/{name}": value for name, value in evaluation.losses.items()}}
    row |= {"val/boxes": len(evaluation.detections), "epoch": step / run.steps_per_epoch}
    logger.evaluation(step, row)
    seconds = evaluation.seconds
    weights = "moving average" if run.settings.train.ema_decay else "weights"
    logger.line(f"evaluation of the {weights}: {protocol_line(run.settings)}")
    logger.line(
        f"step {step}: {len(evaluation.detections)} boxes on {len(dataset)} images, network {seconds['network']:.1f} s"
        f", {evaluation.backend} {seconds['metric']:.1f} s, validation loss {loss:.3f}"
    )
    if evaluation.dropped:
        logger.line(f"warning: {evaluation.dropped} detections were not finite numbers and were dropped")
    for line in metric_table(evaluation):
        logger.line(line)
    picture = draw_detections(dataset, evaluation, settings.visualization_threshold, settings.visualize_images)
    if picture is not None:
        save_png(directory / "images" / f"validation_{step:06d}.png", picture)
        logger.image(step, "validation", picture)
    write_evaluation(directory, evaluation, dataset, step, settings.model_dump(mode="json"))
    return evaluation.metrics["AP50"]


def show_progress(
    logger: RunLogger, bar: tqdm, run: Run, step: int, values: dict[str, float], seconds_left: float
) -> None:
    """The bar's text on a terminal, else a line of its own, so that `tail -f nohup_0.out` reads well."""
    parts = {
        "loss": f"{values['train/loss']:.2f}",
        "lr": f"{values['train/learning_rate']:.3g}",
        "images/s": f"{values['train/images_per_second']:.1f}",
        "memory": f"{peak_memory_gib(run.device):.1f}G",
        "box": f"{values['train/loss_box']:.2f}",
        "objectness": f"{values['train/loss_objectness']:.2f}",
        "class": f"{values['train/loss_class']:.2f}",
        "size": f"{values['train/image_size']}",
        "wait": f"{values['train/wait_fraction']:.0%}",
    }
    text = "  ".join(f"{name} {value}" for name, value in parts.items())
    left = datetime.timedelta(seconds=round(seconds_left))
    logger.line(
        f"step {step}/{run.steps}  epoch {step / run.steps_per_epoch:.1f}  {text}  left {left}", show=bool(bar.disable)
    )
    if not bar.disable:
        bar.set_postfix(parts)


def state_of(
    run: Run, step: int, optimizer: Any, scaler: Any, average: ExponentialAverage | None, progress: dict[str, Any]
) -> dict[str, Any]:
    """Everything that a continued run, or a script that only has this file, needs; after `step` optimizer steps."""
    model = run.detector.model
    return {
        "step": step,
        "settings": run.settings.model_dump(mode="json"),
        "data_digest": run.data_digest,
        "categories": {"names": list(run.categories.names), "ids": list(run.categories.ids)},
        "pixel_mean": model.get_buffer("pixel_mean").flatten().tolist(),
        "pixel_std": model.get_buffer("pixel_std").flatten().tolist(),
        "model": model.state_dict(),
        "average": average.model.state_dict() if average else None,
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "random": random_state(),
        "progress": dict(progress),
    }


def load_state(
    checkpoint: dict[str, Any], run: Run, optimizer: Any, scaler: Any, average: ExponentialAverage | None
) -> None:
    try:
        run.detector.model.load_state_dict(checkpoint["model"])
        if average:
            average.model.load_state_dict(checkpoint["average"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:
            scaler.load_state_dict(checkpoint["scaler"])
        restore_random_state(checkpoint["random"])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"the checkpoint does not fit the run of its settings: {reason}") from None


def open_resumed_run(
    arguments: argparse.Namespace, flags: list[Flag]
) -> tuple[dict[str, Any], Path, Settings, list[str]]:
    """Checkpoint, directory, settings and notices of a run to continue; the command line may change little of it."""
    for name in ("config", "output"):
        if getattr(arguments, name):
            raise SettingsError(f"--{name} and --resume are both given; a continued run keeps its own")
    if arguments.resume:
        directory = Path(arguments.resume)
    else:
        logs = Path(load_settings(DEFAULTS, [], arguments.settings)[0].run.logs_path)
        found = sorted(logs.glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise SettingsError(f"--resume without a directory: there is no {logs}/*/last.pt here")
        directory = found[-1].parent
    checkpoint = load_checkpoint(directory / "last.pt")
    old = complete_settings(checkpoint["settings"], DEFAULTS)
    settings, notices = load_settings(old, [], arguments.settings, flags)
    to_the_end = old.scheduler.strategy == "CosineAnnealingWarmRestartsWithWarmup" and old.scheduler.T_0 is None
    allowed = [key for key in RESUMABLE if not (key == "train.steps" and to_the_end)]
    for key, (before, after) in changed_settings(old, settings).items():
        if key not in allowed:
            raise SettingsError(
                f"--resume: {key} was {before!r} and cannot become {after!r}, it would be another run; "
                f"these may change: {', '.join(allowed)}"
            )
        notices.append(f"continued with {key} = {after!r} (was {before!r})")
    return checkpoint, directory, settings, notices


if __name__ == "__main__":
    exit_with_message(main, OUT_OF_MEMORY)
