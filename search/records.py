"""The state of a search, and how it is stored.

    search.json   the settings, a summary of the space, and hashes of the images
    log.jsonl     every event of the search, one per line, in the order in which they happened

Only Search.apply(event) changes the state of the trials, live and on resume: to resume is to replay the log.
"""

import contextlib
import glob
import importlib.metadata
import itertools
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from data import Dataset, InputError, fingerprint
from search.files import append_line, explain_failure, flush, loads, lock, read_lines, remove, write_json
from search.settings import CHANGEABLE, GROWABLE, Settings, flag
from train import DEFAULTS, Report

SEARCH_FILE, LOG_FILE, TRIAL_PREFIX = "search.json", "log.jsonl", "train_cifar_"
METRICS = [key.name for key in fields(Report)]
VERSIONS = {"torch": importlib.metadata.version("torch")}  # of the packages that results depend on
FORMAT = 9  # version of both files; others are refused


def config_key(config: dict) -> str:
    """Return a text that only equal configs share."""
    return json.dumps(config, sort_keys=True)


def new_report(values: dict) -> Report:
    """Return a report from its saved fields; a metric that train.py did not have then is NaN.

    Raises TypeError without epoch, loss or accuracy.
    """
    return Report(**dict.fromkeys(METRICS[3:], math.nan) | {key: values[key] for key in METRICS if key in values})


def as_result(report: Report) -> dict[str, Any]:
    """Return a report as Ray's schedulers and callbacks expect it."""
    return asdict(report) | {"training_iteration": report.epoch, "time_total_s": report.seconds}


@dataclass(frozen=True)
class Objective:
    """What makes an epoch the best of its trial, and a trial the best of its search; an unknown one is refused."""

    metric: str  # a field of Report
    mode: str  # max or min

    def __post_init__(self) -> None:
        if self.metric not in METRICS[1:]:
            raise InputError(f"METRIC {self.metric!r} is unknown; use one of {', '.join(METRICS[1:])}")
        if self.mode not in ("max", "min"):
            raise InputError(f"MODE {self.mode!r} is unknown; use max or min")

    @property
    def shown(self) -> list[str]:
        """The metrics that are shown for a best epoch."""
        return list(dict.fromkeys(["loss", "accuracy", self.metric]))

    def score(self, report: Report) -> float:
        """Return a number that is higher for a better report; -inf if its loss or metric is not finite."""
        value = getattr(report, self.metric)
        if not (math.isfinite(report.loss) and math.isfinite(value)):
            return -math.inf
        return value if self.mode == "max" else -value

    def best(self, reports: Iterable[Report]) -> Report | None:
        """Return the best report whose loss and metric are finite; of equals, the first."""
        return max((report for report in reports if self.score(report) > -math.inf), key=self.score, default=None)


@dataclass(eq=False)  # hashed by identity, for schedulers
class Trial:
    """The state of a trial: running, paused, ended, failed, or none of these (it has not begun, or was interrupted)."""

    name: str
    config: dict = field(default_factory=dict)
    repeats: str | None = None  # the trial whose config it repeats with another seed
    source: str | None = None  # path of the earlier search's trial, relative to --output-dir if it is there
    reports: list[Report] = field(default_factory=list)  # one per epoch, in order
    best: Report | None = None  # its weights are on disk while needed; None if the trial diverged or none is finite
    running: bool = False  # a worker has it
    paused: bool = False  # it is at a rung, until it continues or ends
    end: str | None = None  # why it ended
    error: str | None = None  # why it failed, in a sentence

    def become(
        self, running: bool = False, paused: bool = False, end: str | None = None, error: str | None = None
    ) -> None:
        """Change the state."""
        self.running, self.paused, self.end, self.error = running, paused, end, error

    @property
    def waits(self) -> bool:
        """Whether a worker may take it; if it is paused, once the scheduler chooses it."""
        return not (self.running or self.end or self.error)

    @property
    def trial_id(self) -> str:
        """The trial's number, as text; schedulers read it by this name."""
        return self.name.removeprefix(TRIAL_PREFIX)

    @property
    def diverged(self) -> bool:
        """Whether the loss became NaN or infinite."""
        return bool(self.reports) and not math.isfinite(self.reports[-1].loss)

    @property
    def status(self) -> str:
        """ERROR, DIVERGED, TERMINATED, PAUSED, UNFINISHED or PENDING, as the recap shows it."""
        if self.error:
            return "ERROR"
        if self.end:
            return "DIVERGED" if self.diverged else "TERMINATED"
        if self.paused:
            return "PAUSED"
        return "UNFINISHED" if self.reports else "PENDING"


