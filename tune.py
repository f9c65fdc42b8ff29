"""Search for settings: trials of yolo-v3/main.py, of which the better part trains on, until the time is over.

python tune.py --study logs/search --minutes 600 data.root=FOLDER              own images, recipes/search/own_data.yaml
python tune.py --study logs/search --space FILE --config recipes/bccd.yaml --minutes 600 data.root=FOLDER
python tune.py --study logs/search                                             one more worker, or after a kill
python tune.py --study logs/search --gpu 1                                     the same on another GPU
python tune.py --study logs/search --minutes 900                               go on with a larger budget

--space maps settings to their values: {type: float | int | log, low, high} or {type: choice, choices: [...]}. Every
trial is an ordinary run in STUDY/trials, in a process of its own; the first has the settings as they are. All begin
with 1/9 of the run; the best third of them goes on to 1/3, the best third of those to the end, each exactly where it
stopped, with the schedule of the whole run. --minutes is the time of all workers together. Ctrl-C, kill -9 and lost
machines cost the steps since the last checkpoint. The first worker's words are kept in STUDY/study.yaml; all workers
start in the same directory.

Writes STUDY/tune.md (table), tune.json, compare/ (curves), best.yaml (the winner as an overlay), study.db (Optuna's).
Needs Optuna (pip install 'optuna>=5.0'). More: docs/tune.md
"""

import argparse
import contextlib
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from detection.config.command_line import DEFAULTS, Parser, at_least_one, at_least_zero, device_flags
from detection.config.loading import merge_settings
from detection.config.yaml_files import read_settings_file, write_yaml
from detection.drawing.files import replace_file
from detection.errors import CheckpointError, DataReadError, OutputError, SettingsError, exit_with_message, say
from detection.runtime.run_directory import writing_results
from detection.runtime.signals import StopRequest
from detection.training.automatic import load_run_settings
from detection.tuning.halving import rung_lengths
from detection.tuning.report import write_report
from detection.tuning.space import check_space, read_space, start_values, word_of
from detection.tuning.study import Job, Study, import_optuna
from detection.tuning.trial_process import command_of, last_evaluation, last_line, start

OWN_DATA = Path(__file__).resolve().parent / "recipes" / "search" / "own_data.yaml"
POLL_SECONDS = 0.5
SAVE_MINUTES = 2  # what a trial loses at most, unless train.save_minutes is given
GRACE_SECONDS = 120.0  # for saving, after SIGTERM
ATTEMPTS = 3  # at a rung of a trial whose process was killed from outside, by want of memory perhaps
STOPPED = (130, 143, -15)  # exit codes of a process that was told to stop
# Exit codes that are not the fault of a trial's settings; they end the worker, and the trial can go on.
NO_FAULT = {error.exit_code: error for error in (DataReadError, OutputError, CheckpointError)}


def main() -> None:
    arguments = parse_arguments()
    import_optuna()
    plan = open_plan(arguments)
    minutes = plan["minutes"] if arguments.minutes is None else arguments.minutes
    limit = plan["trials"] if arguments.trials is None else arguments.trials
    space = read_space(plan["space"], "study.yaml")
    study = Study(arguments.study, space, plan["rungs"], plan["reduction"], plan["seed"], plan.get("start", {}))
    lengths = rung_lengths(plan["steps"], plan["rungs"], plan["reduction"])
    stop = StopRequest()
    stop.install()
    with study.working():
        work(study, plan, lengths, arguments, minutes, limit, stop)
    with writing_results(study.directory):
        say("", *write_report(study, plan["metric"], lengths))
    if stop.signal_number is not None:
        say(f"stopped; go on with: python tune.py --study {study.directory}", error=True)
    stop.check()


