"""Is the best the best? Seeds alone move a net's accuracy, so the best configs are trained again with others."""

import math
import statistics
from collections import Counter
from dataclasses import replace

import numpy as np

from search.records import FINISHED, Search, best_first, read_results

REPEATED = 3  # configs
SIGNIFICANCE = 0.05  # that chance alone tells any of them from the first


def repeats_of(search: Search, results: list[dict]) -> Search:
    """Return the best trials of a search with other seeds, as a search of its own, without a scheduler, in a subfolder.

    Args:
        search: the one whose best trials these are; settings.repeats says how many seeds each gets.
        results: of read_results.
    """
    trials = {
        f"{row['name']}_seed_{row['config']['seed'] + i}": row["config"] | {"seed": row["config"]["seed"] + i}
        for row in best_first(results)[:REPEATED]
        for i in range(1, (search.settings.repeats or 0) + 1)
    }
    settings = replace(search.settings, scheduler="none", grace_period=None)
    tried = {"seed": {"values": sorted({config["seed"] for config in trials.values()})}}
    folder, searched = search.folder / "repeats", search.searched | tried
    return replace(search, folder=folder, settings=settings, searched=searched, trials=trials)


def compared(repeats: Search) -> list[str]:
    """Return lines of at most 80 columns on the configs of repeats_of: mean, spread, whether they differ.

    Of a trial, its best accuracy counts. The search's own runs do not: they were chosen for having done well. Each
    config is held against the first by Student's t-test with the variance pooled over all, and Bonferroni's correction.
    A config that diverged with any seed ranks last and is not compared with the others.
    """
    accuracies, diverged = {}, Counter()
    for row in read_results(repeats):
        if row["status"] in FINISHED:
            name = row["name"].split("_seed_")[0]
            diverged[name] += row["status"] == "DIVERGED"
            accuracies.setdefault(name, []).append(row["best_accuracy"])
    accuracies = {name: values for name, values in accuracies.items() if len(values) > 1}
    if not accuracies:
        return []
    stable = [name for name in accuracies if not diverged[name]]
    stable.sort(key=lambda name: -statistics.mean(accuracies[name]))
    freedom = sum(len(accuracies[name]) - 1 for name in stable)
    squares = sum((len(accuracies[name]) - 1) * statistics.variance(accuracies[name]) for name in stable)
    lines = [
        f"With {max(map(len, accuracies.values()))} other seeds each, the best accuracies (mean ± standard deviation):"
    ]
    for name in stable:
        first, values, judgement = accuracies[stable[0]], accuracies[name], ""
        if name != stable[0]:
            difference = statistics.mean(first) - statistics.mean(values)
            error = math.sqrt(squares / freedom * (1 / len(first) + 1 / len(values)))
            chance = two_sided(difference / error, freedom) if error else float(difference == 0)
            worse = chance < SIGNIFICANCE / (len(stable) - 1)
            judgement = "  significantly worse" if worse else "  not significantly different"
        lines.append(f"  {name}  {statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}{judgement}")
    for name in sorted(set(accuracies) - set(stable), key=lambda name: diverged[name]):
        lines.append(f"  {name}  diverged with {diverged[name]} of {len(accuracies[name])} seeds")
    return lines


def two_sided(t: float, freedom: int) -> float:
    """Return the probability that Student's t with so many degrees of freedom is at least as far from 0."""
    # With t = √freedom · tan u, the density of u is proportional to cos(u)^(freedom - 1).
    u = np.linspace(0, math.pi / 2, 20_001)
    density = np.cos(u) ** (freedom - 1)
    return float(density[u >= math.atan(abs(t) / math.sqrt(freedom))].sum() / density.sum())
