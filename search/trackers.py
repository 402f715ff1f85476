"""Experiment trackers: what Ray's callbacks for MLflow, Weights & Biases and others receive."""

from collections.abc import Callable, Sequence
from typing import Any

from ray import tune

from data import InputError
from search.records import Trial, as_result


class Trackers:
    """Reports every trial to callbacks once, from its first epoch to its end.

    To Tune, a paused trial that continues is a new one, and a restored one reports its epochs again. Here it stays the
    same trial, and each epoch is reported once. A callback that fails is not called again, and a message says so.
    Raises InputError unless given a list of callbacks.
    """

    def __init__(self, callbacks: Sequence[tune.Callback]) -> None:
        if not isinstance(callbacks, list | tuple) or not all(isinstance(each, tune.Callback) for each in callbacks):
            raise InputError(f"callbacks is {callbacks!r}; make it a list of Ray's tune.Callback objects")
        self.callbacks = list(callbacks)
        self.say: Callable[[str], object] | None = None  # shows a message; None until the search begins
        self.step: dict[str, Any] = {"iteration": 0, "trials": []}  # what Tune passes to every hook
        self.trials: dict[str, Any] = {}  # name → the trial as Tune first started it
        self.told: dict[str, int] = {}  # name → how many of its epochs the callbacks know

    def begin(self, say: Callable[[str], object]) -> None:
        """Set the callbacks up, unless that is done, and show messages with `say` from now on."""
        first, self.say = self.say is None, say
        if first:
            self.call("setup")

    def call(self, hook: str, **info: object) -> None:
        """Call a hook of all callbacks."""
        for callback in list(self.callbacks):
            try:
                getattr(callback, hook)(**info)
            except (Exception, SystemExit) as error:  # from a server or the user's code
                self.callbacks.remove(callback)
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                self.say(f"The callback {type(callback).__name__} failed ({reason}); it will not be called again.")

    def start(self, trial: Any) -> None:
        """Report the start of one of Tune's trials, unless it continues one."""
        if str(trial) not in self.trials:
            self.trials[str(trial)], self.told[str(trial)] = trial, 0
            self.call("on_trial_start", **self.step, trial=trial)

    def report(self, trial: Trial) -> None:
        """Report a trial's latest epochs, if the callbacks know it; at first also those of an earlier process."""
        if not (shown := self.trials.get(trial.name)):
            return
        for report in trial.reports[self.told[trial.name] :]:
            about = {
                "trial_id": shown.trial_id,
                "config": dict(trial.config),
                "done": bool(trial.end and report is trial.reports[-1]),
            }
            self.call("on_trial_result", **self.step, trial=shown, result=as_result(report) | about)
        self.told[trial.name] = max(self.told[trial.name], len(trial.reports))  # fewer after a restart

    def end(self, name: str, failed: bool = False) -> None:
        """Report the end of a trial, if the callbacks know it."""
        if shown := self.trials.pop(name, None):
            self.call("on_trial_error" if failed else "on_trial_complete", **self.step, trial=shown)

    def close(self) -> None:
        """Report the end of the search; unfinished trials count as failed."""
        for name in list(self.trials):
            self.end(name, failed=True)
        if self.say:
            self.call("on_experiment_end", trials=self.step["trials"])
