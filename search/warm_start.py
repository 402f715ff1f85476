"""Beginning a search with the trials of earlier ones, as if it had trained them itself."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from data import InputError
from search.files import link, remove
from search.records import TRIAL_PREFIX, Search, Trial, lock_folder, open_search, short_path
from search.tensorboard import Board
from train import CONFIG_KEYS


def open_earlier(folder: Path) -> Search:
    """Return the search in a folder; raise InputError if it is running, damaged or from another version."""
    with lock_folder(folder):
        return open_search(folder, {})


def take(search: Search, earlier: list[Search]) -> None:
    """Begin a new search with the trials of earlier ones that fit, and print how many there are.

    Their reports are recorded, and their files linked: those that have not ended continue. Raises InputError if there
    are earlier searches, but no trial fits; then, as on any error, the new folder is removed.
    """
    try:
        board = Board(search)
        for other in earlier:
            reasons = Counter(take_trials(search, board, other))
            line = f"Taken from {short_path(other.folder)}: {reasons.pop(None, 0)} of {len(other.trials)} trials"
            rest = ", ".join(f"{reason} ({count})" for reason, count in reasons.items())
            print(line + (f"; not taken: {rest}." if rest else "."))
        board.close_all()
        if earlier and not search.trials:
            raise InputError("no trial of the earlier searches fits; restore param_space, or remove --warm-start")
    except BaseException:
        remove(search.folder)
        raise


def take_trials(search: Search, board: Board, other: Search) -> Iterator[str | None]:
    """Take the trials of another search that fit, and yield for each why it is not taken, or None."""
    names: dict[str | None, str | None] = {None: None}  # of the other search's trials → in this one
    for trial in other.trials.values():
        reason = "other images" if other.images != search.images else misfit(trial, search.space)
        if not reason and (known := [own.name for own in search.trials.values() if own.config == trial.config]):
            reason, names[trial.name] = "taken already", known[0]
        if not reason and trial.repeats not in names:
            reason = "without the trial that it repeats"
        if not reason:
            repeats, number = names[trial.repeats], len(search.taken())
            name = f"{repeats}_seed_{trial.config['seed']}" if repeats else f"{TRIAL_PREFIX}{number:05}"
            names[trial.name] = name
            take_trial(search, board, other.folder / trial.name, trial, name, repeats)
        yield reason


def misfit(trial: Trial, space: dict) -> str | None:
    """Return why a trial cannot count as one of a search of this space, or None.

    Searched hyperparameters may have any valid value, and the seed may differ.
    """
    if not trial.reports or (trial.repeats and not trial.end):
        return "not trained"
    for key, value in trial.config.items():
        if key not in CONFIG_KEYS or not CONFIG_KEYS[key][0](value):
            return f"invalid {key}"
        if key != "seed" and not isinstance(space[key], dict) and value != space[key]:
            return f"other {key}"
    return next((f"without {key}" for key in CONFIG_KEYS if key not in trial.config), None)


def take_trial(search: Search, board: Board, folder: Path, trial: Trial, name: str, repeats: str | None) -> None:
    """Record a trial under a name of this search, and link the weights and training states in its folder."""
    (search.folder / name).mkdir()
    for path in folder.glob("*.pt"):
        link(path, search.folder / name / path.name)
    search.record("drawn", trial=name, config=trial.config, repeats=repeats, source=str(folder))
    for report in trial.reports:
        is_last = report is trial.reports[-1]
        state = {"end": trial.end if is_last else None, "paused": trial.paused and is_last}
        search.record("reported", trial=name, **asdict(report), **state)
        board.write(search.trials[name], 0)
    if trial.end:
        board.end(search.trials[name])
