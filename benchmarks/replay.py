"""What a scheduler spends and loses: the search's own and Ray's on recorded curves, in hundreds of random searches.

    python -m benchmarks.curves …     # records benchmarks/curves/*.csv
    python -m benchmarks.replay       # prints a table

A search draws some of the recorded configs, in random order, and trains several at once; an epoch takes as long as it
took when it was recorded. The winner, the trial with the best accuracy if all were trained to the end, is lost if it
was stopped before reaching that.
"""

import argparse
import functools
import heapq
import itertools
import math
import multiprocessing
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from search.halving import Promotion
from search.hooks import early_stop

from benchmarks import print_header, print_row
from benchmarks.curves import FOLDER, read_curves
from hparam_search import MAX_SECONDS_PER_TRIAL, MIN_DELTA, PATIENCE, new_scheduler
from search.records import TRIAL_PREFIX, Trial
from search.report import rank_correlation
from search.settings import Settings

Curve = list[dict]  # the reports of a config, one per epoch, with the keys of curves.COLUMNS


@dataclass
class Played:
    """What a simulated search did."""

    order: list[Trial]  # the trials that reported, an entry per epoch
    idle: float  # seconds in which workers had nothing to do, until the last trial ended, summed over the workers
    states: int  # the most trials that were paused or running at a time, each with a training state on disk


def own_early_stop(max_epochs: int) -> Callable[[list], str | None]:
    """Return the early stopping of the search itself."""
    return functools.partial(early_stop, max_epochs, PATIENCE, MIN_DELTA, MAX_SECONDS_PER_TRIAL)


def new_trials(count: int) -> list[Trial]:
    """Return the trials of a search that has not begun."""
    return [Trial(f"{TRIAL_PREFIX}{i:05}") for i in range(count)]


def play(
    trials: Sequence[Trial], curve_of: Callable[[Trial], Curve], scheduler: TrialScheduler,
    stop: Callable[[list], str | None] | None, at_once: int,
) -> Played:  # fmt: skip
    """Simulate a search, in which the trials get their reports.

    Args:
        trials: its trials, in starting order.
        curve_of: returns the curve of a trial; called when the trial starts.
        scheduler: a new scheduler with epochs as its time, for these trials: Ray's, or Promotion.
        stop: see early_stop, or None; called before the scheduler.
        at_once: how many trials run at once.
    """
    controller = SimpleNamespace(get_live_trials=list)  # the part of Tune that schedulers which stop trials use
    curves = {}
    running = []  # a heap of (time of the next report, name, trial)
    played, now = Played([], 0.0, 0), 0.0

    def take() -> Trial | None:
        busy = [trial for *_, trial in running]
        waiting = [trial for trial in trials if not trial.end and trial not in busy]
        return scheduler.choose(waiting) if isinstance(scheduler, Promotion) else next(iter(waiting), None)

    def run(trial: Trial) -> None:
        curve, epochs = curves[trial], len(trial.reports)
        seconds = curve[epochs]["seconds"] - (curve[epochs - 1]["seconds"] if epochs else 0.0)
        heapq.heappush(running, (now + seconds, trial.name, trial))

    while True:
        while len(running) < at_once and (trial := take()):
            if trial not in curves:
                curves[trial] = curve_of(trial)
                scheduler.on_trial_add(controller, trial)
            trial.paused = False
            run(trial)
        if not running:
            return played
        played.states = max(played.states, len(running) + sum(trial.paused for trial in trials))
        played.idle += (at_once - len(running)) * (running[0][0] - now)
        now, _, trial = heapq.heappop(running)
        report = SimpleNamespace(**curves[trial][len(trial.reports)])
        stopped = stop is not None and stop([*trial.reports, report])
        decision = TrialScheduler.STOP if stopped else scheduler.on_trial_result(controller, trial, vars(report))
        trial.reports.append(report)
        played.order.append(trial)
        trial.paused = decision == TrialScheduler.PAUSE
        if decision == TrialScheduler.STOP or len(trial.reports) == len(curves[trial]):
            trial.end = "ended"
            scheduler.on_trial_complete(controller, trial, vars(report))
        elif not trial.paused:
            run(trial)
        if isinstance(scheduler, Promotion):
            for beaten in scheduler.beaten():
                beaten.paused, beaten.end = False, "ended"


