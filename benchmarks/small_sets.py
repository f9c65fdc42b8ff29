"""Measure rungs of the ladder on small data sets in equal time, in slices that can go on beside other work.

python3 -m benchmarks.small_sets --data ../shared/data --work /tmp/small_sets               one slice of ten minutes
python3 -m benchmarks.small_sets --data ... --work ... --minutes 60 --only R8/bccd          one rung on one set
python3 -m benchmarks.small_sets --data ... --work ... --minutes 0                          table and figures so far
python3 -m benchmarks.small_sets --data ... --work ... --list                               jobs and their state

The plan is benchmarks/small_sets.yaml (--plan FILE): sets, rungs (overlays and words), budgets in shares of the time T.
Each run is an ordinary run directory below WORK/runs, in a process of its own, pinned to one core, one per core at a
time, without loader workers. After the slice they are stopped and saved; called again with the same WORK, they go on.

T is the time that the yardstick of the plan takes on this machine, start and evaluations included: first that rung
trains alone, on all cores at once, until --yardstick-steps; T is then the minutes per step times the steps of its
recipe, the mean over its runs, and is kept in WORK/yardstick.json. With --yardstick MINUTES it is given. A run gets its
share of T as train.minutes: the number of its steps is fixed when it starts, from the time that a step takes then.

A budget whose share is null trains each rung for the steps that it has of its own. With `curves` a plan names columns
of metrics.jsonl that are drawn over the steps, a figure each, in the colours of its rungs. Two such plans, for
docs/backbone_study.md: --plan benchmarks/backbones.yaml, --plan benchmarks/schedules.yaml.

Writes WORK/small_sets.md and a figure per set. AP and AP50 are those of the evaluation with the highest AP, which
best.pt holds where evaluation.best_metric is AP, on the validation images; nothing may be chosen by them that is then
reported on the same images.
"""

import argparse
import fnmatch
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.support.plan import YARDSTICK, Plan, SetPlan, read_plan
from benchmarks.support.run_curves import draw_columns
from benchmarks.support.run_results import draw_set, markdown_table, read_results
from benchmarks.support.slices import Job, Ledger, is_done, run_slice, steps_done
from detection.config.command_line import Parser, at_least_one
from detection.errors import DataError, SettingsError, exit_with_message

ROOT = Path(__file__).resolve().parent.parent
MAIN = ROOT / "yolo-v3" / "main.py"


def main() -> None:
    arguments = parse_arguments()
    plan, work = read_plan(arguments.plan), arguments.work
    jobs = [job for job in plan.jobs() if wanted(job, arguments.only)]
    if not jobs:
        raise SettingsError(f"--only {' '.join(arguments.only)}: no run of {arguments.plan} has such a name")
    names = {**arguments.let, "data": str(arguments.data.absolute()), "work": str(work.absolute())}
    work.mkdir(parents=True, exist_ok=True)
    if arguments.list:
        print("\n".join(state_line(job, work) for job in jobs))
        return
    if arguments.minutes > 0:
        run_plan(plan, jobs, names, arguments)
    results = read_results(jobs, work)
    text = f"{header(plan, work)}\n\n{markdown_table(jobs, results)}"
    if plan.curves:
        colors = {name: rung.color for name, rung in plan.rungs.items()}
        text += "\n" + draw_columns(work, plan.curves, results, colors)
    (work / "small_sets.md").write_text(text, encoding="utf-8")
    for set_name in dict.fromkeys(result.job.set for result in results):
        draw_set(work / f"{set_name}.png", set_name, results)
    print(text)


def run_plan(plan: Plan, jobs: Sequence[Job], names: Mapping[str, str], arguments: argparse.Namespace) -> None:
    """Train for one slice: the yardstick until T is known, then everything."""
    work, ruler = arguments.work, plan.yardstick_jobs()
    minutes = arguments.yardstick or stored_yardstick(work)
    unknown = bool(ruler) and minutes is None
    if unknown:
        jobs = ruler
    for set_name in dict.fromkeys(job.set for job in jobs):
        prepare(plan.sets[set_name], names)

    def command(job: Job, continues: bool) -> list[str]:
        return command_of(plan, job, continues, minutes, names, work, arguments.device)

    for job in jobs:  # a word that cannot be filled in ends the program now, not in mid-slice
        command(job, False)
    run_slice(jobs, work, arguments.cores, 60 * arguments.minutes, command, arguments.retry)
    if unknown:
        measured = measure_yardstick(plan, ruler, work, arguments.yardstick_steps)
        if measured is None:
            print(f"T is not known yet: each run of the yardstick needs {arguments.yardstick_steps} steps")
        else:
            (work / "yardstick.json").write_text(json.dumps(measured), encoding="utf-8")
            print(f"T = {measured['minutes']:.2f} minutes")


def command_of(
    plan: Plan, job: Job, continues: bool, minutes: float | None, names: Mapping[str, str], work: Path, device: str
) -> list[str]:
    """Build the command line that begins or continues a run."""
    directory = str(job.directory(work))
    if continues:
        return [sys.executable, str(MAIN), "--resume", directory, "run.preflight=false"]
    rung = plan.rungs[job.rung]
    words = [f"run.device={device}", "data.num_workers=0", "run.loggers=[files]", f"run.seed={job.seed}"]
    if job.budget != YARDSTICK and (share := plan.budgets[job.budget].share) is not None:
        assert minutes is not None
        words.append(f"train.minutes={minutes * share:.3f}")
    words += [fill_names(word, names) for word in (*plan.words, *rung.words, *plan.sets[job.set].words)]
    overlays = [part for overlay in rung.overlays for part in ("--config", str(ROOT / overlay))]
    return [sys.executable, str(MAIN), *overlays, *words, "--output", directory]


