"""Train a detector on COCO-format images.

python3 yolo-v3/main.py --config recipes/quickstart.yaml           built-in digits, about 4 minutes on 2 CPU cores
python3 yolo-v3/main.py data.root=/my/dataset train.batch_size=16  your own images
python3 yolo-v3/main.py --resume logs/240224-211713_LambdaLR       continue, number for number
nohup python3 yolo-v3/main.py --gpu 0 > nohup_0.out &              COCO in data/coco, in the background

Writes logs/<YYMMDD-HHMMSS>_<name>/: args.yaml (resolved), environment.json, train.log, metrics.jsonl, results.csv,
TensorBoard events, images/, metrics.json and detections.json of the last evaluation, best.pt (highest AP50), last.pt.
"""

import argparse
import contextlib
import datetime
import functools
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from detection.habana_environment import prepare_habana

if __name__ == "__main__":
    prepare_habana(sys.argv[1:])  # torch reads the environment when it is imported

import cv2
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from detection.aliases import add_training_flags
from detection.checkpoint_writer import CheckpointWriter
from detection.checkpoints import load_checkpoint
from detection.coco_metric import choose_backend
from detection.command_line import DEFAULTS, Parser, device_flags
from detection.data import build_datasets, make_builtin
from detection.data.checks import check_before_training
from detection.data.coco import annotations_digest, repeat_factors
from detection.data.fit_checks import describe_network
from detection.data.loaders import (
    Batch,
    TrainingBatchSampler,
    build_evaluation_loader,
    build_training_loader,
    collate_samples,
)
from detection.devices import (
    autocast,
    build_scaler,
    choose_precision,
    compile_forward,
    describe_device,
    mark_step_of,
    open_device,
    peak_memory_gib,
    prepare_distributed,
)
from detection.diagnosis import diagnose_batch, read_bundle, write_bundle
from detection.distributed import Ranks, Watchdog, device_of_rank, read_environment, synchronise_batch_norm
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
from detection.evaluation import Evaluation, find_all, score_found
from detection.memory import estimate_memory
from detection.models import build_detector, check_image_size, size_multiple
from detection.models.darknet_cfg import cfg_notices, parse_cfg
from detection.preflight import check_disk, check_shared_memory, try_checkpoint, try_evaluation
from detection.pretrained import load_pretrained
from detection.reports import draw_batch, draw_detections, metric_table, protocol_line, write_evaluation
from detection.reproducibility import environment_report, seed_everything, seed_step
from detection.run_loggers import RunLogger, SilentLogger, new_run_directory
from detection.run_state import RunState
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
from detection.skipped_steps import NonFiniteLoss, StepResult
from detection.stopping import StopRequest, stopped_by
from detection.training import Meter, set_encoder_frozen, set_learning_rates, train_step

ACCEPT = "--accept-changes continues all the same"
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
    "train.save_minutes",
    "train.keep_checkpoints",
    "train.most_skipped_steps",
    "train.patience",
    "run.preflight",
    "run.timeout_minutes",
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
    add("--accept-changes", action="store_true", help="with --resume: continue under settings that make it another run")
    add("--output", type=Path, metavar="DIRECTORY", help="run directory instead of a new one below run.logs_path")
    add("--dry-run", action="store_true", help="print the plan, check everything with a step that is thrown away")
    add("--replay", type=Path, metavar="DIRECTORY", help="look into a step that was not finite: RUN/not_finite_<step>")
    arguments = parser.parse_intermixed_args()
    if arguments.resume and "=" in arguments.resume:  # `--resume train.steps=9` names no directory
        arguments.settings.append(arguments.resume)
        arguments.resume = ""
    return arguments


def main() -> None:
    arguments = parse_arguments()
    flags = device_flags(arguments)
    if arguments.replay is not None:
        replay_bundle(arguments, flags)
        return
    checkpoint, directory = None, arguments.output
    if arguments.resume is None:
        if arguments.accept_changes:
            raise SettingsError("--accept-changes belongs to --resume")
        settings, notices = load_settings(DEFAULTS, arguments.config, arguments.settings, flags)
    else:
        checkpoint, directory, settings, notices = open_resumed_run(arguments, flags)

    ranks = join_ranks(settings)
    try:
        run = Run(settings, ranks, fresh=checkpoint is None)
        if checkpoint is not None:
            notices += check_continued(run, checkpoint, directory, arguments.accept_changes)
        plan = [*notices, *run.plan()]
        if arguments.dry_run:
            if ranks.is_first:
                print("\n".join(plan), flush=True)
            state = run.new_state()
            run.try_step(state, print if ranks.is_first else lambda line: None)
            if ranks.is_first:
                target, content = directory or Path(settings.run.logs_path), run.checkpoint(state)
                print(check_disk(target, content, settings.train.keep_checkpoints))
                try_checkpoint(target, content)
                print(f"{run.try_evaluation(state)}; a checkpoint was written and read back", flush=True)
            return
        run_and_log(run, plan, directory, checkpoint)
    finally:
        ranks.close()


