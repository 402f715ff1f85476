"""What a person reads of a search: the table, the recap, results.csv, best_model/."""

import contextlib
import csv
import hashlib
import io
import json
import shlex
import shutil
import sys
from collections import Counter
from datetime import datetime
from pathlib import Path

import torch
from ray import tune

from data import Dataset
from model import SmallResNet
from search.records import FINISHED, best_first, sealed, shown, unsealed, write_whole
from search.trial import WEIGHTS_FILE, read_state, replacing
from train import best_device, evaluate, evaluation_batches, new_model

BEST_MODEL = "best_model"
# Shown for every trial; other hyperparameters only where trials differ in them.
RECAP_PARAMETERS = ["p_drop", "lr", "h_1", "h_2"]


class ProgressTable(tune.CLIReporter):
    """Ray's table while the search runs, at most every so many seconds; the recap takes the place of the last one."""

    def __init__(self, seconds: float) -> None:
        super().__init__(
            metric="loss",
            mode="min",
            parameter_columns=RECAP_PARAMETERS,
            metric_columns={"epoch": "iter", "seconds": "total time (s)", "loss": "loss", "accuracy": "accuracy"},
            max_report_frequency=seconds,
        )

    def report(self, trials: list, done: bool, *sys_info: str) -> None:
        if done:
            return
        with contextlib.redirect_stdout(io.StringIO()) as table:
            super().report(trials, done, *sys_info)
        text = table.getvalue()
        for trial in trials:
            text = text.replace(trial.trial_id, str(trial))
        # Ray's own folder, which is not where the results are.
        print(*(line for line in text.splitlines() if not line.startswith("Result logdir")), sep="\n")


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


def save_best_model(results: list[dict], dataset: Dataset, folder: Path) -> dict | None:
    """Test the best trial's model, once, and write best_model/: weights.pt, config.json and metrics.json.

    Where its weights are damaged or gone, which is said on stderr, it is the next best's.

    Args:
        results: of read_results.
        dataset: what the search ran on; its test images are used here and nowhere else.
        folder: the search's; best_model/ is there whole or not at all.

    Returns:
        What metrics.json holds: trial_id, epoch, val_loss, val_accuracy, test_loss, test_accuracy and sha256, of the
        other two files; None where no trial has a model.
    """
    if (folder / BEST_MODEL).exists() and not read_metrics(folder / BEST_MODEL):
        print(f"{shown(folder / BEST_MODEL)} is damaged, and made again.", file=sys.stderr)
    device, ranking = best_device(), best_first(results)
    for best in ranking:
        if model := load_model(best, len(dataset.classes), folder):
            break
        if best["checkpoint"] or best is ranking[0]:
            print(f"{best['name']} was better, but its weights are damaged or gone.", file=sys.stderr)
    else:
        return None
    test = evaluation_batches(dataset.test_images, dataset.test_labels, dataset.mean, dataset.std, device)
    test_loss, test_accuracy = evaluate(model.to(device, memory_format=torch.channels_last), test)
    description = {
        "hyperparameters": best["config"],
        "classes": dataset.classes,
        "mean": dataset.mean,
        "std": dataset.std,
    }
    with replacing(folder / BEST_MODEL) as temporary:
        temporary.mkdir()
        shutil.copyfile(folder / best["checkpoint"] / WEIGHTS_FILE, temporary / WEIGHTS_FILE)
        (temporary / "config.json").write_text(json.dumps(description, indent=2))
        metrics = {
            "trial_id": best["trial_id"],
            "epoch": best["best_epoch"],
            "val_loss": best["best_loss"],
            "val_accuracy": best["best_accuracy"],
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "sha256": {name: sha256(temporary / name) for name in (WEIGHTS_FILE, "config.json")},
        }
        (temporary / "metrics.json").write_text(sealed(metrics, indent=2))
    return metrics


def load_model(row: dict, num_classes: int, folder: Path) -> SmallResNet | None:
    """Return the model of a trial's best epoch, on the CPU, or None where its weights are damaged or gone."""
    weights = read_state(folder / row["checkpoint"] / WEIGHTS_FILE) if row["checkpoint"] else None
    if weights is None:
        return None
    model = new_model(row["config"], num_classes)
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError):  # of another model
        return None
    return model


def read_best_model(results: list[dict], folder: Path) -> dict | None:
    """Return the metrics of best_model/ if it is there, whole, and still the best trial's, else None."""
    metrics, ranking = read_metrics(folder / BEST_MODEL), best_first(results)
    if not metrics or not ranking:
        return None
    best = ranking[0]
    return metrics if (metrics["trial_id"], metrics["epoch"]) == (best["trial_id"], best["best_epoch"]) else None


def read_metrics(folder: Path) -> dict | None:
    """Return what metrics.json of a model's folder holds, or None where one of the files there is damaged or gone."""
    try:
        metrics = unsealed((folder / "metrics.json").read_bytes())
        whole = all(sha256(folder / name) == digest for name, digest in metrics["sha256"].items())
    except (OSError, ValueError, LookupError):
        return None
    return metrics if whole else None


def sha256(path: Path) -> str:
    """Return a file's SHA-256, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
