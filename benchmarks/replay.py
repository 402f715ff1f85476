"""What a scheduler spends and loses: Ray's own schedulers on recorded curves, in hundreds of random searches.

    python -m benchmarks.curves …     # records benchmarks/curves/default.csv
    python -m benchmarks.replay       # prints a table; with --plot FILE.png, draws it with matplotlib

A search draws some of the recorded configs, in random order, and trains several at once; an epoch takes as long as it
took when it was recorded. The accuracy found is compared with the best that training all drawn configs to the end would
have found. The winner, the trial with that accuracy, is lost if it was stopped before reaching it.
"""

import argparse
import functools
import heapq
import importlib.util
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from benchmarks.curves import FOLDER, read_curves
from hparam_search import GRACE_PERIOD, MAX_SECONDS_PER_TRIAL, MIN_DELTA, PATIENCE, REDUCTION_FACTOR
from search.hooks import early_stop

Curve = list[dict]  # the reports of a config, one per epoch, with the keys of curves.COLUMNS
GOOD_LR = 0.01  # a config that one would try first has half to twice this learning rate


class Controller:
    """The part of Tune that schedulers which stop trials use."""

    def get_live_trials(self) -> list:
        return []


class Trial:
    """The part of a trial that these schedulers use."""

    status = "RUNNING"

    def __init__(self, number: int) -> None:
        self.trial_id = str(number)


def own_early_stop(max_epochs: int) -> Callable[[list], str | None]:
    """Return the early stopping of the search itself."""
    return functools.partial(early_stop, max_epochs, PATIENCE, MIN_DELTA, MAX_SECONDS_PER_TRIAL)


def play(
    curves: Iterable[Curve], scheduler: TrialScheduler, stop: Callable[[list], str | None] | None, at_once: int,
    ended: dict[int, int] | None = None,
) -> list[int]:  # fmt: skip
    """Simulate a search, and return for how many epochs each of its trials was trained.

    Args:
        curves: the curves of its trials, in starting order, consumed as trials start.
        scheduler: a new Ray scheduler with epochs as its time.
        stop: see early_stop, or None; called before the scheduler.
        at_once: how many trials run at once.
        ended: filled with number → epochs of the trials as they end, so that `curves` may depend on it.
    """
    controller, waiting = Controller(), enumerate(curves)
    ended = {} if ended is None else ended
    running = []  # a heap of (time of the next report, number, trial, curve, epochs reported)

    def begin(now: float) -> None:
        for i, curve in itertools.islice(waiting, 1):
            trial = Trial(i)
            scheduler.on_trial_add(controller, trial)
            heapq.heappush(running, (now + curve[0]["seconds"], i, trial, curve, 0))

    for _ in range(at_once):
        begin(0.0)
    while running:
        now, i, trial, curve, epochs = heapq.heappop(running)
        row, epochs = curve[epochs], epochs + 1
        stopped = stop is not None and stop([SimpleNamespace(**each) for each in curve[:epochs]])
        stopped = stopped or scheduler.on_trial_result(controller, trial, row) == TrialScheduler.STOP
        if stopped or epochs == len(curve):
            scheduler.on_trial_complete(controller, trial, row)
            ended[i] = epochs
            begin(now)
        else:
            heapq.heappush(running, (now + curve[epochs]["seconds"] - row["seconds"], i, trial, curve, epochs))
    return [ended[i] for i in sorted(ended)]


def judge(curves: list[Curve], epochs: list[int]) -> dict:
    """Return the outcome of a search: spent (share of all epochs), found (share of the best accuracy), lost_at.

    lost_at is the epoch at which the winner was stopped before its best epoch, or None.
    """
    best_of_each = [max(row["accuracy"] for row in curve) for curve in curves]
    found = max(max(row["accuracy"] for row in curve[:n]) for curve, n in zip(curves, epochs, strict=True))
    winner = int(np.argmax(best_of_each))
    reached = max(row["accuracy"] for row in curves[winner][: epochs[winner]])
    return {
        "spent": sum(epochs) / sum(map(len, curves)),
        "found": found / max(best_of_each),
        "lost_at": None if reached == max(best_of_each) else epochs[winner],
    }


def schedulers(max_epochs: int) -> dict[str, Callable[[], TrialScheduler]]:
    """Return name → a function that builds a new scheduler."""
    loss = {"time_attr": "epoch", "metric": "loss", "mode": "min"}
    accuracy = {"time_attr": "epoch", "metric": "accuracy", "mode": "max"}
    made = {"none": FIFOScheduler}
    graces = [grace for grace in (1, 2, 3, 5) if grace <= max_epochs]
    for judged_by, grace, factor in itertools.product((loss, accuracy), graces, (2, 3, 4)):
        figures = judged_by | {"max_t": max_epochs, "grace_period": grace, "reduction_factor": factor}
        name = f"asha, {judged_by['metric']}, grace {grace}, factor {factor}"
        made[name] = functools.partial(ASHAScheduler, **figures)
    for grace in graces:
        figures = loss | {"grace_period": grace, "min_time_slice": math.inf}
        made[f"median, loss, grace {grace}"] = functools.partial(MedianStoppingRule, **figures)
    return made


