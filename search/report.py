"""What a person reads of a search: the table, the recap, results.csv, best_model/."""

import csv
import io
import shlex
import sys
import textwrap
from collections import Counter
from datetime import datetime
from pathlib import Path

import torch

from data import Dataset, InputError, usable_cpus
from search.command_line import methods_in_words
from search.model_folder import load_model, read_metrics, write_model_folder
from search.records import (
    FINISHED,
    SEARCH_FILE,
    Search,
    best_first,
    is_held,
    read_results,
    read_search,
    shown,
    write_whole,
)
from search.tensorboard import show_best_model
from search.trial import WEIGHTS_FILE
from train import best_device, evaluate, evaluation_batches, predict

BEST_MODEL = "best_model"
COLUMNS = 80
RECAP_ORDER = ["p_drop", "lr", "h_1", "h_2"]  # then the others


def write_results(results: list[dict], folder: Path) -> None:
    """Write results.csv: a row a trial, with a column for each hyperparameter (`epochs` of the config: max_epochs)."""
    keys = ["epochs", "best_epoch", "best_accuracy", "best_loss", "loss", "accuracy", "seconds", "checkpoint"]
    parameters = list(dict.fromkeys(name for row in results for name in row["config"]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ["max_epochs" if name == "epochs" else name for name in parameters]
    writer.writerow(["trial_id", "status", *columns, *keys])
    for row in results:
        values = [row["config"].get(name) for name in parameters]
        writer.writerow([row["trial_id"], row["status"], *values, *(row[key] for key in keys)])
    write_whole(folder / "results.csv", text.getvalue())


def save_best_model(results: list[dict], dataset: Dataset, source: dict, folder: Path) -> dict | None:
    """Test the best trial's model, once, write best_model/, and show TensorBoard what it does on the test images.

    Where its weights are damaged or gone, which is said on stderr, it is the next best's.

    Args:
        results: of read_results.
        dataset: what the search ran on; its test images are used here and nowhere else.
        source: the arguments of data.read_images that it was read with.
        folder: the search's; best_model/ is there whole or not at all.

    Returns:
        What metrics.json holds: trial_id, epoch, val_loss, val_accuracy, test_loss, test_accuracy and sha256, of the
        other two files; None where no trial has a model.
    """
    if (folder / BEST_MODEL).exists() and not read_metrics(folder / BEST_MODEL):
        print(f"{shown(folder / BEST_MODEL)} is damaged, and made again.", file=sys.stderr)
    device, ranking = best_device(), best_first(results)
    torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))
    for best in ranking:
        weights = folder / (best["checkpoint"] or "") / WEIGHTS_FILE
        if model := load_model(weights, best["config"], len(dataset.classes)):
            break
        if best["checkpoint"] or best is ranking[0]:
            print(f"{best['name']} was better, but its weights are damaged or gone.", file=sys.stderr)
    else:
        return None
    model = model.to(device, memory_format=torch.channels_last)
    test = evaluation_batches(dataset.test_images, dataset.test_labels, dataset.mean, dataset.std, device)
    test_loss, test_accuracy = evaluate(model, test)
    metrics = {
        "trial_id": best["trial_id"],
        "epoch": best["best_epoch"],
        "val_loss": best["best_loss"],
        "val_accuracy": best["best_accuracy"],
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
    }
    metrics = write_model_folder(folder / BEST_MODEL, weights, best["config"], dataset, source, metrics)
    show_best_model(folder, predict(model, test), dataset.test_labels, dataset.test_images, dataset.classes)
    return metrics


def read_best_model(results: list[dict], folder: Path) -> dict | None:
    """Return the metrics of best_model/ if it is there, whole, and still the best trial's, else None."""
    metrics, ranking = read_metrics(folder / BEST_MODEL), best_first(results)
    if not metrics or not ranking:
        return None
    best = ranking[0]
    return metrics if (metrics["trial_id"], metrics["epoch"]) == (best["trial_id"], best["best_epoch"]) else None


def recap(results: list[dict], search: Search) -> str:
    """Return the state of a search as text of 80 columns: counts, times, resources, and a table of all trials.

    Args:
        results: of read_results.
        search: theirs.
    """
    searched = list(search.searched)
    counts = Counter(row["status"] for row in results)
    now = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    names = sorted(searched, key=lambda name: [*RECAP_ORDER, name].index(name))
    columns = {
        "trial": [row["trial_id"] for row in results],
        "status": [row["status"] for row in results],
        **{name: [shown_value(row["config"].get(name)) for row in results] for name in names},
        "iter": [shown_value(row["epochs"]) for row in results],
        "time (s)": [decimals(row["seconds"], 0) for row in results],
        "loss": [decimals(row["loss"], 4) for row in results],
        "accuracy": [decimals(row["accuracy"], 4) for row in results],
    }
    lines = [
        "Trial status: " + " | ".join(f"{count} {status}" for status, count in counts.items()),
        f"Current time: {now}. Total running time: {duration(search.seconds)}",
        f"Logical resource usage: {search.resource_usage}",
        *tables(columns, names),
    ]
    shared = {name: value for name, value in results[0]["config"].items() if name not in searched}
    if shared:
        text = ", ".join(f"{name} {value}" for name, value in shared.items())
        lines += textwrap.wrap(f"All trials: {text}.", COLUMNS, break_on_hyphens=False)
    return "\n".join([*lines, *methods_in_words(search.settings)])


