"""How Tune resumes a search: with the trials that are left, and a scheduler that knows what went before."""

import contextlib
import heapq
import zlib
from types import SimpleNamespace

import numpy as np
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from search.records import FINISHED, Search, read_log, read_results, summarise, write_params
from search.sampling import suggested


class TrialsLeft(Searcher):
    """Gives Tune the trials of a search that are not finished, one after the other, and writes their params.json.

    Args:
        search: whose trials these are. Of those that are drawn as they begin, its configs become whole.
        space: what these are drawn from.
        startup: how many trials must have finished for TPE to draw.
    """

    def __init__(self, search: Search, space: dict, startup: int) -> None:
        super().__init__()
        self.search, self.space, self.startup = search, space, startup
        self.trials = [(row["name"], row["config"]) for row in read_results(search) if row["status"] not in FINISHED]
        self.waiting = iter(self.trials)
        self.names = {}  # Tune's id of a trial → its name, and so its folder
        self.finished = {}  # name → config and accuracy

    def suggest(self, trial_id: str) -> dict | str:
        """Return the config of the next trial."""
        name, config = next(self.waiting, (None, None))
        if name is None:
            return Searcher.FINISHED
        self.names[trial_id] = name
        if config.keys() != self.space.keys():  # it is not drawn yet
            number = list(self.search.trials).index(name)
            config = suggested(self.space, self.search.settings.seed, number, self.outcomes(), self.startup)
            self.search.trials[name] = config
        with contextlib.suppress(OSError):  # TrialLog tries again, and tells
            write_params(self.search.folder / name, config)
        return config

    def outcomes(self) -> list[tuple[dict, float]]:
        """Return config and best accuracy of the trials that have finished, in the order of their numbers."""
        for name, config in self.search.trials.items():
            if name not in self.finished:
                row = summarise(name, config, *read_log(self.search.folder / name), self.search.folder)
                if row["status"] in FINISHED:
                    accuracy = row["best_accuracy"] if row["status"] == "TERMINATED" else 0.0
                    self.finished[name] = config, accuracy
        return [self.finished[name] for name in self.search.trials if name in self.finished]

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: a search is resumed from its own records."""

    def __getstate__(self) -> dict:
        """Pickle nothing: with each trial, Tune keeps a pickle of what names it, and so of this."""
        return {}


class KnownTrial:
    """A trial as its scheduler knows it: one and the same, though another process of the search may have begun it."""

    def __init__(self, name: str) -> None:
        self.trial_id = name
        self.trial = None  # Tune's, of this process

    def __getattr__(self, key: str) -> object:
        return getattr(self.trial, key)

    def __str__(self) -> str:
        return self.trial_id


class ResumedScheduler(TrialScheduler):
    """Lets any of Ray's schedulers that stops trials go on where an earlier process of the search was interrupted.

    The scheduler is told first what the trials had reported, in the order in which they did. An epoch that a restored
    trial reports again passes, as it had passed: whoever has reported since has no say.

    Args:
        scheduler: a new one.
        search: the one that it judges.
    """

    def __init__(self, scheduler: TrialScheduler, search: Search) -> None:
        super().__init__()
        self.scheduler = scheduler
        self.trials = {}  # name → KnownTrial
        self.epochs = {}  # name → those that the scheduler was told of
        finished = {row["name"] for row in read_results(search) if row["status"] in FINISHED}
        logs = {name: read_log(search.folder / name)[0] for name in search.trials}
        nobody = SimpleNamespace(get_live_trials=list, get_trials=list)  # in place of Tune, which has not begun
        for name, line in heapq.merge(
            *([(name, line) for line in log if "epoch" in line] for name, log in logs.items()),
            key=lambda entry: entry[1]["time"],
        ):
            trial = self.add(nobody, name)
            if line["epoch"] not in self.epochs[name]:
                self.epochs[name].add(line["epoch"])
                self.scheduler.on_trial_result(nobody, trial, line)
            if name in finished and line is logs[name][-1]:
                self.scheduler.on_trial_complete(nobody, trial, line)

    def add(self, controller: object, name: str) -> KnownTrial:
        if name not in self.trials:
            self.trials[name], self.epochs[name] = KnownTrial(name), set()
            # ASHA draws a trial's bracket from numpy's generator, which must draw the same for it in every process.
            state = np.random.get_state()  # noqa: NPY002
            np.random.seed(zlib.crc32(name.encode()))  # noqa: NPY002
            self.scheduler.on_trial_add(controller, self.trials[name])
            np.random.set_state(state)  # noqa: NPY002
        return self.trials[name]

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: object) -> bool:
        return self.scheduler.set_search_properties(metric, mode, **spec)

    def on_trial_add(self, tune_controller: object, trial: object) -> None:
        self.add(tune_controller, str(trial)).trial = trial

    def on_trial_result(self, tune_controller: object, trial: object, result: dict) -> str:
        name, epoch = str(trial), result["epoch"]
        if epoch in self.epochs[name]:
            return self.CONTINUE
        self.epochs[name].add(epoch)
        return self.scheduler.on_trial_result(tune_controller, self.trials[name], result)

    def on_trial_complete(self, tune_controller: object, trial: object, result: dict) -> None:
        self.scheduler.on_trial_complete(tune_controller, self.trials[str(trial)], result)

    def on_trial_error(self, tune_controller: object, trial: object) -> None:
        self.scheduler.on_trial_error(tune_controller, self.trials[str(trial)])

    def on_trial_remove(self, tune_controller: object, trial: object) -> None:
        self.scheduler.on_trial_remove(tune_controller, self.trials[str(trial)])

    def choose_trial_to_run(self, tune_controller: object) -> object | None:
        return self.scheduler.choose_trial_to_run(tune_controller)

    def debug_string(self) -> str:
        return self.scheduler.debug_string()
