"""What is known of a search, and how it is stored.

    search.json   the settings, the space in words, and what the images were
    log.jsonl     every event of the search, a line each, in the order in which it happened

What is known of the trials changes by Search.apply(event) alone, live and on resume: resuming is replaying the log.
"""

import contextlib
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from data import Dataset, InputError, fingerprint
from search.files import append_lines, loads, lock, read_lines, write_json
from search.settings import GROWABLE, Settings, flag
from search.space import describe, searched_ranges
from train import Report

SEARCH_FILE, LOG_FILE = "search.json", "log.jsonl"
FORMAT = 5  # of both files; other versions are refused


class Objective(NamedTuple):
    """What makes an epoch the best of its trial, and a trial the best of its search."""

    metric: str  # a field of Report
    mode: str  # max or min

    @property
    def shown(self) -> list[str]:
        """The metrics that are shown of a best epoch."""
        return list(dict.fromkeys(["accuracy", "loss", self.metric]))

    def score(self, report: Report) -> float:
        """Return a number that is higher for a better report."""
        value = getattr(report, self.metric)
        return value if self.mode == "max" else -value

    def best(self, reports: Iterable[Report]) -> Report | None:
        """Return the first best of the reports with a finite loss."""
        return max((report for report in reports if math.isfinite(report.loss)), key=self.score, default=None)


@dataclass
class Trial:
    """What is known of a trial."""

    name: str
    objective: Objective
    config: dict = field(default_factory=dict)
    repeats: str | None = None  # the trial whose config it trains again, with another seed
    reports: list[Report] = field(default_factory=list)  # one per epoch, in order
    end: str | None = None  # why it ended
    error: str | None = None  # why it failed, in a sentence

    @property
    def id(self) -> str:
        """The number in its name."""
        return self.name.removeprefix("train_cifar_")

    @property
    def diverged(self) -> bool:
        """Whether its loss became NaN or infinite."""
        return bool(self.reports) and not math.isfinite(self.reports[-1].loss)

    @property
    def status(self) -> str:
        """PENDING, UNFINISHED, ERROR, DIVERGED or TERMINATED."""
        if self.error:
            return "ERROR"
        if self.end:
            return "DIVERGED" if self.diverged else "TERMINATED"
        return "UNFINISHED" if self.reports else "PENDING"

    @property
    def best(self) -> Report | None:
        """Its best epoch, whose weights are on disk while they are needed; None if it diverged or has no report."""
        return None if self.diverged else self.objective.best(self.reports)


