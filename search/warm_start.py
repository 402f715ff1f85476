"""Starting a search with the trials of earlier ones, as if it had trained them itself."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from data import InputError
from search.files import link
from search.records import TRIAL_PREFIX, Search, Trial, lock_folder, open_search, short_path
from search.tensorboard import Board
from search.trial import TRAINING_FILE
from train import CONFIG_KEYS


@contextlib.contextmanager
def earlier_search(folder: Path) -> Iterator[Search]:
    """Yield the search in a folder, which others can meanwhile read but not run.

    Raises InputError if it is running or from another version.
    """
    with lock_folder(folder, shared=True):
        yield open_search(folder, {})


def take(search: Search, searches: Sequence[Search]) -> None:
    """Take the trials that fit from earlier searches, and print how many.

    Their reports are recorded, and their files linked; unfinished trials will continue. Raises InputError if no trial
    fits.
    """
    board = Board(search)
    for earlier in searches:
        reasons = [take_trial(search, board, earlier, trial) for trial in earlier.trials.values()]
        counts = Counter(reason for reason in reasons if reason)
        rest = "; skipped: " + ", ".join(f"{reason} ({count})" for reason, count in counts.items()) if counts else ""
        print(f"Took {reasons.count(None)} of {len(reasons)} trials from {short_path(earlier.folder)}{rest}.")
    board.close_all()
    search.first_number = len(search.own_trials())
    if searches and not search.first_number:
        raise InputError("no trial of the earlier searches fits; undo the differences above, or remove --warm-start")


def take_trial(search: Search, board: Board, earlier: Search, trial: Trial) -> str | None:
    """Take a trial of an earlier search, if it fits; return why not, or None."""

    def name_of(config: dict, repeats: bool) -> str | None:
        same = (each.name for each in search.trials.values() if each.config == config and bool(each.repeats) == repeats)
        return next(same, None)

    if reason := misfit(trial, earlier, search):
        return reason
    if name_of(trial.config, bool(trial.repeats)):
        return "already taken"
    name, repeats = f"{TRIAL_PREFIX}{len(search.own_trials()):05}", None
    if trial.repeats:
        original = earlier.trials.get(trial.repeats)
        repeats = original and name_of(original.config, False)
        if not repeats:
            return "repeats a trial that was not taken"
        name = f"{repeats}_seed_{trial.config['seed']}"
    folder = earlier.folder / trial.name
    (search.folder / name).mkdir()
    for path in (*folder.glob("weights_*.pt"), *folder.glob(TRAINING_FILE)):
        link(path, search.folder / name / path.name)
    beside = earlier.folder.parent == search.folder.parent  # both may be moved together
    source = str(folder.relative_to(search.folder.parent) if beside else folder)
    search.record("drawn", trial=name, config=trial.config, repeats=repeats, source=source)
    for report in trial.reports:
        is_last = report is trial.reports[-1]
        state = {"end": trial.end if is_last else None, "paused": trial.paused and is_last}
        search.record("reported", report, trial=name, **state)
    board.write(search.trials[name])
    if trial.end:
        board.end(search.trials[name])
    board.close(name)
    return None


def misfit(trial: Trial, earlier: Search, search: Search) -> str | None:
    """Return why a trial of an earlier search cannot count as one of this search, or None.

    Searched hyperparameters may have any valid value, and the seed may differ.
    """
    if earlier.images != search.images:
        return "different images"
    if earlier.objective != search.objective:
        return "different METRIC or MODE"  # the weights that were kept are not those of the best epoch
    if not trial.reports:
        return "not trained"
    if trial.repeats and not trial.end:
        return "unfinished repeat"
    for key, value in trial.config.items():
        if key not in CONFIG_KEYS:
            return f"unknown {key}"
        if not CONFIG_KEYS[key].is_valid(value):
            return f"invalid {key}"
        if key != "seed" and not isinstance(search.space[key], dict) and value != search.space[key]:
            return f"different {key}"
    return next((f"lacks {key}" for key in CONFIG_KEYS if key not in trial.config), None)
