"""The state of a search, in two SQLite files that any number of workers share, and what a worker shall do next.

`study.db` is Optuna's: a trial per set of values, with its metric at each rung under `intermediate_values` (by the
number of the rung). A trial that waits for a promotion stays RUNNING. `workers.db` is ours: who is alive, and busy with
which trial. It is locked while a worker decides, so that no two take the same.
"""

import contextlib
import os
import socket
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from detection.errors import OutputError, SettingsError
from detection.runtime.run_directory import is_locked
from detection.tuning.halving import Standing, promotable
from detection.tuning.space import Space, params_of, values_of

SILENT_SECONDS = 60.0  # a worker whose last sign of life is older counts as lost
RANDOM_TRIALS = 8  # drawn at random before the sampler models what is good
TARGET, PIECES = "target", "pieces"  # user attributes of a trial: rung to reach; [seconds, step] by completed rung
WORKERS = """create table if not exists workers
    (id integer primary key, host text, pid integer, started real, beat real, trial integer)"""


class Job(NamedTuple):
    """A trial that a worker is to bring to the end of a rung."""

    number: int
    rung: int
    values: dict[str, Any]  # of the settings, by name


class Study:
    """One search; see the module.

    Args:
        directory: of the study; trials are below it.
        space: what is searched.
        rungs: number of rungs.
        reduction: one of so many trials goes on from a rung.
        seed: of the sampler.
        start: values of the first trial; what is missing is drawn.
    """

    def __init__(
        self,
        directory: Path,
        space: Space,
        rungs: int,
        reduction: int,
        seed: int,
        start: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        optuna = import_optuna()
        self.directory, self.space, self.rungs, self.reduction, self.seed = directory, space, rungs, reduction, seed
        self.start = start
        self.distributions = {name: dimension.distribution() for name, dimension in space.items()}
        try:
            self._workers = sqlite3.connect(directory / "workers.db", timeout=SILENT_SECONDS, isolation_level=None)
            with self._exclusive(create=True):  # two workers that begin together would both make Optuna's tables
                address = f"sqlite:///{(directory / 'study.db').absolute()}"
                options = {"connect_args": {"timeout": SILENT_SECONDS}}
                self.optuna = optuna.create_study(
                    storage=optuna.storages.RDBStorage(address, engine_kwargs=options),
                    sampler=optuna.samplers.RandomSampler(),  # `_propose` samples
                    study_name="tune",
                    direction="maximize",
                    load_if_exists=True,
                )
        except (sqlite3.Error, OSError) as error:
            raise OutputError(f"the study in {directory} cannot be opened: {error}") from None

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Context of a worker: it is listed as alive, and at the end as gone."""
        here = (socket.gethostname(), os.getpid(), time.time(), time.time())
        query = "insert into workers (host, pid, started, beat) values (?, ?, ?, ?)"
        self.worker = self._workers.execute(query, here).lastrowid
        try:
            yield
        finally:
            self.beat(done=True)

    def beat(self, done: bool = False) -> None:
        """Give a sign of life, with `done` the last one."""
        query = "update workers set beat = ?, pid = case when ? then null else pid end where id = ?"
        self._workers.execute(query, (time.time(), done, self.worker))

    def minutes(self) -> float:
        """Return the minutes that all workers together have spent on this study."""
        return (self._workers.execute("select sum(beat - started) from workers").fetchone()[0] or 0.0) / 60

    def busy_trials(self, others: bool = False) -> set[int]:
        """Return the numbers of the trials that live workers are busy with, or only other workers than this one."""
        query = "select host, pid, beat, trial, id from workers where trial is not null and pid is not null"
        return {
            trial
            for host, pid, beat, trial, worker in self._workers.execute(query)
            if is_alive(host, pid, beat) and not (others and worker == self.worker)
        }

    def trials(self) -> list[Any]:
        """Return Optuna's trials by number."""
        return self.optuna.get_trials(deepcopy=False)

    def standings(self, trials: Sequence[Any] | None = None) -> list[Standing]:
        """Return how far each trial has come."""
        return [
            Standing(
                trial.number,
                tuple(value for _, value in sorted(trial.intermediate_values.items())),
                trial.user_attrs.get(TARGET, 0),
                trial.state.name == "FAIL",
            )
            for trial in (self.trials() if trials is None else trials)
        ]

    def trial_directory(self, number: int) -> Path:
        """Return the run directory of a trial."""
        return self.directory / "trials" / f"{number:04d}"

    def next_job(self, limit: int | None) -> Job | None:
        """Take a trial: one that a lost worker left, else one that is promoted, else a new one.

        Args:
            limit: of the number of trials; None: none.

        Returns:
            The job, which is this worker's from now on; None: nothing can be done before another worker has finished.
        """
        with self._exclusive():
            self._workers.execute("update workers set trial = null where id = ?", (self.worker,))
            trials = self.trials()
            standings, busy = self.standings(trials), self.busy_trials()
            left = [standing for standing in standings if standing.is_due and standing.number not in busy]
            left = [standing for standing in left if not is_locked(self.trial_directory(standing.number))]
            if left:  # its process may have outlived its worker, hence the lock
                chosen = max(left, key=lambda standing: (standing.target, -standing.number))
                number, rung = chosen.number, chosen.target
            elif (chosen_for_more := promotable(standings, self.rungs, self.reduction)) is not None:
                number, rung = chosen_for_more.number, chosen_for_more.target + 1
                self._live_trial(number).set_user_attr(TARGET, rung)
            elif limit is None or len(trials) < limit:
                number, rung = len(trials), 0
                self._propose(trials)
                trials = self.trials()
            else:
                return None
            self._workers.execute("update workers set trial = ? where id = ?", (number, self.worker))
        return Job(number, rung, values_of(self.space, trials[number].params))

    def report(self, job: Job, value: float, seconds: float, step: int) -> None:
        """Record the metric of a trial at the end of a rung, and what the rung took."""
        trial = self._live_trial(job.number)
        pieces = {**self.trials()[job.number].user_attrs.get(PIECES, {}), str(job.rung): [seconds, step]}
        trial.set_user_attr(PIECES, pieces)
        trial.report(value, job.rung)
        if job.rung == self.rungs - 1:
            self.optuna.tell(job.number, value, skip_if_finished=True)

    def fail(self, job: Job, reason: str) -> None:
        """Record that a trial cannot be trained."""
        self._live_trial(job.number).set_user_attr("reason", reason)
        self.optuna.tell(job.number, state=import_optuna().trial.TrialState.FAIL, skip_if_finished=True)

    def importance(self) -> dict[str, float]:
        """Return the share of each setting in the variance of the metric at the first rung, where all are comparable.

        Empty with fewer than `RANDOM_TRIALS` trials, or where all are alike.
        """
        optuna = import_optuna()
        view = optuna.create_study(direction="maximize")
        for trial in self.trials():
            if 0 in trial.intermediate_values:
                value = trial.intermediate_values[0]
                view.add_trial(
                    optuna.trial.create_trial(value=value, params=trial.params, distributions=trial.distributions)
                )
        if len({trial.value for trial in view.trials}) < 2 or len(view.trials) < RANDOM_TRIALS:
            return {}
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=self.seed)
        return dict(optuna.importance.get_param_importances(view, evaluator=evaluator))

    def _propose(self, trials: Sequence[Any]) -> None:
        """Sample a trial: of those before it the higher rung counts as the better, a failed one as the worst."""
        optuna = import_optuna()
        create, state = optuna.trial.create_trial, optuna.trial.TrialState
        sampler = optuna.samplers.TPESampler(seed=self.seed + len(trials), n_startup_trials=RANDOM_TRIALS)
        view = optuna.create_study(direction="maximize", sampler=sampler)
        for trial in trials:
            values, what = dict(trial.intermediate_values), state.PRUNED if trial.intermediate_values else state.RUNNING
            if trial.state == state.FAIL:
                values, what = {0: 0.0}, state.PRUNED
            elif trial.state == state.COMPLETE:
                what = state.COMPLETE
            view.add_trial(
                create(
                    state=what,
                    value=trial.value if what == state.COMPLETE else None,
                    params=trial.params,
                    distributions=trial.distributions,
                    intermediate_values=values,
                )
            )
        if not trials:
            view.enqueue_trial(params_of(self.space, self.start))
        params = view.ask(self.distributions).params
        attributes = {TARGET: 0}
        # In one transaction: a worker that is killed leaves a whole trial or none.
        self.optuna.add_trial(
            create(state=state.RUNNING, params=params, distributions=self.distributions, user_attrs=attributes)
        )

    def _live_trial(self, number: int) -> Any:
        return import_optuna().Trial(self.optuna, self.trials()[number]._trial_id)

    @contextlib.contextmanager
    def _exclusive(self, create: bool = False) -> Iterator[None]:
        """Context in which no other worker decides; a worker that dies in it leaves no lock."""
        self._workers.execute("begin immediate")
        try:
            if create:
                self._workers.execute(WORKERS)
            yield
        except BaseException:
            self._workers.execute("rollback")
            raise
        self._workers.execute("commit")


def is_alive(host: str, pid: int, beat: float) -> bool:
    """Return whether a worker is there: it has given signs of life, and on this machine its process exists."""
    if time.time() - beat > SILENT_SECONDS:
        return False
    if host != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def import_optuna() -> Any:
    """Import Optuna, which is optional.

    Raises:
        SettingsError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise SettingsError("tune.py needs Optuna: pip install 'optuna>=5.0'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
