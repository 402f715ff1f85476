"""What a person reads: the recap of a search, results.csv, and the list of all searches."""

import contextlib
import shlex
import textwrap
from collections import Counter
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pandas

from data import InputError
from search.best_model import BEST_MODEL, read_best_model
from search.cost import COSTS, cheaper, model_cost
from search.files import atomic_write, lock
from search.records import LOG_FILE, SEARCH_FILE, TRIAL_PREFIX, Search, Trial, open_search, script_command, short_path
from search.space import listed, places_of, possible_values
from search.trial import weights_path

COLUMNS = 80
wrap = partial(textwrap.wrap, width=COLUMNS, break_on_hyphens=False)
DIGITS = {"time (s)": ".0f", "img/s": ".0f", "loss": ".4f", "accuracy": ".4f", "val": ".4f", "test": ".4f"}  # else .3g
FIRST_COLUMNS = ["p_drop", "lr", "h_1", "h_2"]  # then the other hyperparameters
MOST_VALUES = 4  # a grid or choice of more numbers than this is shown in thirds
EDGE = 0.05  # share of a range, at either end, that counts as its edge


def write_results(search: Search) -> None:
    """Write results.csv (see results)."""
    with atomic_write(search.folder / "results.csv") as temporary:
        results(search).to_csv(temporary, index=False)


def results(search: Search) -> pandas.DataFrame:
    """Return a row per trial, with a column per hyperparameter (`epochs` of the config as max_epochs)."""
    drawn = [name for trial in search.trials.values() for name in trial.config]
    parameters, rows = dict.fromkeys([*drawn, *search.searched]), []
    for trial in search.trials.values():
        best = vars(trial.best) if trial.best else {}
        last = vars(trial.reports[-1]) if trial.reports else {}
        cost = model_cost(trial.config, search.images["num_classes"])
        weights = trial.best and weights_path(Path(trial.name), trial.best.epoch)
        rows.append(
            {"trial": trial.name, "status": trial.status}  # the name: pandas would read 00000 as a number
            | {"max_epochs" if name == "epochs" else name: trial.config.get(name) for name in parameters}
            | {"epochs": last.get("epoch")}
            | {f"best_{name}": best.get(name) for name in ("epoch", *search.objective.shown)}
            | {name: last.get(name) for name in ("loss", "accuracy", "seconds", "images_per_second")}
            | {name: cost.get(name) for name in COSTS}
            | {"weights": weights if weights and (search.folder / weights).exists() else None}
            | {"ended_because": trial.error or trial.end, "repeats": trial.repeats}
            | {"taken_from": search.folder.parent / trial.source if trial.source else None}
        )
    return pandas.DataFrame(rows, dtype=object)  # or None would turn whole numbers into floats


def recap(search: Search) -> str:
    """Return the state of a search as text of 80 columns: status counts, times, resources, and a table of trials."""
    trials = search.own_trials()
    names = sorted(search.searched, key=lambda name: [*FIRST_COLUMNS, name].index(name))
    frame = results(search).rename(columns={"epochs": "iter", "seconds": "time (s)"})
    frame = frame[frame["repeats"].isna()].assign(trial=[trial.trial_id for trial in trials])
    fixed = [item for item in trials[0].config.items() if item[0] not in search.searched]
    shared = ", ".join(f"{key} {value}" for key, value in fixed if all(t.config.get(key) == value for t in trials))
    sources = Counter((search.folder.parent / trial.source).parent for trial in trials if trial.source)
    ends = Counter(trial.end for trial in trials if trial.end)
    counts = Counter(trial.status for trial in trials)
    lines = [
        "Trial status: " + " | ".join(f"{count} {status}" for status, count in counts.items()),
        f"Current time: {datetime.now():%Y-%m-%d %H:%M:%S}. Total running time: {duration(search.seconds)}",
        f"Logical resource usage: {search.resources or 'none'}",
        table(frame[["trial", "status", *names, "iter", "time (s)", "loss", "accuracy"]]),
        *wrap(f"All trials: {shared}."),
        search.settings.describe_scheduler(),
        *(f"{count} of these trials come from {short_path(folder)}." for folder, count in sources.items()),
        *([f"Ended: {', '.join(f'{reason} ({count})' for reason, count in ends.items())}."] if ends else []),
        *(f"{trial.name} failed: {trial.error}." for trial in trials if trial.error),
    ]
    return "\n".join(lines)


