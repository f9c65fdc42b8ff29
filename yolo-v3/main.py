"""Train a detector on COCO-format images.

python3 yolo-v3/main.py --config recipes/quickstart.yaml           built-in digits, about 3 minutes on 2 CPU cores
python3 yolo-v3/main.py data.root=/my/dataset train.batch_size=16  your own images
python3 yolo-v3/main.py --resume logs/240224-211713_LambdaLR       continue, number for number
nohup python3 yolo-v3/main.py --gpu 0 > nohup_0.out &              COCO in data/coco, in the background

Writes logs/<YYMMDD-HHMMSS>_<name>/: args.yaml (resolved), environment.json, train.log, metrics.jsonl, results.csv,
TensorBoard events, images/, metrics.json and detections.json of the last evaluation, best.pt (highest AP50), last.pt.
"""

import argparse
import functools
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from detection.runtime.habana import prepare_habana

if __name__ == "__main__":
    prepare_habana(sys.argv[1:])  # torch reads the environment when it is imported

from tqdm import tqdm

from detection.config.aliases import add_training_flags
from detection.config.command_line import DEFAULTS, Parser, device_flags
from detection.config.loading import Flag, complete_settings, dump_settings, load_settings
from detection.contract import Batch
from detection.data.loaders import build_evaluation_loader, build_training_loader
from detection.data.workers import prepare_process, restore_default_sigchld
from detection.drawing.boxes import save_png
from detection.errors import (
    OUT_OF_MEMORY,
    DataReadError,
    NumericsError,
    OutputError,
    SettingsError,
    StoppedBySignal,
    UserError,
    exit_with_message,
    known_failure,
)
from detection.evaluation.evaluate import compute_metrics, run_inference
from detection.evaluation.report import draw_batch
from detection.runtime.devices import describe_device
from detection.runtime.distributed import Watchdog
from detection.runtime.profiling import StepProfiler, waiting_for_data
from detection.runtime.reproducibility import environment_report, seed_step
from detection.runtime.run_directory import new_run_directory
from detection.runtime.signals import StopRequest, stopped_by
from detection.training.checkpoint_writer import LAST, Saver
from detection.training.console import plan_lines, report_evaluation, report_progress, report_speed
from detection.training.dry_run import check_disk, try_checkpoint, try_evaluation, try_step
from detection.training.loggers import RunLogger, SilentLogger
from detection.training.optimizer import set_backbone_frozen, set_learning_rates
from detection.training.prefetch import Prefetcher
from detection.training.replay import read_bundle, retake_step, write_bundle
from detection.training.resume import check_continued, open_resumed_run
from detection.training.run import Run, join_ranks
from detection.training.skipped_steps import NonFiniteLoss
from detection.training.state import RunState
from detection.training.unreadable_images import STOP_UNREADABLE, TooManyUnreadable, UnreadableImages

NARROWEST_BAR = 40  # columns


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
    add("--accept-changes", action="store_true", help="with --resume: though it makes another run")
    add("--output", type=Path, metavar="DIRECTORY", help="run directory instead of a new one below run.logs_path")
    add("--dry-run", action="store_true", help="the plan, and every check; leaves nothing behind")
    add("--profile", action="store_true", help="table and trace of a few steps, in the log")
    add("--replay", type=Path, metavar="DIRECTORY", help="look into a step that was non-finite: RUN/not_finite_<step>")
    arguments = parser.parse_intermixed_args()
    if arguments.resume and "=" in arguments.resume:  # `--resume train.steps=9` names no directory
        arguments.settings.append(arguments.resume)
        arguments.resume = ""
    return arguments


def main() -> None:
    prepare_process()
    arguments = parse_arguments()
    flags = device_flags(arguments)
    if arguments.profile and (arguments.dry_run or arguments.replay is not None):
        raise SettingsError(f"--profile belongs to a run, not to --{'dry-run' if arguments.dry_run else 'replay'}")
    if arguments.dry_run and arguments.replay is not None:
        raise SettingsError("--dry-run and --replay are both given")
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
        plan = [*notices, *plan_lines(run)]
        if arguments.dry_run:
            try_everything(run, plan, directory or Path(settings.run.logs_path))
        else:
            run_and_log(run, plan, directory, checkpoint, arguments.profile)
    except RuntimeError as error:
        failure = ranks.explain(error, 0)
        if failure is None:
            raise
        raise failure from None
    finally:
        ranks.close()


def try_everything(run: Run, plan: list[str], target: Path) -> None:
    """What `--dry-run` does: the plan, and every check, with nothing left behind."""
    say = print if run.ranks.is_first else lambda line: None
    say("\n".join(plan))
    state = run.new_state()
    try_step(run, state, say)
    if run.ranks.is_first:
        content = run.checkpoint(state)
        say(check_disk(target, content, run.settings.train.keep_checkpoints))
        try_checkpoint(target, content)
        say(f"{try_evaluation(run, state)}; a checkpoint was written and read back")