def replay_bundle(arguments: argparse.Namespace, flags: list[Flag]) -> None:
    """Take the first step of a bundle again and say where numbers stop being finite; exit code 4 if they do."""
    checkpoint, report = read_bundle(arguments.replay)
    old = complete_settings(checkpoint["settings"], DEFAULTS)
    settings, notices = load_settings(old, [], arguments.settings, flags)
    print("\n".join(notices), end="")
    run = Run(settings, join_ranks(settings), fresh=False)
    check_continued(run, checkpoint, arguments.replay, accept=True)
    state = run.new_state()
    state.load(checkpoint)
    step = report["steps"][0]["step"]
    set_encoder_frozen(state.model, step < run.unfreeze_step, settings.train.encoder_batch_norm)
    micro_batches = [
        collate_samples([run.training_set[position] for position in positions])
        for positions in run.sampler(step, step + 1)
    ]
    seed_step(settings.run.seed, step, run.ranks.rank)
    ids = run.training_set.annotations.image_ids
    finite = True
    for batch in micro_batches:
        lines = diagnose_batch(state.model, run.criterion, batch, run.autocast, run.device, ids)
        finite &= not lines
        print("\n".join(lines or ["finite: loss, outputs and gradient"]), flush=True)
    if not finite:
        raise NumericsError(f"step {step} is not finite here either")


def join_ranks(settings: Settings) -> Ranks:
    """This process among those that torchrun started, or alone, on its device."""
    _, local_rank, size = read_environment()
    device = open_device(settings.run, device_of_rank(settings.run.device, local_rank, size))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return Ranks(device, functools.partial(prepare_distributed, device.type), 60 * settings.run.timeout_minutes)


def check_continued(run: "Run", checkpoint: dict[str, Any], directory: Path, accept: bool) -> list[str]:
    """Refuse to continue on other classes than those of the checkpoint, and on other data or under other conditions.

    Args:
        accept: only name what differs, but for the classes.

    Returns:
        What differs, a line each.
    """
    if list(run.categories.names) != checkpoint["categories"]["names"]:
        raise CheckpointError(
            f"{directory}: trained on the classes {', '.join(checkpoint['categories']['names'])}, "
            f"the data has {', '.join(run.categories.names)}"
        )
    differences = []
    if run.data_digest != checkpoint["data_digest"]:
        line = f"the training annotations are not those of {directory}: images, boxes or classes differ"
        if not accept:
            raise DataError(f"{line} ({ACCEPT})")
        differences.append(line)
    for name, before in checkpoint.get("conditions", {}).items():  # older checkpoints have none
        if before != (now := run.conditions()[name]):
            line = f"{directory} was trained with {name} {before}, this is {now}"
            if not accept:
                raise SettingsError(f"{line}: the numbers would be others ({ACCEPT})")
            differences.append(line)
    return [f"warning     {line}" for line in differences]