@dataclass
class Search:
    """The state of a search."""

    folder: Path  # absolute
    settings: Settings
    space: dict[str, Any]  # a summary (see summarize), and the first trials
    images: dict[str, Any]  # see fingerprint
    objective: Objective
    versions: dict[str, str]  # of the packages that figures depend on, when the search began
    trials: dict[str, Trial] = field(default_factory=dict)  # by name, in the order in which they were drawn
    history: list[tuple[Trial, Report, str | None]] = field(default_factory=list, repr=False)  # all reports, with ends
    seconds: float = 0.0  # how long trials have run, over all processes
    started: float | None = field(default=None, repr=False)  # this process's monotonic clock, less `seconds`
    resources: str = ""  # CPUs and GPUs that the trials use
    first_number: int = 0  # how many own trials were taken from earlier searches
    samples: list[int] = field(default_factory=list)  # --num-samples at the start and after each increase
    trained: int = 0  # number of epochs trained here
    damaged: int = 0  # number of unreadable lines in the log
    unseen: bool = False  # whether TensorBoard is still to show the best model
    grown: bool = False  # whether this process is to draw more trials or repeats

    @property
    def searched(self) -> dict[str, dict]:
        """The part of the space that is not fixed."""
        return {key: entry for key, entry in self.space.items() if isinstance(entry, dict)}

    def apply(self, event: dict, report: Report | None = None) -> None:
        """Update the state with an event; raise KeyError or TypeError, and change nothing, if it lacks a field.

        report is that of a reported epoch, unless it is to be made from the event.

        Every event also has its time, and as `ran` the seconds that trials have run. Events:
            samples: each grid point gets this many draws.
            drawn: a trial has this config, and repeats another one or none; it may come from an earlier search.
            started: trials begin to run, on these resources.
            begun: a trial is handed to a worker, to start or to continue, but not as Tune itself restarts it.
            reported: a trial's epoch has these metrics; the trial ends for this reason, is paused, or continues.
            restarted: a trial continues after this epoch, perhaps because it failed; its later reports are void.
            failed: a trial failed with this error.
            ended: a paused trial ends for this reason.
            stopped: no trial runs any more.
            tested: the best model is tested, and written next.
            shown: TensorBoard shows it.
        """
        kind, name, ran = event["event"], event.get("trial"), event["ran"]
        if kind == "samples":
            self.samples += [event["samples"]] * (event["samples"] > max(self.samples, default=0))
        elif kind == "drawn" and not self.searched.keys() - event["config"].keys():  # once, Optuna drew the rest later
            config, known = event["config"], self.searched.keys() | event["config"].keys()
            # Hyperparameters may have been added to train.py since.
            config = config | {key: value for key, value in DEFAULTS.items() if key not in known}
            repeats, trial = event["repeats"], self.trials.setdefault(name, Trial(name))
            trial.config, trial.repeats, trial.source = config, repeats, event.get("source")
        elif name in self.trials:  # its config is not damaged
            self.apply_to(self.trials[name], event, report)
        elif kind == "started":
            self.resources = event["resources"]
        elif kind in ("tested", "shown"):
            self.unseen = kind == "tested"
        if kind in ("started", "stopped"):
            for trial in self.running():  # perhaps a process was killed
                trial.become()
        self.seconds = ran

    def apply_to(self, trial: Trial, event: dict, report: Report | None) -> None:
        """Do what apply does, for the events of a trial."""
        kind = event["event"]
        if kind == "begun":
            trial.become(running=True)
        elif kind == "reported":
            epoch, end, paused, report = event["epoch"], event["end"], event["paused"], report or new_report(event)
            if epoch > len(trial.reports) + 1:
                return  # the report before is unreadable; its epoch is retrained
            trial.reports[epoch - 1 :] = [report]
            trial.become(running=not (end or paused), paused=paused, end=end)
            self.history.append((trial, report, end))
            self.trained += event["ran"] > 0  # otherwise it is taken from an earlier search
        elif kind == "restarted":
            del trial.reports[event["epoch"] :]
            trial.become(running=trial.running)
        elif kind == "failed":
            trial.become(error=event["error"])
        elif kind == "ended" and trial.paused:  # or the line that says so is unreadable, and the trial is retrained
            trial.become(end=event["end"])
        trial.best = None if trial.diverged else self.objective.best(trial.reports)

    def record(self, kind: str, report: Report | None = None, **details: object) -> None:
        """Append an event, with the fields of a report if any, to the log and apply it.

        Raises OSError if it cannot be written; then nothing has changed.
        """
        now = time.monotonic()  # the wall clock may be set, or jump when a laptop wakes
        if kind == "started":
            self.started = now - self.seconds
        ran = self.seconds if self.started is None else now - self.started
        if kind == "stopped":
            self.started = None
        event = {"event": kind, "time": time.time(), "ran": ran} | details | (asdict(report) if report else {})
        # A trial's end must be on disk before its files are deleted.
        append_line(self.folder / LOG_FILE, event, durable=bool(details.get("end")))
        self.apply(event, report)

    @contextlib.contextmanager
    def session(self, trials: Iterable[Trial], resources: str) -> Iterator[None]:
        """Record that these trials run, on these resources, during the block; those that failed are tried again."""
        self.record("started", resources=resources)
        for trial in trials:
            if trial.error:
                self.record("restarted", trial=trial.name, epoch=len(trial.reports))
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a full disk has ended the search, and must not hide why
                self.record("stopped")

    def draw(self, trials: list[Trial]) -> list[Trial]:
        """Add those of these trials that the search does not have yet, and return them.

        Those whose config another one has are skipped; a message says how many.
        """
        known = {config_key(trial.config) for trial in self.trials.values()}
        missing, new = [trial for trial in trials if trial.name not in self.trials], []
        for trial in missing:
            if config_key(trial.config) not in known:
                self.record("drawn", trial=trial.name, config=trial.config, repeats=trial.repeats)
                known.add(config_key(trial.config))
                new.append(self.trials[trial.name])
        if skipped := len(missing) - len(new):
            print(f"Skipped {skipped} of {len(trials)} trials with the config of another trial.", file=sys.stderr)
        return new

    def repeats(self, count: int) -> list[Trial]:
        """Return trials that train the `count` best configs with the other random seeds asked for.

        Seeds with which another trial trains the config are skipped.
        """
        repeats: list[Trial] = []
        for trial in self.ranking()[:count]:
            others = [each.config for each in (*self.trials.values(), *repeats) if each.repeats != trial.name]
            configs = (trial.config | {"seed": seed} for seed in itertools.count(trial.config["seed"] + 1))
            for config in itertools.islice((c for c in configs if c not in others), self.settings.repeats or 0):
                repeats.append(Trial(f"{trial.name}_seed_{config['seed']}", config, trial.name))
        return repeats

    def own_trials(self) -> list[Trial]:
        """Return the trials that do not repeat another one."""
        return [trial for trial in self.trials.values() if not trial.repeats]

    def ended(self) -> list[Trial]:
        """Return the search's own trials that have ended."""
        return [trial for trial in self.own_trials() if trial.end]

    def running(self) -> list[Trial]:
        """Return all trials that workers have, which may still be starting."""
        return [trial for trial in self.trials.values() if trial.running]

    def unfinished(self) -> list[Trial]:
        """Return all trials that have not ended, including failed ones."""
        return [trial for trial in self.trials.values() if not trial.end]

    def interrupted(self) -> bool:
        """Return whether any trial has neither ended nor failed."""
        return any(not trial.error for trial in self.unfinished())

    def ranking(self) -> list[Trial]:
        """Return the search's own trials, best first; of equals, the one with the lower loss."""
        trials = [trial for trial in self.own_trials() if trial.best]
        return sorted(trials, key=lambda trial: (-self.objective.score(trial.best), trial.best.loss))

    def is_complete(self, repeated_trials: int) -> bool:
        """Return whether no trial is left to run, nor a repeat of one of the repeated_trials best to draw."""
        missing = [trial for trial in self.repeats(repeated_trials) if trial.name not in self.trials]
        return bool(self.trials) and not (self.unfinished() or missing or self.damaged or self.grown)

    def time_left(self) -> float:
        """Return the seconds left of the time budget."""
        return (self.settings.time_budget or math.inf) - self.seconds

    def write(self) -> None:
        """Write search.json."""
        parts = {"objective": astuple(self.objective), "space": self.space, "images": self.images}
        parts |= {"versions": self.versions, "draws": [self.first_number]}
        write_json(self.folder / SEARCH_FILE, {"format": FORMAT, "settings": asdict(self.settings)} | parts)