def work(
    study: Study,
    plan: dict[str, Any],
    lengths: list[int | str],
    arguments: argparse.Namespace,
    minutes: float | None,
    limit: int | None,
    stop: StopRequest,
) -> None:
    """Train one piece of a trial after the other, until the budget is spent, nothing is left, or a signal comes.

    Raises:
        UserError: a trial ended with an error that is not its own, or all trials so far did.
    """

    def over() -> bool:
        return stop.signal_number is not None or (minutes is not None and study.minutes() >= minutes)

    while not over():
        study.beat()
        job = study.next_job(limit)
        if job is not None:
            train_piece(study, job, plan, lengths, device_words(arguments), over)
        elif study.busy_trials(others=True):
            time.sleep(POLL_SECONDS)
        else:
            break


def train_piece(
    study: Study, job: Job, plan: dict[str, Any], lengths: list[int | str], own: list[str], over: Any
) -> None:
    """Bring a trial to the end of its rung, in a process that is stopped and saved when `over()` becomes true."""
    directory = study.trial_directory(job.number)
    end = "null" if job.rung == study.rungs - 1 else lengths[job.rung]
    for attempt in range(1, ATTEMPTS + 1):
        own_words = [*own, *plan["saves"], f"run.stop_after={end}"]
        command = command_of(directory, overlays_of(study.directory), plan["words"], job.values, own_words)
        how = "continues" if "--resume" in command else "begins"
        say(f"trial {directory.name} {how}, to {lengths[job.rung]}: {job.values}")
        started = time.monotonic()
        code, told = wait_for(start(command, directory), study, over)
        seconds = time.monotonic() - started
        if code == 0:
            step, value = last_evaluation(directory, plan["metric"])
            study.report(job, value, seconds, step)
            say(f"trial {directory.name} step {step}: {plan['metric']} {value:.4f}, {seconds:.0f} s")
            return
        if told and (code in STOPPED or code < 0):
            say(f"trial {directory.name} stopped, can go on")
            return
        reason = f"exit code {code}: {last_line(directory)}"
        if code in NO_FAULT:
            raise NO_FAULT[code](f"trial {directory.name}: {last_line(directory)}")
        if (code > 0 and code not in STOPPED) or attempt == ATTEMPTS:
            break
    study.fail(job, reason)
    say(f"trial {directory.name} failed with {reason}")
    standings = study.standings()
    if sum(standing.failed for standing in standings) >= ATTEMPTS and not any(each.values for each in standings):
        raise SettingsError(f"all trials fail, the last one with {reason}")


def wait_for(process: subprocess.Popen[bytes], study: Study, over: Any) -> tuple[int, bool]:
    """Wait for the end of a trial's process; returns its exit code, and whether it was told to stop."""
    told = False
    try:
        while process.poll() is None:
            if not told and over():
                told, last = True, time.monotonic() + GRACE_SECONDS
                process.terminate()
            if told and time.monotonic() > last:
                process.kill()
            study.beat()
            time.sleep(POLL_SECONDS)
    finally:  # an error of ours
        if process.poll() is None:
            process.terminate()
            process.wait()
    return process.returncode, told


def open_plan(arguments: argparse.Namespace) -> dict[str, Any]:
    """Read STUDY/study.yaml, or check the command line and write it.

    Raises:
        SettingsError: the space or a setting is impossible, or the study was begun with others.
    """
    directory, path = arguments.study, arguments.study / "study.yaml"
    if not path.exists():
        if arguments.minutes is None and arguments.trials is None:
            raise SettingsError(f"there is no study in {directory} yet: say when it ends with --minutes or --trials")
        plan = new_plan(arguments)
        with writing_results(directory):
            for number, overlay in enumerate(plan["overlays"]):
                replace_file(directory / "config" / f"{number}.yaml", write_yaml(overlay).encode())
            temporary = directory / f".study_{os.getpid()}.yaml"
            replace_file(temporary, write_yaml(plan).encode())
            with contextlib.suppress(FileExistsError):  # another worker began at the same time
                os.link(temporary, path)
            temporary.unlink()
    plan = read_settings_file(path)
    words = {"space": arguments.space, "overlays": arguments.config, "words": arguments.settings}
    words |= {"rungs": arguments.rungs, "reduction": arguments.reduction, "seed": arguments.seed}
    asked = plan_of_words(arguments)
    if changed := [name for name, given in words.items() if given and asked[name] != plan[name]]:
        raise SettingsError(
            f"{path}: the study was begun with other {', '.join(changed)}; continue it with "
            f"--study {directory} alone, or name another directory"
        )
    return plan