def run_and_log(run: "Run", plan: list[str], directory: Path | None, checkpoint: dict[str, Any] | None) -> None:
    """Train, with everything that happens written into the run directory; only the first process writes."""
    settings, ranks = run.settings, run.ranks
    stop = StopRequest()
    if checkpoint is None and ranks.is_first:
        name = settings.run.name or settings.scheduler.strategy
        directory = new_run_directory(Path(settings.run.logs_path), name, directory)
    directory = Path(ranks.broadcast(str(directory)))
    try:
        resumed = checkpoint["step"] if checkpoint else None
        evaluated = checkpoint["progress"]["evaluated_step"] if checkpoint else None
        with RunLogger(directory, resumed, evaluated) if ranks.is_first else SilentLogger() as logger:
            if ranks.is_first:
                (directory / "images").mkdir(exist_ok=True)
                (directory / "args.yaml").write_text(dump_settings(settings), encoding="utf-8")
                report = environment_report(describe_device(run.device), run.precision)
                # Each continuation has its own environment beside the first one.
                name = "environment.json" if resumed is None else f"environment_{resumed}.json"
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
        ranks: this process among those of the run, with its device.
        fresh: false for a continued run, whose weights all come from its checkpoint.
    """

    def __init__(self, settings: Settings, ranks: Ranks, fresh: bool) -> None:
        train, evaluation = settings.train, settings.evaluation
        self.settings, self.ranks = settings, ranks
        self.device = ranks.device
        self.mark_step = mark_step_of(self.device, settings.run.lazy)
        dtype = choose_precision(self.device, settings.run.precision)
        self.precision = "float32" if dtype is None else str(dtype).removeprefix("torch.")
        self.autocast = functools.partial(autocast, self.device, dtype)
        self.build_scaler = functools.partial(build_scaler, self.device, dtype)

        if ranks.is_first:
            make_builtin(settings.data)
        ranks.broadcast(None)  # the others wait for it
        self.training_set, self.validation_set = build_datasets(
            settings.data,
            train.image_size,
            evaluation.image_size,
            settings.run.seed,
            settings.yolo.num_classes,
            evaluation.max_images,
        )
        self.categories = self.training_set.annotations.categories
        self.data_digest = annotations_digest(self.training_set.annotations)
        self.repeat_factors = None
        if settings.data.balance == "repeat_factor":
            self.repeat_factors = repeat_factors(self.training_set.annotations, settings.data.balance_threshold)

        self.size_step = SIZE_MULTIPLE
        self.images_per_step = train.batch_size * train.subdivisions * ranks.size
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
        if train.sync_batch_norm:
            detector = detector._replace(model=synchronise_batch_norm(detector.model, self.device))
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
        smallest = train.multiscale_sizes[0] if train.resize_frequency else train.image_size
        if train.batch_size == 1 and smallest == size_multiple(detector.model):
            raise SettingsError(
                f"train.batch_size=1 with images of {smallest} px: the coarsest map has one cell, and a normalisation "
                "needs more than one value; take train.batch_size=2 or larger images"
            )
        network = describe_network(detector.model, settings.yolo, train)
        self.data_warnings = check_before_training(self.training_set, self.validation_set, settings.data, network)

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
            self.ranks.rank,
            self.ranks.size,
        )

    def image_ids_of_step(self, step: int) -> list[int]:
        """Of all micro-batches and processes."""
        images = range(step * self.images_per_step, (step + 1) * self.images_per_step)
        sampler = self.sampler(step, step + 1)
        return [int(self.training_set.annotations.image_ids[sampler.image_at(place)[0]]) for place in images]

    def new_state(self) -> RunState:
        """Before the first step."""
        return RunState(
            self.detector.model, self.settings.train, self.ema_ramp, self.build_scaler(), self.ranks.average_
        )

    def conditions(self) -> dict[str, str | int]:
        """What, besides settings and annotations, decides which numbers come out."""
        return {"processes": self.ranks.size, "image decoder": f"OpenCV {cv2.__version__}"}

    def checkpoint(self, state: RunState) -> dict[str, Any]:
        """Everything that a continued run, or a script that has only this file, needs; the tensors are live."""
        model = self.detector.model
        return {
            "settings": self.settings.model_dump(mode="json"),
            "data_digest": self.data_digest,
            "conditions": self.conditions(),
            "categories": {"names": list(self.categories.names), "ids": list(self.categories.ids)},
            "pixel_mean": model.get_buffer("pixel_mean").flatten().tolist(),
            "pixel_std": model.get_buffer("pixel_std").flatten().tolist(),
            **state.content(),
        }

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
            f"batch       {train.batch_size} x {train.subdivisions} subdivisions x {self.ranks.size} "
            f"process{'es' if self.ranks.size > 1 else ''} = {self.images_per_step} images per step",
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
        return lines + self.data_warnings

    def try_step(self, state: RunState, say: Callable[[str], None]) -> None:
        """A whole step at the largest size, with all its memory, that changes nothing."""
        train = self.settings.train
        size = train.multiscale_sizes[1] if train.resize_frequency else train.image_size
        estimate = estimate_memory(self.detector.model, self.criterion, train, size, self.autocast, self.device)
        say(estimate.line())
        if estimate.available is not None and estimate.total > estimate.available:
            raise DeviceMemoryError(f"the step is not tried: {OUT_OF_MEMORY}")
        positions = next(iter(self.sampler(state.step, state.step + 1)))
        batch = collate_samples([self.training_set[(index, epoch, size)] for index, epoch, _ in positions])
        set_encoder_frozen(state.model, False, train.encoder_batch_norm)
        # A second one adds to gradients that are there; more show nothing new.
        micro_batches = min(train.subdivisions, 2)
        scale = state.scaler.state_dict()
        started = time.perf_counter()
        result = self.take_step(state, self.wrapped(state.model), [batch] * micro_batches, discard=True)
        values = ", ".join(f"{name} {value.item():.2f}" for name, value in result.losses.items())
        seconds = time.perf_counter() - started
        if scale:
            state.scaler.load_state_dict(scale)
        state.optimizer.zero_grad(set_to_none=True)
        step = (
            "one step" if micro_batches == train.subdivisions else f"2 of a step's {train.subdivisions} micro-batches"
        )
        memory = peak_memory_gib(self.device)
        say(f"dry run     {step} at {size} px: {seconds:.1f} s, {memory:.1f} GiB, {values}; thrown away")
        shared = check_shared_memory(
            self.settings.data.num_workers, sum(batch[key].nbytes for key in ("images", "boxes", "labels"))
        )
        if shared is not None:
            say(shared)

    def try_evaluation(self, state: RunState) -> str:
        """Two validation images through network and metric."""
        evaluator = self.detector._replace(model=state.evaluated_model)
        found = try_evaluation(
            evaluator, self.validation_set, self.device, self.autocast, self.settings.evaluation.backend
        )
        return f"evaluator   {found.backend} ran on two images"

    def wrapped(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model as training calls it: several processes exchange its gradients. Anew when a part (un)freezes."""
        if self.settings.run.compile:
            model = compile_forward(model, self.device)
        if self.ranks.size == 1:
            return model
        # Statistics of normalisations are averaged once per step, see NormalisationStatistics: buffers stay.
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def take_step(
        self, state: RunState, model: torch.nn.Module, micro_batches: list[Batch], discard: bool = False
    ) -> StepResult:
        return train_step(
            model,
            self.criterion,
            state.optimizer,
            state.scaler,
            micro_batches,
            self.autocast,
            self.device,
            self.settings.train.clip_norm,
            state.statistics,
            discard,
            self.mark_step,
        )


