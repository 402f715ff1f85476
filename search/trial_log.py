"""What is written when a trial reports: its log, its error, TensorBoard's events."""

import contextlib
import json
import re
import sys
from pathlib import Path

from ray import tune
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from search.records import FINISHED, LOG_FILE, prune_checkpoints, read_log, summarise, whole_lines
from train import METRICS


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


def error_sentence(text: str, config: dict) -> str:
    """Return what a trial's traceback comes down to, and what to do where that is known."""
    last = text.split("Failure #")[-1].splitlines()[1:]  # of several attempts; the rest of the line is its time
    lines = [line.strip() for line in last if line.strip()] or ["no reason is known"]
    if "OutOfMemoryError" in text or "MemoryError" in text or "can't allocate memory" in text:
        sizes = ", ".join(f"{key} {config[key]}" for key in ("batch_size", "h_1", "h_2"))
        return f"out of memory with {sizes}: make these smaller, or let fewer trials run at once"
    # Of an exception the last line tells; of a process that died, the first.
    return lines[-1] if re.match(r"[\w.]+(Error|Exception)\b", lines[-1]) else lines[0]
