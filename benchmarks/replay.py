"""Simulate searches on recorded curves, to compare draws and schedulers: accuracy found, epochs spent, winners lost.

    python -m benchmarks.curves …     # records benchmarks/curves/*.csv
    python -m benchmarks.replay       # prints a table, in about ten minutes

A drawn config gets the curve and epoch times of the nearest recorded one with the same widths, on the logarithmic
scales of learning rate and dropout. Several trials can run at once. The winner is the trial that would be the most
accurate if all were trained to the end; it is lost if no trial reaches its accuracy.
"""

import argparse
import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from ray import tune
from ray.tune.schedulers import MedianStoppingRule

from benchmarks import print_header, print_row
from benchmarks.curves import FOLDER, best_accuracy, read_curves
from benchmarks.recipes import standard_error
from hparam_search import MAX_SECONDS_PER_TRIAL, MIN_DELTA, PATIENCE, new_scheduler, param_space
from search.records import TRIAL_PREFIX, Trial, new_report
from search.report import rank_correlation
from search.sampler import draw_configs
from search.schedulers import PAUSE, STOP, RayScheduler, Scheduler, early_stop
from search.settings import Settings
from search.space import places_of, summarize, value_at

DRAWS = ("design", "independent")  # how configs are drawn
Curve = list[dict]  # the reports of a config, one per epoch, with the keys of curves.COLUMNS


def new_trials(count: int) -> list[Trial]:
    """Return the trials of a search that has not begun."""
    return [Trial(f"{TRIAL_PREFIX}{i:05}") for i in range(count)]


def play(
    curves: dict[Trial, Curve], scheduler: Scheduler, stop: Callable[[list], str | None] | None, at_once: int
) -> tuple[float, int]:
    """Simulate a search, which adds the reports to its trials, and return its idle time and number of training states.

    Idle time: how long workers had nothing to do until the last trial ended, in seconds, summed over the workers.
    Training states: the most trials that were paused or running at a time, each with a training state on disk.

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


class Surrogate:
    """The space of recorded curves, in which any config has the curve of the nearest recorded one."""

    def __init__(self, curves: Sequence[Curve]) -> None:
        self.curves = curves
        widths = {key: tune.grid_search(sorted({curve[0][key] for curve in curves})) for key in ("h_1", "h_2")}
        self.space = {key: param_space[key] for key in ("p_drop", "lr")} | widths
        self.summary = summarize(self.space)
        self.places = np.array([self.place(curve[0]) for curve in curves])

    def place(self, config: dict) -> list[float]:
        """Return a config's position in the space; different widths are farther apart than any other values."""
        ranges = [places_of(config[key], self.summary[key])[0] for key in ("p_drop", "lr")]
        return [*ranges, config["h_1"] * 10.0, config["h_2"] * 10.0]

    def draw(self, draws: str, samples: int, seed: int) -> list[Curve]:
        """Return the curves of a search's trials, in starting order; `draws` is "design" or "independent"."""
        configs = draw_configs(self.space, [samples], seed)
        if draws == "independent":
            random = np.random.default_rng(seed)
            for config, key in itertools.product(configs, ("p_drop", "lr")):
                config[key] = value_at(random.random(), self.summary[key])
        nearest = [np.square(self.places - self.place(config)).sum(axis=1).argmin() for config in configs]
        return [self.curves[i] for i in nearest]


