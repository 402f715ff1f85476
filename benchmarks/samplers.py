"""Does Optuna's TPE find more than random draws, for the same epochs? On recorded curves, in hundreds of searches.

    python -m benchmarks.samplers     # prints a table; needs the curves of benchmarks.curves

A drawn config is assumed to train as the nearest recorded config of the same widths did, by the logarithms of learning
rate and dropout. One trial runs at a time, under the search's own scheduler and early stopping. The samplers are
compared by the best accuracy found after a given number of epochs.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from ray import tune

from benchmarks.curves import FOLDER, read_curves
from benchmarks.replay import Curve, own_early_stop, play
from hparam_search import GRACE_PERIOD, REDUCTION_FACTOR, new_scheduler, param_space
from search.sampler import draw_configs, suggest_config
from search.settings import Settings

BUDGETS = (60, 120, 240, 480, 960)  # epochs
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


def best_accuracy(curve: Curve, epochs: int) -> float:
    """Return the best accuracy that a trial found in its first epochs; 0 for epochs that diverged."""
    return max(row["accuracy"] if math.isfinite(row["loss"]) else 0.0 for row in curve[:epochs])


def best_after(curves: list[Curve], epochs: list[int], budget: int) -> float:
    """Return the best accuracy of trials, trained one after the other, once `budget` epochs are spent."""
    found = 0.0
    for curve, trained in zip(curves, epochs, strict=True):
        found = max(found, best_accuracy(curve, min(trained, budget)))
        budget -= trained
        if budget <= 0:
            break
    return found


def search(recorded: list[Curve], startup: int | None, seed: int) -> list[float]:
    """Simulate a search, and return the best accuracy found after each of BUDGETS.

    Args:
        recorded: the curves of all recorded configs.
        startup: how many trials are drawn at random before TPE draws; None for all.
        seed: random seed of the draws.
    """
    max_epochs = len(recorded[0])
    widths = {key: tune.choice(sorted({curve[0][key] for curve in recorded})) for key in ("h_1", "h_2")}
    space = param_space | {"seed": seed} | widths
    at_random = draw_configs(space, max(BUDGETS), seed)  # each takes at least one epoch
    configs, curves, ended = [], [], {}  # those of the drawn trials; ended: number → epochs

    def draws() -> Iterator[Curve]:
        while sum(ended.values()) < max(BUDGETS):
            if startup is None:
                config = at_random[len(configs)]
            else:
                found = [(config, best_accuracy(curves[i], ended[i])) for i, config in enumerate(configs)]
                config = suggest_config(space, seed, len(configs), found, startup)
            configs.append(config)
            curves.append(nearest(recorded, config))
            yield curves[-1]

    settings = Settings(grace_period=min(GRACE_PERIOD, max_epochs), reduction_factor=REDUCTION_FACTOR)
    scheduler = new_scheduler(settings, max_epochs)
    epochs = play(draws(), scheduler, own_early_stop(max_epochs), at_once=1, ended=ended)
    return [best_after(curves, epochs, budget) for budget in BUDGETS]


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table of the samplers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=Path, default=FOLDER / "default.csv")
    parser.add_argument("--searches", type=int, default=300)
    args = parser.parse_args(argv)
    recorded = list(read_curves(args.curves).values())
    best = max(best_accuracy(curve, len(curve)) for curve in recorded)
    print(f"{len(recorded)} recorded configs, the best {best:.4f}; {args.searches} searches.\n")
    print("| best accuracy, mean (quartiles), after | " + " | ".join(f"{budget} epochs" for budget in BUDGETS) + " |")
    print("| --- |" + " --- |" * len(BUDGETS))
    with ProcessPoolExecutor() as pool:
        for name, startup in SAMPLERS.items():
            found = np.array(list(pool.map(partial(search, recorded, startup), range(args.searches), chunksize=10)))
            low, high = np.percentile(found, [25, 75], axis=0)
            cells = [f"{m:.4f} ({a:.3f} to {b:.3f})" for m, a, b in zip(found.mean(0), low, high, strict=True)]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
