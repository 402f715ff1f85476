"""What a search tells: what mattered, whether the best lies at the edge, and whether trials were rightly stopped."""

import math
import textwrap
from collections import Counter

import numpy as np

from search.records import FINISHED, Search, best_first, read_log
from search.report import COLUMNS, shown_value

# Of 7 trials, only a rank correlation above 0.9 would stand out from chance among four hyperparameters.
MIN_TRIALS = 8
SIGNIFICANCE = 0.05  # that chance alone makes one of all hyperparameters stand out
PERMUTATIONS = 5000
EDGE = 0.05  # share of a range, at either end


def conclusions(search: Search, results: list[dict]) -> list[str]:
    """Return at most three lines of at most 80 columns on what a finished search tells of its hyperparameters.

    Trials end at different epochs, so they are compared at the last epoch that all have reached; one that diverged
    comes last. For ranges it is Spearman's rank correlation of the hyperparameter and the accuracy, for grids and
    choices the correlation ratio of the ranks (the square root of the share of their variance that lies between the
    levels): both from 0 to 1 in size. Each is held against the same figure of shuffled accuracies (a permutation test,
    Fisher 1935, "The Design of Experiments", with Bonferroni's correction).

    Args:
        search: the one that is judged.
        results: of read_results.
    """
    tried = {key: what for key, what in search.searched.items() if what}
    finished = [row for row in results if row["status"] in FINISHED]
    if not tried:
        return []
    if len(finished) < MIN_TRIALS:
        return [f"What mattered: needs at least {MIN_TRIALS} finished trials ({len(finished)} so far)."]
    epoch, accuracies = accuracies_at_equal_epochs(search, finished)
    significance = SIGNIFICANCE / len(tried)
    best = next((row["config"] for row in best_first(results)), None)
    lines, shown, others, edges = [], [], [], []
    for key, what in tried.items():
        values = [row["config"][key] for row in finished]
        size, chance, text = effect(values, accuracies, levels="values" in what)
        (shown if chance < significance else others).append((-abs(size), f"{key} {text}", key))
        if best and (end := end_of_range(best[key], what)):
            # By chance alone the best is often there: accuracy must rise towards it.
            slope, chance, _ = effect(values, accuracies, levels=False)
            if chance < significance and (slope > 0) == (end == "upper"):
                edges.append(f"{key} {shown_value(best[key])} ({end})")
    about = f"accuracy at epoch {epoch} of {len(finished)} trials"
    if shown:
        lines.append(f"What mattered ({about}): {', '.join(text for _, text, _ in sorted(shown))}.")
    if others:
        names = ", ".join(key for _, _, key in sorted(others))
        lines.append(f"No significant effect{'' if shown else f' ({about})'}: {names}.")
    if edges:
        lines.append(f"Best near the end of its range; consider widening: {', '.join(edges)}.")
    return [textwrap.shorten(line, COLUMNS, placeholder=" …") for line in lines]


def rungs(search: Search, results: list[dict]) -> list[str]:
    """Return two lines on the scheduler's work: when trials ended, and what their order at its first look was worth.

    Args:
        search: the one that is judged.
        results: of read_results.
    """
    first = search.settings.grace_period
    finished = [row for row in results if row["status"] in FINISHED]
    if first is None or not finished:
        return []
    ends = sorted(Counter(row["epochs"] for row in finished).items())
    lines = [f"Trials ended after epoch {', '.join(f'{epoch} ({count} of them)' for epoch, count in ends)}."]
    went_on = [row for row in finished if row["epochs"] > first and row["status"] != "DIVERGED"]
    about = f"The order at epoch {first} and in the end"
    if len(went_on) < 3:
        lines.append(f"{about}: too few trials went on ({len(went_on)} of 3).")
    else:
        then = np.array([accuracy_at(first, row, search) for row in went_on])
        rho = unit(ranks(then)) @ unit(ranks(np.array([row["best_accuracy"] for row in went_on])))
        lines.append(f"{about}: rank correlation {rho:+.2f} ({len(went_on)} trials).")
    return [textwrap.shorten(line, COLUMNS, placeholder=" …") for line in lines]


def accuracies_at_equal_epochs(search: Search, finished: list[dict]) -> tuple[int, np.ndarray]:
    """Return the last epoch that all finished trials have reached, and their accuracies then; -1 of diverged ones."""
    epoch = min((row["epochs"] for row in finished if row["status"] != "DIVERGED"), default=1)
    diverged = [row["status"] == "DIVERGED" for row in finished]
    return epoch, np.array(
        [-1.0 if gone else accuracy_at(epoch, row, search) for gone, row in zip(diverged, finished, strict=True)]
    )


def accuracy_at(epoch: int, row: dict, search: Search) -> float:
    """Return the validation accuracy that a trial reported of an epoch, the last time that it did."""
    log = read_log(search.folder / row["name"])[0]
    return {line["epoch"]: line["accuracy"] for line in log if "epoch" in line}[epoch]


def ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 0 on; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts + 1) / 2)[inverse]


def axes(values: list, levels: bool) -> np.ndarray:
    """Return orthonormal columns [trials, axes] on which unit ranks are projected: see effect."""
    if levels:
        of_level = np.array([[value == level for level in dict.fromkeys(values)] for value in values], dtype=float)
        return of_level / np.linalg.norm(of_level, axis=0)
    return unit(ranks(np.array(values)))[:, None]


def unit(numbers: np.ndarray) -> np.ndarray:
    """Return numbers shifted to a mean of 0 and scaled to a norm of 1, or zeros where all are equal."""
    centred = numbers - numbers.mean()
    return centred / (np.linalg.norm(centred) or 1.0)


def effect(values: list, accuracies: np.ndarray, levels: bool) -> tuple[float, float, str]:
    """Return how much a hyperparameter mattered.

    Args:
        values: the hyperparameter's, of each trial.
        accuracies: of each trial.
        levels: compare the levels of a grid, rather than correlate ranks.

    Returns:
        Its size, from 0 to 1, or, of ranks, from -1 to 1; the probability that shuffled accuracies give as much; and
        the size in words.
    """
    columns, order = axes(values, levels), unit(ranks(accuracies))
    # On the one axis of a range this is Spearman's rho; on a grid's, Pythagoras sums the variance between levels.
    size = float(np.linalg.norm(order @ columns)) if levels else float(order @ columns[:, 0])
    shuffled = np.random.default_rng(0).permuted(np.tile(order, (PERMUTATIONS, 1)), axis=1)
    as_large = np.linalg.norm(shuffled @ columns, axis=1) >= abs(size) - 1e-9
    chance = (1 + as_large.sum()) / (1 + PERMUTATIONS)
    if not levels:
        return size, chance, f"{size:+.2f}"
    best = max(set(values), key=lambda level: order[[value == level for value in values]].mean())
    return size, chance, f"{size:.2f} (best {best})"


def end_of_range(value: float, what: dict) -> str | None:
    """Return "upper" or "lower" if a value is near that end of a range, or at that of a grid of 3 or more numbers."""
    ends = what.get("values") or [what["lower"], what["upper"]]
    if not all(type(end) in (int, float) for end in ends) or len(set(ends)) < (3 if "values" in what else 2):
        return None
    low, high = min(ends), max(ends)
    if "values" in what:
        return {low: "lower", high: "upper"}.get(value)
    place = math.log(value / low) / math.log(high / low) if what["log"] else (value - low) / (high - low)
    return "lower" if place <= EDGE else "upper" if place >= 1 - EDGE else None
