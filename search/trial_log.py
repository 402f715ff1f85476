"""What happens when a trial reports: its log, its errors and TensorBoard's events are written, and room is made."""

import re
import threading
import time
from pathlib import Path

from ray import tune

from search.progress import Progress
from search.ray_session import own_node_lives
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
from search.tensorboard import Board
from train import METRICS

NODE_PERIOD = 5  # seconds between checks that Ray is alive
OUT_OF_MEMORY = (
    "MemoryError",  # Python's; also matches OutOfMemoryError (Ray, torch)
    "can't allocate memory",  # torch's, on the CPU
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "unable to find an engine",  # cuDNN's
)


class TrialLog(tune.Callback):
    """Writes what a trial reports into its folder, as it reports it, and of finished trials keeps the best models.

    <trial>/result.json has a line of JSON an epoch, in the order in which they were reported; an epoch trained again
    after a restore has a second one. The last line of a trial that is finished has "done". A trial that failed has a
    line with "error", and error.txt until it succeeds. TensorBoard's events lie beside it.

    Args:
        search: the one whose trials these are.
        models_kept: how many finished trials keep their weights.
        progress: what shows how far they are.
        reasons: trial id → why the stopper ended it.
        interrupted: once it is set, Tune's thread ends, and leaves the trials as they are.
    """

    def __init__(
        self,
        search: Search,
        models_kept: int,
        progress: Progress,
        reasons: dict[str, str],
        interrupted: threading.Event,
    ) -> None:
        self.folder, self.models_kept, self.progress, self.reasons = search.folder, models_kept, progress, reasons
        self.interrupted = interrupted
        self.looked = time.monotonic()
        results = read_results(search)
        self.configs = search.trials
        self.rows = {row["name"]: row for row in results}
        self.lines = {
            row["name"]: read_log(self.folder / row["name"])[0] for row in results if row["status"] not in FINISHED
        }
        self.kept = []  # finished trials with weights
        self.prune([row for row in results if row["status"] in FINISHED])
        self.board = Board(search, results)
        self.unwritten = {}  # trial name → text that found no room on the disk

    def __getstate__(self) -> dict:
        """Pickle nothing: Tune would keep it, but a search is resumed from its own records."""
        return {}

    def on_step_begin(self, iteration: int, trials: list, **info: object) -> None:
        if self.interrupted.is_set():
            self.on_experiment_end(trials)
            raise SystemExit
        if time.monotonic() - self.looked >= NODE_PERIOD:
            self.looked = time.monotonic()
            if not own_node_lives():  # Tune would wait forever
                self.on_experiment_end(trials)
                raise ConnectionError("Ray died on this machine, perhaps out of memory; resume the search")

    def on_trial_start(self, iteration: int, trials: list, trial: object, **info: object) -> None:
        self.show(trials)

    def on_trial_result(self, iteration: int, trials: list, trial: object, result: dict, **info: object) -> None:
        name = str(trial)
        if result.get("note"):
            self.progress.say(f"{name} {result['note']}.")
        metrics = {key: result[key] for key in METRICS}
        if not result["done"] and any(metrics.items() <= line.items() for line in self.lines[name]):
            return  # a restored trial reports again what it had
        line = metrics | {"time": time.time()} | ({"done": True} if result["done"] else {})
        self.append(name, line)
        row = self.rows[name] = summarise(name, trial.config, self.lines[name], 0, self.folder)
        try:
            self.board.write_epoch(row, line, len(running(trials)))
        except OSError as error:  # the lines of result.json are what counts
            self.warn(name, error)
        if result["done"]:
            (self.folder / name / ERROR_FILE).unlink(missing_ok=True)
            del self.lines[name]
            self.prune([row])
            reason = self.reasons.get(trial.trial_id, "stopped by the scheduler")
            self.progress.say(f"{name}: {reason}, at epoch {row['epochs']}; best accuracy {row['best_accuracy']:.4f}.")
        self.show(trials, without=name if result["done"] else None)

    def on_trial_recover(self, iteration: int, trials: list, trial: object, **info: object) -> None:
        self.board.close(str(trial))

    def on_trial_error(self, iteration: int, trials: list, trial: object, **info: object) -> None:
        name, text = str(trial), Path(trial.error_file).read_text(errors="replace") if trial.error_file else ""
        self.append(name, {"error": error_sentence(text, trial.config), "time": time.time()})
        self.rows[name] = summarise(name, trial.config, self.lines[name], 0, self.folder)
        try:
            (self.folder / name / ERROR_FILE).write_text(text)
        except OSError as error:
            self.warn(name, error)
        self.board.close(name)
        self.progress.say(f"{name} failed: {self.rows[name]['error']}.")
        self.show(trials, without=name)

    def on_experiment_end(self, trials: list, **info: object) -> None:
        self.board.close_all()
        for name in list(self.unwritten):
            self.append(name, None)
        self.progress.erase()

    def show(self, trials: list, without: str | None = None) -> None:
        """Show how far the trials are; one that has just ended is no longer running."""
        self.progress.update(list(self.rows.values()), [name for name in running(trials) if name != without])

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

    def prune(self, finished: list[dict]) -> None:
        """Make room where more trials have finished."""
        rows = [*self.kept, *finished]
        prune(rows, self.folder, self.models_kept)
        self.kept = [row for row in rows if row["checkpoint"]]

    def warn(self, name: str, error: OSError) -> None:
        self.progress.say(f"{name}: its log in {self.folder / name} cannot be written ({error}): make room there.")


def running(trials: list) -> list[str]:
    """Return the names of Tune's trials that run."""
    return [str(trial) for trial in trials if trial.status == trial.RUNNING]


def error_sentence(text: str, config: dict) -> str:
    """Return what a trial's traceback comes down to, and what to do where that is known."""
    last = text.split("Failure #")[-1].splitlines()[1:]  # of several attempts; the rest of the line is its time
    lines = [line.strip() for line in last if line.strip()] or ["no reason is known"]
    if any(words in text for words in OUT_OF_MEMORY):
        sizes = ", ".join(f"{key} {config[key]}" for key in ("batch_size", "h_1", "h_2"))
        return (
            f"out of memory with {sizes}: make these smaller, or let fewer trials run at once, by "
            "--gpus-per-trial 1 where they share a GPU, else by --cpus-per-trial"
        )
    if "failed to import on the worker" in text and (
        cause := re.search(r"^\w+Error: .+", text.split("on the worker")[1], re.M)
    ):
        return f"cannot import its code ({cause[0]}); install the missing package, or put it beside train.py"
    # Of an exception the last line tells; of a process that died, the first.
    return lines[-1] if re.match(r"[\w.]+(Error|Exception)\b", lines[-1]) else lines[0]