def best_so_far(search: Search) -> str:
    """Return a line about the best trial so far."""
    if not (ranking := search.ranking()):
        return "No trial has a result yet."
    best, metric = ranking[0], search.objective.metric
    return f"Best so far: {best.name}, {metric} {getattr(best.best, metric):.4f} after epoch {best.best.epoch}."


def recap_best(search: Search, metrics: dict) -> str:
    """Return the results of a finished search, as text of 80 columns; see evaluate_best_model for the metrics."""
    best = search.trials[f"{TRIAL_PREFIX}{metrics['trial_id']}"]
    ended = search.ended()
    planned = sum(trial.config["epochs"] for trial in ended)
    saved = planned - sum(len(trial.reports) for trial in ended)
    saver = "Early stopping" if search.settings.scheduler == "none" else "The scheduler"
    cost = model_cost(best.config, search.images["num_classes"])
    model = "  model: {parameters:,} parameters, {gflop_per_image:.3g} GFLOP per image"
    lines = [
        f"Best trial: {best.name}, epoch {metrics['epoch']} of {best.config['epochs']}",
        *(f'    "{name}": {best.config[name]!r},' for name in search.searched),
        *(f"  validation {key}: {metrics[f'val_{key}']:.4f}" for key in search.objective.shown),
        f"  test accuracy: {metrics['test_accuracy']:.4f}",
        *([model.format(**cost)] if cost else []),
        f"Best model: {short_path(search.folder / BEST_MODEL)}",
        f"TensorBoard: {shlex.join(['tensorboard', '--logdir', short_path(search.folder.parent)])}",
        *wrap(cheaper(search, best)),
        f"{saver} saved {saved} of {planned} epochs.",
        *rungs(search, ended),
        *ranges(search),
        *repeats(search),
    ]
    return "\n".join(lines)


def rungs(search: Search, ended: list[Trial]) -> list[str]:
    """Return lines about the scheduler: when trials ended, and how well its first rung predicted their final order."""
    if search.settings.scheduler == "none" or not ended:
        return []
    counts = sorted(Counter(len(trial.reports) for trial in ended).items())
    spent = ", ".join(f"{epoch} ({count} trial{'s' * (count > 1)})" for epoch, count in counts)
    first, score = search.settings.grace_period, search.objective.score
    survivors = [trial for trial in ended if len(trial.reports) > first and trial.best]
    agreement = f"needs 3 surviving trials ({len(survivors)} so far)"
    if len(survivors) >= 3:
        early, final = [score(t.reports[first - 1]) for t in survivors], [score(t.best) for t in survivors]
        agreement = f"{rank_correlation(early, final):+.2f} ({len(survivors)} trials)"
    lines = [f"Epochs trained: {spent}.", f"Rank agreement between epoch {first} and the end: {agreement}."]
    return lines if any(trial.config["epochs"] > first for trial in ended) else lines[:1]


def ranges(search: Search) -> list[str]:
    """Return lines about the search space: the best result in each part of each range, and which range to widen."""
    metric, ranking, lines, edges = search.objective.metric, search.ranking(), [], []
    for key, entry in (item for item in search.searched.items() if item[1]):  # without users' functions
        numbers = all(type(value) in (int, float) for value in possible_values(entry))
        in_thirds = numbers and len(entry.get("values", range(MOST_VALUES + 1))) > MOST_VALUES
        best: dict[Any, float] = {}  # part of the range → its best result, best part first
        for trial in ranking:
            if places := places_of(trial.config[key], entry):
                part = min(int(3 * mean(places)), 2) if in_thirds else trial.config[key]
                best.setdefault(part, getattr(trial.best, metric))
        names = dict.fromkeys(range(3), "") if in_thirds else {value: f" ({value})" for value in listed(entry)}
        cells = ((f"{best[part]:.4f}" if part in best else "–") + name for part, name in names.items())
        lines += wrap(f"  {key}: {', '.join(cells)}", subsequent_indent="    ")
        # Best results are often at an end by chance, so results must also improve towards that end.
        end = {(0, 1, 2): "lower", (2, 1, 0): "upper"}.get(tuple(best)) if in_thirds else None
        places = places_of(ranking[0].config[key], entry) if end else None
        if places and (places[0] <= EDGE if end == "lower" else places[1] >= 1 - EDGE):
            edges.append(f"{key} ({end} end)")
    if lines:
        lines.insert(0, f"Best {metric} in each third of the range (low to high), or with each value:")
    if edges:
        space = "QUICK_SPACE or param_space" if search.settings.quick else "param_space"
        remedy = f"To search beyond the edge without retraining, widen the range in {space} and run"
        lines += wrap(f"Best value at the edge of the range: {', '.join(edges)}. {remedy}")
        command = script_command("--warm-start", search.folder, *search.settings.source_flags())
        lines.append(f"    {command}")
    return lines


