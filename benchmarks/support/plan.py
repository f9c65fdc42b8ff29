"""The plan file of benchmarks/small_sets.py."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from benchmarks.support.slices import Job
from detection.config.fields import Count, Positive, Section
from detection.config.loading import tuples_of
from detection.config.yaml_files import read_settings_file
from detection.errors import SettingsError

ROOT = Path(__file__).resolve().parents[2]
YARDSTICK = "yardstick"  # name of its budget
Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]


class SetPlan(Section):
    """A data set: words that name it, and a script of this repository that makes it, with its arguments."""

    words: tuple[str, ...]
    prepare: tuple[str, ...] = ()


class RungPlan(Section):
    """What a rung changes: overlays, relative to the repository, then words; the colour of its curves."""

    overlays: tuple[str, ...]
    words: tuple[str, ...] = ()
    color: str | None = None


class BudgetPlan(Section):
    """Which rungs train on which sets, with which seeds, in which share of T; null: for their own steps."""

    share: Positive | None
    rungs: tuple[str, ...]
    sets: tuple[str, ...]
    seeds: Seeds


class YardstickPlan(Section):
    """The run whose time is T, and its number of steps."""

    rung: str
    set: str
    seeds: Seeds
    steps: Count


class Plan(Section):
    """The plan file; `words` are those of every run; `yardstick` may be absent where no budget has a share."""

    words: tuple[str, ...] = ()
    sets: dict[str, SetPlan]
    rungs: dict[str, RungPlan]
    yardstick: YardstickPlan | None = None
    budgets: dict[str, BudgetPlan]
    curves: tuple[str, ...] = ()

    def jobs(self) -> list[Job]:
        """List all runs, the yardstick's first; seed by seed, so that every rung has one result early."""
        found = self.yardstick_jobs()
        for name, budget in self.budgets.items():
            seeds = [(seed, set_name) for seed in budget.seeds for set_name in budget.sets]
            found += [Job(rung, set_name, seed, name) for seed, set_name in seeds for rung in budget.rungs]
        return found

    def yardstick_jobs(self) -> list[Job]:
        """List the runs whose time is T."""
        ruler = self.yardstick
        return [Job(ruler.rung, ruler.set, seed, YARDSTICK) for seed in ruler.seeds] if ruler else []


def read_plan(path: Path) -> Plan:
    """Read and check a plan.

    Raises:
        SettingsError: it is none, or names rungs, sets or overlays that there are not.
    """
    try:
        plan = Plan.model_validate(tuples_of(read_settings_file(path)))
    except ValidationError as error:
        first = error.errors()[0]
        raise SettingsError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    for job in plan.jobs():
        for kind, name, known in (("rung", job.rung, plan.rungs), ("set", job.set, plan.sets)):
            if name not in known:
                raise SettingsError(f"{path}: {job.budget} names the {kind} {name!r}; there are {', '.join(known)}")
    if YARDSTICK in plan.budgets:
        raise SettingsError(f"{path}: budgets: {YARDSTICK} is the name of the yardstick's own")
    if plan.yardstick is None and (timed := [name for name, budget in plan.budgets.items() if budget.share]):
        raise SettingsError(f"{path}: budgets.{timed[0]}: has a share of T, but the plan has no yardstick")
    for name, rung in plan.rungs.items():
        for overlay in rung.overlays:
            if not (ROOT / overlay).is_file():
                raise SettingsError(f"{path}: rungs.{name}: there is no overlay {overlay}")
    return plan
