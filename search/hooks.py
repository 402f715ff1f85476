"""What Ray Tune calls while a search runs: a queue of trials, a scheduler that can be resumed, and a recorder."""

import contextlib
import math
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from search.files import read_lines, remove
from search.halving import Promotion
from search.progress import Progress
from search.records import LOG_FILE, METRICS, Search, Trial, config_key
from search.sampler import outcomes
from search.tensorboard import Board
from search.trackers import Trackers
from search.trial import OUTPUT_FILE, TRAINING_FILE, prune_weights, weights_path
from search.tuner import own_node_lives
from train import Report

ERROR_FILE, STOPPED = "error.txt", "stopped by the scheduler"
NODE_PERIOD = 5  # seconds between checks that Ray is alive
OUT_OF_MEMORY = (
    "MemoryError",  # Python's; also matches OutOfMemoryError (Ray, torch)
    "can't allocate memory",  # torch's, on the CPU
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "unable to find an engine",  # cuDNN's
)


def early_stop(
    max_epochs: int, patience: int | None, min_delta: float, max_seconds: float | None, reports: list[Report]
) -> str | None:
    """Return why a trial ends after its latest report, whatever the other trials do, or None.

    It ends after max_epochs, after max_seconds of training and validation, if its loss is not finite, or if the loss
    (nats) has not fallen by min_delta for `patience` epochs. None switches max_seconds or patience off.
    """
    latest, losses = reports[-1], [report.loss for report in reports]
    if not math.isfinite(latest.loss):
        return "loss became NaN or infinite"
    if latest.epoch >= max_epochs:
        return "all epochs done"
    if max_seconds is not None and latest.seconds >= max_seconds:
        return f"reached the time limit ({max_seconds:,} s)"
    if patience is None or len(losses) <= patience:
        return None
    if min(losses[-patience:]) > min(losses[:-patience]) - min_delta:
        return f"no progress for {patience} epochs"
    return None


class TimeBudget(tune.Stopper):
    """Stops all trials once the time budget of a search is spent."""

    def __init__(self, search: Search) -> None:
        self.end = time.monotonic() + search.time_left()

    def __call__(self, trial_id: str, result: dict) -> bool:
        return False

    def stop_all(self) -> bool:
        return time.monotonic() >= self.end


