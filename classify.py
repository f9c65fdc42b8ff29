"""Pre-train a backbone as a classifier, for a detector to start from.

python classify.py data.builtin=digits data.root=data/digits          built-in digits, cut out of their images
python classify.py data.root=cifar-10-python.tar.gz                   CIFAR-10, the archive or its folder
python classify.py data.root=FOLDER model.backbone=mobilenet_v3_small a folder per class, in train/ and val/ or not
python classify.py --crops data.root=DATASET                          the boxes of a detection dataset, cut out
python classify.py --config recipes/simple_cnn.yaml --network simple_cnn data.root=cifar-10-python.tar.gz
python classify.py --resume logs/240224-211713_classify               resume exactly where the run stopped
python yolo-v3/main.py model.pretrained=logs/.../best.pt data.root=... a detector from its backbone

Settings are those of yolo-v3/args.yaml below recipes/classify.yaml. Writes logs/<YYMMDD-HHMMSS>_classify/ with
args.yaml, train.log, metrics.jsonl, results.csv, TensorBoard events, images/ (confusion matrix, mistakes),
metrics.json, best.pt (highest top-1), last.pt. Minutes for small images; one line says the speed at the end.
"""

import argparse
from pathlib import Path

from detection.classification.evaluation import evaluate_classifier
from detection.classification.network import NETWORKS
from detection.classification.run import ClassifierRun, classifier_plan
from detection.config.command_line import DEFAULTS, Parser, device_flags
from detection.config.loading import Values, merge_settings, validate
from detection.data.workers import prepare_process
from detection.errors import OUT_OF_MEMORY, SettingsError, exit_with_message, say
from detection.models.own_classifier import CLASSIFIER
from detection.runtime.reproducibility import seed_step
from detection.runtime.signals import StopRequest
from detection.training.agreement import require_same_program, require_same_run
from detection.training.checkpoint_writer import BEST
from detection.training.console import report_first_batch, report_progress, report_speed
from detection.training.dry_run import try_step
from detection.training.endings import joint_work, logged_end
from detection.training.loggers import check_loggers, open_loggers
from detection.training.optimizer import set_backbone_frozen, set_learning_rates
from detection.training.resume import check_continued, open_resumed_run
from detection.training.run import join_ranks
from detection.training.step import train_step
from detection.training.supervisor import Supervisor

RECIPE = Path(__file__).resolve().parent / "recipes" / "classify.yaml"
UNFLIPPED = Values("data.builtin=digits", {"data.augmentation.horizontal_flip.p": 0.0})  # a mirrored 2 is no digit


def parse_arguments() -> argparse.Namespace:
    parser = Parser("classify.py", __doc__)
    parser.add_settings()
    add = parser.add_argument
    add("--network", choices=NETWORKS, help="a network that is no backbone of a detector (default: model.backbone)")
    add("--crops", action="store_true", help="data.root is a detection dataset: its boxes are cut out")
    add("--resume", nargs="?", const="", metavar="DIRECTORY", help="resume a run (default: the newest of logs/)")
    add("--accept-changes", action="store_true", help="with --resume: allow changes that affect results")
    add("--extend", action="store_true", help="with --resume, larger train.steps: a longer run")
    add("--output", type=Path, metavar="DIRECTORY", help="run directory (default: new, below run.logs_path)")
    add("--dry-run", action="store_true", help="print the plan, try a step, write nothing")
    arguments = parser.parse_intermixed_args()
    arguments.script = ClassifierRun.script
    for name in ("network", "crops"):
        if getattr(arguments, name) and arguments.resume is not None:
            raise SettingsError(f"--{name} and --resume are both given; a continued run keeps its own")
    return arguments


def main() -> None:
    prepare_process()
    arguments = parse_arguments()
    flags = device_flags(arguments)
    checkpoint, directory = None, arguments.output
    network, crops = arguments.network, arguments.crops
    if arguments.resume is None:
        words = arguments.settings
        tree, _, _ = merge_settings(DEFAULTS, [RECIPE, *arguments.config], words, flags)
        own = [UNFLIPPED] if tree["data"]["builtin"] else []
        tree, plan, _ = merge_settings(DEFAULTS, [RECIPE, *own, *arguments.config], words, flags)
        settings = validate(tree)
    else:
        checkpoint, directory, settings, plan, _lock = open_resumed_run(arguments, flags)
        network, crops = checkpoint[CLASSIFIER]["network"], checkpoint[CLASSIFIER]["crops"]
    check_loggers(settings.run.loggers)
    ranks = join_ranks(settings)
    with joint_work(ranks):
        require_same_program(ranks, settings)
        run = ClassifierRun(settings, ranks, checkpoint is None, network, crops)
        require_same_run(run, checkpoint)
        if checkpoint is not None:
            plan += check_continued(run, checkpoint, directory, arguments.accept_changes)
        plan += classifier_plan(run)
        if arguments.dry_run:

            def show(line: str) -> None:
                if ranks.is_first:
                    say(line)

            for line in plan:
                show(line)
            try_step(run, run.new_state(), show)
        else:
            train(run, plan, directory, checkpoint)


def train(run: ClassifierRun, plan: list[str], directory: Path | None, checkpoint: dict | None) -> None:
    """Train from the first step, or from that of a checkpoint, to the last; see `train` of yolo-v3/main.py."""
    settings = run.settings.train
    stop = StopRequest()
    stop.install()
    loggers = open_loggers(run, directory, checkpoint)
    state = run.new_state(checkpoint)
    with logged_end(run, state, loggers) as saver:
        for line in plan:
            loggers.line(line)
        first_step = state.step
        loggers.line(f"run directory {loggers.directory}, from step {first_step}")
        saver.save()  # a run killed before its first regular checkpoint can be resumed from this one
        with Supervisor(run, state, run.training_batches(first_step), loggers, stop) as supervisor:
            if first_step and run.evaluates_at(first_step) and state.evaluated_step != first_step:
                evaluate_classifier(run, state, saver, loggers, supervisor)  # the run was stopped before
            for step in range(first_step, run.steps):
                run.check_stop(step)
                supervisor.begin(step)
                if step in (first_step, run.unfreeze_step):
                    set_backbone_frozen(state.model, step < run.unfreeze_step, settings.backbone_batch_norm)
                    model = run.wrapped(state.model)
                set_learning_rates(state.optimizer, run.schedule.at, step - state.skipped.total)
                seed_step(run.settings.run.seed, step, run.ranks.rank)
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
                if run.evaluates_at(state.step) and not stopped:
                    evaluate_classifier(run, state, saver, loggers, supervisor)
                    if state.evaluations_without_rise >= run.patience and state.step < run.steps:
                        loggers.line(f"stopped at step {state.step}: no better evaluation in {run.patience}")
                        break
                elif saver.due():
                    saver.save(numbered=True)
                saver.check()
                if stopped:
                    raise stopped
        saver.wait()
        report_speed(run, state, loggers)
        loggers.line(
            f"finished at step {state.step} in {supervisor.minutes():.1f} minutes with evaluations; best top-1 "
            f"{state.best_value or 0.0:.4f} at step {state.best_step}: {loggers.directory / BEST}"
        )


if __name__ == "__main__":
    exit_with_message(main, OUT_OF_MEMORY)
