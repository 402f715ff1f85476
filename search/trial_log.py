"""What is written when a trial reports: its log, its errors, TensorBoard's events; and what makes room then."""

import re
import sys
import time
from pathlib import Path

from ray import tune
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from search.records import (
    ERROR_FILE,
    FINISHED,
    Search,
    append_line,
    prune,
    read_log,
    read_results,
    sealed,
    summarise,
    write_params,
)
from train import METRICS


class TrialLog(tune.Callback):
    """Writes what a trial reports into its folder, as it reports it, and of finished trials keeps the best models.

    <trial>/result.json has a line of JSON an epoch, in the order in which they were reported; an epoch trained again
    after a restore has a second one. The last line of a trial that is finished has "done". A trial that failed has a
    line with "error", and error.txt until it succeeds. TensorBoard's events lie beside it.

    Args:
        search: the one whose trials these are.
        models_kept: how many finished trials keep their weights.
    """

    def __init__(self, search: Search, models_kept: int) -> None:
        self.folder, self.models_kept = search.folder, models_kept
        results = read_results(search)
        self.configs = search.trials
        self.lines = {
            row["name"]: read_log(self.folder / row["name"])[0] for row in results if row["status"] not in FINISHED
        }
        self.kept = []  # finished trials with weights
        self.prune([row for row in results if row["status"] in FINISHED])
        self.writers = {}  # trial name → SummaryWriter, of running trials
        self.unwritten = {}  # trial name → text that found no room on the disk

    def on_trial_result(self, iteration: int, trials: list, trial: object, result: dict, **info: object) -> None:
        name = str(trial)
        if result.get("note"):
            print(f"{name} {result['note']}.", file=sys.stderr)
        metrics = {key: result[key] for key in METRICS}
        if not result["done"] and any(metrics.items() <= line.items() for line in self.lines[name]):
            return  # a restored trial reports again what it had
        line = metrics | {"time": time.time()} | ({"done": True} if result["done"] else {})
        self.append(name, line)
        try:
            self.write_events(name, line, trial.config)
        except OSError as error:  # the lines of result.json are what counts
            self.warn(name, error)
        if result["done"]:
            (self.folder / name / ERROR_FILE).unlink(missing_ok=True)
            self.close_writer(name)
            self.prune([summarise(name, trial.config, self.lines.pop(name), 0, self.folder)])

    def on_trial_recover(self, iteration: int, trials: list, trial: object, **info: object) -> None:
        self.close_writer(str(trial))  # so that TensorBoard drops the epochs that are trained again

    def on_trial_error(self, iteration: int, trials: list, trial: object, **info: object) -> None:
        name, text = str(trial), Path(trial.error_file).read_text(errors="replace") if trial.error_file else ""
        self.append(name, {"error": error_sentence(text, trial.config), "time": time.time()})
        try:
            (self.folder / name / ERROR_FILE).write_text(text)
        except OSError as error:
            self.warn(name, error)
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
            text += sealed(line) + "\n"
        try:
            write_params(self.folder / name, self.configs[name])
            append_line(self.folder / name, text)
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

    def prune(self, finished: list[dict]) -> None:
        """Make room where more trials have finished."""
        rows = [*self.kept, *finished]
        prune(rows, self.folder, self.models_kept)
        self.kept = [row for row in rows if row["checkpoint"]]

    def warn(self, name: str, error: OSError) -> None:
        print(f"{name}: its log in {self.folder / name} cannot be written ({error}): make room there.", file=sys.stderr)


def error_sentence(text: str, config: dict) -> str:
    """Return what a trial's traceback comes down to, and what to do where that is known."""
    last = text.split("Failure #")[-1].splitlines()[1:]  # of several attempts; the rest of the line is its time
    lines = [line.strip() for line in last if line.strip()] or ["no reason is known"]
    if "OutOfMemoryError" in text or "MemoryError" in text or "can't allocate memory" in text:
        sizes = ", ".join(f"{key} {config[key]}" for key in ("batch_size", "h_1", "h_2"))
        return (
            f"out of memory with {sizes}: make these smaller, or let fewer trials run at once, by "
            "--gpus-per-trial 1 where they share a GPU, else by --cpus-per-trial"
        )
    # Of an exception the last line tells; of a process that died, the first.
    return lines[-1] if re.match(r"[\w.]+(Error|Exception)\b", lines[-1]) else lines[0]