class TrialQueue(Searcher):
    """Hands Tune these trials of a search, at most at_once at a time, as the promotion chooses.

    Tune sees a trial that continues after a pause as a new one. If a trial's config is not drawn yet, suggest_config is
    called with its number, the outcomes so far, and the configs taken.
    """

    def __init__(
        self,
        search: Search,
        trials: list[Trial],
        promotion: Promotion,
        at_once: int,
        suggest_config: Callable[..., dict],
    ) -> None:
        super().__init__()
        self.search, self.trials, self.promotion, self.at_once = search, trials, promotion, at_once
        self.suggest_config = suggest_config
        self.names = {}  # Tune's id of a trial → its name
        self.running = {}  # Tune's id → its trial

    def suggest(self, trial_id: str) -> dict | str | None:
        """Return the next trial's config; None while all workers are busy, or running trials may still pause."""
        if len(self.running) >= self.at_once:
            return None
        begun, busy = set(self.names.values()), self.busy()  # a trial begins once, but continues after each pause
        waiting = [trial for trial in self.trials if not trial.end and trial.name not in busy]
        trial = self.promotion.choose([trial for trial in waiting if trial.paused or trial.name not in begun])
        if not trial:
            return None if self.running else Searcher.FINISHED
        self.names[trial_id], self.running[trial_id] = trial.name, None
        if trial.paused:
            self.search.record("continued", trial=trial.name)
        if not self.search.is_drawn(trial):
            rung = min(self.promotion.rungs, default=None)
            told = outcomes(self.search.own_trials(), self.search.objective, rung)
            taken = {config_key(each.config) for each in self.search.trials.values()}
            config = self.suggest_config(int(trial.trial_id), told, taken=taken)
            self.search.record("drawn", trial=trial.name, config=config, repeats=None)
        return trial.config

    def busy(self) -> list[str]:
        """Return the names of the trials that workers have, which may still be starting."""
        return [self.names[each] for each in self.running]

    def name(self, trial: Any) -> str:
        """Return the name of one of Tune's trials, which has just been made."""
        self.running[trial.trial_id] = trial
        return self.names[trial.trial_id]

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        del self.running[trial_id]

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: a search is resumed from its log."""

    def __getstate__(self) -> dict:
        """Pickle nothing: Tune would pickle this with each trial."""
        return {}


class ResumableScheduler(FIFOScheduler):
    """Lets Promotion, or any Ray scheduler that never pauses trials, continue where an earlier process stopped.

    The log is first replayed to Ray's scheduler, which must be new. It is told of records.Trial in place of Tune's, so
    that its trials are the same in all processes; it judges no epoch twice. early_stop returns why a trial ends by
    itself after its reports, or None; it alone ends trials that repeat another one. `ends` maps the names of trials
    that ended to why. A paused trial is stopped in Tune, but is not in `ends`.
    """

    def __init__(self, scheduler: Any, search: Search, early_stop: Callable[[list[Report]], str | None]) -> None:
        super().__init__()
        self.scheduler, self.search, self.early_stop = scheduler, search, early_stop
        self.ends = {}
        self.judged = {}  # name → the last epoch that the scheduler has seen
        no_controller: Any = SimpleNamespace(get_live_trials=list, get_trials=list)  # Tune has not started
        for event in [] if isinstance(scheduler, Promotion) else read_lines(search.folder / LOG_FILE)[0]:
            trial = search.trials.get(event.get("trial"))
            if event["event"] == "reported" and trial and not trial.repeats:
                self.add(no_controller, trial)
                if event["end"] in (None, STOPPED):  # what Tune tells it of, besides the ends
                    self.judge(no_controller, trial, event)
                if trial.end and event["end"] and self.judged[trial.name] != math.inf:
                    self.judged[trial.name] = math.inf  # it completes once, even if a damaged log has two ends
                    self.scheduler.on_trial_complete(no_controller, trial, event)

    def add(self, controller: Any, trial: Trial) -> None:
        """Tell the scheduler about a trial that it does not know yet."""
        if trial.name not in self.judged:
            self.judged[trial.name] = 0
            self.scheduler.on_trial_add(controller, trial)

    def judge(self, controller: Any, trial: Trial, result: dict) -> str:
        """Tell the scheduler about a new epoch, and return its decision."""
        if result["epoch"] <= self.judged[trial.name] and not isinstance(self.scheduler, Promotion):
            return self.CONTINUE  # Promotion counts no epoch twice: it judges by the trials' reports
        self.judged[trial.name] = result["epoch"]
        return self.scheduler.on_trial_result(controller, trial, result)

    def on_trial_add(self, controller: Any, trial: Any) -> None:
        self.add(controller, self.search.trials[str(trial)])

    def on_trial_result(self, controller: Any, trial: Any, result: dict) -> str:
        known = self.search.trials[str(trial)]
        if "restored" in result or result["epoch"] <= len(known.reports):
            return self.CONTINUE  # what run_trial reports before it trains on: see there
        report = Report(**{key: result[key] for key in METRICS})
        if reason := self.early_stop([*known.reports, report]):
            self.ends[known.name] = reason
            return self.STOP
        decision = self.CONTINUE if known.repeats else self.judge(controller, known, result)
        if decision == self.STOP:
            self.ends[known.name] = STOPPED
        return self.STOP if decision == self.PAUSE else decision

    def on_trial_complete(self, controller: Any, trial: Any, result: dict) -> None:
        if not self.search.trials[str(trial)].repeats:
            self.scheduler.on_trial_complete(controller, self.search.trials[str(trial)], result)


class Recorder(tune.Callback):
    """Records what trials report, shows it, and keeps the weights of the models_kept best ones.

    Once `interrupted` is set, Tune's thread ends and leaves the trials as they are. Why trials ended is in `ends` (see
    ResumableScheduler). A log file gets a progress block every progress_period seconds.
    """

    def __init__(
        self,
        search: Search,
        queue: TrialQueue,
        ends: dict[str, str],
        models_kept: int | None,
        progress_period: float | None,
        trackers: Trackers,
    ) -> None:
        self.search, self.queue, self.ends, self.models_kept = search, queue, ends, models_kept
        self.progress = Progress(progress_period, queue.promotion.rungs)
        self.board, self.shown = Board(search), True  # False once an event could not be written
        self.trackers = trackers
        trackers.begin(self.progress.say)
        self.interrupted = threading.Event()
        self.failure: OSError | None = None
        self.checked = time.monotonic()

    def __getstate__(self) -> dict:
        """Pickle nothing: a search is resumed from its log."""
        return {}

    def setup(self, **info: object) -> None:
        """Do what a process that was killed left undone."""
        self.end_beaten()
        prune(self.search, self.search.ended(), self.models_kept)

    def on_step_begin(self, iteration: int, trials: list, **info: object) -> None:
        self.trackers.step = {"iteration": iteration, "trials": trials}
        for trial_id, trial in list(self.queue.running.items()):
            if trial.status == trial.ERROR:  # its worker could not be reused, and Tune calls nothing else
                self.queue.on_trial_complete(trial_id)
                self.on_trial_error(iteration, trials, trial)
        if time.monotonic() - self.checked >= NODE_PERIOD:
            self.checked = time.monotonic()
            if not own_node_lives():  # Tune would wait forever
                self.failure = ConnectionError("Ray died on this machine, perhaps out of memory; resume the search")
        if self.interrupted.is_set() or self.failure:
            self.on_experiment_end(trials)
            raise SystemExit

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: object) -> None:
        self.trackers.start(trial)
        self.progress.update(self.search, self.queue.busy())

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: object) -> None:
        known = self.search.trials[str(trial)]
        if "note" in result:
            self.progress.say(f"{known.name}: {result['note']}.")
        if "restored" in result:
            if result["restored"] < len(known.reports):
                self.record("restarted", trial=known.name, epoch=result["restored"])
                for name in (known.name, ""):  # the steps go back in its curves and in the search's
                    self.board.close(name)
            return
        if result["epoch"] <= len(known.reports):
            return  # reported again after a restart
        end = self.ends.get(known.name)
        metrics, paused = {key: result[key] for key in METRICS}, result["done"] and not end
        if not self.record("reported", trial=known.name, **metrics, end=end, paused=paused):
            return
        try:
            self.board.write(known, len(self.queue.running))
        except OSError as error:
            self.board.close_all()  # to try again with new files
            if self.shown:
                self.progress.say(
                    f"Cannot write TensorBoard's events ({error.strerror}); trying again after each report."
                )
            self.shown = False
        self.trackers.report(known)
        if end:
            self.end(known)
        elif paused:
            self.board.close(known.name)  # many trials may be paused, too many for open files
            # Tune has stopped it before it could. (A trial may diverge as a time budget ends.)
            prune_weights(self.search.folder / known.name, {known.best.epoch} if known.best else set())
        if result["epoch"] in self.queue.promotion.rungs:
            self.end_beaten()
        over = known.name if result["done"] else None
        self.progress.update(self.search, [name for name in self.queue.busy() if name != over])

    def end_beaten(self) -> None:
        """End the paused trials that cannot be promoted any more."""
        for trial in self.queue.promotion.beaten():
            if self.record("ended", trial=trial.name, end=STOPPED):
                self.end(trial)

    def end(self, trial: Trial) -> None:
        """Delete what a trial that has ended no longer needs, and announce its end."""
        remove(self.search.folder / trial.name / ERROR_FILE)
        prune(self.search, [trial], self.models_kept)
        with contextlib.suppress(OSError):  # a full disk
            self.board.end(trial)
        self.trackers.end(trial.name)
        metric = self.search.objective.metric
        best = f"; best {metric} {getattr(trial.best, metric):.4f}" if trial.best else ""
        self.progress.say(f"{trial.name}: {trial.end}, at epoch {len(trial.reports)}{best}.")

    def on_trial_recover(self, iteration: int, trials: list, trial: Any, **info: object) -> None:
        self.progress.say(f"{trial} failed; restarting it.")

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: object) -> None:
        name, text = str(trial), Path(trial.error_file).read_text(errors="replace") if trial.error_file else ""
        error = error_sentence(text, trial.config)
        self.record("failed", trial=name, error=error)
        try:
            (self.search.folder / name).mkdir(exist_ok=True)
            (self.search.folder / name / ERROR_FILE).write_text(text)
        except OSError as disk_error:
            self.progress.say(f"cannot write {name}/{ERROR_FILE} ({disk_error}).")
        self.board.close(name)
        self.trackers.end(name, failed=True)
        self.progress.say(f"{name} failed: {error}.")
        self.progress.update(self.search, self.queue.busy())

    def on_experiment_end(self, trials: list, **info: object) -> None:
        self.board.close_all()
        self.progress.erase()
        if self.failure:
            raise self.failure

    def record(self, kind: str, **details: object) -> bool:
        """Record an event; return False if that fails, which ends the search at its next step or its end.

        (Tune would take an error raised here for the trial's.)
        """
        try:
            self.search.record(kind, **details)
        except OSError as error:
            self.failure = error
            return False
        return True


def prune(search: Search, trials: list[Trial], models_kept: int | None) -> None:
    """Delete what these ended trials no longer need: training states, and weights except those of the best trials.

    Of the ended trials with weights (taken ones may have none), the models_kept best (None: all) keep those of their
    best epoch.
    """
    ranking = [
        trial
        for trial in search.ranking()
        if trial.end and weights_path(search.folder / trial.name, trial.best.epoch).exists()
    ]
    for trial in (*trials, *ranking):
        folder = search.folder / trial.name
        remove(folder / TRAINING_FILE)
        if (output := folder / OUTPUT_FILE).exists() and not output.stat().st_size:
            remove(output)
        prune_weights(folder, {trial.best.epoch} if trial in ranking[:models_kept] else set())


def error_sentence(text: str, config: dict) -> str:
    """Summarize a trial's traceback in one sentence, with a remedy if one is known."""
    last = text.split("Failure #")[-1].splitlines()[1:]  # the last attempt; the rest of that line is its time
    lines = [line.strip() for line in last if line.strip()] or ["the reason is unknown"]
    if any(words in text for words in OUT_OF_MEMORY):
        sizes = ", ".join(f"{key} {config[key]}" for key in ("batch_size", "h_1", "h_2"))
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