def replay_bundle(arguments: argparse.Namespace, flags: list[Flag]) -> None:
    """Take the first step of a bundle again and say where numbers stop being finite; exit code 4 if they do."""
    checkpoint, report = read_bundle(arguments.replay)
    old = complete_settings(checkpoint["settings"], DEFAULTS)
    settings, notices = load_settings(old, [], arguments.settings, flags)
    processes = checkpoint["conditions"]["processes"]
    run = Run(settings, join_ranks(settings), fresh=False, processes=processes)
    notices += check_continued(run, checkpoint, arguments.replay, accept=True)
    print("".join(f"{line}\n" for line in notices), end="")
    finite = True
    for lines in retake_step(run, checkpoint, report["steps"][0]["step"]):
        finite &= not lines
        print("\n".join(lines or ["finite: loss, outputs and gradient"]), flush=True)
    if not finite:
        raise NumericsError(f"step {report['steps'][0]['step']} is non-finite here either")


def run_and_log(
    run: Run, plan: list[str], directory: Path | None, checkpoint: dict[str, Any] | None, profiled: bool
) -> None:
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
                train(run, directory, logger, stop, checkpoint, profiled)
            except UserError as error:
                logger.line(error.line, show=False)  # stderr has it too
                raise
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"run directory {directory} cannot be written: {error}") from None


def train(
    run: Run,
    directory: Path,
    logger: RunLogger,
    stop: StopRequest,
    checkpoint: dict[str, Any] | None,
    profiled: bool = False,
) -> None:
    """From the first step, or the checkpoint's, to the last; whatever ends it early, its steps are kept."""
    state = run.new_state()
    if checkpoint is not None:
        state.load(checkpoint)
        if run.ranks.size > 1:
            state.meter.restart()  # what was summed up is of the first process
    saver = Saver(run, state, directory)
    if run.settings.run.preflight:
        try_step(run, state, logger.line)
        if run.ranks.is_first:
            logger.line(check_disk(directory, run.checkpoint(state), run.settings.train.keep_checkpoints))
            saver.save()  # it can be written and read, and a run that is killed early continues too
            logger.line(try_evaluation(run, state))
            saver.wait()
    started = time.perf_counter()
    logger.line(f"run directory {directory}, from step {state.step}")
    profiler = StepProfiler(directory, run.device, logger.line, profiled and run.ranks.is_first)
    try:
        take_steps(run, state, saver, directory, logger, stop, profiler)
    except NonFiniteLoss as error:
        saver.save()  # skipped steps have changed nothing
        saver.wait()
        bundle = directory / f"non_finite_{min(error.losses):06d}"
        if run.ranks.is_first:
            images = {step: run.image_ids_of_step(step) for step in error.losses}
            write_bundle(bundle, run.checkpoint(state), run.settings.run.seed, error.losses, images)
        raise NumericsError(
            f"{error.line}; kept in {bundle}, look into it with: yolo-v3/main.py --replay {bundle}; try a lower "
            "train.learning_rate or a longer scheduler.warmup"
        ) from None
    except (StoppedBySignal, DataReadError) as error:
        saver.save()
        saver.wait()
        # Only the first process saves: where another one alone ends here, what is on the disk is older.
        saved = run.ranks.is_first or isinstance(error, StoppedBySignal | TooManyUnreadable)
        when = f"saved after step {state.step}, " if saved else ""
        line = f"{error.line}; {when}continue with: yolo-v3/main.py --resume {directory}"
        if isinstance(error, StoppedBySignal):
            if run.ranks.size == 1:  # who stops several of them may kill some before they have exchanged anything
                report_speed(logger, run, state.meter.total)
            raise StoppedBySignal(line, error.signal_number) from None
        raise DataReadError(line) from None
    except RuntimeError as error:
        failure = run.ranks.explain(error, state.step) or known_failure(error, OUT_OF_MEMORY)
        if failure is None:
            raise
        # In the middle of a step: what is on the disk counts.
        whole = (directory / LAST).exists()
        hint = f"; continue from its {LAST} with: yolo-v3/main.py --resume {directory}" if whole else ""
        raise type(failure)(f"{failure.line}{hint}") from None
    saver.wait()
    report_speed(logger, run, state.meter.total)
    logger.line(
        f"finished at step {state.step} in {(time.perf_counter() - started) / 60:.1f} minutes with evaluations; "
        f"best AP50 {state.best_ap50 or 0.0:.3f} at step {state.best_step}: {directory / 'best.pt'}"
    )


