"""What came of a search: the trials' logs, the recap on the terminal, results.csv, best_model/, what stays on disk."""

import contextlib
import csv
import io
import json
import math
import re
import shlex
import shutil
import sys
from collections import Counter
from datetime import datetime
from pathlib import Path

import torch
from ray import tune
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from data import Dataset
from model import SmallResNet
from train import (
    METRICS,
    TRAINING_FILE,
    WEIGHTS_FILE,
    best_device,
    checkpoint_path,
    evaluate,
    evaluation_batches,
    read_state,
)

MODELS_KEPT = 5
LOG_FILE = "result.json"
FINISHED = ("TERMINATED", "DIVERGED")
# Shown for every trial; other hyperparameters only where trials differ in them.
RECAP_PARAMETERS = ["p_drop", "lr", "h_1", "h_2"]


class TrialLog(tune.Callback):
    """Writes what a trial reports into its folder, as it reports it, and of finished trials keeps the five best models.

    <trial>/result.json has a line of JSON an epoch, in the order in which they were reported; an epoch trained again
    after a restore has a second one, which counts. The last line of a trial that is finished has "done". A trial that
    failed has a line with "error", and error.txt. TensorBoard's events lie beside it.

    Args:
        folder: the search's.
        results: of read_results, as the search begins or is resumed.
    """

    def __init__(self, folder: Path, results: list[dict]) -> None:
        self.folder = folder
        self.lines = {row["name"]: read_log(folder / row["name"]) for row in results if row["status"] not in FINISHED}
        self.kept = prune_checkpoints(results, folder)
        self.writers = {}  # trial name → SummaryWriter, of running trials
        self.unwritten = {}  # trial name → text that found no room on the disk

    def on_trial_result(self, iteration: int, trials: list, trial: object, result: dict, **info: object) -> None:
        name = str(trial)
        if result.get("note"):
            print(f"{name} {result['note']}.", file=sys.stderr)
        line = {key: result[key] for key in METRICS} | ({"done": True} if result["done"] else {})
        logged = [other for other in self.lines[name] if other.get("epoch") == line["epoch"]]
        if line in logged:  # a restored trial reports again what it had
            return
        self.append(name, line)
        try:
            self.write_events(name, line, trial.config)
        except OSError as error:  # the lines of result.json are what counts
            self.warn(name, error)
        if result["done"]:
            self.close_writer(name)
            self.kept = prune_checkpoints(
                [*self.kept, summarise(name, trial.config, self.lines.pop(name))], self.folder
            )

    def on_trial_recover(self, iteration: int, trials: list, trial: object, **info: object) -> None:
        self.close_writer(str(trial))  # so that TensorBoard drops the epochs that are trained again

    def on_trial_error(self, iteration: int, trials: list, trial: object, **info: object) -> None:
        name, text = str(trial), Path(trial.error_file).read_text(errors="replace") if trial.error_file else ""
        self.append(name, {"error": error_sentence(text, trial.config)})
        with contextlib.suppress(OSError):
            (self.folder / name / "error.txt").write_text(text)
        self.close_writer(name)

    def on_experiment_end(self, trials: list, **info: object) -> None:
        for name in list(self.writers):
            self.close_writer(name)
        for name in list(self.unwritten):
            self.append(name, None)

    def append(self, name: str, line: dict | None) -> None:
        """Append a line, and what could not be written before, to a trial's log."""
        text = self.unwritten.pop(name, "")
        if line is not None:
            self.lines[name].append(line)
            text += json.dumps(line) + "\n"
        path = self.folder / name / LOG_FILE
        try:
            path.parent.mkdir(exist_ok=True)
            with path.open("ab") as file:
                file.truncate(whole_lines(path.read_bytes()))  # of a process killed while it wrote
                file.write(text.encode())
        except OSError as error:
            self.unwritten[name] = text
            self.warn(name, error)

    def write_events(self, name: str, line: dict, config: dict) -> None:
        """Write TensorBoard's events of an epoch, and with the first one the hyperparameters."""
        if name not in self.writers:
            # Of an epoch trained again, TensorBoard shows the later.
            writer = SummaryWriter(str(self.folder / name), purge_step=line["epoch"])
            self.writers[name] = writer
            experiment, session_start, _ = hparams(config, dict.fromkeys(("accuracy", "loss"), 0.0))
            writer.file_writer.add_summary(experiment)
            writer.file_writer.add_summary(session_start)
        for key in METRICS:
            if key != "epoch":
                self.writers[name].add_scalar(key, line[key], line["epoch"])
        if "done" in line:
            self.writers[name].file_writer.add_summary(hparams({}, {})[2])
        self.writers[name].flush()

    def close_writer(self, name: str) -> None:
        if writer := self.writers.pop(name, None):
            writer.close()

    def warn(self, name: str, error: OSError) -> None:
        print(f"{name}: its log in {self.folder / name} cannot be written ({error}): make room there.", file=sys.stderr)


def whole_lines(content: bytes) -> int:
    """Return the length of the part of a log that ends with its last whole line."""
    return content.rfind(b"\n") + 1


def read_log(folder: Path) -> list[dict]:
    """Return the lines of a trial's log; one that is not whole, as of a process killed while it wrote, is left out."""
    path = folder / LOG_FILE
    content = path.read_bytes() if path.is_file() else b""
    lines = []
    for text in content[: whole_lines(content)].splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict)]


