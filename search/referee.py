"""What Ray Tune calls while a search runs: the queue of trials, and the referee, at which every epoch arrives."""

import math
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from search.best_model import prepare_gpu
from search.display import Display
from search.records import Search, Trial, new_report
from search.schedulers import PAUSE, STOP, STOPPED, Scheduler
from search.trial import ERROR_FILE, prune, prune_weights
from search.tuner import own_node_lives
from train import Report

NODE_PERIOD = 5  # seconds between checks that Ray is alive
OUT_OF_MEMORY = (
    "MemoryError",  # Python's; also matches torch's OutOfMemoryError
    "running low on memory",  # Ray's
    "can't allocate memory",  # torch's, on the CPU
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "unable to find an engine",  # cuDNN's
)


class TimeBudget(tune.Stopper):
    """Stops all trials once the time budget of a search is spent."""

    def __init__(self, search: Search) -> None:
        self.end = time.monotonic() + search.time_left()

    def __call__(self, trial_id: str, result: dict) -> bool:
        return False

    def stop_all(self) -> bool:
        return time.monotonic() >= self.end


class TrialQueue(Searcher):
    """Hands Tune these trials of a search, at most at_once at a time, as the scheduler chooses.

    Tune sees a trial that continues after a pause as a new one.
    """

    def __init__(self, search: Search, trials: list[Trial], scheduler: Scheduler, at_once: int) -> None:
        super().__init__()
        self.search, self.trials, self.scheduler, self.at_once = search, trials, scheduler, at_once

    def suggest(self, trial_id: str) -> dict | str | None:
        """Return the next trial's name and config; None while all workers are busy, or running trials may still pause.

        Tune names its trial by this name, and takes it out of the config (see fit in hparam_search.py).
        """
        running = self.search.running()
        if len(running) >= self.at_once:
            return None
        trial = self.scheduler.choose([each for each in self.trials if each.waits])
        if not trial:
            if self.search.settings.gpus_per_trial != 0:
                prepare_gpu()
            return None if running else Searcher.FINISHED
        self.search.record("begun", trial=trial.name)
        return {"trial": trial.name} | trial.config

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Do nothing: the search knows."""

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: a search is resumed from its log."""


class Referee(FIFOScheduler):
    """Judges every epoch, records what it decided, and then shows it.

    Tune asks its scheduler, which this is, about a result before it tells anyone else. early_stop returns why a trial
    ends by itself after its reports, or None; trials that repeat another one are not judged by the scheduler. The
    models_kept best trials keep their weights. `failure` is why the search cannot go on: its log cannot be written, or
    Ray has died.
    """

    def __init__(
        self,
        search: Search,
        scheduler: Scheduler,
        early_stop: Callable[[list[Report]], str | None],
        display: Display,
        models_kept: int | None,
    ) -> None:
        super().__init__()
        self.search, self.scheduler, self.early_stop = search, scheduler, early_stop
        self.display, self.models_kept = display, models_kept
        self.failure: OSError | None = None

    def on_trial_result(self, controller: Any, trial: Any, result: dict) -> str:
        """Handle what a trial tells (see run_trial): STOP if it has ended or is paused, otherwise CONTINUE."""
        known = self.search.trials[str(trial)]
        try:
            if "note" in result:
                self.display.say(f"{known.name}: {result['note']}.")
            if result.get("restored", math.inf) < len(known.reports):
                self.search.record("restarted", trial=known.name, epoch=result["restored"])
                self.display.restarted(known)
            for report in map(new_report, result["reports"]):
                if known.running and report.epoch > len(known.reports):
                    self.on_epoch(known, report)
        except OSError as error:  # Tune would take it for the trial's
            self.failure = error
        return self.CONTINUE if known.running else self.STOP

    def on_epoch(self, trial: Trial, report: Report) -> None:
        """Decide whether a trial ends, pauses or continues after an epoch; record and show that."""
        end, paused = self.early_stop([*trial.reports, report]), False
        if not end and not trial.repeats:
            decision = self.scheduler.judge(trial, report)
            end, paused = STOPPED if decision == STOP else None, decision == PAUSE
        self.search.record("reported", report, trial=trial.name, end=end, paused=paused)
        self.display.reported(trial)
        if end:
            self.end(trial)
        elif paused:  # Tune stops the worker before it could delete older weights
            prune_weights(self.search.folder / trial.name, {trial.best.epoch} if trial.best else set())
        if report.epoch in self.scheduler.rungs:
            self.end_beaten()

    def end_beaten(self) -> None:
        """End the paused trials that cannot be promoted any more."""
        for trial in self.scheduler.beaten():
            self.search.record("ended", trial=trial.name, end=STOPPED)
            self.end(trial)

    def end(self, trial: Trial) -> None:
        """Do what is due when a trial has ended."""
        if not trial.repeats:
            self.scheduler.ended(trial)
        prune(self.search, [trial], self.models_kept)
        self.display.ended(trial)

    def on_trial_complete(self, controller: Any, trial: Any, result: dict) -> None:
        """Notice that Tune considers a trial complete which has not ended here."""
        if self.search.trials[str(trial)].running:
            self.fail(self.search.trials[str(trial)], "its training returned before the last epoch")

    def fail(self, trial: Trial, error: str) -> None:
        """Record and show that a trial failed."""
        try:
            self.search.record("failed", trial=trial.name, error=error)
        except OSError as disk_error:
            self.failure = disk_error
        self.display.failed(trial, error)