def new_folder(settings: Settings) -> Path:
    """Return the folder of a new search; raise InputError if it is not empty or cannot be created."""
    name = settings.name or datetime.now().strftime("search_%Y-%m-%d_%H-%M-%S")
    folder = Path(settings.output_dir).absolute() / name
    # A link or a mount point could not be replaced by the folder that is written under another name first.
    if settings.name and os.path.lexists(folder) and (folder.is_symlink() or folder.is_mount() or not is_empty(folder)):
        raise InputError(f"{short_path(folder)} already exists; choose another --name, or resume it if it is a search")
    parent = next(parent for parent in folder.parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{parent} is not a writable folder; choose another --output-dir")
    return folder


def is_empty(folder: Path) -> bool:
    """Return whether a path is an empty folder, as far as this user can tell."""
    with contextlib.suppress(OSError):
        return folder.is_dir() and not any(folder.iterdir())
    return False


@contextlib.contextmanager
def creating_search(settings: Settings, space: dict, dataset: Dataset, objective: Objective) -> Iterator[Search]:
    """Yield a new search in a hidden folder, to which the block adds trials; then write search.json and rename that.

    A search thus exists completely or not at all. Raises InputError if its folder cannot be created.
    """
    folder = new_folder(settings)
    hidden = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*.tmp"):
        if left.name[len(folder.name) + 2 : -len(".tmp")].isdigit():
            with contextlib.suppress(OSError), lock(left / LOG_FILE) as free:
                if free:  # left by a killed process
                    remove(left)
    try:
        hidden.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot create {folder} ({error.strerror}); choose another --name") from error
    try:
        with lock(hidden / LOG_FILE):
            search = Search(hidden, settings, space, fingerprint(dataset), objective, VERSIONS)
            yield search
            search.write()
            while folder.exists() and not settings.name:  # taken by another search that started in the same second
                time.sleep(1)
                folder = new_folder(settings)
            with explain_failure(folder):
                flush(hidden / LOG_FILE)
                hidden.rename(folder)
                flush(folder.parent)
            search.folder = folder
    finally:
        remove(hidden)


def open_search(folder: Path, changes: dict) -> Search:
    """Return the search in a folder, restored from its log, with the settings in `changes` replaced.

    Raises InputError if it is damaged or from another version, or if a setting may not change like that.
    """
    path = folder / SEARCH_FILE
    try:
        content = loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise ValueError
        content["settings"].pop("sampler", None)  # earlier versions had --sampler
        settings, objective = Settings(**content["settings"]), Objective(*content["objective"])
        settings = replace(settings, output_dir=str(folder.parent), name=folder.name)  # it may have been moved
        search = Search(folder, settings, content["space"], content["images"], objective, content["versions"])
        search.first_number = content["draws"][0]
        events, search.damaged = read_lines(folder / LOG_FILE)
    except OSError as error:
        raise InputError(f"no search found in {short_path(folder)!r}; pass a folder such as outputs/NAME") from error
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is damaged, or from another version; start a new search") from error
    for event in events:
        try:
            search.apply(event)
        except (KeyError, TypeError, AttributeError):
            search.damaged += 1
    if settings.num_samples > max(search.samples, default=0):  # its line is unreadable, or from an earlier version
        search.samples.append(settings.num_samples)
    last = replace(settings, num_samples=search.samples[-1])  # after a kill, the log may be ahead of search.json
    for key, value in changes.items():
        before = getattr(last, key)
        if key in GROWABLE and before is not None and value < before:
            raise InputError(f"{flag(key)} {value:g} is less than the search has; use at least {before:g}")
        if key not in CHANGEABLE and value != before:
            was = f"{flag(key)} is {value}, but was {before} when the search began"
            raise InputError(f"{was}; remove it, or use another --name")
    if "data_dir" in changes and settings.dataset == "synthetic":
        raise InputError("--data-dir cannot be combined with synthetic images; remove it")
    search.settings = replace(last, **changes)
    more, before = ((each.num_samples, each.repeats or 0) for each in (search.settings, settings))
    search.grown = more[0] > before[0] or more[1] > before[1]
    return search


def check_unchanged(search: Search, space: dict, objective: Objective) -> None:
    """Refuse to resume a search with another space or objective; note unreadable lines and other versions."""
    before = DEFAULTS | search.space | vars(search.objective)
    for key, now in (space | vars(objective)).items():
        if key not in before:  # a hyperparameter that has been added to train.py
            raise InputError(f"the search began without {key!r}; add its default in train.py, as in FRACTION(0.0)")
        if now != before[key]:
            raise InputError(
                f"{key!r} is {now}, but was {before[key]} when the search began; restore it, or start a new search "
                "with --warm-start"
            )
    if missing := search.searched.keys() - space.keys():
        raise InputError(f"param_space lacks {min(missing)!r}, which the search varies; restore it")
    if search.damaged:
        sentence = (
            f"Skipping {search.damaged} unreadable lines of {search.folder / LOG_FILE}; their epochs are retrained."
        )
        print(sentence, file=sys.stderr)
    for package, version in VERSIONS.items():
        if version != (then := search.versions.get(package)):
            print(f"The search began with {package} {then}; with {version}, results may differ.", file=sys.stderr)


def check_same_images(search: Search, dataset: Dataset) -> None:
    """Refuse to resume a search with other images."""
    for part, digest in fingerprint(dataset).items():
        if digest != search.images[part]:
            raise InputError(
                f"the {part} in {search.settings.data_dir} have changed since the search began; restore them, or start "
                "a new search"
            )


@contextlib.contextmanager
def lock_folder(folder: Path, shared: bool = False) -> Iterator[None]:
    """Keep other processes from running the search in a folder, and unless shared, from warm-starting from it.

    Raises InputError if another process is running it, or there is no such search.
    """
    if not (folder / SEARCH_FILE).exists():
        raise InputError(f"no search found in {short_path(folder)!r}; pass a folder such as outputs/NAME")
    with lock(folder / LOG_FILE, shared) as free:  # the one file that is never replaced
        if not free:
            raise InputError(
                f"another process is using the search in {short_path(folder)}; wait for it to finish, or stop it"
            )
        yield


@contextlib.contextmanager
def lock_search(folder: Path) -> Iterator[None]:
    """Lock a folder to run its search (see lock_folder); if this process is interrupted, say how to resume."""
    with lock_folder(folder):
        for path in (*folder.glob(".*.tmp"), *folder.glob(".ray_*")):  # of a process that was killed
            remove(path)
        try:
            yield
        except InputError:
            raise
        except BaseException:
            print(f"Interrupted. To resume: {script_command('--resume', folder)}", flush=True)
            raise


def script_command(flag: str, folder: Path, *others: str) -> str:
    """Return the command that runs hparam_search.py with a flag, a search folder and other flags."""
    script = Path(__file__).resolve().parents[1] / "hparam_search.py"
    return shlex.join(["python", short_path(script), flag, short_path(folder), *others])


def short_path(path: Path) -> str:
    """Return an absolute path as one would type it: relative if it is below the working directory."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