@dataclass
class Search:
    """What is known of a search.

    Attributes:
        folder: an absolute path.
        settings: with the scheduler's figures.
        space: the entries of the space, in words: see describe.
        searched: what is searched: see searched_ranges.
        images: see fingerprint.
        trials: by name, in the order in which they were drawn.
        seconds: how long it has run, over all processes.
        resources: what it runs on, as a line of text.
        damaged: lines of the log that could not be read.
    """

    folder: Path
    settings: Settings
    space: dict[str, str]
    searched: dict[str, dict]
    images: dict[str, str]
    objective: Objective
    trials: dict[str, Trial] = field(default_factory=dict)
    seconds: float = 0.0
    resources: str = ""
    damaged: int = 0
    started: tuple[float, float] = (0.0, 0.0)  # when its process began to run trials, and its seconds then
    unwritten: list[dict] = field(default_factory=list)

    def apply(self, event: dict) -> None:
        """Change what is known by an event.

        Events, besides their time:
            started: the trials begin to run, on these resources.
            drawn: a trial has this config, and repeats another one or none.
            reported: a trial's epoch has these metrics, and the trial ends for this reason or goes on.
            restarted: a trial continues after this epoch; what it reported beyond is void.
            failed: a trial failed with this error.
            stopped: no trial runs any more.
        """
        kind = event["event"]
        if kind == "started":
            self.started, self.resources = (event["time"], self.seconds), event["resources"]
        elif kind == "drawn":
            trial = self.trials.setdefault(event["trial"], Trial(event["trial"], self.objective))
            trial.config, trial.repeats = event["config"], event["repeats"]
            return
        self.seconds = self.started[1] + event["time"] - self.started[0]
        trial = self.trials.get(event.get("trial"))
        if not trial:  # no trial's event, or that in which it was drawn is damaged
            return
        if kind == "reported":
            report = Report(**{key.name: event[key.name] for key in fields(Report)})
            if report.epoch > len(trial.reports) + 1:
                return  # the epoch before is damaged, so both are trained again
            trial.reports[report.epoch - 1 :] = [report]
            trial.end, trial.error = event["end"], None
        elif kind == "restarted":
            del trial.reports[event["epoch"] :]
            trial.end = trial.error = None
        elif kind == "failed":
            trial.error = event["error"]

    def record(self, kind: str, **details: object) -> None:
        """Apply an event and append it to the log.

        Raises:
            OSError: the log cannot be written; the next event tries again.
        """
        event = {"event": kind, "time": time.time()} | details
        self.apply(event)
        self.unwritten.append(event)
        try:
            append_lines(self.folder / LOG_FILE, self.unwritten)
        except OSError as error:
            raise OSError(f"cannot write {self.folder / LOG_FILE} ({error.strerror}); make room there") from error
        self.unwritten.clear()

    def draw(self, configs: list[dict]) -> None:
        """Add those trials that it does not have yet."""
        for i, config in enumerate(configs):
            if trial_name(i) not in self.trials:
                self.record("drawn", trial=trial_name(i), config=config, repeats=None)

    def draw_repeats(self, count: int) -> None:
        """Add trials that train the best configs again, with the random seeds that the settings ask for."""
        for trial in self.ranking()[:count]:
            for i in range(1, (self.settings.repeats or 0) + 1):
                seed = trial.config["seed"] + i
                name = f"{trial.name}_seed_{seed}"
                if name not in self.trials:
                    self.record("drawn", trial=name, config=trial.config | {"seed": seed}, repeats=trial.name)

    def own_trials(self) -> list[Trial]:
        """Return the trials that repeat no other one."""
        return [trial for trial in self.trials.values() if not trial.repeats]

    def all_ended(self) -> bool:
        """Return whether it has trials, all of which have ended."""
        return bool(self.trials) and not self.unfinished()

    def interrupted(self) -> bool:
        """Return whether it has trials that have neither ended nor failed."""
        return any(not (trial.end or trial.error) for trial in self.trials.values())

    def ended_ranking(self) -> list[Trial]:
        """Return the ranking of the trials that have ended."""
        return [trial for trial in self.ranking() if trial.end]

    def unfinished(self) -> list[Trial]:
        """Return the trials that have not ended; those that failed are among them."""
        return [trial for trial in self.trials.values() if not trial.end]

    def ranking(self) -> list[Trial]:
        """Return its own trials that have a best epoch, the best trial first; of equals, that with the lower loss."""
        trials = [trial for trial in self.own_trials() if trial.best]
        return sorted(trials, key=lambda trial: (-self.objective.score(trial.best), trial.best.loss))

    @property
    def time_left(self) -> float:
        """The seconds that are left of its time budget."""
        return (self.settings.time_budget or math.inf) - self.seconds

    def check_time_left(self) -> None:
        """Refuse to resume it without time."""
        if self.time_left <= 0:
            raise InputError(f"the time budget of {self.settings.time_budget:g} s is spent; raise --time-budget")

    def write(self) -> None:
        """Write search.json."""
        settings = asdict(self.settings)
        parts = {"space": self.space, "searched": self.searched, "images": self.images, "objective": self.objective}
        write_json(self.folder / SEARCH_FILE, {"format": FORMAT, "settings": settings} | parts)


def trial_name(i: int) -> str:
    """Return the name of the i-th trial, from 0, which is also that of its folder."""
    return f"train_cifar_{i:05}"


def create_search(settings: Settings, space: dict, dataset: Dataset, objective: Objective) -> Search:
    """Make the folder of a new search.

    Raises:
        InputError: it cannot be made.
    """
    parent = Path(settings.output_dir).resolve()
    while True:
        folder = parent / (settings.name or datetime.now().strftime("search_%Y-%m-%d_%H-%M-%S"))
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError as error:
            if settings.name:
                raise InputError(taken(folder)) from error
            time.sleep(0.1)  # until the next second
        except OSError as error:
            raise InputError(f"cannot create {folder} ({error.strerror}); choose another --output-dir") from error
    search = Search(folder, settings, describe(space), searched_ranges(space), fingerprint(dataset), objective)
    search.write()
    return search