def take_steps(
    run: Run,
    state: RunState,
    saver: Saver,
    directory: Path,
    logger: RunLogger,
    stop: StopRequest,
    profiler: StepProfiler,
) -> None:
    """The training loop."""
    settings, ranks = run.settings, run.ranks
    first_step, started = state.step, time.perf_counter()
    sampler = run.sampler(first_step, run.steps)
    loader = build_training_loader(run.training_set, sampler, settings.data.num_workers, run.device)
    batches = Prefetcher(iter(loader), run.device)
    restore_default_sigchld()
    warn = logger.line if ranks.is_first else functools.partial(print, file=sys.stderr, flush=True)
    unreadable = UnreadableImages(len(run.training_set), settings.data.max_unreadable_fraction)
    meter = state.meter
    meter.restart_clock()
    watchdog = Watchdog(ranks, lambda: state.step)
    # A terminal of unknown width (0 columns) shows no bar at all: plain lines are better there.
    has_bar = ranks.is_first and sys.stderr.isatty() and shutil.get_terminal_size((0, 0)).columns >= NARROWEST_BAR
    bar = tqdm(total=run.steps, initial=state.step, unit="step", dynamic_ncols=True, disable=not has_bar)

    def evaluate_and_keep() -> None:
        # Whatever happens to the evaluation, the steps are kept; a continued run repeats it.
        saver.save(numbered=saver.due())
        ap50 = evaluate_run(run, state, directory, logger, stop, watchdog) or 0.0
        saver.save(best=state.record_evaluation(ap50))
        meter.restart_clock()

    try:
        due = state.step % run.evaluate_frequency == 0 or state.step == run.steps
        if state.step and due and state.evaluated_step != state.step:
            evaluate_and_keep()  # the run was stopped during this evaluation
        while state.step < run.steps:
            step = state.step
            watchdog.beat()
            stopped = ranks.all_reduce_max_async(
                lambda: STOP_UNREADABLE if unreadable.too_many() else stop.signal_number or 0
            )
            if step in (first_step, run.unfreeze_step):
                set_backbone_frozen(state.model, step < run.unfreeze_step, settings.train.backbone_batch_norm)
                model = run.wrapped(state.model)
            set_learning_rates(state.optimizer, functools.partial(run.schedule.at, step - state.skipped.total))
            seed_step(settings.run.seed, step, ranks.rank)
            waiting = time.perf_counter()
            with waiting_for_data():
                micro_batches = next_batches(batches, settings.train.subdivisions)
            meter.waited += time.perf_counter() - waiting
            for line in (line for batch in micro_batches for line in unreadable.note(batch)):
                warn(line)
            if unreadable.too_many() and ranks.size == 1:
                raise unreadable.error()  # the others would wait for this process's gradient: there all vote
            if step == 0:
                picture = draw_batch(micro_batches[0], run.categories.names)
                logger.image(0, "train_batch", picture)
                if ranks.is_first:
                    save_png(directory / "images" / "train_batch.png", picture)
            result = run.take_step(state, model, micro_batches)
            if state.average:
                state.average.update(state.model, step, result.finite)
            state.skipped.add(step, result)
            meter.add(result, micro_batches)
            state.step += 1
            bar.update(1)
            waiting = time.perf_counter()
            with waiting_for_data():
                batches.prefetch(settings.train.subdivisions)
            meter.waited += time.perf_counter() - waiting
            profiler.step()

            if state.step % settings.run.log_frequency == 0 or state.step == run.steps:
                size = micro_batches[-1]["images"].shape[-1]
                left = (time.perf_counter() - started) / (state.step - first_step) * (run.steps - state.step)
                report_progress(logger, bar, run, state, size, left)
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
                raise unreadable.error() if signal_number == STOP_UNREADABLE else stopped_by(signal_number)
    finally:
        watchdog.rest()
        profiler.close()
        bar.close()
        del batches, loader  # ends the workers


def next_batches(batches: Iterator[Batch], count: int) -> list[Batch]:
    """Raises:
    DataReadError: an image cannot be read, or a worker has died; the state is still that after the last step.
    """
    try:
        return [next(batches) for _ in range(count)]
    except RuntimeError as error:
        failure = known_failure(error, OUT_OF_MEMORY)
        if failure is None:
            raise
        raise failure from None


def evaluate_run(
    run: Run, state: RunState, directory: Path, logger: RunLogger, stop: StopRequest, watchdog: Watchdog
) -> float | None:
    """Score the validation set, log the numbers, draw detections beside the ground truth; returns AP50."""
    settings, dataset, ranks = run.settings.evaluation, run.validation_set, run.ranks
    batch_size = settings.batch_size or run.settings.train.micro_batch
    workers = run.settings.data.num_workers
    found = run_inference(
        state.evaluated_model,
        run.criterion,
        run.detector.postprocess,
        build_evaluation_loader(dataset, batch_size, workers, run.device, ranks.rank, ranks.size),
        run.device,
        run.autocast,
        # Where others wait for this process's share it stops afterwards; last.pt has been written.
        on_batch=stop.check if ranks.size == 1 else watchdog.beat,
    )
    watchdog.rest()  # the others wait as long as the first one scores
    shares, evaluation = ranks.gather(found), None
    if shares is not None:  # the first process scores
        evaluation = compute_metrics(shares, dataset.annotations, settings.backend)
        report_evaluation(run, evaluation, state.step, directory, logger)
    return ranks.broadcast(None if evaluation is None else evaluation.metrics["AP50"])


if __name__ == "__main__":
    exit_with_message(main, OUT_OF_MEMORY)
