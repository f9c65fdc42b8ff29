"""Train a detector on COCO or on your own images.

python3 yolo-v3/main.py --config recipes/quickstart.yaml           built-in digits, about 3 minutes on 2 CPU cores
python3 yolo-v3/main.py data.root=FOLDER [train.minutes=20]        your own images, in any usual format
python3 yolo-v3/main.py --resume logs/240224-211713_LambdaLR       resume exactly where the run stopped
nohup python3 yolo-v3/main.py --gpu 0 > nohup_0.out &              COCO in data/coco, in the background

Writes logs/<YYMMDD-HHMMSS>_<name>/ with args.yaml (all settings), train.log, metrics.jsonl, results.csv, TensorBoard
events, images/, metrics.json, detections.json, best.pt (evaluation.best_metric), last.pt, report.html.
"""

import argparse
import sys
import time
from pathlib import Path

STARTED = time.perf_counter()  # `train.minutes` begins before torch is imported

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from detection.runtime.habana import prepare_habana

if __name__ == "__main__":
    prepare_habana(sys.argv[1:])  # torch reads the environment when it is imported

from detection.config.command_line import Parser, device_flags
from detection.config.estimator_flags import place_run
from detection.data.workers import prepare_process
from detection.errors import OUT_OF_MEMORY, SettingsError, exit_with_message
from detection.runtime.reproducibility import seed_step
from detection.runtime.signals import StopRequest
from detection.training.agreement import require_same_program, require_same_run
from detection.training.clock import fit_to_clock
from detection.training.console import plan_lines, report_end, report_first_batch, report_progress
from detection.training.dry_run import dry_run, preflight
from detection.training.endings import joint_work, logged_end
from detection.training.evaluation import evaluate_and_keep, keep_better_weights
from detection.training.follow import Timing, follow
from detection.training.loggers import open_loggers
from detection.training.optimizer import set_backbone_frozen, set_learning_rates
from detection.training.replay import replay
from detection.training.resume import check_continued, check_same_start, open_run, start_or_continue
from detection.training.run import Run, join_ranks
from detection.training.step import train_step
from detection.training.supervisor import Supervisor


def parse_arguments() -> argparse.Namespace:
    parser = Parser("yolo-v3/main.py", __doc__)
    parser.add_experiment(sys.argv[1:])
    parser.add_settings()
    parser.add_training_flags()
    add = parser.add_argument
    add(
        "--resume",
        nargs="?",
        const="",
        metavar="DIRECTORY",
        help="continue a run (the newest); auto: start or continue",
    )
    add("--accept-changes", action="store_true", help="with --resume: allow changes that affect results")
    add("--extend", action="store_true", help="with --resume, larger train.steps: a longer run")
    add("--output", type=Path, metavar="DIRECTORY", help="run directory (default: new, below run.logs_path)")
    add("--dry-run", action="store_true", help="print the plan, run all checks, write nothing")
    add("--profile", action="store_true", help="profile a few steps: table in the log, trace file")
    add("--replay", type=Path, metavar="DIRECTORY", help="diagnose a non-finite step: RUN/non_finite_<step>")
    arguments = parser.parse_intermixed_args()
    if arguments.resume and "=" in arguments.resume:  # in `--resume train.steps=9` the word is a setting
        arguments.settings.append(arguments.resume)
        arguments.resume = ""
    for name in ("accept_changes", "extend"):
        if getattr(arguments, name) and arguments.resume is None:
            raise SettingsError(f"--{name.replace('_', '-')} belongs to --resume")
    start_or_continue(arguments)
    place_run(arguments)
    modes = [name for name in ("dry_run", "replay", "profile") if getattr(arguments, name)]
    if len(modes) > 1:
        raise SettingsError(f"--{modes[0].replace('_', '-')} and --{modes[1]} are both given")
    return arguments


