"""Does Optuna's TPE find more than random draws, for the same epochs? On recorded curves, in hundreds of searches.

    python -m benchmarks.samplers     # prints a table; needs the curves of benchmarks.curves

A drawn config is assumed to train as the nearest recorded config of the same widths did, by the logarithms of learning
rate and dropout. One trial runs at a time, with the search's own early stopping.
"""

import argparse
import itertools
import math
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from ray import tune

from benchmarks import print_header, print_row
from benchmarks.curves import FOLDER, read_curves
from benchmarks.replay import Curve, new_trials, own_early_stop, play
from hparam_search import GRACE_PERIOD, KEEP, METRIC, MODE, REDUCTION_FACTOR, new_scheduler, param_space
from search.records import Objective, Trial
from search.sampler import draw_configs, outcomes, suggest_config
from search.settings import Settings

TRIALS = (12, 24, 48)
SEARCHES = 300  # per cell
RANGES = ("p_drop", "lr")
SAMPLERS = {"random": None, "TPE after 4": 4, "TPE after 10": 10}  # → trials drawn at random first


def nearest(recorded: list[Curve], config: dict) -> Curve:
    """Return the curve of the recorded config that is nearest to a config."""
    widths = [curve for curve in recorded if all(curve[0][key] == config[key] for key in ("h_1", "h_2"))]

    def distance(curve: Curve) -> float:
        # Each distance is a share of its range, so that all count equally.
        shares = [
            math.log(curve[0][key] / config[key]) / math.log(param_space[key].upper / param_space[key].lower)
            for key in RANGES
        ]
        return math.hypot(*shares)

    return min(widths, key=distance)


def search(recorded: list[Curve], scheduler: str, startup: int | None, trials: int, seed: int) -> tuple[int, float]:
    """Simulate a search, and return for how many epochs it trained, and the best accuracy.

    Args:
        recorded: the curves of all recorded configs.
        scheduler: promote or asha, with the search's own knobs.
        startup: how many trials are drawn at random before TPE draws; None for all.
        trials: how many trials the search has.
        seed: random seed of the draws.
    """
    max_epochs = len(recorded[0])
    widths = {key: tune.choice(sorted({curve[0][key] for curve in recorded})) for key in ("h_1", "h_2")}
    space = param_space | {"seed": seed} | widths
    at_random = draw_configs(space, trials, seed)
    waiting = new_trials(trials)
    settings = Settings(scheduler=scheduler, grace_period=GRACE_PERIOD, reduction_factor=REDUCTION_FACTOR, keep=KEEP)
    chosen = new_scheduler(settings, waiting, max_epochs)

    def draw(trial: Trial) -> Curve:
        number = int(trial.trial_id)
        trial.config = at_random[number]
        if startup is not None:
            told = outcomes(waiting, Objective(METRIC, MODE), GRACE_PERIOD if scheduler == "promote" else None)
            trial.config = suggest_config(space, seed, number, told, startup)
        return nearest(recorded, trial.config)

    played = play(waiting, draw, chosen, own_early_stop(max_epochs), at_once=1)
    return len(played.order), max(report.accuracy for trial in waiting for report in trial.reports)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table of the samplers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=Path, default=FOLDER / "default.csv")
    args = parser.parse_args(argv)
    recorded = list(read_curves(args.curves).values())
    print(f"{len(recorded)} recorded configs, {SEARCHES} searches per cell: epochs, accuracy ± standard error.\n")
    print_header("sampler", "scheduler", *(f"{trials} trials" for trials in TRIALS))
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for (name, startup), scheduler in itertools.product(SAMPLERS.items(), ("promote", "asha")):
            cells = []
            for trials in TRIALS:
                one = partial(search, recorded, scheduler, startup, trials)
                epochs, found = np.array(list(pool.map(one, range(SEARCHES), chunksize=10))).T
                error = found.std() / math.sqrt(len(found))
                cells.append(f"{epochs.mean():.0f}, {found.mean():.4f} ± {error:.4f}")
            print_row(name, scheduler, *cells)


if __name__ == "__main__":
    main()