def error_sentence(text: str, config: dict) -> str:
    """Return what a trial's traceback comes down to, and what to do where that is known."""
    last = text.split("Failure #")[-1].splitlines()[1:]  # of several attempts; the rest of the line is its time
    lines = [line.strip() for line in last if line.strip()] or ["no reason is known"]
    if "OutOfMemoryError" in text or "MemoryError" in text or "can't allocate memory" in text:
        sizes = ", ".join(f"{key} {config[key]}" for key in ("batch_size", "h_1", "h_2"))
        return f"out of memory with {sizes}: make these smaller, or let fewer trials run at once"
    # Of an exception the last line tells; of a process that died, the first.
    return lines[-1] if re.match(r"[\w.]+(Error|Exception)\b", lines[-1]) else lines[0]


def read_results(folder: Path, trials: dict[str, dict]) -> list[dict]:
    """Return a dict a trial of the search in folder, in the order in which they were drawn: see summarise.

    Args:
        folder: the search's.
        trials: name → config.
    """
    return [summarise(name, config, read_log(folder / name), folder) for name, config in trials.items()]


def summarise(name: str, config: dict, lines: list[dict], folder: Path | None = None) -> dict:
    """Return what a trial's log comes down to.

    Keys: trial_id, name, status, config, error (a sentence or None), epochs (done), loss and accuracy (of the last
    epoch, on the validation images), seconds, best_epoch, best_accuracy and best_loss (of the epoch with the highest
    validation accuracy, the first of several), checkpoint (of that epoch: a path relative to the search's folder, or
    None where it is not there any more). What a trial never reported is None.

    The status is PENDING, UNFINISHED, ERROR or, of a trial that is finished, TERMINATED or DIVERGED.
    """
    epochs = {line["epoch"]: line for line in lines if "epoch" in line}  # of an epoch trained again, the later line
    row = {"trial_id": name.rsplit("_", 1)[-1], "name": name, "status": "PENDING", "config": config, "error": None}
    keys = ("epochs", "best_epoch", "best_accuracy", "best_loss", "loss", "accuracy", "seconds", "checkpoint")
    row |= dict.fromkeys(keys)
    if lines:
        row["error"] = lines[-1].get("error")
        row["status"] = "ERROR" if row["error"] else "UNFINISHED"
    if not epochs:
        return row
    last = epochs[max(epochs)]
    row |= {"epochs": last["epoch"], "loss": last["loss"], "accuracy": last["accuracy"], "seconds": last["seconds"]}
    if "done" in lines[-1]:
        row["status"] = "TERMINATED" if math.isfinite(last["loss"]) else "DIVERGED"
    best = max((epochs[epoch] for epoch in sorted(epochs)), key=lambda line: line["accuracy"])
    row |= {"best_epoch": best["epoch"], "best_accuracy": best["accuracy"], "best_loss": best["loss"]}
    path = checkpoint_path(Path(name), best["epoch"])
    if folder is None or (folder / path / WEIGHTS_FILE).exists():
        row["checkpoint"] = path.as_posix()
    return row


def best_first(results: list[dict]) -> list[dict]:
    """Return the trials with a checkpoint, save those that diverged, the highest validation accuracy first."""
    trained = [row for row in results if row["checkpoint"] and row["status"] != "DIVERGED"]
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
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def save_best_model(results: list[dict], dataset: Dataset, folder: Path) -> dict | None:
    """Test the best trial's model, once, and write best_model/: weights.pt, config.json and metrics.json.

    Where its weights are damaged, which is said on stderr, it is the next best's.

    Args:
        results: of read_results.
        dataset: what the search ran on; its test images are used here and nowhere else.
        folder: the search's; best_model/ is there whole or not at all.

    Returns:
        What metrics.json holds: trial_id, epoch, val_loss, val_accuracy, test_loss, test_accuracy; None where no trial
        has a model.
    """
    for best in best_first(results):
        path = folder / best["checkpoint"] / WEIGHTS_FILE
        if weights := read_state(path):
            break
        print(f"{path} is damaged, so {best['name']} cannot be the best trial.", file=sys.stderr)
    else:
        return None
    config, device = best["config"], best_device()
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


def read_best_model(results: list[dict], folder: Path) -> dict | None:
    """Return the metrics of best_model/ if it is there, whole, and still the best trial's, else None."""
    try:
        metrics = json.loads((folder / "best_model" / "metrics.json").read_text())
        best = best_first(results)[0]
        return metrics if (metrics["trial_id"], metrics["epoch"]) == (best["trial_id"], best["best_epoch"]) else None
    except (OSError, ValueError, TypeError, LookupError):
        return None


def prune_checkpoints(results: list[dict], folder: Path) -> list[dict]:
    """Delete the training state of finished trials, and all checkpoints of theirs but the five best trials' best.

    Returns:
        The finished trials that keep a checkpoint; the others' "checkpoint" becomes None.
    """
    finished = [row for row in results if row["status"] in FINISHED]
    kept = best_first(finished)[:MODELS_KEPT]
    for row in finished:
        if not any(row is other for other in kept):
            row["checkpoint"] = None
        for checkpoint in folder.glob(f"{row['name']}/checkpoint_*"):
            if checkpoint.relative_to(folder).as_posix() == row["checkpoint"]:
                (checkpoint / TRAINING_FILE).unlink(missing_ok=True)
            else:
                shutil.rmtree(checkpoint)
    return kept


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