class Watcher(tune.Callback):
    """Notices what no result tells: that a trial starts or fails, that Ray dies, and that the search is to end.

    Once `stop` is set, Tune's thread ends and leaves the trials as they are.
    """

    def __init__(self, referee: Referee) -> None:
        self.referee, self.search, self.display = referee, referee.search, referee.display
        self.stop = threading.Event()
        self.checked = time.monotonic()

    def setup(self, **info: object) -> None:
        """Do what a process that was killed left undone."""
        self.referee.end_beaten()
        prune(self.search, [trial for trial in self.search.trials.values() if trial.end], self.referee.models_kept)

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: object) -> None:
        self.display.started(trial)

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: object) -> None:
        self.display.say(f"Restarting {trial}, which failed: {error_sentence(failures_of(trial), trial.config)}.")

    def on_step_end(self, iteration: int, trials: list, **info: object) -> None:
        self.display.trackers.step = {"iteration": iteration, "trials": trials}
        for trial in trials:  # in every case: Tune has no hook for a worker that cannot be reused
            if trial.status == trial.ERROR and self.search.trials[str(trial)].running:
                self.on_failure(self.search.trials[str(trial)], failures_of(trial))
        if time.monotonic() - self.checked >= NODE_PERIOD:
            self.checked = time.monotonic()
            if not own_node_lives():  # Tune would wait forever
                self.referee.failure = ConnectionError(
                    "Ray died on this machine, perhaps out of memory; resume the search"
                )
        if self.referee.failure or self.stop.is_set():
            self.display.close()
            raise self.referee.failure or SystemExit

    def on_failure(self, trial: Trial, text: str) -> None:
        """Keep the tracebacks of a trial that failed, and record why."""
        self.referee.fail(trial, error_sentence(text, trial.config))
        folder = self.search.folder / trial.name
        try:
            folder.mkdir(exist_ok=True)
            (folder / ERROR_FILE).write_text(text)
        except OSError as error:
            self.display.say(f"Cannot write {trial.name}/{ERROR_FILE} ({error.strerror}).")

    def on_experiment_end(self, trials: list, **info: object) -> None:
        self.display.close()


def failures_of(trial: Any) -> str:
    """Return what Tune has noted of the failures of one of its trials."""
    return Path(trial.error_file).read_text(errors="replace") if trial.error_file else ""


def error_sentence(text: str, config: dict) -> str:
    """Summarize a trial's last failure (see failures_of) in one sentence, with a remedy if one is known."""
    last = text.split("Failure #")[-1].splitlines()[1:]  # the last attempt; the rest of that line is its time
    lines = [line.strip() for line in last if line.strip()] or ["the reason is unknown"]
    if any(words in line for words in OUT_OF_MEMORY for line in last):
        sizes = ", ".join(f"{key} {config[key]}" for key in ("batch_size", "h_1", "h_2") if key in config)
        return (
            f"out of memory with {sizes}; reduce these, or run fewer trials at once (--gpus-per-trial 1 if they share "
            "a GPU, otherwise a higher --cpus-per-trial)"
        )
    if "failed to import on the worker" in text and (
        cause := re.search(r"^\w+Error: .+", text.split("on the worker")[1], re.M)
    ):
        return f"cannot import its code ({cause[0]}); install the missing package, or put it beside train.py"
    # The exception, perhaps of several lines, follows the last code location; a dead process has no traceback.
    for i, line in enumerate(last):
        if line.startswith('  File "'):
            lines = [line for line in last[i + 1 :] if line.strip() and not line.startswith("  ")] or lines
    return lines[0].strip().rstrip(".")