def rank_correlation(one: list[float], other: list[float]) -> float:
    """Return Spearman's rank correlation, from -1 to 1; 0 if all values of one are equal."""
    if len(set(one)) < 2 or len(set(other)) < 2:
        return 0.0
    return pandas.Series(one).rank().corr(pandas.Series(other).rank())


def repeats(search: Search) -> list[str]:
    """Return lines about the repeated configs: mean and standard deviation of the objective over their random seeds."""
    lines, metric = [], search.objective.metric
    for own in search.ranking():
        trials = [trial for trial in search.trials.values() if trial.repeats == own.name and trial.end]
        values = [getattr(trial.best, metric) for trial in trials if trial.best]
        diverged = len(trials) - len(values)
        if len(values) > 1:
            seeds = f"{len(trials)} seeds" + f", {diverged} diverged" * (diverged > 0)
            lines.append(f"  {own.name}  {mean(values):.4f} ± {stdev(values):.4f} ({seeds})")
        elif trials:
            lines.append(f"  {own.name}  {diverged} of {len(trials)} seeds diverged")
    return [f"Best {metric} with other random seeds, mean ± standard deviation:", *lines] if lines else []


def list_searches(output_dir: Path) -> str:
    """Return the searches in a folder as text of 80 columns: status, trials, accuracies and costs of best models."""
    rows = []
    for path in sorted(output_dir.glob(f"[!.]*/{SEARCH_FILE}"), key=lambda path: path.stat().st_mtime):
        row = dict.fromkeys(("search", "status", "trials", "val", "test", "params", "GFLOP", "img/s"))
        row |= {"search": path.parent.name, "status": "unreadable"}  # damaged, or from another version
        with contextlib.suppress(InputError, OSError):
            search = open_search(path.parent, {})
            ranking, metrics = search.ranking(), read_best_model(search) or {}
            with lock(path.parent / LOG_FILE, shared=True) as free:
                unfinished = search.interrupted() or (ranking and not metrics)
                row["status"] = "running" if not free else "unfinished" if unfinished else "finished"
            row |= {"trials": f"{len(search.ended())}/{len(search.own_trials())}", "test": metrics.get("test_accuracy")}
            if ranking:
                best = ranking[0]
                row |= {"val": best.best.accuracy, "img/s": best.reports[-1].images_per_second}
                if cost := model_cost(best.config, search.images["num_classes"]):
                    row |= {"params": f"{cost['parameters'] / 1e6:.3g}M", "GFLOP": cost["gflop_per_image"]}
        rows.append(row)
    return table(pandas.DataFrame(rows, dtype=object)) if rows else f"No searches found in {short_path(output_dir)}."


def cell(value: object, digits: str) -> str:
    """Return a table's cell: floats with these digits, nothing for None."""
    return "" if value is None else f"{value:{digits}}" if isinstance(value, float) else str(value)


def table(frame: pandas.DataFrame) -> str:
    """Return a table of 80 columns, with nothing for None; columns that do not fit continue below."""
    cells = {name: [cell(value, DIGITS.get(name, ".3g")) for value in frame[name]] for name in frame}
    frame = pandas.DataFrame(cells).set_index(frame.columns[0])
    frame.index.name, frame.columns.name = None, frame.index.name  # one line of headers
    text = frame.to_string(line_width=COLUMNS, formatters=[str] * len(frame.columns))  # pandas' own add spaces
    rule = "─" * max(map(len, text.splitlines()))
    return f"{rule}\n{text}\n{rule}"


def duration(seconds: float) -> str:
    """Return a duration as people read it: 42min 46s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes}min {seconds}s" if hours else f"{minutes}min {seconds}s" if minutes else f"{seconds}s"