def new_schedulers(max_epochs: int) -> dict[str, Callable[[list[Trial]], TrialScheduler]]:
    """Return name → a function that builds a new scheduler for some trials."""
    loss = {"time_attr": "epoch", "metric": "loss", "mode": "min"}
    made = {"none": lambda trials: FIFOScheduler()}
    for grace, factor in itertools.product((1, 2, 3), (2, 3, 4)):
        asha = functools.partial(ASHAScheduler, **loss, max_t=max_epochs, grace_period=grace, reduction_factor=factor)
        made[f"asha, grace {grace}, factor {factor}"] = lambda trials, asha=asha: asha()
        for keep in (1, 2, 3):
            settings = Settings(grace_period=grace, reduction_factor=factor, keep=keep)
            promote = functools.partial(new_scheduler, settings, max_epochs=max_epochs)
            made[f"promote, grace {grace}, factor {factor}, keep {keep}"] = promote
    median = functools.partial(MedianStoppingRule, **loss, grace_period=3, min_time_slice=math.inf)
    made["median, grace 3"] = lambda trials: median()
    return made


def replay(
    curves: list[Curve], scheduler: str, early_stopping: bool, at_once: int, trials: int, searches: int
) -> tuple[float, float, float, float, int]:
    """Return the outcome of random searches: means of epochs, accuracy, lost (0 or 1), idle; most states.

    Args:
        curves: the curves of all recorded configs.
        scheduler: a key of new_schedulers.
        early_stopping: whether trials also end by themselves, as in a real search.
        at_once: how many trials run at once.
        trials: how many trials a search has.
        searches: how many searches to simulate.
    """
    max_epochs = len(curves[0])
    stop = own_early_stop(max_epochs) if early_stopping else None
    results = []
    for seed in range(searches):
        drawn, waiting = random.Random(seed).sample(curves, trials), new_trials(trials)
        curve_of = dict(zip(waiting, drawn, strict=True))
        played = play(waiting, curve_of.__getitem__, new_schedulers(max_epochs)[scheduler](waiting), stop, at_once)
        possible = [max(row["accuracy"] for row in curve) for curve in drawn]
        reached = [max(report.accuracy for report in trial.reports) for trial in waiting]
        winner = int(np.argmax(possible))
        lost = reached[winner] < possible[winner]
        results.append((len(played.order), max(reached), lost, played.idle, played.states))
    epochs, found, lost, idle, _ = np.mean(results, axis=0)
    return epochs, found, lost, idle, max(states for *_, states in results)


def rank_agreement(curves: list[Curve], epoch: int) -> float:
    """Return the rank correlation between low losses after an epoch and high best accuracies, from -1 to 1."""
    best = [max(row["accuracy"] for row in curve) for curve in curves]
    return rank_correlation([-curve[epoch - 1]["loss"] for curve in curves], best)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table of all schedulers, for several numbers of trials, and of trials at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=Path, default=FOLDER / "default.csv")
    parser.add_argument(
        "--trials", type=int, nargs="+", default=[12, 24, 48], help="trials per search (default: %(default)s)"
    )
    parser.add_argument("--searches", type=int, default=400, help="searches per row (default: %(default)s)")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 2, 4, 16], help="trials (default: %(default)s)")
    parser.add_argument("--early-stopping", action="store_true", help="let trials also end by themselves")
    args = parser.parse_args(argv)
    curves = list(read_curves(args.curves).values())
    if len(curves) < max(args.trials):
        most = max(args.trials)
        parser.error(f"{args.curves} has {len(curves)} configs, fewer than the {most} of a search; record more")
    print(f"{len(curves)} recorded configs, {args.searches} searches per row.")
    agreements = (f"{epoch}: {rank_agreement(curves, epoch):+.2f}" for epoch in (1, 2, 4, 8) if epoch <= len(curves[0]))
    print(f"Rank agreement of the loss after an epoch with the best accuracy: {', '.join(agreements)}.\n")
    print_header("scheduler", "trials", "at once", "epochs", "accuracy", "winner lost", "idle", "states")
    rows = list(itertools.product(args.trials, new_schedulers(len(curves[0])), args.at_once))
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [
            pool.submit(replay, curves, name, args.early_stopping, at_once, trials, args.searches)
            for trials, name, at_once in rows
        ]
        for (trials, name, at_once), future in zip(rows, futures, strict=True):
            epochs, found, lost, idle, states = future.result()
            cells = f"{epochs:.0f}", f"{found:.4f}", f"{lost:.1%}", f"{idle:.0f} s", states
            print_row(name, trials, at_once, *cells)


if __name__ == "__main__":
    main()