def main() -> None:
    prepare_process()
    arguments = parse_arguments()
    flags = device_flags(arguments)
    if arguments.mode == "eval":
        follow(arguments, arguments.model_dir, Timing(arguments.eval_timeout, arguments.min_eval_interval or 0.0))
        return
    if arguments.replay is not None:
        replay(arguments.replay, arguments.settings, flags)
        return
    checkpoint, directory, settings, notices, _lock = open_run(arguments, flags)
    ranks = join_ranks(settings)
    with joint_work(ranks):
        check_same_start(ranks, checkpoint)
        require_same_program(ranks, settings)
        run = Run(settings, ranks, fresh=checkpoint is None)
        require_same_run(run, checkpoint)
        if checkpoint is not None:
            notices += check_continued(run, checkpoint, directory, arguments.accept_changes)
        elif settings.train.minutes is not None:
            notices += fit_to_clock(run, STARTED)
        plan = [*notices, *plan_lines(run)]
        if arguments.dry_run:
            dry_run(run, plan, directory or Path(settings.run.logs_path))
        else:
            train(run, plan, directory, checkpoint, arguments.profile)


def train(run: Run, plan: list[str], directory: Path | None, checkpoint: dict | None, profile: bool = False) -> None:
    """Train from the first step, or from that of a checkpoint, to the last.

    Args:
        run: the run.
        plan: lines for the log.
        directory: run directory; None: a new one.
        checkpoint: checkpoint to resume from; None: a new run.
        profile: record a few steps with torch's profiler.
    """
    settings = run.settings.train
    stop = StopRequest()
    stop.install()
    loggers = open_loggers(run, directory, checkpoint)
    state = run.new_state(checkpoint)
    with logged_end(run, state, loggers) as saver:
        for line in plan:
            loggers.line(line)
        if run.settings.run.preflight:
            preflight(run, state, saver, loggers)
        first_step = state.step
        loggers.line(f"run directory {loggers.directory}, from step {first_step}")
        run.images.save(loggers.directory)
        with Supervisor(run, state, run.training_batches(first_step), loggers, stop, profile) as supervisor:
            if first_step and run.evaluates_at(first_step) and state.evaluated_step != first_step:
                # The run was stopped before this evaluation was complete.
                evaluate_and_keep(run, state, saver, loggers, supervisor)
            for step in range(first_step, run.steps):
                run.check_stop(step)
                supervisor.begin(step)
                if step in (first_step, run.unfreeze_step):
                    set_backbone_frozen(state.model, step < run.unfreeze_step, settings.backbone_batch_norm)
                    model = run.wrapped(state.model)
                set_learning_rates(state.optimizer, run.schedule.at, step - state.skipped.total)
                seed_step(run.settings.run.seed, step, run.ranks.rank)
                run.set_progress(step)
                micro_batches = supervisor.next_batches(settings.subdivisions)
                if step == 0:
                    report_first_batch(run, micro_batches[0], loggers)
                result = train_step(
                    model, run.criterion, state.optimizer, state.scaler, micro_batches, run.autocast, run.device,
                    settings.clip_norm, state.statistics, False, run.mark_step, settings.clip_tensor_norm,
                )  # fmt: skip
                state.record(result, micro_batches)
                stopped = supervisor.end()
                if run.logs_at(state.step):
                    report_progress(run, state, micro_batches[-1]["images"].shape[-1], loggers, supervisor)
                if run.evaluates_at(state.step) and not stopped and not supervisor.skips_evaluation():
                    evaluate_and_keep(run, state, saver, loggers, supervisor)
                    if state.evaluations_without_rise >= run.patience and state.step < run.steps:
                        loggers.line(f"stopped at step {state.step}: no better evaluation in {run.patience}")
                        break
                elif saver.due():
                    saver.save(numbered=True)
                saver.check()
                if stopped:
                    raise stopped
                if supervisor.out_of_time():
                    evaluate_and_keep(run, state, saver, loggers, supervisor)
                    break
            keep_better_weights(run, state, saver, loggers, supervisor)
        saver.wait()
        report_end(run, state, loggers, supervisor)


if __name__ == "__main__":
    exit_with_message(main, OUT_OF_MEMORY)
