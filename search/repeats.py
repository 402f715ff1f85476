"""Is the best the best? Seeds alone move a net's accuracy, so the best configs are trained again with others."""

import math
import statistics
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
    """
    accuracies = {}
    for row in read_results(repeats):
        if row["status"] in FINISHED:
            accuracies.setdefault(row["name"].split("_seed_")[0], []).append(row["best_accuracy"])
    accuracies = {name: values for name, values in accuracies.items() if len(values) > 1}
    if not accuracies:
        return []
    ranking = sorted(accuracies, key=lambda name: -statistics.mean(accuracies[name]))
    first, freedom = accuracies[ranking[0]], sum(len(values) - 1 for values in accuracies.values())
    variance = sum((len(values) - 1) * statistics.variance(values) for values in accuracies.values()) / freedom
    lines = [f"With {len(first)} other seeds each, the best accuracies (mean ± standard deviation):"]
    for name in ranking:
        values, told = accuracies[name], ""
        if name != ranking[0]:
            difference = statistics.mean(first) - statistics.mean(values)
            error = math.sqrt(variance * (1 / len(first) + 1 / len(values)))
            chance = two_sided(difference / error, freedom) if error else float(difference == 0)
            worse = chance < SIGNIFICANCE / (len(ranking) - 1)
            told = "  worse than the first" if worse else "  not told from the first"
        lines.append(f"  {name}  {statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}{told}")
    return lines


def two_sided(t: float, freedom: int) -> float:
    """Return the probability that Student's t with so many degrees of freedom is at least as far from 0."""
    # With t = √freedom · tan u, the density of u is proportional to cos(u)^(freedom - 1).
    u = np.linspace(0, math.pi / 2, 20_001)
    density = np.cos(u) ** (freedom - 1)
    return float(density[u >= math.atan(abs(t) / math.sqrt(freedom))].sum() / density.sum())