def replay(
    draw: Callable[[int], list[Curve]],
    build: Callable[[list[Trial]], Scheduler],
    stop: Callable[[list], str | None] | None,
    at_once: int,
    searches: int,
) -> np.ndarray:
    """Simulate searches; return epochs, best accuracy, whether the winner was lost, idle time and most states of each.

    Args:
        draw: returns the curves of the trials of a search, in starting order, from a seed.
        build: builds a scheduler (see new_schedulers).
        stop: see play.
        at_once: how many trials run at once.
        searches: how many searches to simulate.

    Returns:
        float64 (searches, 5).
    """
    results = []
    for seed in range(searches):
        curves = draw(seed)
        drawn = dict(zip(new_trials(len(curves)), curves, strict=True))
        idle, states = play(drawn, build(list(drawn)), stop, at_once)
        epochs = sum(len(trial.reports) for trial in drawn)
        found = max(report.accuracy for trial in drawn for report in trial.reports)
        results.append((epochs, found, found < max(map(best_accuracy, curves)), idle, states))
    return np.array(results, dtype=float)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table of draws and schedulers, for several numbers of trials, and of trials at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=Path, default=FOLDER / "default.csv")
    parser.add_argument(
        "--trials", type=int, nargs="+", default=[12, 24, 48], help="per simulated search (default: %(default)s)"
    )
    parser.add_argument("--searches", type=int, default=400, help="simulated per row (default: %(default)s)")
    parser.add_argument(
        "--at-once", type=int, nargs="+", default=[1], help="how many trials run at once (default: %(default)s)"
    )
    parser.add_argument(
        "--draws",
        nargs="+",
        choices=DRAWS,
        default=DRAWS[:1],
        help="the search's own, or independent ones (default: design)",
    )
    parser.add_argument("--schedulers", nargs="+", metavar="NAME", help="names from the table (default: all)")
    parser.add_argument("--early-stopping", action="store_true", help="let trials also end by themselves")
    args = parser.parse_args(argv)
    if not args.curves.is_file():
        parser.error(f"{args.curves} is not a file; record curves first")
    recorded: dict[tuple, list[Curve]] = {}
    for curve in read_curves(args.curves).values():
        recorded.setdefault((curve[0]["p_drop"], curve[0]["lr"]), []).append(curve)
    surrogate = Surrogate([curves[0] for curves in recorded.values()])
    pairs = len({(curve[0]["h_1"], curve[0]["h_2"]) for curve in surrogate.curves})
    if wrong := [each for each in args.trials if each % pairs]:
        parser.error(f"--trials {wrong[0]} does not fit {pairs} pairs of widths; use multiples of {pairs}")
    max_epochs = len(surrogate.curves[0])
    stop = partial(early_stop, max_epochs, PATIENCE, MIN_DELTA, MAX_SECONDS_PER_TRIAL) if args.early_stopping else None
    schedulers = new_schedulers(max_epochs)
    if unknown := set(args.schedulers or ()) - schedulers.keys():
        parser.error(f"unknown scheduler {min(unknown)!r}; use {', '.join(schedulers)}")
    print(f"{len(surrogate.curves)} recorded configs, {args.searches} searches per row.")
    best = [best_accuracy(curve) for curve in surrogate.curves]
    for epoch in (each for each in (1, 2, 4, 8) if each <= max_epochs):
        agreement = rank_correlation([-curve[epoch - 1]["loss"] for curve in surrogate.curves], best)
        print(f"Rank agreement of the loss at epoch {epoch} with the best accuracy: {agreement:+.2f}.")
    repeated = [curves for curves in recorded.values() if len(curves) > 1]
    for epoch in (each for each in (2, 4, 8, 16, max_epochs) if repeated and each <= max_epochs):
        noise = [
            np.std([[c[epoch - 1][key] for key in ("loss", "accuracy")] for c in curves], 0, ddof=1)
            for curves in repeated
        ]
        loss, accuracy = np.sqrt(np.mean(np.square(noise), axis=0))
        print(f"Standard deviation between seeds after epoch {epoch}: loss {loss:.4f}, accuracy {accuracy:.4f}.")
    print()
    print_header("draws", "scheduler", "trials", "at once", "epochs", "accuracy", "winner lost", "idle", "states")
    rows = itertools.product(args.trials, args.schedulers or schedulers, args.draws, args.at_once)
    for trials, name, draws, at_once in rows:
        draw = partial(surrogate.draw, draws, trials // pairs)
        results = replay(draw, schedulers[name], stop, at_once, args.searches)
        epochs, found, lost, idle, _ = results.mean(axis=0)
        accuracy = f"{found:.4f} ± {standard_error(results[:, 1]):.4f}"
        states = f"{results[:, 4].max():.0f}"
        print_row(draws, name, trials, at_once, f"{epochs:.0f}", accuracy, f"{lost:.1%}", f"{idle:.0f} s", states)


if __name__ == "__main__":
    main()
