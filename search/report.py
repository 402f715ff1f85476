"""What a person reads of a search: the table, the recap, results.csv, best_model/."""

import csv
import io
import shlex
import sys
from collections import Counter
from datetime import datetime
from pathlib import Path

import torch

from data import Dataset
from search.model_folder import load_model, read_metrics, write_model_folder
from search.records import FINISHED, best_first, shown, write_whole
from search.tensorboard import show_best_model
from search.trial import WEIGHTS_FILE
from train import best_device, evaluate, evaluation_batches, predict

BEST_MODEL = "best_model"
# Shown for every trial; other hyperparameters only where trials differ in them.
RECAP_PARAMETERS = ["p_drop", "lr", "h_1", "h_2"]


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


def recap(results: list[dict], seconds: float, resources: str) -> str:
    """Return the state of a search as text: counts, times, resources, the best trial so far and a table of all trials.

    Args:
        results: of read_results.
        seconds: how long the search ran.
        resources: what it ran on, as one line.
    """
    counts = Counter(row["status"] for row in results)
    now = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    lines = [
        "Trial status: " + " | ".join(f"{count} {status}" for status, count in counts.items()),
        f"Current time: {now}. Total running time: {duration(seconds)}",
        f"Logical resource usage: {resources}",
    ]
    if ranking := best_first(results):
        best = ranking[0]
        lines.append(
            f"Current best trial: {best['trial_id']} with loss={best['best_loss']} and params={best['config']}"
        )
    names = RECAP_PARAMETERS + [
        name
        for name in dict.fromkeys(name for row in results for name in row["config"])
        if name not in RECAP_PARAMETERS and len({str(row["config"].get(name)) for row in results}) > 1
    ]
    header = ["Trial name", "status", *names, "iter", "total time (s)", "loss", "accuracy"]
    table = [
        [row["name"], row["status"]]
        + [row["config"].get(name) for name in names]
        + [row["epochs"], row["seconds"], row["loss"], row["accuracy"]]
        for row in results
    ]
    return "\n".join([*lines, boxed_table(header, table)])


def recap_best(results: list[dict], metrics: dict, folder: Path) -> str:
    """Return the closing lines of a search as text: its best trial by its best epoch, and where things are.

    Args:
        results: of read_results.
        metrics: of save_best_model.
        folder: the search's.
    """
    best = next(row for row in results if row["trial_id"] == metrics["trial_id"])
    finished = [row for row in results if row["status"] in FINISHED]
    planned = sum(row["config"]["epochs"] for row in finished)
    saved = planned - sum(row["epochs"] for row in finished)
    return "\n".join(
        [
            f"Best trial: {best['name']}, epoch {metrics['epoch']} of {best['config']['epochs']}",
            f"  config: {best['config']}",
            f"  validation loss: {metrics['val_loss']:.4f}",
            f"  validation accuracy: {metrics['val_accuracy']:.4f}",
            f"  test accuracy: {metrics['test_accuracy']:.4f}",
            f"Best model: {shown(folder / BEST_MODEL)}",
            f"TensorBoard: {shlex.join(['tensorboard', '--logdir', shown(folder.parent)])}",
            f"Early stopping saved {saved} of {planned} epochs.",
        ]
    )


def boxed_table(header: list[str], rows: list[list]) -> str:
    """Return a table with a box around it; floats have 6 significant digits, and numbers stand to the right."""
    cells = [[f"{v:.6g}" if isinstance(v, float) else "" if v is None else str(v) for v in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    numeric = [all(isinstance(v, int | float | None) for v in column) for column in zip(*rows, strict=True)]

    def line(values: list[str], numeric: list[bool]) -> str:
        parts = [v.rjust(w) if n else v.ljust(w) for v, w, n in zip(values, widths, numeric, strict=True)]
        return "│ " + "   ".join(parts) + " │"

    rule = "─" * (sum(widths) + 3 * (len(widths) - 1) + 2)
    body = [line(row, numeric) for row in cells]
    return "\n".join([f"╭{rule}╮", line(header, [False] * len(header)), f"├{rule}┤", *body, f"╰{rule}╯"])


def duration(seconds: float) -> str:
    """Return a time span in words that people read: 42min 46s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes}min {seconds}s" if hours else f"{minutes}min {seconds}s" if minutes else f"{seconds}s"
