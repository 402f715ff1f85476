"""What came of a search: the recap on the terminal, results.csv, best_model/, and which checkpoints stay on disk."""

import csv
import io
import json
import logging
import shlex
import shutil
from collections import Counter
from datetime import datetime
from pathlib import Path

import torch
from ray.tune import ExperimentAnalysis

from data import Dataset
from model import SmallResNet
from train import TRAINING_FILE, WEIGHTS_FILE, best_device, evaluate, evaluation_batches

MODELS_KEPT = 5
# Shown for every trial; other hyperparameters only where trials differ in them.
RECAP_PARAMETERS = ["p_drop", "lr", "h_1", "h_2"]


def read_results(folder: Path) -> list[dict]:
    """Return a dict a trial of the search in folder, in the order in which they were drawn.

    Keys: trial_id, name, status (Ray's: TERMINATED, ERROR, …), config, error (a line or None), epochs (done), loss and
    accuracy (of the last epoch, on the validation images), seconds, best_epoch, best_accuracy and best_loss (of the
    epoch with the highest validation accuracy), checkpoint (of that epoch: a path relative to folder, or None where it
    is not on disk). What a trial never reported is None.
    """
    logging.getLogger("ray.tune.analysis").setLevel(logging.ERROR)  # a trial without a result is no news
    analysis = ExperimentAnalysis(str(folder))
    rows = []
    for trial in sorted(analysis.trials, key=lambda trial: trial.trial_id):
        row = {"trial_id": trial.trial_id, "name": str(trial), "status": trial.status, "config": trial.config}
        measured = ("epochs", "best_epoch", "best_accuracy", "best_loss", "loss", "accuracy", "seconds", "checkpoint")
        row |= dict.fromkeys(measured)
        row["error"] = (
            last_line(folder / trial.storage.trial_dir_name / "error.txt") if trial.status == "ERROR" else None
        )
        rows.append(row)
        epochs = analysis.trial_dataframes[trial.trial_id]
        if epochs.empty:
            continue
        epochs = epochs.drop_duplicates("epoch", keep="last")  # a restored trial may have repeated one
        last = epochs.iloc[-1]
        row |= {"epochs": int(last["epoch"]), "loss": last["loss"], "accuracy": last["accuracy"]}
        row["seconds"] = last["time_total_s"]
        # The best epoch always has a checkpoint; so may the last, and of two alike Ray keeps the later.
        saved = epochs[epochs["checkpoint_dir_name"].notna()]
        if saved.empty:
            continue
        best = saved.sort_values("accuracy", kind="stable").iloc[-1]
        row |= {"best_epoch": int(best["epoch"]), "best_accuracy": best["accuracy"], "best_loss": best["loss"]}
        checkpoint = Path(trial.storage.trial_dir_name) / best["checkpoint_dir_name"]
        row["checkpoint"] = checkpoint.as_posix() if (folder / checkpoint / WEIGHTS_FILE).exists() else None
    return rows


def last_line(path: Path) -> str:
    """Return the last line of a text file that is not blank, or "" where there is none."""
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def best_first(results: list[dict]) -> list[dict]:
    """Return the trials with a checkpoint, the highest validation accuracy at any epoch first."""
    trained = [row for row in results if row["checkpoint"]]
    return sorted(trained, key=lambda row: (-row["best_accuracy"], row["best_loss"]))


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


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or, if the process is killed, as it was."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def save_best_model(best: dict, dataset: Dataset, folder: Path) -> dict:
    """Test the best trial's model, once, and write best_model/: weights.pt, config.json and metrics.json.

    Args:
        best: the trial, one of read_results.
        dataset: what the search ran on; its test images are used here and nowhere else.
        folder: the search's; best_model/ is there whole or not at all.

    Returns:
        What metrics.json holds: trial_id, epoch, val_loss, val_accuracy, test_loss, test_accuracy.
    """
    config, device = best["config"], best_device()
    weights = torch.load(folder / best["checkpoint"] / WEIGHTS_FILE, weights_only=True, map_location="cpu")
    model = SmallResNet(config["h_1"], config["h_2"], config["p_drop"], len(dataset.classes))
    model.load_state_dict(weights)
    model.to(device, memory_format=torch.channels_last)
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
    description = {
        "hyperparameters": config,
        "classes": dataset.classes,
        "mean": dataset.mean,
        "std": dataset.std,
    }
    temporary = folder / ".best_model.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    torch.save(weights, temporary / WEIGHTS_FILE)
    (temporary / "config.json").write_text(json.dumps(description, indent=2))
    (temporary / "metrics.json").write_text(json.dumps(metrics, indent=2))
    shutil.rmtree(folder / "best_model", ignore_errors=True)
    temporary.rename(folder / "best_model")
    return metrics


def prune_checkpoints(results: list[dict], folder: Path) -> None:
    """Delete the training state of finished trials, and all checkpoints of theirs but the five best trials' best."""
    kept = {row["checkpoint"] for row in best_first(results)[:MODELS_KEPT]}
    for row in results:
        if row["status"] != "TERMINATED":
            continue
        for checkpoint in folder.glob(f"{row['name']}/checkpoint_*"):
            if checkpoint.relative_to(folder).as_posix() in kept:
                (checkpoint / TRAINING_FILE).unlink(missing_ok=True)
            else:
                shutil.rmtree(checkpoint)
        if row["checkpoint"] not in kept:
            row["checkpoint"] = None


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
    finished = [row for row in results if row["status"] == "TERMINATED"]
    planned = sum(row["config"]["epochs"] for row in finished)
    saved = planned - sum(row["epochs"] for row in finished)
    return "\n".join(
        [
            f"Best trial: {best['name']}, epoch {metrics['epoch']} of {best['config']['epochs']}",
            f"  config: {best['config']}",
            f"  validation loss: {metrics['val_loss']:.4f}",
            f"  validation accuracy: {metrics['val_accuracy']:.4f}",
            f"  test accuracy: {metrics['test_accuracy']:.4f}",
            f"Best model: {shown(folder / 'best_model')}",
            f"TensorBoard: {shlex.join(['tensorboard', '--logdir', shown(folder.parent)])}",
            f"Early stopping saved {saved} of {planned} epochs.",
        ]
    )


def shown(path: Path) -> str:
    """Return an absolute path as one would type it: relative where it is below the working directory."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


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