def train(run: Run, directory: Path, logger: RunLogger, stop: StopRequest, checkpoint: dict[str, Any] | None) -> None:
    """The training loop: from the first step, or the checkpoint's, to the last."""
    settings, ranks = run.settings, run.ranks
    state = run.new_state()
    if checkpoint is not None:
        state.load(checkpoint)
    saver = Saver(run, state, directory)
    if settings.run.preflight:
        run.try_step(state, logger.line)
        if ranks.is_first:
            logger.line(check_disk(directory, run.checkpoint(state), settings.train.keep_checkpoints))
            saver.save()  # it can be written and read, and a run that is killed early continues too
            logger.line(run.try_evaluation(state))
            saver.wait()
    first_step, started = state.step, time.perf_counter()
    logger.line(f"run directory {directory}, from step {state.step}")

    batches = iter(
        build_training_loader(
            run.training_set, run.sampler(state.step, run.steps), settings.data.num_workers, run.device
        )
    )
    meter = Meter(run.images_per_step)
    watchdog = Watchdog(ranks, lambda: state.step)
    # A terminal of unknown width (0 columns) shows no bar at all: plain lines are better there.
    has_bar = ranks.is_first and sys.stderr.isatty() and shutil.get_terminal_size((0, 0)).columns >= NARROWEST_BAR
    bar = tqdm(total=run.steps, initial=state.step, unit="step", dynamic_ncols=True, disable=not has_bar)

    def evaluate_and_keep() -> None:
        # Whatever happens to the evaluation, the steps are kept; a continued run repeats it.
        saver.save(numbered=saver.due())
        watchdog.rest()
        ap50 = evaluate_run(run, state.evaluated_model, state.step, directory, logger, stop) or 0.0
        saver.save(best=state.record_evaluation(ap50))
        meter.restart_clock()

    try:
        due = state.step % run.evaluate_frequency == 0 or state.step == run.steps
        if state.step and due and state.evaluated_step != state.step:
            evaluate_and_keep()  # the run was stopped during this evaluation
        while state.step < run.steps:
            step = state.step
            watchdog.beat()
            stopped = ranks.agree(lambda: stop.signal_number or 0)
            if step in (first_step, run.unfreeze_step):
                set_encoder_frozen(state.model, step < run.unfreeze_step, settings.train.encoder_batch_norm)
                model = run.wrapped(state.model)
            set_learning_rates(state.optimizer, functools.partial(run.schedule.at, step - state.skipped.total))
            seed_step(settings.run.seed, step, ranks.rank)
            waiting = time.perf_counter()
            micro_batches = [next(batches) for _ in range(settings.train.subdivisions)]
            meter.waited += time.perf_counter() - waiting
            if step == 0:
                picture = draw_batch(micro_batches[0], run.categories.names)
                logger.image(0, "train_batch", picture)
                if ranks.is_first:
                    save_png(directory / "images" / "train_batch.png", picture)
            result = run.take_step(state, model, micro_batches)
            if state.average:
                state.average.update(state.model, step, result.finite)
            state.skipped.add(step, result)
            meter.add(result)
            state.step += 1
            bar.update(1)

            if state.step % settings.run.log_frequency == 0 or state.step == run.steps:
                for skipped in state.skipped.read(ranks.average_of):
                    logger.line(
                        f"warning: step {skipped} was skipped, its loss or gradient was not finite; nothing changed"
                    )
                size = micro_batches[-1]["images"].shape[-1]
                left = (time.perf_counter() - started) / (state.step - first_step) * (run.steps - state.step)
                report_progress(logger, bar, run, state, ranks.average(meter.read()), size, left)
                check_scale(state)
            signal_number = stopped()
            if (state.step % run.evaluate_frequency == 0 or state.step == run.steps) and not signal_number:
                evaluate_and_keep()
                patience = settings.train.patience
                if patience is not None and state.evaluations_without_rise >= patience and state.step < run.steps:
                    logger.line(f"stopped at step {state.step}: AP50 has not risen in {patience} evaluations")
                    break
            elif saver.due():
                saver.save(numbered=True)
            saver.check()
            if signal_number:
                raise stopped_by(signal_number)
    except NonFiniteLoss as error:
        saver.wait()
        bundle = directory / f"not_finite_{min(error.losses):06d}"
        if ranks.is_first:
            images = {step: run.image_ids_of_step(step) for step in error.losses}
            write_bundle(bundle, run.checkpoint(state), settings.run.seed, error.losses, images)
        raise NumericsError(
            f"{error.line}; kept in {bundle}, look into it with: yolo-v3/main.py --replay {bundle}; try a lower "
            "train.learning_rate or a longer scheduler.warmup"
        ) from None
    except (StoppedBySignal, DataReadError) as error:
        saver.save()
        saver.wait()
        line = f"{error.line}; saved after step {state.step}, continue with: yolo-v3/main.py --resume {directory}"
        if isinstance(error, StoppedBySignal):
            raise StoppedBySignal(line, error.signal_number) from None
        raise DataReadError(line) from None
    except RuntimeError as error:
        failure = ranks.explain(error, state.step)
        if failure is None:
            raise
        raise failure from None
    finally:
        watchdog.rest()
        bar.close()
        del batches  # ends the workers
    saver.wait()
    logger.line(
        f"finished at step {state.step} in {(time.perf_counter() - started) / 60:.1f} minutes with evaluations; "
        f"best AP50 {state.best_ap50 or 0.0:.3f} at step {state.best_step}: {directory / 'best.pt'}"
    )


