"""What a person reads: the recap of a search, results.csv, and the list of all searches."""

import contextlib
import math
import shlex
import statistics
import textwrap
from collections import Counter
from datetime import datetime
from pathlib import Path
from statistics import NormalDist

import pandas

from data import InputError
from search.best_model import BEST_MODEL, read_best_model
from search.cost import COSTS, cheaper, model_cost
from search.files import atomic_write, lock
from search.records import LOG_FILE, SEARCH_FILE, TRIAL_PREFIX, Search, Trial, open_search, script_command, short_path
from search.space import end_of_range
from search.trial import weights_path

COLUMNS = 80
FIRST_COLUMNS = ["p_drop", "lr", "h_1", "h_2"]  # then the other hyperparameters
MIN_TRIALS = 8  # minimum number of trials to rate hyperparameters
SIGNIFICANCE = 0.05  # probability of naming any hyperparameter that has no effect


def write_results(search: Search) -> None:
    """Write results.csv: a row per trial, with a column per hyperparameter (`epochs` of the config as max_epochs)."""
    parameters = dict.fromkeys(name for trial in search.trials.values() for name in trial.config)
    rows = []
    for trial in search.trials.values():
        config, best, last = parameters | trial.config, trial.best, trial.reports[-1] if trial.reports else None
        weights = best and weights_path(Path(trial.name), best.epoch)
        row: dict[str, object] = {
            "trial": trial.name,
            "status": trial.status,
        }  # the name: pandas would read 00000 as a number
        row |= {"max_epochs" if name == "epochs" else name: value for name, value in config.items()}
        row |= {"epochs": last and last.epoch}
        row |= {f"best_{name}": best and getattr(best, name) for name in ("epoch", *search.objective.shown)}
        row |= {name: last and getattr(last, name) for name in ("loss", "accuracy", "seconds", "images_per_second")}
        cost = model_cost(config, search.images["num_classes"])
        row |= {name: cost.get(name) for name in COSTS}
        row |= {"weights": weights if weights and (search.folder / weights).exists() else None}
        row |= {"ended_because": trial.error or trial.end, "repeats": trial.repeats}
        row |= {"taken_from": search.folder.parent / trial.source if trial.source else None}
        rows.append(row)
    with atomic_write(search.folder / "results.csv") as temporary:
        # Of objects, or None would turn whole numbers into floats.
        pandas.DataFrame(rows, dtype=object).to_csv(temporary, index=False)


def recap(search: Search) -> str:
    """Return the state of a search as text of 80 columns: status counts, times, resources, and a table of trials."""
    trials = search.own_trials()
    names = sorted(search.searched, key=lambda name: [*FIRST_COLUMNS, name].index(name))
    rows = []
    for trial in trials:
        last = trial.reports[-1] if trial.reports else None
        row = {"trial": trial.trial_id, "status": trial.status}
        row |= {name: cell(trial.config.get(name)) for name in names}
        row |= {"iter": cell(last and last.epoch), "time (s)": cell(last and last.seconds, ".0f")}
        rows.append(row | {name: cell(last and getattr(last, name), ".4f") for name in ("loss", "accuracy")})
    fixed = [item for item in trials[0].config.items() if item[0] not in search.searched]
    shared = ", ".join(f"{key} {value}" for key, value in fixed if all(t.config.get(key) == value for t in trials))
    sources = Counter((search.folder.parent / trial.source).parent for trial in trials if trial.source)
    ends = Counter(trial.end for trial in trials if trial.end)
    counts = Counter(trial.status for trial in trials)
    lines = [
        "Trial status: " + " | ".join(f"{count} {status}" for status, count in counts.items()),
        f"Current time: {datetime.now():%Y-%m-%d %H:%M:%S}. Total running time: {duration(search.seconds)}",
        f"Logical resource usage: {search.resources or 'none'}",
        table(rows),
        *textwrap.wrap(f"All trials: {shared}.", COLUMNS, break_on_hyphens=False),
        *search.settings.methods(),
        *(f"{count} of these trials come from {short_path(folder)}." for folder, count in sources.items()),
        *([f"Ended: {', '.join(f'{reason} ({count})' for reason, count in ends.items())}."] if ends else []),
        *(f"{trial.name} failed: {trial.error}." for trial in trials if trial.error),
    ]
    return "\n".join(lines)


def best_so_far(search: Search) -> str:
    """Return a line about the best trial so far."""
    if not (ranking := search.ranking()):
        return "No trial has reported yet."
    best, metric = ranking[0], search.objective.metric
    return f"Best so far: {best.name}, {metric} {getattr(best.best, metric):.4f} after epoch {best.best.epoch}."