def best_so_far(results: list[dict]) -> str:
    """Return a line on the best trial of a search that goes on, or on that there is none yet."""
    if not (ranking := best_first(results)):
        return "No trial has reported yet."
    best = ranking[0]
    return f"Best so far: {best['name']}, accuracy {best['best_accuracy']:.4f} after epoch {best['best_epoch']}."


def recap_best(results: list[dict], metrics: dict, search: Search) -> str:
    """Return the closing lines of a search as text: its best trial by its best epoch, and where things are.

    Args:
        results: of read_results.
        metrics: of save_best_model.
        search: theirs; the hyperparameters that it searched are shown as lines of param_space.
    """
    folder = search.folder
    best = next(row for row in results if row["trial_id"] == metrics["trial_id"])
    finished = [row for row in results if row["status"] in FINISHED]
    planned = sum(row["config"]["epochs"] for row in finished)
    saved = planned - sum(row["epochs"] for row in finished)
    return "\n".join(
        [
            f"Best trial: {best['name']}, epoch {metrics['epoch']} of {best['config']['epochs']}",
            *(f'    "{name}": {best["config"][name]!r},' for name in search.searched),
            f"  validation loss: {metrics['val_loss']:.4f}",
            f"  validation accuracy: {metrics['val_accuracy']:.4f}",
            f"  test accuracy: {metrics['test_accuracy']:.4f}",
            f"Best model: {shown(folder / BEST_MODEL)}",
            f"TensorBoard: {shlex.join(['tensorboard', '--logdir', shown(folder.parent)])}",
            *([f"Early stopping saved {saved} of {planned} epochs."] if finished else []),
        ]
    )


def list_searches(output_dir: Path) -> str:
    """Return the searches in a folder as text of 80 columns: their state, and the accuracies of their best model."""
    rows = []
    for path in sorted(output_dir.glob(f"*/{SEARCH_FILE}"), key=lambda path: path.stat().st_mtime):
        folder = path.parent
        try:
            results = read_results(read_search(folder))
        except InputError:
            rows.append([folder.name, "damaged, or of another version", "", "", ""])
            continue
        done = sum(row["status"] in FINISHED for row in results)
        metrics, ranking = read_best_model(results, folder) or {}, best_first(results)
        state = "running" if is_held(folder) else "finished" if metrics and done == len(results) else "interrupted"
        validation = ranking[0]["best_accuracy"] if ranking else None
        accuracies = [decimals(validation, 4), decimals(metrics.get("test_accuracy"), 4)]
        rows.append([folder.name, state, f"{done}/{len(results)}", *accuracies])
    if not rows:
        return f"There are no searches in {shown(output_dir)}."
    header = ["search", "state", "trials", "validation", "test"]
    return "\n".join(tables(dict(zip(header, map(list, zip(*rows, strict=True)), strict=True)), []))


def shown_value(value: object) -> str:
    """Return a value as a table shows it: floats with three significant digits, nothing for None."""
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def decimals(value: float | None, digits: int) -> str:
    """Return a number with so many decimals, or nothing for None."""
    return "" if value is None else f"{value:.{digits}f}"


def tables(columns: dict[str, list[str]], optional: list[str]) -> list[str]:
    """Return columns of text as the lines of one table of 80 columns or, where that is too narrow, of several.

    Args:
        columns: header → cells; the first one names a row, and stands in every table.
        optional: the headers that may stand in another table than the first.
    """
    widths = {name: max(map(len, [name, *cells])) for name, cells in columns.items()}
    first, later = list(columns), []
    while sum(widths[name] + 2 for name in first) - 2 > COLUMNS and (moved := [n for n in first if n in optional]):
        first.remove(moved[-1])
        later.insert(0, moved[-1])
    lines = ["─" * (sum(widths[name] + 2 for name in first) - 2)]
    for row in range(-1, len(columns[first[0]])):
        cells = [(columns[name][row] if row >= 0 else name).rjust(widths[name]) for name in first]
        lines.append("  ".join(cells))
    lines.append(lines[0])
    if not later:
        return lines
    name = first[0]
    return lines + tables({name: columns[name]} | {other: columns[other] for other in later}, later[1:])


def duration(seconds: float) -> str:
    """Return a time span in words that people read: 42min 46s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes}min {seconds}s" if hours else f"{minutes}min {seconds}s" if minutes else f"{seconds}s"