class Saver:
    """Decides when this process writes checkpoints: only the first of a run does."""

    def __init__(self, run: Run, state: RunState, directory: Path) -> None:
        self.run, self.state = run, state
        self.writer = CheckpointWriter(directory, run.settings.train.keep_checkpoints) if run.ranks.is_first else None
        self.saved = time.monotonic()

    def due(self) -> bool:
        minutes = self.run.settings.train.save_minutes
        late = minutes is not None and time.monotonic() - self.saved >= 60 * minutes
        return late or self.state.step % self.run.save_frequency == 0

    def save(self, best: bool = False, numbered: bool = False) -> None:
        """Returns when the state is copied; a thread writes it."""
        self.saved = time.monotonic()
        if self.writer is not None:
            number = self.state.step if numbered else None
            self.writer.save(self.run.checkpoint(self.state), best=best, number=number)

    def check(self) -> None:
        """Raises:
        OutputError: a write has failed.
        """
        if self.writer is not None:
            self.writer.check()

    def wait(self) -> None:
        """Until everything is on the disk; raises like `check`."""
        if self.writer is not None:
            self.writer.wait()


def check_scale(state: RunState) -> None:
    """Raises:
    NumericsError: fp16's scale has sunk below 1: even unscaled gradients overflow.
    """
    if state.scaler.is_enabled() and state.scaler.get_scale() < 1:
        raise NumericsError(
            f"step {state.step}: the loss scale has sunk to {state.scaler.get_scale():g}, gradients overflow in fp16; "
            "take run.precision=bf16 or off, or a lower train.learning_rate"
        )