def recap_best(search: Search, metrics: dict) -> str:
    """Return the results of a finished search, as text of 80 columns; see evaluate_best_model for the metrics."""
    best = search.trials[f"{TRIAL_PREFIX}{metrics['trial_id']}"]
    ended = search.ended()
    planned = sum(trial.config["epochs"] for trial in ended)
    saved = planned - sum(len(trial.reports) for trial in ended)
    model, cost = [], model_cost(best.config, search.images["num_classes"])
    if cost:
        model = [f"  model: {cost['parameters']:,} parameters, {cost['gflop_per_image']:.3g} GFLOP per image"]
    lines = [
        f"Best trial: {best.name}, epoch {metrics['epoch']} of {best.config['epochs']}",
        *(f'    "{name}": {best.config[name]!r},' for name in search.searched),
        *(f"  validation {key}: {metrics[f'val_{key}']:.4f}" for key in search.objective.shown),
        f"  test accuracy: {metrics['test_accuracy']:.4f}",
        *model,
        f"Best model: {short_path(search.folder / BEST_MODEL)}",
        f"TensorBoard: {shlex.join(['tensorboard', '--logdir', short_path(search.folder.parent)])}",
        *textwrap.wrap(cheaper(search, best), COLUMNS),
        f"Early stopping saved {saved} of {planned} epochs.",
        *rungs(search, ended),
        *importance(search, ended),
    ]
    return "\n".join([*lines, *repeats(search)])


def rungs(search: Search, ended: list[Trial]) -> list[str]:
    """Return lines about the scheduler: when trials ended, and how well its first rung predicted their final order."""
    first = search.settings.grace_period
    if search.settings.scheduler == "none" or not ended:
        return []
    counts = sorted(Counter(len(trial.reports) for trial in ended).items())
    spent = (f"{epoch} ({count} trial{'s' * (count > 1)})" for epoch, count in counts)
    lines = [f"Epochs trained: {', '.join(spent)}."]
    survivors = [trial for trial in ended if len(trial.reports) > first and trial.best]
    about = f"Rank agreement between epoch {first} and the end"
    if len(survivors) < 3:
        return [*lines, f"{about}: needs 3 surviving trials ({len(survivors)} so far)."]
    score = search.objective.score
    then, finally_ = [score(t.reports[first - 1]) for t in survivors], [score(t.best) for t in survivors]
    return [*lines, f"{about}: {rank_correlation(then, finally_):+.2f} ({len(survivors)} trials)."]


def importance(search: Search, ended: list[Trial]) -> list[str]:
    """Return lines about which hyperparameters mattered: Spearman's rank correlation with the objective.

    Trials are compared at the last epoch that all have reached; diverged ones rank last. The significance of a
    correlation ρ of n trials is tested with Fisher's transformation, atanh(ρ) √((n − 3) / 1.06) (Fieller et al. 1957),
    and Bonferroni's correction. Values that are not numbers are ranked in the order in which they are listed.
    """
    if len(ended) < MIN_TRIALS:
        return [f"Importance: needs at least {MIN_TRIALS} finished trials ({len(ended)} so far)."]
    objective = search.objective
    epoch = min((len(trial.reports) for trial in ended if not trial.diverged), default=1)
    scores = [-math.inf if trial.diverged else objective.score(trial.reports[epoch - 1]) for trial in ended]
    searched = {key: entry for key, entry in search.searched.items() if entry}
    limit = NormalDist().inv_cdf(1 - SIGNIFICANCE / 2 / max(1, len(searched)))
    found, others, edges = {}, [], {}
    for key, entry in searched.items():
        values = [trial.config[key] for trial in ended]
        if not all(type(value) in (int, float) for value in values):
            values = [[*entry.get("values", []), value].index(value) for value in values]
        rho = rank_correlation(values, scores)
        if abs(math.atanh(0.9999 * rho)) * math.sqrt((len(ended) - 3) / 1.06) < limit:
            others.append(key)
            continue
        found[key] = rho
        # The best value is often at an end by chance, so the objective must also improve towards it.
        end = "upper" if rho > 0 else "lower"
        if search.ranking() and end_of_range(search.ranking()[0].config[key], entry) == end:
            edges[key] = end
    lines = []
    if found:
        metric = f"lower {objective.metric}" if objective.mode == "min" else objective.metric
        text = ", ".join(f"{key} {rho:+.2f}" for key, rho in sorted(found.items(), key=lambda item: -abs(item[1])))
        lines.append(f"Importance (rank correlation with {metric} at epoch {epoch}, {len(ended)} trials): {text}.")
    if others:
        lines.append(f"No significant effect: {', '.join(others)}.")
    return [part for line in lines for part in textwrap.wrap(line, COLUMNS)] + at_edges(search, edges)