def check_new_folder(settings: Settings) -> None:
    """Refuse an existing or impossible search folder, before images are read and Ray starts."""
    parent = Path(settings.output_dir).resolve()
    if settings.name and (parent / settings.name).exists():
        raise InputError(taken(parent / settings.name))
    existing = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{existing} is not a writable folder; choose another --output-dir")


def taken(folder: Path) -> str:
    return f"{shown(folder)} already exists; choose another --name, or --resume it"


def open_search(folder: Path, changes: dict | None = None) -> Search:
    """Return the search in a folder, as its log tells.

    Args:
        folder: an absolute path.
        changes: settings to extend, as flags gave them.

    Raises:
        InputError: it is not a search of this version, is damaged, or a setting would shrink.
    """
    try:
        text = (folder / SEARCH_FILE).read_bytes()
    except OSError as error:
        raise InputError(f"no search found in {shown(folder)!r}; pass a search folder such as outputs/NAME") from error
    try:
        if json.loads(text).get("format") != FORMAT:
            raise InputError(f"{folder / SEARCH_FILE} is from another version; use that version, or start a new search")
        content = loads(text)
    except (ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder / SEARCH_FILE} is damaged ({error}); start a new search") from error
    settings = extend(Settings(**content["settings"]), changes or {})
    objective = Objective(*content["objective"])
    search = Search(folder, settings, content["space"], content["searched"], content["images"], objective)
    events, search.damaged = read_lines(folder / LOG_FILE)
    for event in events:
        search.apply(event)
    if search.damaged:
        words = f"{search.damaged} unreadable line{'s' * (search.damaged > 1)} in {shown(folder / LOG_FILE)}"
        print(f"Skipping {words}; those epochs will be retrained.", file=sys.stderr)
    return search


def extend(settings: Settings, changes: dict) -> Settings:
    """Return settings with larger values, or moved images."""
    for key in GROWABLE:
        before = getattr(settings, key)
        if key in changes and before is not None and changes[key] < before:
            raise InputError(f"{flag(key)} can only grow: the search already has {before:g}")
    if "data_dir" in changes:
        if settings.dataset == "synthetic":
            raise InputError("--data-dir cannot be combined with synthetic images; remove it")
        changes = changes | {"data_dir": str(Path(changes["data_dir"]).resolve())}
    return replace(settings, **{key: value for key, value in changes.items() if key != "resume"})


def check_unchanged(search: Search, space: dict, objective: Objective) -> None:
    """Refuse to resume a search with another space or objective."""
    for key, text in (describe(space) | {"METRIC, MODE": list(objective)}).items():
        before = list(search.objective) if key == "METRIC, MODE" else search.space.get(key)
        if text != before:
            raise InputError(
                f"{key!r} is {text}, but was {before} when the search began; restore it, or start a new one"
            )


def check_same_images(search: Search, dataset: Dataset) -> None:
    """Refuse to resume a search with other images."""
    for part, digest in fingerprint(dataset).items():
        if digest != search.images[part]:
            raise InputError(
                f"the {part} in {search.settings.data_dir} have changed since the search began; restore them, or start "
                "a new search"
            )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from running the search in a folder; if this one is interrupted, say how to resume.

    Raises:
        InputError: another process is running it, or there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(f"no search found in {shown(folder)!r}; pass a search folder such as outputs/NAME")
    with lock(folder) as free:
        if not free:
            raise InputError("another process is running this search; wait for it to finish, or stop it")
        try:
            yield
        except (KeyboardInterrupt, OSError):
            print(f"Interrupted. To resume: {resume_command(folder)}", flush=True)
            raise


def resume_command(folder: Path) -> str:
    """Return the command that continues the search in a folder."""
    script = Path(__file__).resolve().parents[1] / "hparam_search.py"
    return shlex.join(["python", shown(script), "--resume", shown(folder)])


def shown(path: Path) -> str:
    """Return an absolute path as one would type it: relative if it is below the working directory."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
