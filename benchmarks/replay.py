"""What a scheduler spends and loses: the search's own and Ray's on recorded curves, in hundreds of random searches.

    python -m benchmarks.curves …     # records benchmarks/curves/*.csv
    python -m benchmarks.replay       # prints a table, in some ten minutes

A search draws some of the recorded configs, in random order, and trains several at once; an epoch takes as long as it
took when it was recorded. The winner, the trial with the best accuracy if all were trained to the end, is lost if it
was stopped before reaching that.
"""

import argparse
import heapq
import itertools
import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from ray.tune.schedulers import MedianStoppingRule

from benchmarks import print_header, print_row
from benchmarks.curves import FOLDER, read_curves
from hparam_search import MAX_SECONDS_PER_TRIAL, MIN_DELTA, PATIENCE, new_scheduler
from search.records import TRIAL_PREFIX, Trial, new_report
from search.report import rank_correlation
from search.schedulers import PAUSE, STOP, RayScheduler, Scheduler, early_stop
from search.settings import Settings

Curve = list[dict]  # the reports of a config, one per epoch, with the keys of curves.COLUMNS


def new_trials(count: int) -> list[Trial]:
    """Return the trials of a search that has not begun."""
    return [Trial(f"{TRIAL_PREFIX}{i:05}") for i in range(count)]


def play(
    curves: dict[Trial, Curve], scheduler: Scheduler, stop: Callable[[list], str | None] | None, at_once: int
) -> tuple[float, int]:
    """Simulate a search, in which the trials get their reports, and return its idle time and training states.

    Idle are the seconds in which workers had nothing to do, until the last trial ended, summed over the workers. The
    states are the most trials that were paused or running at a time, each with a training state on disk.

    Args:
        curves: its trials, in starting order, and their curves.
        scheduler: a new scheduler for these trials.
        stop: see early_stop, or None; called before the scheduler.
        at_once: how many trials run at once.
    """
    running = []  # a heap of (time of the next report, name, trial)
    idle, states, now = 0.0, 0, 0.0

    def run(trial: Trial) -> None:
        curve, epochs = curves[trial], len(trial.reports)
        seconds = curve[epochs]["seconds"] - (curve[epochs - 1]["seconds"] if epochs else 0.0)
        heapq.heappush(running, (now + seconds, trial.name, trial))

    while True:
        while len(running) < at_once and (trial := scheduler.choose([each for each in curves if each.waits])):
            trial.become(running=True)
            run(trial)
        if not running:
            return idle, states
        states = max(states, len(running) + sum(trial.paused for trial in curves))
        idle += (at_once - len(running)) * (running[0][0] - now)
        now, _, trial = heapq.heappop(running)
        report = new_report(curves[trial][len(trial.reports)])
        stopped = stop is not None and stop([*trial.reports, report])
        decision = STOP if stopped else scheduler.judge(trial, report)
        trial.reports.append(report)
        if decision == STOP or len(trial.reports) == len(curves[trial]):
            trial.become(end="ended")
            scheduler.ended(trial)
        elif decision == PAUSE:
            trial.become(paused=True)
        else:
            run(trial)
        for beaten in scheduler.beaten():
            beaten.become(end="ended")


def new_schedulers(max_epochs: int) -> dict[str, Callable[[list[Trial]], Scheduler]]:
    """Return name → a function that builds a new scheduler for some trials."""
    settings = {"none": Settings(scheduler="none")}
    for grace, factor in itertools.product((1, 2, 3), (2, 3, 4)):
        knobs = {"grace_period": grace, "reduction_factor": factor}
        settings[f"asha, grace {grace}, factor {factor}"] = Settings(scheduler="asha", **knobs)
        for keep in (1, 2, 3):
            name = f"promote, grace {grace}, factor {factor}, keep {keep}"
            settings[name] = Settings(scheduler="promote", keep=keep, **knobs)

    def build(trials: list[Trial], settings: Settings) -> Scheduler:
        return new_scheduler(SimpleNamespace(settings=settings, own_trials=lambda: trials, history=()), max_epochs)

    median = partial(MedianStoppingRule, "epoch", "loss", "min", grace_period=3, min_time_slice=math.inf)
    made = {name: partial(build, settings=each) for name, each in settings.items()}
    return made | {"median, grace 3": lambda trials: RayScheduler(median(), ())}


def replay(
    curves: list[Curve],
    build: Callable[[list[Trial]], Scheduler],
    stop: Callable[[list], str | None] | None,
    at_once: int,
    trials: int,
    searches: int,
) -> tuple[float, float, float, float, int]:
    """Return the outcome of random searches: means of epochs, accuracy, lost (0 or 1), idle; most states.

    Args:
        curves: the curves of all recorded configs.
        build: builds a scheduler (see new_schedulers).
        stop: see play.
        at_once: how many trials run at once.
        trials: how many trials a search has.
        searches: how many searches to simulate.
    """
    results = []
    for seed in range(searches):
        drawn = dict(zip(new_trials(trials), random.Random(seed).sample(curves, trials), strict=True))
        idle, states = play(drawn, build(list(drawn)), stop, at_once)
        epochs = sum(len(trial.reports) for trial in drawn)
        possible = [max(row["accuracy"] for row in curve) for curve in drawn.values()]
        reached = [max(report.accuracy for report in trial.reports) for trial in drawn]
        winner = int(np.argmax(possible))
        lost = reached[winner] < possible[winner]
        results.append((epochs, max(reached), lost, idle, states))
    return *np.mean(results, axis=0)[:4], max(states for *_, states in results)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table of all schedulers, for several numbers of trials, and of trials at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=Path, default=FOLDER / "default.csv")
    parser.add_argument("--trials", type=int, nargs="+", default=[12, 24, 48], help="per search (default: %(default)s)")
    parser.add_argument("--searches", type=int, default=400, help="per row (default: %(default)s)")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1], help="trials (default: %(default)s)")
    parser.add_argument("--early-stopping", action="store_true", help="let trials also end by themselves")
    args = parser.parse_args(argv)
    curves = list(read_curves(args.curves).values())
    if len(curves) < (most := max(args.trials)):
        parser.error(f"{args.curves} has {len(curves)} configs, fewer than the {most} of a search; record more")
    max_epochs = len(curves[0])
    stop = partial(early_stop, max_epochs, PATIENCE, MIN_DELTA, MAX_SECONDS_PER_TRIAL) if args.early_stopping else None
    print(f"{len(curves)} recorded configs, {args.searches} searches per row.")
    best = [max(row["accuracy"] for row in curve) for curve in curves]
    for epoch in (each for each in (1, 2, 4, 8) if each <= max_epochs):
        agreement = rank_correlation([-curve[epoch - 1]["loss"] for curve in curves], best)
        print(f"Rank agreement of the loss at epoch {epoch} with the best accuracy: {agreement:+.2f}.")
    print()
    print_header("scheduler", "trials", "at once", "epochs", "accuracy", "winner lost", "idle", "states")
    schedulers = new_schedulers(max_epochs).items()
    for trials, (name, build), at_once in itertools.product(args.trials, schedulers, args.at_once):
        epochs, found, lost, idle, states = replay(curves, build, stop, at_once, trials, args.searches)
        print_row(name, trials, at_once, f"{epochs:.0f}", f"{found:.4f}", f"{lost:.1%}", f"{idle:.0f} s", states)


if __name__ == "__main__":
    main()
