"""Asynchronous successive halving: which trial goes on to the next rung. Pure functions of the standings.

Source: Li et al. 2018, A System for Massively Parallel Hyperparameter Tuning, https://arxiv.org/abs/1810.05934
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from detection.config.fields import amount_of


@dataclass(frozen=True)
class Standing:
    """How far a trial has come.

    Attributes:
        number: of the trial.
        values: its metric at the end of each rung that is complete, from the lowest on.
        target: the rung that it is to reach, or has reached.
        failed: it ended with an error in the rung after `values`, and counts as the worst there.
    """

    number: int
    values: tuple[float, ...]
    target: int
    failed: bool = False

    @property
    def is_due(self) -> bool:
        """Whether its target is not reached yet."""
        return not self.failed and self.target >= len(self.values)


def promotable(standings: Sequence[Standing], rungs: int, reduction: int) -> Standing | None:
    """Return the trial that deserves the next rung, looking from the highest rung down; None: there is none yet.

    Of n trials that have completed a rung, the best n // reduction deserve the next one, whenever they come.
    """
    for rung in reversed(range(rungs - 1)):
        there = [standing for standing in standings if len(standing.values) > rung]
        failed = sum(standing.failed and len(standing.values) == rung for standing in standings)
        best = sorted(there, key=lambda standing: (-standing.values[rung], standing.number))
        for standing in best[: (len(there) + failed) // reduction]:
            if standing.target == rung and not standing.failed:
                return standing
    return None


def ranked(standings: Sequence[Standing]) -> list[Standing]:
    """Sort trials with a value: the higher rung first, then the higher value in it."""
    there = [standing for standing in standings if standing.values]
    return sorted(there, key=lambda standing: (-len(standing.values), -standing.values[-1], standing.number))


def rung_lengths(steps: int | str, rungs: int, reduction: int) -> list[int | str]:
    """Return where each rung ends, in the unit of `train.steps` (steps or "12ep"); the last one is the whole run.

    Raises:
        ValueError: the first rung has no step.
    """
    whole, lengths = amount_of(steps), list[int | str]()
    for rung in range(rungs):
        length = whole / reduction ** (rungs - 1 - rung)
        lengths.append(round(length) if isinstance(steps, int) else f"{math.ceil(1000 * length) / 1000:g}ep")
    if amount_of(lengths[0]) < (1 if isinstance(steps, int) else 0.001) or len(set(lengths)) < rungs:
        raise ValueError(f"{rungs} rungs of a run of {steps} steps: the first one has no step; take fewer")
    return [*lengths[:-1], steps]