def plan_of_words(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the command line says about a study."""
    return {
        "space": read_settings_file(arguments.space or OWN_DATA),
        "overlays": [read_settings_file(path) for path in arguments.config],
        "words": arguments.settings,
        "rungs": arguments.rungs or 3,
        "reduction": arguments.reduction or 3,
        "seed": arguments.seed or 0,
    }


def new_plan(arguments: argparse.Namespace) -> dict[str, Any]:
    """Check the command line of a new study; returns the content of study.yaml."""
    plan, origin = plan_of_words(arguments), str(arguments.space or OWN_DATA)
    space = read_space(plan["space"], origin)
    settings, _ = load_run_settings(arguments.config, arguments.settings)
    check_space(space, settings, origin)
    for name, dimension in space.items():  # given under another name too, a trial would refuse it
        merge_settings(DEFAULTS, [], [*arguments.settings, word_of(name, dimension.extremes()[0])])
    if settings.train.minutes is not None:
        raise SettingsError(
            "train.minutes: a trial has a fixed length, train.steps; --minutes is the time of the search"
        )
    if settings.run.stop_after is not None:
        raise SettingsError("run.stop_after: the study decides where a trial pauses")
    try:
        rung_lengths(settings.train.steps, plan["rungs"], plan["reduction"])
    except ValueError as error:
        raise SettingsError(f"--rungs {plan['rungs']} --reduction {plan['reduction']}: {error}") from None
    # Written down, so that later workers and changed files cannot make it another one.
    metric, steps = settings.evaluation.best_metric, settings.train.steps
    saves = [] if settings.train.save_minutes is not None else [f"train.save_minutes={SAVE_MINUTES}"]
    return {
        **plan,
        "start": start_values(space, settings),
        "metric": metric,
        "steps": steps,
        "saves": saves,
        "minutes": arguments.minutes,
        "trials": arguments.trials,
    }


def overlays_of(directory: Path) -> list[Path]:
    """Return the overlays that a study has kept, in order."""
    return sorted((directory / "config").glob("*.yaml"), key=lambda path: int(path.stem))


def device_words(arguments: argparse.Namespace) -> list[str]:
    """Return the words for the device flags of this worker, which are not the study's."""
    return [f"{flag.path}={flag.value}" for flag in device_flags(arguments)]


def parse_arguments() -> argparse.Namespace:
    parser = Parser("tune.py", __doc__)
    parser.add_settings()
    add = parser.add_argument
    add("--study", type=Path, required=True, metavar="DIRECTORY", help="of the search; an existing one is continued")
    add("--space", type=Path, metavar="FILE", help="settings and their values (recipes/search/own_data.yaml)")
    add("--minutes", type=at_least_zero, help="time of all workers together; 0: only the table")
    add("--trials", type=at_least_one, metavar="N", help="begin no more than N trials")
    add("--rungs", type=at_least_one, metavar="N", help="lengths of training; 1: every trial trains to the end (3)")
    add("--reduction", type=at_least_one, metavar="N", help="one of N goes on from a rung, N times as long (3)")
    add("--seed", type=int, metavar="N", help="of the sampler (0)")
    arguments = parser.parse_intermixed_args()
    if arguments.reduction == 1:
        parser.error("--reduction 1: must be at least 2")
    return arguments


if __name__ == "__main__":
    exit_with_message(main)
