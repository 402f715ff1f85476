"""Successive halving that pauses trials: only the best of those that reach a rung are promoted beyond it.

Ray's ASHA judges a trial once, when it reaches a rung, against those that were there first. Here the number of trials
is known and a paused trial can continue, so the decision can wait until it is certain (the rungs of Jamieson and
Talwalkar 2016, "Non-stochastic Best Arm Identification and Hyperparameter Optimization"). No worker waits: a free one
with nothing better to do continues the best paused trial, as in algorithm 2 of Li et al. 2020, "A System for Massively
Parallel Hyperparameter Tuning".
"""

import math
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any

from ray.tune.schedulers import FIFOScheduler

from search.records import Trial


def new_rungs(trials: int, first: int, factor: float, keep: int, max_epochs: int) -> dict[int, int]:
    """Return the epochs of the rungs, and how many trials are promoted at each.

    Args:
        trials: how many trials start.
        first: epoch of the first rung, at least 1; each further rung is at `factor` times the epoch of the one before.
        factor: 1 in `factor` of the trials that reach a rung is promoted; above 1.
        keep: at least this many are promoted; 0 for no minimum.
        max_epochs: epochs of a trial; all rungs come before.
    """
    rungs, epoch = {}, first
    while epoch < max_epochs:
        rungs[epoch] = trials = min(trials, max(keep, math.ceil(trials / factor)))
        epoch = math.ceil(min(epoch * factor, max_epochs))
    return rungs


class Promotion(FIFOScheduler):
    """Pauses trials at rungs, and promotes those with the lowest validation loss there (see new_rungs).

    It keeps no state: everything follows from the reports and ends of `trials`, which the search updates.
    """

    def __init__(self, trials: Sequence[Trial], rungs: dict[int, int], max_epochs: int) -> None:
        super().__init__()
        self.trials, self.rungs = trials, rungs
        self.following = dict(pairwise([*rungs, max_epochs]))

    def contenders(self, rung: int) -> list[Trial]:
        """Return the trials that reached a rung, best first, except those that ended before the next.

        So a trial that fails, diverges or stops early frees its place for another one.
        """
        following = self.following[rung]
        found = [
            trial
            for trial in self.trials
            if len(trial.reports) >= rung and (not (trial.end or trial.error) or len(trial.reports) >= following)
        ]
        return sorted(found, key=lambda trial: (trial.reports[rung - 1].loss, trial.name))

    def to_come(self, rung: int) -> int:
        """Return how many trials may still reach a rung."""
        return sum(len(trial.reports) < rung and not (trial.end or trial.error) for trial in self.trials)

    def on_trial_result(self, controller: Any, trial: Trial, result: dict) -> str:
        """Stop a trial at a rung if enough others are better, continue it if that is impossible, otherwise pause it."""
        rung = result["epoch"]
        if rung not in self.rungs:
            return self.CONTINUE
        others = [each for each in self.contenders(rung) if each is not trial]
        better = sum((each.reports[rung - 1].loss, each.name) < (result["loss"], trial.name) for each in others)
        if better >= self.rungs[rung]:
            return self.STOP
        others_to_come = self.to_come(rung) - (len(trial.reports) < rung)
        return self.CONTINUE if better + others_to_come < self.rungs[rung] else self.PAUSE

    def beaten(self) -> list[Trial]:
        """Return the paused trials that can no longer be promoted, since enough others are better."""
        return [
            trial
            for rung, places in self.rungs.items()
            for trial in self.contenders(rung)[places:]
            if trial.paused and len(trial.reports) == rung
        ]

    def choose(self, trials: Sequence[Trial]) -> Trial | None:
        """Return the one of these trials that a free worker takes, or None.

        First come trials that were interrupted or failed, then paused ones that are sure to be promoted, then new ones,
        then the other paused ones. Of paused trials the highest rung comes first, then the lowest loss.
        """
        interrupted = (trial for trial in trials if trial.reports and not self.is_paused(trial))
        new = (trial for trial in trials if not trial.reports)
        paused = [trial for trial in trials if self.is_paused(trial)]
        rungs = {len(trial.reports) for trial in paused}
        ranks = {rung: {trial: rank for rank, trial in enumerate(self.contenders(rung))} for rung in rungs}
        to_come = {rung: self.to_come(rung) for rung in rungs}

        def rank(trial: Trial) -> int:
            return ranks[len(trial.reports)][trial]

        def is_sure(trial: Trial) -> bool:  # even if all trials to come are better
            rung = len(trial.reports)
            return rank(trial) + to_come[rung] < self.rungs[rung]

        paused.sort(key=lambda trial: (-len(trial.reports), rank(trial)))
        return next(chain(interrupted, filter(is_sure, paused), new, paused), None)

    def is_paused(self, trial: Trial) -> bool:
        """Return whether a trial is paused at one of these rungs; the scheduler may have been edited since."""
        return trial.paused and len(trial.reports) in self.rungs