def at_edges(search: Search, edges: dict[str, str]) -> list[str]:
    """Return lines about hyperparameters whose best value lies at this end of their range, and how to search beyond."""
    if not edges:
        return []
    ends = ", ".join(f"{key} ({end} end)" for key, end in edges.items())
    space = "QUICK_SPACE" if search.settings.quick else "param_space"
    text = f"The best value lies at the edge of its range: {ends}. To search beyond it without retraining, widen "
    command = script_command("--warm-start", search.folder, *search.settings.source_flags())
    return [*textwrap.wrap(f"{text}it in {space} and run", COLUMNS), f"    {command}"]


def rank_correlation(one: list[float], other: list[float]) -> float:
    """Return Spearman's rank correlation, from -1 to 1; 0 if all values of one are equal."""
    if len(set(one)) < 2 or len(set(other)) < 2:
        return 0.0
    return pandas.Series(one).rank().corr(pandas.Series(other).rank())


def repeats(search: Search) -> list[str]:
    """Return lines about the repeated configs: mean and standard deviation of the objective over their random seeds."""
    lines = []
    for own in search.ranking():
        trials = [trial for trial in search.trials.values() if trial.repeats == own.name and trial.end]
        values = [getattr(trial.best, search.objective.metric) for trial in trials if trial.best]
        if len(values) > 1:
            text = f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"
            diverged = f", {len(trials) - len(values)} diverged" if len(values) < len(trials) else ""
            lines.append(f"  {own.name}  {text} ({len(trials)} seeds{diverged})")
        elif trials:
            lines.append(f"  {own.name}  {len(trials) - len(values)} of {len(trials)} seeds diverged")
    header = f"Best {search.objective.metric} with other random seeds, mean ± standard deviation:"
    return [header, *lines] if lines else []


def list_searches(output_dir: Path) -> str:
    """Return the searches in a folder as text of 80 columns: status, trials, accuracies and costs of best models."""
    rows = []
    for path in sorted(output_dir.glob(f"[!.]*/{SEARCH_FILE}"), key=lambda path: path.stat().st_mtime):
        folder = path.parent
        row = dict.fromkeys(("search", "status", "trials", "val", "test", "params", "GFLOP", "img/s"), "")
        row |= {"search": folder.name, "status": "unreadable"}  # damaged, or from another version
        with contextlib.suppress(InputError, OSError):
            search = open_search(folder, {})
            trials, ended, ranking = search.own_trials(), len(search.ended()), search.ranking()
            metrics = read_best_model(search) or {}
            with lock(folder / LOG_FILE, shared=True) as free:
                unfinished = search.interrupted() or (ranking and not metrics)
                status = "running" if not free else "unfinished" if unfinished else "finished"
            row |= {"status": status, "trials": f"{ended}/{len(trials)}"}
            row |= {"test": cell(metrics.get("test_accuracy"), ".4f")}
            if ranking:
                best, cost = ranking[0], model_cost(ranking[0].config, search.images["num_classes"])
                row |= {"val": cell(best.best.accuracy, ".4f"), "GFLOP": cell(cost.get("gflop_per_image"))}
                row |= {"params": f"{cost['parameters'] / 1e6:.3g}M" if cost else ""}
                row |= {"img/s": cell(best.reports[-1].images_per_second, ".0f")}
        rows.append(row)
    return table(rows) if rows else f"No searches found in {short_path(output_dir)}."


def cell(value: object, digits: str = ".3g") -> str:
    """Return a table's cell: floats with these digits, nothing for None."""
    return "" if value is None else f"{value:{digits}}" if isinstance(value, float) else str(value)


def table(rows: list[dict[str, str]]) -> str:
    """Return rows of cells as a table of 80 columns; columns that do not fit continue below."""
    frame = pandas.DataFrame(rows).set_index(next(iter(rows[0])))
    frame.index.name, frame.columns.name = None, frame.index.name  # one line of headers
    text = frame.to_string(line_width=COLUMNS, formatters=[str] * len(frame.columns))  # pandas' own add spaces
    rule = "─" * max(map(len, text.splitlines()))
    return f"{rule}\n{text}\n{rule}"


def duration(seconds: float) -> str:
    """Return a duration as people read it: 42min 46s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes}min {seconds}s" if hours else f"{minutes}min {seconds}s" if minutes else f"{seconds}s"