def replay(
    curves: list[Curve], new_scheduler: Callable[[], TrialScheduler], early_stopping: bool, at_once: int, trials: int,
    searches: int, first: list[Curve],
) -> list[dict]:  # fmt: skip
    """Return the outcomes of random searches (see judge).

    Args:
        curves: the curves of all recorded configs.
        new_scheduler: builds a new scheduler.
        early_stopping: whether trials also end by themselves, as in a real search.
        at_once: how many trials run at once.
        trials: how many trials a search has.
        searches: how many searches to simulate.
        first: curves of which one comes first in every search; if empty, any curve may come first.
    """
    results = []
    for seed in range(searches):
        rng = random.Random(seed)
        drawn = rng.sample(curves, trials)
        if first:
            beginning = rng.choice(first)
            drawn = [beginning, *(curve for curve in drawn if curve is not beginning)][:trials]
        stop = own_early_stop(len(drawn[0])) if early_stopping else None
        results.append(judge(drawn, play(drawn, new_scheduler(), stop, at_once)))
    return results


def row(name: str, results: list[dict]) -> str:
    """Return a row of the table."""
    found, spent = ([result[key] for result in results] for key in ("found", "spent"))
    lost = Counter(result["lost_at"] for result in results if result["lost_at"])
    at = ", ".join(f"{epoch}: {count / len(results):.0%}" for epoch, count in sorted(lost.items())[:4])
    low, middle, high = np.percentile(found, [25, 50, 75])
    return (
        f"| {name} | {np.mean(spent):.2f} | {middle:.3f} ({low:.3f} to {high:.3f}) | {1 - np.mean(found):.4f} | "
        f"{lost.total() / len(results):.1%} | {at} |"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table of all schedulers, for several numbers of trials at once, with and without what may help them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=Path, default=FOLDER / "default.csv")
    parser.add_argument("--trials", type=int, default=12, help="trials per search (default: %(default)s)")
    parser.add_argument("--searches", type=int, default=400)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--plot", type=Path, help="PNG file to draw the table into; needs matplotlib")
    args = parser.parse_args(argv)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs the package matplotlib; run pip install matplotlib")
    curves = list(read_curves(args.curves).values())
    if len(curves) < args.trials:
        parser.error(f"{args.curves} has {len(curves)} configs, fewer than the {args.trials} of a search; record more")
    good = [curve for curve in curves if GOOD_LR / 2 <= curve[0]["lr"] <= GOOD_LR * 2]
    print(f"{len(curves)} recorded configs, {args.searches} searches of {args.trials} trials.\n")
    print("| scheduler | epochs spent | accuracy found ÷ best (quartiles) | mean regret | winner lost | at epoch |")
    print("| --- | --- | --- | --- | --- | --- |")
    points = {}
    for name, new_scheduler in schedulers(len(curves[0])).items():
        for at_once in args.at_once if name != "none" else args.at_once[:1]:
            for early_stopping in (False, True):
                for first in ([], good) if good and name != "none" else ([],):
                    parts = [name, f"{at_once} at once"]
                    parts += [f"patience {PATIENCE}"] if early_stopping else []
                    parts += ["good first"] if first else []
                    results = replay(curves, new_scheduler, early_stopping, at_once, args.trials, args.searches, first)
                    print(row(", ".join(parts), results), flush=True)
                    lost = np.mean([result["lost_at"] is not None for result in results])
                    points[", ".join(parts)] = (np.mean([result["spent"] for result in results]), lost)
    if args.plot:
        plot(points, args.plot)


def plot(points: dict[str, tuple[float, float]], path: Path) -> None:
    """Draw winners lost against epochs spent into a PNG, with a dot per row of the table without patience."""
    import matplotlib.pyplot as plt  # here, since nothing else needs it

    figure, axes = plt.subplots(figsize=(8, 5))
    for kind in ("none", "median", "asha, loss", "asha, accuracy"):
        for first, marker in (("", "o"), (", good first", "^")):
            dots = [
                point
                for name, point in points.items()
                if name.startswith(kind) and "patience" not in name and ("good first" in name) == bool(first)
            ]
            if dots:
                axes.scatter(*zip(*dots, strict=True), s=14, marker=marker, label=kind + first)
    own = ("the default", GRACE_PERIOD, REDUCTION_FACTOR)
    for height, (words, grace, factor) in ((50, ("the baseline's", 3, 2)), (80, own)):
        name = f"asha, loss, grace {grace}, factor {factor:g}, 1 at once"
        if name in points:
            axes.annotate(
                words, points[name], (50, height), textcoords="offset points", arrowprops={"arrowstyle": "->"}
            )
    axes.set(xlabel="epochs spent, as a share of all", ylabel="searches that stopped the winner, as a share")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