def fill_names(text: str, names: Mapping[str, str]) -> str:
    """Replace {name} in a word of the plan.

    Raises:
        SettingsError: nobody said what it is.
    """
    for name, value in names.items():
        text = text.replace(f"{{{name}}}", value)
    if "{" in text and "}" in text and ":" not in text:
        raise SettingsError(f"{text}: say what it is with --let NAME=VALUE")
    return text


def prepare(plan: SetPlan, names: Mapping[str, str]) -> None:
    """Make a data set, once.

    Raises:
        DataError: the script failed.
    """
    if not plan.prepare:
        return
    script, *given = (fill_names(word, names) for word in plan.prepare)
    if "--output" in given and Path(given[given.index("--output") + 1]).exists():
        return
    done = subprocess.run([sys.executable, str(ROOT / script), *given], capture_output=True, text=True, check=False)
    if done.returncode:
        raise DataError(f"{script} failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")


def measure_yardstick(plan: Plan, jobs: Sequence[Job], work: Path, least_steps: int) -> dict[str, float] | None:
    """Estimate T from the runs of the yardstick so far; None: one of them has too few steps."""
    ledger, steps = Ledger(work), [steps_done(job.directory(work)) for job in jobs]
    assert plan.yardstick is not None
    least = min(least_steps, plan.yardstick.steps)
    if min(steps) < least:
        return None
    minutes = [ledger.minutes(job) / done * plan.yardstick.steps for job, done in zip(jobs, steps, strict=True)]
    return {"minutes": sum(minutes) / len(minutes), "steps_measured": min(steps), "runs": len(jobs)}


def stored_yardstick(work: Path) -> float | None:
    path = work / "yardstick.json"
    return json.loads(path.read_text(encoding="utf-8"))["minutes"] if path.exists() else None


def wanted(job: Job, patterns: Sequence[str]) -> bool:
    """Whether a pattern matches the beginning of rung/set/seed/budget; * and ? as in file names."""
    parts = job.name.split("/")
    for pattern in patterns:
        asked = pattern.split("/")
        if len(asked) <= len(parts) and all(map(fnmatch.fnmatchcase, parts, asked)):
            return True
    return not patterns


def state_line(job: Job, work: Path) -> str:
    ledger, directory = Ledger(work), job.directory(work)
    state = "complete" if is_done(job, work) else "failed" if ledger.failed(job) else "to do"
    return f"{job.name:<36}{state:<10}{steps_done(directory):>6} steps {ledger.minutes(job):6.1f} minutes"


def header(plan: Plan, work: Path) -> str:
    """Say what the times mean."""
    minutes = stored_yardstick(work)
    known = "not measured yet" if minutes is None else f"{minutes:.1f} minutes, extrapolated from its first slice"
    ruler = plan.yardstick
    scale = f"T: {ruler.steps} steps of {ruler.rung} on {ruler.set}, {known}. " if ruler else ""
    return (
        f"{scale}{platform.machine()}, {os.cpu_count()} cores, one core per run. "
        "AP: mean over seeds (smallest to largest), of the best evaluation."
    )


def parse_arguments() -> argparse.Namespace:
    parser = Parser("benchmarks.small_sets", __doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIRECTORY", help="{data} of the plan")
    add("--work", type=Path, required=True, metavar="DIRECTORY", help="runs, sets, ledger, table and figures")
    add("--plan", type=Path, default=Path(__file__).with_suffix(".yaml"), metavar="FILE", help="(%(default)s)")
    add("--minutes", type=float, default=10.0, help="of this slice; 0: only the table (%(default)s)")
    add("--only", nargs="+", default=[], metavar="PATTERN", help="rung/set/seed/budget, or its beginning; * and ?")
    add("--cores", type=int, nargs="+", default=[0, 1], help="numbers of the cores, one run on each (0 1)")
    add("--device", default="cpu", help="run.device of every run (%(default)s)")
    add("--let", nargs="+", default=[], metavar="NAME=VALUE", help="further names in braces in the plan")
    add("--yardstick", type=float, metavar="MINUTES", help="T, instead of measuring it")
    add("--yardstick-steps", type=at_least_one, default=300, metavar="N", help="measure T from N steps (%(default)s)")
    add("--retry", action="store_true", help="take up runs that failed, too")
    add("--list", action="store_true", help="print all runs and their state")
    arguments = parser.parse_args()
    for word in arguments.let:
        if "=" not in word:
            parser.error(f"--let {word}: must be NAME=VALUE")
    arguments.let = dict(word.split("=", 1) for word in arguments.let)
    if arguments.yardstick is not None and not arguments.yardstick > 0:
        parser.error(f"--yardstick {arguments.yardstick:g}: must be above 0")
    known = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(arguments.cores)
    if absent := sorted(set(arguments.cores) - known):
        parser.error(f"--cores: there is no core {absent[0]} here, only {', '.join(map(str, sorted(known)))}")
    return arguments


if __name__ == "__main__":
    exit_with_message(main)
