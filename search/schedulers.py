"""Which trials continue: early stopping, which looks at one trial, and a scheduler, which compares them.

A scheduler answers three questions: what a trial does after an epoch (judge), which paused trials can no longer win
(beaten), and which trial a free worker takes (choose).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import TrialScheduler

from data import InputError
from search.records import Trial, as_result
from search.settings import Settings
from train import Report

CONTINUE, PAUSE, STOP = TrialScheduler.CONTINUE, TrialScheduler.PAUSE, TrialScheduler.STOP
STOPPED = "stopped by the scheduler"


def early_stop(
    max_epochs: int, patience: int | None, min_delta: float, max_seconds: float | None, reports: list[Report]
) -> str | None:
    """Return why a trial ends after its latest report, whatever the other trials do, or None.

    It ends after max_epochs, after max_seconds of training and validation, if its loss is not finite, or if the loss
    (nats) has not fallen by min_delta for `patience` epochs. None switches max_seconds or patience off.
    """
    latest, losses = reports[-1], [report.loss for report in reports]
    if not math.isfinite(latest.loss):
        return "loss became NaN or infinite"
    if latest.epoch >= max_epochs:
        return "all epochs done"
    if max_seconds is not None and latest.seconds >= max_seconds:
        return f"reached the time limit ({max_seconds:,} s)"
    if patience is None or len(losses) <= patience:
        return None
    if min(losses[-patience:]) > min(losses[:-patience]) - min_delta:
        return f"no progress for {patience} epochs"
    return None


class Scheduler:
    """Trains all trials to the end, in order."""

    rungs: dict[int, int] = {}  # noqa: RUF012 (read only): epoch → how many trials are promoted there

    def judge(self, trial: Trial, report: Report) -> str:
        """Return CONTINUE, PAUSE or STOP for a trial that reports an epoch, which is not in trial.reports yet."""
        return CONTINUE

    def ended(self, trial: Trial) -> None:
        """Learn that a trial has ended, for whatever reason."""

    def beaten(self) -> list[Trial]:
        """Return the paused trials that can no longer be promoted."""
        return []

    def choose(self, trials: Sequence[Trial]) -> Trial | None:
        """Return the one of these trials that a free worker takes, or None: first those that have begun."""
        return next(iter(sorted(trials, key=lambda trial: not trial.reports)), None)


class RayScheduler(Scheduler):
    """One of Ray's schedulers, such as ASHAScheduler, that stops trials but never pauses them.

    A new one is told of the history of a search first. It sees records.Trial in place of Tune's trials, so that these
    are the same in all processes, and each epoch once.
    """

    NO_CONTROLLER: Any = SimpleNamespace(get_live_trials=list, get_trials=list)

    def __init__(self, scheduler: Any, history: Iterable[tuple[Trial, Report, str | None]]) -> None:
        self.scheduler = scheduler
        self.judged: dict[Trial, float] = {}  # the last epoch that the scheduler has seen; infinity after the end
        for trial, report, end in history:
            if not trial.repeats:
                if end in (None, STOPPED):
                    self.judge(trial, report)
                if end and trial.end:
                    self.ended(trial)

    def judge(self, trial: Trial, report: Report) -> str:
        self.add(trial)
        if report.epoch <= self.judged[trial]:
            return CONTINUE
        self.judged[trial] = report.epoch
        return self.scheduler.on_trial_result(self.NO_CONTROLLER, trial, as_result(report))

    def ended(self, trial: Trial) -> None:
        self.add(trial)
        if self.judged[trial] < math.inf:
            self.judged[trial] = math.inf
            self.scheduler.on_trial_complete(self.NO_CONTROLLER, trial, as_result(trial.reports[-1]))

    def add(self, trial: Trial) -> None:
        """Tell the scheduler of a trial that it does not know yet."""
        if trial not in self.judged:
            self.judged[trial] = 0
            self.scheduler.on_trial_add(self.NO_CONTROLLER, trial)


def with_knobs(
    settings: Settings, max_epochs: int, grace_period: int, reduction_factor: float, keep: int | None
) -> Settings:
    """Return settings in which these values stand for the knobs that were not given; keep may be None, for 0.

    Raises InputError if the first rung lies beyond max_epochs.
    """
    knobs: dict[str, Any] = {"grace_period": min(grace_period, max_epochs), "reduction_factor": reduction_factor}
    knobs["keep"] = keep or 0
    if (given := settings.grace_period or 0) > max_epochs:
        raise InputError(f"--grace-period {given} exceeds the {max_epochs} epochs of a trial; use at most that")
    return replace(settings, **{key: value for key, value in knobs.items() if getattr(settings, key) is None})


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


class Promotion(Scheduler):
    """Successive halving that pauses trials: only the best of those that reach a rung are promoted beyond it.

    Ray's ASHA judges a trial once, when it reaches a rung, against those that were there first. Here the number of
    trials is known and a paused trial can continue, so the decision can wait until it is certain (the rungs of Jamieson
    and Talwalkar 2016, "Non-stochastic Best Arm Identification and Hyperparameter Optimization"). No worker waits: a
    free one with nothing better to do continues the best paused trial, as in algorithm 2 of Li et al. 2020, "A System
    for Massively Parallel Hyperparameter Tuning".

    It keeps no state: everything follows from the reports and ends of `trials`, which the search updates.
    """

    def __init__(self, trials: Sequence[Trial], rungs: dict[int, int], max_epochs: int) -> None:
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

    def judge(self, trial: Trial, report: Report) -> str:
        """Stop a trial at a rung if enough others are better, continue it if that is impossible, otherwise pause it."""
        rung = report.epoch
        if rung not in self.rungs:
            return CONTINUE
        others = self.contenders(rung)
        better = sum((each.reports[rung - 1].loss, each.name) < (report.loss, trial.name) for each in others)
        if better >= self.rungs[rung]:
            return STOP
        others_to_come = self.to_come(rung) - 1
        return CONTINUE if better + others_to_come < self.rungs[rung] else PAUSE

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
        order = {}
        for rung, places in self.rungs.items():
            sure = places - self.to_come(rung)  # even if all trials to come are better
            for rank, trial in enumerate(self.contenders(rung)):
                if trial.paused and len(trial.reports) == rung:
                    order[trial] = (1 if rank < sure else 3, -rung, rank)
        return min(trials, key=lambda trial: order.get(trial, (0 if trial.reports else 2,)), default=None)