def evaluate_run(
    run: Run, model: torch.nn.Module, step: int, directory: Path, logger: RunLogger, stop: StopRequest
) -> float | None:
    """Score the validation set, log the numbers, draw detections beside the truth; returns AP50."""
    settings, dataset, ranks = run.settings.evaluation, run.validation_set, run.ranks
    batch_size = settings.batch_size or run.settings.train.batch_size
    workers = run.settings.data.num_workers
    found = find_all(
        model,
        run.criterion,
        run.detector.postprocess,
        build_evaluation_loader(dataset, batch_size, workers, run.device, ranks.rank, ranks.size),
        run.device,
        run.autocast,
        # Where others wait for this process's share it stops afterwards; last.pt has been written.
        on_batch=stop.check if ranks.size == 1 else lambda: None,
    )
    shares, evaluation = ranks.gather(found), None
    if shares is not None:  # the first process scores
        evaluation = score_found(shares, dataset.annotations, settings.backend)
        report_evaluation(run, evaluation, step, directory, logger)
    return ranks.broadcast(None if evaluation is None else evaluation.metrics["AP50"])


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
    weights = "moving average" if run.settings.train.ema_decay else "weights"
    logger.line(f"evaluation of the {weights}: {protocol_line(run.settings)}")
    logger.line(
        f"step {step}: {len(evaluation.detections)} boxes on {len(dataset)} images, {', '.join(parts)}, "
        f"validation loss {loss:.3f}"
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


def report_progress(
    logger: RunLogger, bar: tqdm, run: Run, state: RunState, values: dict[str, float], size: int, seconds_left: float
) -> None:
    """Numbers into the logs; on a terminal the bar's text, else a line, so that `tail -f nohup_0.out` reads well."""
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
    checkpoint = load_last(directory)
    old = complete_settings(checkpoint["settings"], DEFAULTS)
    settings, notices = load_settings(old, [], arguments.settings, flags)
    to_the_end = old.scheduler.strategy == "CosineAnnealingWarmRestartsWithWarmup" and old.scheduler.T_0 is None
    allowed = [key for key in RESUMABLE if not (key == "train.steps" and to_the_end)]
    changes = changed_settings(old, settings)
    refused = {key: values for key, values in changes.items() if key not in allowed}
    if refused and not arguments.accept_changes:
        named = ", ".join(f"{key} was {old!r} and cannot become {new!r}" for key, (old, new) in refused.items())
        raise SettingsError(
            f"--resume: {named}, it would be another run ({ACCEPT}); these may change: {', '.join(allowed)}"
        )
    notices += [f"continued with {key} = {after!r} (was {before!r})" for key, (before, after) in changes.items()]
    return checkpoint, directory, settings, notices


def load_last(directory: Path) -> dict[str, Any]:
    """The newest checkpoint of a run; where it is damaged, the error names others that are whole."""
    try:
        return load_checkpoint(directory / "last.pt")
    except CheckpointError as error:
        whole = []
        for path in sorted(directory.glob("*.pt")):
            with contextlib.suppress(CheckpointError, KeyError):
                whole.append(f"{path.name} (step {load_checkpoint(path)['step']})")
        if not whole:
            raise
        raise CheckpointError(f"{error}; whole, to be copied to last.pt: {', '.join(whole)}") from None


if __name__ == "__main__":
    exit_with_message(main, OUT_OF_MEMORY)
